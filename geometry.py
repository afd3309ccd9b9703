"""LOCATE: score every layer of a causal LM by how well its hidden states suit diffusion.

    python geometry.py                                        # the toy: ten seconds on two cores
    python geometry.py --model Qwen/Qwen3-0.6B                # one consumer GPU: two minutes
    python geometry.py --transform log --out out/geometry_log

    score = z(local curvature) + z(global stiffness) - z(effective rank)

z standardises over the candidate layers 1..L-1. The layer with the highest score is chosen. DiHAL
(arXiv 2605.14368) publishes the three quantities, their signs and the sum. The constants are ours:
they are flags, and the variants in result.json repeat the choice with other values. A new proxy is
one function and one line of PROXIES.

Equal windows of text are left out, because a state's nearest neighbours would be its copies.

Writes result.json and geometry.png.

Shapes: B batch, T tokens, D hidden width, L blocks, C = L - 1 candidate layers, S sequences,
P pool, A anchors, k neighbours, R bootstrap resamples, K proxies, V variants.
"""
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

import data
from core import backbone, report
from core.common import Dtype, UserError, entry, generator, parse, pick_dtype, setup
from core.run import Run, finished


@dataclass
class Config:
    # model, text, output
    preset: backbone.Preset = "auto"  # auto: by model size
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py; held-out text is scored
    out: str = "out/geometry"   # run folder
    seed: int = 0               # of the windows, the pool, the anchors and the resamples
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # of the backbone; auto: bf16 on a GPU
    # which states
    tokens: int = 16384         # hidden states of a layer
    seq_len: int = 128          # tokens a sequence
    batch_size: int = 16        # sequences a forward pass
    skip: int = 4               # first positions, attention sinks, are not measured (0: all are)
    pool: int = 16384           # P: random states kept for the neighbours and the bootstrap
    anchors: int = 1024         # A: members of the pool at which curvature is measured
    # constants of the score
    k: int = 32                 # neighbours of an anchor
    eps: float = 1e-3           # regulariser, as a share of the mean eigenvalue
    normalize: Literal["rms", "raw", "dim"] = "rms"  # unit RMS a layer, or a dimension
    transform: Literal["linear", "log"] = "linear"   # of the proxies before z
    resamples: int = 200        # R: bootstrap resamples of sequences and anchors


PRESETS = {
    "tiny": dict(tokens=512, seq_len=32, batch_size=4, pool=256, anchors=64, k=8, resamples=20),
    "135m": dict(pool=8192, anchors=512, resamples=100),
    "0.6b": dict(tokens=32768, seq_len=1024, batch_size=8, pool=4096, resamples=100),
    "8b": dict(tokens=32768, seq_len=1024, batch_size=4, pool=2048, resamples=50),
}


# -------------------------------------------------------------------------------------------------
# The text: does it begin as the model's own training text did?

def warn_of_missing_bos(lm, windows):
    """Print a warning where windows (N, T) are predicted better if their first token is BOS."""
    losses = []
    after_bos = windows.clone()
    after_bos[:, 0] = lm.config.bos_token_id
    for ids in (windows, after_bos):
        losses.append(lm.model(ids, labels=ids, use_cache=False).loss.item())
    if losses[0] - losses[1] > 0.1:
        print(f"warning: {losses[0]:.2f} nats a token without BOS, {losses[1]:.2f} after BOS; use "
              "a tokenizer that adds BOS, and data.py without --no-bos")


# -------------------------------------------------------------------------------------------------
# The hidden states of all layers, in one forward pass

def check_finite(values, name):
    if not torch.isfinite(values).all():
        raise UserError(f"{name} is not finite; try --dtype fp32 or other text")


@dataclass
class States:
    """Layers 1..L-1: the covariance of all states, and a random pool of states."""
    cov: torch.Tensor           # (C, D, D)
    pool: list                  # C times (P, D), centred; the same P tokens at every layer
    sequence: torch.Tensor      # (P,) the sequence that a member of the pool comes from
    anchors: np.ndarray         # (A,) members of the pool at which curvature is measured
    norm: torch.Tensor          # (C,) mean |h[l]|
    moved: torch.Tensor         # (C,) mean |h[l] - h[0]|

    def space(self, c, normalize):
        """Pool X (P, D) and covariance S (D, D) of candidate c.

        "dim" gives every dimension unit variance, as it has in the bridge."""
        X = self.pool[c].float()
        S = self.cov[c]
        if normalize != "dim":
            return X, S
        variance = S.diagonal()
        sigma = variance.clamp_min(1e-8 * variance.mean()).sqrt()               # (D,)
        return X / sigma, S / sigma[:, None] / sigma


