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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch

import data
import hybrid
from core import backbone, masked, report
from core.common import UserError, entry, parse, pick_dtype, setup
from core.report import paired, table, unpaired, verdict
from core.run import provenance, read_json, recorded, write_json, write_text


@dataclass
class Config:
    # what and where
    preset: Literal["auto", "tiny", "toy", "135m", "0.6b", "8b"] = "auto"  # auto: by model size
    runs: str = "out"           # folder that holds the runs of the stages
    out: str = "out/evaluate"   # folder of the report
    margin: float = 0.005       # nats: a smaller difference is a tie
    # measurement
    texts: int = 32             # held-out windows of 128 tokens for bits per byte
    calls: int = 8              # network calls a window for a converted model's bound
    new: int = 64               # tokens of each timing, after as many
    repeats: int = 2            # the fastest timing counts
    harness: tuple[str, ...] = ()  # tasks of lm-evaluation-harness
    limit: int = 0              # examples a task (0: all)
    seed: int = 0               # of the bounds
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the models


PRESETS = {"tiny": dict(texts=3, calls=4, new=4, repeats=1), "135m": dict(texts=8, calls=4, new=32)}


# -------------------------------------------------------------------------------------------------
# The runs

FOLDERS = ("toy", "geometry", "bridge", "regression", "hybrid", "generate", "circuits")


def read_runs(runs):
    """{folder: its result.json} of the finished runs."""
    arms = [f"convert/{path.name}" for path in sorted(runs.glob("convert/*"))]
    results = {}
    for folder in [*FOLDERS, *arms]:
        if (runs / folder / "result.json").exists():
            recorded(runs / folder)                     # refuses a run of the second edition
            results[folder] = read_json(runs / folder / "result.json")
    # The circuits may belong to another model, one that was taught tasks
    bases = {folder: result["base"] for folder, result in results.items() if folder != "circuits"}
    if len(set(bases.values())) != 1:
        raise UserError(f"{runs} must hold finished runs of one base model; those of "
                        f"{', '.join(bases) or 'none'} come from {len(set(bases.values()))}. "
                        "Start with: bash run_all.sh")
    return results


def arms_of(results):
    """{name: result} of the converted models."""
    arms = {}
    for folder, result in results.items():
        if folder.startswith("convert/"):
            bound, error = result["bound"]
            name = folder.removeprefix("convert/")
            arms[name] = {**result, "arm": name, "bound": bound, "error": error}
    return arms


# -------------------------------------------------------------------------------------------------
# Findings: sentences from numbers. Each function yields those of one stage that was run.

def find_locate(results, cfg):
    result = results["geometry"]
    best = result["best_layer"]
    layers = result["layers"]
    share = layers[best - 1]["chosen"]
    yield (f"LOCATE. The geometry score chooses layer {best} of {len(layers)} candidates, "
           f"and does so in {share:.0%} of the bootstrap resamples.")
    choices = [variant["best_layer"] for variant in result["variants"]]
    depth = result["trivial"][0]["spearman_with_score"]
    yield (f"LOCATE. {choices.count(best)} of {len(choices)} variants of its constants choose that "
           f"layer. The score's rank correlation with depth alone is {depth:.2f}.")


def find_replace(results, cfg):
    result = results["bridge"]
    calls = result["nfe_default"]
    numbers = result["nfe"][str(calls)]
    yield (f"REPLACE. A diffusion bridge in place of blocks 1..{result['layer']} ({calls} calls) "
           f"changes the next-token loss by {numbers['ce_gap']:+.4f} nats (standard error "
           f"{numbers['ce_gap_se']:.4f}); the KL from the intact model is {numbers['kl']:.4f}.")
    if "regression" in results:
        control = results["regression"]["nfe"]["1"]
        gap = paired(numbers["kl_rows"], control["kl_rows"])
        yield (f"REPLACE. Diffusion against plain regression with the same network (KL "
               f"{control['kl']:.4f} in one call): {verdict(gap, cfg.margin, 'nats', 'texts')}. "
               "That is one training of each; the interval is over texts.")


