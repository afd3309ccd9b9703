"""draws.py: every random number here is a function of (seed, purpose, key), never of the rank or of the past; all but
the weights before training and stock generate(), which torch.manual_seed(seed) makes.

    generator(seed, "t", step, slot).random()          # numpy, the same on any process, in any order
    normal((T, D), device, seed, "noise", step, slot)  # a tensor of standard normals
"""
import zlib

import numpy as np
import torch

DRAWS = {  # every purpose of a draw -> who draws it, and the rest of its key; a test holds the list against the code
    "epoch": "data.Tokens: order and phase of an epoch's windows (epoch)",
    "windows": "data.Tokens: a random choice of windows ()",
    "tokens": "data.RandomTokens (step, slot)",
    "task NAME": "core/tasks: prompts of a task ()", "task lines": "core/tasks: lines for the training text ()",
    "pool": "core/states: states kept ()", "anchors": "geometry ()", "resamples": "geometry: sequences, anchors ()",
    "t": "core/diffusion: noise level (step, slot)", "noise": "bridge, interfaces: end of the path (step, slot)",
    "self": "bridge: who sees its own first estimate (step, slot)",
    "visible": "core/diffusion: what is unknown (step, slot)",
    "validate": "bridge: noise, what is unknown; repr_align: masks; when validating (window), (0, window)",
    "sampler": "core/diffusion: a position's noise (position)",
    "block": "core/hybrid_lm: noise of a block of tokens (start, turn, row)",
    "decode": "core/hybrid_lm: its tokens (start, turn, row)",
    "unigram": "generate: a rival ()", "jacobi": "generate: a rival's fixed draws (row)",
    "drift": "generate: a rival's tokens (turn, row)",
    "mask": "core/conversion: which tokens are masked (step, slot)",
    "fill": "core/masked: tokens and chance order (stretch, round, row)",
    "count": "core/masked: mask counts (text)", "subset": "core/masked: masks of one count (text, call)",
    "controls": "circuits: random components ()",
    "permutations": "core/stats ()", "resampled seeds": "studies/sweep ()",
    "resampled backbones": "studies/sweep ()", "permuted layers": "studies/sweep ()",
    "ceiling": "studies/interfaces: true tokens (batch)",
    "span": "studies/span: noise of a state (number, first text)",
    "span own": "studies/span: continuations (first text)",
}


def generator(seed, purpose, *key):
    """A numpy generator for one draw, keyed by (seed, purpose, step, slot, ...): the same on any rank, in any order.

    Philox from a SeedSequence: torch's CPU generator keeps only 32 bits of its seed, so hashed keys would collide. The
    key's length is part of it, since SeedSequence pads with zeros: (a, 0) would be (a, 0, 0)."""
    words = [seed, zlib.crc32(purpose.encode()), len(key), *key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(shape, device, seed, purpose, *key):
    """Standard normal float32 tensor of `shape`. Drawn by numpy for the CPU, by the device's own Philox for a GPU:
    both are functions of the key, but they are not equal to one another."""
    gen = generator(seed, purpose, *key)
    if device.type == "cpu":
        return torch.from_numpy(gen.standard_normal(shape, dtype=np.float32))
    on_device = torch.Generator(device).manual_seed(int(gen.integers(2 ** 63)))
    return torch.randn(shape, generator=on_device, device=device)
