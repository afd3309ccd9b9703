"""COMPARE: which edges of the network solve a task, before and after conversion to a masked LM?

    python circuits.py                                  # out/tasks/toy and its converted models
    python circuits.py --model DIR --converted DIR DIR      # an AR model, its converted models
    python circuits.py --seed 1 --out out/again         # other prompts
    python circuits.py --tasks opening --k 100 --out out/opening

Two circuits are compared by the Jaccard index of their k strongest edges (core/attribution.py), on
prompts of core/tasks.py that all compared models solve. The index needs a scale:

    floors      chance; circuits of other tasks in the AR model
    untrained   the AR weights with a mask and two-way attention, before any training step
    ceilings    the same model on other prompts; converted models that differ in their seed

Training has changed a circuit only where the converted model's index is not the untrained one's.
Zeroing asks whether a circuit matters: the AR circuit's three strongest components write nothing,
and so do three random ones.

Writes result.json, scores.safetensors (every edge) and circuits.png (if a task was analysed).

Letters: P pairs of prompts, T tokens, S senders, R receivers, k edges in a circuit.
"""
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from core import backbone, masked, report
from core.attribution import (Subject, attribute, chance, other_tasks, overlaps, strongest,
                              without)
from core.common import UserError, entry, generator, parse, pick, setup
from core.run import Run, atomic, beside, finished, read_json
from core.tasks import TASKS, TRAINED, Pieces, examples

UNTRAINED = "untrained"
LEAST = 0.5     # a model that solves fewer prompts of a task is not compared on it
ZEROED = 3      # components that write nothing
SAMPLES = 5     # random sets of components
FEWEST = 4      # pairs that all models must solve in each set
COLORS = (report.BLUE, report.RED, report.YELLOW, report.GREEN)     # of converted models


@dataclass
class Config:
    # what and where
    preset: Literal["auto", "tiny", "toy", "135m", "0.6b", "8b"] = "auto"  # auto: by model size
    model: str = ""             # the AR model, a folder or Hub id (empty: tasks/toy next to --out)
    converted: tuple[str, ...] = ()     # converted models (empty: all that are found near --model)
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
    "135m": dict(tasks=("induction", "names", "infill", "opening"), pairs=12, resamples=2,
                 ig_steps=2, micro_batch=8)}


# -------------------------------------------------------------------------------------------------
# Prompts

def make_batch(pairs, subject, eos):
    """Pairs as the subject reads them: clean, corrupted (P, T); answer, wrong, last (P,).

    A masked model finds a mask at the answer's place. An AR model reads the right side first. The
    state at `last` predicts the answer."""
    batch = {"clean": [], "corrupted": [], "answer": [], "wrong": [], "last": []}
    for clean, corrupted in pairs:
        for name, prompt in (("clean", clean), ("corrupted", corrupted)):
            ids = [eos, *prompt.right, *prompt.left]
            if subject.student is not None:
                ids = [eos, *prompt.left, subject.student.mask_id, *prompt.right]
            batch[name].append(ids)
        batch["answer"].append(clean.answer)
        batch["wrong"].append(corrupted.answer)
        batch["last"].append(len(ids) - 1 if subject.student is None else len(prompt.left))
    return {name: torch.tensor(x, device=subject.lm.model.device) for name, x in batch.items()}


def take(batch, rows):
    """The rows of a batch: a slice, or indices."""
    return {name: x[rows] for name, x in batch.items()}


def split(batch, size):
    """The batch in parts of at most `size` pairs."""
    count = len(batch["clean"])
    return [take(batch, slice(i, i + size)) for i in range(0, count, size)]


def first_choice(subject, ids, last):
    """The most likely answers (P,) to prompts (P, T)."""
    student = subject.student
    if student is None:
        return subject.logits(subject.lm.embed(ids), last).argmax(-1)
    normed = student.predict(ids, ids == student.mask_id)                           # (P, T-1, D)
    return student.logits(normed[torch.arange(len(ids), device=ids.device), last]).argmax(-1)


@torch.no_grad()
def solved(subject, batch):
    """(P,) bool: both answers, clean and corrupted, are the model's first choice."""
    right = []
    for part in split(batch, 64):
        clean = first_choice(subject, part["clean"], part["last"]) == part["answer"]
        corrupted = first_choice(subject, part["corrupted"], part["last"]) == part["wrong"]
        right.append(clean & corrupted)
    return torch.cat(right)


# -------------------------------------------------------------------------------------------------
# One task

