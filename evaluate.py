"""evaluate.py: EVALUATE. One report with figures, from the runs of the other stages; no number in it is typed.

    python evaluate.py                                   # reads out/, writes out/evaluate/report.md: seconds
    python evaluate.py --runs out/wiki --out out/wiki/evaluate
    python evaluate.py --publish                         # also copies the figures and the numbers to results/

Needs finished runs of backbone.py, geometry.py, bridge.py (the bridge, and the regression control in `regression`),
hybrid.py, repr_align.py (`repr_align/w0` and `repr_align/w10`) and generate.py under --runs, all of one backbone.
Writes report.md, figure.png, generation.png and result.json to --out. Its first lines say whether diffusion beat plain
regression.
"""
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbone import identity
from common import UserError, entry, parse, setup
from generate import name_of
from generate import table as generation_table
from geometry import PROXIES
from run import Run, atomic, read_json


@dataclass
class Config:
    runs: str = "out"           # folder that holds the stages' runs
    out: str = "out/evaluate"   # folder of the report
    seed: int = 0               # unused so far: the numbers come from the stages
    publish: bool = False       # copy the figures and result.json to results/, where the README finds them
    dry_run: bool = False       # print what would be read, then leave


STAGES = {  # folder under --runs -> the command that makes it
    "toy": "python backbone.py", "geometry": "python geometry.py", "bridge": "python bridge.py",
    "regression": "python bridge.py --objective regression --out {runs}/regression",
    "hybrid": "python hybrid.py", "repr_align/w0": "python repr_align.py --align_weight 0 --out {runs}/repr_align/w0",
    "repr_align/w10": "python repr_align.py", "generate": "python generate.py",
}


def read_runs(runs):
    """The result.json of every stage. Raises UserError naming the command for a missing one, and for runs of different
    backbones. A run of run_all.sh on another model has no toy."""
    found = {}
    for stage, command in STAGES.items():
        file = runs / stage / "result.json"
        if stage != "toy" or file.exists():
            found[stage] = read_json(file, f"make it with: {command.format(runs=runs)}")
    bases = {stage: result["base"] for stage, result in found.items()}
    other = next((s for s, base in bases.items() if base != bases["geometry"]), None)
    if other is not None:
        raise UserError(f"{runs}/geometry and {runs}/{other} come from different backbones; delete the stale one and "
                        "run it again")
    if found["bridge"]["objective"] != "diffusion" or found["regression"]["objective"] != "regression":
        raise UserError(f"{runs}/bridge must hold a diffusion bridge and {runs}/regression its control; delete the "
                        f"wrong one and make it with: {STAGES['bridge']}, or {STAGES['regression'].format(runs=runs)}")
    same = ("layer", "steps", "tokens", "parameters", "seed", "eval_sequences")
    differ = [k for k in same if found["bridge"][k] != found["regression"][k]]
    if differ:
        raise UserError(f"{runs}/bridge and {runs}/regression differ in {', '.join(differ)}, so they cannot be "
                        "compared; run one of them again")
    if found["hybrid"].get("bridge_weights") != identity(runs / "bridge"):
        raise UserError(f"{runs}/hybrid was made of another bridge than {runs}/bridge; delete it and run: "
                        f"python hybrid.py --bridge {runs}/bridge --out {runs}/hybrid")
    return found


def verdict(found):
    """One sentence on diffusion against regression, decided by the numbers: a difference in CE gap counts when it
    exceeds twice its standard error over held-out sequences (paired: both saw the same ones)."""
    bridge, regression = found["bridge"], found["regression"]["nfe"]["1"]
    n = str(bridge["nfe_default"])
    diffusion = bridge["nfe"][n]
    better = np.array(regression["ce_gap_rows"]) - np.array(diffusion["ce_gap_rows"])            # > 0: diffusion wins
    noise = 2 * better.std(ddof=1) / len(better) ** 0.5
    word = "ties with" if abs(better.mean()) < noise else "beats" if better.mean() > 0 else "loses to"
    return (f"at layer {bridge['layer']} the diffusion bridge (NFE {n}: CE gap {diffusion['ce_gap']:+.4f} nats, FVU "
            f"{diffusion['fvu']:.4f}) {word} plain regression with the same network, steps and data "
            f"({regression['ce_gap']:+.4f}, {regression['fvu']:.4f}): its CE is lower by {better.mean():.4f} +- "
            f"{noise:.4f} (2 standard errors, {len(better)} sequences, one training seed)")


