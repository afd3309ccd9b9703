"""denoiser.py: the network inside the bridge: a small causal transformer told the noise level and the condition.

    net = Bridge(D, W, blocks, H)
    out = net(x_t, c, t)                 # (B, T, D): an estimate of z or v, as `prediction` says
    out = net(x_t, c, t, unknown=u)      # where u (B, T) is true the token, and so its condition, is unknown
    save(net, folder, {...}); net, info = load(folder, device)

Letters: B batch, T tokens, D width of the target, C of the condition (both the backbone's), W of the bridge, H heads,
d = W/H, V vocabulary.
"""
import inspect
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.common import UserError, why
from core.diffusion import open_up
from core.run import atomic, read_json, write_json


def rotate(x, positions):
    """Rotary positions on x (B, H, T, d), positions (B or 1, T). Su et al. 2021."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)                 # (d/2,)
    angle = positions[:, None, :, None] * frequency                                      # (B, 1, T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Pre-norm causal transformer block. Noise level enters by adaLN: shift, scale and gate of both sublayers."""

    def __init__(self, W, H):
        super().__init__()
        self.H = H
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.out = nn.Linear(W, W, bias=False)
        self.up = nn.Linear(W, 4 * W, bias=False)      # two halves: gate and value of the SwiGLU
        self.down = nn.Linear(2 * W, W, bias=False)
        self.mod = nn.Parameter(torch.zeros(6, W))     # this block's offset to the shared modulation

    def forward(self, h, modulation, positions, mask=None, cache=None, layer=0):
        """h (B, T, W), modulation (B, 6, W), positions (1 or B, T), mask (B, 1, T, K) or None -> (B, T, W). `cache` is
        a transformers cache whose `layer` holds this block's earlier keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.mod)[:, :, None].unbind(1)   # (B, 1, W) each
        B, T, W = h.shape
        a = F.rms_norm(h, (W,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(a).view(B, T, 3, self.H, W // self.H).permute(2, 0, 3, 1, 4)              # (B, H, T, d) each
        q, k = rotate(F.rms_norm(q, q.shape[-1:]), positions), rotate(F.rms_norm(k, k.shape[-1:]), positions)
        if cache is not None:
            k, v = cache.update(k, v, layer)                                                           # (B, H, K, d)
        a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)                       # (B, H, T, d)
        h = h + (1 + gate1) * self.out(a.transpose(1, 2).reshape(B, T, W))
        a = F.rms_norm(h, (W,)) * (1 + scale2) + shift2
        gate, value = self.up(a).chunk(2, -1)                                                          # (B, T, 2W) each
        return h + (1 + gate2) * self.down(F.silu(gate) * value)


class Bridge(nn.Module):
    """The denoiser (x_t, c, t) -> z or v, and the two standardisations it lives between.

    One modulation network for all blocks: with one per block it would outweigh them (6 W^2 parameters each)."""
    FREQUENCIES = 16

    def __init__(self, D, W, blocks, H, objective="diffusion", prediction="x", source="noise", self_condition=False,
                 visible="full", bidirectional=False, V=0, C=0, head_start="none", sink="shared"):
        super().__init__()
        assert prediction in ("x", "v"), f"prediction {prediction} has left the code, see LOG.md"
        C = C or D
        self.settings = {"D": D, "W": W, "blocks": blocks, "H": H, "objective": objective, "prediction": prediction,
                         "source": source, "self_condition": self_condition, "visible": visible,
                         "bidirectional": bidirectional, "V": V, "C": C, "head_start": head_start,
                         "sink": sink}
        self.recompute = False                                                # activation checkpointing of the blocks
        self.generates = visible != "full"                                    # it has met unknown tokens
        # [x_t, c] side by side, then the last z and whether the token is unknown, where there are such
        wide = C + D * (head_start == "tokens")                               # channels of the condition
        self.enter = nn.Linear((1 + self_condition) * D + wide + self.generates, W)
        self.time = nn.Linear(2 * self.FREQUENCIES, 6 * W)
        self.blocks = nn.ModuleList(Block(W, H) for _ in range(blocks))
        self.leave = nn.Linear(W, D)
        if self.generates:
            self.null = nn.Parameter(torch.zeros(wide))                       # the condition of an unknown token
            self.readout = nn.Linear(D, V)                                    # z -> the token itself
            nn.init.zeros_(self.readout.weight)
        for name, value in (("mu_z", torch.zeros(D)), ("mu_c", torch.zeros(C)), ("sigma_z", torch.ones(D)),
                            ("sigma_c", torch.ones(C))):                      # set by `calibrate`, below
            self.register_buffer(name, value)
        if sink == "own":                                                     # units of h[l] at position 0
            self.register_buffer("mu_0", torch.zeros(D))
            self.register_buffer("sigma_0", torch.ones(D))
        if head_start == "tokens":                                            # mean z of each token, part of c
            self.register_buffer("means", torch.zeros(V, D))
        if head_start != "none":                                              # z = A c + what the network adds to it
            self.register_buffer("ridge", torch.zeros(D, wide))               # A, set by `calibrate` in closed form
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)
        for p in self.time.parameters():
            nn.init.zeros_(p)

    def forward(self, x, c, t, positions=None, mask=None, last=None, cache=None, layer=0, unknown=None):
        """x (B, T, D), c (B, T, C), t (B,) in [0, 1] -> the raw prediction (B, T, D). Token i sees tokens 0..i only,
        unless it is `unknown` (B, T; None: all are known) and the bridge bidirectional. Why causal: h[l] at position i
        depends on tokens <= i only; a bridge that saw more would leak the answer into the hybrid's next-token loss.

        `mask` (B, 1, T, K), true where a query may look, replaces the plain causal rule when a batch is padded or keys
        come from a `cache` (its layers from `layer` on). `last` (B, T, D) is the estimate of z to condition on (Chen et
        al. 2023), zero if there is none yet."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]                # (1, T)
        angle = t[:, None] * math.pi * 2.0 ** torch.linspace(0, 5, self.FREQUENCIES, device=t.device)   # (B, F)
        modulation = self.time(torch.cat([angle.cos(), angle.sin()], -1)).view(len(t), 6, -1)          # (B, 6, W)
        channels = [x, c]
        if self.settings["self_condition"]:
            channels.append(torch.zeros_like(x) if last is None else last)
        if self.generates:
            unknown = torch.zeros_like(x[..., 0], dtype=torch.bool) if unknown is None else unknown
            channels[1] = torch.where(unknown[..., None], self.null, c)
            channels.append(unknown[..., None].to(x.dtype))
            if self.settings["bidirectional"] and mask is None:
                mask = open_up(unknown)
        h = self.enter(torch.cat(channels, -1))                                        # (B, T, W)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, modulation, positions, mask, use_reentrant=False)
            else:
                h = block(h, modulation, positions, mask, cache, layer + i)
        out = self.leave(F.rms_norm(h, h.shape[-1:])).float()                          # (B, T, D)
        if self.settings["head_start"] != "none":
            known = c if unknown is None else c.masked_fill(unknown[..., None], 0.0)
            out = out + known.float() @ self.ridge.T
        return out

    def standard_c(self, h0, ids=None):
        """The condition (B, T, C) of h[0] (B, T, C) and, where the bridge knows mean states, of the tokens ids (B, T),
        which come beside it."""
        c = (h0.float() - self.mu_c) / self.sigma_c
        return torch.cat([c, self.means[ids]], -1) if self.settings["head_start"] == "tokens" else c

    def units(self, h, positions):
        """(mu, sigma) of h[l] (..., T, D) at these positions (B, T), or from 0 on. Position 0 has its own: where all
        attention that is not needed goes, a state is massive (Sun et al. 2024) and nearly the same for any token, and
        hundreds of the others' sigmas away. An error there is an error of every later token."""
        if self.settings["sink"] == "shared":
            return self.mu_z, self.sigma_z
        positions = torch.arange(h.shape[-2], device=h.device) if positions is None else positions
        first = (positions == 0)[..., None]                                            # (T, 1) or (B, T, 1)
        return torch.where(first, self.mu_0, self.mu_z), torch.where(first, self.sigma_0, self.sigma_z)

    def standard_z(self, hl, positions=None):
        mu, sigma = self.units(hl, positions)
        return (hl.float() - mu) / sigma

    def hidden(self, z, positions=None):
        """Standardised z -> h[l]."""
        mu, sigma = self.units(z, positions)
        return z * sigma + mu


