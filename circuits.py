"""COMPARE: which edges of the network solve a task, before and after conversion to a masked LM?

    python circuits.py                                  # out/tasks/toy and out/tasks/w0
    python circuits.py --model DIR --converted DIR DIR  # an AR model, models converted from it
    python circuits.py --seed 1 --out out/again         # other prompts
    python circuits.py --tasks opening --k 100 --out out/opening

The default models are a toy that learned the tasks, and its conversion. run_all.sh makes them with

    python data.py --tasks 0.8 --max_tokens 1200000 --out out/tasks/data
    python toy.py --preset tasks --tasks 0.8 --out out/tasks/toy
    python repr_align.py --preset tasks --model out/tasks/toy --align_weight 0 --out out/tasks/w0

Two circuits are compared by the Jaccard index of their k strongest edges (core/attribution.py), on
prompts of core/tasks.py that all compared models solve. The index needs a scale:

    floors      chance; circuits of other tasks in the AR model
    untrained   the AR weights with a mask and two-way attention, before any training step
    ceilings    the same model on other prompts; converted models that differ in their seed

Training has changed a circuit only where the index of the converted model differs from that of the
untrained one. Zeroing asks which components matter. The three strongest early, middle and late
ones of a model write nothing, then three random ones.

Writes result.json, scores.safetensors (every edge) and circuits.png (if a task was analysed).

Letters: P pairs (a clean and a corrupted prompt), T tokens, S senders, R receivers.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from core import backbone, masked, report
from core.attribution import (Subject, attribute, chance, depth_of, other_tasks, overlaps, profile,
                              strongest, without)
from core.common import UserError, entry, generator, parse, pick, setup
from core.run import Run, atomic, finished, read_json
from core.tasks import TASKS, TRAINED, Pieces, examples

UNTRAINED = "untrained"
LEAST = 0.5     # a model that solves fewer prompts of a task is not compared on it
ZEROED = 3      # components that write nothing
SAMPLES = 5     # random sets of components
FEWEST = 4      # pairs that all models must solve in a set
PARTS = ("early", "middle", "late")     # of the network: core/attribution.py
WINDOW = 24     # tokens of other lines on each side of a prompt


@dataclass
class Config:
    # what and where
    preset: backbone.Preset = "auto"  # auto: by model size
    model: str = "out/tasks/toy"    # the AR model: a folder or a Hub id
    converted: tuple[str, ...] = ("out/tasks/w0",)      # models converted from it
    out: str = "out/circuits"   # run folder
    seed: int = 0               # of the prompts
    device: str = "auto"        # auto, cpu, cuda
    # what is measured
    tasks: tuple[str, ...] = tuple(TRAINED)     # names in core/tasks.py
    pairs: int = 64             # pairs of prompts a task, at most
    resamples: int = 3          # sets of pairs
    ig_steps: int = 5           # points between corrupted and clean embedding (0: plain EAP)
    k: int = 30                 # edges in a circuit
    micro_batch: int = 16       # pairs at a time


PRESETS = {
    "tiny": dict(pairs=4, resamples=2, ig_steps=2),
    "135m": dict(
        tasks=("induction", "names", "infill", "opening"), pairs=12, resamples=2, ig_steps=2,
        micro_batch=8)}


# -------------------------------------------------------------------------------------------------
# Prompts

def arrange(subject, tokens, place, before, after):
    """A line without its answer at `place`, as the subject reads it after the tokens `before`. Who
    reads forwards gets the right side first. A masked model finds a mask where the answer was; a
    two-way one also sees the tokens `after`."""
    left = tokens[:place]
    right = tokens[place + 1:]
    if subject.student is None:
        return [*before, *right, *left]
    if subject.by_blocks:
        return [*before, *right, *left, subject.student.mask_id]
    return [*before, *left, subject.student.mask_id, *right, *after]


def make_batch(lines, subject, sides):
    """clean, corrupted (P, T): prompts. answer, wrong (P,): their answers. last (P,): the token
    whose state predicts the answer: the last one, or the one before the mask.

    sides: for every line the tokens before and after it."""
    batch = {"clean": [], "corrupted": [], "answer": [], "wrong": [], "last": []}
    for line, (before, after) in zip(lines, sides):
        if subject.student is None:
            last = -1
        elif subject.by_blocks:
            last = -2
        else:
            last = len(before) + line.place - 1
        batch["clean"].append(arrange(subject, line.tokens, line.place, before, after))
        batch["corrupted"].append(arrange(subject, line.corrupted, line.place, before, after))
        batch["answer"].append(line.tokens[line.place])
        batch["wrong"].append(line.corrupted[line.place])
        batch["last"].append(last)
    return {name: torch.tensor(x, device=subject.lm.model.device) for name, x in batch.items()}


def surroundings(pieces, count, seed, start, eos):
    """(before, after) for `count` prompts: WINDOW tokens of other lines on each side, with an EOS
    between lines. A window begins with the token `start`."""
    names = list(TRAINED)
    sides = []
    for i in range(count):
        text = []
        for name in names[i % len(names):] + names:
            line = examples(name, pieces, 1, 10_000 + 1000 * seed + i)[0]
            text += [*line.tokens, eos]
        sides.append(([start, *text[:WINDOW - 2], eos], [eos, *text[WINDOW:2 * WINDOW - 1]]))
    return sides


@torch.no_grad()
def solved(subject, batch):
    """(P,) bool: both answers, clean and corrupted, are the model's first choice."""
    clean = subject.logits(subject.lm.embed(batch["clean"]), batch["last"])             # (P, V)
    corrupted = subject.logits(subject.lm.embed(batch["corrupted"]), batch["last"])
    return (clean.argmax(-1) == batch["answer"]) & (corrupted.argmax(-1) == batch["wrong"])


