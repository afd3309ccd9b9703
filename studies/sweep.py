"""sweep.py: does the score of geometry.py foretell which layer a bridge can replace? And better than depth does?

    python -m studies.sweep --pool                        # the toy, 3 seeds, and three more backbones: ~35 min, 2 cores
    python -m studies.sweep --seeds 1 --steps 100 --eval_batches 16 --out out/sweep_quick     # a quick look: ~3 min
    python -m studies.sweep --blocks 0 --seeds 1 --layers 1,3,5,7 --out out/sweep_matched    # as deep as the replaced

Every layer of a backbone gets the same network, batches and steps, in an ordinary run of bridge.py under --out: an
interrupted sweep goes on. Beside them stand bridges that need no training, fitted on the very windows that the others
saw, predictors without geometry, all variants of the score, and what choosing by them is worth (core/regret.py). Which
backbones count is decided by RULES, not by hand. Writes sweep.png, section.md and result.json to --out.

Letters: B batch, T tokens, D hidden width, V vocabulary, L blocks, C layers swept, R resamples.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.sweep\n")
import itertools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

import bridge
import data
import geometry as locate
from core import backbone, cache, denoiser, regret, report
from core.common import UserError, entry, parse, pick_dtype, setup
from core.conditional import GUESSES, errors, fit, guesses, joined
from core.diffusion import position_noise, sample
from core.draws import generator
from core.run import Run, finished, read_json, write_json
from core.stats import paired, permutation_p, plus_minus, ranks, spearman, verdict
from studies.ablate import ROOT, execute, stage


@dataclass
class Config:
    model: str = "out/toy"      # a backbone, any model folder; its shards are in `data` beside it, or --data
    data: str = "stdlib"        # a folder of shards of --model; or the text of the backbones that --pool trains
    out: str = "out/sweep"      # folder of the runs and the report
    pool: bool = False          # also on the backbones of POOL, made under --out
    beside: str = ""            # result.json of another sweep, or of a report with one: its backbones count too
    layers: str = ""            # only these, such as 1,4,7 (empty: 1 to L - 1)
    seeds: int = 3              # training seeds on the model (one on the others)
    cache_states: bool = False  # keep the prefix states of all layers under --out: one pass a seed, not one a bridge
    blocks: int = 2             # of every bridge (0: as many as it replaces)
    bridge: str = ""            # more flags of every bridge, such as "--head_start none"
    steps: int = 300            # of each bridge
    batch_size: int = 8         # sequences a step
    seq_len: int = 128          # tokens a sequence
    eval_batches: int = 512     # held-out sequences of all numbers
    jobs: int = 2               # runs at a time, one thread each
    seed: int = 0               # the first training seed
    MEASURES = ("pool", "beside")  # which backbones count: the others' runs stay valid


NFE, SKIP = 8, 4                     # calls of a bridge; first positions left out: attention sinks, as in bridge.py
PART = 64                            # held-out sequences measured at a time: what a killed study may lose
DECODED = ("token mean",)            # guesses whose KL is measured too
ERRORS = {"fvu": "FVU", "kl": "KL", "ce_gap": "CE gap"}    # of a bridge: bridgeability is their absence
COLUMNS = {**ERRORS, **{f"regression_{key}": f"regression: {name}" for key, name in ERRORS.items()}}
MIN_STEPS, MARGIN = 300, 0.1                               # see RULES; a difference in rho within MARGIN is a tie


# ------------------------------------------------------------------------------------------------------ backbones
def trained(flags, text=None):
    """A toy of its own on --data, or on the folder that text(...) writes."""
    def make(cfg, home):
        source = str(text(home / "text")) if text else cfg.data
        execute([(home.name, [sys.executable, str(ROOT / "toy.py"), "--out", str(home / "toy"), "--data", source,
                              *flags.split()])], 1, threads=2)
        return home / "toy", home / "data"
    return make


def manual(folder):
    """The folder with Python's own manual, in English, one text file a topic: it lies in every installation."""
    from pydoc_data.topics import topics
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder


POOL = {  # name -> function of (cfg, its own folder) that gives the folders of the model and of its shards
    "deep (12 x 96)": trained("--layers 12 --width 96 --heads 3 --steps 500"),
    "tasks": trained("--tasks 0.6 --steps 500"),
    "prose (manual)": trained("--steps 500", manual),
}


def cells(cfg, home, model, shards, main=True):
    """Every run on one backbone: (kind, layer, folder, command); geometry's layer is 0."""
    L = read_json(model / "config.json")["num_hidden_layers"]
    wanted = sorted({int(i) for i in cfg.layers.split(",")}) if cfg.layers else list(range(1, L))
    if not set(wanted) <= set(range(1, L)):
        raise UserError(f"--layers {cfg.layers}: this backbone has layers 1 to {L - 1} to choose from")
    yield "geometry", 0, home / "geometry", stage("geometry", model, shards, home / "geometry", "")
    seeds, kinds = range(cfg.seed, cfg.seed + (cfg.seeds if main else 1)), ("diffusion", "regression")[:1 + main]
    for seed, layer, kind in itertools.product(seeds, wanted, kinds):
        folder = home / f"{kind}_layer{layer}_seed{seed}"
        yield kind, layer, folder, stage("bridge", model, shards, folder, (
            f"--layer {layer} --seed {seed} --objective {kind} --blocks {cfg.blocks} --steps {cfg.steps} "
            f"--seq_len {cfg.seq_len} --batch_size {cfg.batch_size} --nfe {NFE} --nfes {NFE} --noise_seeds 1 "
            f"--log_every {max(1, cfg.steps // 6)} --eval_batches 8"),           # a glance: collect() measures all
            *cfg.bridge.split(), *["--cache_states", str(home / f"states{seed}")] * cfg.cache_states)


def keep_states(cfg, model, shards, work):
    """--cache_states: one pass a seed through the whole backbone, for all bridges of `work` that are not finished."""
    bridges = [parse(bridge.Config, command[2:], "", bridge.PRESETS, lambda of: backbone.preset_of(of.model, of.out))
               for _, layer, out, command in work if cfg.cache_states and layer and not (out / "result.json").exists()]
    layers = sorted({int(of.layer) for of in bridges})
    for of in {of.seed: of for of in bridges}.values():
        lm = backbone.load(str(model), at := setup(of.device).device, pick_dtype(of, at), blocks=layers[-1])
        train = data.Tokens(shards, "train", of.seq_len)
        cache.write(of.cache_states, lm, train, layers, of, backbone.identity(of.model))


# ----------------------------------------------------------------------------------------------------- statistics
def predictors(geometry, rows):
    """name -> its value at each layer of rows, (C,): the score, its variants, the trivial ones of geometry.py; and of
    what is left of h[l] once h[0] is known: errors of guesses that need no bridge, score of the ridge's residual."""
    at = {"score": [float(row["score"]) for row in rows]}
    for name, values in [*((t["name"], t["values"]) for t in geometry["trivial"]), *(
            (f"score, {v['name']}", v["scores"]) for v in geometry["variants"] if v["name"] != "default")]:
        at[name] = [values[row["layer"] - 1] for row in rows]
    return {**at, **{f"-FVU, {guess}": [-row["untrained"][guess]["fvu"] for row in rows]
                     for guess in rows[0]["untrained"]}, **{
        name: [row["residual"][name] for row in rows] for name in rows[0].get("residual", ())}}


def correlations(geometry, rows, seed=0):
    """name -> Spearman of each predictor with -FVU over layers. Intervals: the score's replicates (sequences, anchors;
    from geometry.py) and the bridges' seeds are resampled together; a difference to the score uses the same resamples.
    Only the score is measured with noise, depth is not, so noise lowers the score's rho in the resamples and the
    differences' intervals lean against it."""
    fvu, values = np.array([row["fvu"] for row in rows]).T, predictors(geometry, rows)              # (seeds, C)
    goal, draw = -fvu.mean(0), generator(seed, "resampled seeds")
    replicas = np.array(geometry["replicates"])[:, [row["layer"] - 1 for row in rows]]              # (R, C)
    replicas = replicas - replicas.mean(0) + values["score"]
    goals = [-fvu[draw.integers(0, len(fvu), len(fvu))].mean(0) for _ in replicas]
    mine, out = np.array([spearman(r, g) for r, g in zip(replicas, goals, strict=True)]), {}
    for name, value in values.items():
        rho = spearman(value, goal)
        other = mine if name == "score" else np.array([spearman(value, g) for g in goals])
        low, high = np.quantile(mine - other, (.025, .975))
        out[name] = {"rho": rho, "p": permutation_p(value, goal), "by_seed": [spearman(value, -f) for f in fvu],
                     "interval": np.quantile(other, (.025, .975)).tolist(),
                     "score_minus": [float(low), spearman(values["score"], goal) - rho, float(high)]}
    return out