RIDGE = 0.01  # share of the ridge that a bridge starts from


def ridge(gram, cross, share):
    """Weights (C, D) of the ridge regression with these second moments, gram (C, C) of the inputs and cross (C, D) with
    the outputs; `share` of the mean eigenvalue is added to every one."""
    return torch.linalg.solve(gram + share * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), cross)


# ------------------------------------------------------------------------------------------- target, condition
def produce(lm, h0, layer, side=None):
    """What the bridge learns to make, from h[0] (B, T, D): h[layer] (B, T, D), the residual stream after block `layer`.
    Calibration, training and every measurement call this; `Bridge.hidden` undoes the standardisation."""
    return lm.through(h0, 0, layer, side)


@torch.no_grad()
def targets(lm, net, ids, layer, state=None):
    """ids (B, T) -> (z, c), (B, T, D) and (B, T, C): the pair the bridge learns from, by one pass through the frozen
    prefix, or from h[layer] (B, T, D) where it is known."""
    h0 = lm.embed(ids)
    return net.standard_z(produce(lm, h0, layer) if state is None else state), net.standard_c(h0, ids)


class Moments:
    """Mean and standard deviation per dimension of vectors that come a few at a time."""

    def __init__(self):
        self.n, self.total, self.square = 0, 0.0, 0.0

    def add(self, h):
        """h (B, T, D)."""
        flat = h.flatten(0, 1).double()                                                # (n, D)
        self.n += len(flat)
        self.total, self.square = self.total + flat.sum(0), self.square + flat.square().sum(0)

    def mean_and_sd(self):
        mean = self.total / self.n
        variance = (self.square / self.n - mean.square()).clamp_min(0)
        return mean, variance.sqrt().clamp_min(1e-4 * variance.mean().sqrt() + 1e-8)   # a dead dimension stays finite


