"""sweep.py: does the score of geometry.py foretell which layer a bridge can replace? And better than depth does?

    python sweep.py --pool                       # the toy, 3 seeds, and seven more backbones: ~40 min on 2 cores
    python sweep.py --out out/sweep_toy          # the toy alone, layers 1 to 7, diffusion and control: ~12 min
    python sweep.py --seeds 1 --layers 1,4,7 --steps 50 --out out/sweep_look      # a quick look
    python sweep.py --blocks 0 --seeds 1 --layers 1,3,5,7 --out out/sweep_matched    # each as deep as what it replaces

Every layer of a backbone gets the same network, batches and steps; each run is an ordinary one of bridge.py under
--out, so an interrupted sweep goes on where it stopped. Beside them stand bridges that need no training (h[0] itself,
ridge regression on it, the mean state of each token), predictors that need no geometry (depth, norm, distance), and all
variants of the score. Its definition was fixed before any bridge was looked at. Writes result.json, sweep.md and
sweep.png to --out.

Letters: B batch, T tokens, D hidden width, L blocks, C = L - 1 layers that can be chosen, R resamples.
"""
import itertools
import math
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

import bridge
import data
from core import backbone
from core.common import UserError, entry, parse, setup
from core.denoiser import load
from core.draws import generator
from core.run import Run, atomic, finished, read_json
from core.stats import permutation_p, plus_minus, spearman
from studies.ablate import execute


@dataclass
class Config:
    model: str = "out/toy"      # a finished backbone of toy.py, with its shards in `data` beside it
    data: str = "stdlib"        # text of the backbones that --pool trains
    out: str = "out/sweep"      # folder of the runs and the table
    pool: bool = False          # also on the backbones below, made under --out
    layers: str = ""            # only these, such as 1,4,7 (empty: 1 to L - 1)
    seeds: int = 3              # training seeds on the model (one on the others)
    blocks: int = 2             # of every bridge (0: as many as it replaces)
    steps: int = 300            # of each bridge
    batch_size: int = 8         # sequences a step
    eval_batches: int = 64      # held-out sequences of each bridge's numbers
    jobs: int = 2               # runs at a time, one thread each
    seed: int = 0               # the first training seed
    dry_run: bool = False       # print the commands, then leave


POOL = {  # name -> flags of toy.py, or what is done to the blocks of --model
    "deep (12 x 96)": "--layers 12 --width 96 --heads 3 --steps 500", "young (100 steps)": "--steps 100",
    "tasks": "--tasks 0.6 --steps 500", "prose (manual)": "--steps 500 --data {manual}",
    "shuffled": "shuffle", "untrained": "untrain", "middle untrained": "middle"}


