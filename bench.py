"""bench.py: speed and memory of the stages beside their ceilings, measured in one run.

    python bench.py --model out/toy                      # ~30 s on 2 cores

Prints one row a measurement: the value, the stock thing it is compared with, and their ratio. Writes nothing.

Letters: B batch, T tokens.
"""
import time
import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import backbone
import bridge
import denoiser
import diffusion
import geometry
import hybrid
from common import entry, matmul_rate, parse, setup


@dataclass
class Config:
    model: str = "out/toy"      # a model folder or a Hub id
    bridge: str = "out/bridge"  # a trained bridge
    blocks: str = "out/blocks"  # a bridge trained with --visible (empty: leave its row out)
    seed: int = 0               # of the random tokens
    tokens: int = 8192          # tokens of the geometry rows
    repeats: int = 5            # the best of so many is reported
    dry_run: bool = False       # print what would be measured, then leave


class PeakBytes(TorchDispatchMode):
    """Within this context, `most` is the largest number of bytes held at once by tensors made in it."""

    def __enter__(self):
        self.now, self.most, self.known = 0, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage):
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self.known:
            return
        self.known.add(pointer)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer, size):
        self.known.discard(pointer)
        self.now -= size


def best_of(repeats, run):
    """The fastest of `repeats` calls in seconds: the least disturbed one."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
    forward, collecting = best_of(cfg.repeats, stock), best_of(cfg.repeats, collect)
    states = collect()
    rest = best_of(1, lambda: geometry.analyse(states, settings))
    print(f"geometry, {windows.numel()} tokens: collecting the states {collecting:.2f} s, stock forward passes "
          f"{forward:.2f} s, ratio {collecting / forward:.2f}; everything else {rest:.1f} s")


def bench_bridge(width, cfg):
    """Forward and backward of a bridge of 2 blocks on 2,048 tokens, as a share of torch.mm's rate."""
    net = denoiser.Bridge(width, width, 2, max(1, width // (64 if width >= 512 else 32)))
    z, c, noise, t = (*(torch.randn(16, 128, width) for _ in range(3)), torch.rand(16))

    def step():
        diffusion.token_loss(net, z, c, t, noise, 4)[0].mean().backward()
    step()
    rate = 2048 * bridge.train_flops(net, 0, 0, 128) / best_of(cfg.repeats, step)
    print(f"bridge of width {width}: {rate / 1e9:.0f} GFLOP/s forward and backward, {rate / matmul_rate():.0%} of "
          "torch.mm")


def bench_generate(cfg):
    """Tokens a second of cached generation, batch 1, against stock generate() of the intact model."""
    model = hybrid.from_bridge(cfg.bridge)
    intact = backbone.load(model.config.base_model, torch.device("cpu"), torch.float32).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    new = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
               attention_mask=torch.ones_like(ids))
    stock = 64 / best_of(cfg.repeats, lambda: intact.generate(ids, **new))
    print(f"generation at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; hybrid ", end="")
    for nfe in (1, 2, 4, 8):
        model.set_nfe(nfe)
        speed = 64 / best_of(cfg.repeats, lambda: model.generate(ids, **new))
        print(f"NFE {nfe}: {speed:.0f} ({speed / stock:.2f}x)", end="; " if nfe < 8 else "\n")


def bench_blocks(cfg):
    """Tokens a second of one block of 64 tokens after 64, batch 1, against stock generate() of the intact model."""
    model = hybrid.from_bridge(cfg.blocks)
    intact = backbone.load(model.config.base_model, torch.device("cpu"), torch.float32).model
    ids = torch.randint(1, intact.config.vocab_size, (1, 64))
    stock = 64 / best_of(cfg.repeats, lambda: intact.generate(
        ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, attention_mask=ids > 0))
    print(f"blocks of 64 at layer {model.config.layer}: stock generate() {stock:.0f} tokens/s; ", end="")
    for nfe, rounds in ((4, 0), (16, 0), (8, 8), (32, 0)):
        speed = 64 / best_of(cfg.repeats, lambda: model.generate_blocks(ids, 64, 64, nfe, rounds=rounds))  # noqa: B023
        print(f"NFE {nfe}{f' and {rounds} refinements' if rounds else ''}: {speed:.0f} ({speed / stock:.1f}x)",
              end="; " if nfe < 32 else "\n")


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
    if cfg.blocks:
        bench_blocks(cfg)


if __name__ == "__main__":
    main()