# -------------------------------------------------------------------------------------------------
# One task

def study(task, subjects, pieces, cfg):
    """(result of a task, {(subject, set of pairs): scores (S, R)}). The AR model comes first."""
    # 1. Who solves which pairs, alone and inside a window of other lines
    eos = pieces.tokenizer.eos_token_id
    start = backbone.bos_id(pieces.tokenizer)
    start = eos if start is None else start
    count = 4 * cfg.pairs
    sets = [examples(task, pieces, count, 1000 * cfg.seed + s) for s in range(cfg.resamples)]
    windows = surroundings(pieces, count, cfg.seed, start, eos)
    batches = {}
    right = {}
    rates = {}
    in_window = {}
    for x in subjects:
        batches[x.name] = [make_batch(lines, x, [([start], [])] * count) for lines in sets]
        right[x.name] = torch.stack([solved(x, batch) for batch in batches[x.name]])
        rates[x.name] = right[x.name].double().mean().item()                        # of (sets, P)
        batch = make_batch(sets[0], x, windows)
        in_window[x.name] = solved(x, batch).double().mean().item()
    result = {"group": TASKS[task][0], "pairs": 0, "solved": rates, "solved_in_window": in_window,
              "overlap": {}, "zeroing": {}, "profile": {}}

    # 2. The pairs that all able models solve
    able = [x for x in subjects if x.name != UNTRAINED and rates[x.name] >= LEAST]
    ar = subjects[0]
    shared = torch.stack([right[x.name] for x in [ar, *able]]).all(0)               # (sets, P)
    fewest = int(shared.sum(1).min())
    if ar not in able or len(able) < 2 or fewest < FEWEST:
        return result, {}
    result["pairs"] = min(cfg.pairs, fewest)

    # 3. Attribution, of the untrained model too, whether it solves the task or not
    compared = [x for x in subjects if x in able or x.name == UNTRAINED]
    scores = {}
    for x in compared:
        for s, batch in enumerate(batches[x.name]):
            rows = shared[s].nonzero()[:cfg.pairs, 0]
            batch = {name: values[rows] for name, values in batch.items()}
            scores[x.name, s] = attribute(x, batch, cfg.ig_steps, cfg.micro_batch)
            if s == 0 and x in able:
                result["zeroing"][x.name] = zeroing(x, batch, scores[x.name, 0], cfg)
        result["profile"][x.name] = profile(scores[x.name, 0], x, cfg.k)

    # 4. Overlap of the circuits
    circuits = {key: strongest(value, ar.edges, cfg.k) for key, value in scores.items()}
    result["overlap"] = overlaps(circuits, {x.name: x.kind for x in compared})
    return result, scores


def zeroing(subject, batch, scores, cfg):
    """Share of the pairs, all solved before, that are solved while some components write nothing:
    the subject's own strongest early, middle and late ones, then random ones."""
    def left(components):
        with without(subject, components):
            return solved(subject, batch).double().mean().item()

    written = dict(zip(subject.senders, (scores.abs() * subject.edges).sum(1).tolist()))
    names = subject.senders[1:]                         # the embedding stays
    names = sorted(names, key=written.get, reverse=True)
    result = {}
    for part in PARTS:
        inside = [name for name in names if depth_of(name, subject.lm.L) == part]
        result[part] = [left(inside[:ZEROED])]
    gen = generator(cfg.seed, "controls")
    result["random"] = [left(gen.choice(names, ZEROED, replace=False)) for _ in range(SAMPLES)]
    return result


# -------------------------------------------------------------------------------------------------
# Report

