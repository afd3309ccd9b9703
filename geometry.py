"""geometry.py: LOCATE. Score every layer of a causal LM by how friendly its hidden states are to diffusion.

    python geometry.py                                           # the toy beside --out: ~10 s on 2 cores
    python geometry.py --model Qwen/Qwen3-0.6B --preset 0.6b     # one consumer GPU, ~2 min
    python geometry.py --model meta-llama/Llama-3.1-8B --preset 8b --dry_run     # memory before the download

Prints one row a layer and chooses the layer with the highest

    score = z(local curvature) + z(global stiffness) - z(effective rank),    z over the candidate layers 1..L-1

The three quantities, their signs and the z-scored sum are the published recipe (DiHAL, arXiv 2605.14368); every
constant is ours, so every one is a flag, and the variants show what changes when it changes. A new proxy is a function
and a line of PROXIES. Writes geometry.png, section.md and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, N tokens kept, P pool, A anchors, R resamples, C candidate layers,
K proxies.
"""
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from core import backbone, report
from core.common import UserError, entry, parse, pick_dtype, setup
from core.conditional import left
from core.draws import generator
from core.run import Run, finished, read_section
from core.states import collect, cost, eigenvalues, local_spread, neighbours, resampled_spectra
from core.stats import spearman


# ----------------------------------------------------------------------------------------------------- the proxies
class Measured(NamedTuple):
    """What a proxy may look at: one layer, or many layers or resamples at once (leading axes ...)."""
    e: torch.Tensor             # (..., D) eigenvalues of the states' covariance S, largest first
    spread: torch.Tensor        # (..., A) largest eigenvalue of the covariance of each anchor's k nearest neighbours
    distance: torch.Tensor      # (..., A, k) from each anchor to them, nearest first
    scale: torch.Tensor         # (...) what e and spread are divided by: tr(S) / D, or 1 under "raw"
    eps: torch.Tensor           # (...) the regulariser, in the units after that division
    cfg: Any                    # the flags


def curvature(m):
    """Median over anchors of 1 / (spread + eps): the strong-convexity constant of -log p near a typical point."""
    return (1 / (m.spread / m.scale[..., None] + m.eps[..., None])).median(-1).values


def stiffness(m):
    """min: 1 / (e_1 + eps) = lambda_min((S + eps I)^-1), the strong-monotonicity constant of the Gaussian fit;
    mean: tr((S + eps I)^-1) / D, another reading of the same word."""
    precision = 1 / (m.e / m.scale[..., None] + m.eps[..., None])            # (..., D)
    return precision[..., 0] if m.cfg.stiffness == "min" else precision.mean(-1)


def effective_rank(m):
    """exp of the entropy of e / sum e (Roy & Vetterli 2007), or the participation ratio."""
    p = m.e / m.e.sum(-1, keepdim=True).clamp_min(1e-30)
    if m.cfg.rank == "participation":
        return 1 / p.square().sum(-1).clamp_min(1e-30)
    return torch.exp(torch.special.entr(p).sum(-1))


# name -> (sign in the score, function of a Measured whose values (...) are positive). Sign 0: shown, and scored alone
# among the variants, but no part of the score. Table, figure, intervals, correlation and variants take what is here.
PROXIES = {"curvature": (1, curvature), "stiffness": (1, stiffness), "effective_rank": (-1, effective_rank)}


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m", "0.6b", "8b"] = "auto"  # auto: by the model's size
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
    skip: int = 4               # first positions of each sequence left out: attention sinks (0: none)
    pool: int = 16384           # P: states kept for neighbours and resampling
    anchors: int = 1024         # A: points at which curvature is measured
    k: int = 32                 # neighbours of an anchor
    thin: int = 1               # only every so many-th state of the pool may be a neighbour
    same_token: bool = True     # neighbours may be other occurrences of the anchor's token
    eps: float = 1e-3           # regulariser, as a share of the mean eigenvalue
    normalize: Literal["rms", "raw", "dim"] = "rms"  # rms: unit RMS a layer; dim: unit variance a dimension
    transform: Literal["linear", "log"] = "linear"  # of the proxies before z
    stiffness: Literal["min", "mean"] = "min"  # lambda_min((S + eps I)^-1), or its mean eigenvalue
    rank: Literal["entropy", "participation"] = "entropy"  # exp(entropy of spectrum), or (sum e)^2 / sum e^2
    score_by: Literal[("all", *PROXIES)] = "all"  # all: the signed sum; or one proxy alone
    resamples: int = 200        # R: bootstrap replicates of sequences and anchors
    exact_resamples: bool = False  # an eigendecomposition for each, not first-order perturbation of the spectrum
    dry_run: bool = False       # print memory and cost, then leave


