"""conditional.py: what is left of h[l] once h[0] is known, for all layers by (nearly) the same forward passes.

    known = fit(lm, layers, calibration, train, wanted=held_out)      # rows of ids (N, T) each
    table = joined([errors(lm, guesses(known), held_out)])    # layer -> guess -> fvu, and of those decoded kl, ce_gap
    rest = left(known[l], hl, h0)                    # (B, T, D): h[l] less its ridge, in the units a bridge diffuses

The published score looks at h[l] alone, but a bridge is given h[0]: a layer is easy for it where h[0] says nearly all.
A guess is a bridge that needs no training, or seconds of it; a new one is a function and a line of GUESSES.

Letters: B batch, T tokens, D hidden width, V vocabulary, C layers looked at, n tokens of a batch.
"""
import torch
from torch import nn

from core import optim
from core.denoiser import Bridge, calibrate, ridge
from core.diffusion import regress
from core.metrics import LOGITS, against

BATCH, SHARE, WIDTH = 8, 1e-3, 64        # rows a pass; ridge, as a share of the mean eigenvalue; of a probe
GUESSES = {  # name -> guess of z (B, T, D) from what `fit` knows of the layer, c (B, T, D) and ids (B, T)
    "identity": lambda at, c, ids: (at.mu_c + at.sigma_c * c - at.mu_z) / at.sigma_z,    # h[0] itself
    "ridge": lambda at, c, ids: with_one(c) @ at.weights,
    "token mean": lambda at, c, ids: at.mean[at.place[ids]],
    "one-block probe": lambda at, c, ids: GUESSES["ridge"](at, c, ids) + regress(at, c),
}


def with_one(c):
    return torch.cat([c, torch.ones_like(c[..., :1])], -1)                           # (..., D + 1)


def left(at, h, h0):
    """What the ridge leaves of the layer's h (B, T, D), in the units of z."""
    return at.standard_z(h) - with_one(at.standard_c(h0)) @ at.weights


