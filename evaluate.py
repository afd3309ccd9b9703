"""EVALUATE: one report from the runs of the other stages.

    python evaluate.py                                  # reads out/, writes out/evaluate: a minute
    python evaluate.py --runs out/tiny --out out/tiny/evaluate
    python evaluate.py --harness lambada_openai         # needs pip install "lm-eval[hf]"

Every stage left numbers in its result.json. They become sentences here and nowhere else. What no
stage measures is measured here: bits per byte, and milliseconds a token.

Writes report.md, figure.png, the figures of the stages and result.json.

Shapes: N windows, T tokens.
"""
import math
import shutil
import timeit
from collections import Counter
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

import data
from core import backbone
from core.common import Dtype, UserError, entry, parse, pick_dtype, setup
from core.report import figure, paired, table, unpaired, verdict
from core.run import provenance, read_json, recorded, write_json, write_text

# hybrid and core.masked load transformers, which takes seconds. The functions that need them import
# them, so that --help is quick.


@dataclass
class Config:
    # what and where
    preset: backbone.Preset = "auto"  # auto: by model size
    runs: str = "out"           # folder that holds the runs of the stages
    out: str = "out/evaluate"   # folder of the report
    margin: float = 0.005       # nats: a smaller difference is a tie
    # measurement
    texts: int = 32             # held-out windows of 128 tokens for bits per byte
    calls: int = 8              # network calls a window for a converted model's bound
    new: int = 64               # tokens that each timing writes, after a prompt of equal length
    harness: tuple[str, ...] = ()  # tasks of lm-evaluation-harness
    limit: int = 0              # examples a task (0: all)
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # of the models; auto: bf16 on a GPU


PRESETS = {"tiny": dict(texts=3, calls=4, new=4), "135m": dict(texts=8, calls=4, new=32)}


# -------------------------------------------------------------------------------------------------
# The runs

FOLDERS = ["toy", "geometry", "bridge", "regression", "hybrid", "generate", "circuits"]


def read_runs(runs):
    """{folder: its result.json} of the finished runs."""
    arms = [f"convert/{path.name}" for path in sorted(runs.glob("convert/*"))]
    results = {}
    for folder in FOLDERS + arms:
        is_data = (runs / folder / "meta.json").exists()
        if (runs / folder / "result.json").exists() and not is_data:
            recorded(runs / folder)                     # refuses a run of the second edition
            results[folder] = read_json(runs / folder / "result.json")
    # The circuits may belong to another model, one that was taught tasks
    bases = {result["base"] for folder, result in results.items() if folder != "circuits"}
    if len(bases) != 1:
        raise UserError(f"{runs} holds finished runs of {len(bases)} base models instead of one; "
                        "delete the stale folders, if any, then: bash run_all.sh")
    return results


def converted(results):
    """{name: result} of the converted models."""
    return {folder.removeprefix("convert/"): result for folder, result in results.items()
            if folder.startswith("convert/")}


# -------------------------------------------------------------------------------------------------
# Sections: every stage that was run gets its findings, the rows of its table and their columns

def locate(results, cfg):
    result = results["geometry"]
    best = result["best_layer"]
    layers = result["layers"]
    choices = [variant["best_layer"] for variant in result["variants"]]
    depth = -result["trivial"][0]["spearman_with_score"]       # that of minus the layer
    findings = [
        f"The geometry score chooses layer {best} of {len(layers)} candidates, and does so in "
        f"{layers[best - 1]['chosen']:.0%} of the bootstrap resamples.",
        f"{choices.count(best)} of {len(choices)} variants of its constants choose that layer. The "
        f"score's rank correlation with depth is {depth:+.2f}."]
    if result.get("equal_windows") or result.get("at_ceiling"):
        findings.append(
            f"{result['equal_windows']} windows of the text were left out as copies of others; "
            f"curvature is near its ceiling 1/eps at layers {result['at_ceiling']}.")
    return findings, layers, "layer score score_low score_high curvature stiffness effective_rank"


