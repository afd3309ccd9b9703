"""circuits.py: COMPARE. Which edges of the network solve a task, before and after conversion to masked diffusion?

    python circuits.py --model out/tasks/toy                                # all tasks, both twins: ~10 s, 2 cores
    python circuits.py --model out/tasks/toy --patch 50 --out out/patched   # and the strongest edges patched exactly
    python circuits.py --model out/tasks/toy --task countdown --ablate a1.0,m0 --out out/without    # without these

Attribution of one model and of its converted twins on the tasks of tasks.py. Two circuits are compared by the Jaccard
index of their strongest edges, between a floor (chance) and two ceilings (the same model on other prompts; a twin of
another seed). The paper finds that tasks of the prefix keep their circuit and global ones do not: see what you get.
Writes result.json, circuits.png and scores.safetensors (every edge) to --out.

Edges, senders and receivers are those of attribution.py: `a1.3` is head 3 of block 1, `m1` its MLP, counted from 0.

Letters: P pairs, T tokens, L blocks, S senders, R receivers, k edges in a circuit.
"""
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from core import backbone, masked
from core.attribution import Subject, attribute, patch, without
from core.common import UserError, entry, parse, setup
from core.draws import generator
from core.run import Run, atomic, finished, read_json
from core.run import beside as beside_out
from core.stats import plus_minus, spearman
from core.tasks import GLOBAL, TASKS, Pair, Pieces, examples


@dataclass
class Config:
    model: str = "toy"          # the AR model: toy (the folder beside --out), a folder or a Hub id
    twins: str = ""             # folders of converted models, comma-separated (empty: all in repr_align beside --model)
    out: str = "out/circuits"   # run folder
    task: str = "all"           # all, or one or more of induction, brackets, missing, countdown
    seed: int = 0               # of the prompts
    device: str = "auto"        # auto, cpu, cuda
    pairs: int = 64             # pairs of prompts per task, of those that all models solve
    resamples: int = 3          # sets of prompts: the spread, and the first ceiling
    ig_steps: int = 5           # points on the way from the corrupted to the clean embedding (0: plain EAP)
    k: int = 100                # edges in a circuit; the sweep goes over others too
    least: float = 0.5          # a task that a model solves less often is not analysed for it
    micro_batch: int = 16       # pairs at a time
    patch: int = 0              # exactly patch so many of the strongest edges and four times as many random ones
    ablate: str = ""            # components to zero besides the strongest ones, such as a1.3,m0
    dry_run: bool = False       # print the graph's size, then leave


SWEEP = (10, 30, 100, 300)


# ------------------------------------------------------------------------------------------------------ comparison
def strongest(scores, edges, k):
    """The k edges with the largest |score|, as a set of flat indices into (S, R)."""
    return set(scores.abs().masked_fill(~edges, -1).flatten().topk(k).indices.tolist())


def jaccard(a, b):
    return len(a & b) / len(a | b)


def chance(k, n):
    """Jaccard index of two random sets of k out of n: k^2/n in common, of 2k - k^2/n (to first order)."""
    return (k / n) / (2 - k / n)


def components(scores, edges, k, graph):
    """Per sender (S,) the sum of |score| over those of the k strongest edges that leave it or enter it. A key head that
    serves several heads is shared out among them."""
    flat = torch.zeros(scores.numel(), dtype=torch.float64)
    chosen = list(strongest(scores, edges, k))
    flat[chosen] = scores.flatten()[chosen].abs()
    weight, place = flat.view_as(scores), {name: j for j, name in enumerate(graph.senders)}
    total, H = weight.sum(1), sum(name.startswith("a0.") for name in graph.senders)
    heads = {p: sum(n.startswith("a0.") and n.endswith(p) for n in graph.receivers) for p in "qkv"}
    for r, name in enumerate(graph.receivers[:-1]):                              # the logits are no component
        if name in place:
            total[place[name]] += weight[:, r].sum()
            continue
        where, h, part = name.split(".")
        group = H // heads[part]
        for head in range(int(h) * group, (int(h) + 1) * group):
            total[place[f"{where}.{head}"]] += weight[:, r].sum() / group
    return total


