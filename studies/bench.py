"""bench.py: speed of the stages beside their ceilings, measured in one run.

    python -m studies.bench                              # out/toy, out/bridge, out/blocks, a twin: ~90 s on 2 cores
    python -m studies.bench --blocks "" --twin ""        # only what needs neither

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.

Letters: B batch, T tokens.
"""
import sys

if not __package__:
    print("error: start it as: python -m studies.bench", file=sys.stderr)
    raise SystemExit(2)
from dataclasses import dataclass

import torch

import hybrid
import repr_align
import toy
from core import backbone, denoiser, diffusion, masked
from core.common import entry, matmul_rate, parse, setup
from core.measure import train_flops
from core.metrics import seconds_of

CPU = dict(device=torch.device("cpu"), dtype=torch.float32)


@dataclass
class Config:
    model: str = "out/toy"      # a model folder or a Hub id
    bridge: str = "out/bridge"  # a trained bridge
    blocks: str = "out/blocks"  # a bridge trained with --visible (empty: leave its row out)
    twin: str = "out/repr_align/w10"  # a converted model (empty: leave its row out)
    seed: int = 0               # of the random tokens
    repeats: int = 5            # the best of so many is reported
    dry_run: bool = False       # print what would be measured, then leave


def share(flops, seconds):
    """A rate in words, beside torch.mm's."""
    return f"{flops / seconds / 1e9:.0f} GFLOP/s, {flops / seconds / matmul_rate():.0%} of torch.mm"


def bench_bridge(width, cfg):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32)))
    z, c, noise, t = (*(torch.randn(16, 128, width) for _ in range(3)), torch.rand(16))
    seconds = seconds_of(cfg.repeats, lambda: diffusion.token_loss(net, z, c, t, noise, 4)[0].mean().backward())
    print(f"bridge of width {width}, forward and backward: {share(2048 * train_flops(net, 0, 0, 128), seconds)}")


def against_stock(name, model, repeats, calls):
    """Tokens a second of 64 new tokens after 64, batch 1, by `calls` {what: ids -> ids}, against stock generate() of
    the intact model."""
    intact = backbone.load(model.config.base_model, **CPU).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, attention_mask=ids > 0)
    stock = 64 / seconds_of(repeats, lambda: intact.generate(ids, **how))
    rows = {what: 64 / seconds_of(repeats, lambda call=call: call(ids, how)) for what, call in calls.items()}
    print(f"{name} at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; "
          + "; ".join(f"{what}: {speed:.0f} ({speed / stock:.2f}x)" for what, speed in rows.items()))


def bench_hybrid(cfg):
    """Cached generation, token by token."""
    model = hybrid.from_bridge(cfg.bridge)

    def at(nfe):
        def call(ids, how):
            model.set_nfe(nfe)
            model.generate(ids, **how)
        return call
    against_stock("hybrid", model, cfg.repeats, {f"NFE {nfe}": at(nfe) for nfe in (1, 2, 4, 8)})


def bench_blocks(cfg):
    """One block of 64 tokens at once."""
    model = hybrid.from_bridge(cfg.blocks)
    against_stock("blocks of 64", model, cfg.repeats, {
        f"NFE {nfe}, {refinements} refinements": lambda ids, how, nfe=nfe, refinements=refinements:
        model.generate_blocks(ids, 64, 64, nfe, beta=0.0, refinements=refinements)
        for nfe, refinements in ((4, 0), (16, 0), (8, 8))})


def convert_flops(lm, is_mask):
    """Of a step of the unaligned arm with masks (B, T): blocks forward and backward on all tokens, every token
    attending to every other; the frozen head on predictors of masked tokens, without gradients of its weights."""
    inside, tokens, T = sum(p.numel() for p in lm.blocks.parameters()), is_mask.numel(), is_mask.shape[1]
    attention = 12 * lm.L * backbone.attention_width(lm.config) * T
    return tokens * (6 * inside + attention) + 4 * int(is_mask[:, 1:].sum()) * lm.V * lm.D


def bench_convert(name, lm, teacher, cfg):
    """Step of the unaligned arm on 2,048 tokens; with a teacher, the aligned arm's step beside it."""
    from core.conversion import conversion_loss, corrupt
    student = masked.Student(lm, lm.V - 1)
    repr_align.freeze(student, "embed")
    ids, is_mask = torch.randint(1, lm.V - 1, (16, 128)), corrupt(128, cfg.seed, "mask", 0, range(16))

    def step(teacher):
        loss = conversion_loss(student, teacher, ids, is_mask, 1.0)
        (loss.each.sum() + loss.apart).backward()
    seconds = seconds_of(cfg.repeats, lambda: step(None))
    aligned = f"; aligned {seconds_of(cfg.repeats, lambda: step(teacher)) / seconds:.2f}x its time" if teacher else ""
    print(f"conversion, {name}, unaligned: {share(convert_flops(lm, is_mask), seconds)}{aligned}")


@torch.no_grad()
def bench_twin(cfg):
    """The masked twin's samplers against a plain loop of as many full forward passes."""
    model, _ = masked.load_converted(cfg.twin, **CPU)
    ids, is_mask = torch.randint(1, 1000, (16, 128)), torch.arange(128).expand(16, 128) >= 64
    plain = seconds_of(cfg.repeats, lambda: [model.lm.model(ids) for _ in range(64)])
    rows = {what: plain / seconds_of(cfg.repeats, lambda how=how: masked.fill(model, ids, is_mask, 64, **how))
            for what, how in (("fill", {}), ("blocks of 16 with cache", {"block_size": 16}))}
    print(f"twin, 64 new tokens in 64 calls, batch 16: plain loop {64 * 16 / plain:.0f} tokens/s; "
          + "; ".join(f"{what} {ratio:.2f}x" for what, ratio in rows.items()))


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        print(f"measures torch.mm, steps of a bridge and of a conversion of {cfg.model}, generation with {cfg.bridge}")
        return
    setup("cpu")
    torch.manual_seed(cfg.seed)
    print(f"torch.mm at 2048^2, fp32: {matmul_rate() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    for width in (128, 512):
        bench_bridge(width, cfg)
    bench_convert(cfg.model, *(backbone.load(cfg.model, **CPU) for _ in range(2)), cfg)
    wide = toy.build_toy(toy.Config(width=512, heads=8), 2048)
    bench_convert("a toy of width 512", backbone.Backbone(wide), None, cfg)
    bench_hybrid(cfg)
    if cfg.blocks:
        bench_blocks(cfg)
    if cfg.twin:
        bench_twin(cfg)


if __name__ == "__main__":
    main()
