"""SWEEP: does the score of geometry.py foretell which layer a bridge can replace?

    python -m studies.sweep                             # the toy: 42 bridges, 25 minutes on 2 cores
    python -m studies.sweep --layers 1 4 7 --seeds 1 --steps 100 --out out/look
    python -m studies.sweep --model out/smollm2 --layers 1 5 12 20 --seeds 2 --out out/smollm2/sweep

At every layer the same network sees the same text for the same number of steps. Each bridge is an
ordinary run of bridge.py in --out/lLAYER_OBJECTIVE_sSEED, so an interrupted sweep resumes. The
predictors are the score, its variants, each proxy alone, and rivals without geometry: depth, norm
and distance from h[0]. A predictor is good if it orders the layers as -KL and -FVU of the trained
bridges do. The floor of every row is a table of mean states, one a token.

Writes result.json and sweep.png.

Shapes: C swept layers, N sequences, T tokens.
"""
from dataclasses import dataclass
from itertools import product
from statistics import mean

import numpy as np
import torch

import bridge
import data
import geometry
from core import backbone, report
from core.common import UserError, entry, parse, setup
from core.diffusion import Bridge, BridgeConfig
from core.run import Run, finished


@dataclass
class Config:
    # what and where
    preset: str = "auto"        # of geometry.py and bridge.py
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/sweep"      # run folder; the bridges' folders are inside
    layers: tuple[int, ...] = ()  # layers to replace (none: 1 to L - 1)
    seeds: int = 3              # training seeds of every bridge
    seed: int = 0               # the first one
    # every bridge
    depth: int = 2              # transformer blocks
    steps: int = 300            # optimizer steps
    batch_size: int = 8         # sequences a step
    eval_batches: int = 512     # held-out sequences


OBJECTIVES = ("diffusion", "regression")
ERRORS = ("kl", "fvu", "ce_gap")    # of a bridge; low is good
TABLE_TOKENS = 2 ** 17              # training text from which token means are counted


# -------------------------------------------------------------------------------------------------
# The bridges

def flags(cfg, model, out, names):
    """The words of another stage's command line: the flags `names` as they are here."""
    words = ["--model", model, "--out", f"{cfg.out}/{out}"]
    for name in names.split():
        words += [f"--{name}", str(getattr(cfg, name))]
    return words


def train(cfg, model, layers):
    """{(layer, objective): results of bridge.py, one a seed}."""
    results = {(layer, objective): [] for layer, objective in product(layers, OBJECTIVES)}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for layer, objective in results:
            words = flags(cfg, model, f"l{layer}_{objective}_s{seed}",
                          "preset data depth steps batch_size eval_batches")
            words += ["--layer", str(layer), "--objective", objective, "--seed", str(seed)]
            results[layer, objective].append(bridge.main(words))
    return results


def errors_of(results):
    """{error: numbers, one a seed}, of results of bridge.py."""
    errors = {name: [] for name in ERRORS}
    for result in results:
        measured = result["nfe"][str(result["nfe_default"])]
        for name in ERRORS:
            errors[name].append(measured[name])
    return errors


def token_means(lm, layer, ids, held_out):
    """The errors of a table that knows the mean state of every token, counted on ids (N, T).

    It is a bridge without blocks whose linear map copies the token's mean."""
    table = Bridge(BridgeConfig(D=lm.D, W=32, depth=0, H=1, V=lm.V, objective="regression",
                                head_start="tokens"))
    table.to(ids.device).requires_grad_(False)
    cfg = bridge.Config()
    bridge.set_units(lm, table, layer, ids, cfg.skip)
    table.ridge.zero_()
    table.ridge[:, lm.D:].fill_diagonal_(1.0)
    measured = bridge.measure(lm, table, layer, held_out, 1, cfg)
    return {name: [measured[name]] for name in ERRORS}


# -------------------------------------------------------------------------------------------------
# Statistics

def predictors(located):
    """name -> a value for every layer 1..L-1, from the result of geometry.py. High is good."""
    values = {}
    for variant in located["variants"]:
        name = variant["name"]
        values["score" if name == "default" else f"score, {name}"] = variant["scores"]
    for rival in located["trivial"]:
        values[rival["name"]] = rival["values"]
    return values