# ------------------------------------------------------------------------------------------------------ backbones
def altered(model, how, out, seed):
    """A copy of the model's folder at `out` whose blocks are shuffled, or all or the middle ones drawn anew."""
    if (out / "result.json").exists():
        return
    lm = backbone.load(model, torch.device("cpu"), torch.float32)
    fresh = backbone.load(model, torch.device("cpu"), torch.float32, random_init=True)
    L, order = lm.L, generator(seed, "shuffle").permutation(lm.L)
    states = [block.state_dict() for block in lm.blocks]
    copies = [{k: v.clone() for k, v in s.items()} for s in states]
    for i, block in enumerate(lm.blocks):
        if how == "shuffle":
            block.load_state_dict(copies[order[i]])
        elif how == "untrain" or L // 3 <= i < L - L // 3:
            block.load_state_dict(fresh.blocks[i].state_dict())
    shutil.copytree(model, out, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.safetensors", "result.json", ".lock", "log.jsonl"))
    backbone.save_model(lm.model, backbone.load_tokenizer(model), out)
    shutil.copy(Path(model) / "result.json", out / "result.json")


def manual(folder):
    """The folder with Python's own manual, in English, one text file a topic: it lies in every installation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder


def backbones(cfg):
    """name -> (folder of the model, folder of its shards, seeds). Those of POOL are made where they are missing."""
    found = {"toy": (Path(cfg.model), Path(cfg.model).parent / "data", cfg.seeds)}
    if not cfg.pool:
        return found
    for name, how in POOL.items():
        home = Path(cfg.out) / name.split(" (")[0].replace(" ", "_")
        if how.startswith("--"):
            flags = [str(manual(home / "text")) if flag == "{manual}" else flag for flag in how.split()]
            source = [] if "--data" in flags else ["--data", cfg.data]
            execute([(name, [sys.executable, str(Path(__file__).with_name("toy.py")), "--out", str(home / "toy"),
                             *flags, *source])], 1, threads=2)
            found[name] = home / "toy", home / "data", 1
        else:
            home.mkdir(parents=True, exist_ok=True)
            altered(cfg.model, how, home / "toy", cfg.seed)
            found[name] = home / "toy", Path(cfg.model).parent / "data", 1
    return found


def cells(cfg, name, model, shards, seeds):
    """Every run on one backbone: (kind, layer, seed, folder, command); the geometry has layer 0."""
    here, home = Path(__file__).parent, Path(cfg.out) / name.split(" (")[0].replace(" ", "_")
    L = read_json(model / "config.json")["num_hidden_layers"]
    wanted = sorted({int(i) for i in cfg.layers.split(",")}) if cfg.layers else list(range(1, L))
    if not set(wanted) <= set(range(1, L)):
        raise UserError(f"--layers {cfg.layers}: this backbone has layers 1 to {L - 1} to choose from")
    common = ["--model", str(model), "--data", str(shards)]
    folder = home / "geometry"
    yield "geometry", 0, 0, folder, [sys.executable, str(here / "geometry.py"), *common, "--out", str(folder)]
    for seed, layer, kind in itertools.product(range(cfg.seed, cfg.seed + seeds), wanted,
                                               ("diffusion", "regression")[:1 if name != "toy" else 2]):
        folder = home / f"{kind}_layer{layer}_seed{seed}"
        yield kind, layer, seed, folder, [
            sys.executable, str(here / "bridge.py"), *common, "--layer", str(layer), "--seed", str(seed), "--objective",
            kind, "--blocks", str(cfg.blocks), "--steps", str(cfg.steps), "--batch_size", str(cfg.batch_size),
            "--eval_batches", str(cfg.eval_batches), "--noise_seeds", "1", "--out", str(folder)]


# ------------------------------------------------------------------------------------------------ without training
@torch.no_grad()
def untrained(lm, net, train, held_out, layer, skip):
    """FVU of three bridges that need no gradient, in the units of the trained ones (z standardised, positions >= skip):
    h[0] itself (in z's units), ridge regression from h[0], and the mean state of each token. train, held_out (N, T)."""
    def pairs(rows):
        z, c, ids = [], [], []
        for some in rows.split(8):
            a, b = bridge.targets(lm, net, some, layer)
            z, c, ids = [*z, a[:, skip:]], [*c, b[:, skip:]], [*ids, some[:, skip:]]
        return (torch.cat(part).flatten(0, 1) for part in (z, c, ids))               # (n, D), (n, D), (n,)
    z, c, ids = pairs(train)
    z2, c2, ids2 = pairs(held_out)
    one = torch.cat([c, torch.ones(len(c), 1)], 1).double()                          # (n, D + 1)
    gram = one.T @ one
    weights = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), one.T @ z.double())
    ridge = (torch.cat([c2, torch.ones(len(c2), 1)], 1).double() @ weights).float()
    count = torch.bincount(ids, minlength=lm.V)[:, None]                             # (V, 1)
    total = torch.zeros(lm.V, z.shape[1]).index_add_(0, ids, z)
    mean = (total + z.mean(0)) / (count + 1)                                         # a pseudo-count at the mean
    same = (net.mu_c + net.sigma_c * c2 - net.mu_z) / net.sigma_z                    # h[0] in the units of z
    energy = z2.square().sum()
    return {name: float((guess - z2).square().sum() / energy)
            for name, guess in (("identity", same), ("ridge", ridge), ("token mean", mean[ids2]))}


