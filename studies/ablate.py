"""ablate.py: what the choices of a stage are worth. Variants x layers x seeds at equal budget, one table a study.

    python -m studies.ablate                # diffusion against regression, layers 1, 4, 7, rates for both: ~25 min
    python -m studies.ablate --study align --steps 200 --variants "w = 0;w = 3"     # arms of repr_align.py: ~10 min
    python -m studies.ablate --seeds 1 --steps 100 --out out/look/objective         # a quick look

Each cell is an ordinary run of its stage in a folder beside --out: studies share cells, and one that was interrupted,
or is asked for more seeds, layers or variants, goes on from what is there. Writes section.md and result.json to --out.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.ablate\n")
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import data
from core import backbone, masked
from core.common import UserError, entry, parse, setup
from core.report import table
from core.run import Run, finished, read_json
from core.stats import paired, plus_minus, steps_to, verdict
from core.tasks import Pieces, examples

ROOT = Path(__file__).resolve().parent.parent                          # where the stages are
PLAIN, DOUBLE = "--objective regression", "--lr 0.04 --lr_adam 4e-3"
BLOCK = "--attention block --context"
AT_END = ("induction", "brackets", "missing", "countdown")              # tasks whose answer follows all that is visible
FORMS = {"size ratio": ".2f", "NFE": ".0f", "FVU": ".4f", "KL": ".4f", "CE gap": "+.4f", "CE gap, NFE 1": "+.4f",
         "acceleration, steps": ".2f", "acceleration, seconds": ".2f"}  # of a column, else .3f
STUDIES = {  # study -> the stage that its cells are runs of (see KINDS), layers, {variant: flags of the stage}
    "objective": ("bridge", (1, 4, 7), {
        "diffusion": "", "diffusion, lr x 2": DOUBLE, "diffusion, t_mean 0": "--t_mean 0",
        "regression": PLAIN, "regression, lr x 2": f"{PLAIN} {DOUBLE}"}),
    # a constant learning rate, so that steps to a loss can be read off; little text: --flags "--train_tokens 60000"
    "align": ("repr_align", (None,), {name: f"--cooldown 0 --align_weight {flags}" for name, flags in {
        "w = 0": "0", "w = 0, nothing frozen": "0 --freeze none", "w = 1": "1", "w = 3": "3", "w = 10": "10",
        "w = 10, off after a quarter": "10 --align_until {quarter}"}.items()}),
    # what the AR model is converted to; with a clean copy (clean, causal) a step costs twice as much
    "arms": ("repr_align", (None,), {name: f"--align_weight 0 {flags}" for name, flags in {
        "bidirectional": "", "bidirectional, twice the steps": "--steps {double}",
        "blocks": f"{BLOCK} noisy", "blocks, twice the steps": f"{BLOCK} noisy --steps {{double}}",
        "blocks, clean context": f"{BLOCK} clean", "blocks, causal context": f"{BLOCK} causal",
        "blocks, causal context, next-token loss 1": f"{BLOCK} causal --ar_weight 1",
        "blocks, causal context, w = 10": f"{BLOCK} causal --align_weight 10"}.items()}),
}


@dataclass
class Config:
    study: Literal[tuple(STUDIES)] = "objective"  # which table
    model: str = "toy"          # toy (the folder beside that of --out), a folder or a Hub id
    data: str = "stdlib"        # its text
    out: str = ""               # run folder; its cells stand beside it [out/ablate/STUDY]
    layers: str = ""            # only these, such as 1,4 (empty: those of the study)
    variants: str = ""          # only these, by name, separated by semicolons (empty: all)
    seeds: int = 3              # training seeds
    steps: int = 200            # of each cell
    batch_size: int = 8         # sequences a step
    flags: str = ""             # more flags of every cell, such as "--seq_len 64"
    margin: float = 0.005       # nats; "ties" needs the whole interval within it
    jobs: int = 2               # cells at a time, one thread each
    seed: int = 0               # the first training seed
    MEASURES = ("layers", "variants", "seeds", "margin")  # what they choose: result["measured"]


class Cell(NamedTuple):
    variant: str
    layer: int | None
    seed: int
    folder: Path
    command: list


def stage(name, model, text, folder, flags, *more):
    """The command of a stage on a model and its text."""
    return [sys.executable, str(ROOT / f"{name}.py"), "--model", str(model), "--data", str(text), *flags.split(),
            *more, "--out", str(folder)]


def cells(cfg):
    """Every cell of the study, seed by seed."""
    name, layers, variants = STUDIES[cfg.study]
    only, some = cfg.layers.split(",") if cfg.layers else [], [v.strip() for v in cfg.variants.split(";") if v.strip()]
    for seed, layer, (variant, flags) in itertools.product(
            range(cfg.seed, cfg.seed + cfg.seeds), layers, variants.items()):
        if only and str(layer) not in only or some and variant not in some:
            continue
        place = "" if layer is None else f"--layer {layer}"
        flags = f"{place} --seed {seed} --steps {cfg.steps} --batch_size {cfg.batch_size} {flags} {cfg.flags}"
        flags = flags.format(double=2 * cfg.steps, quarter=cfg.steps // 4)
        folder = Path(cfg.out).parent / "_".join(["cell", name, *flags.split()]).replace("--", "")
        flags = "--lr 0.02 --nfes 1,4 " * (name == "bridge") + flags                               # the last one wins
        yield Cell(variant, layer, seed, folder, stage(name, cfg.model, cfg.data, folder, flags))


def execute(work, jobs, threads=1):
    """Run commands [(title, command)], `jobs` at a time. Raises UserError with the first failure's last line."""
    def one(item):
        title, command = item
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True,
                              text=True)
        if done.returncode:
            raise UserError(f"{title} failed: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
        print(f"{title}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, work))


def settled(cfg, identity, asked, section, make):
    """The finished result of exactly this study, or else that of make() -> (run, result); prints its section."""
    result = finished(cfg, identity, quiet=True)
    if not result or result["measured"] != asked:
        run, result = make()
        result = {**identity, "measured": asked, **result}
        run.finish(result, section(result))
        result = run.result
    print(section(result))
    return result


# ------------------------------------------------------------------------------- what a cell says, and against whom
def used(result):
    """The calls of a bridge as it is used: four, or as many as it has."""
    return max((n for n in result["nfe"] if int(n) <= 4), key=int)


def read_bridge(result, _):
    calls = used(result)
    row = result["nfe"][calls]
    return {"size ratio": result["size_ratio"], "NFE": int(calls), "FVU": row["fvu"], "KL": row["kl"],
            "CE gap": row["ce_gap"], "CE gap, NFE 1": result["nfe"].get("1", row)["ce_gap"]}


def best_regression(name, arms):
    """The regression of lowest KL over its learning rates: chosen on the texts that judge, so if anything too good."""
    plain = [n for n in arms if n.split(",")[0] == "regression"]
    return min(plain, key=lambda n: statistics.mean(r["nfe"][used(r)]["kl"] for r in arms[n]), default=None)


def read_arm(result, rival):
    """How much sooner an arm reaches its rival's best loss, which may lie before the end; in steps and in seconds."""
    best, goal = (min(row[1] for row in r["curve"]) for r in (result, rival))
    there, first = steps_to(result["curve"], goal), steps_to(rival["curve"], goal)
    sooner = first / there if there else None
    cosine = {} if result["cosine"] is None else {"final cosine": result["cosine"]}
    return {"masked CE": result["val_loss"], "best on the way": best, "acceleration, steps": sooner,
            "acceleration, seconds": sooner and sooner * rival["seconds"] / result["seconds"], **cosine}


def read_bound(result, rival):
    more = {"tokens a call": result["tokens_a_call"]} if "tokens_a_call" in result else {}     # not of an older cell
    more |= {"tasks solved": tasks_solved(result["folder"])} if result.get("tasks") else {}
    return {"bound, nats a token": result["bound"][0], "masked CE of its own task": result["val_loss"],
            "tokens filled in right": result["infilled"], **more, "seconds": result["seconds"]}


def tasks_solved(folder):
    """Share of prompts of AT_END whose answer is a converted model's first choice for the token after them."""
    (student, tokenizer), right = masked.load_converted(folder, torch.device("cpu"), torch.float32), []
    pieces = Pieces(tokenizer)
    for name in AT_END:
        pairs = examples(name, pieces, 128, seed=0)
        ids = torch.tensor([[*pair.clean, student.mask_id] for pair in pairs])                           # (128, T)
        found = masked.fill(student, ids, ids == student.mask_id, 1, temperature=0)[:, -1]
        right += (found == torch.tensor([pair.answer for pair in pairs])).tolist()
    return statistics.mean(right)


def unaligned(name, arms):
    """The arm w = 0. Raises UserError where it was left out."""
    if "w = 0" not in arms:
        raise UserError(f"--variants: {name!r} needs 'w = 0' too, to compare with")
    return "w = 0"


def without(name, arms):
    """The arm to which this one adds something, by their names; else the first."""
    parts = name.split(", ")
    return next((n for i in range(len(parts) - 1, 0, -1) if (n := ", ".join(parts[:i])) in arms), next(iter(arms)))


KINDS = {  # study or stage -> (result, the rival's result) -> {column: number; None: never reached},
    # (variant, {variant: results}) -> the variant it is judged against, columns with a verdict and their unit
    "bridge": (read_bridge, best_regression, {"KL": "nats", "CE gap": "nats"}),
    "repr_align": (read_arm, unaligned, {"best on the way": "nats"}),
    "arms": (read_bound, without, {"bound, nats a token": "nats", "tasks solved": "of the prompts"})}


# ----------------------------------------------------------------------------------------------------------- tables
def collect(cfg, work):
    """(rows: one a layer and variant, values over seeds by column; verdicts: layer, variant, rival, column, words)"""
    (read, rival_of, judged), found, rows, verdicts = KINDS.get(cfg.study, KINDS[STUDIES[cfg.study][0]]), {}, [], []
    for cell in work:
        found.setdefault(cell.layer, {}).setdefault(cell.variant, []).append(
            {**read_json(cell.folder / "result.json"), "folder": cell.folder})
    for layer, arms in found.items():
        rivals, values = {name: rival_of(name, arms) for name in arms}, {}
        for name, results in arms.items():
            each = [read(*pair) for pair in zip(results, arms.get(rivals[name], results), strict=True)]
            values[name] = {column: [e[column] for e in each] for column in each[0]}
            rows.append({"layer": layer, "variant": name, "values": values[name],
                         "eval_sequences": results[0]["eval_sequences"]})
        verdicts += [[layer, name, rival, column, verdict(paired(values[name][column], values[rival][column]),
                                                          cfg.margin, unit, lower_is_better=unit == "nats")]
                     for name, rival in rivals.items() if rival not in (None, name)
                     for column, unit in judged.items() if column in values[name].keys() & values[rival]]
    return rows, verdicts


def cell_text(values, column):
    if not values or None in values:
        return values and f"never in {values.count(None)} of {len(values)}"
    return plus_minus(values if len(set(values)) > 1 else values[:1], FORMS.get(column, ".3f"))


def section(result):
    """The study as Markdown."""
    rows = result["rows"]
    columns = list(dict.fromkeys(c for row in rows for c in row["values"]))
    return f"""## Study: {result["study"]}

{result["seeds"]} training seeds from {result["seed"]}, {result["steps"]} steps of {result["batch_size"]} sequences{
        f", `{result['flags']}`" if result.get("flags") else ""},
{rows[0]["eval_sequences"]} held-out sequences, mean +- sd over seeds.

{table(["layer", "variant", *columns], [
        [row["layer"], row["variant"], *(cell_text(row["values"].get(c), c) for c in columns)] for row in rows])}

Paired by seed; "ties" only where the whole interval lies within {result["margin"]:g} nats or of the prompts:

{table(["layer", "variant", "against", "by", "verdict"], result["verdicts"])}
"""


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    cfg.out = cfg.out or f"out/ablate/{cfg.study}"
    work = list(cells(cfg))
    if not work:
        raise UserError(f"study {cfg.study} has none of the layers {cfg.layers or '(all)'} with one of the variants "
                        f"{cfg.variants or '(all)'}")
    for cell in work if cfg.study == "align" else ():                   # refused now, and not after all cells have run
        unaligned(cell.variant, {c.variant for c in work})
    world, model = setup("cpu"), backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model)}

    def make():
        data.shards_beside(cfg, backbone.load_tokenizer(model), world)  # once, before two cells want it
        run = Run(cfg, world, identity)
        execute([(f"{c.variant}, layer {c.layer or '-'}, seed {c.seed}", c.command) for c in work], cfg.jobs)
        rows, verdicts = collect(cfg, work)
        return run, {"rows": rows, "verdicts": verdicts, "findings": [
            f"{cfg.study}{f', layer {layer}' if layer else ''}, by {by}: {name} against {rival}: {words}"
            for layer, name, rival, by, words in verdicts], **{
            name: getattr(cfg, name) for name in ("study", "margin", "seeds", "seed", "steps", "batch_size", "flags")}}
    asked = {"cells": [cell.folder.name for cell in work], **{name: getattr(cfg, name) for name in cfg.MEASURES}}
    return settled(cfg, identity, asked, section, make)


if __name__ == "__main__":
    main()