def replace(results, cfg):
    result = results["bridge"]
    calls = result["nfe_default"]
    numbers = result["nfe"][str(calls)]
    findings = [
        f"A diffusion bridge in place of blocks 1..{result['layer']} ({calls} calls) changes the "
        f"next-token loss by {numbers['ce_gap']:+.4f} nats (standard error "
        f"{numbers['ce_gap_se']:.4f}); the KL from the intact model is {numbers['kl']:.4f}."]
    columns = "model fvu kl ce_gap ce_gap_se agree"
    rows = [{"model": f"bridge, NFE {nfe}", **row} for nfe, row in result["nfe"].items()]
    if "regression" in results:
        regression = results["regression"]
        control = regression["nfe"]["1"]
        rows.append({"model": "regression", **control})
        training = itemgetter("layer", "parameters", "steps")
        same_texts = len(numbers["kl_rows"]) == len(control["kl_rows"])
        if training(result) != training(regression) or not same_texts:
            findings.append("The regression is no rival: its layer, size, steps or texts differ.")
            return findings, rows, columns
        gap = paired(numbers["kl_rows"], control["kl_rows"])
        findings.append(
            f"Diffusion against plain regression with the same network (KL {control['kl']:.4f} in "
            f"one call): {verdict(gap, cfg.margin, 'nats', 'texts')}. That is one training of "
            "each; the interval is over texts.")
    return findings, rows, columns


def generate(results, cfg):
    rows = results["generate"]["rows"]
    real = results["generate"]["real"]["gen_ppl"]
    columns = "method seed calls gen_ppl_at_real_entropy tokens_per_s"
    ours = {}                                           # {(method, calls): log gen-PPL by seed}
    theirs = {}
    seen = Counter(map(itemgetter("method", "seed"), rows))
    for row in rows:
        if seen[row["method"], row["seed"]] > 1:        # two models, not two seeds of one
            row["method"] += f" ({row['folder']})"
        row["gen_ppl_at_real_entropy"] = row["matched"]
        methods = theirs if row["layer"] is None else ours
        logs = methods.setdefault((row["method"], row["calls"]), [])
        logs.append(math.log(row["matched"] or math.inf))   # None: it stays below that entropy
    if min(map(mean, ours.values()), default=math.inf) == math.inf:
        return ["Hidden-state diffusion does not reach the entropy of real text."], rows, columns
    best, calls = min(ours, key=lambda method: mean(ours[method]))
    logs = ours[best, calls]
    findings = [f"At the entropy of real text, {best} ({calls} calls) has gen-PPL "
                f"{math.exp(mean(logs)):.1f}; real text has {real:.1f}."]
    rivals = [method for method, values in theirs.items()
              if method[1] <= calls and math.isfinite(mean(values))]
    if rivals:
        rival = min(rivals, key=lambda method: mean(theirs[method]))
        words = verdict(unpaired(logs, theirs[rival]), unit="nats a token")
        findings.append(f"Against {rival[0]}, the best rival at no more calls (gen-PPL "
                        f"{math.exp(mean(theirs[rival])):.1f}): {words}.")
    return findings, rows, columns


def describe(arm):
    """The flags by which an arm of CONVERT differs from plain conversion, in words."""
    words = []
    if arm["attention"] == "block":
        words.append(f"token blocks of {arm['block_size']} in {arm['context']} context")
    if arm["align_weight"] > 0:
        words.append(f"alignment of hidden states (w = {arm['align_weight']:g})")
    if arm["ar_weight"] > 0:
        words.append(f"the next-token loss (weight {arm['ar_weight']:g})")
    shares = [arm.get("mask_min", 0.0), arm.get("mask_max", 1.0)]
    if shares != [0, 1]:
        words.append(f"shares of masks in {shares}")
    return " and ".join(words)


def convert(results, cfg):
    rows = []
    for name, result in results["convert"].items():
        bound, error = result["bound"]
        rows.append({**result, "arm": name, "bound": bound, "error": error})
    rows.sort(key=describe)                             # plain conversion comes first
    findings = []
    for arm in rows:
        words = describe(arm)
        sentence = (f"After {arm['steps']} steps with {words or 'no alignment'}, -log p of "
                    f"held-out text is at most {arm['bound']:.3f} nats a token ({arm['arm']})")
        rivals = [rival for rival in rows
                  if not describe(rival) and rival["steps"] == arm["steps"]]
        if words and rivals:
            gap = arm["bound"] - rivals[0]["bound"]
            sentence += f": {gap:+.3f} against plain conversion ({rivals[0]['arm']})"
        findings.append(f"{sentence}.")
    if len(rows) > 1:
        findings.append("Each was trained once, so which of them is better is not known.")
    return findings, rows, "arm attention context ar_weight align_weight steps bound error"


