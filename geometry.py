"""geometry.py: LOCATE. Score every layer of a causal LM by how friendly its hidden states are to diffusion.

    python geometry.py                                           # the toy beside --out: ~10 s on 2 cores
    python geometry.py --model Qwen/Qwen3-0.6B --preset 0.6b     # one consumer GPU, ~2 min
    python geometry.py --model meta-llama/Llama-3.1-8B --preset 8b --dry_run     # memory before the download

Prints one row a layer and chooses the layer with the highest

    score = z(local curvature) + z(global stiffness) - z(effective rank),    z over the candidate layers 1..L-1

The three quantities, their signs and the z-scored sum are the published recipe (DiHAL, arXiv 2605.14368); every
constant is ours, so every one is a flag, and the variants table shows what changes when it changes. On the default toy
the chosen layer is 1. Writes geometry.png and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, N tokens kept, P pool, A anchors, R resamples, C candidate layers.
"""
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import data
from core import backbone
from core.common import UserError, entry, parse, pick_dtype, setup
from core.draws import generator
from core.run import Run, finished
from core.stats import spearman


@dataclass
class Config:
    preset: Literal["tiny", "toy", "0.6b", "8b"] = "toy"  # tiny: tests; toy: seconds; 0.6b, 8b: one GPU
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py; held-out text is scored
    out: str = "out/geometry"   # run folder
    seed: int = 0               # which windows, pool, anchors and resamples
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the backbone
    random_init: bool = False   # ignore the weights: what does geometry say of an untrained network?
    tokens: int = 16384         # N: hidden states per layer
    seq_len: int = 128          # tokens a sequence
    batch_size: int = 16        # sequences a forward pass
    skip: int = 4               # first positions of each sequence left out (attention sinks)
    pool: int = 16384           # P: states kept for neighbours and resampling
    anchors: int = 1024         # A: points at which curvature is measured
    k: int = 32                 # neighbours of an anchor
    eps: float = 1e-3           # regulariser, as a share of the mean eigenvalue
    normalize: Literal["rms", "raw"] = "rms"  # rms: each layer scaled to unit RMS, so that no layer wins by scale
    transform: Literal["linear", "log"] = "linear"  # of the proxies before z
    stiffness: Literal["min", "mean"] = "min"  # lambda_min((S + eps I)^-1), or its mean eigenvalue
    rank: Literal["entropy", "participation"] = "entropy"  # exp(entropy of spectrum), or (sum e)^2 / sum e^2
    resamples: int = 200        # R: bootstrap replicates of sequences and anchors
    dry_run: bool = False       # print memory and cost, then leave


PRESETS = {"tiny": dict(tokens=512, seq_len=32, batch_size=4, pool=256, anchors=64, k=8, resamples=20),
           "0.6b": dict(tokens=32768, seq_len=1024, batch_size=8, pool=4096, resamples=100),
           "8b": dict(tokens=32768, seq_len=1024, batch_size=4, pool=2048, resamples=50)}
PROXIES = ("curvature", "stiffness", "effective_rank")
SIGNS = torch.tensor([1.0, 1.0, -1.0])


# ----------------------------------------------------------------------------------------------- the three proxies
def eigenvalues(S):
    """Covariance (..., D, D) -> its eigenvalues (..., D), largest first, clamped at zero."""
    return torch.linalg.eigvalsh(S).flip(-1).clamp_min(0)


def neighbours(X, anchors, k, thin=1):
    """Indices (A, k) into X (P, D) of each anchor's k nearest others, nearest first; anchors (A,) indexes X. With
    `thin` only every so many-th member of the pool may be a neighbour: a sparser pool reaches further."""
    distance = torch.cdist(X[anchors], X)                                    # (A, P)
    distance[torch.arange(len(anchors)), anchors] = torch.inf
    return distance[:, ::thin].topk(k, largest=False).indices * thin         # (A, k)


