"""bench.py: speed of a bridge's step beside its ceiling, and of writing by blocks beside one token after another.

    python -m studies.bench                                  # a bridge's step, out/repr_align/block: a minute
    python -m studies.bench --twin "" --repeats 1                      # only a bridge's step
    python -m studies.bench --twin out/mine/block --temperature 1

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.bench\n")
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from core import backbone, denoiser, diffusion, masked
from core.common import entry, matmul_rate, parse, setup
from core.measure import train_flops
from core.metrics import measure, seconds_of
from core.run import read_json


@dataclass
class Config:
    twin: str = "out/repr_align/block"  # a twin converted with --attention block (empty: leave it out)
    texts: int = 24             # that it writes
    temperature: float = 0.8    # of them
    seed: int = 0               # of all draws
    repeats: int = 5            # of a bridge's step: the best of so many is reported


def bench_step(width, cfg):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32)))
    z, c, noise, t = (*(torch.randn(16, 128, width) for _ in range(3)), torch.rand(16))
    seconds = seconds_of(cfg.repeats, lambda: diffusion.token_loss(net, z, c, t, noise, 4)[0].mean().backward())
    rate = 2048 * train_flops(net, 0, 0, 128) / seconds
    print(f"bridge of width {width}, forward and backward: {rate / 1e9:.0f} GFLOP/s, {rate / matmul_rate():.0%} of "
          "torch.mm")


def block_decoding(cfg, world):
    """Tokens a second of 64 new tokens after 64 held-out ones, batch 1, by how many a call reveals, beside generate()
    of the model that the twin came from, which judges all, and of its own AR mode, whose greedy text is drafted."""
    student, _ = masked.load_converted(cfg.twin, world.device, torch.float32, "block")
    flags = read_json(Path(cfg.twin) / "config.json")["dihal"]["config"]
    model = backbone.resolve(flags["model"], cfg.twin)
    lm, tokenizer = backbone.load(model, world.device, torch.float32), backbone.load_tokenizer(model)
    shards, _ = data.shards_beside(SimpleNamespace(data=flags["data"], out=cfg.twin), tokenizer, world)
    texts = data.Tokens(shards, "val", 63).windows(cfg.texts).to(world.device)                           # (N, 64)
    how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=True, temperature=cfg.temperature, top_k=0,
               pad_token_id=0, attention_mask=torch.ones_like(texts[:1]))
    calls, stock, watch = [], None, lambda *_: calls.append(1)

    def fill(ids, **more):
        ids = torch.cat([ids, ids.new_full((1, 64), student.mask_id)], 1)                                # (1, 128)
        return masked.fill(student, ids, ids == student.mask_id, temperature=cfg.temperature, seed=cfg.seed,
                           watch=watch, **more)
    rows = {"stock generate()": lambda ids: lm.model.generate(ids, **how),
            **{f"{64 // n} a call": lambda ids, n=n: fill(ids, steps=n) for n in (64, 32, 16)},
            **{f"threshold {c}": lambda ids, c=c: fill(ids, steps=64, threshold=c) for c in (0.9, 0.7, 0.5, 0.3)}}
    if flags.get("ar_weight") and flags["shift"]:
        own, best = student.lm.model, {**how, "do_sample": False, "suppress_tokens": [student.mask_id]}
        own.generation_config.eos_token_id = None                                      # it writes on
        rows |= {"its AR mode, greedy, by generate()": lambda ids: own.generate(ids, **best),
                 **{f"that text, {n} drafts": lambda ids, n=n: masked.speculate(student, ids, 64, n, watch)
                    for n in range(1, min(5, student.arm.block_size))}}
    for name, write in rows.items():
        start, calls[:] = time.perf_counter(), []
        written = torch.cat([write(ids) for ids in texts.split(1)])                                      # (N, 128)
        speed, found = 64 * len(texts) / (time.perf_counter() - start), measure(lm, written, 64)
        stock = speed if name.endswith("generate()") else stock
        each = 64 * len(texts) / len(calls) if calls else 1
        print(f"{student.arm}, {name}: {each:.2f} tokens a call, {speed:.0f} tokens/s ({speed / stock:.2f}x), "
              f"gen-PPL {found['gen_ppl']:.1f} at entropy {found['entropy']:.2f}")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    world = setup("cpu")
    torch.manual_seed(cfg.seed)
    print(f"torch.mm at 2048^2, fp32: {matmul_rate() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    for width in (128, 512):
        bench_step(width, cfg)
    if cfg.twin:
        block_decoding(cfg, world)


if __name__ == "__main__":
    main()
