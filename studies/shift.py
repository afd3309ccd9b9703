"""shift.py: does conversion change the circuits of some tasks more than those of others?

    python -m studies.shift --runs out/shift/circuits_0 out/shift/circuits_1

The runs are finished ones of circuits.py. Each compares one AR model with models converted from it.
For every task that they solve:

    overlap     Jaccard index of the k strongest edges of the AR model and of the converted model
    change      overlap less that of the untrained model: what training did. The untrained model
                has the AR weights, a mask and two-way attention
    specific    overlap less the mean one with the AR model's circuits of the other tasks

Mechanism Shift (arXiv 2601.14758) says that conversion keeps the circuits of tasks that the prefix
decides and rewires those of globally constrained ones: `change` should be higher in the group
`prefix` than in the group `global`. Intervals are over the converted models of the first run, and
over AR models where several runs are given.

Prints Markdown tables, and writes shift.png and result.json.
"""
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file

from circuits import PARTS, UNTRAINED
from core import report
from core.attribution import jaccard, strongest
from core.common import entry, parse
from core.run import read_json, write_json


@dataclass
class Config:
    runs: tuple[str, ...] = ("out/circuits",)   # folders of circuits.py, also without --runs
    k: tuple[int, ...] = (30, 10, 100)          # edges in a circuit; the first leads
    out: str = "out/shift"                      # folder for the figure and the numbers


# -------------------------------------------------------------------------------------------------
# Numbers

def read_circuits(folder, k):
    """{(model, task): circuits, one for each set of prompts}."""
    circuits = {}
    for key, scores in sorted(load_file(Path(folder) / "scores.safetensors").items()):
        model, _, task = key.split("/")
        every = torch.ones_like(scores, dtype=torch.bool)
        circuits.setdefault((model, task), []).append(strongest(scores, every, k))
    return circuits


def overlap(a, b):
    """Mean Jaccard index over sets of prompts."""
    return mean(jaccard(*pair) for pair in zip(a, b))


def numbers_of(circuits, model, task):
    """Overlap, change and specific overlap of one model on one task."""
    ours = circuits[model, task]
    value = overlap(ours, circuits["AR", task])
    others = [overlap(ours, circuit) for (name, other), circuit in circuits.items()
              if name == "AR" and other != task]
    return {"overlap": value,
            "change": value - overlap(circuits[UNTRAINED, task], circuits["AR", task]),
            "specific": value - mean(others or [0.0])}


def placed(task, model):
    """Where a model's attribution lies, and what is solved without some of its components."""
    zeroing = task["zeroing"].get(model, {})
    numbers = {part: task["profile"][model][part] for part in (*PARTS, "concentration")}
    for part in (*PARTS, "random"):
        if part in zeroing:
            numbers[f"without {part}"] = mean(zeroing[part])
    return numbers


def collect(folder, k):
    """{(kind, group): {number: {model: mean over the group's tasks}}} of models that solve all."""
    result = read_json(Path(folder) / "result.json")
    circuits = read_circuits(folder, k)
    tasks = {name: task for name, task in result["tasks"].items() if task["pairs"]}
    groups = dict.fromkeys(task["group"] for task in tasks.values())
    table = {}
    for subject, group in product(result["subjects"], groups):
        model = subject["name"]
        names = [name for name, task in tasks.items() if task["group"] == group]
        if all((model, name) in circuits for name in names):
            rows = [numbers_of(circuits, model, name) | placed(tasks[name], model)
                    for name in names]
            cells = table.setdefault((subject["kind"], group), {})
            for key in rows[0]:
                cells.setdefault(key, {})[model] = mean(row[key] for row in rows)
    return table


def gap_of_groups(table, kind, key):
    """Prefix less global, a value for each model that solves both groups."""
    prefix = table.get((kind, "prefix"), {}).get(key, {})
    others = table.get((kind, "global"), {}).get(key, {})
    return [prefix[model] - others[model] for model in prefix if model in others]


# -------------------------------------------------------------------------------------------------
# Tables and figure

def interval(values):
    """Mean and 95% interval as text."""
    gap = report.paired(values, [0.0] * len(values))
    if not math.isfinite(gap.half):
        return f"{gap.mean:+.2f} (n = {gap.n}, spread not known)"
    return f"{gap.mean:+.2f} [{gap.mean - gap.half:+.2f}, {gap.mean + gap.half:+.2f}]"


def number_table(table):
    """A line for every kind of model and group of tasks: mean +- spread over models."""
    keys = {}
    for cells in table.values():
        keys |= cells
    rows = []
    for (kind, group), cells in table.items():
        row = [kind, group, len(cells["overlap"])]
        for key in keys:
            values = list(cells.get(key, {}).values())
            row.append(report.plus_minus(values, ".2f") if values else None)
        rows.append(row)
    return report.table(["models", "group", "n", *keys], rows)


def shift_table(tables, kinds):
    """Change by group and the difference of the groups; tables: {k: [table of each run]}."""
    rows = []
    for kind, (k, runs) in product(kinds, tables.items()):
        row = [kind, k]
        for group in ("prefix", "global", "middle"):
            values = runs[0].get((kind, group), {}).get("change")
            row.append(interval(list(values.values())) if values else None)
        for key in ("change", "specific"):
            gaps = [gap_of_groups(table, kind, key) for table in runs]
            row.append(interval(gaps[0]) if gaps[0] else None)
            row.append(interval([mean(gap) for gap in gaps if gap]) if any(gaps) else None)
        rows.append(row)
    columns = ["models", "k", "change, prefix", "global", "middle", "prefix - global",
               "over AR models", "by the floor of other tasks", "over AR models"]
    return report.table(columns, rows)


def plot(table, kinds, k, path):
    """A dot a converted model: overlap with the AR model's circuit, group by group."""
    groups = list(dict.fromkeys(group for _, group in table))
    with report.figure(path, width=5.5) as (ax,):
        for i, group in enumerate(groups):
            for place, kind in enumerate(kinds):
                values = table.get((kind, group), {}).get("overlap", {}).values()
                ax.plot([i + 0.15 * place] * len(values), list(values), f"C{place}o",
                        label=kind if i == 0 else None)
            floor = mean(table[UNTRAINED, group]["overlap"].values())
            ax.plot([i - 0.1, i + 0.5], [floor, floor], color=report.GREY,
                    label=UNTRAINED if i == 0 else None)
        ax.set_xticks(range(len(groups)), groups)
        ax.set(ylim=(0, 1), xlim=(-0.3, len(groups) + 0.4), ylabel=f"Jaccard index of {k} edges",
               title="Overlap with the AR model's circuit")


@entry
def main(argv):
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    cfg = parse(Config, argv, __doc__)
    remedy = "finish it first: python circuits.py"
    bases = {read_json(f"{folder}/result.json", remedy)["base"] for folder in cfg.runs}
    assert len(bases) == len(cfg.runs), "--runs must be of different AR models"
    tables = {}
    for k in cfg.k:
        tables[k] = [collect(folder, k) for folder in cfg.runs]
    first = tables[cfg.k[0]]
    kinds = {}
    for table in first:
        kinds |= {kind: [] for kind, _ in table if kind not in ("AR", UNTRAINED)}
    print(number_table(first[0]))
    print(shift_table(tables, kinds))
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    plot(first[0], kinds, cfg.k[0], out / "shift.png")
    for kind in kinds:
        kinds[kind] = [gap_of_groups(table, kind, "change") for table in first]
    write_json(out / "result.json", {"k": cfg.k[0], "runs": list(cfg.runs), "shift": kinds})
    return kinds


if __name__ == "__main__":
    main()