def shared(found):
    """Names of the predictors that all of these backbones have."""
    return [n for n in found[0]["predictors"] if all(n in b["predictors"] for b in found)]


def corrected(found, draws=20000, seed=0):
    """name -> {rho, p}: mean Spearman with -FVU over the backbones, and how often the *best* of all predictors does as
    well when the layers of every backbone stand in random order (one-sided; the given order is counted as one)."""
    names = shared(found)
    rho, chance, draw = np.zeros(len(names)), np.zeros((draws, len(names))), generator(seed, "permuted layers")
    for b in found:
        theirs, goal = np.array([ranks(b["predictors"][n]) for n in names]), ranks(negative("fvu", b))   # (n, C), (C,)
        orders = draw.permuted(np.tile(np.arange(len(goal)), (draws, 1)), axis=1)                   # (draws, C)
        rho, chance = rho + theirs @ goal / len(found), chance + goal[orders] @ theirs.T / len(found)
    p = (1 + (chance.max(1)[:, None] >= rho - 1e-9).sum(0)) / (1 + draws)
    return {name: {"rho": float(r), "p": float(q)} for name, r, q in zip(names, rho, p, strict=True)}


def negative(error, b):
    """Minus the bridges' mean error at each layer of a backbone: high is good."""
    return [-mean(row[error]) for row in b["layers"]]


def against_depth(found, error, name="score", seed=0):
    """rho(name) - rho(depth) over the backbones `found`."""
    ours, theirs = ([spearman(b["predictors"][n], negative(error, b)) for b in found.values()]
                    for n in (name, "-layer"))
    gaps = np.array(ours) - theirs
    again = gaps[generator(seed, "resampled backbones").integers(0, len(gaps), (10000, len(gaps)))]
    return {"rho": mean(ours), "depth": mean(theirs), "gaps": dict(zip(found, gaps.tolist(), strict=True)),
            "median": float(np.median(gaps)), "interval": np.quantile(np.median(again, 1), (.025, .975)).tolist(),
            "verdict": verdict(paired(ours, theirs), MARGIN, "rho", "backbones", lower_is_better=False)}


RULES = {  # why a backbone says nothing about LOCATE -> test of its entry in the result
    f"not as {MIN_STEPS} or more training steps left it": lambda b: b["trained_steps"] < MIN_STEPS,
    "its bridges are no better than a table at most layers": lambda b: mean(
        mean(row["fvu"]) < row["untrained"]["token mean"]["fvu"] for row in b["layers"]) < 0.5,
}