def find_generate(results, cfg):
    result = results["generate"]
    methods = defaultdict(list)
    for row in result["rows"]:
        if row["matched"] is not None:                  # it reaches the entropy of real text
            methods[row["method"]].append(row)

    def logs(name):
        return [math.log(row["matched"]) for row in methods[name]]

    def level(name):
        return mean(logs(name))

    ours = [name for name, rows in methods.items() if rows[0]["layer"] is not None]
    if not ours:
        yield "GENERATE. Hidden-state diffusion does not reach the entropy of real text."
        return
    best = min(ours, key=level)
    calls = methods[best][0]["calls"]
    yield (f"GENERATE. At the entropy of real text, {best} ({calls} calls) has gen-PPL "
           f"{math.exp(level(best)):.1f}; real text has {result['real']['gen_ppl']:.1f}.")
    rivals = [name for name, rows in methods.items()
              if rows[0]["layer"] is None and rows[0]["calls"] <= calls]
    if rivals:
        rival = min(rivals, key=level)
        words = verdict(unpaired(logs(best), logs(rival)), unit="nats a token")
        yield (f"GENERATE. Against {rival}, the best rival at no more calls (gen-PPL "
               f"{math.exp(level(rival)):.1f}): {words}.")


def find_convert(results, cfg):
    arms = arms_of(results)
    rival = arms["w0"]
    yield (f"CONVERT. After {rival['steps']} steps without alignment, -log p of held-out text is "
           f"at most {rival['bound']:.3f} nats a token.")
    names = {"w10": "Alignment of hidden states", "block": "Conversion by token blocks"}
    for arm, name in names.items():
        if arm in arms:
            gap = paired([arms[arm]["bound"]], [rival["bound"]])
            words = verdict(gap, cfg.margin, "nats")
            yield f"CONVERT. {name}: at most {arms[arm]['bound']:.3f}; against w0 {words}."


def find_compare(results, cfg):
    tasks = results["circuits"]["tasks"]
    analysed = [name for name, task in tasks.items() if task["pairs"]]
    yield (f"COMPARE. The model and a converted one both solve {len(analysed)} of {len(tasks)} "
           f"tasks ({', '.join(analysed) or 'none'}); only those have circuits to compare.")
    for name in analysed:
        overlap = tasks[name]["overlap"]
        untrained = mean(overlap["untrained"]["ar"])
        prompts = mean(overlap["AR"]["prompts"])
        for kind in set(overlap) - {"AR", "untrained"}:
            yield (f"COMPARE. On {name} the circuit of {kind} has overlap (Jaccard) "
                   f"{mean(overlap[kind]['ar']):.2f} with that of the AR model; before training it "
                   f"has {untrained:.2f}, and the AR model on other prompts {prompts:.2f}.")


def find_cost(results, cfg):
    measured = results["measured"]
    bits = [f"{name} {value:.3f}" for name, (value, error) in measured["bits"].items()]
    yield ("COST. Bits per byte of held-out text (an upper bound for converted models): "
           f"{', '.join(bits)}.")
    times = dict(measured["ms"])
    intact = times.pop("intact")
    ratios = [f"{name} {ms / intact:.2f}" for name, ms in times.items()]
    yield (f"COST. Time a token, as a multiple of the intact model's {intact:.1f} ms: "
           f"{', '.join(ratios)}.")


# -------------------------------------------------------------------------------------------------
# Sections: one table a stage. Rows are dictionaries, columns are their keys.

def replace_rows(results):
    rows = []
    for folder in ("bridge", "regression"):
        if folder in results:
            for calls, row in results[folder]["nfe"].items():
                rows.append({"folder": folder, "calls": int(calls), **row})
    return rows


def convert_rows(results):
    return list(arms_of(results).values())


def compare_rows(results):
    tasks = results["circuits"]["tasks"]
    return [{"task": name, **task["solved"]} for name, task in tasks.items()]


def cost_rows(results):
    bits = results["measured"]["bits"]
    ms = results["measured"]["ms"]
    rows = []
    for name in {**bits, **ms}:
        value, error = bits.get(name, (None, None))
        rows.append({"model": name, "ms": ms.get(name), "bits": value, "error": error})
    return rows