@torch.no_grad()
def collect(lm, windows, cfg):
    """Token ids `windows` (S, T) -> States of layers 1..L-1.

    The first positions are left out: a few attention sinks of huge norm would dominate the
    covariance. Moments are relative to the mean of the first batch, because the mean of the states
    can be large compared with their spread."""
    C = lm.L - 1
    in_pool = windows.new_zeros(len(windows), windows.shape[1] - cfg.skip, dtype=torch.bool)
    N = in_pool.numel()
    in_pool.view(-1)[generator(cfg.seed, "pool").choice(N, cfg.pool, replace=False)] = True
    pool = [[] for _ in range(C)]
    total = windows.new_zeros(C, lm.D, dtype=torch.float32)
    shift = torch.zeros_like(total)
    second = total.new_zeros(C, lm.D, lm.D)
    norm = torch.zeros(C)
    moved = torch.zeros(C)
    for ids, kept in zip(windows.split(cfg.batch_size), in_pool.split(cfg.batch_size)):
        layers = lm.trace(lm.embed(ids))                # h[0], h[1], ..., each (B, T, D)
        start = next(layers)[:, cfg.skip:].flatten(0, 1)                        # (n, D)
        for c, h in zip(range(C), layers):
            h = h[:, cfg.skip:]
            pool[c].append(h[kept])
            X = h.flatten(0, 1).float()                                         # (n, D)
            norm[c] += X.norm(dim=-1).sum().cpu()
            moved[c] += (X - start).norm(dim=-1).sum().cpu()
            if len(pool[c]) == 1:
                shift[c] = X.mean(0)
            X = X - shift[c]
            total[c] += X.sum(0)
            second[c].addmm_(X.T, X)
    mean = total / N                                    # relative to the shift
    cov = second.div_(N)                                # in place: this is the largest tensor
    for c in range(C):
        cov[c].addr_(mean[c], mean[c], alpha=-1)
        check_finite(cov[c], f"the covariance of layer {c + 1}")
        pool[c] = torch.cat(pool[c]) - (shift + mean)[c].to(h.dtype)
    anchors = generator(cfg.seed, "anchors").choice(cfg.pool, cfg.anchors, replace=False)
    return States(cov, pool, sequence=in_pool.nonzero()[:, 0], anchors=anchors, norm=norm / N,
                  moved=moved / N)


# -------------------------------------------------------------------------------------------------
# The geometry of one layer

def eigenvalues(S):
    """The eigenvalues (..., D) of a covariance (..., D, D), largest first, never negative."""
    return torch.linalg.eigvalsh(S).flip(-1).clamp_min(0)


def local_spread(X, near):
    """Largest eigenvalue (A,) of the covariance of an anchor's neighbours `near` (A, k).

    The k x k Gram matrix of the centred neighbours has the same nonzero eigenvalues. Its own are
    computed in fp64: equal neighbours make it zero up to rounding, and fp32 would give NaN."""
    Y = X[near]                                                                 # (A, k, D)
    Y = Y - Y.mean(1, keepdim=True)
    gram = Y @ Y.mT / Y.shape[1]                                                # (A, k, k)
    return eigenvalues(gram.double())[:, 0].float()


def measure(states, c, cfg):
    """Candidate c: its spectrum, and the spread and distances of the k nearest neighbours of every
    anchor in the pool. An anchor is no neighbour of itself."""
    X, S = states.space(c, cfg.normalize)
    anchors = states.anchors
    distance = torch.cdist(X[anchors], X)                                       # (A, P)
    distance[np.arange(len(anchors)), anchors] = torch.inf
    distance, near = distance.topk(cfg.k, largest=False)                        # (A, k) each
    return Measured(eigenvalues(S), local_spread(X, near), distance, cfg)


def resampled_spectra(X, sequence, counts):
    """Spectra (R, D) of the pool X (P, D) when whole sequences are sampled with replacement.

    `counts` (R, S) says how often each sequence was sampled. Tokens of one sequence depend on each
    other, so sequences are the units. One eigendecomposition serves all resamples: to first order
    an eigenvalue of the new covariance is the variance along the old eigenvector."""
    Y = X @ torch.linalg.eigh(X.T @ X).eigenvectors                             # (P, D)
    Y = torch.cat([X.new_ones(len(X), 1), Y, Y.square()], 1)
    sums = X.new_zeros(counts.shape[1], Y.shape[1]).index_add_(0, sequence, Y)  # (S, 1 + 2 D)
    sums = X.new_tensor(counts) @ sums                                          # (R, 1 + 2 D)
    first, second = (sums[:, 1:] / sums[:, :1]).chunk(2, 1)                     # (R, D) each
    return (second - first.square()).clamp_min(0).sort(descending=True).values