def show(result):
    """The table on the terminal."""
    rows = []
    for task, numbers in result["tasks"].items():
        for subject in result["subjects"]:
            name = subject["name"]
            overlap = numbers["overlap"].get(subject["kind"], {})
            cells = {**overlap, **numbers["zeroing"].get(name, {})}
            row = [task, name]
            row += [f"{numbers[key][name]:.0%}" for key in ("solved", "solved_in_window")]
            for column in ("ar", "prompts", "seeds", "random", *PARTS):
                values = cells.get(column)
                row.append(report.plus_minus(values, ".2f") if values else None)
            rows.append(row)
    columns = ["task", "model", "solved", "in a window", "overlap with AR", "other prompts",
               "other seed", "without random", *PARTS]
    print(report.table(columns, rows))
    print(f"overlap by chance: {result['chance']:.3f}. Last columns: solved without {ZEROED} "
          "components, random ones and the strongest of each part")


def plot(result, path):
    """Overlap with the AR model's circuit, task by task (for the AR model: on other prompts)."""
    tasks = [name for name, task in result["tasks"].items() if task["overlap"]]
    kinds = dict.fromkeys(x["kind"] for x in result["subjects"])
    with report.figure(path, width=3 + len(tasks)) as (ax,):
        for place, kind in enumerate(kinds):
            comparison = "prompts" if kind == "AR" else "ar"
            for i, name in enumerate(tasks):
                values = result["tasks"][name]["overlap"].get(kind, {}).get(comparison, [])
                ax.plot([i + 0.1 * place] * len(values), values, f"C{place}o",
                        label=kind if i == 0 else None)
        floors = {"chance": [result["chance"]], "AR, other tasks": result["other_tasks"]}
        for style, (label, values) in zip(":-", floors.items()):
            if values:
                ax.axhline(statistics.mean(values), color="grey", linestyle=style, label=label)
        ax.set_xticks(range(len(tasks)), tasks)
        ax.set(ylim=(0, 1), xlim=(-0.2, len(tasks) + 1),            # room for the legend
               ylabel=f"Jaccard index of {result['k']} edges",
               title="Overlap with the AR model's circuit (AR: on other prompts)")


# -------------------------------------------------------------------------------------------------
# Main

def read_converted(cfg, model, base):
    """{folder: its result.json} of the converted models."""
    remedy = f"make one with: python repr_align.py --model {model} --align_weight 0"
    infos = {}
    for folder in cfg.converted:
        infos[folder] = read_json(Path(folder) / "result.json", remedy)
        if infos[folder].get("base") != base:
            raise UserError(f"{folder} was not converted from {model}; {remedy}")
    return infos


def load_subjects(model, infos, device):
    """The AR model, then the untrained model, then the converted ones."""
    subjects = [Subject(backbone.load(model, device, torch.float32))]
    lm = backbone.load(model, device, torch.float32)
    mask_id = masked.add_mask(lm, backbone.load_tokenizer(model))
    subjects.append(Subject(lm, masked.Student(lm, mask_id), UNTRAINED, UNTRAINED))
    for folder, info in infos.items():
        student, _ = masked.load_converted(folder, device, torch.float32)
        kind = f"converted, w = {info['align_weight']:g}"
        if info["attention"] == "block":
            kind += f", {student.arm}"
        subjects.append(Subject(student.lm, student, f"{kind}, seed {info['seed']}", kind))
    assert len({x.name for x in subjects}) == len(subjects), "two models of one weight and seed"
    return subjects


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, backbone.preset_of)
    for task in cfg.tasks:
        pick(TASKS, task, "--tasks")
    world = setup(cfg.device)
    model = backbone.resolve(cfg.model, cfg.out)
    base = backbone.identity(model)
    infos = read_converted(cfg, model, base)
    identity = {"base": base, "weights": [backbone.identity(folder) for folder in infos]}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result

    subjects = load_subjects(model, infos, world.device)
    ar = subjects[0]
    pieces = Pieces(backbone.load_tokenizer(model))
    count = int(ar.edges.sum())
    assert 0 < cfg.k <= count, f"--k {cfg.k}: the model has {count} edges"
    run = Run(cfg, world, identity)

    tasks = {}
    scores = {}
    circuits = {}       # of the AR model
    for task in cfg.tasks:
        tasks[task], task_scores = study(task, subjects, pieces, cfg)
        for (name, s), value in task_scores.items():
            scores[f"{name}/{s}/{task}"] = value
            if name == "AR":
                circuits[task, s] = strongest(value, ar.edges, cfg.k)
        run.say(f"{task}: {'analysed' if task_scores else 'not solved by two models'}")
    with atomic(run.out / "scores.safetensors") as temporary:
        save_file(scores, temporary)
    result = {
        **identity, "k": cfg.k, "seed": cfg.seed, "edges": count,
        "senders": ar.senders, "receivers": ar.receivers,
        "subjects": [{"name": x.name, "kind": x.kind} for x in subjects],
        "tasks": tasks, "chance": chance(cfg.k, count), "other_tasks": other_tasks(circuits)}
    if scores:
        plot(result, run.out / "circuits.png")
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
