"""DATA: text -> token shards -> batches that are a function of (seed, step, slot).

    python data.py                              # the Python standard library: offline, 2.7M tokens
    python data.py --data notes/ --out out/notes        # a text file or folder
    python data.py --data HuggingFaceFW/fineweb-edu --model Qwen/Qwen3-0.6B --max_tokens 1000000000
    python data.py --data sampled --model DIR --max_tokens 1000000 --out out/sampled/data

The third one streams a Hub dataset. The last one samples texts from the model itself. Its entropy,
which meta.json holds, is the lowest loss that any model can have on them.

Every stage makes the shards it needs itself, in the folder `data` next to its --out.

It writes train.bin and val.bin (raw token ids, 16 or 32 bits each, with an EOS after every
document), tokenizer.json, result.json and, last, meta.json. Memory does not grow with the corpus.
The files hold no BOS. Where the tokenizer adds one, every window that is cut from them begins with
it, because such a model has never seen text without it.

Shapes: B sequences, T tokens a sequence.
"""
import fcntl
import glob
import hashlib
import math
import platform
import sysconfig
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import backbone, tasks
from core.backbone import EOS, bos_id, load_tokenizer, tokenizer_hash
from core.common import UserError, entry, generator, parse, setup, why
from core.run import atomic, nearby, read_json, write_json


@dataclass
class Config:
    data: str = "stdlib"        # stdlib, sampled, a text file or folder, or Hub ID:CONFIG:COLUMN
    model: str = "toy"          # whose tokenizer; toy: a BPE trained on this text
    out: str = "out/data"       # folder to write
    vocab: int = 2048           # size of the toy's vocabulary
    tasks: float = 0.0          # share of generated task lines in the toy's training text
    max_tokens: int = 0         # stop after this many training tokens (0: the whole corpus)
    bos: bool = True            # begin every window with BOS where the tokenizer adds it
    seed: int = 0               # every stage takes one; the shards do not depend on it


# -------------------------------------------------------------------------------------------------
# Source -> documents

TEXT = (".txt", ".md", ".rst", ".py")
TABLES = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}   # ending -> loader of datasets
ENDINGS = (*TEXT, *TABLES)
SKIPPED = {                     # folders of the standard library: tests and generated tables
    "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
PIECE = 8_000                   # characters: a long text is cut into documents of about this size
BPE_DOCUMENTS = 20_000          # enough text for a small vocabulary


def resolve(data):
    """--data -> the source as a small dict. meta.json stores it and later runs compare with it."""
    if data == "stdlib":
        return {"kind": "stdlib", "python": platform.python_version()}
    if data == "sampled":
        return {"kind": "sampled"}
    parts = [data] if Path(data).exists() else data.split(":")
    name, config, column = (*parts, "", "")[:3]
    column = column or "text"
    path = Path(name)
    assert not (config and path.exists()), f"--data {data}: write {name}::{config}"
    if path.exists():
        digest = hashlib.sha256()
        for file in text_files(path):
            digest.update(hashlib.file_digest(open(file, "rb"), "sha256").digest())
        return {"kind": "text", "path": str(path.resolve()), "column": column,
                "sha256": digest.hexdigest()}
    if path.suffix in ENDINGS or name.count("/") > 1:
        raise UserError(f"--data {data}: there is no such file or folder")
    return {"kind": "hub", "id": name, "config": config or None, "column": column}


def identity(data):
    """What makes --data another text: its content and column, or its name. A path never does."""
    source = resolve(data)
    if "sha256" in source:
        return f"{source['sha256'][:16]}:{source['column']}"
    return data


def text_files(path):
    """The readable files of a folder, in a fixed order. A file given by name is always taken."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*")
                  if file.suffix.lower() in ENDINGS and file.is_file())


def places(source):
    """The places of a source's documents: files, or the name of a Hub dataset."""
    if source["kind"] == "hub":
        return [Path(source["id"])]
    if source["kind"] == "text":
        return text_files(Path(source["path"]))
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in sorted(root.rglob("*.py"))
            if not SKIPPED.intersection(file.relative_to(root).parts)]