# --------------------------------------------------------------------------------------------------------- report
def findings(result):
    """What the numbers say, a line each."""
    first, every = next(iter(result["backbones"])), result["corrected"]
    own = result["backbones"][first]
    score, depth = (own["correlations"][n] for n in ("score", "-layer"))
    gap = verdict(paired(score["by_seed"], depth["by_seed"]), MARGIN, "rho", "seeds", lower_is_better=False)
    out = ", left out by rule," if own["excluded"] else ""
    yield (f"On {first}{out} rho is {score['rho']:.2f} for the score (one-sided p = {score['p']:.4f}), "
           f"{depth['rho']:.2f} for depth alone; the score against depth: {gap}.")
    controls = {"regression, the same network, steps and data": lambda r, error: r["regression_" + error],
                "a table of token means with equal data and the true first states": lambda r, error: [
                    r["untrained"]["token mean"][error]] * own["seeds"]}
    for (control, theirs), (error, name) in itertools.product(controls.items(), ERRORS.items()):
        gaps = [paired(r[error], theirs(r, error)) for r in own["layers"]]
        words = [verdict(gap).split(" ")[0].replace("not", "not known") for gap in gaps]
        yield (f"On {first} a diffusion bridge's {name} against that of {control}, {own['seeds']} seeds: " + ", ".join(
            f"{w} at {words.count(w)}" for w in sorted(dict.fromkeys(words), key=words.count, reverse=True))
               + f" of {len(words)} layers ({gaps[0].mean:+.2g} at layer {own['layers'][0]['layer']}, "
               f"{gaps[-1].mean:+.2g} at {own['layers'][-1]['layer']}).")
    good = [n for n, of in every.items() if of["p"] < 0.05]
    yield (f"{len(good)} of {len(every)} predictors order the layers better than chance, corrected for their "
           f"number; depth alone {'does' if '-layer' in good else 'does not'}.")


def section(result):
    """The section of the report: a pure function of result.json."""
    found, first = result["backbones"], next(iter(result["backbones"]))
    title = "## Does the score foretell bridgeability?" + ("" if result["blocks"] else " As deep as what is replaced")
    lines = [title, "", f"Training seeds from {result['seed']} on, NFE {result['nfe']}. rho: Spearman's with minus FVU "
             f"over layers; ties: within {MARGIN:g}.", "", *(f"- {line}" for line in findings(result)), "",
             "![the score against what the bridges reach](sweep.png)"]
    for name, b in found.items():
        why = f": left out, {'; '.join(b['excluded'])}" if b["excluded"] else ""
        trained = [key for key in COLUMNS if key in b["layers"][0]]
        free = [(n, key) for n, row in b["layers"][0]["untrained"].items() for key in row]
        lines += ["", f"**{name}**{why} (seeds: {b['seeds']}; {b['budget']}; {b['eval_sequences']} held-out sequences)",
                  "", report.table(
            ["layer", "score", *(COLUMNS[key] for key in trained), *(f"{n}: {ERRORS[key]}" for n, key in free)],
            [[r["layer"], f"{r['score']:+.2f}", *(plus_minus(r[key], ".4f") for key in trained),
              *(f"{r['untrained'][n][key]:.4f}" for n, key in free)] for r in b["layers"]])]
    lines += ["", f"On {first}: rho, its 95% interval, one-sided p, and the score's rho minus it, resampled together. "
              f"Over {', '.join(result['kept']) or 'all backbones'}: mean rho, and p of the maximum over all "
              "predictors when layers are permuted.", "", report.table(
                  ["predictor", f"rho, {first}", "95%", "p", "score minus it", "mean rho", "corrected p"],
                  [[name.replace("|", "\\|"), f"{c['rho']:.2f}", "[{:.2f}, {:.2f}]".format(*c["interval"]),
                    f"{c['p']:.4f}", "{1:+.2f} [{0:+.2f}, {2:+.2f}]".format(*c["score_minus"]), f"{a['rho']:.2f}",
                    f"{a['p']:.4f}"]
                   for name, a in result["corrected"].items() for c in [found[first]["correlations"][name]]])]
    if len(found) > 1:
        lines += ["", "Over the same: rho of a predictor minus rho of depth, by backbone, median with bootstrap "
                  "interval, verdict on the mean.", "", report.table(
                      ["predictor", "error", *found, "median", "95%", "against depth"],
                      [[name, ERRORS[error], *(f"{a['gaps'][n]:+.2f}" if n in a["gaps"] else None for n in found),
                        f"{a['median']:+.2f}", "[{:+.2f}, {:+.2f}]".format(*a["interval"]), a["verdict"]]
                       for name, some in result["against_depth"].items() for error, a in some.items()])]
    return "\n".join([*lines, *regret.section(found), ""])


