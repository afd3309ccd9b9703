"""The diffusion bridge: a small transformer that generates the hidden state h[l] from h[0].

Write z for the standardised h[l] and c for the standardised h[0].

    x_t = (1 - t) * z + t * noise       the path: t = 0 is the hidden state, t = 1 is pure noise
    loss = |bridge(x_t, c, t) - z|^2    flow matching with x-prediction: the network predicts z
    dx/dt = (x_t - z_hat) / t           the sampler: Euler steps from t = 1 down to t = 0

A bridge has two uses. For replacement every token is known, so z is a function of c and there is
nothing to sample. For generation some tokens are unknown: their condition is a learned vector, and
z really is random.

A fork changes one function: `produce` and `recover` (the state that is generated), `noise_levels`
(the distribution of t), `path`, `Block` and `cache_layers` (the network), `sample` (the sampler).

Shapes: B batch, T tokens, D width of the backbone, W width of the bridge, H heads, V vocabulary,
C channels of the condition.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.common import UserError, generator, normal, why
from core.run import atomic, read_json, write_json

T_MEAN = 0.7          # mean of logit t: above 0 trains more near pure noise
VISIBLE_WEIGHT = 0.1  # weight of a visible token's error when other tokens of the text are hidden
RIDGE = 0.01          # regularisation of the head start's linear map
FREQUENCIES = 16      # of the noise-level embedding


# -------------------------------------------------------------------------------------------------
# The state that is generated

def produce(h0, hl):
    """The state (B, T, D) that the bridge learns to generate, from h[0] and h[l]: h[l] itself."""
    return hl


def recover(h0, state):
    """The inverse of `produce`: h[l] (B, T, D)."""
    return state


# -------------------------------------------------------------------------------------------------
# The network

@dataclass
class BridgeConfig:
    D: int                         # width of the backbone
    W: int                         # width of the bridge
    depth: int                     # transformer blocks of the bridge
    H: int                         # attention heads
    V: int = 0                     # vocabulary
    objective: str = "diffusion"   # or "regression": the same network, called once, without noise
    head_start: str = "none"       # or "tokens": the network corrects a linear prediction of z
    generates: bool = False        # trained with unknown tokens; has a readout from z to tokens
    bidirectional: bool = False    # unknown tokens attend to the whole text
    self_condition: bool = False   # the previous estimate of z is an extra input
    sink: str = "own"              # position 0 is standardised on its own, or "shared"


def normed(x):
    return F.rms_norm(x, x.shape[-1:])


def rotate(x, positions):
    """Rotary position embedding (Su et al. 2021) of x (B, H, T, d) at positions (B or 1, T)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)        # (d/2,)
    angle = positions[:, None, :, None] * frequency                             # (B, 1, T, d/2)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block. The noise level enters as shift, scale and gate (DiT). All
    blocks share one projection and add an offset of their own; the gates start open."""

    def __init__(self, W, H):
        super().__init__()
        self.H = H
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.up = nn.Linear(W, 4 * W, bias=False)       # gate and value of the SwiGLU
        self.down = nn.Linear(2 * W, W, bias=False)
        self.mod = nn.Parameter(torch.zeros(6, W))      # added to the modulation that blocks share

    def forward(self, h, modulation, positions, mask=None, cache=None, cache_layer=0):
        """h (B, T, W) -> (B, T, W). `cache` is a transformers cache: this block's keys and values
        are in `cache_layer`."""
        B, T, W = h.shape
        modulation = (modulation + self.mod)[:, :, None]                        # (B, 6, 1, W)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)

        # Attention
        x = normed(h) * (1 + scale1) + shift1
        qkv = self.qkv(x).view(B, T, 3, self.H, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, H, T, d)
        q = rotate(normed(q), positions)
        k = rotate(normed(k), positions)
        if cache is not None:
            k, v = cache.update(k, v, cache_layer)                              # (B, H, K, d)
        causal = mask is None
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        x = x.transpose(1, 2).reshape(B, T, W)
        h = h + (1 + gate1) * self.out(x)

        # MLP
        x = normed(h) * (1 + scale2) + shift2
        gate, value = self.up(x).chunk(2, dim=-1)                               # (B, T, 2W)
        return h + (1 + gate2) * self.down(F.silu(gate) * value)


class Bridge(nn.Module):
    """(x_t, c, t) -> z_hat. Causal where all tokens are known: the estimate at position i depends
    on tokens 0..i only, as h[l] does. A bridge that saw more would leak the answer into the
    next-token loss of the hybrid. Unknown tokens see the whole text."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False                          # activation checkpointing
        D = config.D
        W = config.W
        C = 2 * D if config.head_start == "tokens" else D
        inputs = D + C
        if config.self_condition:
            inputs += D
        if config.generates:
            inputs += 1                                 # a flag: this token is unknown

        self.enter = nn.Linear(inputs, W)
        self.time = nn.Linear(2 * FREQUENCIES, 6 * W)   # one for all blocks
        self.blocks = nn.ModuleList(Block(W, config.H) for _ in range(config.depth))
        self.leave = nn.Linear(W, D)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

        if config.generates:
            self.null = nn.Parameter(torch.zeros(C))    # condition of an unknown token
            self.readout = nn.Linear(D, config.V)       # z -> the token itself
            nn.init.zeros_(self.readout.weight)

        # Mean and standard deviation, set by `calibrate`. z: of the state, c: of h[0], 0: of the
        # state at position 0 alone
        units = ["z", "c", "0"] if config.sink == "own" else ["z", "c"]
        for unit in units:
            self.register_buffer(f"mu_{unit}", torch.zeros(D))
            self.register_buffer(f"sigma_{unit}", torch.ones(D))
        if config.head_start == "tokens":
            self.register_buffer("means", torch.zeros(config.V, D))    # mean z of every token
            self.register_buffer("ridge", torch.zeros(D, C))
            nn.init.zeros_(self.leave.weight)                   # at first the ridge alone speaks
            nn.init.zeros_(self.leave.bias)

    def forward(self, x, c, t, positions=None, mask=None, last=None, unknown=None,
                cache=None, cache_layer=0):
        """x (B, T, D), c (B, T, C), t (B,) -> z_hat (B, T, D).

        unknown (B, T) marks hidden tokens, last (B, T, D) is the previous estimate of z. mask
        (B, 1, T, K) replaces the causal mask; a cache that holds tokens needs one. The first
        block's keys are in `cache_layer`."""
        T = x.shape[1]
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]
        if unknown is None:
            unknown = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        flag = unknown[..., None]                                               # (B, T, 1)
        inputs = [x, c]
        if self.config.self_condition:
            inputs.append(torch.zeros_like(x) if last is None else last)
        if self.config.generates:
            inputs[1] = torch.where(flag, self.null, c)
            inputs.append(flag.to(x.dtype))
            if self.config.bidirectional and mask is None:
                # Visible tokens attend backwards only, unknown ones to all. After the first block
                # a visible token can know of later ones through an unknown one before it
                causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
                mask = (causal | flag)[:, None]                                 # (B, 1, T, T)

        octaves = torch.linspace(0, 5, FREQUENCIES, device=t.device)
        angle = t[:, None] * math.pi * 2.0 ** octaves                           # (B, F)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        modulation = self.time(waves).view(len(t), 6, -1)                       # (B, 6, W)

        h = self.enter(torch.cat(inputs, dim=-1))                               # (B, T, W)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, modulation, positions, mask, use_reentrant=False)
            else:
                h = block(h, modulation, positions, mask, cache, cache_layer + i)
        z_hat = self.leave(normed(h)).float()                                   # (B, T, D)
        if self.config.head_start == "tokens":
            z_hat = z_hat + c.masked_fill(flag, 0.0).float() @ self.ridge.T
        return z_hat

    def cache_layers(self, calls):
        """How many layers of a transformers cache a sample with `calls` calls fills. Each call has
        its own: its keys and values are those of another noise level."""
        if self.config.objective == "regression":
            calls = 1
        return calls * len(self.blocks)

    def condition(self, h0, ids):
        """h[0] (B, T, D) of tokens ids (B, T) -> c (B, T, C)."""
        c = (h0.float() - self.mu_c) / self.sigma_c
        if self.config.head_start == "tokens":
            c = torch.cat([c, self.means[ids]], dim=-1)
        return c

    def units(self, state, positions):
        """Mean and standard deviation of the state (B, T, D). Position 0 has its own: it is an
        attention sink, hundreds of times larger than the others (Sun et al. 2024)."""
        if self.config.sink == "shared":
            return self.mu_z, self.sigma_z
        if positions is None:
            positions = torch.arange(state.shape[-2], device=state.device)
        first = (positions == 0)[..., None]                                     # (B or 1, T, 1)
        mean = torch.where(first, self.mu_0, self.mu_z)
        sigma = torch.where(first, self.sigma_0, self.sigma_z)
        return mean, sigma

    def target(self, h0, hl, positions=None):
        """h[0] and h[l] (B, T, D) -> z, what the network predicts."""
        state = produce(h0, hl)
        mean, sigma = self.units(state, positions)
        return (state.float() - mean) / sigma

    def restore(self, h0, z, positions=None):
        """The inverse of `target`: z -> h[l] (B, T, D)."""
        mean, sigma = self.units(z, positions)
        return recover(h0, z * sigma + mean)


