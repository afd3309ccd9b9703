"""generate.py: GENERATE. Text drawn by diffusion in hidden space, measured beside its rivals at equal entropy.

    python generate.py                                            # out/blocks beside its rivals: ~4 min on two cores
    python generate.py --bridges out/a,out/b --twin out/m,out/n --out out/generate2    # layers and seeds; mean +- sd
    python bridge.py --preset blocks --layer 1 --blocks 4 --out out/blocks1            # makes such a bridge

Each text is a held-out prefix and what a method writes after it, or with --suffix in the gap before more text. Methods
are compared by gen-PPL at real text's entropy (core.metrics.at_entropy), over temperatures that go on until it is
reached. Of a method's settings (the twin's order, how lazy Jacobi is, the weights of our two experts) the best is
chosen on texts apart, for ours and rivals alike, and alone reported. Writes result.json, samples.jsonl, generation.png
and section.md to --out.

Letters: N texts, P prefix, S suffix, T tokens, V vocabulary, L blocks, l the layer of a bridge.
"""
import functools
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import data
from core import backbone, conversion, masked
from core.common import UserError, entry, parse, pick, pick_dtype, setup
from core.diffusion import SAMPLERS, again
from core.draws import generator
from core.frontier import COLDEST, HOTTEST, figure, frontier, headline, matched, nearest, table, tune, verdicts
from core.metrics import at_entropy, judge, measure, seconds_of
from core.report import table as markdown
from core.run import Run, finished, read_json, write_text


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m"] = "auto"  # auto: by the backbone's size
    bridges: str = "out/blocks"  # folders of bridges trained with --visible prefix, span or mix, comma-separated
    twin: str = "out/repr_align/w0,out/repr_align/block"  # folders of masked twins, by arm and seed (empty: none)
    methods: str = "all"        # which to draw with, comma-separated (all: METHODS, below)
    data: str = "stdlib"        # held-out text; see data.py
    out: str = "out/generate"   # run folder
    seed: int = 0               # of every draw
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the models
    texts: int = 24             # N that are reported
    tune_texts: int = 8         # other texts, on which settings are chosen (0: choose none, report every setting)
    prefix: int = 64            # visible tokens of each
    new: int = 64               # tokens written after them
    suffix: int = 0             # visible tokens after those, which close a gap; all best within the bridges' seq_len
    lines: bool = False         # gaps that are one whole line, of exactly --new tokens
    block_size: int = 64        # of which so many are drawn at once
    nfe: int = 4                # network calls of the first denoising
    sampler: Literal["", *SAMPLERS] = ""  # of the bridge (empty: its default)
    shift: float = 0.0          # of the sampler's grid (0: the bridge's default)
    refinements: int = 14       # of each block of tokens (0: none)
    back: float = 0.25          # share of the denoising calls that a refinement makes again
    alphas: str = "0.8,0.6"     # weights of the token readout beside the retained blocks: settings to choose from
    betas: str = "0.8,0.6"      # shares of the token prior that are divided out of their product: likewise
    temperatures: str = "1.0"   # where frontiers start; they go on until real text's entropy is reached
    second_judge: str = ""      # a folder or Hub id that shares no block with the decoder (empty: none)


PRESETS = {"tiny": {"texts": 4, "tune_texts": 2, "prefix": 16, "new": 12, "block_size": 12, "nfe": 2, "refinements": 1,
                    "alphas": "0.8", "betas": "0.8"},
           "135m": {"texts": 6, "tune_texts": 2, "refinements": 6, "alphas": "0.8", "betas": "0.8"}}


class Context(NamedTuple):
    """What a method may need: the flags, the intact model, log p (V,) of training text's tokens, and
    [(folder, its bridge.json)]."""
    cfg: Any
    lm: Any
    prior: Any
    bridges: list


# ------------------------------------------------------------------------------------------------------- methods
# A method yields, for each setting and trained model, (row name, what is known about it, write); write takes prompts
# (N, P), what comes after the gap (N, S; S = 0: nothing) and a temperature to (N, P + new), and may look at what comes
# after or not. Rows of one name are seeds; one "group" in `about`: settings to choose from.
def unigram(cx):
    def write(prompts, after, t):
        u = generator(cx.cfg.seed, "unigram").random((len(prompts), cx.cfg.new))
        new = masked.choose(cx.prior, t, 1.0, torch.from_numpy(u).to(prompts.device))
        return torch.cat([prompts, new], 1)
    yield "unigrams", {"calls": 0}, write