@torch.no_grad()
def calibrate(lm, net, rows, layer, skip, states=None):
    """Set mu, sigma of h[l] and h[0] per dimension from rows (N, T), positions >= skip: the first ones are attention
    sinks, a few dimensions of which are hundreds of times larger, and set all scales. states: their h[l], if known."""
    first, z, c = Moments(), Moments(), Moments()
    if states is None:
        states = torch.cat([produce(lm, lm.embed(ids), layer) for ids in rows.split(8)])       # (N, T, D)
    for ids, h in zip(rows.split(8), states.split(8)):
        first.add(h[:, :1])
        z.add(h[:, skip:])
        c.add(lm.embed(ids)[:, skip:])
    for buffer, value in zip((net.mu_z, net.sigma_z, net.mu_c, net.sigma_c), (*z.mean_and_sd(), *c.mean_and_sd())):
        buffer.copy_(value)
    if net.settings["sink"] == "own":
        for buffer, value in zip((net.mu_0, net.sigma_0), first.mean_and_sd()):
            buffer.copy_(value)
    if net.settings["head_start"] == "tokens":           # a rare token's mean is drawn towards 0, that of all
        total, count = torch.zeros_like(net.means), torch.ones_like(net.means[:, :1])
        for ids, h in zip(rows[::2].split(8), states[::2].split(8)):
            z, ids = net.standard_z(h)[:, skip:], ids[:, skip:].flatten()
            total.index_add_(0, ids, z.flatten(0, 1))
            count.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32)[:, None])
        net.means.copy_(total / count)
        rows, states = rows[1::2], states[1::2]          # other text for the ridge: the means must not know it
    if net.settings["head_start"] != "none":
        cc, cz = 0.0, 0.0
        for ids, h in zip(rows.split(8), states.split(8)):
            z, c = (x[:, skip:].flatten(0, 1).double() for x in targets(lm, net, ids, layer, h))     # (n, D), (n, C)
            cc, cz = cc + c.T @ c, cz + c.T @ z
        net.ridge.copy_(ridge(cc, cz, RIDGE).T)


# ------------------------------------------------------------------------------------------------------- its files
def save(net, folder, extra):
    """bridge.safetensors, then bridge.json: what hybrid.py needs to rebuild and to trust it."""
    with atomic(Path(folder) / "bridge.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, temporary, seal(extra))
    write_json(Path(folder) / "bridge.json", {**net.settings, **extra})


def seal(info):
    """What is written into the weights too, so that a bridge.json of another run is noticed."""
    return {"layer": str(info["layer"]), "base": str(info["base"])}


def load(folder, device):
    """(Bridge in eval mode, its bridge.json). Raises UserError for a missing, truncated or foreign file."""
    file, info = Path(folder) / "bridge.safetensors", read_json(Path(folder) / "bridge.json",
                                                                "train one with: python bridge.py")
    try:
        net = Bridge(**{k: info[k] for k in inspect.signature(Bridge).parameters if k in info})
        net.load_state_dict(load_file(file))
        with safe_open(file, "pt") as f:
            sealed = f.metadata() or {}                                # none in a file that an older version wrote
        wanted = {**seal(info), "tokenizer, model and nfe": [info["tokenizer"], info["model"], info["nfe_default"]]}
    except Exception as error:  # a missing key, a truncated file, tensors of another shape
        raise UserError(f"{file} and bridge.json could not be read ({type(error).__name__}: {why(error)}); train the "
                        "bridge again") from None
    for key in sealed:
        if sealed[key] != wanted[key]:
            raise UserError(f"{file} was trained for {key} {sealed[key]}, but bridge.json says {wanted[key]}; train "
                            "the bridge again")
    return net.to(device).eval().requires_grad_(False), info
