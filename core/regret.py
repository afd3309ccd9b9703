"""regret.py: what LOCATE is worth: how much worse is the layer that a way of choosing takes, and what does it cost?

    found = worth_of_locate(rows, predictors, logs)      # criterion -> strategy -> [[spent, mean regret, its sd]]

From the logs of finished bridges, one a layer and seed: to stop some of them early needs no run of its own.
"""
import json
from statistics import mean

import numpy as np

from core import report

WORTH = {  # what makes a layer the best -> function of (loss, layer), low is good
    "KL": lambda loss, layer: loss,
    "KL per replaced block": lambda loss, layer: loss / layer,                 # replacing more is worth more
}
CHOOSERS = {"score": "score", "conditional (ridge)": "-FVU, ridge", "depth": "-layer"}       # name -> predictor


def losses_at(log):
    """step -> mean training loss over the window that ends there, from the lines of a bridge's log.jsonl. Texts, noise
    levels and noises are the same at every layer, and the texts are new to it: as good as validation, and free."""
    return {row["step"]: float(np.dot(row["loss_by_t"], row["count_by_t"]) / max(1, sum(row["count_by_t"])))
            for row in map(json.loads, log) if "loss_by_t" in row}


def halving(curves, start, first, worth):
    """Successive halving -> (chosen layer, steps spent). curves: layer -> {step: loss}, of equal steps. The layers
    `start` train `first` steps, the better half goes on to the next logged step at least twice as far, and so on; the
    last one trains to the end."""
    steps, alive, at, spent = sorted(curves[start[0]]), list(start), first, 0
    while len(alive) > 1:
        rank = sorted(alive, key=lambda layer: worth(curves[layer][at], layer))
        alive = rank[:1 if at == steps[-1] else len(rank) // 2]
        spent += at * (len(rank) - len(alive))
        at = next((step for step in steps if step >= 2 * at), steps[-1])
    return alive[0], spent + steps[-1]


def regrets(curves, kl, choosers, worth):
    """strategy -> [[spent, regret]], cheapest first. curves: layer -> {step: loss}; kl: layer -> KL of its bridge;
    choosers: name -> {layer: value, high is good}.

    Regret: what the chosen layer's bridge, fully trained, is worse than the best layer's. Spent: steps of all bridges,
    in units of one bridge's training, the chosen one's own included: to choose without training costs 1."""
    layers, steps = sorted(kl), sorted(next(iter(curves.values())))
    final = {layer: worth(kl[layer], layer) for layer in layers}
    best, starts = min(final.values()), {"halving": layers}
    out = {"random layer": [[1.0, mean(final.values()) - best]]}
    for name, values in choosers.items():
        order = sorted(layers, key=values.get, reverse=True)
        out[name], starts[f"{name}'s half, halving"] = [[1.0, final[order[0]] - best]], order[:-(-len(order) // 2)]
    for name, start in starts.items():
        found = [halving(curves, start, first, worth) for first in steps]
        out[name] = sorted([spent / steps[-1], final[layer] - best] for layer, spent in found)
    return {**out, "all layers": [[float(len(layers)), 0.0]]}


def worth_of_locate(rows, predictors, logs):
    """criterion -> strategy -> [[spent, mean regret, its sd]] over training seeds. logs: (layer, seed) -> lines."""
    choosers = {name: dict(zip([r["layer"] for r in rows], predictors[p], strict=True))
                for name, p in CHOOSERS.items() if p in predictors}
    curves, found = {key: losses_at(log) for key, log in logs.items()}, {}
    shared = set.intersection(*map(set, curves.values()))                      # older runs may have logged less often
    for name, worth in WORTH.items():
        by_seed = [regrets({r["layer"]: {step: curves[r["layer"], seed][step] for step in shared} for r in rows},
                           {r["layer"]: r["kl"][seed] for r in rows}, choosers, worth)
                   for seed in range(len(rows[0]["kl"]))]
        found[name] = {strategy: np.concatenate([np.mean(of, 0), np.std(of, 0)[:, 1:]], 1).tolist()
                       for strategy in by_seed[0] for of in [np.array([b[strategy] for b in by_seed])]}
    return found


def section(found):
    """Regret against training spent, both ends of each strategy's curve."""
    some = {name: b["regret"] for name, b in found.items() if "regret" in b}
    rows = [[name, criterion, strategy, *(f"{spent:.2f}: {regret:.4f} +- {sd:.4f}" for spent, regret, sd in (
        points[0], points[-1]))] for name, of in some.items() for criterion, strategies in of.items()
        for strategy, points in strategies.items()]
    return ["", "What LOCATE is worth. Spent: steps of all bridges over those of one, the chosen one's own included; "
            "regret: nats of KL above the best layer's bridge, mean +- sd over training seeds. Halving goes by "
            "training loss; a half is a chooser's better half of the layers.", "", report.table(
                ["backbone", "by", "strategy", "least spent: regret", "most spent: regret"], rows)] if rows else []
