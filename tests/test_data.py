"""Text in, the same tokens out; batches are a pure function of (seed, step, slot); bad input costs one sentence."""
import hashlib
import json
import random
import re
import tracemalloc
import types

import numpy as np
import pytest
import torch
from conftest import fails

import data
from core import backbone, run


def write(folder, meta_tokens, ids):
    """A shard folder with the given ids in both splits."""
    folder.mkdir()
    for split in ("train", "val"):
        np.asarray(ids, np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({
        "tokens": {"train": meta_tokens, "val": meta_tokens}, "bytes": {"train": 1, "val": 1}, "dtype": "uint16",
        "tokenizer": "x", "vocab_size": 9, "sha256": {"train": "t", "val": "v"}, "source": {"kind": "text"},
        "max_tokens": 0}))


def test_shards_hold_the_text(runs, text):
    folder = runs.parent / "out" / "data"
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = backbone.load_tokenizer(folder)
    documents = list(data.documents(meta["source"]))
    assert len(documents) > 20
    got = {}
    for split in ("train", "val"):
        raw = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == meta["sha256"][split]
        ids = np.frombuffer(raw, meta["dtype"])
        assert len(ids) == meta["tokens"][split]
        got[split] = tokenizer.decode(ids.tolist()).split(data.EOS)[:-1]
    assert sorted(got["train"] + got["val"]) == sorted(documents)       # every document whole, none twice
    assert not set(got["train"]) & set(got["val"])                      # and on one side only
    assert sum(len(d.encode()) for d in got["val"]) == meta["bytes"]["val"]
    assert got["val"][0] == documents[0]                                # the first one is always held out
    assert json.loads((folder / "result.json").read_text())["sha256"] == meta["sha256"]


def test_the_default_is_the_standard_library():
    source = data.resolve("stdlib")
    texts = [t for _, t in zip(range(30), data.documents(source))]
    assert any("from __future__" in t or "import" in t for t in texts) and source["kind"] == "stdlib"


def test_batches_are_a_function_of_seed_step_slot(runs):
    tokens = data.Tokens(runs / "data", "train", 32)
    whole = tokens.batch(7, 3, range(8), 8)
    assert whole.shape == (8, 33) and whole.dtype == torch.int64
    assert torch.equal(torch.cat([tokens.batch(7, 3, [s], 8) for s in range(8)]), whole)       # any split over ranks
    assert torch.equal(tokens.batch(7, 3, range(8), 8), whole)                                 # any time
    assert not torch.equal(tokens.batch(8, 3, range(8), 8), whole)
    assert not torch.equal(tokens.batch(7, 4, range(8), 8), whole)
    assert isinstance(tokens.ids, np.memmap)                                                   # nothing was read whole