def autoregressive(cx):
    """Stock generate() of the intact model, which sees nothing after a gap; so the one of CHOICE that makes what comes
    after likeliest, too."""
    from transformers import GenerationConfig

    def write(prompts, after, t, count=1):
        torch.manual_seed(cx.cfg.seed)
        how = GenerationConfig(max_new_tokens=cx.cfg.new, min_new_tokens=cx.cfg.new, do_sample=True, temperature=t,
                               top_k=0, eos_token_id=cx.lm.config.eos_token_id, pad_token_id=0)  # not its own nucleus
        some = prompts.repeat_interleave(count, 0)                                    # (N count, P)
        out = cx.lm.model.generate(some, generation_config=how, attention_mask=torch.ones_like(some))
        if count == 1:
            return out
        nats = judge(cx.lm, torch.cat([out, after.repeat_interleave(count, 0)], 1), out.shape[1]).sum(1)
        best = nats.view(-1, count).argmin(1)                                         # (N,)
        return out.view(len(prompts), count, -1)[torch.arange(len(prompts)), best]
    yield "AR, intact model", {"calls": cx.cfg.new}, write
    if cx.cfg.suffix:
        yield f"AR, best of {CHOICE} by what comes after", {"calls": cx.cfg.new + 1}, functools.partial(
            write, count=CHOICE)


@torch.no_grad()
def jacobi(lm, prompts, new, calls, temperature, seed, prior, stay=0.0):
    """prompts (N, P) -> (N, P + new): each call decodes all new tokens again, in parallel, from the guess before it:
    the control for what parallel decoding gives without any training.

    Plain: by inverting the distribution function at one fixed u a position. After i calls the first i tokens are those
    that sampling one by one would draw at these u. Lazy (`stay` > 0): by fresh draws, whose tokens would never fit one
    another, from p(x | tokens before) p(x | its last token) / p(x), where the last token is taken for x itself with
    probability `stay`, else for one drawn from the prior: a Gibbs sampler with a memory."""
    from transformers import DynamicCache
    cache, past = DynamicCache(), prompts.shape[1] - 1

    def draws(*key):
        u = np.stack([generator(seed, *key, row).random(new) for row in range(len(prompts))])
        return torch.from_numpy(u).to(prompts.device)                                 # (N, new)

    def states(lo, hi):                                                               # of these tokens, after the cache
        positions = torch.arange(lo, hi, device=ids.device)[None]
        h = lm.embed(ids[:, lo:hi], positions)
        return lm.through(h, 0, lm.L, lm.side(h, positions, None, cache))
    u = draws("drift", 0) if stay else draws("jacobi")
    ids = torch.cat([prompts, masked.choose(prior, 1.0, 1.0, u)], 1)                 # (N, P + new), a first guess
    states(0, past)
    for call in range(calls if stay else min(calls, new)):
        known = 0 if stay else call                                                   # that many are final by now
        law = lm.head(states(past + known, past + new)).double()                      # (N, new - known, V)
        backbone.trim(cache, past if stay else past + known + 1)
        if stay:
            u = draws("drift", call + 1)
        if stay and call:
            old = ids[:, past + 1:, None]
            law.scatter_add_(-1, old, torch.log1p(stay / (1 - stay) / prior.double().exp()[old]))
        better = masked.choose(law, temperature, 1.0, u[:, known:].contiguous())
        ids = torch.cat([ids[:, :past + known + 1], better], 1)
    return ids


def parallel(cx):
    """Jacobi decoding by the intact model: plain, at as many calls and block passes as ours; lazy, at as many calls."""
    calls, passes = cost(cx.cfg, cx.bridges[0][1], cx.lm.L)
    each = np.cumsum(1 - np.arange(cx.cfg.new) / cx.cfg.new) * cx.lm.L       # passes of so many calls: tokens get final

    def row(name, some, **how):
        return name, {"calls": some, **({"group": "lazy Jacobi"} if how else {})}, lambda prompts, after, t: jacobi(
            cx.lm, prompts, cx.cfg.new, some, t, cx.cfg.seed, cx.prior, **how)
    equal = {"calls": calls, "block passes": min(cx.cfg.new, 1 + int((each < passes).sum()))}
    for some in dict.fromkeys(equal.values()):
        yield row(f"Jacobi, intact model, equal {' and '.join(n for n, c in equal.items() if c == some)}", some)
    for stay in (0.5, 0.8, 0.9, 0.95):                                       # our loop without bridge or training
        yield row(f"lazy Jacobi, intact model, stay {stay}", calls, stay=stay)


