"""evaluate.py: EVALUATE. One report with figures, from the runs of the other stages; no number in it is typed.

    python evaluate.py                                   # reads out/, writes out/evaluate/report.md: about a minute
    python evaluate.py --text notes.txt --out out/evaluate_notes      # another text beside the held-out one
    python evaluate.py --harness lambada_openai --limit 100 --out out/evaluate_lm    # needs pip install "lm-eval[hf]"
    python evaluate.py --publish                         # also copies the figures and the numbers to results/

Needs finished runs of backbone.py, geometry.py, bridge.py (the bridge, and the regression control in `regression`),
hybrid.py, repr_align.py (`repr_align/w0` and `repr_align/w10`) and generate.py under --runs, all of one backbone; those
of sweep.py and circuits.py are reported where they are found. Measures what the stages do not: speed and memory, bits
per byte and a cloze suite for the intact model, the hybrid and the twins. Writes report.md, figures and result.json to
--out. The report's first lines say whether diffusion beat plain regression, and what it costs.

Letters: N texts, T tokens, L blocks, l the replaced layer.
"""
import copy
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import data
import hybrid
from core import backbone, denoiser, harness, masked, report
from core.common import UserError, entry, parse, pick_dtype, setup
from core.draws import generator
from core.metrics import PeakBytes, seconds_of
from core.run import Run, atomic, read_json


@dataclass
class Config:
    runs: str = "out"           # folder that holds the stages' runs
    out: str = "out/evaluate"   # folder of the report
    text: str = ""              # a text file to judge beside the held-out text
    texts: int = 64             # held-out windows of 128 tokens for bits per byte
    calls: int = 16             # network calls a window of the twins' likelihood
    cloze: int = 60             # questions of each kind
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the models
    repeats: int = 3            # timings are the fastest of so many
    new: int = 64               # tokens of each timing, after as many
    harness: str = ""           # tasks of lm-evaluation-harness, comma-separated
    harness_path: str = ""      # folder of local task descriptions
    limit: int = 0              # examples a task (0: all)
    seed: int = 0               # of the questions and the twins' masks
    publish: bool = False       # copy the figures and result.json to results/, where the README finds them
    dry_run: bool = False       # print what would be read, then leave


STAGES = {  # folder under --runs -> the command that makes it
    "toy": "python toy.py --out {out}", "geometry": "python geometry.py --out {out}",
    "bridge": "python bridge.py --out {out}", "regression": "python bridge.py --objective regression --out {out}",
    "hybrid": "python hybrid.py --bridge {runs}/bridge --out {out}",
    "repr_align/w0": "python repr_align.py --align_weight 0 --out {out}",
    "repr_align/w10": "python repr_align.py --align_weight 10 --out {out}",
    "generate": "python generate.py --bridges {runs}/blocks --twin {runs}/repr_align/w10 --out {out}",
}
OPTIONAL = {"sweep_quick": "bash run_all.sh", "sweep": "bash study.sh",          # the full one replaces the quick one
            "sweep_matched": "bash study.sh", "interfaces": "python interfaces.py --out {out}",
            "tasks/circuits": "python circuits.py --model {runs}/tasks/toy --out {out}"}  # of a backbone of its own
FIGURES = {"generate": "generation.png", "sweep_quick": "sweep.png", "sweep": "sweep.png",
           "interfaces": "interfaces.png", "tasks/circuits": "circuits.png"}


HOW = ("data", "skip", "calibration", "batch_size", "seq_len", "train_tokens")  # flags that two arms must share


def config_of(folder):
    return read_json(folder / "config.json").get("dihal", {}).get("config", {})