# -------------------------------------------------------------------------------------------------
# Calibration: the units of z and c, and the head start

def mean_and_std(h):
    """Per dimension over h (N, T, D), in float64. A dead dimension keeps a small positive scale."""
    flat = h.flatten(0, 1).double()
    mean = flat.mean(0)
    variance = (flat.square().mean(0) - mean.square()).clamp_min(0)
    floor = 1e-4 * variance.mean().sqrt() + 1e-8
    return mean, variance.sqrt().clamp_min(floor)


@torch.no_grad()
def calibrate(bridge, h0, hl, ids, skip):
    """Set the buffers of `bridge` from h[0] and h[l] (N, T, D) of tokens ids (N, T).

    Attention sinks stand in the first `skip` positions. They would set all scales, so these
    positions are left out. Position 0 alone has units of its own."""
    state = produce(h0, hl)
    bridge.mu_z[:], bridge.sigma_z[:] = mean_and_std(state[:, skip:])
    bridge.mu_c[:], bridge.sigma_c[:] = mean_and_std(h0[:, skip:])
    if bridge.config.sink == "own":
        bridge.mu_0[:], bridge.sigma_0[:] = mean_and_std(state[:, :1])
    if bridge.config.head_start == "tokens":
        fit_head_start(bridge, h0, hl, ids, skip)