def show(rows, columns):
    """Markdown table of these keys of the rows; of all keys if none are given."""
    columns = columns.split() or list(rows[0])
    lines = []
    for row in rows:
        values = [row[name] for name in columns]
        lines.append([f"{value:.4g}" if isinstance(value, float) else value for value in values])
    return table(columns, lines)


class Section(NamedTuple):
    folders: list               # runs; the first must be there. The figures of all are shown
    find: Callable              # results, cfg -> sentences
    rows: Callable              # results -> rows of the table
    columns: str                # their keys


SECTIONS = {
    "LOCATE": Section(["geometry"], find_locate, lambda results: results["geometry"]["layers"],
                      "layer score score_low score_high curvature stiffness effective_rank"),
    "REPLACE": Section(["bridge", "regression"], find_replace, replace_rows,
                       "folder calls fvu kl ce_gap ce_gap_se agree"),
    "GENERATE": Section(["generate"], find_generate, lambda results: results["generate"]["rows"],
                        "method seed calls matched tokens_per_s"),
    "CONVERT": Section(["convert/w0", "convert/w10", "convert/block"], find_convert, convert_rows,
                       "arm attention align_weight steps bound error seconds"),
    "COMPARE": Section(["circuits"], find_compare, compare_rows, ""),
    "COST": Section(["measured"], find_cost, cost_rows, ""),
    "HARNESS": Section(["harness"], lambda *_: [], lambda results: results["harness"], "")}


def overview(results, path):
    """LOCATE: the score over depth. REPLACE: the KL by calls. CONVERT: the bound of every arm."""
    with report.figure(path, columns=3) as (axes,):
        if "geometry" in results:
            rows = results["geometry"]["layers"]
            plot(axes[0], rows, "layer", "score", report.BLUE)
        for folder, color in (("bridge", report.BLUE), ("regression", report.GREY)):
            rows = [row for row in replace_rows(results) if row["folder"] == folder]
            plot(axes[1], rows, "calls", "kl", color, label=folder)
        plot(axes[2], convert_rows(results), "arm", "bound", report.BLUE)
        axes[0].set_title("LOCATE: higher is better")
        axes[1].set_title("REPLACE: lower is better")
        axes[2].set_title("CONVERT: lower is better")


def plot(ax, rows, x, y, color, label=None):
    ax.plot([row[x] for row in rows], [row[y] for row in rows], "o-", color=color, label=label)
    ax.set(xlabel=x, ylabel=y)


# -------------------------------------------------------------------------------------------------
# Measurement

@torch.no_grad()
def bits_per_byte(model, rows, size, cfg):
    """(bits per byte, standard error) of windows (N, T) of `size` bytes, whose first tokens are
    given. A converted model has an upper bound."""
    nats = 0.0
    error = 0.0
    if isinstance(model, masked.Student):
        nats, error = masked.text_likelihood(model, list(rows), cfg.calls, cfg.seed)
    else:
        for ids in rows.split(8):
            loss = model(ids, labels=ids, use_cache=False).loss.item()
            nats += loss * ids[:, 1:].numel()
    return nats / math.log(2) / size, error / math.log(2) / size


def milliseconds(intact, model, students, cfg):
    """{model: ms a token} of cached greedy generation, batch 1. A converted model writes all its
    tokens at once, in a quarter as many calls, without a cache."""
    prompt = torch.arange(1, cfg.new + 1, device=intact.device)[None]
    greedy = dict(max_new_tokens=cfg.new, min_new_tokens=cfg.new, do_sample=False, pad_token_id=0,
                  attention_mask=torch.ones_like(prompt))
    times = {}

    def measure_time(name, write):
        seconds = timeit.repeat(lambda: write().cpu(), number=1, repeat=cfg.repeats)
        times[name] = 1e3 * min(seconds) / cfg.new

    measure_time("intact", partial(intact.generate, prompt, **greedy))
    for nfe in (1, 4, 16):
        model.set_nfe(nfe)
        measure_time(f"hybrid, NFE {nfe}", partial(model.generate, prompt, **greedy))
    for name, student in students.items():
        ids = torch.cat([prompt, torch.full_like(prompt, student.mask_id)], 1)
        fill = partial(masked.fill, student, ids, ids == student.mask_id, cfg.new // 4)
        measure_time(name, fill)
    return times


def measure(cfg, runs, results, world, dtype):
    """What no stage measures, of the intact model, the hybrid and the converted models."""
    base = runs / "toy" if "toy" in results else ""     # it moves with its runs
    model = hybrid.from_bridge(runs / "bridge", base, device=world.device, dtype=dtype)
    intact = backbone.load(model.config.base_model, world.device, dtype).model
    students = {}
    for name in arms_of(results):
        folder = runs / "convert" / name
        students[f"converted, {name}"], _ = masked.load_converted(folder, world.device, dtype)
    models = {"intact": intact, f"hybrid, NFE {model.config.nfe}": model, **students}

    tokenizer = hybrid.load_tokenizer(model)
    rows = data.Tokens(runs / "data", "val", 127).windows(cfg.texts).to(world.device)
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode())
               for row in rows)
    tasks = harness(models, tokenizer, cfg) if cfg.harness else []
    bits = {name: bits_per_byte(model, rows, size, cfg) for name, model in models.items()}
    times = milliseconds(intact, model, students, cfg)
    return {"measured": {"bits": bits, "ms": times}, "harness": tasks}