def documents(source, seen=None):
    """Yield the texts of a source in a fixed order. Memory holds one document at a time. Empty
    texts are skipped. The Counter `seen` counts them, and the places by kind."""
    seen = Counter() if seen is None else seen
    for place in places(source):
        ending = place.suffix.lower() or place.name
        seen["Hub dataset" if source["kind"] == "hub" else ending] += 1
        try:
            for text in read(place, source):
                if text:
                    yield text
                else:
                    seen["empty"] += 1
        except Exception as error:      # codecs and datasets raise many types: one line is enough
            reason = f"{type(error).__name__}: {why(error)}"
            raise UserError(f"{place} could not be read as text ({reason}); --data takes stdlib, "
                            "a text file or folder, or ID:CONFIG:COLUMN of the Hub") from None


def summary(source, seen):
    """One line about what `documents` read and skipped."""
    skipped = f"{seen.pop('empty', 0)} empty documents"
    if source["kind"] == "text":
        files = Path(source["path"]).rglob("*")
        others = sum(file.suffix.lower() not in ENDINGS and file.is_file() for file in files)
        skipped += f" and {others} other files"
    kinds = ", ".join(f"{count} {kind}" for kind, count in seen.most_common())
    return f"read {kinds or 'nothing'}; skipped {skipped}"


def read(place, source):
    """Yield the documents of one place. A code file is one document, and so is a table's row."""
    ending = place.suffix.lower()
    if source["kind"] == "hub":
        yield from rows(str(place), source["column"], name=source["config"])
    elif place.stat().st_size == 0:
        yield ""                                        # loaders of tables refuse an empty file
    elif ending in TABLES:
        yield from rows(TABLES[ending], source["column"], data_files=glob.escape(str(place)))
    elif ending == ".py":
        yield place.read_text(encoding="utf-8-sig")     # drops a byte order mark
    else:
        yield from pieces(place)


