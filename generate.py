"""generate.py: GENERATE. Text drawn by diffusion in hidden space, measured beside its rivals at equal entropy.

    python generate.py                                            # out/blocks beside AR, the twin, unigrams: ~40 s
    python generate.py --bridges out/a,out/b --out out/generate2  # several bridges: rows by layer, spread over seeds
    python bridge.py --preset blocks --layer 2 --blocks 4 --out out/blocks2  # makes such a bridge

Each text is a held-out prefix and what a method writes after it; the intact model judges that part. A single generative
perplexity (gen-PPL) can be bought with dull text, so every method is swept over the same temperatures and compared
where its entropy equals real text's. Writes result.json, samples.jsonl and generation.png to --out.

Letters: N texts, T tokens, V vocabulary.
"""
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig

import data
import hybrid
from core import backbone, masked
from core.common import UserError, entry, parse, pick_dtype, setup
from core.draws import generator
from core.metrics import SHAPE, at_entropy, judge_text, mauve, measure
from core.report import frontiers
from core.run import Run, atomic, finished, read_json
from core.stats import plus_minus


@dataclass
class Config:
    bridges: str = "out/blocks"  # folders of bridges trained with --visible prefix, span or mix, comma-separated
    twin: str = "out/repr_align/w10"  # folder of the masked twin (empty: leave its row out)
    data: str = "stdlib"        # held-out text; see data.py
    out: str = "out/generate"   # run folder
    seed: int = 0               # of every draw
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the models
    texts: int = 32             # N
    prefix: int = 64            # visible tokens of each
    new: int = 64               # tokens written after them
    block: int = 64             # of which so many are drawn at once
    nfe: int = 8                # network calls of the first denoising
    rounds: int = 8             # refinements (0: none)
    back: float = 0.25          # share of the calls that a refinement makes again, after one that encodes
    alpha: float = 1.0          # weight of the token readout beside the retained blocks
    temperatures: str = "0.6,0.8,1.0,1.3,1.6"  # the frontier of every row
    judge: str = ""             # a folder or Hub id whose perplexity counts (empty: the intact model's)
    experts: bool = True        # also decode by each expert alone
    dry_run: bool = False       # print what would be sampled, then leave


# ------------------------------------------------------------------------------------------------------- methods
def unigram(train, count, shape, temperature, seed):
    """Tokens (N, T) drawn independently by their frequency in `count` training windows, tempered."""
    p = torch.bincount(train.windows(count).flatten()).double() ** (1 / temperature)
    cdf = (p / p.sum()).cumsum(0).numpy()
    return torch.from_numpy(np.searchsorted(cdf, generator(seed, "unigram").random(shape)).clip(max=len(cdf) - 1))


@torch.no_grad()
def autoregressive(lm, prompts, new, temperature, seed):
    """prompts (N, P) -> (N, P + new) by stock generate() of the intact model."""
    torch.manual_seed(seed)
    how = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=temperature, top_k=0,
                           eos_token_id=lm.config.eos_token_id, pad_token_id=0)  # not the model's own nucleus and such
    return lm.model.generate(prompts, generation_config=how, attention_mask=torch.ones_like(prompts))


def unmasked(student, prompts, new, steps, temperature, seed, order):
    """prompts (N, P) -> (N, P + new) by the masked twin, tokens revealed in this `order` (see masked.fill)."""
    ids = torch.cat([prompts, prompts.new_full((len(prompts), new), student.mask_id)], 1)
    return masked.fill(student, ids, ids == student.mask_id, steps, temperature, seed, order)