def local_spread(X, near):
    """lambda_max of the covariance (ddof 0) of each anchor's neighbours. X (P, D), near (A, k) -> (A,).

    The k x k Gram matrix of the centred neighbours has the same nonzero eigenvalues as their D x D covariance."""
    spread = []
    for some in near.split(64):                                              # 64 k D numbers at a time
        Y = X[some]                                                          # (64, k, D)
        Y = Y - Y.mean(1, keepdim=True)
        spread.append(eigenvalues(Y @ Y.mT / Y.shape[1])[:, 0])              # (64,)
    return torch.cat(spread)


def curvature(spread, scale, eps):
    """Median over anchors of 1 / (lambda_max(S_a) + eps): the strong-convexity constant of -log p near a typical point.
    spread (..., A) is in squared units of the states and is divided by `scale` (...,)."""
    return (1 / (spread / scale[..., None] + eps[..., None])).median(-1).values


def stiffness(e, eps, kind="min"):
    """e (..., D) -> (...,). "min": 1/(e_1 + eps) = lambda_min((S + eps I)^-1), the strong-monotonicity constant of the
    Gaussian fit; "mean": tr((S + eps I)^-1) / D, another reading of the same word."""
    precision = 1 / (e + eps[..., None])
    return precision[..., 0] if kind == "min" else precision.mean(-1)


def effective_rank(e, kind="entropy"):
    """e (..., D) -> (...,). exp of the entropy of e / sum e (Roy & Vetterli 2007), or the participation ratio."""
    p = e / e.sum(-1, keepdim=True).clamp_min(1e-30)
    if kind == "participation":
        return 1 / p.square().sum(-1).clamp_min(1e-30)
    return torch.exp(torch.special.entr(p).sum(-1))


def proxies(e, spread, normalize="rms", eps=1e-3, stiffness_kind="min", rank_kind="entropy"):
    """The three proxies (..., 3) of a layer from its spectrum e (..., D) and local spreads (..., A).

    Under "rms" states are divided by their RMS, so tr(S)/D = 1; under "raw" they are not, and eps scales with it."""
    mean = e.mean(-1).clamp_min(1e-30)                                       # tr(S) / D
    scale = mean if normalize == "rms" else torch.ones_like(mean)
    floor = eps * mean / scale
    return torch.stack([curvature(spread, scale, floor), stiffness(e / scale[..., None], floor, stiffness_kind),
                        effective_rank(e, rank_kind)], -1)


def zscore(x):
    """Zero mean, unit variance (ddof 0) over layers, x (..., C, 3); a constant column becomes zero."""
    centred = x - x.mean(-2, keepdim=True)
    return centred / centred.square().mean(-2, keepdim=True).sqrt().clamp_min(1e-12)


def score(x, transform="linear", only=None):
    """Proxies (..., C, 3) -> score (..., C). `only` keeps one proxy, for the ablation rows."""
    terms = zscore(x.log() if transform == "log" else x) * SIGNS.to(x)       # (..., C, 3)
    return terms.sum(-1) if only is None else terms[..., only]


# --------------------------------------------------------------------------------------------------- hidden states
@dataclass
class States:
    """What is kept of the hidden states of layers 1..L-1: never all of them, never on disk."""
    mean: torch.Tensor          # (C, D)
    cov: torch.Tensor           # (C, D, D), ddof 0, of all N tokens
    pool: torch.Tensor          # (C, P, D), centred; the same P tokens at every layer
    sequence: torch.Tensor      # (P,) which sequence a pool token came from
    norm: torch.Tensor          # (C,) mean |h[l]|
    moved: torch.Tensor         # (C,) mean |h[l] - h[0]|


