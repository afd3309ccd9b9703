"""evaluate.py: EVALUATE. One report from the runs of the other stages; no number in it is typed.

    python evaluate.py                                   # reads out/, writes out/evaluate/report.md: half a minute
    python evaluate.py --harness lambada_openai --limit 100 --out out/evaluate_lm    # needs pip install "lm-eval[hf]"
    python evaluate.py --publish toy                     # also copies them to results/toy/ and fills the README

Every run wrote a section.md of its own; here they are joined in reading order, with whatever else lies under --runs.
Some findings need two runs: diffusion beside regression, a twin beside another one. Measured here is what no stage
measures: speed, memory, bits per byte; of the same weights once. Writes report.md, figures and result.json to --out.

Letters: N texts, T tokens, L blocks, l the replaced layer.
"""
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import data
from core import backbone, cost, masked, report, zeroshot
from core.common import UserError, entry, parse, pick_dtype, setup
from core.run import Run, read_json, read_section, write_text
from core.stats import paired, verdict


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m"] = "auto"  # auto: by the backbone's size
    runs: str = "out"           # folder that holds the stages' runs
    out: str = "out/evaluate"   # folder of the report
    texts: int = 32             # held-out windows of 128 tokens for bits per byte
    calls: int = 8              # network calls a window of the twins' likelihood
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the models
    repeats: int = 2            # timings are the fastest of so many
    new: int = 64               # tokens of each timing, after as many
    harness: str = ""           # tasks of lm-evaluation-harness, comma-separated
    harness_path: str = ""      # folder of local task descriptions
    limit: int = 0              # examples a task (0: all)
    margin: float = 0.005       # nats of CE or KL within which two models are called equal
    seed: int = 0               # of the twins' masks
    publish: str = ""           # copy figures and numbers to results/NAME, a column of the README (empty: do not)
    MEASURES = ("preset", "texts", "calls", "dtype", "repeats", "new", "harness", "harness_path",
                "limit", "margin", "seed")  # the report is made anew whenever it is asked for


PRESETS = {"tiny": dict(texts=3, calls=4, repeats=1, new=4), "135m": dict(texts=8, calls=4, repeats=1, new=32)}
STAGES = {  # folder under --runs, in reading order -> the command that makes it
    "toy": "python toy.py --out {out}", "geometry": "python geometry.py --out {out}",
    "bridge": "python bridge.py --out {out}", "regression": "python bridge.py --objective regression --out {out}",
    "hybrid": "python hybrid.py --bridge {runs}/bridge --out {out}",
    "generate": "python generate.py --bridges {runs}/blocks --out {out}",
    "repr_align/w0": "python repr_align.py --align_weight 0 --out {out}",
    "repr_align/w10": "python repr_align.py --align_weight 10 --out {out}",
    "repr_align/block": "python repr_align.py --align_weight 0 --attention block --out {out}",
    "tasks/circuits": "python circuits.py --model {runs}/tasks/toy --out {out}"}  # of a backbone of its own
# the README's first table: words, and the first headline of the first run that is there (REPLACE, CONVERT: see main)
FIRST = {"LOCATE": ("best layer", "geometry"), "REPLACE": ("", "bridge"),
         "GENERATE": ("gen-PPL", "generate_seeds/equal", "generate"), "CONVERT": ("w = 10:", "repr_align/w10"),
         "COMPARE": ("tasks solved by both:", "tasks/circuits_aligned", "tasks/circuits")}
ANSWERS = {  # its second one: question -> runs and words of their findings, the strongest evidence first
    "which layer?": (("geometry", "is chosen"),),
    "the score against depth alone": (("sweep", "depth alone; "),),
    "every token known: diffusion (4 or 8 calls) against regression (1)": (("sweep", "KL against that of regression"),
                                                                          ("bridge, regression", "by KL")),
    "the same, layer 4, 4 calls, as many blocks as replaced; regression at the better of two rates": (
        ("ablate/objective", "4, by KL: diffusion against"),),
    "every token known: diffusion against a table of token means": (("sweep", "KL against that of a table"),),
    "h[l] in 32 diffused numbers and upper blocks, against a network": (("interfaces", "bottleneck against causal"),),
    "the last state in 32 diffused numbers and head, against the same": (("interfaces", "latent against causal"),),
    "tokens hidden: 16 drawn states (8 calls each) against one mean (1 call)": (("span", "tempered: sampled stat"),),
    "tokens hidden: 16 drawn states against unigrams": (("span", "used: sampled states against unigrams"),),
    "text drawn at the best of layers 0, 1, 2, 4, 7 against the next": (("layers/text", "against blocks at layer"),),
    "text drawn at that layer against the embedding's": (("layers/text", "against blocks at layer 0"),),
    "text drawn against its best rival at no more calls (one draw of it)": (
        ("generate_seeds/equal", " against "), ("generate", " against ")),
    "a gap of 8 tokens filled, against its best rival": (("generate_seeds/gap", " against "),),
    "conversion with alignment against without, by the bound": (
        ("ablate/arms", "w = 10 against blocks, causal context:"), ("repr_align", "with alignment")),
    "the same, a toy that knows tasks: how many the twin still solves": (
        ("tasks/arms", "tasks solved: blocks, causal context, w = 10 against"),),
    "the AR model's own loss beside conversion against without: tasks still solved": (
        ("tasks/arms", "tasks solved: blocks, causal context, next-token loss 1 against"),),
    "alignment for a quarter of the steps against none: lowest masked CE on the way": (
        ("ablate/align", "off after a quarter against w = 0"),),
    "conversion to blocks of tokens against all at once, by the bound": (
        ("ablate/arms", "blocks against bidirectional:"), ("repr_align", "by blocks")),
    "circuits of the twin, untrained and trained": (("tasks/circuits_aligned", "shares"), ("tasks/circuits", "shares"))}