# ----------------------------------------------------------------------------------------------------- statistics
def correlations(geometry, layers, fvu, seed=0):
    """Spearman of each predictor with -FVU over layers. fvu (seeds, C). Intervals: the score's replicates (sequences,
    anchors; from geometry.py) and the bridges' seeds are resampled together; a difference to the score uses the same
    resamples. Only the score is measured with noise, depth is not, so noise lowers the score's rho in the resamples and
    the differences' intervals lean against it. Returns one row per predictor."""
    at = [i - 1 for i in layers]
    goal, draw = -fvu.mean(0), generator(seed, "resampled seeds")
    score = np.array([geometry["layers"][i]["score"] for i in at])
    replicas = np.array(geometry["replicates"])[:, at]
    replicas = replicas - replicas.mean(0) + score
    goals = [-fvu[draw.integers(0, len(fvu), len(fvu))].mean(0) for _ in replicas]
    mine = np.array([spearman(r, g) for r, g in zip(replicas, goals, strict=True)])
    rows = [{"name": "score", "rho": spearman(score, goal), "interval": np.quantile(mine, (.025, .975)).tolist(),
             "p": permutation_p(score, goal)}]
    for trivial in geometry["trivial"]:
        value = np.array(trivial["values"])[at]
        other = np.array([spearman(value, g) for g in goals])
        low, high = np.quantile(mine - other, (.025, .975))
        rows.append({"name": trivial["name"], "rho": spearman(value, goal), "p": permutation_p(value, goal),
                     "interval": np.quantile(other, (.025, .975)).tolist() if len(fvu) > 1 else None,
                     "score_minus": [float(low), rows[0]["rho"] - spearman(value, goal), float(high)]})
    for variant in geometry["variants"][1:]:
        rows.append({"name": f"score, {variant['name']}", "rho": spearman(np.array(variant["scores"])[at], goal)})
    return rows


def disagreements(rows):
    """Over all pairs of layers of a backbone that the score and depth order differently: how often the score is right.
    rows: (layer, score, error), where a low error is good."""
    pairs = [g < f for (_, s, f), (_, t, g) in itertools.combinations(sorted(rows), 2) if t > s]   # the score: higher
    return {"pairs": len(pairs), "score_right": sum(pairs)}


def by_measure(found):
    """What is meant by bridgeability decides: mean rho of score and depth over the backbones, and the pairs on which
    the two disagree, by FVU, KL and CE gap."""
    out = {}
    for key in ("fvu", "kl", "ce_gap"):
        rho, apart = {"score": [], "-layer": []}, {}
        for name, some in found.items():
            rows = [(r["layer"], r["score"], statistics.mean(r[key])) for r in some["layers"]]
            layer, score, error = np.array(rows).T                                   # (C,) each
            rho["score"].append(spearman(score, -error))
            rho["-layer"].append(spearman(-layer, -error))
            apart[name] = disagreements(rows)
        out[key] = {**{name: statistics.mean(values) for name, values in rho.items()}, "disagreements": apart,
                    **{count: sum(d[count] for d in apart.values()) for count in ("pairs", "score_right")}}
    return out


def beats_a_table(row):
    """Whether a bridge knows more of the state than its token says: else its FVU means little."""
    return statistics.mean(row["fvu"]) < row["untrained"]["token mean"]


def verdict(result):
    """What the numbers say, as text."""
    first = result["backbones"]["toy"]
    rows = {r["name"]: r for r in first["correlations"]}
    score, depth = rows["score"], rows["-layer"]
    low, _, high = depth["score_minus"]
    word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    n, known = first["seeds"], sum(map(beats_a_table, first["layers"]))
    seeds = f"{n} training seeds" if n > 1 else "one training seed, so the interval is that of the score alone"
    text = (f"on the model the score orders layers {', '.join(str(r['layer']) for r in first['layers'])} by "
            f"bridgeability with rho = {score['rho']:.2f} [{score['interval'][0]:.2f}, {score['interval'][1]:.2f}] "
            f"(one-sided p = {score['p']:.3f}), {word} depth alone ({depth['rho']:.2f}); {seeds}, {result['steps']} "
            f"steps a bridge; it beats a table of each token's mean state at {known} of {len(first['layers'])} layers")
    if len(result["backbones"]) > 1:
        pooled, measures = result["pooled"], result["measures"]
        apart, kl = measures["fvu"], measures["kl"]
        best = max(pooled, key=lambda name: statistics.mean(pooled[name]))
        text += (f"; over {len(result['backbones'])} backbones the mean rho of the score is "
                 f"{statistics.mean(pooled['score']):.2f}, of depth {statistics.mean(pooled['-layer']):.2f}, and the "
                 f"best predictor is {best} ({statistics.mean(pooled[best]):.2f}); where score and depth disagree on "
                 f"two layers ({apart['pairs']} pairs) the score is right {apart['score_right']} times. By KL instead "
                 f"of FVU: {kl['score']:.2f} against {kl['-layer']:.2f}, and right {kl['score_right']} times")
    return text