def fit_head_start(bridge, h0, hl, ids, skip):
    """Half of the text is for the token means, the other half for the linear map. Otherwise the map
    would trust means that were counted on its own text."""
    z = bridge.target(h0, hl)[:, skip:]                                         # (N, T, D)
    # 1. Mean z of every token, with one pseudo-count at zero, the mean of all
    tokens = ids[::2, skip:].flatten()                                          # (n,)
    total = torch.zeros_like(bridge.means)                                      # (V, D)
    total.index_add_(0, tokens, z[::2].flatten(0, 1))
    count = torch.bincount(tokens, minlength=len(total)) + 1
    bridge.means[:] = total / count[:, None]
    # 2. The best linear map from c to z, in closed form
    c = bridge.condition(h0, ids)[1::2, skip:].flatten(0, 1).double()           # (n, C)
    goal = z[1::2].flatten(0, 1).double()                                       # (n, D)
    gram = c.T @ c
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    bridge.ridge[:] = torch.linalg.solve(gram, c.T @ goal).T


# -------------------------------------------------------------------------------------------------
# Training: noise levels, hidden tokens, loss

def path(z, noise, t):
    """The state x_t on the straight line from z (t = 0) to noise (t = 1)."""
    return (1 - t) * z + t * noise


def noise_levels(seed, step, slots):
    """t (B,), logit-normal (Esser et al. 2024), shifted towards noise, where sampling starts: that
    lowered the KL of the toy's layer 4 from 0.15 to 0.13 (docs/log, 2026-11-27)."""
    logits = [T_MEAN + generator(seed, "t", step, slot).standard_normal() for slot in slots]
    return torch.tensor(logits).sigmoid()


def hidden_tokens(visible, ids, seed, step, slots, purpose="visible"):
    """Which of the tokens ids (B, T) are unknown, (B, T) bool; None if `visible` is full.

    mix: none in a quarter of the sequences, all after a random cut in half of them, all between two
    cuts in a quarter. Position 0 is always visible."""
    if visible == "full":
        return None
    T = ids.shape[1]
    unknown = torch.zeros(ids.shape, dtype=torch.bool)
    for row, slot in zip(unknown, slots):
        random = generator(seed, purpose, step, slot)
        kind = random.choice(["full", "prefix", "prefix", "span"])
        if kind == "prefix":
            row[random.integers(1, T):] = True
        elif kind == "span":
            start, end = sorted(random.choice(T, 2, replace=False) + 1)
            row[start:end] = True
    return unknown.to(ids.device)