def rows(found):
    """The short table: (what, value) as text."""
    geometry, bridge, hybrid = found["geometry"], found["bridge"], found["hybrid"]
    w0, w10 = found["repr_align/w0"], found["repr_align/w10"]
    four = bridge["nfe"][str(bridge["nfe_default"])]
    toy = found.get("toy")
    table = [("backbone", f"{toy['bits_per_byte']:.3f} bits per byte, {toy['seconds']:.0f} s")] if toy else []
    return table + [
        ("layer chosen", f"{geometry['best_layer']}, margin {geometry['margin']:.2f} "
                         f"[{geometry['margin_interval'][0]:.2f}, {geometry['margin_interval'][1]:.2f}]"),
        (f"bridge at NFE {bridge['nfe_default']}", f"CE gap {four['ce_gap']:+.4f} +- {four['ce_gap_se']:.4f}, FVU "
         f"{four['fvu']:.4f}, KL {four['kl']:.4f}, agreement {four['agree']:.1%}, {bridge['size_ratio']:.2f}x the size "
         f"it replaces, {bridge['seconds']:.0f} s"),
        ("regression control", f"CE gap {found['regression']['nfe']['1']['ce_gap']:+.4f}, FVU "
                               f"{found['regression']['nfe']['1']['fvu']:.4f}"),
        ("hybrid", f"CE gap {hybrid['ce_gap']:+.4f} over {hybrid['ce_intact']:.3f} nats, all positions"),
        *((f"masked twin, w = {r['w']:g}",
           f"masked CE {r['curve'][0][1]:.3f} -> {r['val_loss']:.3f} nats, {r['seconds']:.0f} s") for r in (w0, w10)),
        ("generated blocks", generation_line(found["generate"])),
    ]


def generation_line(found):
    """gen-PPL at the entropy of real text: the blocks by product of experts, AR sampling, the twin, real text."""
    def cell(row):
        return "(never there)" if row["matched"] is None else f"{row['matched']:.0f}"
    rows = {name_of(r): r for r in found["rows"]}
    mine = next(r for r in found["rows"] if r.get("expert") == "both")
    twin = "".join(f", {name} {cell(row)}" for name, row in rows.items() if name.startswith("masked twin"))
    return (f"layer {mine['layer']}, {found['settings']['new']} tokens in {mine['calls']} calls: gen-PPL {cell(mine)} "
            f"at real text's entropy (AR {cell(rows['AR, intact model'])}{twin}, unigrams {cell(rows['unigram'])}; "
            f"real text {found['real']['gen_ppl']:.0f})")