def gini(x):
    """Inequality of x (n,): 0 when all are equal, 1 - 1/n when one has all."""
    x, n = x.double().sort().values, len(x)
    return float(((2 * torch.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum().clamp_min(1e-30)))


def entropy(x):
    """Entropy of x / sum(x) over its maximum ln n: 1 when all are equal."""
    p = x.double() / x.sum().clamp_min(1e-30)
    return float(-torch.xlogy(p, p).sum() / math.log(len(x)))


def depth(scores, edges, graph, L):
    """Share of |score| by the sender's block: (L + 1,), the embedding first."""
    weight, share = (scores.abs() * edges).sum(1), torch.zeros(L + 1, dtype=torch.float64)
    for s, name in enumerate(graph.senders):
        share[0 if name == "embed" else 1 + int(name[1:].split(".")[0])] += weight[s]
    return share / share.sum().clamp_min(1e-30)


def pairing(all_scores, edges, k):
    """Mean and spread of the Jaccard index over the given pairs of score matrices [(a, b), ...]."""
    values = [jaccard(strongest(a, edges, k), strongest(b, edges, k)) for a, b in all_scores]
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values)} if values else None


# ----------------------------------------------------------------------------------------------- prompts, effects
def stack(pairs, device):
    """Pairs of one length -> a batch of tensors: clean, corrupted (P, T), answer, wrong (P,)."""
    return {k: torch.tensor([getattr(p, k) for p in pairs], device=device) for k in Pair._fields if k != "rest"}


def slices(batch, size):
    return [dict(zip(batch, part, strict=True)) for part in zip(*(v.split(size) for v in batch.values()), strict=True)]


@torch.no_grad()
def solved(subject, batch, which="clean", size=64):
    """(P,) bool: the model's first choice among all tokens is the right one."""
    goal = {"clean": "answer", "corrupted": "wrong"}[which]
    return torch.cat([subject.run(subject.embed(part[which])).argmax(-1) == part[goal]
                      for part in slices(batch, size)])