def bridge_loss(bridge, z, c, t, noise, skip, self_conditioned=None, unknown=None):
    """Squared error of each token (B, T) and the estimate z_hat (B, T, D), detached.

    self_conditioned (B,) marks the sequences that see the network's own first estimate."""
    # 1. Predict z
    if bridge.config.objective == "regression":
        z_hat = regress(bridge, c, unknown=unknown)
    else:
        x = path(z, noise, t[:, None, None])                                    # (B, T, D)
        last = None
        if bridge.config.self_condition:                                        # Chen et al. 2023
            with torch.no_grad():
                last = bridge(x, c, t, unknown=unknown)
                last = last * self_conditioned[:, None, None]
        z_hat = bridge(x, c, t, last=last, unknown=unknown)
    loss = (z_hat - z).square().mean(-1)                                        # (B, T)

    # 2. An attention sink is divided by its own size, or it would outweigh the whole sequence
    size = z.square().mean(-1).clamp_min(1)
    is_sink = torch.arange(z.shape[1], device=z.device) < skip
    loss = torch.where(is_sink, loss / size, loss)

    # 3. Where tokens are hidden, they are the task
    if unknown is not None:
        counts_fully = unknown | ~unknown.any(1, keepdim=True)
        loss = torch.where(counts_fully, loss, VISIBLE_WEIGHT * loss)
    return loss, z_hat.detach()


def readout_loss(bridge, z_hat, ids):
    """Cross-entropy of the token readout: mean over tokens, summed over sequences. z_hat is
    detached: the bridge never feels it."""
    logits = bridge.readout(z_hat).flatten(0, 1)                                # (B T, V)
    return F.cross_entropy(logits, ids.flatten(), reduction="sum") / ids.shape[1]


# -------------------------------------------------------------------------------------------------
# Sampling

def regress(bridge, c, **context):
    """The control: one call at t = 1 with x = 0 in place of noise."""
    B, T, _ = c.shape
    x = c.new_zeros(B, T, bridge.config.D)
    t = torch.ones(B, device=c.device)
    return bridge(x, c, t, **context)


@torch.no_grad()
def sample(bridge, c, calls, noise, *, z=None, done=0, watch=None, **context):
    """z (B, T, D) by `calls` Euler steps from noise (T, D) or (B, T, D).

    `context` goes to the network: positions, mask, cache, unknown. To refine a given z, the first
    `done` calls are skipped: z is carried back up to that noise level. `watch` sees every
    estimate."""
    if bridge.config.objective == "regression":
        return regress(bridge, c, **context)
    levels = [(calls - i) / calls for i in range(calls + 1)]                    # 1, ..., 0
    x = noise.expand(len(c), -1, -1)
    if done:
        x = path(z, x, levels[done])
    z_hat = None
    for i in range(done, calls):
        t = levels[i]
        cache_layer = bridge.cache_layers(i)
        z_hat = bridge(x, c, x.new_full([len(x)], t), last=z_hat, cache_layer=cache_layer,
                       **context)
        if watch:
            watch(z_hat)
        slope = (x - z_hat) / t                                                 # dx/dt
        x = x + (levels[i + 1] - t) * slope
    return x


def position_noise(seed, positions, D, device):
    """Noise (T, D) of the sampler, a function of (seed, position). So logits are deterministic, and
    a step with a cache gives what recomputing the whole text would give."""
    cpu = torch.device("cpu")
    rows = [normal((D,), cpu, seed, "sampler", int(position)) for position in positions]
    return torch.stack(rows).to(device)


# -------------------------------------------------------------------------------------------------
# Files

def save(bridge, folder, info):
    """bridge.safetensors and bridge.json. `info` says which layer and which backbone it is for."""
    with atomic(Path(folder) / "bridge.safetensors") as temporary:
        save_file(bridge.state_dict(), temporary)
    write_json(Path(folder) / "bridge.json", {**info, "bridge": asdict(bridge.config)})


def load(folder, device):
    """(bridge in eval mode, its info). Raises UserError for a missing or damaged file."""
    info = read_json(Path(folder) / "bridge.json", "train one with: python bridge.py")
    try:
        bridge = Bridge(BridgeConfig(**info["bridge"]))
        bridge.load_state_dict(load_file(Path(folder) / "bridge.safetensors"))
    except Exception as error:
        raise UserError(f"the bridge in {folder} is damaged or was written by the second edition "
                        f"({why(error)}); train it again: python bridge.py") from None
    return bridge.to(device).eval().requires_grad_(False), info