def study(task, subjects, pieces, eos, cfg):
    """(result of a task, {(subject, set of prompts): scores (S, R)})."""
    result = {"group": TASKS[task][0], "pairs": 0, "solved": {}, "overlap": {}, "zeroing": {}}
    # 1. Who solves which prompts
    seeds = [1000 * cfg.seed + s for s in range(cfg.resamples)]
    sets = [examples(task, pieces, 4 * cfg.pairs, seed) for seed in seeds]
    batches = {}
    right = {}
    for x in subjects:
        batches[x.name] = [make_batch(pairs, x, eos) for pairs in sets]
        right[x.name] = torch.stack([solved(x, batch) for batch in batches[x.name]])
        result["solved"][x.name] = right[x.name].double().mean().item()             # of (sets, P)

    # 2. The prompts that all able models solve; attribution is for two-way and causal attention
    able = [x for x in subjects if x.name != UNTRAINED and result["solved"][x.name] >= LEAST
            and (x.student is None or x.student.arm.attention == "bidirectional")]
    if subjects[0] not in able or len(able) < 2:
        return result, {}
    shared = torch.stack([right[x.name] for x in able]).all(0)                      # (sets, P)
    fewest = int(shared.sum(1).min())
    if fewest < FEWEST:
        return result, {}
    result["pairs"] = min(cfg.pairs, fewest)

    # 3. Attribution, of the untrained model too, whether it solves the task or not
    compared = [x for x in subjects if x in able or x.name == UNTRAINED]
    scores = {}
    for x in compared:
        for s, batch in enumerate(batches[x.name]):
            batch = take(batch, shared[s].nonzero()[:cfg.pairs, 0])
            scores[x.name, s] = attribute(x, split(batch, cfg.micro_batch), cfg.ig_steps)
            batches[x.name][s] = batch

    # 4. Overlap of the circuits, and what the AR model's is good for
    edges = subjects[0].graph().edges()
    circuits = {key: strongest(value, edges, cfg.k) for key, value in scores.items()}
    result["overlap"] = overlaps(circuits, compared)
    for x in able:
        result["zeroing"][x.name] = zeroing(x, batches[x.name][0], scores["AR", 0], cfg)
    return result, scores