ARMS = {("bridge", "regression"): ("layer", "steps", "tokens", "parameters", "seed", "eval_sequences"),
        **{("repr_align/w0", f"repr_align/{arm}"): ("steps", "seed", "eval_sequences")  # what two compared runs share,
           for arm in ("w10", "block")}}
SAME = ("data", "skip", "calibration", "batch_size", "seq_len", "train_tokens")     # and which of their flags


# --------------------------------------------------------------------------------------------------------- the runs
def read_runs(runs, out):
    """{folder under runs: its result.json} of every finished run, the stages first. Raises UserError for runs of
    different backbones, for one that is made of weights that have changed, and for two that cannot be compared."""
    def of_another(folder):  # a cell is part of its study's own section; a pipeline below has a report of its own
        above = [up for up in folder.parents if up.is_relative_to(runs)]
        return any((up / "config.json").exists() or up != runs and (up / "evaluate").exists() for up in above) or any(
            part.startswith("cell_") for part in folder.parts)
    found = (f.parent for f in runs.rglob("section.md") if (f.parent / "result.json").exists())
    folders = {str(f.relative_to(runs)) for f in found if f.resolve() != out.resolve() and not of_another(f)}
    order = [*(s for s in STAGES if s in folders), *sorted(folders - set(STAGES))]
    if not order:
        raise UserError(f"{runs} holds no finished run; make some with: bash run_all.sh")
    found = {stage: read_json(runs / stage / "result.json") for stage in order}
    base = next((found[s]["base"] for s in STAGES if "base" in found.get(s, ())), None)
    for stage in order:
        if stage in STAGES and not stage.startswith("tasks/") and found[stage]["base"] != base:
            raise UserError(f"{runs}/{stage} comes from another backbone than the runs beside it; delete the stale one "
                            "and run it again")
        for part, weights in found[stage].get("made_of", {}).items():
            if (runs / stage / part).exists() and backbone.identity(runs / stage / part) != weights:
                raise UserError(f"{runs}/{stage} was made of other weights than those now in {runs / stage / part}; "
                                "delete it and run it again")
    for (one, two), same in ARMS.items():
        if one in found and two in found:
            flags = [read_json(runs / s / "config.json")["dihal"]["config"] for s in (one, two)]
            differ = [k for k in same if found[one][k] != found[two][k]] + [
                k for k in SAME if flags[0].get(k) != flags[1].get(k)]
            if differ:
                raise UserError(f"{runs}/{one} and {runs}/{two} differ in {', '.join(differ)}, so they cannot be "
                                "compared; run one of them again")
    return found


def against_regression(found, margin):
    """One sentence on diffusion against its control, and the same for the README; by KL (what the hybrid's law lost, on
    all tokens) and by CE (what one text's next token showed). One training seed each: never a verdict, whatever the
    interval over texts, which holds for these two trainings; studies/sweep.py has the seeds."""
    bridge, control = found["bridge"], found["regression"]["nfe"]["1"]
    n = str(bridge["nfe_default"])
    texts = {key: paired(bridge["nfe"][n][f"{key}_rows"], control[f"{key}_rows"]) for key in ("kl", "ce_gap")}
    words = {key: verdict(gap, margin, "nats", "texts") for key, gap in texts.items()}
    return (f"at layer {bridge['layer']} the diffusion bridge (NFE {n}) beside plain regression with the same network, "
            f"steps and data: not known (n = 1 training seed each); of these two trainings, by KL {words['kl']}; by CE "
            f"{words['ce_gap']}",
            f"CE gap {bridge['nfe'][n]['ce_gap']:+.4f} nats, by plain regression {control['ce_gap']:+.4f}")