def rows(path, column, **kwargs):
    """Yield one column of a dataset, streamed: a Hub id, or data_files in a known format."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)       # our sentence says it
    dataset = datasets.load_dataset(path, split="train", streaming=True, **kwargs)
    for row in dataset:
        if column not in row:
            raise ValueError(f"there is no column {column!r}, only {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str | None):
            raise TypeError(f"column {column!r} holds a value of type {type(text).__name__}")
        yield text


def pieces(file):
    """Cut a long text at the first blank line after PIECE characters, or at the first end of a line
    after 2 PIECE characters."""
    lines = []
    size = 0
    with open(file, encoding="utf-8-sig") as text:
        for line in text:
            lines.append(line)
            if size > PIECE and not line.strip(" \t\n") or size > 2 * PIECE:
                yield "".join(lines)
                lines = []
                size = 0
            else:
                size += len(line)
    if lines:
        yield "".join(lines)


# -------------------------------------------------------------------------------------------------
# Documents -> shards

def held_out(text, first):
    """Every tenth document goes to val. A hash of its text decides, so that equal documents share a
    side. The text `first` always goes to val, so that no corpus is without one."""
    return text == first or hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def train_tokenizer(source, vocab):
    """A byte-level BPE, trained on the training documents only. Its id 0 is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = documents(source)
    first = next(texts, "")
    train = (text for text in texts if not held_out(text, first))
    bpe.train_from_iterator(islice(train, BPE_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)


def tokenized(source, tokenizer, seen):
    """Yield (text, ids) of every document. Memory holds 64 of them."""
    texts = iter(tqdm(documents(source, seen), "documents", leave=False, disable=None))
    for text in texts:
        group = [text, *islice(texts, 63)]
        # A special token that the text spells out is text: the only EOS is the one that we add
        output = tokenizer(group, add_special_tokens=False, split_special_tokens=True)
        yield from zip(group, output["input_ids"])


def write_shards(source, tokenizer, out, max_tokens=0, share=0.0):
    """Write out/train.bin and out/val.bin. Returns their entries of meta.json.

    Generated task lines follow each training document until they are `share` of all training
    tokens. The held-out text has none."""
    assert 0 <= share < 1, "--tasks is a share"
    largest = max(tokenizer.get_vocab().values())   # the ids may have holes
    dtype = "uint16" if largest < 2 ** 16 else "uint32"
    lines = tasks.lines(tokenizer)
    tokens = {"train": 0, "val": 0}
    size = {"train": 0, "val": 0}                   # bytes of text
    task_tokens = 0
    first = ""
    seen = Counter()
    texts = tokenized(source, tokenizer, seen)
    if source["kind"] == "sampled":
        from core import sampled
        texts = sampled.documents(tokenizer, out / source["base"])
    limit = max_tokens or (1_000_000 if source["kind"] == "sampled" else math.inf)
    with (atomic(out / "train.bin") as train_path, atomic(out / "val.bin") as val_path,
          open(train_path, "wb") as train, open(val_path, "wb") as val):
        for text, ids in texts:
            first = first or text
            split = "val" if held_out(text, first) else "train"
            ids = [*ids, tokenizer.eos_token_id]
            while split == "train" and task_tokens < share * (tokens["train"] + len(ids)):
                line = [*next(lines), tokenizer.eos_token_id]
                ids += line
                task_tokens += len(line)
            file = train if split == "train" else val
            file.write(np.asarray(ids, dtype).tobytes())
            tokens[split] += len(ids)
            size[split] += len(text.encode())
            if tokens["train"] >= limit:
                break
        if seen:
            print(summary(source, seen))
        if min(tokens.values()) == 0:
            raise UserError("the corpus is empty or a single document; it needs two, one of them "
                            "to hold out")
    return {"source": source, "tokens": tokens, "bytes": size, "dtype": dtype,
            "tokenizer": tokenizer_hash(tokenizer), "max_tokens": max_tokens, "tasks": share}


def toy_tokenizer(source, vocab, out):
    """The BPE of a text. The one of out/data serves out/tasks/data too, if text and size agree."""
    first = out.parent.parent / "data"
    if (first / "meta.json").exists():
        meta = read_json(first / "meta.json")
        if meta.get("source") == source and meta.get("vocab") == vocab:
            return load_tokenizer(first)
    return train_tokenizer(source, vocab)


def make(source, tokenizer, out, vocab, max_tokens, share, bos):
    """Write a folder of shards. meta.json comes last: it says that the folder is whole."""
    trained = tokenizer is None
    if trained:
        tokenizer = toy_tokenizer(source, vocab, out)
    meta = write_shards(source, tokenizer, out, max_tokens, share if trained else 0.0)
    meta["vocab"] = vocab if trained else None
    meta["bos"] = bos
    if source["kind"] == "sampled":
        from core import sampled
        meta["entropy"] = sampled.entropy(out / source["base"])
    with atomic(out / "tokenizer.json") as temporary:
        tokenizer.backend_tokenizer.save(str(temporary))
    write_json(out / "result.json", meta)
    write_json(out / "meta.json", meta)


def prepare(data, tokenizer, out, world, vocab=2048, max_tokens=None, tasks=None, bos=None):
    """Make the shards of --data at `out`, or take those that are there. Returns (folder, meta).

    tokenizer None trains a BPE of `vocab` tokens; only its text has task lines. Other shards than
    the wanted ones are refused. max_tokens, tasks or bos None: take the shards as they are."""
    out = Path(out)
    source = resolve(data)
    if data == "sampled":
        assert tokenizer, "--data sampled needs the --model that writes the text"
        source["base"] = backbone.identity(tokenizer.name_or_path)
    bos_token = None if tokenizer is None or bos is False else bos_id(tokenizer)
    if world.main and not (out / "meta.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        names = {file.name for file in out.iterdir()}
        assert not names or ".lock" in names, f"{out} holds other files; choose another --out"
        with open(out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)            # a second process waits for the first
            if not (out / "meta.json").exists():
                for file in out.glob(".*.tmp"):         # of a process that was killed
                    file.unlink()
                print(f"tokenizing {data} into {out}", flush=True)
                make(source, tokenizer, out, vocab, max_tokens or 0, tasks or 0.0, bos_token)
    world.barrier()
    meta = read_json(out / "meta.json", "delete that folder and run again")

    assert "dtype" in meta, f"{out}/meta.json is not one of data.py; choose another --out"
    moved = {"path": source.get("path")}                # a folder that moved holds the same text
    there = {**meta, "source": meta["source"] | moved, "bos": meta.get("bos") is not None}
    wanted = {"source": source | moved, "max_tokens": max_tokens,
              "bos": bos and bos_token is not None}
    if tokenizer is None:
        wanted.update(vocab=vocab, tasks=tasks)
    else:
        wanted.update(tokenizer=tokenizer_hash(tokenizer))
    for key, value in wanted.items():
        if value is not None and there[key] != value:
            raise UserError(f"{out} holds shards with {key} {there[key]}, but {value} is asked "
                            "for; choose another --out or delete the folder")
    return out, meta


def splits(cfg, tokenizer, world, seq_len):
    """Training and held-out text of cfg.data as Tokens, in the folder `data` next to cfg.out."""
    shards, _ = prepare(cfg.data, tokenizer, nearby(cfg.out, "data"), world)
    return Tokens(shards, "train", seq_len), Tokens(shards, "val", seq_len)


# -------------------------------------------------------------------------------------------------
# Shards -> batches

def walk(seed, epoch, n, T):
    """(a, b, phase) of an epoch over n windows: `Tokens` says how they are used."""
    gen = generator(seed, "epoch", epoch)
    a = int(gen.integers(1, n + 1))
    while math.gcd(a, n) != 1:
        a += 1
    return a, int(gen.integers(n)), int(gen.integers(T))


class Tokens:
    """One split of a folder of shards, read through a memory map.

    Windows of T+1 tokens tile the split. With BOS a window is BOS and T tokens of text, and tiles
    are T tokens wide. An epoch visits each of the n windows once: its i-th window is (a i + b) mod
    n with gcd(a, n) = 1. A random phase shifts all windows of an epoch. No permutation is stored:
    the place of a window is a function of (seed, step, slot)."""

    def __init__(self, folder, split, seq_len):
        meta = read_json(Path(folder) / "meta.json", "run python data.py")
        self.ids = np.memmap(Path(folder) / f"{split}.bin", dtype=meta["dtype"], mode="r")
        self.T = seq_len
        self.bos = meta.get("bos")                      # an id, or None
        self.width = seq_len + (self.bos is None)       # tokens of text in a window
        self.n = (len(self.ids) - seq_len) // self.width
        if self.n < 1:
            raise UserError(f"the {split} split in {folder} has {len(self.ids)} tokens, fewer than "
                            f"two windows of --seq_len {seq_len}; use more text or a shorter one")

    def cut(self, starts):
        """Token windows (B, T+1) that begin at the given places."""
        windows = [self.ids[start:start + self.width] for start in starts]
        windows = torch.from_numpy(np.stack(windows).astype(np.int64))
        if self.bos is None:
            return windows
        return F.pad(windows, (1, 0), value=self.bos)

    def batch(self, seed, step, slots, batch_size):
        """Training windows (B, T+1) for these slots of the global batch at `step`."""
        starts = []
        for slot in slots:
            epoch, i = divmod(step * batch_size + slot, self.n)
            a, b, phase = walk(seed, epoch, self.n, self.T)
            tile = (a * i + b) % self.n
            starts.append(tile * self.width + phase)
        return self.cut(starts)

    def windows(self, count, seed=None):
        """At most `count` windows (B, T+1): evenly spread, or with a seed a random choice."""
        count = min(count, self.n)
        tiles = np.arange(count) * self.n // count
        if seed is not None:
            gen = generator(seed, "windows")
            tiles = np.sort(gen.choice(self.n, count, replace=False))
        return self.cut(tiles * self.width)

    def warn(self, steps, batch_size):
        """Say so before a training that reads the text more than 20 times."""
        epochs = steps * batch_size / self.n
        if epochs > 20:
            print(f"warning: the training text will be read {epochs:,.0f} times; more text would "
                  "help more", flush=True)


def count_bytes(tokenizer, rows):
    """Bytes of the text in windows (N, T), less the first token of each, which is given."""
    texts = tokenizer.batch_decode(rows[:, 1:], skip_special_tokens=True)
    return len("".join(texts).encode())


def prefetch(function, keys):
    """Yield function(key) for each key. A thread computes it up to three keys ahead."""
    ahead = deque()
    with ThreadPoolExecutor(1) as pool:                 # left when the caller's loop ends
        for key in keys:
            ahead.append(pool.submit(function, key))
            if len(ahead) > 3:
                yield ahead.popleft().result()          # raises the function's error here
        for value in ahead:
            yield value.result()


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    tokenizer = None if cfg.model == "toy" else load_tokenizer(cfg.model)
    out, meta = prepare(cfg.data, tokenizer, cfg.out, setup("cpu"), vocab=cfg.vocab,
                        max_tokens=cfg.max_tokens, tasks=cfg.tasks, bos=cfg.bos)
    print(f"{out}: {meta['tokens']['train']:,} training tokens, {meta['tokens']['val']:,} held out")
    return meta


if __name__ == "__main__":
    main()
