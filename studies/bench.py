"""bench.py: speed of a bridge's step and of generation, beside their ceilings, measured in one run.

    python -m studies.bench                              # out/bridge and out/blocks: ~60 s on 2 cores
    python -m studies.bench --blocks ""                  # only what run_all.sh has before GENERATE
    python -m studies.bench --bridge out/l4 --repeats 1

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.
"""
import sys

if not __package__:
    print("error: start it as: python -m studies.bench", file=sys.stderr)
    raise SystemExit(2)
from dataclasses import dataclass

import torch

import hybrid
from core import backbone, denoiser, diffusion
from core.common import entry, matmul_rate, parse, setup
from core.measure import train_flops
from core.metrics import seconds_of


@dataclass
class Config:
    bridge: str = "out/bridge"  # a trained bridge
    blocks: str = "out/blocks"  # a bridge trained with --visible (empty: leave its row out)
    seed: int = 0               # of the random tokens
    repeats: int = 5            # the best of so many is reported
    dry_run: bool = False       # print what would be measured, then leave


def bench_step(width, cfg):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32)))
    z, c, noise, t = (*(torch.randn(16, 128, width) for _ in range(3)), torch.rand(16))
    seconds = seconds_of(cfg.repeats, lambda: diffusion.token_loss(net, z, c, t, noise, 4)[0].mean().backward())
    rate = 2048 * train_flops(net, 0, 0, 128) / seconds
    print(f"bridge of width {width}, forward and backward: {rate / 1e9:.0f} GFLOP/s, {rate / matmul_rate():.0%} of "
          "torch.mm")


def against_stock(name, model, repeats, calls):
    """Tokens a second of 64 new tokens after 64, batch 1, by `calls` {what: ids -> ids}, against stock generate() of
    the intact model."""
    intact = backbone.load(model.config.base_model, torch.device("cpu"), torch.float32).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, attention_mask=ids > 0)
    stock = 64 / seconds_of(repeats, lambda: intact.generate(ids, **how))
    rows = {what: 64 / seconds_of(repeats, lambda call=call: call(ids, how)) for what, call in calls.items()}
    print(f"{name} at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; "
          + "; ".join(f"{what}: {speed:.0f} ({speed / stock:.2f}x)" for what, speed in rows.items()))


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        print(f"measures torch.mm, a bridge's step, generation with {cfg.bridge} and {cfg.blocks or 'no blocks'}")
        return
    setup("cpu")
    torch.manual_seed(cfg.seed)
    print(f"torch.mm at 2048^2, fp32: {matmul_rate() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    for width in (128, 512):
        bench_step(width, cfg)
    model = hybrid.from_bridge(cfg.bridge)
    against_stock("hybrid", model, cfg.repeats, {
        f"NFE {n}": lambda ids, how, n=n: (model.set_nfe(n), model.generate(ids, **how)) for n in (1, 2, 4, 8)})
    if cfg.blocks:
        model = hybrid.from_bridge(cfg.blocks)
        against_stock("a block of 64", model, cfg.repeats, {
            f"NFE {nfe}": lambda ids, how, nfe=nfe: model.generate_blocks(ids, 64, 64, nfe, beta=0.0, refinements=0)
            for nfe in (4, 16)})


if __name__ == "__main__":
    main()