def test_an_epoch_visits_every_window_once(tmp_path):
    T, n = 4, 13
    write(tmp_path / "s", n * (T + 1) + T, range(n * (T + 1) + T))
    tokens = data.Tokens(tmp_path / "s", "train", T)
    assert tokens.n == n
    epochs = []
    for epoch in range(3):
        starts = [int(tokens.batch(0, epoch * n + i, [0], 1)[0, 0]) for i in range(n)]
        assert sorted(s // (T + 1) for s in starts) == list(range(n))
        epochs.append(starts)
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_for_evaluation(tmp_path):
    write(tmp_path / "s", 100, range(100))
    tokens = data.Tokens(tmp_path / "s", "val", 4)
    assert tokens.windows(5)[:, 0].tolist() == [0, 15, 35, 55, 75]              # 19 tiles of 5, evenly spread
    drawn = tokens.windows(5, seed=1)[:, 0].tolist()
    assert drawn == sorted(set(drawn)) and drawn == tokens.windows(5, seed=1)[:, 0].tolist()
    assert len(tokens.windows(1000)) == tokens.n


def test_reuse_and_refusal(runs, tmp_path, capsys, text):
    tokenizer = backbone.load_tokenizer(runs / "toy")
    before = (runs / "data" / "meta.json").stat().st_mtime_ns
    folder, meta = data.prepare(str(text), tokenizer, runs / "data")
    assert (runs / "data" / "meta.json").stat().st_mtime_ns == before          # reused, not rewritten
    assert data.prepare(str(folder), tokenizer, tmp_path / "unused")[0] == folder and not (tmp_path / "unused").exists()
    other = tmp_path / "other.txt"
    other.write_text("Something else.\n\n" * 2000)
    assert "source" in fails(capsys, data.main, "--data", other, "--out", runs / "data")
    from transformers import PreTrainedTokenizerFast
    strange = PreTrainedTokenizerFast(tokenizer_object=data.train_tokenizer(data.resolve(str(other)), 300)
                                      .backend_tokenizer, eos_token=data.EOS)
    with pytest.raises(data.UserError, match="tokenizer"):
        data.prepare(str(text), strange, runs / "data")


def test_kinds_of_text(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.md").write_text("# héllo\n\n" + "word " * 50)
    (folder / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "c.py").write_text("x = 1\n\n\n\n" * 9000)                       # code is never cut
    (folder / "d.txt").write_text(("line\n" * 20 + "\n") * 400)                 # long text is, at blank lines
    (folder / "skip.bin").write_bytes(b"\0\1")
    (folder / "z.py").write_text("")                                            # an empty file is no document
    texts = [t for t in data.documents(data.resolve(str(folder))) if t]
    assert texts[1:3] == ["one", "two"] and texts[3].startswith("x = 1") and len(texts[3]) == 81000
    assert len(texts) > 5 and "".join(texts[4:]) == (folder / "d.txt").read_text()
    assert all(t.endswith("line\n\n") for t in texts[4:])
    data.main(["--data", str(folder), "--vocab", "300", "--out", str(tmp_path / "s")])
    ids = np.concatenate([np.fromfile(tmp_path / "s" / f"{s}.bin", np.uint16) for s in ("train", "val")])
    assert (ids == 0).sum() == len(texts)                                       # one EOS a document


@pytest.mark.parametrize("line, end", [("word " * 20 + "\n \n", " \n"), ("word " * 20 + "\n", "\n"), ("x" * 99, "x")])
def test_long_text_is_cut_somewhere_sensible(line, end):
    text = line * 2000
    parts = list(data.pieces([text]))
    assert "".join(parts) == text and len(parts) > 5 and all(p.endswith(end) for p in parts)
    assert all(data.PIECE <= len(p) <= 2 * data.PIECE for p in parts[:-1])


def pieces_in_memory(text):
    """What pieces() was when a file was read whole: the reference for its cuts."""
    start = 0
    while len(text) - start > 2 * data.PIECE:
        lo, hi = start + data.PIECE, start + 2 * data.PIECE
        blank = re.compile(r"\n[ \t]*\n").search(text, lo, hi)
        cut = blank.end() if blank else text.find("\n", lo, hi) + 1 or hi
        yield text[start:cut]
        start = cut
    yield text[start:]


def random_text(seed, size):
    """Lines, blank lines with spaces in them, long stretches of neither, characters of one to four bytes."""
    chance, parts, length = random.Random(seed), [], 0
    while length < size:
        end = chance.choice(["\n", "\n\n", "\n \t\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", " "])
        parts.append(chance.choice("aé語𝄞 ") * int(chance.choice([3, 70, 4000, 9000]) * chance.random()) + end)
        length += len(parts[-1])
    return "".join(parts)


@pytest.mark.parametrize("seed", range(6))
def test_cuts_do_not_depend_on_the_chunks(seed):
    text, chance = random_text(seed, 150_000), random.Random(seed)
    want = list(pieces_in_memory(text))
    assert len(want) > 8
    for longest in (977, 20_000, 10 ** 6):
        chunks, at = [], 0
        while at < len(text):
            chunks.append(text[at:at + chance.randint(1, longest)])
            at += len(chunks[-1])
        assert list(data.pieces(chunks)) == want
    for size in (0, 1, 2 * data.PIECE, 2 * data.PIECE + 1):                      # where the first cut begins
        assert list(data.pieces(iter(text[:size]))) == list(pieces_in_memory(text[:size]))


def test_a_file_is_read_as_when_it_was_read_whole(tmp_path):
    """Newlines and characters of several bytes lie across the borders of chunks (2^20 characters) and of bytes read."""
    for name, text in (("mixed", random_text(9, 2_500_000)), ("odd", "x" + "語\r\n" * 900_000), ("empty", "")):
        file = tmp_path / f"{name}.txt"
        file.write_bytes(text.encode())
        got = list(data.documents(data.resolve(str(file))))
        assert got == list(pieces_in_memory(file.read_text(encoding="utf-8"))), name
    (tmp_path / "mixed.py").write_bytes((tmp_path / "mixed.txt").read_bytes())
    assert list(data.documents(data.resolve(str(tmp_path / "mixed.py")))) == [(tmp_path / "mixed.txt").read_text()]


def test_bad_bytes_late_in_a_large_file_leave_nothing(tmp_path, capsys):
    good = ("word " * 15 + "\n").encode() * 15_000                              # 1.1 MB
    for name, bytes_, sentence in (("cut", "é".encode()[:1], "not UTF-8"), ("nul", b"\0 ", "binary")):
        (tmp_path / f"{name}.txt").write_bytes(good + bytes_)
        argv = ["--data", tmp_path / f"{name}.txt", "--vocab", "300", "--out", tmp_path / "out"]
        assert sentence in fails(capsys, data.main, *argv)
        assert list((tmp_path / "out").iterdir()) == []


def test_memory_does_not_grow_with_a_text_file(tmp_path):
    """60 MB in one file: 10 MB are enough to read it, and reading it whole, as before, would break that bound."""
    file = tmp_path / "large.txt"
    file.write_bytes((
        "the same line of some ninety bytes, again and again, é included " * 5 + "\n").encode() * 182_000)
    assert file.stat().st_size > 59e6

    def peak(texts):
        tracemalloc.start()                       # every str, whatever this process held before (unlike ru_maxrss)
        try:
            assert sum(len(d.encode()) for d in texts()) == file.stat().st_size
            return tracemalloc.get_traced_memory()[1] / 1e6
        finally:
            tracemalloc.stop()
    assert peak(lambda: data.documents(data.resolve(str(file)))) < 10
    assert peak(lambda: pieces_in_memory(file.read_text(encoding="utf-8"))) > 60


def test_the_section_is_that_of_the_result(runs):
    folder = runs / "data"
    result = json.loads((folder / "result.json").read_text())
    text = run.read_section(folder)
    assert text == data.section(result) and text.startswith("## The text\n")
    assert f"{result['tokens']['train']:,} training" in text and str(folder.parent) not in text
    assert all(len(value) <= 60 for _, value in result["headline"])


def test_a_local_dataset_folder_goes_through_datasets(tmp_path, capsys):
    import datasets
    rows = [f"document {i} says: " + "to be or not to be, " * (i % 7 + 3) for i in range(60)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"body": rows, "id": list(range(60))}).to_parquet(tmp_path / "set" / "train.parquet")
    out = tmp_path / "shards"
    data.main(["--data", f"{tmp_path}/set::body", "--vocab", "300", "--out", str(out)])
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = backbone.load_tokenizer(out)
    texts = [t for s in ("train", "val") for t in
             tokenizer.decode(np.fromfile(out / f"{s}.bin", meta["dtype"]).tolist()).split(data.EOS)[:-1]]
    assert sorted(texts) == sorted(rows)
    assert "no column 'text'" in fails(capsys, data.main, "--data", tmp_path / "set", "--out", tmp_path / "x")


def test_max_tokens_stops_early(tmp_path, text):
    data.main(["--data", str(text), "--vocab", "400", "--max_tokens", "5000", "--out", str(tmp_path / "s")])
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert meta["tokens"]["train"] >= 5000
    assert meta["tokens"]["train"] < sum(len(d) for d in data.documents(meta["source"])) / 4


def test_large_vocabularies_get_32_bits(tmp_path):
    class Wide:
        eos_token_id, backend_tokenizer = 70_000, types.SimpleNamespace(to_str=lambda: "{}")

        def __len__(self):
            return 70_001

        def __call__(self, texts, **_):
            return {"input_ids": [[69_999] * 3 for _ in texts]}
    (tmp_path / "t").mkdir()
    for i in range(3):
        (tmp_path / "t" / f"{i}.txt").write_text(f"text {i}")
    meta = data.write_shards(data.resolve(str(tmp_path / "t")), Wide(), tmp_path)
    assert meta["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "val.bin", np.uint32)[:4].tolist() == [69_999, 69_999, 69_999, 70_000]


def test_bad_input(tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such file" in fails(capsys, data.main, "--data", tmp_path / "missing.txt", "--out", out)
    (tmp_path / "empty.txt").write_text("")
    assert "empty or a single document" in fails(capsys, data.main, "--data", tmp_path / "empty.txt", "--out", out)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    assert "not UTF-8" in fails(capsys, data.main, "--data", tmp_path / "binary.txt", "--out", out)
    (tmp_path / "nul.txt").write_bytes(b"abc\0def" * 9)
    assert "binary" in fails(capsys, data.main, "--data", tmp_path / "nul.txt", "--out", out)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    assert "line 2" in fails(capsys, data.main, "--data", tmp_path / "bad.jsonl", "--out", out)
    (tmp_path / "folder").mkdir()
    assert "in that folder" in fails(capsys, data.main, "--data", tmp_path / "folder", "--out", out)
    assert "could not be opened" in fails(capsys, data.main, "--data", "nobody/nothing", "--out", out)
    assert not list(out.glob("*.bin")) and not list(out.glob("*.json"))        # nothing half-written


def test_shards_cut_short_are_refused(tmp_path):
    write(tmp_path / "s", 120, range(100))
    with pytest.raises(data.UserError, match="200 bytes where meta.json says 240"):
        data.prepare(str(tmp_path / "s"), None, tmp_path / "x")