def methods(cfg, lm, folders, device, dtype, train):
    """Yields (row name, what it is, temperature -> ids (N, T))."""
    calls = cfg.nfe + cfg.rounds * (1 + hybrid.again(cfg.nfe, cfg.back))
    yield "unigram", {}, lambda prompts, t: torch.cat(
        [prompts, unigram(train, 512, (len(prompts), cfg.new), t, cfg.seed).to(device)], 1)
    yield "AR, intact model", {"calls": cfg.new}, lambda prompts, t: autoregressive(lm, prompts, cfg.new, t, cfg.seed)
    if cfg.twin:
        student, _ = masked.load_converted(cfg.twin, device, dtype)
        steps = min(calls, cfg.new)
        about = {"calls": steps, "train_seconds": read_json(Path(cfg.twin) / "result.json")["seconds"]}
        for order in ("random", "confidence"):  # confidence first is the usual one, and collapses the entropy
            yield f"masked twin, {order} order", about, lambda prompts, t, order=order: unmasked(
                student, prompts, cfg.new, steps, t, cfg.seed, order)
    for folder in folders:
        model = hybrid.from_bridge(folder, device=device, dtype=dtype)
        result = read_json(Path(folder) / "result.json", "finish that run first")
        about = {"layer": model.config.layer, "seed": result["seed"], "folder": str(folder),
                 "calls": calls if result["objective"] == "diffusion" else 1,
                 "steps": result["steps"], "train_seconds": result["seconds"], "parameters": result["parameters"],
                 "readout_accuracy": result["readout_accuracy"], "val_loss": result["val_loss"],
                 "fvu": result["nfe"].get("8", result["nfe"].get("1"))["fvu"]}
        for expert in ("both", "upper", "readout") if cfg.experts else ("both",):
            def blocks(prompts, t, expert=expert, model=model):
                return model.generate_blocks(prompts, cfg.new, cfg.block, cfg.nfe, cfg.alpha, t, rounds=cfg.rounds,
                                             back=cfg.back, expert=expert, seed=cfg.seed)
            yield "blocks", {**about, "expert": expert}, blocks


def name_of(row):
    """A row's title in tables."""
    if "layer" not in row:
        return row["name"]
    how = {"both": "product", "upper": "upper alone", "readout": "readout alone"}[row["expert"]]
    return f"blocks at layer {row['layer']}, {how}"


def table(rows, real):
    """Markdown: one line a method; bridges that differ in their seed alone are one line, mean +- sd."""
    near = min((p["temperature"] for p in rows[0]["frontier"]), key=lambda t: abs(t - 1))
    lines = ["| method | gen-PPL at real entropy | over real text | "
             f"gen-PPL, T = {near:g} | median | entropy | diversity | rep-4 | distinct-2 | self-BLEU | MAUVE |",
             "|---" * 11 + "|",
             f"| real text | {real['gen_ppl']:.1f} | 1.00 | {real['gen_ppl']:.1f} | {real['gen_ppl_median']:.1f} | "
             + " | ".join(f"{real[k]:.2f}" for k in SHAPE) + " | - |"]
    groups = {}
    for row in rows:
        alike = tuple(row.get(k) for k in ("steps", "parameters"))  # all but the seed
        groups.setdefault((name_of(row), alike), []).append(row)
    for (title, _), group in groups.items():
        one = [next(p for p in r["frontier"] if p["temperature"] == near) for r in group]
        matched = [r["matched"] for r in group]
        cell = "never there" if None in matched else plus_minus(matched, ".1f")
        ratio = "-" if None in matched else f"{statistics.mean(matched) / real['gen_ppl']:.2f}"
        lines.append(f"| {title} | {cell} | {ratio} | {plus_minus([p['gen_ppl'] for p in one], '.1f')} | "
                     f"{plus_minus([p['gen_ppl_median'] for p in one], '.1f')} | "
                     + " | ".join(plus_minus([p[k] for p in one], ".2f") for k in SHAPE) + " | "
                     + (plus_minus([r["mauve"] for r in group], ".2f") if group[0].get("mauve") else "-") + " |")
    return "\n".join(lines)