def correlation(values, depth, errors):
    """How well a predictor's values (C,) order the layers by minus the errors (C, seeds).

    rho, p: against the mean over seeds. minus_depth: rho minus that of the predictor `depth` (C,).
    Each has half the width of its 95% interval over seeds (None: one seed)."""
    by_seed = [report.spearman(values, goal) for goal in -np.array(errors).T]
    by_depth = [report.spearman(depth, goal) for goal in -np.array(errors).T]
    gap = report.paired(by_seed, by_depth)
    goal = -np.mean(errors, 1)                                                  # (C,)
    rho = report.spearman(values, goal)
    one_seed = len(by_seed) == 1
    return {"rho": rho, "p": report.permutation_p(values, goal), "by_seed": by_seed,
            "half": None if one_seed else report.paired(by_seed, [0] * len(by_seed)).half,
            "minus_depth": rho - report.spearman(depth, goal),
            "minus_depth_half": None if one_seed else gap.half}


# -------------------------------------------------------------------------------------------------
# Table, figure, main

def with_half(value, half):
    return f"{value:+.2f}" if half is None else f"{value:+.2f} +- {half:.2f}"


def show(result):
    kinds = [*OBJECTIVES, "token means"]
    cells = []
    for row in result["layers"]:
        kl = [report.plus_minus(row[kind]["kl"], ".4f") for kind in kinds]
        fvu = [report.plus_minus(row[kind]["fvu"], ".4f") for kind in kinds]
        cells.append([row["layer"], f"{row['score']:+.2f}", *kl, *fvu])
    columns = [f"KL, {kind}" for kind in kinds] + [f"FVU, {kind}" for kind in kinds]
    print(report.table(["layer", "score", *columns], cells))
    cells = []
    for row in result["correlations"]:
        if row["objective"] == "diffusion":
            cells.append([row["predictor"], f"-{row['error']}", with_half(row["rho"], row["half"]),
                          f"{row['p']:.4f}",
                          with_half(row["minus_depth"], row["minus_depth_half"])])
    print(report.table(["predictor", "orders layers by", "rho", "p", "rho minus depth's"], cells))


def plot(result, path):
    """KL against layer. A red line marks the layer that the score chooses."""
    rows = result["layers"]
    layers = [row["layer"] for row in rows]
    styles = {"diffusion": (report.BLUE, "o-"), "regression": (report.GREY, "o-"),
              "token means": (report.GREY, "o--")}
    with report.figure(path, width=5) as axes:
        ax = axes[0, 0]
        for kind, (color, style) in styles.items():
            kl = [row[kind]["kl"] for row in rows]
            ax.plot(layers, [mean(values) for values in kl], style, color=color, label=kind)
            ax.fill_between(layers, [min(values) for values in kl], [max(values) for values in kl],
                            color=color, alpha=0.2)
        ax.axvline(result["best_layer"], color=report.RED, label="chosen by the score")
        ax.set(xlabel="layer", ylabel="KL in nats (lower is better)", yscale="log", xticks=layers)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    world = setup()
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model)}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result
    candidates = list(range(1, backbone.read_config(model).num_hidden_layers))
    layers = list(cfg.layers) or candidates
    if not set(layers) <= set(candidates) or len(set(layers)) < len(layers):
        raise UserError(f"--layers must be different numbers from 1 to {candidates[-1]}")
    run = Run(cfg, world, identity)

    # 1. Predictions and bridges
    located = geometry.main(flags(cfg, model, "geometry", "preset data"))
    results = train(cfg, model, layers)

    # 2. The table of token means
    T = results[layers[0], "diffusion"][0]["seq_len"]
    shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
    ids = data.Tokens(shards, "train", T).windows(TABLE_TOKENS // T)[:, :-1].to(world.device)
    held_out = data.Tokens(shards, "val", T).windows(cfg.eval_batches).to(world.device)
    lm = backbone.load(model, world.device, torch.float32)
    rows = []
    for layer in layers:
        rows.append({"layer": layer, "score": located["variants"][0]["scores"][layer - 1],
                     "diffusion": errors_of(results[layer, "diffusion"]),
                     "regression": errors_of(results[layer, "regression"]),
                     "token means": token_means(lm, layer, ids, held_out)})

    # 3. Who foretells the order of the layers?
    values = {}                                         # predictor -> one value a swept layer
    for name, column in predictors(located).items():
        values[name] = [column[layer - 1] for layer in layers]
    entries = []
    for objective, error, name in product(OBJECTIVES, ("kl", "fvu"), values):
        errors = [row[objective][error] for row in rows]
        entries.append({"predictor": name, "objective": objective, "error": error,
                        **correlation(values[name], values["-layer"], errors)})
    result = {**identity, "layers": rows, "correlations": entries,
              "best_layer": located["best_layer"], "seeds": cfg.seeds, "steps": cfg.steps}
    plot(result, run.out / "sweep.png")
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
