"""report.py: what EVALUATE writes: sentences, tables and figures from the numbers of the stages. No number is typed.

    python evaluate.py                      # calls everything here; this file has no command of its own

`found` is a dict: stage -> its result.json, as evaluate.read_runs gives it; `own` is what evaluate.py measured itself.
"""
import numpy as np

import circuits
from core.run import read_json
from generate import name_of
from generate import table as generation_table
from geometry import PROXIES
from studies import interfaces, sweep
from studies.ablate import steps_to


def verdict(found):
    """One sentence on diffusion against regression, decided by the numbers: a difference in CE gap counts when it
    exceeds twice its standard error over held-out sequences (paired: both saw the same ones). Another training seed
    adds about as much noise again (LOG.md), so one seed is ahead or behind, and does not win or lose."""
    bridge, regression = found["bridge"], found["regression"]["nfe"]["1"]
    n = str(bridge["nfe_default"])
    diffusion = bridge["nfe"][n]
    better = np.array(regression["ce_gap_rows"]) - np.array(diffusion["ce_gap_rows"])            # > 0: diffusion wins
    noise = 2 * better.std(ddof=1) / len(better) ** 0.5 if len(better) > 1 else float("inf")
    word = ("cannot be told from" if len(better) < 2 else "ties with" if abs(better.mean()) < noise else
            "is ahead of" if better.mean() > 0 else "is behind")
    return (f"at layer {bridge['layer']} the diffusion bridge (NFE {n}: CE gap {diffusion['ce_gap']:+.4f} nats, FVU "
            f"{diffusion['fvu']:.4f}) {word} plain regression with the same network, steps and data "
            f"({regression['ce_gap']:+.4f}, {regression['fvu']:.4f}): its CE differs by {-better.mean():+.4f} +- "
            f"{noise:.4f} (2 standard errors, {len(better)} sequences, one training seed)")


def rows(found, own):
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
        ("speed", speed_line(own["cost"])),
        *((("score and bridgeability", sweep_line(of_sweep(found))),) if of_sweep(found) else ()),
        *((("circuits", circuits_line(found["tasks/circuits"])),) if "tasks/circuits" in found else ()),
    ]


def of_sweep(found):
    """The full layer sweep of study.sh, or the quick one of run_all.sh, or None."""
    return found.get("sweep", found.get("sweep_quick"))


def sweep_line(found):
    """The score against depth, in a line: on the model, and over the backbones of the full sweep. The whole verdict
    stands under the sweep's tables."""
    toy = found["backbones"]["toy"]
    score, depth = (next(r for r in toy["correlations"] if r["name"] == n) for n in ("score", "-layer"))
    seeds = f"{toy['seeds']} training seeds" if toy["seeds"] > 1 else "one training seed, the interval is the score's"
    text = (f"rho of the score with -FVU over {len(toy['layers'])} layers {score['rho']:.2f} "
            f"[{score['interval'][0]:.2f}, {score['interval'][1]:.2f}], of depth alone {depth['rho']:.2f} (bridges of "
            f"{found['steps']} steps, {seeds})")
    if len(found["backbones"]) > 1:
        text += f"; mean over {len(found['backbones'])} backbones, score against depth: " + ", ".join(
            f"{found['measures'][k]['score']:.2f} and {found['measures'][k]['-layer']:.2f} by {name}"
            for k, name in (("fvu", "FVU"), ("kl", "KL"), ("ce_gap", "CE gap")))
    return text


def speed_line(cost):
    """Milliseconds a token of the intact model and the hybrid, and the break-even NFE."""
    mine = [r for r in cost if r["what"].startswith("hybrid")]
    still = [r["nfe"] for r in mine if r["ratio"] <= 1]
    shown = ", ".join(f"NFE {r['nfe']} {r['ratio']:.2f}x" for r in mine)
    return (f"intact {cost[0]['ms']:.1f} ms a token (cached, batch 1); hybrid {shown}; break-even: "
            + (f"NFE {max(still)}" if still else "none"))


def circuits_line(found):
    """Overlap with the AR model of each kind of twin, mean over the tasks that every kind solves often enough."""
    k, used = str(found["k"]), {n: t for n, t in found["tasks"].items() if t["usable"]}
    if not used:
        return "no task is solved often enough by both models"
    kinds = dict.fromkeys(n for t in used.values() for n in t["overlap"][k] if n.startswith("AR and "))
    both = {task: t["overlap"][k] for task, t in used.items() if set(kinds) <= set(t["overlap"][k])}
    if not both:
        return "no task is solved often enough by every twin"
    overlaps = both.values()

    def mean(name):
        return sum(row[name]["mean"] for row in overlaps) / len(overlaps)
    shared = ", ".join(f"{n[7:]} {mean(n):.2f}" for n in kinds)
    chance = sum(row["chance"] for row in overlaps) / len(overlaps)
    again = f", AR on other prompts {mean('AR, other prompts'):.2f}" if found["resamples"] > 1 else ""
    return (f"{' and '.join(both)}, of {len(found['tasks'])} tasks those that all twins solve; {k} strongest edges "
            f"shared with the AR model (Jaccard): {shared}; by chance {chance:.2f}{again}")