def zeroing(subject, batch, scores, cfg):
    """Share of the prompts still solved without the components whose edges in the AR model's
    circuit carry the most, and without random ones."""
    graph = subject.graph()
    weight = torch.zeros(len(graph.senders), dtype=scores.dtype)
    for edge in strongest(scores, graph.edges(), cfg.k):
        sender, receiver = divmod(edge, len(graph.receivers))
        weight[sender] += scores[sender, receiver].abs()
    names = graph.senders[1:]                           # the embedding stays
    count = min(ZEROED, len(names) // 2)
    top = [names[i] for i in weight[1:].topk(count).indices.tolist()]
    others = [name for name in names if name not in top]
    gen = generator(cfg.seed, "controls")

    def left(components):
        with without(subject, components):
            return solved(subject, batch).double().mean().item()

    controls = [left(gen.choice(others, count, replace=False)) for _ in range(SAMPLES)]
    return {"components": top, "intact": left([]), "strongest": left(top),
            "random": statistics.mean(controls)}


# -------------------------------------------------------------------------------------------------
# Report

def show(result):
    """The table on the terminal."""
    rows = []
    for task, numbers in result["tasks"].items():
        for subject in result["subjects"]:
            overlap = numbers["overlap"].get(subject["kind"], {})
            zeroed = numbers["zeroing"].get(subject["name"])
            row = [task, subject["name"], f"{numbers['solved'][subject['name']]:.0%}"]
            for comparison in ("ar", "prompts", "seeds"):
                values = overlap.get(comparison)
                row.append(report.plus_minus(values, ".2f") if values else None)
            for components in ("strongest", "random"):
                row.append(f"{zeroed[components]:.0%}" if zeroed else None)
            rows.append(row)
    columns = ["task", "model", "solved", "overlap with AR", "other prompts", "other seed",
               f"left without {ZEROED} strongest", f"without {ZEROED} random"]
    print(report.table(columns, rows))
    print(f"overlap by chance: {result['chance']:.3f}")


def draw(result, path):
    """Overlap with the AR model's circuit, task by task."""
    tasks = [name for name, task in result["tasks"].items() if task["overlap"]]
    converted = dict.fromkeys(x["kind"] for x in result["subjects"][2:])
    series = [("AR", "prompts", report.BLACK, "AR, other prompts"),
              (UNTRAINED, "ar", report.GREY, UNTRAINED)]
    for kind, color in zip(converted, itertools.cycle(COLORS)):
        series.append((kind, "ar", color, kind))
    with report.figure(path, width=3 + len(tasks)) as axes:
        ax = axes[0, 0]
        for place, (kind, comparison, color, label) in enumerate(series):
            x = []
            y = []
            for i, name in enumerate(tasks):
                values = result["tasks"][name]["overlap"].get(kind, {}).get(comparison, [])
                x += [i + 0.1 * place] * len(values)
                y += values
            if y:
                ax.plot(x, y, "o", color=color, alpha=0.7, label=label)
        floors = [(result["chance"], report.GREY, "chance")]
        if result["other_tasks"]:
            mean = statistics.mean(result["other_tasks"])
            floors.append((mean, report.BLACK, "AR, other tasks"))
        right = len(tasks) - 0.5
        for floor, color, label in floors:
            ax.hlines(floor, -0.2, right, color=color, linestyle=":", label=label)
        ax.set_xticks(range(len(tasks)), tasks)
        ax.set(ylim=(0, 1), xlim=(-0.2, right + 1.5),          # room for the legend
               ylabel=f"Jaccard index of {result['k']} edges",
               title="Overlap with the AR model's circuit (higher: more alike)")


# -------------------------------------------------------------------------------------------------
# Main

def find_converted(cfg, model, base):
    """[(folder, its result.json)] of models that were converted from `base`. Those with attention
    by token blocks are only asked what they solve, and only if they are named."""
    near = Path(model).parent
    finished_runs = [*near.glob("*/result.json"), *near.glob("convert/*/result.json")]
    folders = cfg.converted or sorted(file.parent for file in finished_runs)
    twins = []
    for folder in map(Path, folders):
        info = read_json(folder / "result.json", "convert a model with: python repr_align.py")
        suits = info.get("base") == base and "mask_id" in info
        if suits and (cfg.converted or info["attention"] == "bidirectional"):
            twins.append((folder, info))
    if len(twins) < max(1, len(cfg.converted)):
        raise UserError(f"{', '.join(cfg.converted) or near} must hold models that were converted from "
                        f"{model}; make one with: python repr_align.py --model {model} "
                        f"--align_weight 0 --out {near}/w0")
    return twins


def load_subjects(model, twins, device):
    """The AR model first, then the untrained model and the converted ones."""
    subjects = [Subject(backbone.load(model, device, torch.float32))]
    lm = backbone.load(model, device, torch.float32)
    mask_id = masked.add_mask(lm, backbone.load_tokenizer(model))
    subjects.append(Subject(lm, masked.Student(lm, mask_id), UNTRAINED, UNTRAINED))
    for folder, info in twins:
        student, _ = masked.load_converted(folder, device, torch.float32)
        kind = f"converted, w = {info['align_weight']:g}"
        if info["attention"] == "block":
            kind += f", {student.arm}"
        subjects.append(Subject(student.lm, student, f"{kind}, seed {info['seed']}", kind))
    assert len({x.name for x in subjects}) == len(subjects), "two converted models of one weight and seed"
    return subjects


def model_of(cfg):
    return cfg.model or str(beside(cfg.out, "tasks") / "toy")


def choose_preset(cfg):
    if cfg.preset != "auto":
        return cfg.preset
    return backbone.preset_of(model_of(cfg), cfg.out)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, choose_preset)
    for task in cfg.tasks:
        pick(TASKS, task, "--tasks")
    world = setup(cfg.device)
    model = backbone.resolve(model_of(cfg), cfg.out)
    base = backbone.identity(model)
    twins = find_converted(cfg, model, base)
    identity = {"base": base, "weights": [backbone.identity(folder) for folder, _ in twins]}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result

    subjects = load_subjects(model, twins, world.device)
    tokenizer = backbone.load_tokenizer(model)
    pieces = Pieces(tokenizer)
    graph = subjects[0].graph()
    edges = graph.edges()
    count = int(edges.sum())
    assert 0 < cfg.k <= count, f"--k {cfg.k}: the model has {count} edges"
    run = Run(cfg, world, identity)

    results = {}
    scores = {}
    for task in cfg.tasks:
        results[task], task_scores = study(task, subjects, pieces, tokenizer.eos_token_id, cfg)
        for (name, s), value in task_scores.items():
            scores[name, s, task] = value
        run.say(f"{task}: {'analysed' if task_scores else 'not solved by two models'}")
    with atomic(run.out / "scores.safetensors") as temporary:
        save_file({"/".join(map(str, key)): value for key, value in scores.items()}, temporary)
    result = {**identity, "k": cfg.k, "seed": cfg.seed, "tasks": results, "edges": count,
              "chance": chance(cfg.k, count), "other_tasks": other_tasks(scores, edges, cfg.k),
              "senders": graph.senders, "receivers": graph.receivers,
              "subjects": [{"name": x.name, "kind": x.kind} for x in subjects]}
    if scores:
        draw(result, run.out / "circuits.png")
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