def harness(models, tokenizer, cfg):
    """[{model, task, metric, value}] of lm-evaluation-harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Converted(HFLM):
        """The bound of a converted model takes the place of a likelihood."""
        def _loglikelihood_tokens(self, requests, **_):
            answers = []
            for _, context, rest in requests:
                ids = torch.tensor([*context, *rest], device=self.device)
                given = max(1, len(context))
                bound, _ = masked.likelihood(self.student, ids, cfg.calls, cfg.seed, given)
                answers.append((-bound, False))
            return answers

    rows = []
    for name, model in models.items():
        if isinstance(model, masked.Student):
            interface = Converted(pretrained=model.lm.model, tokenizer=tokenizer)
            interface.student = model
        else:
            interface = HFLM(pretrained=model, tokenizer=tokenizer)
        scores = simple_evaluate(interface, tasks=list(cfg.harness), limit=cfg.limit or None)
        for task, metrics in scores["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    rows.append({"model": name, "task": task, "metric": metric, "value": value})
    return rows


# -------------------------------------------------------------------------------------------------
# Main

def copy_figures(runs, folders, out):
    """Copy the stages' figures into `out`. Returns the Markdown that shows them."""
    links = []
    for folder in folders:
        for file in sorted((runs / folder).glob("*.png")):
            name = f"{folder.replace('/', '_')}_{file.name}"
            shutil.copy(file, out / name)
            links.append(f"![{folder}]({name})")
    return "\n".join(links)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS,
                lambda cfg: backbone.preset_of("", cfg.out, f"{cfg.runs}/bridge"))
    runs = Path(cfg.runs)
    out = Path(cfg.out)
    results = read_runs(runs)
    out.mkdir(parents=True, exist_ok=True)

    # 1. Measure, unless the same weights were measured in the same way
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    weights = [backbone.identity(runs / folder) for folder in results]
    asked = [*weights, cfg.texts, cfg.calls, cfg.new, cfg.repeats, *cfg.harness, cfg.limit]
    file = out / "result.json"
    old = read_json(file) if file.exists() else {"asked": None}
    if old["asked"] == asked:
        own = old["own"]
    elif "bridge" in results:
        own = measure(cfg, runs, results, world, dtype)
    else:
        own = {}
    results |= own

    # 2. The report: findings first, then a section a stage
    findings = []
    sections = []
    for title, section in SECTIONS.items():
        if results.get(section.folders[0]):
            findings += section.find(results, cfg)
            sections += [f"## {title}", show(section.rows(results), section.columns),
                         copy_figures(runs, section.folders, out)]
    overview(results, out / "figure.png")
    text = "\n\n".join([
        "# Where should diffusion enter a language model?",
        "\n".join(f"- {finding}" for finding in findings),
        "![LOCATE, REPLACE, CONVERT](figure.png)", *sections])
    write_text(out / "report.md", text + "\n")
    result = {"findings": findings, "own": own, "asked": asked, **provenance(world)}
    write_json(file, result)
    print("\n".join(findings))
    print(f"\nThe report is {out}/report.md")
    return result


if __name__ == "__main__":
    main()
