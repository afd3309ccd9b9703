"""cache.py: prefix states kept on disk, so that a bridge at layer 28 costs what one at layer 1 costs.

    write(folder, lm, train, layers, cfg, base)        # one pass through the prefix for all these layers
    states = States(folder, layer)                     # states.rows([0, 1, 2]) -> h[l] (3, T, D)
    states.calibration(windows)                        # h[l] (N, T, D) of the windows that set its units

What is kept are the states of exactly those rows that training reads, in its order, and of the calibration's, in the
backbone's own dtype, so the trained weights are bit for bit those without a cache. h[0] costs a look into the embedding
and is not kept. Files: cache.json says what the states are of; h{l}/{name}.safetensors holds CHUNK rows, with their
sha256. A rerun writes what is missing, more layers or more steps too.

Letters: B sequences, T tokens, D hidden width, l a layer.
"""
import functools
import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from core.common import UserError
from core.run import atomic, read_json, write_json

CHUNK = 64  # rows a file
REMEDY = "delete that folder or choose another --cache_states"


def _file(folder, layer, name):
    return Path(folder) / f"h{layer}" / f"{name}.safetensors"


def _digest(h):
    return hashlib.sha256(h.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _chunks(train, cfg):
    """(name of a file, function -> the rows (CHUNK, T+1) whose states it holds)"""
    def rows(i):
        keys = [divmod(r, cfg.batch_size) for r in range(i * CHUNK, (i + 1) * CHUNK)]          # step, slot
        return torch.cat([train.batch(cfg.seed, step, [slot], cfg.batch_size) for step, slot in keys])
    for i in range(-(-cfg.steps * cfg.batch_size // CHUNK)):
        yield f"{i:05d}", functools.partial(rows, i)
    for i, some in enumerate((windows := train.windows(cfg.calibration, cfg.seed)).split(CHUNK)):
        yield f"calibration{len(windows)}_{i:05d}", lambda some=some: some


@torch.no_grad()
def write(folder, lm, train, layers, cfg, base):
    """States of `layers`, those that are missing, of the rows that cfg.steps of training read from `train` (number step
    x batch_size + slot) and of the windows of its calibration. Raises UserError where the folder holds states of
    another model (`base`), text, seed or dtype, or the disk is too small for them."""
    folder, index, weight = Path(folder), Path(folder) / "cache.json", lm.norm.weight
    about = {"base": base, "text": train.sha256, "dtype": str(weight.dtype), "seed": cfg.seed,
             "batch_size": cfg.batch_size, "seq_len": cfg.seq_len}
    there = read_json(index, REMEDY) if index.exists() else about
    if differ := [f"{k} = {there.get(k)} there, {v} here" for k, v in about.items() if there.get(k) != v]:
        raise UserError(f"{folder} holds states of something else ({', '.join(differ)}); {REMEDY}")
    chunks = dict(_chunks(train, cfg))
    missing = {i: some for i in chunks if (some := [n for n in layers if not _file(folder, n, i).exists()])}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(map(len, missing.values())) * CHUNK * cfg.seq_len * lm.D * weight.itemsize
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{folder} would take {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} left; choose "
                        "another --cache_states, fewer layers or fewer --steps")
    print(f"prefix states of {len(layers)} layers: {needed / 1e9:.2f} GB into {folder}", flush=True)
    write_json(index, about)
    for i, some in tqdm(missing.items(), desc="prefix states", unit="file", leave=False, disable=None):
        found = {n: [] for n in sorted(some)}
        for ids in chunks[i]().split(8):
            for n, h, *_ in lm.at(ids[:, :-1].to(weight.device), found):                   # (8, T, D)
                found[n].append(h.cpu())
        for n, parts in found.items():
            _file(folder, n, i).parent.mkdir(exist_ok=True)
            with atomic(_file(folder, n, i)) as temporary:
                save_file({"h": (h := torch.cat(parts))}, temporary, {"sha256": _digest(h)})   # (CHUNK, T, D)


class States:
    """The states of one layer, read a file at a time."""

    def __init__(self, folder, layer):
        self.folder, self.layer = folder, layer
        self.chunk = functools.lru_cache(4)(self._read)

    def _read(self, name):
        path = _file(self.folder, self.layer, name)
        try:
            with safe_open(path, "pt") as f:
                h, known = f.get_tensor("h"), f.metadata()["sha256"]
        except Exception as error:  # missing, cut short, something else
            raise UserError(f"{path} could not be read ({type(error).__name__}); {REMEDY}") from None
        if _digest(h) != known:
            raise UserError(f"{path} is damaged: its checksum differs; {REMEDY}")
        return h

    def rows(self, rows):
        """h[l] (B, T, D) of these rows."""
        return torch.stack([self.chunk(f"{r // CHUNK:05d}")[r % CHUNK] for r in rows])

    def calibration(self, windows):
        """h[l] (N, T, D) of all these windows (N, T)."""
        return torch.cat([self._read(f"calibration{len(windows)}_{i:05d}") for i in range(-(-len(windows) // CHUNK))])
