"""ablate.py: what the choices of a stage are worth. Variants x layers x seeds at equal budget, one table a study.

    python -m studies.ablate                                # diffusion against regression, layers 1, 4, 7: ~15 min
    python -m studies.ablate --study regression             # and against its controls, rates tuned for both: ~75 min
    python -m studies.ablate --study align --steps 200 --variants "w = 0;w = 3"     # arms of repr_align.py: ~10 min
    python -m studies.ablate --seeds 1 --steps 100 --out out/look/objective         # a quick look

Each cell is an ordinary run of its stage in a folder beside --out: studies share cells, and one that was interrupted,
or is asked for more seeds, layers or variants, goes on from what is there. Writes section.md (mean +- sd over seeds, a
verdict on every variant) and result.json to --out.
"""
import sys

if not __package__:
    print("error: start it as: python -m studies.ablate", file=sys.stderr)
    raise SystemExit(2)
import itertools
import os
import statistics
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import data
from core import backbone
from core.common import UserError, entry, parse, setup
from core.diffusion import TIMES
from core.report import table
from core.run import Run, finished, read_json
from core.stats import paired, plus_minus, steps_to, verdict

ROOT = Path(__file__).resolve().parent.parent                          # where the stages are
PLAIN, HALF, DOUBLE = "--objective regression", "--lr 0.01 --lr_adam 1e-3", "--lr 0.04 --lr_adam 4e-3"
STUDIES = {  # study -> what its cells are (see KINDS), layers, {variant: flags of the stage}
    "objective": ("bridge", (1, 4, 7), {"diffusion": "", "regression": PLAIN}),
    # looped: as many parameters and calls without noise; both objectives at rates of their own
    "regression": ("bridge", (1, 4, 7), {
        "diffusion": "", "diffusion, lr x 0.5": HALF, "diffusion, lr x 2": DOUBLE,
        "diffusion, a quarter at t = 1": "--atom 0.25",
        "regression": PLAIN, "regression, lr x 0.5": f"{PLAIN} {HALF}", "regression, lr x 2": f"{PLAIN} {DOUBLE}",
        "regression, looped 4 times": f"{PLAIN} --loops 4"}),
    "tricks": ("bridge", (4,), {
        "regression": PLAIN, **{f"t {law}": f"--times {law}" for law in TIMES}, "t near 1 (t_mean 1)": "--t_mean 1",
        "self-conditioning": "--self_condition", "source embedding": "--source embedding"}),
    # one size of network at every layer, embeddings (l = 0) included; both uses of it are measured
    "generate": ("text", range(8), {"blocks": "--preset blocks --blocks 4"}),
    # a constant learning rate, so that steps to a loss can be read off
    "align": ("arm", (None,), {
        f"w = {w}{'' if freeze == 'embed' else ', nothing frozen'}{', 60k tokens' if few else ''}":
        f"--align_weight {w} --cooldown 0 --freeze {freeze} --train_tokens {few}" for few in (0, 60000)
        for w, freeze in ((0, "embed"), (0, "none"), (1, "embed"), (3, "embed"), (10, "embed"))}),
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
    steps: int = 400            # of each cell
    batch_size: int = 8         # sequences a step
    margin: float = 0.005       # nats; "ties" needs the whole interval within it
    jobs: int = 2               # cells at a time, one thread each
    seed: int = 0               # the first training seed
    dry_run: bool = False       # print the commands, then leave
    MEASURES = ("layers", "variants", "seeds", "margin")  # what they choose: result["measured"]


class Cell(NamedTuple):
    variant: str
    layer: int
    seed: int
    folder: Path
    command: list


def cells(cfg):
    """Every cell of the study, seed by seed."""
    kind, layers, variants = STUDIES[cfg.study]
    only, script = cfg.layers.split(",") if cfg.layers else [], KINDS[kind].script
    names = [name.strip() for name in cfg.variants.split(";") if name.strip()]
    for seed, layer, (name, flags) in itertools.product(
            range(cfg.seed, cfg.seed + cfg.seeds), layers, variants.items()):
        if only and str(layer) not in only or names and name not in names:
            continue
        place = f"--layer {layer}" if layer is not None else ""
        flags = f"{flags} {place} --seed {seed} --steps {cfg.steps} --batch_size {cfg.batch_size}".split()
        folder = Path(cfg.out).parent / "_".join(["cell", Path(script).stem, *flags]).replace("--", "")
        few = ["--nfes", "1,4"] if script == "bridge.py" else []          # the calls that the table shows
        yield Cell(name, layer, seed, folder, [sys.executable, str(ROOT / script), "--model", cfg.model, "--data",
                                               cfg.data, *flags, *few, "--out", str(folder)])


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


# ------------------------------------------------------------------------------- what a cell says, and against whom
def used(result):
    """(calls, numbers) of a bridge as it is used: with four calls, or as many as it has."""
    last = max((n for n in result["nfe"] if int(n) <= 4), key=int)
    return int(last), result["nfe"][last]


def read_bridge(result, _):
    calls, row = used(result)
    return {"size ratio": result["size_ratio"], "NFE": calls, "FVU": row["fvu"], "KL": row["kl"],
            "CE gap": row["ce_gap"], "CE gap, NFE 1": result["nfe"].get("1", row)["ce_gap"]}


def best_regression(name, arms):
    """The regression of lowest KL over its learning rates: chosen on the texts that judge, so if anything too good."""
    plain = [n for n in arms if n.split(",")[0] == "regression" and "looped" not in n]
    return min(plain, key=lambda n: statistics.mean(used(r)[1]["kl"] for r in arms[n]), default=None)


def read_arm(result, rival):
    """How much sooner an arm reaches its rival's best loss, which may lie before the end; in steps and in seconds."""
    best, goal = (min(row[1] for row in r["curve"]) for r in (result, rival))
    there, first = steps_to(result["curve"], goal), steps_to(rival["curve"], goal)
    sooner = first / there if there else None
    cosine = {} if result["cosine"] is None else {"final cosine": result["cosine"]}
    return {"masked CE": result["val_loss"], "best on the way": best, "acceleration, steps": sooner,
            "acceleration, seconds": sooner and sooner * rival["seconds"] / result["seconds"], **cosine}


def unaligned(name, arms):
    """The arm w = 0 on the same data. Raises UserError where it was left out."""
    rival = ", ".join(["w = 0", *(w for w in name.split(", ")[1:] if w != "nothing frozen")])
    if rival not in arms:
        raise UserError(f"--variants: {name!r} needs {rival!r} too, to compare with")
    return rival


def read_text(result, _):
    """Text drawn by a bridge, beside what the same bridge loses in replacement."""
    return {"gen-PPL at real entropy": result["text"]["matched"],
            "readout accuracy": result["text"]["readout_accuracy"], "KL": used(result)[1]["kl"], "CE gap":
            used(result)[1]["ce_gap"]}


def write_texts(cfg, work):
    """Text by all bridges of the study, in one run of generate.py: {folder: its row, decoded by both experts}."""
    out = Path(cfg.out).parent / f"generate_{len(work)}x{cfg.steps}x{cfg.batch_size}_seed{cfg.seed}"
    execute([("text", [sys.executable, str(ROOT / "generate.py"), "--data", cfg.data, "--twin", "", "--no-experts",
                       "--bridges", ",".join(str(cell.folder) for cell in work), "--out", str(out)])], 1, cfg.jobs)
    return {Path(r["folder"]): {"text": r} for r in read_json(out / "result.json")["rows"] if "folder" in r}


class Kind(NamedTuple):
    script: str                               # the stage that a cell is a run of
    read: Callable                            # (result, the rival's result) -> {column: number; None: never reached}
    rival: Callable = lambda name, arms: None  # (variant, {variant: results}) -> the variant it is judged against
    judged: tuple = ()                        # columns in nats with a verdict; lower is better
    after: Callable = lambda cfg, work: {}    # once all cells are there: {folder: what it adds to that result}


KINDS = {"bridge": Kind("bridge.py", read_bridge, best_regression, ("KL", "CE gap")),
         "arm": Kind("repr_align.py", read_arm, unaligned, ("best on the way",)),
         "text": Kind("bridge.py", read_text, after=write_texts)}


# ----------------------------------------------------------------------------------------------------------- tables
def collect(cfg, work, added):
    """(rows: one a layer and variant, values over seeds by column; verdicts: layer, variant, rival, column, words)"""
    kind, found, rows, verdicts = KINDS[STUDIES[cfg.study][0]], {}, [], []
    for cell in work:
        result = {**read_json(cell.folder / "result.json"), **added.get(cell.folder, {})}
        found.setdefault(cell.layer, {}).setdefault(cell.variant, []).append(result)
    for layer, arms in found.items():
        rivals, values = {name: kind.rival(name, arms) for name in arms}, {}
        for name, results in arms.items():
            each = [kind.read(*pair) for pair in zip(results, arms.get(rivals[name], results), strict=True)]
            values[name] = {column: [e[column] for e in each] for column in each[0]}
            rows.append({"layer": layer, "variant": name, "values": values[name],
                         "eval_sequences": results[0]["eval_sequences"]})
        verdicts += [[layer, name, rival, column, verdict(paired(values[name][column], values[rival][column]),
                                                          cfg.margin, "nats")]
                     for name, rival in rivals.items() if rival not in (None, name) for column in kind.judged]
    return rows, verdicts


FORMS = {"size ratio": ".2f", "NFE": ".0f", "FVU": ".4f", "KL": ".4f", "CE gap": "+.4f", "CE gap, NFE 1": "+.4f",
         "gen-PPL at real entropy": ".1f", "acceleration, steps": ".2f", "acceleration, seconds": ".2f"}  # else .3f


def cell_text(values, column):
    if not values or None in values:
        return values and f"never in {values.count(None)} of {len(values)}"
    return plus_minus(values if len(set(values)) > 1 else values[:1], FORMS.get(column, ".3f"))


def section(result):
    """The study as Markdown."""
    rows = result["rows"]
    columns = list(dict.fromkeys(c for row in rows for c in row["values"]))
    text = f"""## Study: {result["study"]}

{result["seeds"]} training seeds from {result["seed"]}, {result["steps"]} steps of {result["batch_size"]} sequences,
{rows[0]["eval_sequences"]} held-out sequences, mean +- sd over seeds.

""" + table(["layer", "variant", *columns], [
        [row["layer"], row["variant"], *(cell_text(row["values"].get(c), c) for c in columns)] for row in rows])
    if result["verdicts"]:
        text += f"\n\nPaired by seed; \"ties\" only where the whole interval lies within {result['margin']:g} nats:\n\n"
        text += table(["layer", "variant", "against", "by", "verdict"], result["verdicts"])
    return text + "\n"


def headline(cfg, verdicts):
    """For the README: diffusion against regression by KL, layer by layer."""
    said = {layer: words.split(" (")[0] for layer, name, _, by, words in verdicts if (name, by) == ("diffusion", "KL")}
    what = f"REPLACE: diffusion's KL against regression's, layers {', '.join(map(str, said))}, {cfg.seeds} seeds, nats"
    return [[what, "; ".join(said.values()).replace(" nats", "")]] if said else []


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    cfg.out = cfg.out or f"out/ablate/{cfg.study}"
    kind, work = KINDS[STUDIES[cfg.study][0]], list(cells(cfg))
    if not work:
        raise UserError(f"study {cfg.study} has none of the layers {cfg.layers or '(all)'} with one of the variants "
                        f"{cfg.variants or '(all)'}")
    if kind.rival is unaligned:
        for cell in work:                                               # now, and not after all cells have run
            kind.rival(cell.variant, {c.variant for c in work})
    if cfg.dry_run:
        print("\n".join(" ".join(cell.command) for cell in work))
        return None
    world, model = setup("cpu"), backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model)}
    asked = {"cells": [cell.folder.name for cell in work], **{name: getattr(cfg, name) for name in cfg.MEASURES}}
    result = finished(cfg, identity)
    if not result or result["measured"] != asked:
        data.shards_beside(cfg, backbone.load_tokenizer(model), world)  # once, before two cells want it
        run = Run(cfg, world, identity)
        execute([(f"{c.variant}, layer {c.layer}, seed {c.seed}", c.command) for c in work], cfg.jobs)
        rows, verdicts = collect(cfg, work, kind.after(cfg, work))
        result = {**identity, "study": cfg.study, "measured": asked, "margin": cfg.margin, "seeds": cfg.seeds,
                  "seed": cfg.seed, "steps": cfg.steps, "batch_size": cfg.batch_size, "rows": rows,
                  "verdicts": verdicts, "headline": headline(cfg, verdicts)}
        run.finish(result, section(result))
        result = run.result
    print(section(result))
    return result


if __name__ == "__main__":
    main()
