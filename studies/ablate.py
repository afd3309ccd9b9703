"""ablate.py: what the choices in bridge.py are worth. Variants x layers x seeds at equal budget, one table a study.

    python ablate.py --study objective               # diffusion against regression, layers 1, 4, 7: ~20 min, 2 cores
    python ablate.py --study tricks                  # attempts to make the iterative bridge win, layer 4: ~25 min
    python ablate.py --study compute                 # at equal compute when used; --study size: depth, width
    python ablate.py --study generate --steps 600    # text drawn at every layer, embeddings included: ~40 min
    python ablate.py --study align --steps 200       # arms of repr_align.py, all data and 60k tokens: ~30 min
    python ablate.py --study regimes --steps 200     # where might alignment help? AdamW, layers, distance: ~30 min
    python ablate.py --study align --steps 600 --variants "w = 0;w = 3"      # two arms, three times as long
    python ablate.py --study objective --seeds 1 --steps 100      # a quick look

Each cell is an ordinary run of bridge.py in a folder under --out, so an interrupted study goes on where it stopped.
Prints the table and writes it to --out/STUDY.md: mean and standard deviation over seeds.
"""
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
import generate
from core import backbone
from core.common import UserError, entry, parse
from core.run import atomic, read_json
from core.stats import paired, plus_minus, spearman, steps_to

STUDIES = {  # study -> groups of (layers, {variant: flags of bridge.py})
    "objective": [((1, 4, 7), {"diffusion": "", "regression": "--objective regression"})],
    "compute": [  # equal compute when used: four calls of a small network, or one call of one four times as deep
        ((1,), {"diffusion, 4 calls of 1 block": "", "regression, 4 blocks": "--objective regression --blocks 4"}),
        ((4,), {"diffusion, 4 calls of 1 block": "--blocks 1", "regression, 4 blocks": "--objective regression"}),
        # 7 blocks against 8 calls of a block: what the blocks it replaces are worth; regression gets an eighth less
        ((7,), {"diffusion, 4 calls of 2 blocks": "--blocks 2", "regression, 7 blocks": "--objective regression"})],
    "tricks": [((4,), {
        "default": "", "t near 1 (t_mean 1)": "--t_mean 1", "t near 1 (t_mean 2)": "--t_mean 2",
        "uniform t": "--times uniform", "self-conditioning": "--self_condition", "velocity weighting": "--weighting v",
        "source embedding": "--source embedding", "v-prediction": "--prediction v", "eps-prediction":
        "--prediction eps", "Heun": "--sampler heun", "regression": "--objective regression"})],
    "size": [((4,), {
        "4 blocks of width 128": "", "2 blocks of width 128": "--blocks 2", "2 blocks of width 192":
        "--blocks 2 --width 192", "cosine": "--schedule cosine"})],  # EMA has its own column
    # one size of network at every layer, embeddings (l = 0) included; both uses of it are measured
    "generate": [(range(8), {"blocks": "--preset blocks --blocks 4"})],
    # arms of repr_align.py (no layer), 8 sequences a step: a constant learning rate, so that steps to a loss can be
    # read off
    "align": [((0,), {f"w = {w:g}{'' if freeze == 'embed' else ', nothing frozen'}{', 60k tokens' if few else ''}":
                      f"--align_weight {w:g} --cooldown 0 --freeze {freeze} --train_tokens {few} --batch_size 8"
                      for few in (0, 60000) for w, freeze in ((0, "embed"), (0, "none"), (1, "embed"), (3, "embed"),
                                                              (10, "embed"))})],
    # the search for a regime in which alignment helps; a name's rival is "w = 0" with the same words where there is one
    "regimes": [((0,), {f"w = {w}{what}": f"--cooldown 0 --batch_size 8 --align_weight {w}{more}" for w, what, more in (
        (0, "", ""),
        (3, ", lower layers", " --layers lower"),
        (3, ", middle layers", " --layers middle"),
        (3, ", upper layers", " --layers upper"),
        (1, ", l2", " --distance l2"),
        (3, ", at every position", " --positions all"),
        (0, ", 15k tokens", " --train_tokens 15000"),
        (3, ", 15k tokens", " --train_tokens 15000"),
        (10, ", 15k tokens", " --train_tokens 15000"),
        (3, ", upper layers, 15k tokens", " --layers upper --train_tokens 15000"),
        (0, ", AdamW 3e-4", " --lr 0 --lr_adam 3e-4"),
        (3, ", AdamW 3e-4", " --lr 0 --lr_adam 3e-4"),
        (10, ", AdamW 3e-4", " --lr 0 --lr_adam 3e-4"))})],
}
ALIGN = ("align", "regimes")  # studies of repr_align.py, which knows no layer to replace


@dataclass
class Config:
    study: Literal[tuple(STUDIES)] = "objective"  # which table
    model: str = "out/toy"      # a finished backbone
    data: str = "stdlib"        # its text
    out: str = "out/ablate"     # folder of the runs and the table
    layers: str = ""            # only these, such as 1,4 (empty: those of the study)
    variants: str = ""          # only these, by name, separated by semicolons (empty: all); keep the rival of each
    seeds: int = 3              # training seeds
    steps: int = 400            # of each run
    jobs: int = 2               # runs at a time, one thread each
    seed: int = 0               # the first training seed
    dry_run: bool = False       # print the commands, then leave


