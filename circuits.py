"""circuits.py: COMPARE. Which edges of the network solve a task, before and after conversion to masked diffusion?

    python circuits.py --model out/tasks/toy                                # all tasks, all twins: ~20 s, 2 cores
    python circuits.py --model out/tasks/toy --seed 1 --out out/again       # other prompts
    python circuits.py --model out/tasks/toy --task opening --k 100 --out out/opening       # one task, larger circuits

Attribution of one model and of its converted twins on the tasks of core/tasks.py. Two circuits are compared by the
Jaccard index of their strongest edges. Floors: chance, and other tasks in the same model. Ceilings: the same model on
other prompts, a twin of another seed. Between them stands the untrained twin: the AR weights with a mask token and
bidirectional attention, before any step. Only where a twin shares less or more with the AR model than this one does has
training done anything. Writes result.json, section.md, circuits.png and scores.safetensors (every edge) to --out.

Edges, senders and receivers are those of core/attribution.py: `a1.3` is head 3 of block 1, `m1` its MLP, from 0 on.

Letters: P pairs, T tokens, L blocks, S senders, R receivers, k edges in a circuit.
"""
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from core import backbone, masked, report
from core.attribution import Subject, attribute, by_depth, chance, components, gini, other_tasks, overlaps, without
from core.common import UserError, entry, parse, pick, setup
from core.draws import generator
from core.run import Run, atomic, beside, finished, read_json
from core.stats import paired, plus_minus, verdict
from core.tasks import MIXED, TASKS, Pair, Pieces, examples


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m"] = "auto"  # auto: by the model's size
    model: str = "toy"          # the AR model: toy (the folder beside --out), a folder or a Hub id
    twins: str = ""             # folders of converted models, comma-separated (empty: all in repr_align beside --model)
    out: str = "out/circuits"   # run folder
    task: str = "all"           # one or more of core/tasks.py, comma-separated (all: those that the toy is trained on)
    seed: int = 0               # of the prompts
    device: str = "auto"        # auto, cpu, cuda
    pairs: int = 64             # pairs of prompts per task, of those that all models solve
    resamples: int = 3          # sets of prompts: the interval, and the first ceiling
    ig_steps: int = 5           # points on the way from the corrupted to the clean embedding (0: plain EAP)
    k: int = 30                 # edges in a circuit; the figure shows others too
    least: float = 0.5          # a task that a model solves less often is not analysed for it
    micro_batch: int = 16       # pairs at a time


PRESETS = {"tiny": {"pairs": 4, "resamples": 2, "ig_steps": 2},
           "135m": {"task": "induction,names,infill,opening", "pairs": 12, "resamples": 2, "ig_steps": 2,
                    "micro_batch": 8}}
SWEEP = (10, 30, 100, 300)
MARGIN = 0.05   # of the Jaccard index: two circuits that differ by less in what they share are taken as equal
UNTRAINED = "untrained twin"


# ----------------------------------------------------------------------------------------------- prompts, effects
def stack(pairs, device):
    """Pairs of one length -> a batch of tensors: clean, corrupted (P, T), answer, wrong, place (P,)."""
    return {k: torch.tensor([getattr(p, k) for p in pairs], device=device) for k in Pair._fields if k != "rest"}


def slices(batch, size):
    return [dict(zip(batch, part, strict=True)) for part in zip(*(v.split(size) for v in batch.values()), strict=True)]


@torch.no_grad()
def solved(subject, batch, which="clean"):
    """(P,) bool: the model's first choice among all tokens is the right one."""
    goal = {"clean": "answer", "corrupted": "wrong"}[which]
    return torch.cat([subject.logits(subject.embed(part[which], part["place"]), part["place"]).argmax(-1) == part[goal]
                      for part in slices(batch, 64)])


