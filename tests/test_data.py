"""Text in, the same tokens out. Batches are a function of (seed, step, slot). Bad text costs one
sentence."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, slow

import data
from core import backbone, run
from core.common import UserError, World

WORLD = World(0, 1, torch.device("cpu"))


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text())


def make_shards(folder, ids, **meta):
    """A folder of shards with the given ids in both splits."""
    folder.mkdir()
    for split in ("train", "val"):
        np.asarray(ids, np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", **meta}))
    return folder


def make_tokenizer(folder, shards, bos=False, **tokens):
    """Save the BPE of `shards` with more special tokens; with `bos` it begins every text with <s>."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shards / "tokenizer.json"), **tokens)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(folder)
    return folder


def all_ids(folder):
    """The ids of both splits of a folder of shards."""
    dtype = read_meta(folder)["dtype"]
    splits = [np.fromfile(folder / f"{split}.bin", dtype) for split in ("train", "val")]
    return np.concatenate(splits)


def write_documents(folder, text):
    """A folder of twelve text files. `text` holds {i}."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(text.format(i=i), encoding="utf-8")
    return folder


def texts_of(folder, split):
    ids = np.fromfile(folder / f"{split}.bin", read_meta(folder)["dtype"]).tolist()
    return backbone.load_tokenizer(folder).decode(ids).split(backbone.EOS)[:-1]


# -------------------------------------------------------------------------------------------------
# Sources

def test_shards_hold_the_text(shards):
    meta = read_meta(shards)
    documents = list(data.documents(meta["source"]))
    assert len(documents) > 20
    train = texts_of(shards, "train")
    val = texts_of(shards, "val")
    assert sorted(train + val) == sorted(documents)             # every document whole, none twice
    assert not set(train) & set(val)
    assert val[0] == documents[0]                               # the first one is always held out
    assert sum(len(text.encode()) for text in val) == meta["bytes"]["val"]
    for split in ("train", "val"):
        assert np.memmap(shards / f"{split}.bin", meta["dtype"]).size == meta["tokens"][split]
    assert json.loads((shards / "result.json").read_text()) == meta


@slow
def test_the_default_is_the_standard_library():
    source = data.resolve("stdlib")
    files = data.places(source)
    assert source["kind"] == "stdlib" and len(files) > 300
    assert not any("test" in file.parts for file in files)
    assert "import" in next(data.read(files[0], source))


def test_kinds_of_text(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.md").write_text("# héllo\n\n" + "word " * 50)
    (folder / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "c.py").write_text("x = 1\n\n\n\n" * 2000)        # code is never cut
    (folder / "d.TXT").write_text(("line\n" * 20 + "\n") * 400)  # long text is, at blank lines
    (folder / "e.csv").write_text("id,text\n1,three\n2,four\n")
    (folder / "skip.bin").write_bytes(b"\0\1")
    (folder / "folder.md").mkdir()                              # no file
    (folder / "z.py").write_text("")                            # an empty file is no document
    texts = list(data.documents(data.resolve(str(folder))))
    assert texts[1:3] == ["one", "two"] and len(texts[3]) == 18000
    assert texts[-2:] == ["three", "four"]
    pieces = texts[4:-2]
    assert len(pieces) > 3 and "".join(pieces) == (folder / "d.TXT").read_text()
    assert all(piece.endswith("line\n\n") for piece in pieces)
    (folder / "B.JSONL").write_text('{"text": "upper case"}\n')
    assert next(data.documents(data.resolve(str(folder / "B.JSONL")))) == "upper case"


def test_text_as_people_have_it(tmp_path, capsys):
    """Empty cells are skipped. A byte order mark or an empty last line changes nothing. What is no
    text costs one sentence."""
    def texts(name, content):
        (tmp_path / name).write_bytes(content)
        return list(data.documents(data.resolve(str(tmp_path / name))))
    two = b'{"text": "one"}\n{"text": "two"}\n'
    assert texts("null.jsonl", two + b'{"text": null}\n') == ["one", "two"]
    assert texts("empty.csv", b"id,text\n1,one\n2,\n3,two\n") == ["one", "two"]
    assert texts("mark.jsonl", b"\xef\xbb\xbf" + two) == ["one", "two"]
    assert texts("last.jsonl", two + b"\n  \n") == ["one", "two"]
    assert texts("mark.csv", b"\xef\xbb\xbftext\none\n") == ["one"]
    for name in ("mark.md", "mark.py"):
        assert texts(name, b"\xef\xbb\xbfone") == ["one"]
    for name in ("none.jsonl", "none.csv", "none.txt"):         # their loaders refuse no bytes
        assert texts(name, b"") == []
    with pytest.raises(UserError, match=r"half.jsonl could not be read as text .*surrogate"):
        texts("half.jsonl", two + b'{"text": "half \\ud800 a pair"}\n')


@pytest.mark.parametrize("value, kind", [
    ("5", "int"), ("0", "int"), ("false", "bool"), ("[]", "list"), ('{"a": "b"}', "dict"),
    ('"2026-01-31T00:00:00"', "datetime")])
def test_a_value_that_is_no_text_is_refused_by_name(tmp_path, capsys, value, kind):
    (tmp_path / "t.jsonl").write_text(f'{{"text": {value}}}\n')
    message = fails(capsys, data.main, "--data", tmp_path / "t.jsonl", "--out", tmp_path / "out")
    assert "t.jsonl could not be read as text" in message
    assert f"column 'text' holds a value of type {kind}" in message


def test_one_line_says_what_was_read_and_what_was_skipped(tmp_path, capsys):
    """A table with a column of text does not hide the other files."""
    folder = write_documents(tmp_path / "mixed", "document {i}")
    (folder / "a.csv").write_text("id,text\n1,a row\n2,\n3,another\n")
    (folder / "b.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a line"}\n')
    (folder / "c.MD").write_text("# Upper case")
    (folder / "d.md").write_text("# Lower case")
    (folder / "e.md").write_text("")
    (folder / "long.txt").write_text("x" * 2 * data.PIECE + "\n\n")   # cut where it ends
    (folder / "below").mkdir()
    for name in ("photo.png", "README", "below/paper.pdf"):
        (folder / name).write_bytes(b"\0")
    arguments = ["--data", str(folder), "--vocab", "300", "--out", str(tmp_path / "s")]
    data.main(arguments)
    line = "read 13 .txt, 3 .md, 1 .csv, 1 .jsonl; skipped 4 empty documents and 3 other files\n"
    assert line in capsys.readouterr().out
    assert (all_ids(tmp_path / "s") == 0).sum() == 13 + 2 + 2 + 1
    data.main(arguments)
    assert "skipped" not in capsys.readouterr().out             # said when they are made
    (tmp_path / "notes").write_text("one\n" * 9000)             # no ending, but given by name
    data.main(["--data", str(tmp_path / "notes"), "--vocab", "300", "--out", str(tmp_path / "n")])
    assert "read 1 notes; skipped 0 empty documents and 0 other" in capsys.readouterr().out


def test_a_hub_dataset_is_one_place_and_its_empty_rows_are_counted(monkeypatch):
    monkeypatch.setattr(data, "rows", lambda path, column, name: iter(["a", None, "", "b"]))
    source = data.resolve("nobody/text-v1.5")
    seen = Counter()
    assert list(data.documents(source, seen)) == ["a", "b"]
    assert data.summary(source, seen) == "read 1 Hub dataset; skipped 2 empty documents"


def test_special_tokens_in_the_text_stay_text(tmp_path):
    """One EOS a document, also where the text spells it."""
    folder = write_documents(tmp_path / "t", f"document {{i}} says: write {backbone.EOS} at the end\n")
    data.main(["--data", str(folder), "--vocab", "300", "--out", str(tmp_path / "s")])
    assert (all_ids(tmp_path / "s") == 0).sum() == 12


@pytest.mark.parametrize("special", [True, False])
def test_the_mask_token_in_the_text_stays_text(tmp_path, shards, special):
    """A mask token that the tokenizer brings along stands for unknown tokens only."""
    from tokenizers import AddedToken
    mask = AddedToken("<mask>", special=special, normalized=False)
    folder = make_tokenizer(tmp_path / "m", shards, eos_token=backbone.EOS, mask_token=mask)
    entries = json.loads((folder / "tokenizer.json").read_text())
    [entry] = [entry for entry in entries["added_tokens"] if entry["content"] == "<mask>"]
    entry["special"] = special                                  # the library saves True
    (folder / "tokenizer.json").write_text(json.dumps(entries))
    text = write_documents(tmp_path / "t", "document {i} says: a <mask> hides a word")
    data.main(["--data", str(text), "--model", str(folder), "--out", str(tmp_path / "s")])
    mask_id = backbone.load_tokenizer(folder).mask_token_id
    assert mask_id is not None and mask_id not in all_ids(tmp_path / "s")
    assert "a <mask> hides" in texts_of(tmp_path / "s", "train")[0]


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, shards):
    with pytest.raises(UserError, match="it has no end-of-text token"):
        backbone.load_tokenizer(make_tokenizer(tmp_path / "m", shards))


@slow
def test_a_locale_without_utf8(tmp_path):
    folder = write_documents(tmp_path / "texts ü", "document {i} says: naïve\n")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "data.py", "--data", str(folder), "--vocab", "300",
               "--out", str(tmp_path / "s")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **locale})
    assert "naïve" in texts_of(tmp_path / "s", "train")[0]


def test_a_table_gives_the_named_column(tmp_path):
    import datasets
    rows = [f"document {i} says: " + "to be or not to be, " * (i % 7 + 3) for i in range(60)]
    table = datasets.Dataset.from_dict({"body": rows, "id": list(range(60))})
    table.to_parquet(tmp_path / "train.parquet")
    path = f"{tmp_path}/train.parquet"
    assert list(data.documents(data.resolve(f"{path}::body"))) == rows
    with pytest.raises(UserError, match="no column 'text', only body, id"):
        list(data.documents(data.resolve(path)))


def test_a_hub_name():
    source = data.resolve("HuggingFaceFW/fineweb-edu:sample-10BT")
    assert source == {"kind": "hub", "id": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT",
                      "column": "text"}
    assert data.resolve("imdb::body") == {"kind": "hub", "id": "imdb", "config": None,
                                          "column": "body"}


@pytest.mark.parametrize("line, end", [("word " * 20 + "\n \n", " \n"), ("word " * 20 + "\n", "\n")])
def test_long_text_is_cut_at_blank_lines_or_else_at_lines(tmp_path, line, end):
    file = tmp_path / "long.txt"
    file.write_text(line * 2000)
    pieces = list(data.pieces(file))
    assert "".join(pieces) == line * 2000 and len(pieces) > 5
    assert all(piece.endswith(end) for piece in pieces)
    assert all(data.PIECE <= len(piece) <= 2 * data.PIECE + 200 for piece in pieces[:-1])


def test_cuts_are_those_of_the_second_edition(tmp_path):
    """Its rule, on the whole text: the first blank line in the second PIECE characters."""
    chance = random.Random(0)
    paragraphs = [chance.choice("aé語") * chance.randint(1, 900) + "\n" * chance.randint(1, 3)
                  for _ in range(400)]
    text = "".join(paragraphs)
    (tmp_path / "t.txt").write_text(text)
    expected = []
    while len(text) > 2 * data.PIECE:
        blank = re.compile(r"\n[ \t]*\n").search(text, data.PIECE, 2 * data.PIECE)
        expected.append(text[:blank.end()])
        text = text[blank.end():]
    assert len(expected) > 5
    assert list(data.pieces(tmp_path / "t.txt"))[:len(expected)] == expected


def test_memory_does_not_grow_with_a_text_file(tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(("some ninety bytes, again and again, é included " * 2 + "\n").encode() * 60_000)
    assert file.stat().st_size > 5e6
    tracemalloc.start()
    try:
        assert sum(len(text.encode()) for text in data.pieces(file)) == file.stat().st_size
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------------
# Shards

def test_reuse_and_refusal(shards, notes, tmp_path, capsys):
    tokenizer = backbone.load_tokenizer(shards)
    before = (shards / "meta.json").stat().st_mtime_ns
    folder, meta = data.prepare(str(notes), tokenizer, shards, WORLD)
    assert folder == shards and meta == read_meta(shards)
    assert (shards / "meta.json").stat().st_mtime_ns == before          # reused, not rewritten
    other = tmp_path / "other.txt"
    other.write_text("Something else.\n\n" * 2000)
    arguments = ["--data", other, "--vocab", 512, "--out", shards]
    assert "holds shards with source" in fails(capsys, data.main, *arguments)
    strange = data.train_tokenizer(data.resolve(str(other)), 300)
    with pytest.raises(UserError, match="holds shards with tokenizer"):
        data.prepare(str(notes), strange, shards, WORLD)
    with pytest.raises(UserError, match="holds shards with vocab"):
        data.prepare(str(notes), None, shards, WORLD, vocab=300)


def test_edited_text_of_the_same_size_is_other_text(shards, notes):
    file = data.text_files(notes)[0]
    text = file.read_text()
    file.write_text(text.swapcase())
    try:
        with pytest.raises(UserError, match="holds shards with source"):
            data.prepare(str(notes), backbone.load_tokenizer(shards), shards, WORLD)
    finally:
        file.write_text(text)


def test_two_processes_with_one_folder_make_it_once(shards, notes, tmp_path, monkeypatch):
    made = []

    def slow_make(source, tokenizer, out, *rest):
        made.append(out)
        time.sleep(0.2)
        shutil.copytree(shards, out, dirs_exist_ok=True)
    monkeypatch.setattr(data, "make", slow_make)
    arguments = (str(notes), backbone.load_tokenizer(shards), tmp_path / "s", WORLD)
    threads = [threading.Thread(target=data.prepare, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_the_bpe_of_a_text_is_trained_once(tmp_path, shards, notes, monkeypatch):
    """out/data and out/tasks/data have one tokenizer, if text and size agree."""
    shutil.copytree(shards, tmp_path / "data")
    train = data.train_tokenizer
    trained = []

    def watched(source, vocab):
        trained.append(vocab)
        return train(source, vocab)
    monkeypatch.setattr(data, "train_tokenizer", watched)
    out = tmp_path / "tasks" / "data"
    _, meta = data.prepare(str(notes), None, out, WORLD, vocab=512, max_tokens=5000)
    assert trained == [] and meta["tokenizer"] == read_meta(shards)["tokenizer"]
    text = write_documents(tmp_path / "text", "document {i}")
    for i, (source, vocab) in enumerate([(notes, 300), (text, 512)]):
        data.prepare(str(source), None, tmp_path / f"other{i}" / "data", WORLD, vocab=vocab)
    assert trained == [300, 512]


def test_max_tokens_stops_early(tmp_path, notes, shards):
    tokenizer = backbone.load_tokenizer(shards)
    meta = data.write_shards(data.resolve(str(notes)), tokenizer, tmp_path, max_tokens=5000)
    assert 5000 <= meta["tokens"]["train"] < 20_000


def test_task_lines_are_a_share_of_the_training_text_only(tmp_path, notes):
    source = data.resolve(str(notes))
    folders = [tmp_path / "plain", tmp_path / "mixed"]
    for folder in folders:
        folder.mkdir()
    # words of three letters are single tokens only in larger vocabularies
    tokenizer = data.train_tokenizer(source, 2048)
    plain = data.write_shards(source, tokenizer, folders[0], max_tokens=10_000)
    mixed = data.write_shards(source, tokenizer, folders[1], max_tokens=20_000, share=0.5)
    val = [np.fromfile(folder / "val.bin", np.uint16) for folder in folders]
    n = min(map(len, val))
    assert plain["tasks"] == 0 and mixed["tasks"] == 0.5
    assert n > 0 and np.array_equal(val[0][:n], val[1][:n])
    shown = plain["bytes"]["train"] / plain["tokens"]["train"]
    assert mixed["bytes"]["train"] / mixed["tokens"]["train"] == pytest.approx(shown / 2, rel=0.05)


def test_the_largest_id_decides_the_width(tmp_path):
    """32 bits above 65,535, also in a vocabulary with holes."""
    class Wide:
        eos_token_id = 70_000
        backend_tokenizer = types.SimpleNamespace(to_str=lambda: "{}")

        def __len__(self):
            return 60_000

        def get_vocab(self):
            return {"a": 69_999, backbone.EOS: 70_000}

        def __call__(self, texts, **_):
            return {"input_ids": [[69_999] * 3 for _ in texts]}
    folder = tmp_path / "t"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"text {i}")
    meta = data.write_shards(data.resolve(str(folder)), Wide(), tmp_path)
    assert meta["dtype"] == "uint32"
    ids = np.fromfile(tmp_path / "val.bin", np.uint32)
    assert ids[:4].tolist() == [69_999, 69_999, 69_999, 70_000]


def test_bad_input(tmp_path, capsys):
    out = tmp_path / "out"

    def refusal(name, content=None):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        return fails(capsys, data.main, "--data", file, "--vocab", 300, "--out", out)

    assert "no such file or folder" in refusal("missing.txt")
    assert "no such file or folder" in refusal("missing/folder/of/notes")
    assert "empty or a single document" in refusal("empty.txt", b"")
    (tmp_path / "folder").mkdir()
    assert "empty or a single document" in refusal("folder")
    late = b"word word\n" * 20_000 + b"\xc3"
    assert "late.txt could not be read as text (UnicodeDecodeError" in refusal("late.txt", late)
    assert "could not be read" in refusal("bad.jsonl", b'{"text": "fine"}\n{"text": \n')
    assert "no column 'text', only body" in refusal("other.jsonl", b'{"body": "fine"}\n')
    nobody = fails(capsys, data.main, "--data", "nobody/nothing", "--out", out)
    assert "nobody/nothing could not be read" in nobody
    assert not list(out.glob("*.bin")) and not list(out.glob("*.json"))     # nothing half-written


def test_copies_of_the_first_document_are_held_out_too(tmp_path, capsys):
    (tmp_path / "dup").mkdir()
    for name in "ab":
        (tmp_path / "dup" / f"{name}.txt").write_text("the same words in both files\n" * 40)
    assert "a single document" in fails(capsys, data.main, "--data", tmp_path / "dup", "--vocab", "300", "--out",
                                        tmp_path / "o")


def test_names_of_tables_are_no_patterns(tmp_path):
    folder = tmp_path / "notes [2024]"
    folder.mkdir()
    for name, word in (("part1", "one"), ("part[1]", "two")):
        lines = [json.dumps({"text": f"{word} {i} of many words"}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    texts = list(data.documents(data.resolve(str(folder))))
    assert sum(text.startswith("one") for text in texts) == sum(text.startswith("two") for text in texts) == 40
    (tmp_path / "x.jsonl").write_text('{"text": "a", "body": "b"}')
    with pytest.raises(AssertionError, match="write .*x.jsonl::body"):
        data.resolve(f"{tmp_path}/x.jsonl:body")
    assert data.resolve(f"{tmp_path}/x.jsonl::body")["column"] == "body"
    (tmp_path / "col:on").mkdir()
    assert data.resolve(str(tmp_path / "col:on"))["kind"] == "text"


def test_a_folder_of_others_is_left_alone(tmp_path, notes, capsys, monkeypatch):
    """./data is no folder of shards only because out/../data exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").write_text("mine")
    assert run.nearby("out/bridge", "data") == Path("out/data")
    refused = fails(capsys, data.main, "--data", notes, "--vocab", "300", "--out", "data")
    assert "holds other files" in refused and (tmp_path / "data" / "train.bin").read_text() == "mine"
    (tmp_path / "data" / "meta.json").write_text('{"author": "me"}')
    assert "not one of data.py" in fails(capsys, data.main, "--data", notes, "--vocab", "300", "--out", "data")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".lock").write_text("")
    (tmp_path / "o" / ".train.bin.7.tmp").write_text("left by a killed process")
    data.main(["--data", str(notes), "--vocab", "300", "--out", "o"])
    assert not (tmp_path / "o" / ".train.bin.7.tmp").exists()
