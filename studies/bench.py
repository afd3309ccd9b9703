"""bench.py: speed of a bridge's step beside its ceiling, and of writing by blocks beside one token after another.

    python -m studies.bench                                  # a bridge's step, out/repr_align/block: a minute
    python -m studies.bench --twin "" --device cuda          # ceilings and a bridge's step (studies/gpu.sh does more)
    python -m studies.bench --twin out/mine/block --temperature 1

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.bench\n")
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data
from core import backbone, denoiser, diffusion, masked
from core.common import entry, parse, setup
from core.measure import train_flops
from core.metrics import measure, seconds_of
from core.run import read_json


@dataclass
class Config:
    twin: str = "out/repr_align/block"  # a twin converted with --attention block (empty: leave it out)
    texts: int = 24             # that it writes
    temperature: float = 0.8    # of them
    seed: int = 0               # of all draws
    device: str = "cpu"         # cpu, cuda, auto; ceilings and steps are of bf16 on cuda
    repeats: int = 5            # the best of so many is reported


def ceilings(cfg, device, dtype):
    """FLOP/s of torch.mm, which is returned, bytes a second of a copy, FLOP/s of causal attention."""
    n, T = (2048, 256) if device.type == "cpu" else (8192, 4096)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(4, 16, T, 64, device=device, dtype=dtype)
    rate = 2 * n ** 3 / seconds_of(cfg.repeats, lambda: torch.mm(a, b))
    copy = 2 * a.nbytes / seconds_of(cfg.repeats, a.clone)
    look = 2 * q.numel() * T / seconds_of(cfg.repeats, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    print(f"torch.mm at {n}^2, {dtype}: {rate / 1e9:.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads; copy "
          f"{copy / 1e9:.0f} GB/s; causal attention over {T} tokens {look / 1e9:.0f} GFLOP/s")
    return rate


def bench_step(width, cfg, device, dtype, ceiling):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens (16 times as many on a GPU)."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32))).to(device)
    B = 16 if device.type == "cpu" else 256
    z, c, noise = (torch.randn(B, 128, width, device=device) for _ in range(3))
    cast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def step():
        with cast:
            loss = diffusion.token_loss(net, z, c, torch.rand(B, device=device), noise, 4)[0].mean()
        loss.backward()
    rate = 128 * B * train_flops(net, 0, 0, 128) / seconds_of(cfg.repeats, step)
    print(f"bridge of width {width}, forward and backward: {rate / 1e9:.0f} GFLOP/s, {rate / ceiling:.0%} of torch.mm")


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
    world = setup(cfg.device)
    torch.manual_seed(cfg.seed)
    how = world.device, torch.float32 if world.device.type == "cpu" else torch.bfloat16
    ceiling = ceilings(cfg, *how)
    for width in (128, 576, 1024) if world.device.type == "cpu" else (1024, 4096):
        bench_step(width, cfg, *how, ceiling)
    if cfg.twin:
        block_decoding(cfg, world)


if __name__ == "__main__":
    main()