# -------------------------------------------------------------------------------------------------
# The proxies and the score

class Measured(NamedTuple):
    """All that a proxy may use. The leading axes `...` are layers or resamples."""
    e: torch.Tensor             # (..., D) eigenvalues of the covariance, largest first
    spread: torch.Tensor        # (..., A) largest eigenvalue of the covariance near an anchor
    distance: torch.Tensor      # (..., A, k) distances to the neighbours, nearest first
    cfg: Config

    def inverse(self, variance):
        """1 / (variance + eps). Both are in units of the mean eigenvalue tr(S) / D, unless
        --normalize raw: scale alone wins nothing."""
        mean = self.e.mean(-1, keepdim=True)                                    # (..., 1)
        unit = 1 if self.cfg.normalize == "raw" else mean
        return 1 / (variance / unit + self.cfg.eps * mean / unit)


def curvature(m):
    """Median of 1 / (spread + eps): strong convexity of -log p near a typical point."""
    return m.inverse(m.spread).median(-1).values


def stiffness(m):
    """1 / (e_1 + eps): strong monotonicity of the Gaussian fit."""
    return m.inverse(m.e)[..., 0]


def effective_rank(m):
    """exp(entropy of e / sum e): the number of directions in use (Roy & Vetterli 2007)."""
    p = m.e / m.e.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


# name -> (sign in the score, function of Measured with positive values). A proxy of sign 0 has a
# column and a variant of its own, and is not in the score.
PROXIES = {
    "curvature": (1, curvature),
    "stiffness": (1, stiffness),
    "effective_rank": (-1, effective_rank),
}


def proxies(measured):
    """All proxies (..., C, K) of a Measured for every candidate."""
    columns = []
    for name, (_, function) in PROXIES.items():
        values = [function(m) for m in measured]
        for layer, value in enumerate(values, 1):
            check_finite(value, f"{name} of layer {layer}")
        columns.append(torch.stack(values, -1))
    return torch.stack(columns, -1).cpu()


def z_scores(x, cfg):
    """Proxies x (..., C, K) -> their z over the layers (..., C, K). No z exceeds sqrt(C - 1)."""
    if cfg.transform == "log":
        x = x.log()
    centred = x - x.mean(-2, keepdim=True)
    sd = centred.square().mean(-2, keepdim=True).sqrt()
    return centred / sd.clamp_min(1e-12)


def score(x, cfg):
    """Proxies (..., C, K) -> score (..., C): the sum of the signed z."""
    signs = torch.tensor([sign for sign, _ in PROXIES.values()])
    return (signs * z_scores(x, cfg)).sum(-1)


# -------------------------------------------------------------------------------------------------
# Analysis

def locate(states, cfg):
    """The measurements of all candidates: a list of Measured."""
    return [measure(states, c, cfg) for c in range(len(states.pool))]


def bootstrap(states, measured, cfg):
    """Proxies (R, C, K) of resampled sequences (for the spectrum) and anchors (for the curvature).

    The pool stays fixed: neighbours sampled with replacement would be too close."""
    random = generator(cfg.seed, "resamples")
    R = cfg.resamples
    S = int(states.sequence.max()) + 1
    counts = random.multinomial(S, np.ones(S) / S, R)                           # (R, S)
    again = random.integers(0, cfg.anchors, (R, cfg.anchors))                   # (R, A)
    rows = []
    for c, m in enumerate(measured):
        X, _ = states.space(c, cfg.normalize)
        spectra = resampled_spectra(X, states.sequence, counts)                 # (R, D)
        rows.append(Measured(spectra, m.spread[again], m.distance[again], cfg))
    return proxies(rows)


def choices(table, point):
    """The layer that every entry name -> scores (C,) of `table` chooses. point (C,): the score."""
    return [{"name": name, "best_layer": int(scores.argmax()) + 1, "scores": scores.tolist(),
             "spearman_with_score": report.spearman(scores, point)}
            for name, scores in table.items()]