def compare(results, cfg):
    tasks = results["circuits"]["tasks"]
    analysed = [name for name, task in tasks.items() if task["pairs"]]
    findings = [
        f"The model and a converted one both solve {len(analysed)} of {len(tasks)} tasks "
        f"({', '.join(analysed) or 'none'}); only those have circuits to compare."]
    for name in analysed:
        overlap = dict(tasks[name]["overlap"])
        untrained = mean(overlap.pop("untrained")["ar"])
        prompts = overlap.pop("AR")["prompts"]
        floor = f"{mean(prompts):.2f}" if prompts else "not measured (one set)"
        for kind, values in overlap.items():
            findings.append(
                f"On {name} the circuit of {kind} has overlap (Jaccard) {mean(values['ar']):.2f} "
                f"with that of the AR model; before training it has {untrained:.2f}, and the AR "
                f"model on other prompts {floor}.")
    rows = []
    for name, task in tasks.items():
        for model, share in task["solved"].items():
            rows.append({"task": name, "model": model, "solved": share,
                         "solved in a window": task["solved_in_window"][model]})
    return findings, rows, ""


def cost(results, cfg):
    rows = results["measured"]
    intact = rows[0]["ms"]
    bits = [f"{row['model']}: {row['bits']:.3f}" for row in rows]
    ratios = [f"{row['model']}: {row['ms'] / intact:.2f}" for row in rows[1:]]
    findings = [
        "Bits per byte of held-out text (an upper bound for converted models). "
        f"{'; '.join(bits)}.",
        "Wall clock a token, the faster of two runs, in units of the intact model's "
        f"{intact:.1f} ms. {'; '.join(ratios)}."]
    return findings, rows, ""


def harness(results, cfg):
    return [], results["harness"], ""


# {title: (function, runs)}. The first run must be there. The figures of all are shown.
SECTIONS = {
    "LOCATE": (locate, ["geometry"]),
    "REPLACE": (replace, ["bridge", "regression"]),
    "GENERATE": (generate, ["generate"]),
    "CONVERT": (convert, ["convert"]),
    "COMPARE": (compare, ["circuits"]),
    "COST": (cost, ["measured"]),
    "HARNESS": (harness, ["harness"])}


# -------------------------------------------------------------------------------------------------
# Tables and figures

def show(rows, columns):
    """Markdown table of these keys of the rows; of all keys if none are given."""
    names = columns.split() or list(rows[0])
    return table(names, [itemgetter(*names)(row) for row in rows])


def copy_figures(runs, folders, out):
    """Copy the stages' figures into `out`. Returns the Markdown that shows them."""
    links = []
    for folder in folders:
        for file in sorted((runs / folder).rglob("*.png")):
            name = "_".join(file.relative_to(runs).parts)
            shutil.copyfile(file, out / name)
            links.append(f"![{name}]({name})")
    return "\n".join(links)


PANELS = {"LOCATE": ("layer", "score"), "REPLACE": ("model", "kl"), "CONVERT": ("arm", "bound")}


def overview(rows, path):
    """A dot for every row of three tables: {section: rows}."""
    with figure(path, columns=3) as axes:
        for ax, (section, (label, value)) in zip(axes, PANELS.items()):
            for row in rows.get(section, []):
                ax.plot(row[value], str(row[label]), "o")
            ax.set(title=section, xlabel=value, ylabel=label)
            ax.locator_params("x", nbins=4)


# -------------------------------------------------------------------------------------------------
# Measurement

