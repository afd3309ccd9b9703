"""diffusion.py: the maths of the bridge: path, what is known, objective, sampler. Pure functions; bridge.py trains with
them, core/hybrid_lm.py samples with them.

    x_t = (1-t) z + t e                               the path from the clean state z (t = 0) to noise e (t = 1)
    loss, z_hat = token_loss(net, z, c, t, noise, skip)            one training example per sequence
    z = sample(net, c, nfe, noise)                                 nfe calls of the network, from t = 1 down to 0

Extension points: TIMES (laws of t) and SAMPLERS, dicts of functions.

Two uses of one network. Replacement: every token is known, so z is a function of c and there is nothing to sample.
Generation: some tokens are unknown, their condition is a learned null, and z really is drawn.

Letters: B batch, T tokens, D hidden width of the backbone, z the standardised h[l], c the standardised h[0].
"""
import torch
import torch.nn.functional as F

from core.common import pick
from core.draws import generator, normal

VISIBLE_WEIGHT = 0.1  # of a visible token's error beside an unknown one's: the unknown ones are the task


# ------------------------------------------------------------------------------------------------------ the path
def start(c, noise, source, unknown=None):
    """e, the t = 1 end of the path (B, T, D): pure noise, or noise around the other end of the replaced blocks. Where
    the token is `unknown` (B, T) there is no other end, and e is noise: c must not leak through it."""
    if source == "noise":
        return noise
    e = c + 0.5 * noise
    return e if unknown is None else torch.where(unknown[..., None], noise, e)


def logit_normal(draws, mean):
    """Esser et al. 2024: the middle of the path is where the network has most to learn."""
    return torch.sigmoid(torch.tensor([mean + g.standard_normal() for g in draws], dtype=torch.float32))


TIMES = {"logit-normal": logit_normal,  # --times -> (generators, mean of logit t) -> t (B,)
         "uniform": lambda draws, mean: torch.tensor([g.random() for g in draws], dtype=torch.float32)}


def times(law, mean, seed, step, slots):
    """t (B,) for the given slots, one per sequence."""
    return pick(TIMES, law, "--times")([generator(seed, "t", step, s) for s in slots], mean)


def to_z(out, x, t, prediction):
    """Network output -> estimate of z. t (B,) or a number; x_t = (1-t) z + t e and v = e - z.

    Why x, z itself, is the default: states of width D lie near few directions, and only z does so too; noise and v fill
    all of them, and a network of about that width must spend itself on them (v collapses here, see LOG.md)."""
    return out if prediction == "x" else x - torch.as_tensor(t, device=x.device, dtype=x.dtype).reshape(-1, 1, 1) * out


# ------------------------------------------------------------------------------------------------- what is unknown
def hide(mode, T, seed, step, slots, purpose="visible"):
    """Which tokens are unknown, (B, T) bool for the given slots; None when the mode hides nothing.

    full: none. prefix: all after a cut. span: all between two cuts. mix: a quarter full, half prefix, a quarter span.
    Cuts are uniform, and position 0 is always visible."""
    if mode == "full":
        return None
    unknown = torch.zeros(len(slots), T, dtype=torch.bool)
    for row, slot in zip(unknown, slots, strict=True):
        draw = generator(seed, purpose, step, slot)
        kind = draw.choice(["full", "prefix", "prefix", "span"]) if mode == "mix" else mode
        if kind == "prefix":
            row[draw.integers(1, T):] = True
        elif kind == "span":
            lo, hi = sorted(draw.choice(T, 2, replace=False) + 1)            # 1 <= lo < hi <= T
            row[lo:hi] = True
    return unknown


def open_up(unknown):
    """The mask of a bidirectional bridge, (B, 1, T, T), true where a query may look: visible tokens see the past only
    (they must not learn from a future that replacement would not have), unknown ones see everything."""
    T = unknown.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=unknown.device).tril()
    return (causal | unknown[:, :, None])[:, None]


# ----------------------------------------------------------------------------------------------------- objective
def regress(net, c, positions=None, mask=None, cache=None, unknown=None):
    """The control: the same network at t = 1, where x_t would be all noise, with x = 0 instead."""
    z, t = c.new_zeros(*c.shape[:2], net.settings["D"]), torch.ones(len(c), device=c.device)
    return net(z, c, t, positions, mask, None, cache, 0, unknown)


