"""SWEEP: does the score of geometry.py foretell which layer a bridge can replace?

    python -m studies.sweep                             # the toy: 42 bridges, 25 minutes on 2 cores
    python -m studies.sweep --layers 1 4 7 --seeds 1 --steps 100 --out out/look
    python -m studies.sweep --model HuggingFaceTB/SmolLM2-135M --seeds 1 --out out/smollm2/sweep

At every layer the same network sees the same text for the same number of steps. A bridge is an
ordinary run of bridge.py in --out/lLAYER_OBJECTIVE_sSEED, so an interrupted sweep resumes. The
predictors are the score, its variants, single proxies, and rivals without geometry: depth, norm and
distance from h[0]. A predictor is good if it orders the layers as -KL and -FVU of the trained
bridges do. The floor of every layer is a table of mean states, one a token.

Writes result.json and sweep.png.

Shapes: C swept layers, N sequences, T tokens.
"""
import math
from dataclasses import dataclass
from itertools import product

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
    # model, text, output
    preset: backbone.Preset = "auto"  # of the runs inside
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/sweep"      # run folder; the bridges' folders are inside
    layers: tuple[int, ...] = ()  # layers to replace (none: 1 to L - 1)
    seeds: int = 3              # training seeds of every bridge: 0, 1, ...
    # every bridge
    depth: int = 2              # transformer blocks
    steps: int = 300            # optimizer steps


BATCH_SIZE = 8                      # sequences a step of a bridge
OBJECTIVES = ("diffusion", "regression")
TABLE = "token means"               # the floor
ERRORS = ("kl", "fvu")              # of a bridge; low is good
SEQ_LEN = 128                       # tokens a sequence of the table's text
TABLE_TEXT = 1024                   # sequences from which token means are counted


# -------------------------------------------------------------------------------------------------
# The bridges

def flags(cfg, model, out):
    """The flags of geometry.py and of bridge.py."""
    return ["--preset", cfg.preset, "--model", model, "--data", cfg.data, "--out", out]


def train(cfg, model, layer, objective):
    """{error: numbers, one a seed} of bridges that bridge.py trains."""
    errors = {name: [] for name in ERRORS}
    for seed in range(cfg.seeds):
        words = flags(cfg, model, f"{cfg.out}/l{layer}_{objective}_s{seed}")
        words += f"--layer {layer} --objective {objective} --seed {seed}".split()
        words += f"--depth {cfg.depth} --steps {cfg.steps} --batch_size {BATCH_SIZE}".split()
        result = bridge.main(words)
        measured = result["nfe"][str(result["nfe_default"])]
        for name in ERRORS:
            errors[name].append(measured[name])
    return errors


def token_means(lm, layer, ids, held_out):
    """The errors of a table that knows the mean state of every token, counted on half of ids
    (N, T).

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

def predictors(located, layers):
    """{name: a value for every layer of `layers`} from the result of geometry.py. High is good.

    "default" is the score."""
    values = {}
    for choice in located["variants"] + located["trivial"]:
        values[choice["name"]] = [choice["scores"][layer - 1] for layer in layers]
    return values


def correlation(values, depth, errors):
    """Rank correlation of a predictor's values (C,) with minus the errors (C, seeds).

    rho, p: of the mean over seeds. minus_depth: rho of a seed minus that of the predictor `depth`
    (C,), the mean over seeds. half: half the width of its 95% interval (None: one seed)."""
    by_seed = [report.spearman(values, goal) for goal in -np.array(errors).T]
    by_depth = [report.spearman(depth, goal) for goal in -np.array(errors).T]
    gap = report.paired(by_seed, by_depth)
    goal = -np.mean(errors, 1)                                                  # (C,)
    rho = report.spearman(values, goal)
    return {"rho": rho, "p": report.permutation_p(values, goal), "minus_depth": gap.mean,
            "half": gap.half if math.isfinite(gap.half) else None}


# -------------------------------------------------------------------------------------------------
# Table, figure, main

def show(result):
    kinds = list(product(ERRORS, [*OBJECTIVES, TABLE]))
    columns = [f"{error}, {objective}" for error, objective in kinds]
    cells = []
    for row in result["layers"]:
        errors = [report.plus_minus(row[objective][error], ".4f") for error, objective in kinds]
        cells.append([row["layer"], f"{row['score']:+.2f}", *errors])
    print(report.table(["layer", "score", *columns], cells))
    cells = []
    for row in result["correlations"]:
        cells.append([row["predictor"], f"-{row['error']}, {row['objective']}",
                      f"{row['rho']:+.2f}", f"{row['p']:.4f}", f"{row['minus_depth']:+.2f}",
                      row["half"]])
    print(report.table(["predictor", "orders layers by", "rho", "p", "minus depth's", "+-"], cells))


def plot(result, path):
    """KL against layer. A red line marks the layer that the score chooses."""
    rows = result["layers"]
    layers = [row["layer"] for row in rows]
    with report.figure(path, width=5) as (ax,):
        colors = {"diffusion": report.BLUE, "regression": report.GREY, TABLE: report.YELLOW}
        for kind, color in colors.items():
            kl = [row[kind]["kl"] for row in rows]                              # (C, seeds)
            ax.plot(layers, np.mean(kl, 1), "o-", color=color, label=kind)
            ax.fill_between(layers, np.min(kl, 1), np.max(kl, 1), color=color, alpha=0.2)
        ax.axvline(result["best_layer"], color=report.RED, label="chosen by the score")
        ax.set(xlabel="layer", ylabel="KL in nats (lower is better)", yscale="log", xticks=layers)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    world = setup()
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model), "preset": cfg.preset,
                "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result
    candidates = range(1, backbone.read_config(model).num_hidden_layers)
    layers = sorted(set(cfg.layers or candidates))      # a layer counts once
    if not set(layers) <= set(candidates):
        raise UserError(f"--layers must be numbers from 1 to {candidates[-1]}")
    run = Run(cfg, world, identity)

    # 1. The predictors, and the errors at every layer
    lm = backbone.load(model, world.device, torch.float32)
    text, held_out = data.splits(cfg, backbone.load_tokenizer(model), world, SEQ_LEN)
    ids = text.windows(TABLE_TEXT)[:, :-1].to(world.device)
    held_out = held_out.windows(512).to(world.device)
    located = geometry.main(flags(cfg, model, f"{cfg.out}/geometry"))
    values = predictors(located, layers)
    rows = []
    for layer, score in zip(layers, values["default"]):
        row = {"layer": layer, "score": score, TABLE: token_means(lm, layer, ids, held_out)}
        for objective in OBJECTIVES:
            row[objective] = train(cfg, model, layer, objective)
        rows.append(row)

    # 2. Which predictor foretells the order of the layers?
    entries = []
    for objective, error, name in product(OBJECTIVES, ERRORS, values):
        errors = [row[objective][error] for row in rows]
        entries.append({"predictor": name, "objective": objective, "error": error,
                        **correlation(values[name], values["-layer"], errors)})
    result = {**identity, "layers": rows, "correlations": entries,
              "best_layer": located["best_layer"]}
    plot(result, run.out / "sweep.png")
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
