"""bench: how fast is this machine, and how close to that is a training step of a bridge?

    python -m studies.bench                         # half a minute on a CPU
    python -m studies.bench --device cuda --repeats 20

Prints one row a measurement and writes nothing. FLOPs of a step: 6 a parameter and token.
"""
import timeit
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.common import entry, parse, setup
from core.diffusion import Bridge, BridgeConfig, bridge_loss


@dataclass
class Config:
    device: str = "auto"        # auto, cpu, cuda; fp32 on a CPU, bf16 on a GPU
    repeats: int = 5            # the best one counts
    seed: int = 0               # of the tensors


def seconds(repeats, function):
    """The fastest of several calls."""
    def call():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return min(timeit.repeat(call, number=1, repeat=repeats))


def ceilings(n, T, device, dtype, repeats):
    """Print what the machine can do. Returns its rate of matrix products, in FLOP/s."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    q = torch.randn(4, 16, T, 64, device=device, dtype=dtype)
    product = 2 * n ** 3 / seconds(repeats, lambda: a @ a)
    copy = 2 * a.nbytes / seconds(repeats, a.clone)
    attention = 2 * q.numel() * T / seconds(
        repeats, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads")
    print(f"product of {n} x {n} matrices    {product / 1e9:10.0f} GFLOP/s")
    print(f"copy of such a matrix          {copy / 1e9:10.0f} GB/s")
    print(f"causal attention, {T:4} tokens  {attention / 1e9:10.0f} GFLOP/s")
    return product


def step(width, sequences, device, dtype, repeats):
    """FLOP/s of forward and backward of a bridge of two blocks on sequences of 128 tokens."""
    heads = max(1, width // (64 if width >= 512 else 32))
    bridge = Bridge(BridgeConfig(D=width, W=width, depth=2, H=heads)).to(device)
    z = torch.randn(sequences, 128, width, device=device)
    t = torch.rand(sequences, device=device)

    def train():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            error, _ = bridge_loss(bridge, z, z, t, torch.randn_like(z), 4)
        error.mean().backward()
    size = sum(p.numel() for p in bridge.parameters())
    return 6 * size * z.shape[0] * z.shape[1] / seconds(repeats, train)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    device = setup(cfg.device).device
    torch.manual_seed(cfg.seed)
    if device.type == "cpu":
        settings = {"device": device, "dtype": torch.float32, "repeats": cfg.repeats}
        product = ceilings(2048, 256, **settings)
        shapes = [(128, 16), (576, 16), (1024, 16)]
    else:
        settings = {"device": device, "dtype": torch.bfloat16, "repeats": cfg.repeats}
        product = ceilings(8192, 4096, **settings)
        shapes = [(1024, 256), (4096, 256)]
    for width, sequences in shapes:
        rate = step(width, sequences, **settings)
        print(f"training a bridge of width {width:4} {rate / 1e9:10.0f} GFLOP/s, "
              f"{rate / product:.0%} of the product")


if __name__ == "__main__":
    main()