def read_runs(runs):
    """The result.json of every stage. Raises UserError naming the command for a missing one, and for runs of different
    backbones. A run of run_all.sh on another model has no toy."""
    found = {}
    for stage, command in (STAGES | OPTIONAL).items():
        file = runs / stage / "result.json"
        if stage not in ("toy", *OPTIONAL) or file.exists():
            found[stage] = read_json(file, f"make it with: {command.format(runs=runs, out=runs / stage)}")
    bases = {stage: result["base"] for stage, result in found.items() if stage != "tasks/circuits"}
    other = next((s for s, base in bases.items() if base != bases["geometry"]), None)
    if other is not None:
        raise UserError(f"{runs}/geometry and {runs}/{other} come from different backbones; delete the stale one and "
                        "run it again")
    if found["bridge"]["objective"] != "diffusion" or found["regression"]["objective"] != "regression":
        raise UserError(f"{runs}/bridge must hold a diffusion bridge and {runs}/regression its control (--objective "
                        "regression); delete the wrong one and make it again")
    for stage, used in (("generate", ("blocks", "repr_align/w10")),
                        ("tasks/circuits", ("tasks/repr_align/w0", "tasks/repr_align/w10"))):
        now = [backbone.identity(runs / u) for u in used if (runs / u / "result.json").exists()]
        if stage in found and not set(now) <= set(found[stage]["weights"]):
            raise UserError(f"{runs}/{stage} was made of other weights than those now in {' and '.join(used)}; delete "
                            "it and run it again")
    if (found["repr_align/w0"]["w"], found["repr_align/w10"]["w"]) != (0, 10):
        raise UserError(f"{runs}/repr_align/w0 and w10 must hold twins of alignment weight 0 and 10; delete the wrong "
                        "one and make it again")
    for one, two, same in (("bridge", "regression", ("layer", "steps", "tokens", "parameters", "seed",
                                                     "eval_sequences")),
                           ("repr_align/w0", "repr_align/w10", ("steps", "seed", "eval_sequences"))):
        differ = [k for k in same if found[one][k] != found[two][k]] + [
            k for k in HOW if config_of(runs / one).get(k) != config_of(runs / two).get(k)]
        if differ:
            raise UserError(f"{runs}/{one} and {runs}/{two} differ in {', '.join(differ)}, so they cannot be compared; "
                            "run one of them again")
    if found["hybrid"].get("bridge_weights") != backbone.identity(runs / "bridge"):
        raise UserError(f"{runs}/hybrid was made of another bridge than {runs}/bridge; delete it and run: "
                        f"python hybrid.py --bridge {runs}/bridge --out {runs}/hybrid")
    return found


# ---------------------------------------------------------------------------------------------------------- cost
def forward_flops(lm, net, nfe, layer, keys):
    """FLOPs of one new token with a cache of `keys` tokens: 2 a parameter, 4 a key and channel of each attention. For
    the intact model net is None."""
    wide = backbone.attention_width(lm.config)
    count = [sum(p.numel() for p in block.parameters()) for block in lm.blocks]
    total = 2 * (sum(count[layer if net else 0:]) + lm.V * lm.D) + 4 * keys * wide * (lm.L - (layer if net else 0))
    if net is not None:
        own = sum(p.numel() for n, p in net.named_parameters() if p.ndim == 2 and not n.startswith(("time", "readout")))
        total += nfe * (2 * own + 4 * keys * net.settings["W"] * net.settings["blocks"])
    return total