@torch.no_grad()
def measure(cfg, runs, results, world, dtype):
    """What no stage measures: bits per byte of held-out text and their standard error, ms a token
    of cached greedy generation, and tasks. A converted model has an upper bound of its bits; it
    writes all its tokens at once, in a quarter of the calls, without a cache."""
    from transformers import GenerationConfig

    import hybrid
    from core import masked

    # 1. Models, text, prompt
    base = runs / "toy" if "toy" in results else ""     # it moves with its runs
    model = hybrid.from_bridge(runs / "bridge", base, device=world.device, dtype=dtype)
    intact = backbone.load(model.config.base_model, world.device, dtype).model
    students = {}
    for name in converted(results):
        folder = runs / "convert" / name
        students[f"converted, {name}"], _ = masked.load_converted(folder, world.device, dtype)
    tokenizer = hybrid.load_tokenizer(model)
    windows = data.Tokens(runs / "data", "val", 127).windows(cfg.texts).to(world.device)
    prompt = torch.arange(1, cfg.new + 1, device=world.device)[None]            # (1, T)
    tasks = run_harness({"intact": intact, "hybrid": model}, students, tokenizer, cfg)

    # 2. A row a model
    rows = []
    nats_per_bit = math.log(2) * data.count_bytes(tokenizer, windows)    # of one bit in every byte

    def add_row(name, write, nats, error=0.0):
        seconds = timeit.repeat(lambda: write().cpu(), number=1, repeat=2)
        rows.append({"model": name, "ms": 1e3 * min(seconds) / cfg.new,
                     "bits": nats / nats_per_bit, "error": error / nats_per_bit})

    def add_causal(name, lm):
        nats = 0.0
        for ids in windows.split(8):
            logits = lm(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            nats += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        # generate() would take penalties from the base's generation_config.json: we replace it
        lm.generation_config = GenerationConfig(max_new_tokens=cfg.new, pad_token_id=0)
        write = partial(lm.generate, prompt, attention_mask=torch.ones_like(prompt))
        add_row(name, write, nats)

    add_causal("intact", intact)
    for nfe in (1, 4, 16):
        model.set_nfe(nfe)
        add_causal(f"hybrid, NFE {nfe}", model)
    for name, student in students.items():
        nats, error = masked.text_likelihood(student, list(windows), cfg.calls)
        ids = torch.cat([prompt, torch.full_like(prompt, student.mask_id)], 1)
        write = partial(masked.fill, student, ids, ids == student.mask_id, cfg.new // 4)
        add_row(name, write, nats, error)
    return {"measured": rows, "harness": tasks}


def run_harness(models, students, tokenizer, cfg):
    """[{model, task, metric, value}] of lm-evaluation-harness."""
    if not cfg.harness:
        return []
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from core import masked

    class Converted(HFLM):
        """The bound of a converted model takes the place of a likelihood."""
        def _loglikelihood_tokens(self, requests, **_):
            answers = []
            for _, context, rest in requests:
                ids = torch.tensor([*context, *rest], device=self.device)
                given = max(1, len(context))
                bound, _ = masked.likelihood(self.student, ids, cfg.calls, given=given)
                answers.append((-bound, False))
            return answers

    rows = []
    for name, model in {**models, **students}.items():
        if name in students:
            interface = Converted(pretrained=model.lm.model, tokenizer=tokenizer)
            interface.student = model
        else:
            interface = HFLM(pretrained=model, tokenizer=tokenizer)
        scores = simple_evaluate(interface, tasks=list(cfg.harness), limit=cfg.limit or None)
        for task, metrics in scores["results"].items():
            rows += [{"model": name, "task": task, "metric": metric, "value": value}
                     for metric, value in metrics.items() if isinstance(value, float)]
    return rows


# -------------------------------------------------------------------------------------------------
# Main

def choose(cfg):
    return backbone.preset_of(cfg, f"{cfg.runs}/bridge")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, choose)
    runs = Path(cfg.runs)
    out = Path(cfg.out)
    results = read_runs(runs)
    out.mkdir(parents=True, exist_ok=True)

    # 1. Measure, unless the same weights were measured with the same flags
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    asked = f"{[backbone.identity(runs / folder) for folder in results]} {cfg}"
    file = out / "result.json"
    own = {}
    if file.exists() and read_json(file).get("asked") == asked:
        own = read_json(file)["own"]
    elif "bridge" in results:
        own = measure(cfg, runs, results, world, dtype)
    results |= own
    results["convert"] = converted(results)

    # 2. The report: findings first, then a section a stage
    findings = []
    texts = []
    rows = {}
    for title, (function, folders) in SECTIONS.items():
        if results.get(folders[0]):
            sentences, rows[title], columns = function(results, cfg)
            findings += [f"{title}. {sentence}" for sentence in sentences]
            texts += [f"## {title}", show(rows[title], columns), copy_figures(runs, folders, out)]
    overview(rows, out / "figure.png")
    bullets = "\n".join(f"- {finding}" for finding in findings)
    text = "\n\n".join(["# Where should diffusion enter a language model?", bullets,
                        "![LOCATE, REPLACE, CONVERT](figure.png)", *filter(None, texts)])
    write_text(out / "report.md", text + "\n")
    result = {"findings": findings, "own": own, "asked": asked, **provenance(world)}
    write_json(file, result)
    print("\n".join(findings))
    print(f"\nThe report is {out}/report.md")
    return result


if __name__ == "__main__":
    main()