def measure_models(cfg, runs, found, world, dtype):
    """What no stage measures: {"zero_shot": ..., "cost": ..., "harness": ...} of the models under `runs`."""
    import hybrid
    model = hybrid.from_bridge(runs / "bridge", device=world.device, dtype=dtype)
    tokenizer = hybrid.tokenizer_of(model)
    intact = backbone.load(model.config.base_model, world.device, dtype)
    if max(128, 5 * cfg.new) > intact.config.max_position_embeddings:
        raise UserError(f"--new {cfg.new}: five times as many tokens, and windows of 128, must fit the model's "
                        f"{intact.config.max_position_embeddings} positions")
    meta = read_json(runs / "data" / "meta.json")
    texts = {"held-out": (data.Tokens(runs / "data", "val", 127).windows(cfg.texts).to(world.device),
                          meta["bytes"]["val"] / meta["tokens"]["val"])}
    twins = {f"masked, {s.removeprefix('repr_align/')}": masked.load_converted(runs / s, world.device, dtype)[0]
             for s in found if s.startswith("repr_align/")}
    models = {"AR": intact.model, f"hybrid, NFE {model.config.nfe}": model, **twins}
    return {"harness": zeroshot.harness(models, tokenizer, cfg.harness.split(","), cfg.harness_path, cfg.limit,
                                        cfg.calls, cfg.seed) if cfg.harness else {},     # first: it may refuse a task
            "zero_shot": zeroshot.zero_shot(models, texts, cfg.calls, cfg.seed),
            "cost": cost.cost(model, intact, next(iter(twins.values()), None), cfg.repeats, cfg.new)}


# --------------------------------------------------------------------------------------------------------- join
def overview(found, path):
    """Three panels: the score over depth, the hybrid's loss over NFE, the conversion's loss over steps."""
    with report.figure(path, columns=3) as (axes,):
        for ax, title, x, y in zip(axes, ("LOCATE: the score of each layer", "REPLACE: what the hybrid loses",
                                          "CONVERT: masked CE of the twin"),
                                   ("layer", "network calls (NFE)", "step"),
                                   ("diffusion-friendliness", "CE gap (nats)", "nats per masked token")):
            ax.set(title=title, xlabel=x, ylabel=y)
        if "geometry" in found:
            rows, best = found["geometry"]["layers"], found["geometry"]["best_layer"]
            x, score, *band = zip(*[[r[k] for k in ("layer", "score", "score_low", "score_high")] for r in rows])
            axes[0].plot(x, score, "o-", markersize=4, color=report.BLACK)
            axes[0].fill_between(x, *band, color=report.BLACK, alpha=0.2, linewidth=0)
            axes[0].plot(best, score[best - 1], "o", color=report.RED, markersize=9, label=f"layer {best} is chosen")
        for stage, color, label in (("bridge", report.BLUE, "diffusion bridge"),
                                    ("regression", report.RED, "plain regression (one call)")):
            table = found.get(stage, {}).get("nfe", {})
            axes[1].errorbar([int(n) for n in table], [r["ce_gap"] for r in table.values()], fmt="o-", capsize=3,
                             yerr=[r["ce_gap_se"] for r in table.values()], color=color, label=label, markersize=4)
        alike = [s for s in found if s.startswith("repr_align/") and "attention" not in found[s]["flags"]]
        for i, stage in enumerate(alike):                                # another arm's masked CE is of another task
            curve = found[stage]["curve"]
            axes[2].plot([r[0] for r in curve], [r[1] for r in curve], "o-", markersize=3,
                         label=stage.removeprefix("repr_align/"),
                         color=(report.GREY, report.YELLOW, report.GREEN, report.BLUE)[i % 4])


def join(runs, found, out):
    """The sections in reading order, their figures copied beside the report; a stage without one names its command."""
    parts = []
    for stage in [*STAGES, *(s for s in found if s not in STAGES)]:
        if stage in found:
            text = read_section(runs / stage)
            for name in re.findall(r"\]\(([\w.-]+\.png)\)", text):
                mine = f"{stage.replace('/', '_')}_{name}"
                shutil.copy(runs / stage / name, out / mine)
                text = text.replace(f"]({name})", f"]({mine})")
            head, rest = text.split("\n", 1)
            parts.append(f"{head}{'' if stage in STAGES else f' ({stage})'}\n{rest}")
        elif stage != "toy":
            parts.append(f"*{stage}: not run.* `{STAGES[stage].format(runs=runs, out=runs / stage)}`\n")
    return parts