def token_loss(net, z, c, t, noise, skip, last_seen=None, unknown=None):
    """(squared error per token (B, T), in units where predicting the mean costs about 1; the estimate of z, detached).
    `last_seen` (B,) says which sequences are shown the network's own first estimate (self-conditioning), `unknown`
    (B, T) which tokens are hidden from it.

    1 noisy state  2 a first estimate, if asked for  3 network, error against its own target
    4 sinks scaled by their own size (one would outweigh the whole sequence otherwise: massive activations)
    5 where there is something unknown, that is the task: visible tokens count little."""
    kind, t3 = net.settings["prediction"], t[:, None, None]
    if net.settings["objective"] == "regression":
        z_hat = regress(net, c, unknown=unknown)
        error = z_hat - z
    else:
        e = start(c, noise, net.settings["source"], unknown)
        x, last = (1 - t3) * z + t3 * e, None                                             # (B, T, D)
        if net.settings["self_condition"]:
            with torch.no_grad():
                last = to_z(net(x, c, t, unknown=unknown), x, t, kind) * last_seen[:, None, None]
        out = net(x, c, t, last=last, unknown=unknown)
        error, z_hat = out - {"x": z, "v": e - z}[kind], to_z(out, x, t, kind)
    loss = error.square().mean(-1)                                                        # (B, T)
    sink = torch.arange(z.shape[1], device=z.device) < skip
    loss = torch.where(sink, loss / z.square().mean(-1).clamp_min(1), loss)
    if unknown is not None:
        loss = torch.where(unknown | ~unknown.any(1, keepdim=True), loss, VISIBLE_WEIGHT * loss)
    return loss, z_hat.detach()


# ------------------------------------------------------------------------------------------------------- sampler
def grid_of(steps, shift):
    """Noise levels from 1 down to 0, even in u with t = shift u / (1 + (shift - 1) u): a shift above 1 spends more
    calls near t = 1, where what is unknown gets decided (Esser et al. 2024, section 5.3.2)."""
    return [shift * (steps - i) / (steps + (shift - 1) * (steps - i)) for i in range(steps)] + [0.0]


def euler(slope, x, levels):
    """x <- x + (s - t) dx/dt from each level t to the next one s: exact for a straight path."""
    for now, then in zip(levels, levels[1:]):
        x = x + (then - now) * slope(x, now)
    return x


def ab2(slope, x, levels):
    """Two-step Adams-Bashforth: the slope goes on along the line through the last two, so that as many calls err less.
    First and last step are Euler's; the last one ends in the network's own estimate."""
    last, before = None, None
    for now, then in zip(levels, levels[1:]):
        v = slope(x, now)
        bend = (v - last) * (then - now) / (2 * (now - before)) if last is not None and then > 0 else 0
        x, last, before = x + (then - now) * (v + bend), v, now
    return x


SAMPLERS = {"euler": euler, "ab2": ab2}  # --sampler -> (slope, x at t = 1, noise levels down to 0) -> x at 0


def again(nfe, back):
    """How many of `nfe` calls a refinement makes again, at least one; with nfe = 1 it starts from noise again."""
    return max(1, round(back * nfe))


@torch.no_grad()
def sample(net, c, nfe, noise, positions=None, mask=None, cache=None, *, sampler="euler", shift=1.0, unknown=None,
           z=None, done=0, watch=None):
    """z (B, T, D) from c by `nfe` network calls (NFE, the number of function evaluations), starting from noise (T, D)
    or (B, T, D). A cache has one layer for each call and block: earlier tokens' keys and values at that call. Given
    `z`, the first `done` calls of the grid are taken as made: z is carried to the noise level where they would
    have ended, and the rest of the path is run. `watch` is called with every estimate of z."""
    if net.settings["objective"] == "regression":
        return regress(net, c, positions, mask, cache, unknown)
    kind, last, calls = net.settings["prediction"], None, done

    def slope(x, t):
        nonlocal last, calls
        out = net(x, c, torch.full((len(x),), t, device=x.device), positions, mask, last, cache,
                  calls * net.settings["blocks"], unknown)
        last, calls = to_z(out, x, t, kind), calls + 1
        if watch is not None:
            watch(last)
        return (x - last) / t                                                             # dx/dt = e - z

    solve = pick(SAMPLERS, sampler, "--sampler")
    x = start(c, noise.expand(*c.shape[:2], -1), net.settings["source"], unknown)          # (B, T, D)
    if done:
        level = grid_of(nfe, shift)[done]
        x = (1 - level) * z + level * x
    return solve(slope, x, grid_of(nfe, shift)[done:])


def position_noise(seed, positions, D, device):
    """The sampler's noise (T, D): a function of (seed, position), the same for every row, so that logits are
    deterministic and a cached step equals recomputation."""
    rows = [normal((D,), torch.device("cpu"), seed, "sampler", int(p)) for p in positions]
    return torch.stack(rows).to(device)


def readout_loss(net, z_hat, ids):
    """Cross-entropy (B, T) of the token readout on estimates z_hat (B, T, D): its gradient never reaches the bridge."""
    logits = net.readout(z_hat.detach())                                                  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