def draw(result, path):
    """Score against FVU, one panel a backbone; numbers are layers."""
    found, columns = result["backbones"], min(4, len(result["backbones"]))
    with report.figure(path, math.ceil(len(found) / columns), columns, 3.2, 2.9) as axes:
        for ax in axes.flat[len(found):]:
            ax.axis("off")
        for ax, (name, b) in zip(axes.flat, found.items(), strict=False):
            points = [(r["score"], mean(r["fvu"]), r["layer"]) for r in b["layers"]]
            ax.scatter(*zip(*[p[:2] for p in points]), s=170, c=[p[2] for p in points], alpha=0.5)
            for x, y, layer in points:
                ax.text(x, y, layer, ha="center", va="center", fontsize=8)
            rho = [b["correlations"][n]["rho"] for n in ("score", "-layer")]
            ax.set(yscale="log", xlabel="score", ylabel=f"FVU at NFE {result['nfe']}",
                   title=f"{name}{' (left out)' if b['excluded'] else ''}\nrho {rho[0]:.2f}, depth {rho[1]:.2f}")
            ax.invert_yaxis()


# ----------------------------------------------------------------------------------------------------------- main
def measured(lm, guesses, rows, home):
    """core.conditional's errors, PART sequences at a time, each part kept under `home`: a rerun measures the rest."""
    parts = []
    for i, some in enumerate(tqdm(rows.split(PART), desc="held-out sequences", leave=False, disable=None)):
        file = home / f"errors{i}.json"
        of = [NFE, SKIP, len(some), *([[name, what[-1]] for name, what in each.items()] for each in guesses.values())]
        if not file.exists() or read_json(file)["of"] != of:
            write_json(file, {"of": of, "sums": errors(lm, guesses, some, SKIP)})
        parts.append(read_json(file)["sums"])
    return joined(parts)


def collect(cfg, model, shards, work):
    """The entry of one backbone in the result, from its finished runs and the bridges that need no training."""
    logs, rows, tables, cpu = {}, [], {}, torch.device("cpu")
    geometry, layers = read_json(work[0][2] / "result.json"), sorted({layer for _, layer, *_ in work} - {0})
    train, slots, held_out = data.Tokens(shards, "train", cfg.seq_len), range(cfg.batch_size), data.Tokens(
        shards, "val", cfg.seq_len).windows(cfg.eval_batches)
    calibration = read_json(work[1][2] / "config.json")["dihal"]["config"]["calibration"]         # of all bridges
    seen = torch.cat([train.windows(calibration, cfg.seed), *(
        train.batch(cfg.seed, step, slots, cfg.batch_size) for step in range(cfg.steps))])[:, :-1]
    lm, flags = backbone.load(str(model), cpu, torch.float32), locate.Config(**geometry["flags"])
    known = fit(lm, layers, train.windows(64, cfg.seed)[:, :-1], seen, held_out, SKIP, cfg.seed)
    left = locate.residual(lm, known, locate.held_out(flags, shards)[:, :-1], flags)
    asked, noise = guesses(known, DECODED, SKIP), position_noise(0, range(cfg.seq_len), lm.D, cpu)
    for kind, layer, folder, _ in work[1:]:
        net, info = denoiser.load(folder, cpu)
        if net.settings["head_start"] == "tokens":          # both objectives of a seed have the same, and it is large
            net.means = tables.setdefault((layer, info["seed"]), net.means)
        asked[layer][folder.name] = net, lambda z, c, ids, net=net: sample(net, c, NFE, noise), True
        if kind == "diffusion":
            logs[layer, sum(layer == n for n, _ in logs)] = (folder / "log.jsonl").read_text().splitlines()
    found = measured(lm, asked, held_out, work[0][2].parent)
    for layer in layers:
        row = {"layer": layer, "score": geometry["layers"][layer - 1]["score"],
               "untrained": {name: found[layer][name] for name in GUESSES},
               "residual": {name: float(values[layers.index(layer)]) for name, values in left.items()}}
        for kind, mark in (("diffusion", ""), ("regression", "regression_")):
            mine = [of for name, of in found[layer].items() if name.startswith(kind)]
            row |= {mark + key: [of[key] for of in mine] for key in ERRORS if mine}
        rows.append(row)
    about = read_json(model / "config.json").get("dihal", {}).get("config", {})
    out = {"layers": rows, "seeds": len(rows[0]["fvu"]), "trained_steps": about.get("steps", MIN_STEPS),
           "predictors": predictors(geometry, rows), "correlations": correlations(geometry, rows)}
    out["regret"] = regret.worth_of_locate(rows, out["predictors"], logs)
    return {**out, "eval_sequences": len(held_out), "excluded": [why for why, holds in RULES.items() if holds(out)]}