def zeroing(subject, batch, scores, graph, edges, cfg, extra):
    """What zeroing components costs: share of prompts still solved, intact, without the three components that carry
    the most by `scores` (the AR model's, so that twins are asked about its circuit), without three random ones and
    without three of the same kind and block or nearest to it (five draws each)."""
    weight = components(scores, edges, cfg.k, graph)[1:]                                     # the embedding stays
    names, gen = graph.senders[1:], generator(cfg.seed, "controls")
    count = min(3, len(names) // 2)
    top = [names[j] for j in weight.topk(count).indices.tolist()]

    def left(components_):
        with without(subject, components_):
            return solved(subject, batch).double().mean().item()
    others = [n for n in names if n not in top]
    random = [list(gen.choice(others, count, replace=False)) for _ in range(5)]
    block = {n: int(n[1:].split(".")[0]) for n in names}
    matched = []
    for _ in range(5):
        free, chosen = list(others), []
        for name in top:
            same = [n for n in free if n[0] == name[0]] or free
            near = min(abs(block[n] - block[name]) for n in same)
            chosen.append(str(gen.choice([n for n in same if abs(block[n] - block[name]) == near])))
            free.remove(chosen[-1])
        matched.append(chosen)
    return {"components": top, "intact": left([]), "strongest": left(top),
            "random": statistics.mean(map(left, random)), "matched": statistics.mean(map(left, matched)),
            **({"asked": {"components": extra, "left": left(extra)}} if extra else {})}


def check(subject, batch, graph, edges, cfg):
    """Attribution with 10 points, and without any, against exact patching on 16 pairs: over the --patch strongest edges
    and four times as many random ones."""
    n = min(cfg.patch, int(edges.sum()) // 5)
    small = {k: v[:16] for k, v in batch.items()}
    fine, plain = (attribute(subject, slices(small, cfg.micro_batch), steps) for steps in (10, 0))
    top = sorted(strongest(fine, edges, n))
    rest = np.array(sorted(set(edges.flatten().nonzero()[:, 0].tolist()) - set(top)))
    random = sorted(generator(cfg.seed, "patched").choice(rest, 4 * n, replace=False).tolist())
    places = [divmod(e, edges.shape[1]) for e in top + random]
    exact, out = patch(subject, small, places), {"edges": len(places), "pairs": len(small["clean"])}
    for name, scores in (("eap_ig", fine), ("eap", plain)):
        guess = [scores[p].item() for p in places]
        out[name] = {"pearson": float(np.corrcoef(exact, guess)[0, 1]), "spearman": spearman(exact, guess)}
    return out


def study(name, subjects, pieces, cfg, device):
    """One task: who solves it, and the circuits of those who do. Returns (result, {(subject, set): scores}).

    1 prompts that every such model solves, clean and corrupted (`common`: share of a set that recurs in others)
    2 attribution, for `resamples` sets of prompts
    3 overlap of circuits, with floor and ceilings  4 where the attribution lies  5 zeroing, exact patching"""
    batches, found = [], {"group": "global" if name in GLOBAL else "prefix"}
    drawn = [stack(examples(name, pieces, 4 * cfg.pairs, 1000 * cfg.seed + s), device) for s in range(cfg.resamples)]
    if drawn[0]["clean"].shape[1] >= subjects[0].lm.config.max_position_embeddings:
        raise UserError(f"the prompts of {name} are longer than the model's positions; use another model")
    right = {x.name: [solved(x, b) & solved(x, b, "corrupted") for b in drawn] for x in subjects}
    found["solved"] = {n: torch.cat(r).double().mean().item() for n, r in right.items()}
    able = [x for x in subjects if found["solved"][x.name] >= cfg.least]
    pool = [torch.stack([right[x.name][s] for x in able]).all(0) if able else None for s in range(cfg.resamples)]
    if subjects[0] not in able or len(able) < 2 or min(int(p.sum()) for p in pool) < 4:
        return {**found, "usable": False}, {}
    for some, p in zip(drawn, pool, strict=True):
        batches.append({k: v[p][:cfg.pairs] for k, v in some.items()})
    graph, L = able[0].graph(), able[0].lm.L
    edges, start = graph.edges(), time.perf_counter()
    scores = {(x.name, s): attribute(x, slices(b, cfg.micro_batch), cfg.ig_steps)
              for x in able for s, b in enumerate(batches)}
    prompts = [{tuple(row) for row in b["clean"].tolist()} for b in batches]
    common = [len(p & set().union(*prompts[:s], *prompts[s + 1:])) / len(p) for s, p in enumerate(prompts)]
    found |= {"usable": True, "common": statistics.mean(common), "pairs": min(len(b["clean"]) for b in batches),
              "seconds": (time.perf_counter() - start) / len(scores), "overlap": {}, "models": {}}
    kinds = dict.fromkeys(x.kind for x in able[1:])
    sets = range(cfg.resamples)
    for k in sorted({*SWEEP, cfg.k}):
        if k > int(edges.sum()):
            continue
        row = {"chance": chance(k, int(edges.sum())),
               "AR, other prompts": pairing([(scores["AR", s], scores["AR", t]) for s in sets for t in sets if s < t],
                                            edges, k)}
        for kind in kinds:
            own = [x.name for x in able if x.kind == kind]
            row[f"AR and {kind}"] = pairing([(scores["AR", s], scores[n, s]) for n in own for s in sets], edges, k)
            row[f"{kind}, other prompts"] = pairing([(scores[n, s], scores[n, t]) for n in own for s in sets
                                                     for t in sets if s < t], edges, k)
            row[f"{kind}, other seed"] = pairing([(scores[n, s], scores[m, s]) for n in own for m in own if n < m
                                                  for s in sets], edges, k)
        found["overlap"][str(k)] = {n: v for n, v in row.items() if v is not None}
    for kind in ["AR", *kinds]:
        own = [scores[x.name, s] for x in able if x.kind == kind for s in sets]
        shares = torch.stack([depth(o, edges, graph, L) for o in own])                         # (n, L + 1)
        weights = [components(o, edges, cfg.k, graph) for o in own]
        where = [float((share * torch.arange(L + 1)).sum()) for share in shares]
        found["models"][kind] = {
            "depth": shares.mean(0).tolist(), "mean_depth": where, "gini": [gini(w) for w in weights],
            "entropy": [entropy(w) for w in weights]}
    found["zeroing"] = {x.name: zeroing(x, batches[0], scores["AR", 0], graph, edges, cfg,
                                        cfg.ablate.split(",") if cfg.ablate else []) for x in able}
    if cfg.patch:
        found["patching"] = {x.name: check(x, batches[0], graph, edges, cfg) for x in able}
    return found, scores


# --------------------------------------------------------------------------------------------------------- report
def verdicts(result):
    """A sentence a task, from the numbers."""
    for name, found in result["tasks"].items():
        percent = ", ".join(f"{n} {v:.0%}" for n, v in found["solved"].items())
        if not found["usable"]:
            yield f"{name} ({found['group']}): not analysed, too few prompts are solved ({percent})"
            continue
        row = found["overlap"][str(result["k"])]
        shared = "; ".join(f"{n} {v['mean']:.2f}" for n, v in row.items() if n != "chance")
        where = ", ".join(f"{kind} {plus_minus(m['mean_depth'], '.2f')}" for kind, m in found["models"].items())
        yield (f"{name} ({found['group']}): overlap of the {result['k']} strongest edges {shared}; by chance "
               f"{row['chance']:.2f}. Mean block of attribution: {where}. Solved: {percent}. Prompts that recur in "
               f"another set: {found['common']:.0%}")


def table(result):
    """Markdown: a row for a task and model."""
    k = str(result["k"])
    lines = [f"| task | group | model | solved | overlap with AR, K = {k} | chance-adjusted | itself, other prompts "
             "| other seed | mean block (0: embedding) | Gini | entropy | left without the AR model's 3 strongest | "
             "without 3 random | without 3 matched |",
             "|---" * 14 + "|"]
    for name, found in result["tasks"].items():
        if not found["usable"]:
            lines.append(f"| {name} | {found['group']} | not analysed | "
                         + ", ".join(f"{n} {v:.0%}" for n, v in found["solved"].items()) + " |" + " |" * 10)
            continue
        row = found["overlap"][k]

        def cell(key, row=row):
            return "-" if key not in row else f"{row[key]['mean']:.2f}" + (
                f" +- {row[key]['sd']:.2f}" if row[key]["sd"] is not None else "")
        for kind in dict.fromkeys(n.split(", seed")[0] for n in found["solved"]):
            solves = [v for n, v in found["solved"].items() if n.split(", seed")[0] == kind]
            if kind not in found["models"]:
                lines.append(f"| {name} | {found['group']} | {kind} | {plus_minus(solves, '.2f')}: not analysed |"
                             + " |" * 10)
                continue
            model = found["models"][kind]
            zero = [z for n, z in found["zeroing"].items() if n.split(", seed")[0] == kind]
            over = row.get(f"AR and {kind}")
            adjusted = "-" if over is None else f"{(over['mean'] - row['chance']) / (1 - row['chance']):.2f}"
            lines.append(f"| {name} | {found['group']} | {kind} | {plus_minus(solves, '.2f')} | {cell(f'AR and {kind}')} | "
                         f"{adjusted} | {cell(f'{kind}, other prompts')} | {cell(f'{kind}, other seed')} | "
                         + " | ".join(plus_minus(model[key], ".2f") for key in ("mean_depth", "gini", "entropy")) + " | "
                         + " | ".join(plus_minus([z[key] for z in zero], ".2f")
                                      for key in ("strongest", "random", "matched")) + " |")
    return "\n".join(lines)


def figure(result, scores, path):
    """A row for a task: where edges lead in the AR model and in each kind of twin, overlap against K, depth."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    usable = [n for n, f in result["tasks"].items() if f["usable"]]
    kinds = list(dict.fromkeys(k for n in usable for k in result["tasks"][n]["models"]))
    fig, axes = plt.subplots(max(1, len(usable)), len(kinds) + 2, squeeze=False, constrained_layout=True,
                             figsize=(2.6 * (len(kinds) + 2), 2.5 * max(1, len(usable))))
    colors = {kind: plt.cm.plasma(i / len(kinds)) for i, kind in enumerate(kinds)}
    for row, name in zip(axes, usable, strict=False):
        found = result["tasks"][name]
        for ax, kind in zip(row, kinds, strict=False):
            ax.set(title=f"{name}: {kind}", xlabel="from (0: embedding)", ylabel="to (last: logits)")
            if (mine := next((s for (n, _, task), s in scores.items() if n.split(", seed")[0] == kind
                              and task == name), None)) is not None:
                ax.imshow(by_block(mine, result).numpy(), origin="lower", cmap="magma_r")
            else:
                ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
                ax.text(0.5, 0.5, "not solved\noften enough", ha="center", va="center", fontsize=8)
        for title, color in colors.items():
            points = [(int(k), r[f"AR and {title}"]["mean"]) for k, r in found["overlap"].items()
                      if f"AR and {title}" in r]
            if points:
                row[-2].plot(*zip(*points), "o-", markersize=3, color=color, label=f"AR and {title}")
            if title in found["models"]:
                row[-1].plot(found["models"][title]["depth"], color=color, label=title)
        for key, style in (("chance", ":"), ("AR, other prompts", "--")):
            points = [(int(k), r[key] if key == "chance" else r[key]["mean"]) for k, r in found["overlap"].items()
                      if key in r]
            if points:
                row[-2].plot(*zip(*points), style, color="#30638e", label=key)
        row[-2].set(xscale="log", xlabel="K strongest edges", ylabel="Jaccard", ylim=(0, 1), title="overlap")
        row[-1].set(xlabel="sender's block (0: embedding)", ylabel="share", title="depth of attribution")
    for ax in axes[0, -2:]:
        if usable:
            ax.legend(fontsize=6, frameon=False)
    for ax in axes.flat:
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110, format="png")
    plt.close(fig)


def by_block(scores, result):
    """|score| summed by the blocks of receiver (rows, the logits last) and sender (columns, the embedding first):
    (L + 1, L + 1)."""
    def block(name):
        return int(name[1:].split(".")[0])
    L = result["layers"]
    left = torch.tensor([0 if n == "embed" else 1 + block(n) for n in result["senders"]])
    right = torch.tensor([L if n == "logits" else block(n) for n in result["receivers"]])
    total = torch.zeros(L + 1, L + 1, dtype=torch.float64)
    total.index_put_((right[None].expand(scores.shape), left[:, None].expand(scores.shape)), scores.abs(),
                     accumulate=True)
    return total


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    names = list(TASKS) if "all" in cfg.task.split(",") else cfg.task.split(",")
    unknown = [n for n in names if n not in TASKS]
    if unknown:
        raise UserError(f"--task {unknown[0]}: no such task; there are all, {', '.join(TASKS)}")
    world = setup(cfg.device)
    dtype = torch.float32
    model = backbone.resolve(cfg.model, cfg.out)
    beside = Path(model).parent / "repr_align"
    beside = beside if beside.exists() else beside_out(cfg.out, "repr_align")
    twins = [Path(t) for t in cfg.twins.split(",")] if cfg.twins else sorted(f.parent for f in beside.glob(
        "*/result.json"))
    if not twins and not cfg.dry_run:
        raise UserError(f"there is no converted model in {beside}; make one with: python repr_align.py")
    identity = {"base": backbone.identity(model), "weights": [backbone.identity(t) for t in twins]}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(table(result))
        return result

    # ------------------------------------------------------------------------------------------------- setup
    subjects = [Subject(backbone.load(model, world.device, dtype))]
    graph = subjects[0].graph()
    count = int(graph.edges().sum())
    if cfg.k > count:
        raise UserError(f"--k {cfg.k} is more than the {count} edges of this model")
    with without(subjects[0], cfg.ablate.split(",") if cfg.ablate else []):
        pass                                                                     # unknown names are refused now
    if cfg.dry_run:
        print(f"{model}: {len(graph.senders)} senders, {len(graph.receivers)} receivers, {count} edges; twins: "
              f"{', '.join(map(str, twins))}")
        return None
    for folder in twins:
        about = read_json(folder / "result.json", "finish that run first")
        if about.get("base") != identity["base"]:
            raise UserError(f"{folder} was converted from another model than {model}; pass its own as --model")
        student, _ = masked.load_converted(folder, world.device, dtype)
        kind = f"masked, w = {about['w']:g}"
        if f"{kind}, seed {about['seed']}" in [x.name for x in subjects]:
            raise UserError(f"{folder} is a second twin with w = {about['w']:g} and seed {about['seed']}; name those "
                            "to compare with --twins")
        subjects.append(Subject(student.lm, student, f"{kind}, seed {about['seed']}", kind))
    run = Run(cfg, world, identity)

    # --------------------------------------------------------------------------------------------- study, result
    scores, found, pieces = {}, {}, Pieces(backbone.load_tokenizer(model))
    for name in names:
        found[name], own = study(name, subjects, pieces, cfg, world.device)
        scores |= {(*key, name): value for key, value in own.items()}
    result = {**identity, "tasks": found, "k": cfg.k, "edges": count, "layers": subjects[0].lm.L, "seed": cfg.seed,
              "senders": graph.senders, "receivers": graph.receivers, "resamples": cfg.resamples,
              "ig_steps": cfg.ig_steps}
    with atomic(run.out / "scores.safetensors") as temporary:
        save_file({"/".join(map(str, key)): value for key, value in scores.items()}, temporary)
    with atomic(run.out / "circuits.png") as temporary:
        figure(result, scores, temporary)
    run.finish({**result, "verdicts": list(verdicts(result))})
    print("\n".join(f"- {line}" for line in run.result["verdicts"]))
    return run.result


if __name__ == "__main__":
    main()