# --------------------------------------------------------------------------------------------------------- report
def table(result):
    lines = []
    for name, found in result["backbones"].items():
        lines += ["", f"**{name}** ({found['seeds']} seeds, {result['steps']} steps, bridges of "
                  f"{result['blocks'] or 'as many'} blocks, {found['eval_sequences']} held-out sequences)", "",
                  "| layer | score | FVU, NFE 8 | KL, NFE 8 | CE gap, NFE 4 | regression: FVU | CE gap | identity | "
                  "ridge | token mean |", "|---" * 10 + "|"]
        for row in found["layers"]:
            control = row.get("regression_fvu")
            lines.append(f"| {row['layer']} | {row['score']:+.2f} | " + " | ".join(
                plus_minus(row[k], f) for k, f in (("fvu", ".4f"), ("kl", ".4f"), ("ce_gap", "+.4f"))) + " | "
                + (f"{plus_minus(control, '.4f')} | {plus_minus(row['regression_ce_gap'], '+.4f')}" if control else "- | -")
                + " | " + " | ".join(f"{row['untrained'][k]:.3f}" for k in ("identity", "ridge", "token mean")) + " |")
    names = [r["name"] for r in result["backbones"]["toy"]["correlations"]]
    lines += ["", "Spearman with -FVU at NFE 8 (on the model: 95% interval, one-sided p, score minus this one):", "",
              "| predictor | toy | interval | p | score minus it | "
              + " | ".join(n for n in result["backbones"] if n != "toy") + " | mean |",
              "|---" * (5 + len(result["backbones"])) + "|"]
    for i, name in enumerate(names):
        row = result["backbones"]["toy"]["correlations"][i]
        line = [name, f"{row['rho']:.2f}"]
        line.append("[{:.2f}, {:.2f}]".format(*row["interval"]) if row.get("interval") else "")
        line.append(f"{row['p']:.4f}" if "p" in row else "")
        line.append("{1:+.2f} [{0:+.2f}, {2:+.2f}]".format(*row["score_minus"]) if "score_minus" in row else "")
        line += [f"{b['correlations'][i]['rho']:.2f}" for n, b in result["backbones"].items() if n != "toy"]
        lines.append("| " + " | ".join([*line, f"{statistics.mean(result['pooled'][name]):.2f}"]) + " |")
    if len(result["backbones"]) > 1:
        lines += ["", "Pairs of layers that score and depth order differently, and on how many of them the score is "
                  "right, by three measures of the bridge's error:", "",
                  "| error | mean rho of the score | of depth | " + " | ".join(result["backbones"]) + " | together |",
                  "|---" * (4 + len(result["backbones"])) + "|"]
        for key, name in (("fvu", "FVU, NFE 8"), ("kl", "KL, NFE 8"), ("ce_gap", "CE gap, NFE 4")):
            some = result["measures"][key]
            lines.append(f"| {name} | {some['score']:.2f} | {some['-layer']:.2f} | " + " | ".join(
                f"{d['score_right']} of {d['pairs']}" for d in (*some["disagreements"].values(), some)) + " |")
    return "\n".join([*lines, "", result["verdict"][0].upper() + result["verdict"][1:] + "."])