def figure(found, path):
    """Three panels: the score over depth, the hybrid's loss over NFE, the conversion's loss over steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.1), constrained_layout=True)
    layers = found["geometry"]["layers"]
    x, y = [r["layer"] for r in layers], [r["score"] for r in layers]
    error = [[max(0, s * (r["score"] - r[end])) for r in layers] for s, end in ((1, "score_low"), (-1, "score_high"))]
    axes[0].errorbar(x, y, yerr=error, fmt="o-", color="#222222", markersize=4, capsize=3)
    best = found["geometry"]["best_layer"]
    axes[0].plot(best, y[best - 1], "o", color="#d1495b", markersize=9)
    axes[0].set(title=f"LOCATE: layer {best} scores highest", xlabel="layer", ylabel="diffusion-friendliness")

    table = found["bridge"]["nfe"]
    nfe = [int(n) for n in table]
    axes[1].errorbar(nfe, [r["ce_gap"] for r in table.values()], yerr=[r["ce_gap_se"] for r in table.values()],
                     fmt="o-", color="#30638e", capsize=3, markersize=4, label="diffusion bridge")
    regression = found["regression"]["nfe"]["1"]
    axes[1].axhline(regression["ce_gap"], color="#d1495b", linestyle="--", label="plain regression (1 call)")
    axes[1].axhspan(regression["ce_gap"] - regression["ce_gap_se"], regression["ce_gap"] + regression["ce_gap_se"],
                    color="#d1495b", alpha=0.12, linewidth=0)
    axes[1].set(title=f"REPLACE: what the hybrid loses, layer {found['bridge']['layer']}", xscale="log", xticks=nfe,
                xticklabels=nfe, xlabel="network calls (NFE)", ylabel="CE gap (nats)")
    axes[1].minorticks_off()

    for stage, color in (("repr_align/w0", "#888888"), ("repr_align/w10", "#edae49")):
        curve = found[stage]["curve"]
        axes[2].plot([r[0] for r in curve], [r[1] for r in curve], "o-", color=color, markersize=3,
                     label=f"w = {found[stage]['w']:g}")
    axes[2].set(title="CONVERT: masked CE of the twin", xlabel="step", ylabel="nats per masked token")
    for ax in axes:
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False)
    axes[2].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=130, format="png")
    plt.close(fig)


def report(found, runs):
    """The text of report.md."""
    geometry, bridge = found["geometry"], found["bridge"]
    best, correlation = geometry["best_layer"], geometry["proxy_correlation"]
    same = [v["name"] for v in geometry["variants"] if v["best_layer"] == best]
    not_same = [f"{v['name']} ({v['best_layer']})" for v in geometry["variants"] if v["best_layer"] != best]
    trivial = [v["name"] for v in geometry["trivial"] if v["best_layer"] == best]
    lines = [
        "# Where should diffusion enter a language model?", "",
        f"**In short:** {verdict(found)}.", "", "| what | result |", "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows(found)), "", "![the three stages](figure.png)", "",
        "## LOCATE", "",
        f"{geometry['tokens']} states a layer from {geometry['sequences']} sequences, seed "
        f"{read_json(runs / 'geometry' / 'config.json')['dihal']['config']['seed']}. "
        f"{len(same)} of {len(geometry['variants'])} variants choose layer {best}"
        + (f"; the others: {', '.join(not_same)}." if not_same else "."),
        f"Trivial predictors that choose it too: {', '.join(trivial) or 'none'}.", "",
        "| layer | curvature | stiffness | effective rank | score | 95% interval | chosen in resamples |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join([str(r["layer"]), *(f"{r[p]:.4g}" for p in PROXIES), f"{r['score']:.2f}",
                             f"[{r['score_low']:.2f}, {r['score_high']:.2f}]", f"{r['chosen']:.0%}"]) + " |"
          for r in geometry["layers"]), "",
        f"Correlation of the proxies over layers: curvature-stiffness {correlation[0][1]:.2f}, curvature-rank "
        f"{correlation[0][2]:.2f}, stiffness-rank {correlation[1][2]:.2f}.", "",
        "## REPLACE", "",
        f"{bridge['objective']} bridge at layer {bridge['layer']}: {bridge['parameters']:,} parameters, "
        f"{bridge['size_ratio']:.2f}x the {bridge['replaced_parameters']:,} it replaces; {bridge['steps']} steps, "
        f"{bridge['tokens']:,} tokens, {bridge['seconds']:.0f} s, sampler {bridge['sampler']}, seed {bridge['seed']}; "
        f"means over {bridge['eval_sequences']} held-out sequences and {bridge['noise_seeds']} sampler noises.", "",
        "| | NFE | FVU | KL | CE gap +- se | noise sd | agreement |", "|---|---|---|---|---|---|---|",
        *(f"| {name} | {n} | {r['fvu']:.4f} | {r['kl']:.4f} | {r['ce_gap']:+.4f} +- {r['ce_gap_se']:.4f} | "
          f"{r['ce_gap_noise_sd']:.5f} | {r['agree']:.1%} |"
          for name in ("bridge", "regression") for n, r in found[name]["nfe"].items()),
        "", f"The hybrid, greedy after `{found['hybrid']['prompt']}`:", "", "```", found["hybrid"]["sample"], "```", "",
        "## CONVERT", "",
        *(f"- w = {r['w']:g}: masked CE {r['curve'][0][1]:.3f} -> {r['val_loss']:.3f} nats after {r['steps']} steps, "
          f"{r['seconds']:.0f} s, {r['tokens_per_s']:,.0f} tokens/s, seed {r['seed']}, {r['eval_sequences']} sequences"
          for r in (found["repr_align/w0"], found["repr_align/w10"])), "",
        "## GENERATE", "", *generation_section(found["generate"]), "",
        f"Python {bridge['python']}, torch {bridge['torch']}, transformers {bridge['transformers']}, device "
        f"{bridge['device']}, {bridge['threads']} threads. Not measured yet: layer sweep, interfaces, "
        "cost, circuits, zero-shot (null in result.json).", ""]
    return "\n".join(lines)


def generation_section(found):
    """Text drawn in hidden space beside its rivals, and how it was drawn."""
    how, mine = found["settings"], next(r for r in found["rows"] if r.get("expert") == "both")
    return [
        f"{found['texts']} texts: {how['prefix']} held-out tokens, then {how['new']} written in blocks of "
        f"{how['block']}; NFE {how['nfe']} and {how['rounds']} refinements = {mine['calls']} calls, alpha "
        f"{how['alpha']}, temperatures {how['temperatures']}, seed {how['seed']}; bridge of {mine['parameters']:,} "
        "parameters (readout included) "
        f"trained for {mine['steps']} steps, {mine['train_seconds']:.0f} s; the readout names "
        f"{mine['readout_accuracy']:.1%} of the tokens from their true states. gen-PPL is that of the intact model, "
        "compared where the entropy of a text's tokens equals real text's (interpolated between temperatures).", "",
        generation_table(found["rows"], found["real"]), "", "![the frontier over temperature](generation.png)"]


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        print("\n".join(f"reads {cfg.runs}/{stage}/result.json" for stage in STAGES))
        return None
    world = setup("cpu")
    runs = Path(cfg.runs)
    found = read_runs(runs)
    run = Run(cfg, world, {"base": found["geometry"]["base"]})
    with atomic(run.out / "figure.png") as temporary:
        figure(found, temporary)
    with atomic(run.out / "generation.png") as temporary:
        shutil.copy(runs / "generate" / "generation.png", temporary)
    with atomic(run.out / "report.md") as temporary:
        temporary.write_text(report(found, runs))
    table = rows(found)
    run.finish({**dict.fromkeys(("sweep", "interfaces", "cost", "circuits", "zero_shot")),
                "generation": {k: found["generate"][k] for k in ("rows", "real", "settings", "texts")},
                "conversion": {k: found[f"repr_align/{k}"]["curve"] for k in ("w0", "w10")},
                "verdict": verdict(found), "table": [list(row) for row in table]})
    if cfg.publish:
        Path("results").mkdir(exist_ok=True)
        for name in ("figure.png", "generation.png", "result.json"):
            shutil.copy(run.out / name, Path("results") / name)
    width = max(len(what) for what, _ in table)
    print("\n".join(f"{what:{width}}  {value}" for what, value in table) + f"\n\nIn short: {verdict(found)}.\n"
          f"The report is {run.out}/report.md")
    return run.result


if __name__ == "__main__":
    main()