def zeroing(subject, batch, scores, graph, cfg):
    """What zeroing components costs: share of prompts still solved, intact, without the three components that carry
    the most by `scores` (the AR model's, so that twins are asked about its circuit), without three random ones and
    without three of the same kind and block or nearest to it (five draws each)."""
    weight = components(scores, graph.edges(), cfg.k, graph)[1:]                             # the embedding stays
    names, gen = graph.senders[1:], generator(cfg.seed, "controls")
    top = [names[j] for j in weight.topk(min(3, len(names) // 2)).indices.tolist()]
    others, block = [n for n in names if n not in top], {n: int(n[1:].split(".")[0]) for n in names}

    def left(zeroed):
        with without(subject, zeroed):
            return solved(subject, batch).double().mean().item()

    def match():
        free, chosen = list(gen.permutation(others)), []
        for name in top:
            chosen.append(min(free, key=lambda n: (n[0] != name[0], abs(block[n] - block[name]))))
            free.remove(chosen[-1])
        return chosen
    return {"components": top, "intact": left([]), "strongest": left(top),
            "random": statistics.mean(left(gen.choice(others, len(top), replace=False)) for _ in range(5)),
            "matched": statistics.mean(left(match()) for _ in range(5))}


def study(name, subjects, pieces, cfg, device):
    """One task: who solves it, and the circuits of those who do. Returns (result, {(subject, set): scores}).

    1 prompts that every able model solves, clean and corrupted
    2 attribution, for `resamples` sets of prompts; of the untrained twin too, whether it solves them or not
    3 overlap of circuits  4 where the attribution lies  5 zeroing"""
    drawn = [stack(examples(name, pieces, 4 * cfg.pairs, 1000 * cfg.seed + s), device) for s in range(cfg.resamples)]
    right = {x.name: [solved(x, b) & solved(x, b, "corrupted") for b in drawn] for x in subjects}
    found = {"group": TASKS[name][0], "usable": False,
             "solved": {n: torch.cat(r).double().mean().item() for n, r in right.items()}}
    able = [x for x in subjects if x.kind != UNTRAINED and found["solved"][x.name] >= cfg.least]
    pool = [torch.stack([right[x.name][s] for x in able]).all(0) if able else None for s in range(cfg.resamples)]
    if subjects[0] not in able or len(able) < 2 or min(int(p.sum()) for p in pool) < 4:
        return found, {}
    batches = [{k: v[p][:cfg.pairs] for k, v in some.items()} for some, p in zip(drawn, pool, strict=True)]
    measured = able + [x for x in subjects if x.kind == UNTRAINED]
    graph, L = able[0].graph(), able[0].lm.L
    edges = graph.edges()
    scores = {(x.name, s): attribute(x, slices(b, cfg.micro_batch), cfg.ig_steps)
              for x in measured for s, b in enumerate(batches)}
    found |= {"usable": True, "pairs": min(len(b["clean"]) for b in batches), "models": {},
              "overlap": {str(k): overlaps(scores, measured, edges, k) for k in sweep(cfg.k, edges)}}
    for kind in dict.fromkeys(x.kind for x in measured):
        own = [scores[x.name, s] for x in measured if x.kind == kind for s in range(cfg.resamples)]
        shares = torch.stack([by_depth(o, graph, L) for o in own])                             # (n, L + 1)
        found["models"][kind] = {
            "by_depth": shares.mean(0).tolist(), "mean_block": (shares * torch.arange(L + 1)).sum(1).tolist(),
            "gini": [gini(components(o, edges, cfg.k, graph)) for o in own]}
    found["zeroing"] = {x.name: zeroing(x, batches[0], scores["AR", 0], graph, cfg) for x in able}
    return found, scores


def sweep(k, edges):
    return [n for n in sorted({*SWEEP, k}) if n <= int(edges.sum())]


# --------------------------------------------------------------------------------------------------------- report
def kind_of(name):
    return name.split(", seed")[0]


def verdicts(result):
    """A sentence for each task and kind of twin: what it shares with the AR model against what it shared untrained."""
    meaning = {"behind": "training moved it away", "ahead": "training brought it nearer"}
    for name, found in result["tasks"].items():
        if not found["usable"]:
            yield f"{name} ({found['group']}): not analysed, too few prompts are solved by the AR model and a twin"
            continue
        row = found["overlap"][str(result["k"])]
        before = row[f"AR and {UNTRAINED}"]["values"]
        for kind in [n for n in found["models"] if n not in ("AR", UNTRAINED)]:
            values, sets = row[f"AR and {kind}"]["values"], len(before)
            seeds = [statistics.mean(values[i:i + sets]) for i in range(0, len(values), sets)]    # a training is one
            words = verdict(paired(seeds, [statistics.mean(before)] * len(seeds)), MARGIN, lower_is_better=False)
            gaps = (f"{r[f'AR and {kind}']['mean'] - r[f'AR and {UNTRAINED}']['mean']:+.2f} at {k}"
                    for k, r in found["overlap"].items())
            yield (f"{name} ({found['group']}), {kind}: shares {plus_minus(values, '.2f')} of the circuit with the AR "
                   f"model, {plus_minus(before, '.2f')} before any training: {words}; by k {', '.join(gaps)}; "
                   + meaning.get(words.split()[0], "no difference is known to be training's doing"))


def who_solves(result):
    """One sentence: the share of prompts that each trained model answers, task by task."""
    trained = [n for n in result["subjects"] if n != UNTRAINED]
    rates = {name: " / ".join(f"{found['solved'][n]:.0%}" for n in trained) for name, found in result["tasks"].items()}
    return f"share solved by {' / '.join(trained)}: {'; '.join(f'{name} {rate}' for name, rate in rates.items())}"


def said(values):
    return plus_minus(values, ".2f") if values else None


def circuit_rows(result):
    """A row for each task and model that was analysed, and one for every two tasks of the AR model."""
    for name, found in result["tasks"].items():
        for kind, model in found.get("models", {}).items():
            row = found["overlap"][str(result["k"])]
            zero = [z for n, z in found["zeroing"].items() if kind_of(n) == kind]
            over, *ceilings = (row.get(what, {}).get("values") for what in (
                f"AR and {kind}", f"{kind}, other prompts", f"{kind}, other seed"))
            fair = [(v - row["chance"]) / (1 - row["chance"]) for v in over or []]
            yield [name, kind, *map(said, [over, fair, *ceilings, model["mean_block"], model["gini"]]),
                   *(said([z[key] for z in zero]) for key in ("strongest", "random", "matched"))]
    if other := result["other_tasks"].get(str(result["k"])):
        yield ["every two tasks", "AR", said(other["values"]), *[None] * 8]


def section(result):
    """The text of section.md."""
    tasks, k = result["tasks"], result["k"]
    some = any(found["usable"] for found in tasks.values())
    return "\n".join([
        "## COMPARE", "", "Who solves what: share of prompts, clean and corrupted, whose answer is the model's first "
        f"choice ({4 * result['pairs'] * result['resamples']} prompts a task, seed {result['seed']}). In a task of the "
        "middle the AR model reads the right side first.", "",
        report.table(["model", *(f"{n} ({found['group']})" for n, found in tasks.items())],
                     [[n, *(f"{found['solved'][n]:.1%}" for found in tasks.values())] for n in result["subjects"]]), "",
        f"Circuits: the {k} strongest of {result['edges']:,} edges (EAP-IG, {result['ig_steps']} points) of a model of "
        f"{result['layers']} blocks, {result['resamples']} sets of at most {result['pairs']} pairs that all analysed "
        "models solve; mean +- sd over sets and twins' seeds. Overlap is the Jaccard index, "
        f"{chance(k, result['edges']):.3f} by chance. The last columns: share of prompts still solved without some "
        "components." if some else
        "No task is solved often enough by the AR model and a twin.", "",
        *[report.table(["task", "model", "overlap with AR", "chance-adjusted", "itself, other prompts", "other seed",
                        "mean block (0: embedding)", "Gini", "left without the AR model's 3 strongest",
                        "without 3 random", "without 3 matched"], circuit_rows(result)), ""] * some,
        *(f"- {line}" for line in result["verdicts"]), "",
        *["![overlap with the AR model, and depth of attribution](circuits.png)", ""] * some])


def headline(result):
    """[[what, value]]: how many tasks are analysed. Overlaps of different tasks are not averaged."""
    models = [found.get("models", ()) for found in result["tasks"].values()]
    kinds = list(dict.fromkeys(kind_of(n) for n in result["subjects"] if n not in ("AR", UNTRAINED)))
    return [[f"tasks solved by the AR model and a twin, of {len(models)}", ", ".join(
        f"{sum(kind in some for some in models)} ({kind.removeprefix('masked, ')})" for kind in kinds[:4])]]


def figure(result, path):
    """A row for a task: overlap with the AR model against K, and where in depth the attribution lies."""
    usable = {n: found for n, found in result["tasks"].items() if found["usable"]}
    kinds = dict.fromkeys(kind for found in usable.values() for kind in found["models"])
    cycle = itertools.cycle((report.RED, report.YELLOW, report.GREEN, report.BLACK))
    colors = {kind: {"AR": report.BLUE, UNTRAINED: report.GREY}.get(kind) or next(cycle) for kind in kinds}
    with report.figure(path, len(usable), 2, width=4.6, height=2.8) as axes:
        for (left, right), (name, found) in zip(axes, usable.items(), strict=True):
            lines = {"AR, other prompts": (report.BLUE, "--"), **{f"AR and {n}": (c, "o-") for n, c in colors.items()}}
            for what, (color, style) in lines.items():
                points = [(int(k), row[what]["mean"]) for k, row in found["overlap"].items() if what in row]
                if points:
                    left.plot(*zip(*points), style, markersize=3, color=color, label=what)
            left.plot(*zip(*((int(k), v["mean"]) for k, v in result["other_tasks"].items() if v)), ":",
                      color=report.BLUE, label="AR, other tasks")
            left.plot(*zip(*((int(k), row["chance"]) for k, row in found["overlap"].items())), ":", color=report.GREY,
                      label="chance")
            left.set(xscale="log", xlabel="K strongest edges", ylabel="Jaccard", ylim=(0, 1), title=f"{name}: overlap")
            for kind, model in found["models"].items():
                right.plot(model["by_depth"], color=colors[kind], label=kind)
            right.set(xlabel="sender's block (0: embedding)", ylabel="share", title=f"{name}: depth of attribution")


# ----------------------------------------------------------------------------------------------------------- main
def load_subjects(model, twins, base, device):
    """The AR model, its untrained twin and the converted ones. Raises UserError for a twin of another model."""
    subjects, bare = [Subject(backbone.load(model, device, torch.float32))], backbone.load(model, device, torch.float32)
    student = masked.Student(bare, masked.add_mask(bare, backbone.load_tokenizer(model)))
    subjects.append(Subject(bare, student, UNTRAINED, UNTRAINED))
    for folder in twins:
        about = read_json(folder / "result.json", "finish that run first")
        if about.get("base") != base:
            raise UserError(f"{folder} was converted from another model than {model}; pass its own as --model")
        student, _ = masked.load_converted(folder, device, torch.float32, "bidirectional")
        kind = f"masked, w = {about['w']:g}"
        if f"{kind}, seed {about['seed']}" in [x.name for x in subjects]:
            raise UserError(f"{folder} is a second twin with w = {about['w']:g} and seed {about['seed']}; name those "
                            "to compare with --twins")
        subjects.append(Subject(student.lm, student, f"{kind}, seed {about['seed']}", kind))
    return subjects


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of(cfg.model, cfg.out))
    names = list(MIXED) if "all" in cfg.task.split(",") else cfg.task.split(",")
    for name in names:
        pick(TASKS, name, "--task")
    world = setup(cfg.device)
    model = backbone.resolve(cfg.model, cfg.out)
    near = Path(model).parent / "repr_align"
    home = near if near.exists() else beside(cfg.out, "repr_align")
    twins = [Path(t) for t in cfg.twins.split(",") if t] or sorted(
        f.parent for f in home.glob("*/result.json") if "attention" not in read_json(f).get("flags", {}))
    if not twins:
        raise UserError(f"there is no converted model in {home}; make one with: python repr_align.py")
    identity = {"base": backbone.identity(model), "weights": [backbone.identity(t) for t in twins]}
    if result := finished(cfg, identity):
        print(section(result))
        return result

    # ------------------------------------------------------------------------------------------------- setup
    subjects = load_subjects(model, twins, identity["base"], world.device)
    graph = subjects[0].graph()
    edges = graph.edges()
    count = int(edges.sum())
    if cfg.k > count:
        raise UserError(f"--k {cfg.k} is more than the {count} edges of this model")
    pieces = Pieces(backbone.load_tokenizer(model))
    run = Run(cfg, world, identity)

    # --------------------------------------------------------------------------------------------- study, result
    scores, found = {}, {}
    for name in names:
        found[name], own = study(name, subjects, pieces, cfg, world.device)
        scores |= {(*key, name): value for key, value in own.items()}
    result = {**identity, "tasks": found, "other_tasks": {str(k): other_tasks(scores, edges, k) for k in
                                                          sweep(cfg.k, edges)}, "subjects": [x.name for x in subjects],
              "k": cfg.k, "edges": count, "layers": subjects[0].lm.L, "seed": cfg.seed, "pairs": cfg.pairs,
              "senders": graph.senders, "receivers": graph.receivers, "resamples": cfg.resamples,
              "ig_steps": cfg.ig_steps}
    result |= {"verdicts": list(verdicts(result)), "headline": headline(result)}
    result["findings"] = [who_solves(result), *(v for v in result["verdicts"] if "not analysed" not in v)]
    with atomic(run.out / "scores.safetensors") as temporary:
        save_file({"/".join(map(str, key)): value for key, value in scores.items()}, temporary)
    if any(of["usable"] for of in found.values()):
        figure(result, run.out / "circuits.png")
    run.finish({**result, "made_of": backbone.made_of(cfg.out, twins)}, section(result))
    run.say("\n".join(f"- {line}" for line in result["verdicts"]))
    return run.result


if __name__ == "__main__":
    main()