def figure(result, path):
    """Score against -log FVU, one panel a backbone; numbers are layers."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = len(result["backbones"])
    columns = min(4, n)
    fig, axes = plt.subplots(math.ceil(n / columns), columns, squeeze=False, constrained_layout=True,
                             figsize=(3.2 * columns, 2.9 * math.ceil(n / columns)))
    for ax, (name, found) in itertools.zip_longest(axes.flat, result["backbones"].items(), fillvalue=(None, None)):
        if name is None:
            ax.axis("off")
            continue
        for row in found["layers"]:
            ax.plot(row["score"], statistics.mean(row["fvu"]), "o", color=plt.cm.viridis(row["layer"] / (
                1 + len(found["layers"]))), markersize=13, alpha=0.5)
            ax.text(row["score"], statistics.mean(row["fvu"]), row["layer"], ha="center", va="center", fontsize=8)
        rho = {r["name"]: r["rho"] for r in found["correlations"]}
        ax.set(yscale="log", xlabel="diffusion-friendliness", ylabel="FVU at NFE 8 (low is good)")
        ax.set_title(f"{name}: rho {rho['score']:.2f}, depth {rho['-layer']:.2f}", fontsize=8)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120, format="png")
    plt.close(fig)


def collect(cfg, name, model, shards, seeds):
    """The rows of one backbone from its finished runs, with the bridges that need no training."""
    done = {(kind, layer, seed): (folder, read_json(folder / "result.json"))
            for kind, layer, seed, folder, _ in cells(cfg, name, model, shards, seeds)}
    geometry = done.pop(("geometry", 0, 0))[1]
    layers = sorted({layer for _, layer, _ in done})
    lm = backbone.load(str(model), torch.device("cpu"), torch.float32)
    train = data.Tokens(shards, "train", 128).windows(256, seed=cfg.seed)[:, :-1]
    held_out = data.Tokens(shards, "val", 128).windows(64)[:, :-1]
    rows = []
    for layer in layers:
        row = {"layer": layer, "score": geometry["layers"][layer - 1]["score"]}
        for kind, nfe, mark in (("diffusion", "8", ""), ("regression", "1", "regression_")):
            results = [r for (k, at, _), (_, r) in done.items() if k == kind and at == layer]
            if results:
                row |= {f"{mark}{key}": [r["nfe"][nfe if key != "ce_gap" or mark else "4"][key] for r in results]
                        for key in ("fvu", "kl", "ce_gap")}
        net, _ = load(done["diffusion", layer, cfg.seed][0], torch.device("cpu"))
        row["untrained"] = untrained(lm, net, train, held_out, layer, 4)
        rows.append(row)
    fvu = np.array([row["fvu"] for row in rows]).T                                        # (seeds, C)
    return {"layers": rows, "seeds": seeds, "base": geometry["base"], "best_layer": geometry["best_layer"],
            "correlations": correlations(geometry, layers, fvu),
            "eval_sequences": next(iter(done.values()))[1]["eval_sequences"]}


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.seeds < 1 or cfg.jobs < 1 or not all(i.isdigit() for i in (cfg.layers or "1").split(",")):
        raise UserError("--seeds and --jobs must be at least 1, and --layers numbers such as 1,4,7")
    read_json(Path(cfg.model) / "result.json", f"make it with: python toy.py --out {cfg.model}")
    if cfg.dry_run:
        print("\n".join(" ".join(c[-1]) for c in cells(cfg, "toy", Path(cfg.model), Path(cfg.model).parent / "data",
                                                       cfg.seeds)))
        return None
    identity = {"base": backbone.identity(cfg.model)}
    if result := finished(cfg, identity):
        print(table(result))
        return result
    run = Run(cfg, setup("cpu"), identity)
    found = {}
    for name, place in backbones(cfg).items():
        work = list(cells(cfg, name, *place))
        execute([(f"{name}, {kind}, layer {layer}, seed {seed}", command) for kind, layer, seed, _, command in work],
                cfg.jobs)
        found[name] = collect(cfg, name, *place)
    result = {**identity, "backbones": found, "steps": cfg.steps, "blocks": cfg.blocks, "seed": cfg.seed, "pooled": {
        row["name"]: [b["correlations"][i]["rho"] for b in found.values()]
        for i, row in enumerate(found["toy"]["correlations"])},
        "measures": by_measure(found)}
    result["verdict"] = verdict(result)
    with atomic(run.out / "sweep.png") as temporary:
        figure(result, temporary)
    with atomic(run.out / "sweep.md") as temporary:
        temporary.write_text(table(result) + "\n")
    run.finish(result)
    print(table(result))
    return run.result


if __name__ == "__main__":
    main()