def twin(cx):
    """The masked twin, revealed in every order of masked.ORDERS."""
    cfg, steps = cx.cfg, min(cost(cx.cfg, cx.bridges[0][1], cx.lm.L)[0], cx.cfg.new)
    for folder in split(cfg.twin):
        student, _ = masked.load_converted(folder, cx.lm.model.device, cx.lm.model.dtype)
        result = read_json(Path(folder) / "result.json")
        kind = "masked twin" if student.arm == conversion.BIDIRECTIONAL else f"masked twin, {student.arm}"
        about = {"group": kind, "calls": steps, "seed": result["seed"], "train_seconds": result["seconds"]}
        for order in masked.ORDERS:
            def write(prompts, after, t, student=student, order=order):
                parts = [prompts, prompts.new_full((len(prompts), cfg.new), student.mask_id), after]
                ids = torch.cat(parts if student.arm.attention == "bidirectional" else parts[:2], 1)
                return masked.fill(student, ids, ids == student.mask_id, steps, t, cfg.seed,
                                   order)[:, :cfg.prefix + cfg.new]
            yield f"{kind}, {order} order", about, write


def blocks(cx):
    """Bridges: so many tokens at once in hidden space, decoded by the product of two experts."""
    import hybrid
    cfg, where = cx.cfg, cx.lm.model
    for folder, info in cx.bridges:
        model = hybrid.from_bridge(folder, "", 0, cfg.sampler, cfg.shift, where.device, where.dtype)
        result, (calls, passes) = read_json(Path(folder) / "result.json", "finish that run"), cost(cfg, info, cx.lm.L)
        about = {"group": f"blocks at layer {info['layer']}", "layer": info["layer"], "folder": str(folder),
                 "calls": calls, "passes": passes, "train_seconds": result["seconds"],
                 **{k: result[k] for k in ("seed", "steps", "parameters", "readout_accuracy", "val_loss")}}
        for a, b in itertools.product(numbers(cfg.alphas), numbers(cfg.betas)):
            def write(prompts, after, t, model=model, a=a, b=b):
                return model.generate_blocks(
                    prompts, cfg.new, cfg.block_size, cfg.nfe, prior=cx.prior, alpha=a, beta=b, temperature=t,
                    back=cfg.back, refinements=cfg.refinements, seed=cfg.seed,
                    suffix_ids=after if cfg.suffix else None)[:, :cfg.prefix + cfg.new]
            yield f"{about['group']}, alpha {a:g}, beta {b:g}", {**about, "alpha": a, "beta": b}, write


CHOICE = 8                      # continuations, of which one is chosen by what comes after the gap
METHODS = {"unigram": unigram, "ar": autoregressive, "jacobi": parallel, "twin": twin, "blocks": blocks}


def drawn(cx):
    """All rows of the methods asked for."""
    for method in asked(cx.cfg).values():
        yield from method(cx)


def asked(cfg):
    names = METHODS if cfg.methods == "all" else split(cfg.methods)
    return {name: pick(METHODS, name, "--methods") for name in names}


