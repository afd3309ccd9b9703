"""bench.py: speed and memory of the stages beside their ceilings, measured in one run.

    python bench.py --model out/toy                      # ~2 min on 2 cores

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.

Letters: B batch, T tokens.
"""
from dataclasses import dataclass

import torch

import bridge
import data
import geometry
import hybrid
import repr_align
import toy
from core import backbone, denoiser, diffusion, masked
from core.common import entry, matmul_rate, parse, setup
from core.draws import generator
from core.metrics import seconds_of
from core.run import beside


@dataclass
class Config:
    model: str = "out/toy"      # a model folder or a Hub id
    bridge: str = "out/bridge"  # a trained bridge
    blocks: str = "out/blocks"  # a bridge trained with --visible (empty: leave its row out)
    twin: str = "out/repr_align/w10"  # a converted model (empty: leave its rows out)
    seed: int = 0               # of the random tokens
    tokens: int = 8192          # tokens of the geometry rows
    repeats: int = 5            # the best of so many is reported
    dry_run: bool = False       # print what would be measured, then leave


def bench_geometry(lm, cfg):
    """Collecting all layers' states against the stock model's forward passes over the same tokens."""
    windows = torch.randint(0, lm.V, (cfg.tokens // 128, 128))                         # (S, T)
    settings = geometry.Config(tokens=windows.shape[0] * 124, pool=4096)

    @torch.no_grad()
    def stock():
        for ids in windows.split(settings.batch_size):
            lm.model(ids)

    def collect():
        return geometry.collect(lm, windows, settings.skip, settings.pool, cfg.seed, settings.batch_size)
    forward, collecting = seconds_of(cfg.repeats, stock), seconds_of(cfg.repeats, collect)
    states = collect()
    rest = seconds_of(1, lambda: geometry.analyse(states, settings))
    print(f"geometry, {windows.numel()} tokens: collecting the states {collecting:.2f} s, stock forward passes "
          f"{forward:.2f} s, ratio {collecting / forward:.2f}; everything else {rest:.1f} s")


def bench_bridge(width, cfg):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens, as a share of torch.mm's rate."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32)))
    z, c, noise, t = (*(torch.randn(16, 128, width) for _ in range(3)), torch.rand(16))

    def step():
        diffusion.token_loss(net, z, c, t, noise, 4)[0].mean().backward()
    step()
    rate = 2048 * bridge.train_flops(net, 0, 0, 128) / seconds_of(cfg.repeats, step)
    print(f"bridge of width {width}: {rate / 1e9:.0f} GFLOP/s forward and backward, {rate / matmul_rate():.0%} of "
          "torch.mm")


def bench_generate(cfg):
    """Tokens a second of cached generation, batch 1, against stock generate() of the intact model."""
    model = hybrid.from_bridge(cfg.bridge)
    intact = backbone.load(model.config.base_model, torch.device("cpu"), torch.float32).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    new = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
               attention_mask=torch.ones_like(ids))
    stock = 64 / seconds_of(cfg.repeats, lambda: intact.generate(ids, **new))
    print(f"generation at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; hybrid ", end="")
    for nfe in (1, 2, 4, 8):
        model.set_nfe(nfe)
        speed = 64 / seconds_of(cfg.repeats, lambda: model.generate(ids, **new))
        print(f"NFE {nfe}: {speed:.0f} ({speed / stock:.2f}x)", end="; " if nfe < 8 else "\n")


def bench_blocks(cfg):
    """Tokens a second of one block of 64 tokens after 64, batch 1, against stock generate() of the intact model."""
    model = hybrid.from_bridge(cfg.blocks)
    intact = backbone.load(model.config.base_model, torch.device("cpu"), torch.float32).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    stock = 64 / seconds_of(cfg.repeats, lambda: intact.generate(
        ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, attention_mask=ids > 0))
    print(f"blocks of 64 at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; ", end="")
    for nfe, rounds in ((4, 0), (16, 0), (8, 8), (32, 0)):
        speed = 64 / seconds_of(cfg.repeats, lambda nfe=nfe, rounds=rounds: model.generate_blocks(
            ids, 64, 64, nfe, rounds=rounds))
        print(f"NFE {nfe}{f' and {rounds} refinements' if rounds else ''}: {speed:.0f} ({speed / stock:.1f}x)",
              end="; " if nfe < 32 else "\n")


def convert_flops(lm, hide):
    """Of a step of the unaligned arm with masks hide (B, T): blocks forward and backward on all tokens, every token
    attending to every other; the frozen head on predictors of masked tokens, without gradients of its weights."""
    inside, tokens, T = sum(p.numel() for p in lm.blocks.parameters()), hide.numel(), hide.shape[1]
    attention = 12 * lm.L * backbone.attention_width(lm.config) * T
    return tokens * (6 * inside + attention) + 4 * int(hide[:, 1:].sum()) * lm.V * lm.D


def convert_share(width, cfg):
    """The unaligned arm's forward and backward on 2,048 tokens, as a share of torch.mm's rate, for the toy at this
    width."""
    lm = backbone.Backbone(toy.build_toy(toy.Config(width=width, heads=width // 64), 2048))
    student = masked.Student(lm, lm.V - 1)
    repr_align.freeze(student, "embed")
    ids, hide = torch.randint(1, lm.V - 1, (16, 128)), repr_align.corrupt(128, cfg.seed, "mask", 0, range(16))

    def step():
        repr_align.conversion_loss(student, None, ids, hide, 1.0)[0].sum().backward()
    step()
    rate = convert_flops(lm, hide) / seconds_of(cfg.repeats, step)
    print(f"conversion, unaligned arm at width {width}: {rate / 1e9:.0f} GFLOP/s, {rate / matmul_rate():.0%} of "
          "torch.mm")


def bench_convert(cfg):
    """Step time and memory of the aligned arm beside the unaligned one, and the unaligned one's share of torch.mm.
    Memory: bytes saved for backward, counted by hooks, and weights."""
    def arm(weight):
        lm, teacher = (backbone.load(cfg.model, torch.device("cpu"), torch.float32) for _ in range(2))
        student = masked.Student(lm, lm.V - 1)
        repr_align.freeze(student, "embed")
        ids = torch.randint(1, lm.V - 1, (16, 128))
        hide, held = repr_align.corrupt(128, cfg.seed, "mask", 0, range(16)), {}

        def step():
            each, _, apart, _, _ = repr_align.conversion_loss(student, teacher if weight else None, ids, hide, 1.0)
            (each.sum() + weight * apart).backward()

        def pack(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        seconds = seconds_of(cfg.repeats, step)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            repr_align.conversion_loss(student, teacher if weight else None, ids, hide, 1.0)
        for p in [*lm.parameters(), *(teacher.parameters() if weight else [])]:  # some are saved for backward too
            held[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
        return seconds, sum(held.values()), convert_flops(lm, hide)
    (slow, more, _), (fast, less, flops) = arm(10.0), arm(0.0)
    print(f"conversion, 16 x 128 tokens: aligned over unaligned {slow / fast:.2f}x in time, {more / less:.2f}x in "
          f"memory; unaligned {flops / fast / 1e9:.0f} GFLOP/s, {flops / fast / matmul_rate():.0%} of torch.mm")


@torch.no_grad()
def bench_twin(cfg):
    """The masked twin's samplers against a plain loop of full forward passes, and the likelihood's standard error
    against masking every token with probability t and weighting by 1/t, at equal calls."""
    model, _ = masked.load_converted(cfg.twin, torch.device("cpu"), torch.float32)
    ids = torch.randint(1, 1000, (16, 128))
    hide = torch.arange(128).expand(16, 128) >= 64

    def plain():
        for _ in range(64):
            model.lm.model(ids)
    stock = 64 * 16 / seconds_of(cfg.repeats, plain)
    print(f"twin, 64 new tokens, 64 steps, batch 16: plain loop {stock:.0f} tokens/s; ", end="")
    for name, how in (("fill", {}), ("blocks of 16 with cache", {"block": 16})):
        speed = 64 * 16 / seconds_of(cfg.repeats, lambda: masked.fill(model, ids, hide, 64, **how))  # noqa: B023
        print(f"{name} {speed:.0f} ({speed / stock:.2f}x)", end="; " if not how else "\n")
    shards = beside(cfg.twin, "data")
    text, calls, errors = data.Tokens(shards, "val", 128).windows(8)[:, :-1], 32, [[], []]
    for i, row in enumerate(text):
        draws = [[], []]
        for seed in range(8):
            draws[0].append(masked.likelihood(model, row, calls, seed, key=i)[0])
            hidden = torch.cat([repr_align.corrupt(128, seed, "bernoulli", i, [c]) for c in range(calls)])
            share = torch.tensor([min(max(generator(seed, "bernoulli", i, c).random(), 1 / 500), 1 - 1 / 500)
                                  for c in range(calls)])
            draws[1].append((masked.masked_ce(model, row, hidden) / share).mean().item())
        for kind in (0, 1):
            errors[kind].append(torch.tensor(draws[kind]).var().item())
    ours, theirs = (sum(e) ** 0.5 for e in errors)
    print(f"likelihood at {calls} calls a window: standard error {ours / len(text) ** 0.5:.2f} nats by stratified "
          f"counts, {theirs / len(text) ** 0.5:.2f} by Bernoulli 1/t: {theirs / ours:.2f}x smaller (8 texts x 8)")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        print(f"measures torch.mm, geometry.collect on {cfg.model}, a bridge step, and generation with {cfg.bridge}")
        return
    world = setup("cpu")
    torch.manual_seed(cfg.seed)
    print(f"torch.mm at 2048^2, fp32: {matmul_rate() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    bench_geometry(backbone.load(cfg.model, world.device, torch.float32), cfg)
    for width in (128, 512):
        bench_bridge(width, cfg)
    bench_generate(cfg)
    bench_convert(cfg)
    convert_share(512, cfg)
    if cfg.blocks:
        bench_blocks(cfg)
    if cfg.twin:
        bench_twin(cfg)


if __name__ == "__main__":
    main()