def fit(lm, layers, calibration, train, wanted, skip=4, seed=0, probe_steps=40):
    """layer -> what is known of it: a bridge of one narrow block whose buffers are the units of z and c, and which
    learns what the ridge leaves; with `weights` of the ridge and the `mean` state of each token, its row given by
    `place`. From positions >= skip of rows (N, T): units from `calibration`; ridge, the means of the tokens `wanted`
    and the probes from `train`, of which only sums are kept: memory does not grow with the text."""
    torch.manual_seed(seed)
    device = lm.norm.weight.device
    width = min(WIDTH, 32 * -(-lm.D // 32))
    known = {layer: Bridge(lm.D, width, 1, width // 32, "regression").to(device) for layer in layers}
    for layer, at in known.items():
        calibrate(lm, at, calibration, layer, skip)
        nn.init.zeros_(at.leave.weight)                                              # the probe begins as the ridge
        nn.init.zeros_(at.leave.bias)
    solve(lm, known, train, wanted, skip)
    teach(lm, known, train.split(BATCH)[:probe_steps], skip)
    return known


@torch.no_grad()
def solve(lm, known, train, wanted, skip):
    """Set weights, mean and place of each layer. The Gram matrix of c is the same for all layers."""
    D, device = lm.D, lm.norm.weight.device
    ids = wanted.unique()
    place = torch.zeros(lm.V, dtype=torch.long, device=device)                       # row 0: all other tokens
    place[ids] = torch.arange(1, 1 + len(ids), device=device)
    gram = torch.zeros(D + 1, D + 1, dtype=torch.float64, device=device)
    cross = {layer: torch.zeros(D + 1, D, dtype=torch.float64, device=device) for layer in known}
    total, count = {layer: torch.zeros(1 + len(ids), D, device=device) for layer in known}, 0
    for rows in train.split(BATCH):
        some, one = place[rows[:, skip:].flatten()], None                            # (n,)
        count = count + torch.bincount(some, minlength=1 + len(ids))[:, None]
        for layer, h, h0, _ in lm.at(rows, known):
            if one is None:
                one = with_one(known[layer].standard_c(h0)[:, skip:]).flatten(0, 1)  # (n, D + 1)
                gram += one.T @ one
            z = known[layer].standard_z(h)[:, skip:].flatten(0, 1)                   # (n, D)
            cross[layer] += one.T @ z
            total[layer].index_add_(0, some, z)
    for layer, at in known.items():
        at.weights, at.place = ridge(gram, cross[layer], SHARE).float(), place
        middle = (cross[layer][-1] / gram[-1, -1]).float()                           # a pseudo-count at the mean state
        at.mean = (total[layer] + middle) / (count + 1)


def teach(lm, known, batches, skip):
    """Train all probes side by side on what the ridge leaves, one step a batch."""
    named = [(f"{layer} {name}", p) for layer, at in known.items() for name, p in at.named_parameters()]
    optimizers = optim.build(named, lr=0.02, lr_adam=2e-3, weight_decay=0.01)
    for step, ids in enumerate(batches):
        for layer, h, h0, _ in lm.at(ids, known):
            at = known[layer]
            (regress(at, at.standard_c(h0)) - left(at, h, h0))[:, skip:].square().mean().backward()
        optim.step_all(optimizers, optim.share_at(step, len(batches), warmup=5))
    for _, p in named:
        p.requires_grad_(False)


def guesses(known, decoded=(), skip=4):
    """layer -> name -> (units, function of z, c and ids, is it decoded?), as `errors` wants them. True states of the
    first positions are given: a table of tokens knows no attention sinks, and its text would pay."""
    def answer(at, guess):
        return lambda z, c, ids: torch.cat([z[:, :skip], guess(at, c, ids)[:, skip:]], 1)
    return {layer: {name: (at, answer(at, guess), name in decoded) for name, guess in GUESSES.items()}
            for layer, at in known.items()}


@torch.no_grad()
def errors(lm, asked, held_out, skip=4):
    """layer -> name -> sums over positions >= skip of held-out rows (N, T + 1): of z^2, of the guess's squared error
    and, where it is decoded, of KL and CE gap; last the positions. One pass of the intact model serves all guesses;
    `asked`: layer -> name -> (a bridge, in whose units it is, the guess (z, c, ids) -> (B, T, D), is it decoded?)."""
    sums = {layer: {name: torch.zeros(5 if decoded else 3, dtype=torch.float64) for name, (*_, decoded) in some.items()}
            for layer, some in asked.items()}
    for ids in held_out.split(max(1, min(BATCH, LOGITS // (held_out.shape[1] * lm.V)))):
        rows, right = ids[:, :-1], ids[:, 1 + skip:, None]
        passed = list(lm.at(rows, {*asked, lm.L}))
        states, (*_, h0, side) = {layer: h for layer, h, *_ in passed}, passed[-1]   # (B, T, D) each
        _, gaps = against(lm.head(states[lm.L][:, skip:]), right)
        for layer, some in asked.items():
            for name, (net, guess, decoded) in some.items():
                z = net.standard_z(states[layer])
                z_hat = guess(z, net.standard_c(h0, rows), rows)
                each = [z[:, skip:] ** 2, (z_hat - z)[:, skip:] ** 2]
                if decoded:
                    upper = lm.through(net.hidden(z_hat).to(h0.dtype), layer, lm.L, side)
                    each += gaps(lm.head(upper[:, skip:]))
                sums[layer][name] += torch.tensor([*(float(e.sum()) for e in each), right.numel()], dtype=torch.double)
    return {layer: {name: of.tolist() for name, of in some.items()} for layer, some in sums.items()}


def joined(parts):
    """Sums of `errors` over several sets of rows -> layer -> name -> {fvu, and of what is decoded kl, ce_gap}, as
    core/measure.py has them."""
    out = {}
    for layer, some in parts[0].items():
        for name in some:
            energy, error, *gaps, n = (sum(x) for x in zip(*(part[layer][name] for part in parts), strict=True))
            out.setdefault(int(layer), {})[name] = {"fvu": error / max(energy, 1e-12), **{
                key: gap / n for key, gap in zip(("kl", "ce_gap"), gaps)}}
    return out