@torch.no_grad()
def collect(lm, windows, skip, pool, seed, batch_size):
    """One forward pass for all layers at once. windows (S, T) int64 -> States.

    Second moments are taken about the first batch's mean: a state's mean can be large beside its spread."""
    C, D, per_row = lm.L - 1, lm.D, windows.shape[1] - skip
    device = lm.norm.weight.device
    pick = torch.from_numpy(np.sort(generator(seed, "pool").choice(len(windows) * per_row, pool, replace=False)))
    shift, total = torch.zeros(C, D, device=device), torch.zeros(C, D, device=device)
    second = torch.zeros(C, D, D, device=device)
    kept = torch.empty(C, pool, D, dtype=next(lm.parameters()).dtype, device=device)
    norm, moved, seen, filled = torch.zeros(C), torch.zeros(C), 0, 0
    for ids in tqdm(windows.split(batch_size), desc="hidden states", unit="batch", leave=False, disable=None):
        h0 = h = lm.embed(ids.to(device))                                    # (B, T, D)
        side = lm.side(h)
        n = len(ids) * per_row
        here = pick[(pick >= seen) & (pick < seen + n)] - seen               # pool members in this batch
        for c in range(C):
            h = lm.block(h, c, side)                                         # (B, T, D) = h[c+1]
            X = h[:, skip:].flatten(0, 1)                                    # (B (T - skip), D)
            kept[c, filled:filled + len(here)] = X[here]
            X = X.float()
            norm[c] += X.norm(dim=-1).sum().cpu()
            moved[c] += (X - h0[:, skip:].flatten(0, 1)).norm(dim=-1).sum().cpu()
            if seen == 0:
                shift[c] = X.mean(0)
            X = X - shift[c]
            total[c] += X.sum(0)
            second[c].addmm_(X.T, X)
        seen, filled = seen + n, filled + len(here)
    if not torch.isfinite(second).all():
        bad = int((~torch.isfinite(second).flatten(1).all(1)).nonzero()[0]) + 1
        raise UserError(f"the hidden states of layer {bad} are not finite; try --dtype fp32, or another model")
    total /= seen                                                            # mean about the shift
    second /= seen
    for c in range(C):                                                       # in place: second moment -> covariance
        second[c].addr_(total[c], total[c], alpha=-1)
    mean = shift + total
    kept -= mean[:, None].to(kept.dtype)
    return States(mean, second, kept, (pick // per_row).to(device), norm / seen, moved / seen)


def resampled_spectra(X, sequence, weights):
    """Spectra (R, D) of the pool X (P, D) when whole sequences are drawn with replacement: weights (R, S) counts.

    Tokens of one sequence are dependent, so sequences are the units. With D <= P the per-sequence moments are summed
    under the weights; otherwise the P x P Gram matrix of the weighted rows, which has the same nonzero eigenvalues."""
    (P, D), (R, S) = X.shape, weights.shape
    member = torch.nn.functional.one_hot(sequence, S).to(X)                  # (P, S)
    count = weights @ member.sum(0)                                          # (R,)
    mean = weights @ (member.T @ X) / count[:, None]                         # (R, D)
    if D > P:
        spectra = X.new_zeros(R, D)
        for r in range(R):
            rows = weights[r, sequence].sqrt()[:, None] * (X - mean[r])      # (P, D)
            spectra[r, :P] = eigenvalues(rows @ rows.T / count[r])
        return spectra
    moments = torch.stack([X[sequence == s].T @ X[sequence == s] for s in range(S)])       # (S, D, D)
    cov = (weights @ moments.flatten(1)).view(R, D, D) / count[:, None, None]
    return eigenvalues(cov - mean[:, :, None] * mean[:, None, :])            # (R, D)


def memory_bytes(L, D, ffn, cfg, itemsize):
    """Bytes beside the weights: what `collect` keeps, plus the larger of one forward pass and one layer's analysis."""
    C, P, T = L - 1, cfg.pool, cfg.seq_len * cfg.batch_size
    kept = C * (4 * D * D + 8 * D + itemsize * P * D)
    forward = T * (5 * D + 3 * ffn) * itemsize + 12 * T * D                 # residual, attention, MLP; fp32 copies of h
    groups = -(-cfg.tokens // cfg.seq_len)
    spectra = (4 * D * D * (groups + 2 * cfg.resamples)) if D <= P else 4 * (2 * P * P + 2 * P * D)
    analysis = 4 * (2 * P * D + cfg.anchors * (2 * P + D) + 3 * 64 * cfg.k * D) + max(spectra, 12 * D * D)
    return kept + max(forward, analysis)


# -------------------------------------------------------------------------------------------------------- analysis
def variants(cfg):
    """name -> (settings of the proxies, (k, thin), transform, only one proxy): every constant, changed in turn."""
    base = dict(normalize=cfg.normalize, eps=cfg.eps, stiffness_kind=cfg.stiffness, rank_kind=cfg.rank)
    near = (cfg.k, 1)
    table = {"default": (base, near, cfg.transform, None)}
    for name, change in {
            "normalize raw": dict(normalize="raw"), "normalize rms": dict(normalize="rms"),
            "rank participation": dict(rank_kind="participation"),
            **{f"stiffness mean, eps {x}": dict(stiffness_kind="mean", eps=x) for x in (1e-4, 1e-3, .01, .1)}}.items():
        table[name] = ({**base, **change}, near, cfg.transform, None)
    table["transform log"] = (base, near, "log", None)
    table["raw, log"] = ({**base, "normalize": "raw"}, near, "log", None)
    for k, thin in ((max(2, cfg.k // 2), 1), (2 * cfg.k, 1), (cfg.k, 2)):
        table[f"k {k}" if thin == 1 else f"pool / {thin}"] = (base, (k, thin), cfg.transform, None)
    for i, name in enumerate(PROXIES):
        table[f"{name} only"] = (base, near, cfg.transform, i)
    return table


def analyse(states, cfg):
    """States -> the dict that becomes result.json."""
    C, P, D = states.pool.shape
    S, device = int(states.sequence.max()) + 1, states.pool.device
    anchors = torch.from_numpy(generator(cfg.seed, "anchors").choice(P, cfg.anchors, replace=False)).to(device)
    draw = generator(cfg.seed, "resamples")
    weights = torch.from_numpy(draw.multinomial(S, np.ones(S) / S, cfg.resamples)).float().to(device)       # (R, S)
    again = torch.from_numpy(draw.integers(0, cfg.anchors, (cfg.resamples, cfg.anchors)))                   # (R, A)
    nears = {near for _, near, _, _ in variants(cfg).values()}

    spectra, spreads, spectra_again = [], {near: [] for near in nears}, []
    for c in tqdm(range(C), desc="layers", leave=False, disable=None):
        X = states.pool[c].float()
        found = {thin: neighbours(X, anchors, max(k for k, t in nears if t == thin), thin) for _, thin in nears}
        for k, thin in nears:
            spreads[k, thin].append(local_spread(X, found[thin][:, :k]).cpu())
        spectra.append(eigenvalues(states.cov[c]).cpu())
        spectra_again.append(resampled_spectra(X, states.sequence, weights).cpu())
    e, spreads = torch.stack(spectra), {near: torch.stack(v) for near, v in spreads.items()}       # (C, D), (C, A)

    rows = {}                                                                # name -> score (C,)
    for name, (settings, near, transform, only) in variants(cfg).items():
        rows[name] = score(proxies(e, spreads[near], **settings), transform, only)
    point, (settings, near, *_) = rows["default"], variants(cfg)["default"]
    best = int(point.argmax())
    table = proxies(e, spreads[near], **settings)                            # (C, 3)

    # Replicates: sequences for the spectrum, anchors for curvature with the pool fixed (drawing neighbours with
    # replacement would shrink distances). A replicate's spectrum is a little more concentrated than the point's, at
    # every layer; z removes what is common, and the interval is centred on the point for the rest.
    replicas = torch.stack([proxies(spectra_again[c], spreads[near][c][again], **settings) for c in range(C)], 1)
    scores = score(replicas, cfg.transform)                                  # (R, C)
    offset = scores - scores.mean(0)
    low, high = (point + torch.quantile(offset, q, dim=0) for q in (0.025, 0.975))
    chosen = torch.bincount(scores.argmax(1), minlength=C) / cfg.resamples
    others = torch.cat([point[:best], point[best + 1:]])
    gap = scores[:, best] - torch.cat([scores[:, :best], scores[:, best + 1:]], 1).max(1).values
    low_z, high_z = (torch.quantile(replicas - replicas.mean(0), q, dim=0) + table for q in (0.025, 0.975))

    layers = np.arange(1, C + 1)
    trivial = {"-layer": -layers.astype(float), "-log mean norm": -states.norm.log().numpy(),
               "-|h[l]-h[0]|": -states.moved.numpy()}
    return {
        "layers": [{"layer": c + 1, **{p: float(table[c, i]) for i, p in enumerate(PROXIES)},
                    **{f"{p}_interval": [float(low_z[c, i]), float(high_z[c, i])] for i, p in enumerate(PROXIES)},
                    "score": float(point[c]), "score_low": float(low[c]), "score_high": float(high[c]),
                    "chosen": float(chosen[c]), "mean_norm": float(states.norm[c]), "moved": float(states.moved[c])}
                   for c in range(C)],
        "best_layer": best + 1,
        "margin": float(point[best] - others.max()),
        "margin_interval": [float(torch.quantile(gap, q)) for q in (0.025, 0.975)],
        "variants": [{"name": name, "best_layer": int(row.argmax()) + 1, "scores": row.tolist(),
                      "spearman_with_default": spearman(row, point)} for name, row in rows.items()],
        "trivial": [{"name": name, "best_layer": int(row.argmax()) + 1, "values": row.tolist(),
                     "spearman_with_score": spearman(row, point)} for name, row in trivial.items()],
        "proxy_correlation": torch.corrcoef(table.T).nan_to_num().tolist(),
        "replicates": scores.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------- report
def print_table(result):
    print("layer  curvature  stiffness  eff. rank   score     95% interval  chosen")
    for row in result["layers"]:
        mark = "  <- diffusion enters here" if row["layer"] == result["best_layer"] else ""
        print(f"{row['layer']:5d} {row['curvature']:10.4g} {row['stiffness']:10.4g} {row['effective_rank']:10.2f} "
              f"{row['score']:7.2f} [{row['score_low']:6.2f}, {row['score_high']:6.2f}] {row['chosen']:6.0%}{mark}")
    correlation = result["proxy_correlation"]
    print(f"margin over the runner-up {result['margin']:.2f} [{result['margin_interval'][0]:.2f}, "
          f"{result['margin_interval'][1]:.2f}]; correlation over layers: curvature-stiffness {correlation[0][1]:.2f}, "
          f"curvature-rank {correlation[0][2]:.2f}, stiffness-rank {correlation[1][2]:.2f}")
    print("variants (best layer, Spearman with the default): " + "; ".join(
        f"{v['name']}: {v['best_layer']}, {v['spearman_with_default']:.2f}" for v in result["variants"][1:]))
    print("trivial predictors: " + "; ".join(
        f"{v['name']}: {v['best_layer']}, {v['spearman_with_score']:.2f}" for v in result["trivial"]))


def plot(result, path):
    """Three proxies and the score over depth, intervals shaded, the chosen layer marked."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, best = result["layers"], result["best_layer"]
    x = [r["layer"] for r in rows]
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), constrained_layout=True)
    titles = ("local curvature (want high)", "global stiffness (want high)", "effective rank (want low)")
    for ax, key, title in zip(axes, PROXIES, titles):
        ax.plot(x, [r[key] for r in rows], "o-", color="#30638e", markersize=4)
        ax.fill_between(x, *zip(*(r[f"{key}_interval"] for r in rows)), color="#30638e", alpha=0.2, linewidth=0)
        ax.set_title(title, fontsize=9)
    y = np.array([r["score"] for r in rows])
    error = np.array([[r["score"] - r["score_low"], r["score_high"] - r["score"]] for r in rows]).T
    axes[3].errorbar(x, y, yerr=error.clip(0), fmt="o-", color="#222222", markersize=4, capsize=3)
    axes[3].plot(best, y[best - 1], "o", color="#d1495b", markersize=9)
    axes[3].set_title(f"score: layer {best} is chosen", fontsize=9)
    for ax in axes:
        ax.axvline(best, color="#d1495b", linewidth=1, linestyle=":")
        ax.set_xlabel("layer", fontsize=9)
        ax.set_xticks(x if len(x) <= 16 else x[::4])
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    world = setup(cfg.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would scramble the distances of near neighbours
    dtype = pick_dtype(cfg, world.device)

    # -------------------------------------------------------------------------------------------------- setup
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print_table(result)
        return result
    shape = backbone.read_config(model, cfg.seq_len)
    L, D = shape.num_hidden_layers, shape.hidden_size
    ffn = getattr(shape, "intermediate_size", None) or 4 * D
    if L < 3:
        raise UserError(f"{model} has {L} blocks; choosing a layer among 1..L-1 needs at least 3")
    windows_needed = -(-cfg.tokens // max(1, cfg.seq_len - cfg.skip))
    if cfg.skip < 0 or cfg.skip >= cfg.seq_len:
        raise UserError(f"--skip {cfg.skip} must lie in 0..{cfg.seq_len - 1} (--seq_len {cfg.seq_len})")
    if not 2 <= cfg.k or 4 * cfg.k > cfg.pool or cfg.anchors > cfg.pool or cfg.pool > cfg.tokens:
        raise UserError(f"--k {cfg.k} (2 to a quarter of the pool), --anchors {cfg.anchors} and --tokens "
                        f"{cfg.tokens} do not fit a --pool of {cfg.pool}: tokens >= pool >= anchors is needed")
    if cfg.eps <= 0 or cfg.resamples < 2:
        raise UserError("--eps must be positive and --resamples at least 2")
    gigabytes = memory_bytes(L, D, ffn, cfg, dtype.itemsize) / 1e9
    if cfg.dry_run:
        print(f"{model}: {L} blocks of width {D}; {windows_needed} sequences of {cfg.seq_len} tokens\n"
              f"memory beside the weights {gigabytes:.2f} GB, {2 * L * (4 * D * D + 3 * D * ffn):.2e} FLOPs a token")
        return gigabytes

    # ----------------------------------------------------------------------------------------- collect, analyse
    lm = backbone.load(model, world.device, dtype, random_init=cfg.random_init)
    shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
    windows = data.Tokens(shards, "val", cfg.seq_len).windows(windows_needed, cfg.seed)[:, :-1]              # (S, T)
    tokens = len(windows) * (cfg.seq_len - cfg.skip)
    if tokens < 4 * cfg.k:
        raise UserError(f"held-out text gives only {tokens} tokens, fewer than 4 --k = {4 * cfg.k}; use more text")
    run = Run(cfg, world, identity)
    if tokens < cfg.pool:
        print(f"note: held-out text gives only {tokens} tokens, so the pool is {tokens} instead of {cfg.pool}")
        cfg.pool, cfg.anchors = tokens, min(cfg.anchors, tokens)
    start = time.perf_counter()
    states = collect(lm, windows, cfg.skip, cfg.pool, cfg.seed, cfg.batch_size)
    collected = time.perf_counter()
    result = {**analyse(states, cfg), "tokens": tokens, "pool": cfg.pool, "sequences": len(windows),
              "model": model, **identity}
    plot(result, run.out / "geometry.png")
    result |= {"seconds": time.perf_counter() - start, "seconds_collect": collected - start}
    print_table(result)
    run.finish(result)
    print(f"chose layer {result['best_layer']} of {L} from {result['tokens']} states a layer in "
          f"{result['seconds']:.1f} s, {result['seconds_collect']:.1f} s of it forward; see {run.out}/geometry.png")
    return result


if __name__ == "__main__":
    main()
