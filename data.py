"""data.py: text -> token shards -> batches that are a pure function of (seed, step, slot).

    python data.py                                        # the Python standard library: offline, ~10 s, 2.7M tokens
    python data.py --data notes/ --out out/notes          # .txt .md .py .jsonl, a file or a folder
    python data.py --data HuggingFaceFW/fineweb-edu:sample-10BT --model Qwen/Qwen3-0.6B --max_tokens 1000000000

Writes to --out: train.bin, val.bin (raw uint16 or uint32 token ids, every document ended by EOS), tokenizer.json,
section.md and result.json, and last meta.json (tokens, dtype, tokenizer hash, source, sha256). Every stage calls
`prepare`, which reuses such a folder when it holds what the stage asks for and else refuses it, naming the difference.
Memory does not grow with the corpus: below 0.5 GB for a text file of any size.

Letters: B sequences, T tokens a sequence.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core import tasks as generated
from core.backbone import EOS, load_tokenizer, tokenizer_hash
from core.common import UserError, entry, parse, why
from core.draws import generator
from core.run import atomic, beside, digest, read_json, write_json, write_text

BPE_DOCUMENTS = 20_000  # enough text for a small vocabulary, and a Hub-sized corpus is not streamed twice


@dataclass
class Config:
    data: str = "stdlib"        # stdlib, a text file or folder, HUB_ID[:CONFIG[:COLUMN]], or a folder of shards
    model: str = "toy"          # whose tokenizer: toy (trains a byte-level BPE on the text), a folder or a Hub id
    out: str = "out/data"       # folder to write
    vocab: int = 2048           # vocabulary of the toy's BPE
    tasks: float = 0.0          # with the toy's own BPE: share of generated lines (tasks.py) in the training text
    max_tokens: int = 0         # stop after this many training tokens (0: the whole corpus)
    seed: int = 0               # unused by the shards themselves; kept so that every stage takes --seed


# ---------------------------------------------------------------------------------------------- text -> documents
TEXT = {".txt", ".md", ".py", ".jsonl"}
TABLES = {".parquet", ".arrow", ".csv"}
PIECE = 8_000  # characters: a plain text file has no document boundaries, so it is cut into pieces of about this size


def resolve(data):
    """--data -> {"kind": stdlib | text | hub | shards, ...}: small enough to compare and to print."""
    if data == "stdlib":
        return {"kind": "stdlib", "python": platform.python_version()}
    path, _, rest = (data, "", "") if Path(data).exists() else data.partition(":")
    config, _, column = rest.partition(":")
    path = Path(path)
    hub = {"kind": "hub", "id": str(path), "config": config or None, "column": column or None}
    if not path.exists():
        if path.suffix in TEXT or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
            raise UserError(f"--data {data}: no such file or folder; pass stdlib, a path or a Hub dataset id")
        return hub
    if (path / "meta.json").exists():
        return {"kind": "shards", "path": str(path)}
    if path.is_dir() and any(f.suffix in TABLES for f in path.rglob("*")):
        return {**hub, "id": str(path.resolve())}
    files = _files(path)
    if not files:
        raise UserError(f"--data {data}: no {', '.join(sorted(TEXT))} file in that folder; point --data at the text")
    size = sum(f.stat().st_size for f in files)
    return {"kind": "text", "path": str(path.resolve()), "files": len(files), "bytes": size}


def _files(path):
    """The text files of a folder, in a fixed order; a file that is named itself, whatever its ending."""
    return sorted(f for f in path.rglob("*") if f.suffix in TEXT and f.is_file()) if path.is_dir() else [path]


def documents(source):
    """Yield the texts of `source` one by one, in a fixed order; memory holds one document at a time."""
    if source["kind"] == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        # left out: tests, installed packages, and two folders of generated tables (code pages, help topics)
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
        for file in sorted(root.rglob("*.py")):
            if not skip & set(file.relative_to(root).parts):
                yield file.read_text(encoding="utf-8", errors="replace")
    elif source["kind"] == "text":
        for file in _files(Path(source["path"])):
            yield from _read(file)
    else:
        yield from _stream(source)


def _read(file):
    """Yield the documents of one file: a .jsonl has one a line, code is one, other text is cut into pieces."""
    try:
        with open(file, encoding="utf-8") as text:
            if file.suffix == ".jsonl":
                for number, line in enumerate(text, 1):
                    try:
                        yield str(json.loads(line)["text"])
                    except (ValueError, KeyError, TypeError):
                        raise UserError(f"{file} line {number} is not a JSON object with a `text` field") from None
            elif file.suffix == ".py":
                yield "".join(_chunks(text, file))
            else:
                yield from pieces(_chunks(text, file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; convert it or leave it out of --data") from None


def _chunks(text, file):
    while chunk := text.read(2 ** 20):
        if "\0" in chunk:
            raise UserError(f"{file} is a binary file, not text; leave it out of --data")
        yield chunk


def pieces(chunks):
    """Cut a long text, given in chunks of any size, into pieces of PIECE to 2 PIECE characters: at a blank line, a
    line's end, or anywhere. A cut depends on the next 2 PIECE characters only, so never on the chunks."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > 2 * PIECE:
            second = text[PIECE:2 * PIECE]
            blank = re.search(r"\n[ \t]*\n", second)
            cut = PIECE + (blank.end() if blank else second.find("\n") + 1 or PIECE)
            yield text[:cut]
            text = text[cut:]
    yield text