def cost(cfg, info, L):
    """(network calls one after another, passes of a new token through any transformer block) of drawing the new tokens
    with the bridge of this bridge.json. The intact model's pass of a refinement is a call too, the retained blocks'
    after the first denoising a part of its last one. A finished block is encoded for the next one by both; the prefix,
    encoded once by every method, is left out."""
    first, turns = (cfg.nfe, cfg.refinements) if info["objective"] == "diffusion" else (1, 0)
    ours, count = first + turns * again(first, cfg.back), -(-cfg.new // cfg.block_size)    # the bridge's calls
    encode = first * info["blocks"] + L                                               # of a finished block, for others
    each = ours * info["blocks"] + (L - info["layer"]) + (turns + (cfg.suffix > 0)) * L + encode * (1 - 1 / count)
    seen = 1 + (cfg.prefix + cfg.suffix) / cfg.new * (cfg.suffix > 0)                 # around a gap nothing is cached
    return (ours + turns) * count + first * (count - 1), round(each * seen)


def section(result):
    """This run's part of the report."""
    how, tuned, suffix = result["settings"], result["tuned"], result["settings"]["suffix"]
    lines = ["## GENERATE", "",
             f"{result['texts']} texts: {how['prefix']} held-out tokens, then {how['new']} written"
             f"{f' before {suffix} that are known, judged with as many of these' if suffix else ''}"
             f"{', one whole line' * how.get('lines', False)}; ours "
             f"{how['block_size']} at a time by {how['nfe']} calls and {how['refinements']} refinements; seed "
             f"{how['seed']}. gen-PPL is that of the intact model (it favours its own samples), read off where the "
             "entropy of a text's tokens equals real text's; +- sd over training seeds where there are several.", "",
             table(result), "", "![frontiers over temperature](generation.png)", "", *verdicts(result), ""]
    if tuned:
        lines += [f"Settings, chosen on {result['tune_texts']} other texts (gen-PPL at their entropy):", "",
                  markdown(["setting", "gen-PPL", "chosen"], [
                      [name, matched([{"matched": m} for m in some["matched"]]), "yes" * (name == group["chosen"])]
                      for group in tuned.values() for name, some in group["settings"].items()]), ""]
    return "\n".join([*lines, *(
        f"- {r['name']}, seed {r['seed']}: {r['parameters']:,} parameters, readout included, {r['steps']} steps, "
        f"{r['train_seconds']:.0f} s; the readout names {r['readout_accuracy']:.1%} of the tokens from true states."
        for r in result["rows"] if "layer" in r), ""])


# ---------------------------------------------------------------------------------------------------------- main
def split(text):
    return [part for part in text.split(",") if part]


def numbers(text):
    """The numbers of a comma list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return [math.nan]


def check(cfg):
    """Refuse what can be seen from the flags and the folders alone. Returns [(folder, its bridge.json)]."""
    if not all(COLDEST <= t <= HOTTEST for t in numbers(cfg.temperatures)):
        raise UserError(f"--temperatures must be numbers in [{COLDEST}, {HOTTEST}]")
    if not all(x >= 0 for x in numbers(f"{cfg.alphas},{cfg.betas}")) or not 0 <= cfg.back < 1:
        raise UserError("--alphas and --betas must be numbers that are not negative, and --back lie in [0, 1)")
    if cfg.lines and not cfg.suffix:
        raise UserError("--lines are gaps: they go with --suffix")
    if cfg.suffix and cfg.block_size < cfg.new:
        raise UserError("a gap before a --suffix is drawn at once: --block_size must be at least --new")
    if cfg.texts < 2 or cfg.tune_texts not in (0, *range(2, cfg.texts + 1)) or cfg.new < 4 or cfg.prefix < 2:
        raise UserError("--texts and --prefix must be at least 2, --new 4, and --tune_texts 0 or 2..--texts")
    cfg.twin = cfg.twin if "twin" in asked(cfg) else ""
    remedy = "train one with: python bridge.py --preset blocks --layer 1 --blocks 4 --out out/blocks"
    bridges = [(f, read_json(Path(f) / "bridge.json", remedy)) for f in split(cfg.bridges)]
    for folder, info in bridges:
        if info["base"] != bridges[0][1]["base"]:
            raise UserError("these bridges come from different backbones; compare those of one")
        if info.get("visible", "full") == "full":
            raise UserError(f"{folder} has never met an unknown token; {remedy}")
        if cfg.suffix and not info["bidirectional"]:
            raise UserError(f"{folder} cannot see a --suffix: it was trained without --bidirectional; {remedy}")
    for folder in split(cfg.twin):
        if read_json(Path(folder) / "result.json", "finish it, or pass --twin ''")["base"] != bridges[0][1]["base"]:
            raise UserError(f"{folder} was converted from another backbone than these bridges; pass --twin ''")
    return bridges


def whole_lines(tokens, tokenizer, cfg):
    """Windows (2N, T) of held-out text whose gap is one line: a token with a line break, or the end of a text, before
    it, one after it and none inside. Evenly spread; fewer where there are fewer."""
    breaks = np.array(["\n" in tokenizer.decode(i) or i == tokenizer.eos_token_id for i in range(len(tokenizer))])
    at = np.flatnonzero(breaks[tokens.ids])
    starts = at[:-1][np.diff(at) == cfg.new + 1] + 1 - cfg.prefix
    starts = starts[(starts >= 0) & (starts < len(tokens.ids) - tokens.T)]
    count = min(len(starts), 2 * cfg.texts)
    return tokens.cut(starts[np.arange(count) * len(starts) // max(1, count)]) if count else []


@entry
def main(argv):
    cfg = parse(Config, argv, f"{__doc__}\nMethods: {', '.join(METHODS)}.", PRESETS,
                lambda cfg: backbone.preset_of("", cfg.out, cfg.bridges.split(",")[0]))
    world, bridges = setup(cfg.device), check(cfg)
    dtype = pick_dtype(cfg, world.device)
    model = bridges[0][1]["model"]
    weights = [backbone.identity(f) for f in [*split(cfg.bridges), *split(cfg.twin), *split(cfg.second_judge)]]
    identity = {"base": bridges[0][1]["base"], "weights": weights}
    if result := finished(cfg, identity):
        print(table(result))
        return result

    # 1 texts to report, others to choose settings on, judges
    import hybrid
    gap, length = slice(cfg.prefix, cfg.prefix + cfg.new), cfg.prefix + cfg.new + cfg.suffix
    backbone.read_config(model, length)
    tokenizer = backbone.load_tokenizer(model)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    tokens = data.Tokens(shards, "val", length - 1)
    windows = whole_lines(tokens, tokenizer, cfg) if cfg.lines else tokens.windows(2 * cfg.texts)   # (2N, T)
    if len(windows) < 2 * cfg.texts:
        raise UserError(f"the held-out text has {len(windows)} {'lines of --new tokens in ' * cfg.lines}windows of "
                        f"--prefix + --new + --suffix tokens, fewer than twice --texts {cfg.texts}")
    windows = windows.to(world.device)
    text, apart = windows[::2], windows[1::2][torch.arange(cfg.tune_texts) * cfg.texts // max(1, cfg.tune_texts)]
    lm = backbone.load(model, world.device, dtype)
    second = cfg.second_judge and (backbone.load(cfg.second_judge, world.device, dtype),
                                   backbone.load_tokenizer(cfg.second_judge), tokenizer)
    measured = functools.partial(measure, lm, prefix=cfg.prefix, end=gap.stop)
    judged = functools.partial(measured, second=second)                               # not where settings are chosen
    cx = Context(cfg, lm, hybrid.token_prior(shards, lm.V).to(world.device), bridges)
    run = Run(cfg, world, identity)

    # 2 choose each group's setting, then draw
    start, rows, samples, real = numbers(cfg.temperatures), [], [], judged(text)
    tuned = tune(drawn(cx), measured, apart, gap, start) if cfg.tune_texts else {}
    one = text[:1, :gap.start], text[:1, gap.stop:]                                   # (1, P), (1, S): timed alone
    for name, about, write in drawn(cx):
        group = tuned.get(about.get("group"))
        if group and name != group["chosen"]:
            continue
        first = sorted(set(group["settings"][name]["near"])) if group else start
        points, ids = frontier(write, judged, text, gap, real["entropy"], first)
        near = ids[nearest(points.values(), real["entropy"])[0]["temperature"]]
        row = {"name": name, **about, "frontier": list(points.values()),
               "matched": at_entropy(points.values(), real["entropy"]),
               "tokens_per_s": cfg.new / seconds_of(2, functools.partial(write, *one, 1.0))}
        if second:
            row["second_matched"] = at_entropy(points.values(), real["entropy"], "second_ppl")
        rows.append(row)
        samples += [{"method": name, "prefix": tokenizer.decode(some[:cfg.prefix]),
                     "text": tokenizer.decode(some[gap]),
                     **({"after": tokenizer.decode(some[gap.stop:])} if cfg.suffix else {})} for some in near[:8]]
        run.say(f"{name:44} gen-PPL at real text's entropy: {matched([row])}   (real text {real['gen_ppl']:.1f})")

    # 3 report
    write_text(run.out / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    result = {**identity, "rows": rows, "real": real, "tuned": tuned, "texts": len(text), "tune_texts": len(apart),
              "settings": asdict(cfg)}
    figure(result, run.out / "generation.png")
    made_of = backbone.made_of(cfg.out, [*split(cfg.bridges), *split(cfg.twin)])
    run.finish({**result, "headline": headline(result), "made_of": made_of,
                "findings": [line.removeprefix("- ") for line in list(verdicts(result))[:4]]}, section(result))
    print(table(result))
    return run.result


if __name__ == "__main__":
    main()