PRESETS = {"tiny": dict(tokens=512, seq_len=32, batch_size=4, pool=256, anchors=64, k=8, resamples=20),
           "135m": dict(pool=8192, anchors=512, resamples=100),
           "0.6b": dict(tokens=32768, seq_len=1024, batch_size=8, pool=4096, resamples=100),
           "8b": dict(tokens=32768, seq_len=1024, batch_size=4, pool=2048, resamples=50)}


def variants(cfg):
    """name -> Config: every constant in turn. A row is the flags that it changes; one that changes none is left out."""
    changes = {
        **{f"normalize {x}": dict(normalize=x) for x in ("raw", "rms", "dim")},
        "no same-token neighbours": dict(same_token=False),
        "rank participation": dict(rank="participation"),
        **{f"stiffness mean, eps {x}": dict(stiffness="mean", eps=x) for x in (1e-4, 1e-3, .01, .1)},
        "transform log": dict(transform="log"),
        "raw, log": dict(normalize="raw", transform="log"),
        **{f"k {k}": dict(k=k) for k in (max(2, cfg.k // 2), 2 * cfg.k)},
        "pool / 2": dict(thin=2 * cfg.thin),
        **{f"{name} only": dict(score_by=name) for name in PROXIES}}
    table = {name: replace(cfg, **change) for name, change in changes.items()}
    return {"default": cfg, **{name: other for name, other in table.items() if other != cfg}}


# ------------------------------------------------------------------------------------------- from states to a score
def proxies(e, spread, distance, cfg):
    """All proxies (..., K) of a spectrum e (..., D), spreads (..., A) and distances (..., A, k).

    States divided by their RMS have tr(S) / D = 1, so that no layer wins by scale alone; raw ones are not divided. eps
    is set here and nowhere else, as a share of the mean eigenvalue; curvature and stiffness both use it, so that
    neither is infinite where states do not vary, and the effective rank needs none."""
    mean = e.mean(-1).clamp_min(1e-30)                                       # tr(S) / D
    scale = torch.ones_like(mean) if cfg.normalize == "raw" else mean
    m = Measured(e, spread, distance, scale, cfg.eps * mean / scale, cfg)
    return torch.stack([function(m) for _, function in PROXIES.values()], -1)


def terms(x, cfg):
    """Proxies x (..., C, K) -> name -> signed z (..., C) of those that are summed.

    z, over layers, makes them comparable: each counts by how many standard deviations (ddof 0) a layer stands from the
    mean; a constant one is zero. No z can pass sqrt(C - 1): a layer that stands alone has that, however far it is."""
    x = x.log() if cfg.transform == "log" else x
    centred = x - x.mean(-2, keepdim=True)
    z = centred / centred.square().mean(-2, keepdim=True).sqrt().clamp_min(1e-12)
    return {name: (sign or 1) * z[..., i] for i, (name, (sign, _)) in enumerate(PROXIES.items())
            if name == cfg.score_by or (sign and cfg.score_by == "all")}


def score(x, cfg):
    """Proxies (..., C, K) -> score (..., C): the sum of the signed z."""
    return torch.stack(list(terms(x, cfg).values()), -1).sum(-1)


# -------------------------------------------------------------------------------------------------------- analysis
def held_out(cfg, shards):
    """Whole sequences (S, T + 1) that hold cfg.tokens states."""
    return data.Tokens(shards, "val", cfg.seq_len).windows(-(-cfg.tokens // (cfg.seq_len - cfg.skip)), cfg.seed)


def measure(states, c, anchors, places):
    """place -> [spectrum (D,), spreads (A,), distances (A, k), share of neighbours with the anchor's token], candidate
    c. What costs most is done once: a space's distances for all its places, their sorting for the largest k."""
    found, same = {}, states.token[anchors][:, None] == states.token         # (A, P)
    for space in sorted({dim for dim, *_ in places}):
        (X, S), nearest = states.space(c, space), {}
        e, distance = eigenvalues(S), torch.cdist(X[anchors], X)             # (D,), (A, P)
        distance[torch.arange(len(anchors)), anchors] = torch.inf
        for dim, k, thin, same_token in sorted(places, key=lambda place: -place[1]):
            if dim == space:
                if (thin, same_token) not in nearest:
                    nearest[thin, same_token] = neighbours(distance, k, thin, None if same_token else same)
                near, far = (whole[:, :k] for whole in nearest[thin, same_token])                           # (A, k)
                values = e, local_spread(X, near), far, same.gather(1, near).float().mean()
                found[dim, k, thin, same_token] = [v.cpu() for v in values]
    return found


def score_all(states, cfg, table):
    """(name -> score (C,) of each Config of `table`; what the proxies of its first one look at, (C, ...) each)."""
    C, P, _ = states.pool.shape
    anchors = torch.from_numpy(generator(cfg.seed, "anchors").choice(P, cfg.anchors, replace=False))
    places = {name: (v.normalize == "dim", v.k, v.thin, v.same_token) for name, v in table.items()}  # to measure anew
    found = [measure(states, c, anchors.to(states.pool.device), set(places.values()))
             for c in tqdm(range(C), desc="layers", leave=False, disable=None)]
    found = {p: [torch.stack(part) for part in zip(*(layer[p] for layer in found))] for p in found[0]}      # (C, ...)
    rows = {name: score(proxies(*found[places[name]][:3], v), v) for name, v in table.items()}              # (C,)
    return rows, found[places[next(iter(table))]]


def residual(lm, known, windows, cfg):
    """name -> (C,): the published proxies of what a ridge leaves of the states, compared over the layers that `known`
    has; raw: how much it leaves counts too."""
    how, raw = (cfg.skip, cfg.pool, cfg.seed, cfg.batch_size), replace(cfg, normalize="raw")
    states = collect(lm, windows, *how, lambda layer, h, h0: left(known[layer], h, h0), sorted(known))
    return score_all(states, cfg, {"score of the residual": cfg, "score of the residual, raw": raw, **{
        f"{name} of the residual": replace(raw, score_by=name) for name in PROXIES}})[0]


def resample(states, e, spread, distance, cfg):
    """Proxies (R, C, K) of bootstrap replicates: sequences for the spectrum, anchors for the neighbours, with the pool
    fixed (drawing neighbours with replacement would shrink distances). e (C, D), spread (C, A), distance (C, A, k)."""
    S, draw = int(states.sequence.max()) + 1, generator(cfg.seed, "resamples")
    weights = torch.from_numpy(draw.multinomial(S, np.ones(S) / S, cfg.resamples)).float().to(states.pool.device)
    again = torch.from_numpy(draw.integers(0, cfg.anchors, (cfg.resamples, cfg.anchors)))                   # (R, A)
    replicas = []
    for c in tqdm(range(len(e)), desc="resamples", leave=False, disable=None):
        X, _ = states.space(c, cfg.normalize == "dim")
        spectra = resampled_spectra(X, states.sequence, weights, cfg.exact_resamples).cpu()                 # (R, D)
        replicas.append(proxies(spectra, spread[c][again], distance[c][again], cfg))                        # (R, K)
    return torch.stack(replicas, 1)


def interval(point, replicas):
    """95% interval (C, ..., 2) of point (C, ...) by replicas (R, C, ...), centred on the point: a replicate's spectrum
    is a little more concentrated than the point's at every layer; z removes what is common, and this the rest."""
    offset = replicas - replicas.mean(0)
    return torch.stack([point + torch.quantile(offset, q, dim=0) for q in (0.025, 0.975)], -1)


def analyse(states, cfg):
    """States -> the dict that becomes result.json."""
    C, (rows, (*here, shared)) = len(states.pool), score_all(states, cfg, variants(cfg))
    x, replicas = proxies(*here, cfg), resample(states, *here, cfg)          # (C, K), (R, C, K)
    point, scores = rows["default"], score(replicas, cfg)                    # (C,), (R, C)
    best, others = int(point.argmax()), [c for c in range(C) if c != int(point.argmax())]
    gap = scores[:, best] - scores[:, others].max(1).values                  # (R,)
    linear, log = (replace(cfg, transform=kind) for kind in ("linear", "log"))
    by_log, z, z_log = score(x, log), terms(x, linear), terms(x, log)
    most = max(z, key=lambda name: z[name][best])                            # the proxy that says most for the winner
    columns = {"layer": range(1, C + 1), "score": point.tolist(), "chosen": (torch.bincount(
        scores.argmax(1), minlength=C) / cfg.resamples).tolist(), "same_token": shared.tolist()}
    columns["score_low"], columns["score_high"] = interval(point, scores).T.tolist()
    for name, column, band in zip(PROXIES, x.T, interval(x, replicas).movedim(1, 0), strict=True):
        columns[name], columns[f"{name}_interval"] = column.tolist(), band.tolist()
    for name, row in (("rank", point), ("rank_log", by_log)):
        columns[name] = (1 + (-row).argsort().argsort()).tolist()
    trivial = {"-layer": -torch.arange(1.0, C + 1), "-log mean norm": -states.norm.log(), "-|h[l]-h[0]|": -states.moved}
    return {
        "layers": [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)],
        "best_layer": best + 1, "margin": float(point[best] - point[others].max()),
        "margin_interval": torch.quantile(gap, torch.tensor([0.025, 0.975])).tolist(),
        "best_layer_log": int(by_log.argmax()) + 1, "margin_log": float(-by_log.topk(2).values.diff()),
        "saturation": {"proxy": most, "z": float(z[most][best]), "z_log": float(z_log[most][best]),
                       "limit": (C - 1) ** 0.5},
        "variants": [{"name": name, "best_layer": int(row.argmax()) + 1, "scores": row.tolist(),
                      "spearman_with_default": spearman(row, point)} for name, row in rows.items()],
        "trivial": [{"name": name, "best_layer": int(row.argmax()) + 1, "values": row.tolist(),
                     "spearman_with_score": spearman(row, point)} for name, row in trivial.items()],
        "signs": {name: sign for name, (sign, _) in PROXIES.items()},
        "proxy_correlation": torch.corrcoef(x.T).nan_to_num().tolist(),
        "replicates": scores.tolist(), "flags": asdict(cfg)}


# ---------------------------------------------------------------------------------------------------------- report
def section(result):
    """Its section of the report, from the stored result alone: whatever proxies and variants that holds."""
    best, flags, names, peak = result["best_layer"], result["flags"], list(result["signs"]), result["saturation"]
    agree = [v["best_layer"] for v in result["variants"]].count(best)
    share, (low, high) = peak["z"] / peak["limit"], result["margin_interval"]
    layers = [[f"**{r['layer']}**" if r["layer"] == best else r["layer"], *(f"{r[name]:.4g}" for name in names),
               f"{r['score']:.2f}", f"[{r['score_low']:.2f}, {r['score_high']:.2f}]", r["rank"], r["rank_log"],
               f"{r['chosen']:.0%}", f"{r['same_token']:.0%}"] for r in result["layers"]]
    pairs = [f"{a} and {b} {result['proxy_correlation'][i][j]:.2f}" for i, a in enumerate(names)
             for j, b in enumerate(names) if i < j]
    chooses = [(v["name"], v["best_layer"], v["spearman_with_default"]) for v in result["variants"]]
    chooses += [(f"trivial: {t['name']}", t["best_layer"], t["spearman_with_score"]) for t in result["trivial"]]
    return "\n\n".join([
        "## LOCATE",
        f"{result['tokens']} states a layer from {result['sequences']} held-out sequences of {flags['seq_len']} tokens "
        f"(the first {flags['skip']} left out); {flags['anchors']} anchors with {flags['k']} neighbours in a pool of "
        f"{flags['pool']}; normalize {flags['normalize']}, transform {flags['transform']}; seed {flags['seed']}, "
        f"{flags['resamples']} resamples.",
        report.table(["layer", *names, "score", "95% interval", "rank", "rank by log", "chosen in resamples",
                      "neighbours of the same token"], layers),
        f"Layer {best} is chosen, {result['margin']:.2f} [{low:.2f}, {high:.2f}] above the runner-up; by log layer "
        f"{result['best_layer_log']}, {result['margin_log']:.2f} above.",
        f"z of layer {best}'s {peak['proxy']} is {peak['z']:.3f} of at most sqrt(C - 1) = {peak['limit']:.3f} over C = "
        f"{len(layers)} layers ({share:.1%}; {peak['z_log']:.3f} by log)" + (
            ": saturated, so the linear margin would hardly grow however far it stood out." if share > 0.95 else "."),
        f"Correlation over layers: {', '.join(pairs)}.",
        f"{agree} of {len(result['variants'])} variants choose layer {best}.",
        report.table(["what chooses", "layer", "Spearman with the score"], [
            [name.replace("|", "\\|"), layer, f"{rho:.2f}"] for name, layer, rho in chooses]),
        "![proxies and score over depth](geometry.png)"]) + "\n"


def plot(result, path):
    """Proxies and the score over depth, intervals shaded, the chosen layer marked."""
    rows, best, wish = result["layers"], result["best_layer"], {1: "want high", -1: "want low", 0: "not in the score"}
    x, names = [r["layer"] for r in rows], list(result["signs"])
    with report.figure(path, columns=len(names) + 1, width=2.75, height=2.8) as axes:
        for ax, name in zip(axes[0], [*names, "score"]):
            color, mine = report.BLACK if name == "score" else report.BLUE, [r[name] for r in rows]
            band = [r.get(f"{name}_interval") or (r["score_low"], r["score_high"]) for r in rows]
            ax.plot(x, mine, "o-", color=color, markersize=4)
            ax.fill_between(x, *zip(*band), color=color, alpha=0.2, linewidth=0)
            ax.plot(best, mine[best - 1], "o", color=report.RED, markersize=8)
            what = f"layer {best} is chosen" if name == "score" else wish[result["signs"][name]]
            ax.set(title=f"{name.replace('_', ' ')}: {what}", xlabel="layer", xticks=x if len(x) <= 16 else x[::4])


def check(cfg, model, L):
    """Raise UserError for flags that cannot work together."""
    if L < 3:
        raise UserError(f"{model} has {L} blocks; choosing a layer among 1..L-1 needs at least 3")
    if cfg.skip < 0 or cfg.skip >= cfg.seq_len:
        raise UserError(f"--skip {cfg.skip} must lie in 0..{cfg.seq_len - 1} (--seq_len {cfg.seq_len})")
    if not 2 <= cfg.k or 4 * cfg.k * cfg.thin > cfg.pool or cfg.anchors > cfg.pool or cfg.pool > cfg.tokens:
        raise UserError(f"--k {cfg.k} (2 to a quarter of the pool over --thin), --anchors {cfg.anchors} and --tokens "
                        f"{cfg.tokens} do not fit a --pool of {cfg.pool}: tokens >= pool >= anchors is needed")
    if cfg.eps <= 0 or cfg.resamples < 2:
        raise UserError("--eps must be positive and --resamples at least 2")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of(cfg.model, cfg.out))
    world = setup(cfg.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would scramble the distances of near neighbours
    dtype = pick_dtype(cfg, world.device)
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(read_section(cfg.out))
        return result

    # 1. Flags that cannot work are refused, and --dry_run leaves, before anything is loaded or written.
    shape = backbone.read_config(model, cfg.seq_len)
    L = shape.num_hidden_layers
    check(cfg, model, L)
    if cfg.dry_run:
        (memory, flops), sequences = cost(shape, cfg, dtype.itemsize), -(-cfg.tokens // (cfg.seq_len - cfg.skip))
        print(f"{model}: {L} blocks of width {shape.hidden_size}; {sequences} sequences of {cfg.seq_len} tokens\n"
              f"memory beside the weights {memory / 1e9:.2f} GB, {flops:.2e} FLOPs a token")
        return memory / 1e9

    # 2. Held-out text, whole sequences
    lm = backbone.load(model, world.device, dtype, random_init=cfg.random_init)
    shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
    rows = held_out(cfg, shards).to(world.device)                                                       # (S, T + 1)
    tokens = len(rows) * (cfg.seq_len - cfg.skip)
    if tokens < 4 * cfg.k * cfg.thin:
        raise UserError(f"held-out text gives only {tokens} tokens, fewer than 4 --k --thin = {4 * cfg.k * cfg.thin}; "
                        "use more text")
    run = Run(cfg, world, identity)
    if tokens < cfg.pool:
        print(f"note: held-out text gives only {tokens} tokens, so the pool is {tokens} instead of {cfg.pool}")
        cfg.pool, cfg.anchors = tokens, min(cfg.anchors, tokens)

    # 3. One forward pass for all layers; then layer by layer
    start = time.perf_counter()
    states = collect(lm, rows[:, :-1], cfg.skip, cfg.pool, cfg.seed, cfg.batch_size)
    collected = time.perf_counter()
    result = {**analyse(states, cfg), "tokens": tokens, "sequences": len(rows), "model": model, **identity}
    plot(result, run.out / "geometry.png")
    result |= {"seconds": time.perf_counter() - start, "seconds_collect": collected - start, "headline": [[
        "layer where diffusion enters", f"{result['best_layer']} of {L - 1}, margin {result['margin']:.2f} "
        f"({result['margin_log']:.2f} by log)"]]}
    result["findings"] = [line for line in section(result).split("\n\n") if line.startswith(("Layer ", "z of "))]
    run.finish(result, section(result))
    print(section(result) + f"\nchose layer {result['best_layer']} of {L} in {result['seconds']:.1f} s, "
          f"{result['seconds_collect']:.1f} s of it forward; see {run.out}/geometry.png")
    return result


if __name__ == "__main__":
    main()