def _stream(source):
    """A Hub id or a local folder of parquet, arrow or csv files, streamed: nothing is held but the current rows."""
    import datasets
    try:
        rows = iter(datasets.load_dataset(source["id"], source["config"], split="train", streaming=True))
        row = next(rows, None)
    except Exception as error:  # the Hub raises many types; what the user needs is the one line
        raise UserError(f"dataset {source['id']} could not be opened ({type(error).__name__}: {why(error)}); "
                        "without network, pass a text file or folder to --data") from None
    column = source["column"] or "text"
    if row is not None and column not in row:
        raise UserError(f"dataset {source['id']} has no column {column!r}, only {', '.join(row)}; "
                        "name one as --data ID:CONFIG:COLUMN")
    while row is not None:
        yield str(row[column])
        row = next(rows, None)


def held_out(text, first):
    """Every tenth document by hash of its text goes to val, so twins never straddle the split; the first one always
    does, so that no corpus is left without."""
    return first or hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 10 == 0


def train_tokenizer(source, vocab):
    """Byte-level BPE on the train split only. Returns a transformers fast tokenizer whose id 0 is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    train = (d for i, d in enumerate(tqdm(documents(source), desc="BPE", unit="doc", leave=False, disable=None))
             if not held_out(d, i == 0))
    train = itertools.islice(train, BPE_DOCUMENTS)
    bpe.train_from_iterator(train, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)


# ------------------------------------------------------------------------------------------------------- shards
def tokenized(source, tokenizer):
    """Yield (text, ids) of each document that is not empty; memory holds 64 of them at a time."""
    texts = (text for text in tqdm(documents(source), desc="tokens", unit="doc", leave=False, disable=None) if text)
    while group := list(itertools.islice(texts, 64)):
        yield from zip(group, tokenizer(group, add_special_tokens=False)["input_ids"])


def write_shards(source, tokenizer, out, max_tokens=0, share=0.0):
    """Tokenize `source` into out/train.bin and out/val.bin; returns meta. Memory holds one group of documents. Lines of
    tasks.py follow every training document until they are this `share` of all training tokens."""
    dtype = np.uint16 if len(tokenizer) <= 2 ** 16 else np.uint32
    tokens, size, sha = {"train": 0, "val": 0}, {"train": 0, "val": 0}, {s: hashlib.sha256() for s in ("train", "val")}
    lines, own = generated.lines(tokenizer), 0
    # the files are closed before they are renamed
    with atomic(out / "train.bin") as a, atomic(out / "val.bin") as b, open(a, "wb") as train, open(b, "wb") as val:
        files = {"train": train, "val": val}
        for i, (text, ids) in enumerate(tokenized(source, tokenizer)):
            split = "val" if held_out(text, i == 0) else "train"
            block = [*ids, tokenizer.eos_token_id]
            size[split] += len(text.encode("utf-8", "surrogatepass"))
            while split == "train" and own < share * (tokens[split] + len(block)):
                line = [*next(lines), tokenizer.eos_token_id]
                block, own = block + line, own + len(line)
            files[split].write(piece := np.asarray(block, dtype).tobytes())
            sha[split].update(piece)
            tokens[split] += len(block)
            if 0 < max_tokens <= tokens["train"]:
                break
        if min(tokens.values()) == 0:
            raise UserError(f"the corpus {_name(source)} is empty or a single document; it needs two, one to hold out")
    return {"tokens": tokens, "bytes": size, "dtype": np.dtype(dtype).name, "tokenizer": tokenizer_hash(tokenizer),
            "vocab_size": len(tokenizer), "source": source, "max_tokens": max_tokens, "tasks": share,
            "sha256": {s: h.hexdigest() for s, h in sha.items()}}


def _name(source):
    return source.get("path") or source.get("id") or source["kind"]


def section(result):
    """Its part of the report, a function of result.json."""
    tokens, size, source = result["tokens"], result["bytes"], result["source"]
    name = f"Python {source['python']}'s library" if source["kind"] == "stdlib" else Path(_name(source)).name
    own = f", {100 * result['tasks']:.0f}% of the training tokens are generated task lines" if result["tasks"] else ""
    return (f"## The text\n\n{name}: {tokens['train']:,} training and {tokens['val']:,} held-out tokens, every tenth "
            f"document by hash of its text (no seed is involved); vocabulary {result['vocab_size']:,}, "
            f"{size['val'] / tokens['val']:.2f} bytes a held-out token{own}.\n")


def make(source, tokenizer, out, vocab, max_tokens, share):
    """Write the folder of shards; meta.json, last, says that it is whole."""
    print(f"data: tokenizing {_name(source)} into {out}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    start, own = time.time(), {"vocab": vocab} if tokenizer is None else {}
    tokenizer, share = (train_tokenizer(source, vocab), share) if tokenizer is None else (tokenizer, 0.0)
    meta = {**write_shards(source, tokenizer, out, max_tokens, share), **own}
    with atomic(out / "tokenizer.json") as temporary:
        tokenizer.backend_tokenizer.save(str(temporary))
    write_text(out / "section.md", section(meta))
    write_json(out / "result.json", {**meta, "seconds": round(time.time() - start, 1), "section": digest(section(meta)),
                                     "headline": [["text", f"{sum(meta['tokens'].values()) / 1e6:.1f}M tokens"]]})
    write_json(out / "meta.json", meta)


def prepare(data, tokenizer, out, world=None, vocab=2048, max_tokens=None, tasks=None):
    """The folder of shards for `data` under `tokenizer` (None: train a BPE): made at `out` if missing, reused if it
    holds the same, refused by naming the difference otherwise. With a BPE of its own the training text has a share of
    `tasks`. Returns (folder, meta)."""
    if not 0 <= (tasks or 0) < 1:
        raise UserError(f"--tasks {tasks} is a share of the training text: it must lie in [0, 1)")
    source = resolve(data)
    ready = source["kind"] == "shards"
    out = Path(source["path"] if ready else out)
    if (world is None or world.main) and not (out / "meta.json").exists():
        make(source, tokenizer, out, vocab, max_tokens or 0, tasks or 0.0)
    if world is not None:
        world.barrier()
    meta = read_json(out / "meta.json", "delete that folder and run again")
    wanted = {"max_tokens": max_tokens, "source": None if ready else source,               # None: whatever it is
              "tokenizer": tokenizer and tokenizer_hash(tokenizer)}
    if tokenizer is None and not ready:
        wanted |= {"vocab": vocab, "tasks": tasks}
    for key, value in wanted.items():
        if value is not None and meta.get(key) != value:
            raise UserError(f"{out} holds shards with {key} {meta.get(key)}, but {value} is asked for; "
                            "delete that folder or choose another --out")
    for split in ("train", "val"):
        file, want = out / f"{split}.bin", meta["tokens"][split] * np.dtype(meta["dtype"]).itemsize
        have = os.path.getsize(file) if file.exists() else 0
        if have != want:
            raise UserError(f"{file} has {have} bytes where meta.json says {want}; delete {out} and make it again")
    return out, meta


def shards_beside(cfg, tokenizer, world):
    """The token shards of --data, kept in the folder `data` beside --out. Returns (folder, meta)."""
    return prepare(cfg.data, tokenizer, beside(cfg.out, "data"), world)


# ------------------------------------------------------------------------------------------------------ batches
@functools.lru_cache(maxsize=16)
def walk(seed, epoch, n, T):
    """(a, b, phase) of an epoch over n windows of T + 1 tokens; see Tokens."""
    gen = generator(seed, "epoch", epoch)
    a = int(gen.integers(1, n + 1))
    while math.gcd(a, n) != 1:
        a += 1
    return a, int(gen.integers(n)), int(gen.integers(T))


class Tokens:
    """One split, read through a memory map: memory does not grow with the corpus.

    Windows of T+1 tokens tile the split. An epoch visits each once, in the order of a random affine walk
    i -> (a i + b) mod n with gcd(a, n) = 1, and shifts the tiling by a random phase: no permutation is stored, and
    where window number i lies is a pure function of (seed, i). With `limit` only the first so many tokens are used."""

    def __init__(self, folder, split, seq_len, limit=0):
        meta = read_json(Path(folder) / "meta.json")
        self.ids = np.memmap(Path(folder) / f"{split}.bin", dtype=meta["dtype"], mode="r")[:limit or None]
        self.sha256 = meta["sha256"][split]
        self.T, self.n = seq_len, (len(self.ids) - seq_len) // (seq_len + 1)
        if self.n < 1:
            raise UserError(f"the {split} split in {folder} has {len(self.ids)} tokens, fewer than two windows of "
                            f"--seq_len {seq_len}; use a larger corpus or a shorter --seq_len")

    def cut(self, starts):
        return torch.from_numpy(np.stack([self.ids[s:s + self.T + 1] for s in starts]).astype(np.int64))  # (B, T+1)

    def batch(self, seed, step, slots, batch_size):
        """Training rows (B, T+1) int64 for the given slots of the global batch of `batch_size` at `step`."""
        starts = []
        for slot in slots:
            epoch, i = divmod(step * batch_size + slot, self.n)
            a, b, phase = walk(seed, epoch, self.n, self.T)
            starts.append((a * i + b) % self.n * (self.T + 1) + phase)
        return self.cut(starts)

    def windows(self, count, seed=None):
        """At most `count` windows (B, T+1) for evaluation: evenly spread, or with a seed a random choice of tiles."""
        count = min(count, self.n)
        tiles = np.arange(count) * self.n // count if seed is None else np.sort(
            generator(seed, "windows").choice(self.n, count, replace=False))
        return self.cut(tiles * (self.T + 1))


class RandomTokens:
    """Stands in for Tokens when a bare config is trained for its speed: uniform ids, the same keys, no text."""

    def __init__(self, vocab, seq_len):
        self.vocab, self.T = vocab, seq_len

    def batch(self, seed, step, slots, batch_size):
        rows = [generator(seed, "tokens", step, s).integers(self.vocab, size=self.T + 1) for s in slots]
        return torch.from_numpy(np.stack(rows))

    def windows(self, count, seed):
        return self.batch(seed, 0, range(count), count)


def prefetch(make, keys):
    """Yield make(key) for each key, made up to three ahead in a thread, so that a loop does not wait for data. An error
    of `make` is raised where its value would have come."""
    def work(key):
        # The thread was woken by a loop that takes a batch. Would it begin at once, it would take the interpreter lock
        # from that loop there and then, and the loop would wait for a whole draw.
        time.sleep(2e-3)
        return make(key)
    keys, pool = iter(keys), ThreadPoolExecutor(1)
    ahead = deque(pool.submit(work, key) for key in itertools.islice(keys, 3))
    try:
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(work, key) for key in itertools.islice(keys, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)  # the loop may have left early


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    tokenizer = None if cfg.model == "toy" else load_tokenizer(cfg.model)
    out, meta = prepare(cfg.data, tokenizer, cfg.out, vocab=cfg.vocab, max_tokens=cfg.max_tokens, tasks=cfg.tasks)
    print(f"{out}: {meta['tokens']['train']:,} train and {meta['tokens']['val']:,} val tokens of "
          f"{_name(meta['source'])}, vocabulary {meta['vocab_size']}, {meta['dtype']}")


if __name__ == "__main__":
    main()