def figure(rows, real, path):
    """Every method's frontier; blocks are coloured by layer, and drawn by the product of experts."""
    layers = sorted({r["layer"] for r in rows if "layer" in r})
    colors = {"unigram": "#bbbbbb", "AR, intact model": "#222222", "masked twin, random order": "#edae49",
              "masked twin, confidence order": "#f3d19c"}
    shades = {layer: (i / max(1, len(layers) - 1) * 0.6, 0.45, 0.65) for i, layer in enumerate(layers)}
    frontiers([(name_of(r), colors.get(r["name"]) or shades[r["layer"]], r["frontier"]) for r in rows
               if r.get("expert", "both") == "both"], real, path, "GENERATE: the frontier over temperature")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    folders = [Path(f) for f in cfg.bridges.split(",")]
    try:
        temperatures = [float(t) for t in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = [0.0]
    if not all(0 < t < 100 for t in temperatures) or cfg.texts < 2 or cfg.new < 4:
        raise UserError("--temperatures must be numbers above 0, --texts at least 2 and --new at least 4")
    if cfg.alpha < 0 or not 0 <= cfg.back < 1:
        raise UserError("--alpha must not be negative, and --back lie in [0, 1)")
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    if cfg.dry_run:
        print(f"would write {cfg.texts} texts of {cfg.new} tokens at each of {len(temperatures)} temperatures with "
              f"{', '.join(map(str, folders))}, and with AR sampling, unigrams and {cfg.twin or 'no masked twin'}")
        return None
    remedy = "train one with: python bridge.py --preset blocks --layer 2 --blocks 4 --out out/blocks"
    infos = [read_json(f / "bridge.json", remedy) for f in folders]
    if len({info["base"] for info in infos}) > 1:
        raise UserError("these bridges come from different backbones; compare those of one")
    twin = read_json(Path(cfg.twin) / "result.json", "finish it, or pass --twin ''") if cfg.twin else infos[0]
    if twin["base"] != infos[0]["base"]:
        raise UserError(f"{cfg.twin} was converted from another backbone than these bridges; pass --twin ''")
    never = [str(f) for f, info in zip(folders, infos, strict=True) if info.get("visible", "full") == "full"]
    if never:
        raise UserError(f"{never[0]} has never met an unknown token; {remedy}")
    backbone.read_config(infos[0]["model"], cfg.prefix + cfg.new)
    weights = [backbone.identity(f) for f in [*folders, *(f for f in (cfg.twin, cfg.judge) if f)]]
    identity = {"base": infos[0]["base"], "weights": weights}
    if result := finished(cfg, identity):
        print(table(result["rows"], result["real"]))
        return result

    # ------------------------------------------------------------------------------------------- texts, judge
    tokenizer = backbone.load_tokenizer(infos[0]["model"])
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    T = cfg.prefix + cfg.new
    text = data.Tokens(shards, "val", T - 1).windows(cfg.texts).to(world.device)                # (N, T)
    lm = backbone.load(infos[0]["model"], world.device, dtype)
    other = (backbone.load(cfg.judge, world.device, dtype), backbone.load_tokenizer(cfg.judge)) if cfg.judge else None
    run = Run(cfg, world, identity)
    def measured(ids):
        return measure(lm, ids, cfg.prefix, judge_text(*other, tokenizer, ids, cfg.prefix) if other else None)
    real = measured(text)

    # ------------------------------------------------------------------------------------------------ sample
    rows, samples = [], []
    for name, about, write in methods(cfg, lm, folders, world.device, dtype, data.Tokens(shards, "train", T)):
        row = {"name": name, **about, "frontier": []}
        for t in temperatures:
            ids = write(text[:, :cfg.prefix], t)
            assert torch.equal(ids[:, :cfg.prefix], text[:, :cfg.prefix])
            row["frontier"].append({"temperature": t, **measured(ids)})
            if t == min(temperatures, key=lambda x: abs(x - 1)):
                row["mauve"] = mauve(lm, text, ids, cfg.prefix)
            samples += [{"method": name_of(row), "temperature": t, "prefix": tokenizer.decode(some[:cfg.prefix]),
                         "text": tokenizer.decode(some[cfg.prefix:])} for some in ids[:8]]
        row["matched"] = at_entropy(row["frontier"], real["entropy"])
        rows.append(row)
        shown = "never at real text's entropy" if row["matched"] is None else f"gen-PPL {row['matched']:.1f}"
        run.say(f"{name_of(row):34} {shown}   (real text {real['gen_ppl']:.1f})")

    # ------------------------------------------------------------------------------------------------ result
    with atomic(run.out / "samples.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(s) + "\n" for s in samples))
    with atomic(run.out / "generation.png") as temporary:
        figure(rows, real, temporary)
    run.finish({**identity, "rows": rows, "real": real, "texts": len(text),
                "settings": {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "dry_run")}})
    print(table(rows, real))
    return run.result


if __name__ == "__main__":
    main()