def cells(cfg):
    """Every run of the study: (variant, layer, seed, folder, command)."""
    only = cfg.layers.split(",") if cfg.layers else []
    names = [name.strip() for name in cfg.variants.split(";") if name.strip()]
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for layers, variants in STUDIES[cfg.study]:
            for layer, (name, flags) in itertools.product(layers, variants.items()):
                if only and str(layer) not in only or names and name not in names:
                    continue
                changed = flags.replace("--", "").replace(" ", "_")
                script, what, place = "bridge.py", f"layer{layer}", ["--layer", str(layer)]
                if cfg.study in ALIGN:
                    script, what, place = "repr_align.py", "align", []
                folder = Path(cfg.out) / f"{what}_seed{seed}_steps{cfg.steps}_{changed}".rstrip("_")
                command = [sys.executable, str(Path(__file__).with_name(script)), "--model", cfg.model, "--data",
                           cfg.data, *place, "--seed", str(seed), "--steps", str(cfg.steps), "--out", str(folder),
                           *flags.split()]
                yield name, layer, seed, folder, command


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


def table(cfg):
    """The study as Markdown: per layer and variant the mean +- sd over seeds of FVU and CE gap."""
    groups = {}
    for name, layer, _, folder, _ in cells(cfg):
        groups.setdefault((layer, name), []).append(read_json(folder / "result.json"))
    held_out = next(iter(groups.values()))[0]["eval_sequences"]
    lines = [f"Study `{cfg.study}`: {cfg.seeds} seeds, {cfg.steps} steps, {held_out} held-out sequences, mean +- sd "
             "over seeds.", "",
             "| layer | variant | size ratio | FVU, NFE 1 | FVU, NFE 4 | FVU, NFE 8 | CE gap, NFE 1 | CE gap, NFE 4 | "
             "without EMA |", "|---|---|---|---|---|---|---|---|---|"]
    for (layer, name), results in groups.items():
        row = [f"| {layer} | {name} | {results[0]['size_ratio']:.2f}"]
        last = "1" if "4" not in results[0]["nfe"] else "4"
        for which, key, nfe, form in (("nfe", "fvu", "1", ".4f"), ("nfe", "fvu", "4", ".4f"),
                                      ("nfe", "fvu", "8", ".4f"), ("nfe", "ce_gap", "1", "+.4f"),
                                      ("nfe", "ce_gap", "4", "+.4f"), ("raw_nfe", "ce_gap", last, "+.4f")):
            values = [r[which][nfe][key] for r in results if nfe in r[which]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):{form}} +- {spread:.4f}" if values else "-")
        lines.append(" | ".join(row) + " |")
    return "\n".join([*lines, "", *verdicts(groups)])


def generation_table(cfg):
    """Text drawn at every layer beside what the same bridge loses in replacement, and the geometry's score."""
    folders = {folder: (layer, seed) for _, layer, seed, folder, _ in cells(cfg)}
    twin = Path(cfg.model).parent / "repr_align" / "w10"
    found = generate.main(["--bridges", ",".join(map(str, folders)), "--data", cfg.data, "--no-experts", "--texts",
                           "32", "--temperatures", "0.8,1.0,1.2,1.4,1.7", "--twin",
                           str(twin) if (twin / "result.json").exists() else "",
                           "--out", str(Path(cfg.out) / f"generate_steps{cfg.steps}_seeds{cfg.seeds}")])
    scores = {row["layer"]: row["score"] for row in read_json(
        Path(cfg.model).parent / "geometry" / "result.json", "run python geometry.py first")["layers"]}
    rows = {}
    for row in (r for r in found["rows"] if r["name"] == "blocks"):
        result = read_json(Path(row["folder"]) / "result.json")
        rows.setdefault(row["layer"], []).append({**row, "ce_gap": result["nfe"]["4"]["ce_gap"],
                                                  "fvu": result["nfe"]["8"]["fvu"]})
    lines = [generate.table(found["rows"], found["real"]), "", f"{cfg.seeds} seeds, {cfg.steps} steps, mean +- sd:", "",
             "| layer | geometry score | gen-PPL at real entropy | readout accuracy | FVU, NFE 8 | CE gap, NFE 4 |",
             "|---|---|---|---|---|---|"]
    for layer, group in rows.items():
        cell = [plus_minus([r[k] for r in group], form) if None not in [r[k] for r in group] else "never there"
                for k, form in (("matched", ".1f"), ("readout_accuracy", ".3f"), ("fvu", ".4f"), ("ce_gap", "+.4f"))]
        score = f"{scores[layer]:+.2f}" if layer in scores else "-"
        lines.append(f"| {layer} | {score} | " + " | ".join(cell) + " |")
    there = [layer for layer in rows if all(r["matched"] for r in rows[layer])]
    inner = [layer for layer in there if layer in scores]
    if len(inner) < 3:
        return "\n".join([*lines, "", "Too few layers reach real text's entropy to compare them."])
    mean = {k: {layer: statistics.mean(r[k] for r in rows[layer]) for layer in there} for k in ("matched", "ce_gap")}
    best = {"matched": min(there, key=mean["matched"].get), "ce_gap": min(inner, key=mean["ce_gap"].get)}
    order = {"the score": [scores[i] for i in inner], "-layer": [-i for i in inner]}
    rho = [f"Spearman({name}, -{what}) = {spearman(values, [-mean[k][i] for i in inner]):+.2f}" for k, what in
           (("matched", "gen-PPL"), ("ce_gap", "CE gap")) for name, values in order.items()]
    same = "the same" if best["matched"] == best["ce_gap"] else "not the same"
    return "\n".join([*lines, "", f"Best to generate at: layer {best['matched']}. Best to replace: layer "
                      f"{best['ce_gap']}. They are {same}. Over layers {inner[0]} to {inner[-1]}: "
                      + ", ".join(rho) + "."])