@torch.no_grad()
def cost(model, intact, student, repeats, new):
    """Latency of cached greedy generation of `new` tokens after as many, batch 1: the intact model, the hybrid by NFE,
    random bridges at every layer (as many blocks as they replace), the masked model by steps (no cache). `predicted` is
    the ratio of FLOPs, `blocks` that of transformer blocks run a token: a toy's time is in the calls, not in the
    arithmetic. Memory is that of the weights a model needs and, at the peak, of the tensors it makes: cache, states,
    logits."""
    base = intact.model
    ids = torch.randint(1, intact.V, (1, new), generator=torch.Generator().manual_seed(0), device=base.device)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
               attention_mask=torch.ones_like(ids))
    rows, flops = [], forward_flops(intact, None, 0, 0, 3 * new // 2)

    def measure(what, run, predicted, blocks, weights, modules, **more):
        ms = 1e3 * seconds_of(repeats, run) / more.pop("tokens", new)
        with PeakBytes([t for m in modules for t in (*m.parameters(), *m.buffers())]) as peak:
            run()
        ratio = ms / rows[0]["ms"] if rows else 1.0
        rows.append({"what": what, "ms": ms, "tokens_per_s": 1e3 / ms, "ratio": ratio, "predicted": predicted,
                     "blocks": blocks, "weights_mb": weights / 1e6, "peak_mb": (weights + peak.most) / 1e6, **more})
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    measure("intact model", lambda: base.generate(ids, **how), 1.0, 1.0, whole, [base])

    def of_hybrid(some, nfe, what):
        layer, net = some.config.layer, some.net
        some.set_nfe(nfe)
        kept = whole - sum(p.numel() * p.element_size() for b in intact.blocks[:layer] for p in b.parameters())
        measure(what, lambda: some.generate(ids, **how),
                forward_flops(intact, net, nfe, layer, 3 * new // 2) / flops,
                (nfe * net.settings["blocks"] + intact.L - layer) / intact.L,
                kept + 4 * sum(p.numel() for p in net.parameters()), [some, some.lm], layer=layer, nfe=nfe)
    default = model.config.nfe
    for nfe in (1, 2, 4, 8, 16):
        of_hybrid(model, nfe, f"hybrid at layer {model.config.layer}, NFE {nfe}")
    model.set_nfe(default)
    heads = max(1, intact.D // (64 if intact.D >= 512 else 32))                     # the rule of bridge.py
    for layer in sorted({max(1, intact.L * i // 8) for i in range(1, 8)}):          # at most seven of them
        net = denoiser.Bridge(intact.D, intact.D, layer, heads).to(base.device).eval()
        config = copy.deepcopy(model.config)
        config.layer, config.bridge, config.nfe = layer, net.settings, default
        some = hybrid.HybridForCausalLM(config, net, copy.deepcopy(intact)).eval()
        of_hybrid(some, default, f"random bridge of {layer} blocks at layer {layer}, NFE {default}")
    wide, T = 4 * new, 5 * new                                                      # no cache: all tokens in each step
    text = torch.cat([ids, ids.new_full((1, wide), student.mask_id)], 1)
    for steps in (new // 4, new, 4 * new):
        measure(f"masked twin, {wide} tokens in {steps} steps",
                lambda steps=steps: masked.fill(student, text, text == student.mask_id, steps),
                steps * T / wide * forward_flops(intact, None, 0, 0, T) / flops, steps / wide * 1.0, whole,
                [student], steps=steps, tokens=wide)
    return rows


# ----------------------------------------------------------------------------------------------------- zero-shot
NAMES = ("value", "name", "path", "data", "line", "item", "result", "index", "key", "text")
MODULES = ("os", "sys", "re", "json", "time", "math", "random", "string", "types", "copy", "socket", "struct")


def questions(tokenizer, kind, count, seed):
    """[(context ids, right id, wrong id)]: which of two tokens comes next. Three kinds: the bracket that is open, the
    module that was imported, whether a line is indented. Each answer is right about as often as it is wrong."""
    draw, out = generator(seed, f"cloze {kind}"), []
    while len(out) < count:
        a, b, f = (NAMES[i] for i in draw.choice(len(NAMES), 3, replace=False))
        m, n = (MODULES[i] for i in draw.choice(len(MODULES), 2, replace=False))
        if kind == "brackets":
            inner = bool(draw.integers(2))
            context, right, wrong = (f"{a} = {f}({b}[0", "]", ")") if inner else (f"{a} = {f}({b}", ")", "]")
        elif kind == "imports":
            context, right, wrong = f"import {m}\n\ndef {f}({a}):\n    return {m}.{b}({a})\n\n{b} = ", m, n
        else:
            opened = bool(draw.integers(2))
            context = f"def {f}({a}):\n    {b} = {a}\n    return {b}\n" if not opened else f"def {f}({a}):\n"
            right, wrong = ("    ", "\n") if opened else ("\n", "    ")
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        first = [tokenizer(context + end + "x", add_special_tokens=False)["input_ids"] for end in (right, wrong)]
        if all(ids[:len(head)] == head and len(ids) > len(head) for ids in first):
            one, two = first[0][len(head)], first[1][len(head)]
        else:  # the continuation merges with the context's last tokens: ask for the first one that differs
            same = next((i for i, (x, y) in enumerate(zip(*first, strict=False)) if x != y), 0)
            head, one, two = first[0][:same], first[0][same], first[1][same]
        if one != two:
            out.append(([tokenizer.eos_token_id or 0, *head], one, two))
    return out


@torch.no_grad()
def next_logits(model, ids):
    """Logits (V,) of the token after ids (1, T), from a causal LM or a masked student."""
    if not isinstance(model, masked.Student):
        return model(ids).logits[0, -1]
    ids = torch.cat([ids, ids.new_full((1, 1), model.mask_id)], 1)
    *_, normed = model.states(ids, ids == model.mask_id)
    return model.logits(normed[:, -2])[0]


def cloze(models, tokenizer, count, seed, device):
    """{model: {kind: accuracy}} over `count` questions a kind."""
    asked = {kind: questions(tokenizer, kind, count, seed) for kind in ("brackets", "imports", "indentation")}
    out = {}
    for name, model in models.items():
        out[name] = {}
        for kind, items in asked.items():
            logits = (next_logits(model, torch.tensor([ids], device=device)) for ids, _, _ in items)
            right = [bool(x[one] > x[two]) for x, (_, one, two) in zip(logits, items, strict=True)]
            out[name][kind] = sum(right) / len(right)
    return out


@torch.no_grad()
def bits_per_byte(model, rows, bytes_per_token, calls, seed):
    """(bits per byte, its standard error over estimator draws or None) of windows (N, T), first tokens given. A masked
    student's is an upper bound."""
    count = rows.shape[0] * (rows.shape[1] - 1)
    if isinstance(model, masked.Student):
        nats, error = masked.text_likelihood(model, list(rows), calls, seed)
        return nats / count / math.log(2) / bytes_per_token, error / count / math.log(2) / bytes_per_token
    nats = 0.0
    for ids in rows.split(8):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return nats / count / math.log(2) / bytes_per_token, None


def windows_of(file, tokenizer):
    """(windows (N, 128), bytes a token) of a text file. Raises UserError if it does not fill one window."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 128:
        raise UserError(f"--text {file} has fewer than 128 tokens; use a longer text")
    return torch.tensor(ids[:len(ids) // 128 * 128]).view(-1, 128), len(text.encode()) / len(ids)


def zero_shot(models, tokenizer, shards, own, cfg, device):
    """{model: {text: {bits_per_byte, se}}} on held-out windows and on those of --text (`own`), and the cloze suite."""
    meta = read_json(Path(shards) / "meta.json")
    texts = {"held-out": (data.Tokens(shards, "val", 127).windows(cfg.texts).to(device),
                          meta["bytes"]["val"] / meta["tokens"]["val"])}
    if own:
        texts[Path(cfg.text).name] = own[0].to(device), own[1]
    bits = {name: {title: dict(zip(("bits_per_byte", "se"), bits_per_byte(model, rows, each, cfg.calls, cfg.seed),
                                   strict=True)) for title, (rows, each) in texts.items()}
            for name, model in models.items()}
    return {"bits": bits, "windows": {title: len(rows) for title, (rows, _) in texts.items()},
            "cloze": cloze(models, tokenizer, cfg.cloze, cfg.seed, device), "questions": cfg.cloze, "calls": cfg.calls}


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        print("\n".join(f"reads {cfg.runs}/{stage}/result.json" for stage in STAGES | OPTIONAL))
        return None
    if min(cfg.texts, cfg.cloze) < 2 or cfg.repeats < 1 or cfg.new < 4 or cfg.calls < 4 or cfg.calls % 2:
        raise UserError("--texts and --cloze must be at least 2, --repeats at least 1, --new at least 4, --calls even "
                        "and at least 4")
    if cfg.text and not Path(cfg.text).is_file():
        raise UserError(f"--text {cfg.text}: there is no such file")
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    runs = Path(cfg.runs)
    found = read_runs(runs)
    if cfg.harness:
        harness.known(cfg.harness.split(","), cfg.harness_path)

    # ------------------------------------------------------------------------------------- what no stage measures
    model = hybrid.from_bridge(runs / "bridge", device=world.device, dtype=dtype)
    tokenizer = hybrid.tokenizer_of(model)
    intact = backbone.load(model.config.base_model, world.device, dtype)
    if max(128, 5 * cfg.new) > intact.config.max_position_embeddings:
        raise UserError(f"--new {cfg.new}: five times as many tokens, and windows of 128, must fit the model's "
                        f"{intact.config.max_position_embeddings} positions")
    text = windows_of(cfg.text, tokenizer) if cfg.text else None
    twins = {f"masked, w = {w}": masked.load_converted(runs / "repr_align" / f"w{w}", world.device, dtype)[0]
             for w in (0, 10)}
    models = {"AR": intact.model, f"hybrid, NFE {model.config.nfe}": model, **twins}
    run = Run(cfg, world, {"base": found["geometry"]["base"]})
    own = {"zero_shot": zero_shot(models, tokenizer, runs / "data", text, cfg, world.device),
           "cost": cost(model, intact, twins["masked, w = 0"], cfg.repeats, cfg.new)}
    if cfg.harness:
        own["harness"] = harness.run(models, tokenizer, cfg.harness.split(","), cfg.harness_path, cfg.limit, cfg.calls,
                                     cfg.seed)

    # ------------------------------------------------------------------------------------------ figures, report
    with atomic(run.out / "figure.png") as temporary:
        report.figure(found, temporary)
    with atomic(run.out / "cost.png") as temporary:
        report.cost_figure(own["cost"], temporary)
    for stage, name in FIGURES.items():
        if stage in found:
            with atomic(run.out / name) as temporary:
                shutil.copy(runs / stage / name, temporary)
    with atomic(run.out / "report.md") as temporary:
        temporary.write_text(report.report(found, own, runs))
    table = report.rows(found, own)
    run.finish({**dict.fromkeys(("sweep", "interfaces", "circuits")), **own, "sweep": report.of_sweep(found),
                "generation": {k: found["generate"][k] for k in ("rows", "real", "settings", "texts")},
                "conversion": {k: found[f"repr_align/{k}"]["curve"] for k in ("w0", "w10")},
                **{k.split("/")[-1]: found[k] for k in OPTIONAL if k in found and k not in ("sweep", "sweep_quick")},
                "verdict": report.verdict(found), "table": [list(row) for row in table]})
    if cfg.publish:
        Path("results").mkdir(exist_ok=True)
        for name in ("figure.png", "cost.png", *(n for s, n in FIGURES.items() if s in found), "result.json"):
            shutil.copy(run.out / name, Path("results") / name)
    width = max(len(what) for what, _ in table)
    print("\n".join(f"{what:{width}}  {value}" for what, value in table) + f"\n\nIn short: {report.verdict(found)}.\n"
          f"The report is {run.out}/report.md")
    return run.result


if __name__ == "__main__":
    main()