def budget(of):
    """What each bridge had, by the flags of its sweep or by the sweep's result."""
    return f"{of['steps']} steps of {of['batch_size']} x {of.get('seq_len', 128)}, {of['blocks'] or 'as many'} blocks"


def joining(file, own):
    """The backbones of --beside, none of which may be called as one of `own`."""
    other = read_json(file, "--beside wants the result.json of a sweep, or of a report that holds one") if file else {}
    other = other.get("sweep", other) or {}
    found = {name: {"budget": budget(other), **b} for name, b in other.get("backbones", {}).items()}
    if file and (not found or set(found) & set(own)):
        raise UserError(f"--beside {file} holds no sweep of other backbones than {', '.join(own)}; pass one that does")
    return found


@entry
def main(argv):
    cfg = parse(Config, argv, f"{__doc__}\nBackbones of --pool: {', '.join(POOL)}")
    if not all(i.isdigit() for i in (cfg.layers or "1").split(",")):
        raise UserError("--layers must be numbers such as 1,4,7")
    read_json(Path(cfg.model) / "config.json", f"make it with: python toy.py --out {cfg.model}")
    near = Path(cfg.data) if (Path(cfg.data) / "meta.json").exists() else Path(cfg.model).parent / "data"
    own, out, first = (Path(cfg.model), near), Path(cfg.out), Path(cfg.model).resolve().name
    identity, pool = {"base": backbone.identity(cfg.model)}, POOL if cfg.pool else {}
    result = finished(cfg, identity, quiet=True) or {"backbones": {}, "measures": {}}
    others, asked = joining(cfg.beside, [first, *pool]), {"pool": cfg.pool, "beside": cfg.beside}
    if {first, *pool, *others} <= set(result["backbones"]) and result["measures"] == asked:
        print(section(result))
        return result
    run, found = Run(cfg, setup("cpu"), identity), {}
    for name, make in {first: lambda cfg, home: own, **pool}.items():
        if name in result["backbones"]:                     # finished: POOL has a new one, or --beside is another
            found[name] = {"budget": budget(asdict(cfg)), **result["backbones"][name]}
            continue
        home = out / name.split(" (")[0].replace(" ", "_")
        home.mkdir(parents=True, exist_ok=True)
        model, shards = make(cfg, home)
        work = list(cells(cfg, home, model, shards, name == first))
        keep_states(cfg, model, shards, work)
        execute([(f"{home.name}, {folder.name}", command) for *_, folder, command in work], cfg.jobs)
        found[name] = {"budget": budget(asdict(cfg)), **collect(cfg, model, shards, work)}
    found |= others
    kept = {name: b for name, b in found.items() if not b["excluded"]}
    counted = kept or found
    rivals = [name for name in shared(list(counted.values())) if name == "score" or name.startswith("-FVU")]
    result = {**identity, **{k: getattr(cfg, k) for k in ("steps", "blocks", "batch_size", "seq_len", "seed")},
              "nfe": NFE, "backbones": found, "kept": list(kept), "corrected": corrected(list(counted.values())),
              "against_depth": {name: {e: against_depth(counted, e, name) for e in ERRORS} for name in rivals}}
    rho, a = found[first]["correlations"], result["against_depth"]["score"]["fvu"]
    result["headline"] = [
        [f"score and bridgeability, {first}",
         f"rho {rho['score']['rho']:.2f}, of depth alone {rho['-layer']['rho']:.2f}"],
        [f"score minus depth, {len(a['gaps'])} backbones", "median {:+.2f} [{:+.2f}, {:+.2f}]".format(
            a["median"], *a["interval"])]][:len(found)]
    result["findings"] = list(findings(result))
    draw(result, run.out / "sweep.png")
    run.finish(result, section(result))
    print(section(result))
    return run.result


if __name__ == "__main__":
    main()