def generation_line(found):
    """gen-PPL at the entropy of real text: the blocks by product of experts, AR sampling, the twin, real text."""
    def cell(row):
        return "(never there)" if row["matched"] is None else f"{row['matched']:.0f}"
    rows = {name_of(r): r for r in found["rows"]}
    mine = next(r for r in found["rows"] if r.get("expert") == "both")
    twin = "".join(f", {name} {cell(row)}" for name, row in rows.items() if name.startswith("masked twin"))
    return (f"layer {mine['layer']}, {found['settings']['new']} tokens in {mine['calls']} calls: gen-PPL {cell(mine)} "
            f"at real text's entropy (AR, judged by itself, {cell(rows['AR, intact model'])}{twin}, "
            f"unigrams {cell(rows['unigram'])}; "
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


def report(found, own, runs):
    """The text of report.md."""
    geometry, bridge = found["geometry"], found["bridge"]
    best, correlation = geometry["best_layer"], geometry["proxy_correlation"]
    same = [v["name"] for v in geometry["variants"] if v["best_layer"] == best]
    not_same = [f"{v['name']} ({v['best_layer']})" for v in geometry["variants"] if v["best_layer"] != best]
    trivial = [v["name"] for v in geometry["trivial"] if v["best_layer"] == best]
    lines = [
        "# Where should diffusion enter a language model?", "",
        f"**In short:** {verdict(found)}.", "", "| what | result |", "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows(found, own)), "", "![the three stages](figure.png)", "",
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
        *conversion_line(found), "",
        "## GENERATE", "", *generation_section(found["generate"]), "",
        *optional_sections(found), *cost_section(own["cost"]), *zero_shot_section(own), *studies(runs),
        f"Python {bridge['python']}, torch {bridge['torch']}, transformers {bridge['transformers']}, device "
        f"{bridge['device']}, {bridge['threads']} threads.", ""]
    return "\n".join(lines)


def conversion_line(found):
    """What alignment bought: the loss at the end, and how much sooner the unaligned arm's final loss was reached."""
    w0, w10 = found["repr_align/w0"], found["repr_align/w10"]
    there = steps_to(w10["curve"], w0["val_loss"])
    gain = w0["val_loss"] - w10["val_loss"]
    how = "never reaches the unaligned arm's final loss" if there is None else (
        f"reaches the unaligned arm's final loss after {there:.0f} of {w0['steps']} steps")
    return ["", f"Alignment changed the final loss by {-gain:+.3f} nats ({'better' if gain > 0 else 'worse'} with it, "
            f"one seed); the aligned arm {how}, and a step of it costs {w10['seconds'] / w0['seconds']:.2f}x."]


def optional_sections(found):
    """Layer sweep and circuits, where they have been run; the command that runs them, where not."""
    lines = ["## Does the score foretell bridgeability?", ""]
    if some := of_sweep(found):
        lines += [sweep.table(some), "", "![score against what the bridge reaches](sweep.png)", ""]
    else:
        lines += ["Not measured: `python sweep.py`.", ""]
    if "sweep_matched" in found:
        lines += ["### Each bridge as deep as the blocks it replaces", "",
                  sweep.table(found["sweep_matched"]), ""]
    lines += ["## Interfaces at equal budget", "", *(
        [interfaces.table(found["interfaces"]), "", "![their frontiers over temperature](interfaces.png)"]
        if "interfaces" in found else ["Not measured: `python interfaces.py`."]), "", "## COMPARE", ""]
    if "tasks/circuits" not in found:
        return [*lines, "Not measured: `python circuits.py --model out/tasks/toy --out out/tasks/circuits`.", ""]
    some = found["tasks/circuits"]
    return [*lines, f"Edge attribution (EAP-IG, {some['ig_steps']} points) over {some['edges']:,} edges of a model of "
            f"{some['layers']} blocks whose text holds the tasks of tasks.py, seed {some['seed']}, {some['resamples']} "
            "sets of prompts that all analysed models solve (mean +- sd over sets and twins' seeds). The last columns: "
            "share of prompts still solved without some components.", "", circuits.table(some), "",
            *(f"- {line}" for line in some["verdicts"]),
            *patching_lines(some), "", "![circuits before and after conversion](circuits.png)", ""]


def studies(runs):
    """The tables of ablate.py's studies, where some were run."""
    for file in sorted((runs / "ablate").glob("*.md")):
        yield from (f"## Study: {file.stem}", "", file.read_text().strip(), "")


def patching_lines(found):
    """How well attribution agrees with exact patching."""
    for task, about in found["tasks"].items():
        for name, row in about.get("patching", {}).items():
            yield (f"- {task}, {name}: over {row['edges']} edges and {row['pairs']} pairs, attribution against exact "
                   f"patching: Pearson {row['eap_ig']['pearson']:.2f} (EAP-IG, 10 points), {row['eap']['pearson']:.2f} "
                   f"(EAP); Spearman {row['eap_ig']['spearman']:.2f}, {row['eap']['spearman']:.2f}")


def cost_section(cost):
    """Latency of each model beside what FLOPs and the number of blocks foretell."""
    hybrids = [r for r in cost if "nfe" in r]

    def near(key):
        return sum(abs(r["ratio"] / r[key] - 1) <= 0.25 for r in hybrids)
    return ["## Cost", "", "Cached greedy generation, batch 1 (the twin: all tokens at once, no cache); "
            "ratios to the intact model's stock generate(). FLOPs: 2 a parameter, 4 a key and channel. Peak: weights "
            "and the tensors made on the way. Not sold as a speed-up.", "",
            "| model | ms a token | tokens/s | ratio | FLOPs ratio | blocks ratio | weights (MB) | peak (MB) |",
            "|---" * 8 + "|", *(f"| {r['what']} | {r['ms']:.2f} | {r['tokens_per_s']:.0f} | {r['ratio']:.2f} | "
                                f"{r['predicted']:.2f} | {r['blocks']:.2f} | {r['weights_mb']:.1f} | "
                                f"{r['peak_mb']:.1f} |" for r in cost),
            "",
            f"Of {len(hybrids)} hybrids, {near('predicted')} are within 25% of the FLOPs ratio, {near('blocks')} of "
            "the ratio of blocks run." + (" At this size and batch 1 the time goes into starting operations, not into "
                                          "arithmetic." if near("predicted") < len(hybrids) / 2 else ""), "",
            "![latency by NFE and by layer](cost.png)", ""]


def zero_shot_section(own):
    """Bits per byte, cloze accuracy, and the harness' tasks where they were asked for."""
    some = own["zero_shot"]
    titles, kinds = list(some["windows"]), list(next(iter(some["cloze"].values())))
    windows = ", ".join(f"{n} of {title}" for title, n in some["windows"].items())
    lines = ["## Zero-shot", "", f"Bits per byte over windows of 128 tokens ({windows}; a twin's is an upper bound, "
             f"{some['calls']} calls a window, +- standard error of the estimate), and which of two tokens comes next "
             f"({some['questions']} questions a kind, half of them right by chance).", "",
             "| model | " + " | ".join([*titles, *kinds]) + " |", "|---" * (1 + len(titles) + len(kinds)) + "|"]
    for name, texts in some["bits"].items():
        bits = [f"{t['bits_per_byte']:.3f}" + (f" +- {t['se']:.3f}" if t["se"] is not None else "")
                for t in texts.values()]
        lines.append(f"| {name} | " + " | ".join([*bits, *(f"{v:.0%}" for v in some["cloze"][name].values())]) + " |")
    for name, tasks in own.get("harness", {}).items():
        lines += ["", *(f"- lm-evaluation-harness, {name}, {task}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items())
                        for task, row in tasks.items())]
    return [*lines, ""]


def cost_figure(cost, path):
    """Latency over NFE at the chosen layer, and over layers at one NFE, beside the intact model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True, sharey=True)
    for ax, start, key, title in ((axes[0], "hybrid", "nfe", "by network calls"),
                                  (axes[1], "random", "layer", "by layer, bridges as deep as what they replace")):
        mine = [r for r in cost if r["what"].startswith(start)]
        for name, style in (("ratio", "o-"), ("predicted", ":"), ("blocks", "--")):
            ax.plot([r[key] for r in mine], [r[name] for r in mine], style, markersize=4, color="#30638e",
                    label={"ratio": "measured", "predicted": "by FLOPs", "blocks": "by blocks run"}[name])
        ax.axhline(1, color="#d1495b", linewidth=1)
        ax.set(xlabel={"nfe": "network calls (NFE)", "layer": "layer"}[key], ylim=(0, None),
               xticks=[r[key] for r in mine])
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="time a token over the intact model")
    axes[0].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=120, format="png")
    plt.close(fig)


def generation_section(found):
    """Text drawn in hidden space beside its rivals, and how it was drawn."""
    how, mine = found["settings"], next(r for r in found["rows"] if r.get("expert") == "both")
    return [
        f"{found['texts']} texts: {how['prefix']} held-out tokens, then {how['new']} written in blocks of "
        f"{how['block']}; NFE {how['nfe']} and {how['rounds']} refinements = {mine['calls']} calls, alpha "
        f"{how['alpha']}, temperatures {how['temperatures']}, seed {how['seed']}; bridge of {mine['parameters']:,} "
        "parameters (readout included) "
        f"trained for {mine['steps']} steps, {mine['train_seconds']:.0f} s; the readout names "
        f"{mine['readout_accuracy']:.1%} of the tokens from their true states. gen-PPL is that of the intact "
        "model (which favours its own samples, the row AR), compared where the entropy of a text's tokens equals real "
        "text's (interpolated between temperatures).", "",
        generation_table(found["rows"], found["real"]), "", "![the frontier over temperature](generation.png)"]