def readme_blocks(root):
    """What --publish writes into the README: two tables of every results/NAME."""
    found = {f.parent.name: read_json(f) for f in sorted(root.glob("results/*/result.json"))}
    found = {**{"toy": found.get("toy")}, **found} if "toy" in found else found      # the default comes first
    return {"results": report.table(["stage", *found], [
                [stage, *(of["table"].get(stage) for of in found.values())] for stage in FIRST]),
            "findings": report.table(["question", *found], [
                [question, *(report.answer(of["findings"], some) for of in found.values())]
                for question, some in ANSWERS.items()])}


def publish(run, name):
    """Copy the report's numbers and figures to results/NAME and write the README's tables."""
    root = Path(__file__).resolve().parent
    (root / "results" / name).mkdir(exist_ok=True, parents=True)
    for file in [*run.out.glob("*.png"), run.out / "report.md", run.out / "result.json"]:
        shutil.copy(file, root / "results" / name / file.name)
    write_text(root / "README.md", report.fill_markers((root / "README.md").read_text(), readme_blocks(root)))


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of("", cfg.out, f"{cfg.runs}/bridge"))
    runs, out = Path(cfg.runs), Path(cfg.out)
    if cfg.texts < 2 or cfg.repeats < 1 or cfg.new < 4 or cfg.calls < 4 or cfg.calls % 2:
        raise UserError("--texts must be at least 2, --repeats 1, --new 4, and --calls 4 and even")
    found = read_runs(runs, out)

    # ------------------------------------------------------------------------------------- what no stage measures
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    models = {s: backbone.identity(runs / s) for s in found if s == "bridge" or s.startswith("repr_align/")}
    asked = {"of": models, **{k: v for k, v in asdict(cfg).items() if k not in ("runs", "out", "publish", "margin")}}
    old = read_json(out / "result.json") if (out / "result.json").exists() else {}
    own = {k: old[k] for k in ("zero_shot", "cost", "harness")} if old.get("asked") == asked else (
        measure_models(cfg, runs, found, world, dtype) if "bridge" in found else
        {"zero_shot": None, "cost": None, "harness": {}})
    run = Run(cfg, world, {})

    # ------------------------------------------------------------------------------------------------ the report
    findings = [f"**{stage}**: {line}" for stage in found for line in found[stage].get("findings", [])]
    table = {stage: f"{words} {found[s]['headline'][0][1]}".strip()
             for stage, (words, *some) in FIRST.items() for s in [s for s in some if s in found][:1]}
    if {"bridge", "regression"} <= set(found):
        sentence, table["REPLACE"] = against_regression(found, cfg.margin)
        findings = [f"**bridge, regression**: {sentence}.", *findings]
    twins = {s.removeprefix("repr_align/"): found[s] for s in found if s.startswith("repr_align/")}
    findings += [f"**repr_align**: {report.compare_arms(twins['w0'], twins[arm], what)}" for what, arm in (
        ("with alignment", "w10"), ("by blocks", "block")) if {"w0", arm} <= set(twins)]
    if len(twins) > 1:
        table["CONVERT"] = "bound, nats: " + ", ".join(f"{arm} {r['bound'][0]:.3f}" for arm, r in twins.items())
    every = [[s, *row] for s in found for row in found[s].get("headline", [])]
    overview(found, out / "figure.png")
    about = next(iter(found.values()))
    text = "\n".join([
        "# Where should diffusion enter a language model?", "", *(f"- {line}" for line in findings), "",
        report.table(["run", "what", "result"], every), "", "![the three stages](figure.png)", "",
        *join(runs, found, out), *(cost.section(own["cost"], out / "cost.png") if own["cost"] else []),
        *(zeroshot.section(own["zero_shot"], own["harness"]) if own["zero_shot"] else []),
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}, device "
        f"{about['device']}, {about['threads']} threads.", ""])
    write_text(out / "report.md", text)

    run.finish({**{key: found.get(stage) for key, stage in (
        ("sweep", "sweep"), ("interfaces", "interfaces"), ("generation", "generate"), ("circuits", "tasks/circuits"))},
        "conversion": {s: found[s]["curve"] for s in found if s.startswith("repr_align/")}, **own, "asked": asked,
        "table": table, "findings": findings, "headlines": every})
    if cfg.publish:
        publish(run, cfg.publish)
    width = max(len(what) for _, what, _ in every)
    print("\n".join(f"{what:{width}}  {value}" for _, what, value in every) + "\n\n" + "\n".join(findings)
          + f"\n\nThe report is {out}/report.md")
    return run.result


if __name__ == "__main__":
    main()