def analyse(states, cfg):
    """States -> the numbers of result.json."""
    C = len(states.pool)

    # 1. The score, also with other constants, single proxies, and rivals that need no geometry
    measured = locate(states, cfg)
    x = proxies(measured)                                                       # (C, K)
    point = score(x, cfg)                                                       # (C,)
    scores = {"default": point, "transform log": score(x, replace(cfg, transform="log"))}
    changes = [("normalize", "raw"), ("normalize", "dim"), ("k", cfg.k // 2), ("k", 2 * cfg.k)]
    for name, value in changes:
        other = replace(cfg, **{name: value})
        scores[f"{name} {value}"] = score(proxies(locate(states, other)), other)
    z = z_scores(x, cfg)                                                        # (C, K)
    for i, (name, (sign, _)) in enumerate(PROXIES.items()):
        scores[f"{name} only"] = (sign or 1) * z[:, i]
    trivial = {"-layer": -torch.arange(1.0, C + 1), "-log mean norm": -states.norm.log(),
               "-|h[l]-h[0]|": -states.moved}

    # 2. The choice, and a row a layer
    again = score(bootstrap(states, measured, cfg), cfg)                        # (R, C)
    offset = again - again.mean(0)                      # resampled spectra are a little too narrow
    low, high = point + offset.quantile(torch.tensor([0.025, 0.975]), dim=0)
    chosen = torch.bincount(again.argmax(1), minlength=C) / cfg.resamples
    at_ceiling = [layer for layer, m in enumerate(measured, 1) if curvature(m) > m.inverse(0) / 2]
    names = ["layer", *PROXIES, "score", "score_low", "score_high", "chosen"]
    columns = torch.stack([*x.T, point, low, high, chosen], 1).tolist()
    rows = [dict(zip(names, [layer, *values])) for layer, values in enumerate(columns, 1)]
    return {"layers": rows, "best_layer": int(point.argmax()) + 1, "at_ceiling": at_ceiling,
            "margin": float(-point.topk(2).values.diff()),
            "variants": choices(scores, point), "trivial": choices(trivial, point)}


# -------------------------------------------------------------------------------------------------
# Figure, table, main

def plot(result, path):
    """The proxies and the score over depth. A red line marks the chosen layer."""
    rows = result["layers"]
    layers = [row["layer"] for row in rows]
    panels = [*PROXIES, "score"]
    with report.figure(path, columns=len(panels), width=2.75, height=2.8) as axes:
        for ax, name in zip(axes, panels):
            ax.axvline(result["best_layer"], color=report.RED)
            ax.plot(layers, [row[name] for row in rows], "o-", color=report.BLUE)
            ax.set(title=name, xlabel="layer")
        low = [row["score_low"] for row in rows]
        high = [row["score_high"] for row in rows]
        ax.fill_between(layers, low, high, alpha=0.2)


def show(result):
    rows = result["layers"]
    print(report.table(list(rows[0]), [row.values() for row in rows]))
    for choice in result["variants"] + result["trivial"]:
        print(f"layer {choice['best_layer']} is chosen by {choice['name']}")
    print(f"{result.get('equal_windows', 0)} windows were left out as copies of others; "
          f"curvature is near its ceiling 1/eps at layers {result.get('at_ceiling', [])}")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, backbone.preset_of)
    world = setup(cfg.device)
    torch.set_float32_matmul_precision("highest")       # TF32 would blur distances of neighbours
    dtype = pick_dtype(cfg, world.device)
    model = backbone.resolve(cfg.model, cfg.out)
    backbone.read_config(model, cfg.seq_len)            # refuses what is longer than the model
    identity = {"base": backbone.identity(model), "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result

    # 1. Held-out text, in whole sequences
    assert cfg.skip < cfg.seq_len, "--skip must be below --seq_len"
    lm = backbone.load(model, world.device, dtype)
    assert lm.L >= 3, "a choice needs two candidate layers: a model of three blocks"
    _, held_out = data.splits(cfg, backbone.load_tokenizer(model), world, cfg.seq_len)
    per_window = cfg.seq_len - cfg.skip
    count = 1 + cfg.tokens // per_window
    windows = held_out.windows(count, cfg.seed)[:, :-1].tolist()
    different = dict.fromkeys(map(tuple, windows))      # equal windows have equal states
    tokens = len(different) * per_window
    assert 2 * cfg.k < min(cfg.pool, tokens), "--k must be below half of the states in the pool"
    run = Run(cfg, world, identity)
    cfg.pool = min(cfg.pool, tokens)                    # a small text has few states
    cfg.anchors = min(cfg.anchors, cfg.pool)
    copies = len(windows) - len(different)
    windows = torch.tensor(list(different), device=world.device)                # (S, T)
    if held_out.bos is None and lm.config.bos_token_id is not None:
        warn_of_missing_bos(lm, windows[:8, :256])      # short: logits are large

    # 2. One forward pass for all layers, then layer by layer
    states = collect(lm, windows, cfg)
    result = {**identity, **analyse(states, cfg), "tokens": tokens, "equal_windows": copies}
    plot(result, run.out / "geometry.png")
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