def rival_of(name, arms):
    """The unaligned arm that an arm is compared with: "w = 0" with those of its words that such an arm has too."""
    return ", ".join(["w = 0", *(w for w in name.split(", ")[1:] if f"w = 0, {w}" in arms and w != "nothing frozen")])


def alignment_table(cfg):
    """Each arm's masked CE, and how much sooner than the unaligned arm it reaches that arm's best loss: in steps, and
    in seconds. The unaligned arm is w = 0 with frozen embeddings, on the same data, optimizer and seed."""
    arms = {}
    for name, _, _, folder, _ in cells(cfg):
        arms.setdefault(name, []).append(read_json(folder / "result.json"))
    lines = [f"Study `{cfg.study}`: {cfg.seeds} seeds, {cfg.steps} steps, constant learning rate, mean +- sd; the "
             "rival is w = 0 on the same data, optimizer and seed.", "",
             "| arm | masked CE | best on the way | best minus the rival's | acceleration, steps | acceleration, "
             "seconds | final cosine |", "|---" * 7 + "|"]
    for name, results in arms.items():
        rivals, fast, quick, gain = arms[rival_of(name, arms)], [], [], []
        for mine, rival in zip(results, rivals, strict=True):
            goal = min(row[1] for row in rival["curve"])                # low data: the rival may have passed its best
            there, first = steps_to(mine["curve"], goal), steps_to(rival["curve"], goal)
            gain.append(min(row[1] for row in mine["curve"]) - goal)
            fast.append(first / there if there else None)
            quick.append(first * rival["seconds"] / (there * mine["seconds"]) if there else None)
        cells_ = [plus_minus([r["val_loss"] for r in results], ".3f"),
                  plus_minus([min(row[1] for row in r["curve"]) for r in results], ".3f"),
                  plus_minus(gain, "+.3f"),
                  *(plus_minus(f, ".2f") if None not in f else f"not reached in {f.count(None)} of {len(f)}"
                    for f in (fast, quick)),
                  "-" if results[0]["cosine"] is None else plus_minus([r["cosine"] for r in results], ".3f")]
        lines.append(f"| {name} | " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def verdicts(groups):
    """A sentence a layer: each diffusion variant's CE gap at NFE 4 against regression's, paired by seed. It counts as a
    win or a loss when the mean difference exceeds its 95% interval (Student's t: 4.30 standard errors at 3 seeds)."""
    for (layer, name), results in groups.items():
        rival = next(((n, r) for (at, n), r in groups.items() if at == layer and n.startswith("regression")), None)
        if rival is None or name == rival[0] or len(results) < 2:
            continue
        mean, wide, _ = paired([r["nfe"]["1"]["ce_gap"] for r in rival[1]],
                                     [r["nfe"]["4"]["ce_gap"] for r in results])
        word = "ties with" if abs(mean) <= wide else "beats" if mean > 0 else "loses to"
        yield (f"- layer {layer}: {name} {word} {rival[0]}: its CE gap is lower by {mean:+.4f} +- {wide:.4f} nats "
               f"(95%, {len(results)} seeds)")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    work = list(cells(cfg))
    if not work:
        raise UserError(f"study {cfg.study} has none of the layers {cfg.layers or '(all)'} with one of the variants "
                        f"{cfg.variants or '(all)'}")
    names = {name for name, *_ in work}
    if cfg.study in ALIGN and (alone := [n for n in names if rival_of(n, names) not in names]):
        raise UserError(f"--variants {cfg.variants} needs {rival_of(alone[0], names)!r} too, to compare with")
    if cfg.dry_run:
        print("\n".join(" ".join(command) for *_, command in work))
        return None
    data.prepare(cfg.data, backbone.load_tokenizer(cfg.model), Path(cfg.out) / "data")  # once, before two runs want it
    execute([(f"{name}, layer {layer}, seed {seed}", command) for name, layer, seed, _, command in work], cfg.jobs)
    text = {"generate": generation_table, **dict.fromkeys(ALIGN, alignment_table)}.get(cfg.study, table)(cfg)
    with atomic(Path(cfg.out) / f"{cfg.study}.md") as temporary:
        temporary.write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()
