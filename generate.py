"""GENERATE: write text by diffusion in hidden space, and compare it with rivals at equal entropy.

    python generate.py                                      # out/generator and its rivals
    python bridge.py --generate --layer 2 --out out/generator_l2
    python generate.py --bridges out/generator out/generator_l2 --out out/generate_layers

Hidden-state diffusion writes a token block in two steps. First the bridge samples the states h[l]
of all its tokens together, by flow matching with x-prediction. Then two experts name every token:
the upper blocks, from the states before it, and the bridge's readout, from its own state.

    log p(x) = log p_upper(x) + alpha * (log p_readout(x) - log p_prior(x))

A refinement lets the intact model read the tokens, adds noise to the h[l] that it computes, and
repeats the last calls of the sampler from there.

Every method continues the same held-out prefixes, at temperatures that reach the entropy of real
text. Writes result.json, which also holds the texts, and generation.png.

Shapes: N texts, P prefix, n new tokens, D width, V vocabulary, L blocks, l the bridge's layer.
"""
import math
import statistics
import timeit
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig

import data
import hybrid
from core import backbone, masked, report
from core.common import Dtype, UserError, entry, generator, normal, parse, pick_dtype, setup
from core.run import Run, finished, nearby, read_json, recorded

COLDEST = 0.4       # limits of the search over temperatures
HOTTEST = 4.0
RATIO = 1.25        # ratio of two neighbouring temperatures
BACK = 0.25         # share of the sampler's calls that a refinement repeats
STAY = 0.8          # lazy Jacobi: probability that a token stays
ORDER = "entropy"   # a converted model reveals tokens of low entropy first


@dataclass
class Config:
    # models, text, output
    preset: backbone.Preset = "auto"  # auto: by model size
    bridges: tuple[str, ...] = ("out/generator",)  # bridges trained with --generate
    converted: tuple[str, ...] = ("out/convert/w0", "out/convert/block")  # converted models
    data: str = "stdlib"        # held-out text, see data.py
    out: str = "out/generate"   # run folder
    seed: int = 0               # of all sampling
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # auto: bf16 on a GPU
    # texts
    texts: int = 24             # held-out texts
    prefix: int = 64            # given tokens of a text
    new: int = 64               # tokens to write
    # hidden-state diffusion
    block_size: int = 64        # tokens sampled together
    nfe: int = 4                # network calls of the first denoising
    refinements: int = 14       # of each token block (0: none)
    alpha: float = 0.6          # weight of the readout


PRESETS = {
    "tiny": dict(texts=4, prefix=16, new=12, nfe=2, refinements=1),
    "135m": dict(texts=6, refinements=6, alpha=0.8),
}


# -------------------------------------------------------------------------------------------------
# Hidden-state diffusion

@dataclass
class Sampling:
    """The settings of generate_blocks."""
    block_size: int = 64
    nfe: int = 4
    refinements: int = 14
    alpha: float = 0.6
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate_blocks(model, input_ids, max_new_tokens, prior, watch=None, **settings):
    """Continue input_ids (N, P) with a HybridForCausalLM: ids (N, P + max_new_tokens).

    One token block follows another; rows do not depend on one another. `prior` is the log p (V,) of
    token_prior, `watch` sees every estimate of z (N, n, D), `settings` are those of Sampling."""
    settings = Sampling(**settings)
    nfe_before = model.config.nfe
    model.set_nfe(settings.nfe)
    cache = DynamicCache(config=model.config)
    parts = [input_ids]
    for done in range(0, max_new_tokens, settings.block_size):
        following = append(model, parts[-1], cache)                             # (N, 1, V)
        count = min(settings.block_size, max_new_tokens - done)
        parts.append(sample_block(model, cache, following, count, settings, prior, watch))
    model.set_nfe(nfe_before)
    return torch.cat(parts, dim=1)


def append(model, ids, cache):
    """Add known tokens (N, T) to the cache. Returns the logits (N, 1, V) of the next token."""
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    model.hidden(ids, positions, cache=cache)           # the bridge's part of the cache
    _, states = model.read(ids, positions, cache)       # the backbone's part
    return model.lm.head(states[:, -1:])


def sample_block(model, cache, following, count, settings, prior, watch=None):
    """Tokens (N, n) of a token block after the cache. `following` (N, 1, V) predicts its first."""
    bridge = model.net
    start = cache.get_seq_length()
    positions = torch.arange(start, start + count, device=following.device)[None]
    unknown = following.new_ones((len(following), count), dtype=torch.bool)     # (N, n)
    mask = following.new_ones((count, start + count), dtype=torch.bool)         # all keys are seen
    ids = unknown.long()                                # placeholders: the bridge ignores them
    h0 = model.lm.embed(ids, positions)                                         # (N, n, D)
    z = None
    done = 0
    for turn in range(settings.refinements + 1):
        # 1. Refine: start from the states of the last tokens, as the intact model reads them
        if turn > 0:
            h, states = model.read(ids, positions, cache)                       # (N, n, D)
            z = bridge.target(h0, h, positions)
            done = settings.nfe - repeated_calls(settings.nfe)
        # 2. Sample the states of all tokens together
        key = (settings.seed, "block", start, turn)
        noise = [normal(h0.shape[1:], h0.device, *key, row) for row in range(len(h0))]
        z = model.states(h0, ids, settings.nfe, torch.stack(noise), positions, mask, cache,
                         unknown=unknown, watch=watch, z=z, done=done)
        if turn == 0:
            h = bridge.restore(h0, z, positions).to(h0.dtype)
            states = model.upper(h, positions, cache)
        backbone.trim(cache, start)                     # these tokens are not known yet
        # 3. Name the tokens. The upper blocks predict token i at position i - 1.
        upper = torch.cat([following, model.lm.head(states)[:, :-1]], dim=1)    # (N, n, V)
        logits = product(upper.double(), bridge.readout(z).double(), settings.alpha, prior)
        u = uniforms(ids.shape, ids.device, settings.seed, "decode", start, turn)
        ids = masked.choose(logits, settings.temperature, settings.top_p, u)
    return ids


def repeated_calls(nfe):
    return max(1, round(BACK * nfe))


def product(upper, readout, alpha, prior):
    """log p (..., V), not normalised, of a token from two predictions of it, logits (..., V).

    Both p(x | a) and p(x | b) contain the prior p(x). Where a and b are independent given x,
    p(x | a, b) is proportional to p(x | a) p(x | b) / p(x): alpha = 1. Both experts know the
    prompt, so they are not independent, and the readout counts for less."""
    return upper.log_softmax(-1) + alpha * readout.log_softmax(-1) - alpha * prior


def token_prior(shards, V):
    """log p (V,) of the tokens of training text (at most 2M). Counts start at one."""
    tokens = data.Tokens(shards, "train", 127)
    rows = tokens.windows(2 ** 14)                                              # (N, 128)
    if tokens.bos is not None:
        rows = rows[:, 1:]                              # the BOS of every window is no text
    counts = torch.bincount(rows.flatten(), minlength=V) + 1.0
    return counts.double().log().log_softmax(0)


def uniforms(shape, device, seed, purpose, *key):
    """Uniform numbers (N, n) in float64. A row is a function of (seed, purpose, key, row)."""
    rows = [generator(seed, purpose, *key, row).random(shape[1]) for row in range(shape[0])]
    return torch.tensor(np.stack(rows), device=device)


def count_calls(cfg):
    """Network calls, one after another, that hidden-state diffusion makes for cfg.new tokens.

    A refinement is one pass of the intact model and the repeated calls of the bridge. The bridge
    also reads every finished token block before the next one."""
    blocks = math.ceil(cfg.new / cfg.block_size)
    refinement = 1 + repeated_calls(cfg.nfe)
    return blocks * (2 * cfg.nfe + cfg.refinements * refinement) - cfg.nfe


# -------------------------------------------------------------------------------------------------
# Methods: (cx, model, prompts (N, P), temperature) -> (ids (N, P + new), network calls in a row)

@dataclass
class Context:
    """The settings and numbers that all methods share."""
    cfg: Config
    prior: torch.Tensor         # log p (V,) of training text's tokens
    calls: int                  # network calls of hidden-state diffusion: only AR makes more


def unigrams(cx, lm, prompts, temperature):
    """The floor: tokens sampled from their frequencies."""
    u = generator(cx.cfg.seed, "unigram").random((len(prompts), cx.cfg.new))
    u = torch.tensor(u, device=prompts.device)
    return torch.cat([prompts, masked.choose(cx.prior, temperature, 1.0, u)], dim=1), 0


def autoregressive(cx, lm, prompts, temperature):
    """The intact model, token by token."""
    # generate() fills what a config leaves open from the model's generation_config.json: top_p,
    # penalties, forbidden words. So we replace the model's config.
    new = cx.cfg.new
    lm.model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, pad_token_id=0, max_new_tokens=new,
        min_new_tokens=new, eos_token_id=lm.config.eos_token_id)
    torch.manual_seed(cx.cfg.seed)
    return lm.model.generate(prompts, attention_mask=torch.ones_like(prompts)), new


@torch.no_grad()
def predict(lm, ids, start, cache):
    """Logits (N, T - start, V) in float64 of the tokens from `start` on; ids (N, T).

    The cache holds the first tokens of ids, and keeps those that are the same in the next call."""
    past = cache.get_seq_length()
    positions = torch.arange(past, ids.shape[1] - 1, device=ids.device)[None]
    h = lm.hidden(ids[:, past:-1], lm.L, positions, cache=cache)                # (N, ., D)
    backbone.trim(cache, start - 1)
    return lm.head(h[:, start - 1 - past:]).double()


def jacobi(cx, lm, prompts, temperature, stay=0.0):
    """Jacobi decoding: every call samples all new tokens again, given the guess before it.

    Plain: a position keeps its uniform number u. After i calls the first i tokens equal those that
    sampling token by token gives at these u. Lazy (stay > 0): every call has new numbers. The new
    tokens would then never fit one another, so a token is sampled from p(x | tokens before) times
    p(last | x): the last token is x itself with probability `stay`, else a sample of the prior."""
    def sample(logits, temperature, call):
        key = ("drift", call) if stay else ("jacobi",)
        u = uniforms((len(prompts), cx.cfg.new), prompts.device, cx.cfg.seed, *key)
        return masked.choose(logits, temperature, 1.0, u)

    cache = DynamicCache()
    tokens = sample(cx.prior, 1.0, 0)                                           # (N, new)
    for call in range(cx.calls):
        ids = torch.cat([prompts, tokens], dim=1)
        logits = predict(lm, ids, prompts.shape[1], cache)                      # (N, new, V)
        if stay and call:                               # the first guess is not worth keeping
            last = tokens[..., None]
            odds = stay / (1 - stay) / cx.prior.exp()[last]
            logits.scatter_add_(-1, last, torch.log1p(odds))
        tokens = sample(logits, temperature, call + 1)
    return torch.cat([prompts, tokens], dim=1), cx.calls


def converted_model(cx, student, prompts, temperature):
    """A masked diffusion LM of repr_align.py."""
    calls = min(cx.calls, cx.cfg.new)
    masks = prompts.new_full((len(prompts), cx.cfg.new), student.mask_id)
    ids = torch.cat([prompts, masks], dim=1)
    hidden = ids == student.mask_id
    ids = masked.fill(student, ids, hidden, calls, temperature=temperature, seed=cx.cfg.seed,
                      order=ORDER)
    return ids, calls


def hidden_state_diffusion(cx, model, prompts, temperature):
    cfg = cx.cfg
    ids = generate_blocks(model, prompts, cfg.new, cx.prior, block_size=cfg.block_size, nfe=cfg.nfe,
                          refinements=cfg.refinements, alpha=cfg.alpha, temperature=temperature,
                          seed=cfg.seed)
    return ids, cx.calls


# To add a method: a function, and an entry here. It gets the intact model, unless `load` yields
# others for its name.
METHODS = {
    "unigrams": unigrams,
    "AR": autoregressive,
    "Jacobi": jacobi,
    "lazy Jacobi": partial(jacobi, stay=STAY),
    "converted model": converted_model,
    "hidden-state diffusion": hidden_state_diffusion,
}


def load(name, cfg, lm):
    """Yield (model, its folder, end of the name in the table) for every model of a method."""
    place = {"device": lm.model.device, "dtype": lm.model.dtype}
    if name == "converted model":
        for folder in cfg.converted:
            student, _ = masked.load_converted(folder, **place)
            yield student, folder, f", {student.arm}"
    elif name == "hidden-state diffusion":
        for folder in cfg.bridges:
            model = hybrid.from_bridge(folder, **place)
            yield model, folder, f", layer {model.config.layer}"
    else:
        yield lm, "", ""


# -------------------------------------------------------------------------------------------------
# Metrics: the intact model's perplexity of a text, read at equal entropy

def gen_ppl(lm, texts, prefix):
    """exp of the mean -log p of a token after the prefix; texts (N, T)."""
    logits = predict(lm, texts, prefix, DynamicCache())                         # (N, n, V)
    nll = F.cross_entropy(logits.flatten(0, 1), texts[:, prefix:].flatten())
    return nll.exp().item()


def entropy(ids):
    """Entropy in nats of the token histogram of one text; ids (T,). At most ln T."""
    _, counts = ids.unique(return_counts=True)
    return torch.special.entr(counts.double() / len(ids)).sum().item()


def measure(lm, texts, prefix):
    """The metrics of the tokens after the prefix."""
    entropies = [entropy(ids) for ids in texts[:, prefix:]]
    return {"gen_ppl": gen_ppl(lm, texts, prefix), "entropy": statistics.mean(entropies)}


def frontier(write, lm, prompts, target):
    """Write at T = 1, and hotter or colder until the entropy `target` lies between two points.

    Returns the points [{temperature, calls, metrics}] and the last texts (N, P + new)."""
    points = []
    temperature = 1.0
    while COLDEST <= temperature <= HOTTEST:
        texts, calls = write(prompts, temperature)
        point = {"temperature": temperature, "calls": calls,
                 **measure(lm, texts, prompts.shape[1])}
        points.append(point)
        missing = target - point["entropy"]
        if missing * (target - points[0]["entropy"]) <= 0:
            break
        temperature = round(temperature * (RATIO if missing > 0 else 1 / RATIO), 4)
    return points, texts


def at_entropy(points, target):
    """gen-PPL at the entropy `target`, that of real text: the number that methods are compared by.

    A text that repeats itself has a low perplexity and a low entropy. So a method is read where its
    entropy is that of real text: linear in (entropy, log gen-PPL) between the last two points of
    its frontier. One that stays above the target is read at its lowest entropy, which errs against
    it. None if it stays below."""
    entropies = [point["entropy"] for point in points]
    if max(entropies) < target:
        return None
    if min(entropies) >= target:
        return points[entropies.index(min(entropies))]["gen_ppl"]
    a, b = points[-2:]
    share = (target - a["entropy"]) / (b["entropy"] - a["entropy"])
    return a["gen_ppl"] ** (1 - share) * b["gen_ppl"] ** share


def tokens_per_second(write, prompt, new):
    """Speed of one text, the faster of two runs. The copy to the CPU waits for a GPU."""
    seconds = timeit.repeat(lambda: write(prompt, 1.0)[0].cpu(), number=1, repeat=2)
    return new / min(seconds)


# -------------------------------------------------------------------------------------------------
# Report

def table(result):
    """Markdown: a line a method and training seed."""
    lines = [["real text", None, None, None, result["real"]["gen_ppl"]]]
    keys = ["method", "seed", "calls", "tokens_per_s", "matched"]
    for row in result["rows"]:
        lines.append([row[key] for key in keys])
    return report.table([*keys[:-1], "gen-PPL at real entropy"], lines)


def figure(result, path):
    """A dot a row: hidden-state diffusion in blue, its rivals in grey. The line is real text."""
    with report.figure(path, width=9, height=2.6) as (ax,):
        for row in result["rows"]:
            color = report.GREY if row["layer"] is None else report.BLUE
            ax.plot([row["matched"]], [row["method"]], "o", color=color)
        ax.axvline(result["real"]["gen_ppl"], color=report.RED)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("gen-PPL at real text's entropy (lower is better; line: real text)")


# -------------------------------------------------------------------------------------------------
# Main

def choose(cfg):
    return backbone.preset_of(cfg, next(iter(cfg.bridges), "none"))


def check(cfg):
    """{folder: result.json} of the bridges and the converted models. They share one backbone."""
    if not cfg.bridges:
        raise UserError("--bridges is empty; train one with: python bridge.py --generate")
    remedy = "train it (bridge.py --generate, repr_align.py), or leave it out"
    results = {}
    for folder in cfg.bridges + cfg.converted:
        recorded(folder)                                # refuses a folder of the second edition
        results[folder] = read_json(Path(folder) / "result.json", remedy)
    if len({result.get("base") for result in results.values()}) > 1:
        raise UserError("these --bridges and --converted models were made from several backbones; "
                        "compare those of one")
    for folder in cfg.bridges:
        if results[folder].get("visible", "full") == "full":
            raise UserError(f"{folder} holds no bridge that was trained with hidden tokens, so it "
                            "cannot write; train one with: python bridge.py --generate")
    return results


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, choose)
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    trained = check(cfg)
    first = trained[cfg.bridges[0]]
    weights = [backbone.identity(folder) for folder in trained]
    identity = {"base": first["base"], "weights": weights, "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        print(table(result))
        return result

    # 1. Text, the intact model, the token prior
    length = cfg.prefix + cfg.new
    backbone.read_config(first["model"], length)
    tokenizer = backbone.load_tokenizer(first["model"])
    _, held_out = data.splits(cfg, tokenizer, world, length - 1)
    texts = held_out.windows(2 * cfg.texts)[::2]        # the others are free to choose settings on
    texts = texts.to(world.device)                                              # (N, T)
    prompts = texts[:, :cfg.prefix]
    lm = backbone.load(first["model"], world.device, dtype)
    prior = token_prior(nearby(cfg.out, "data"), lm.V).to(world.device)
    cx = Context(cfg, prior, count_calls(cfg))
    run = Run(cfg, world, identity)
    real = measure(lm, texts, cfg.prefix)

    # 2. Write with every method
    rows = []
    for name, method in METHODS.items():
        for model, folder, detail in load(name, cfg, lm):
            write = partial(method, cx, model)
            points, written = frontier(write, lm, prompts, real["entropy"])
            training = trained.get(folder, {})
            row = {"method": name + detail, "calls": points[0]["calls"], "folder": folder,
                   "layer": training.get("layer"), "seed": training.get("seed"),
                   "frontier": points, "matched": at_entropy(points, real["entropy"]),
                   "tokens_per_s": tokens_per_second(write, prompts[:1], cfg.new),
                   "texts": tokenizer.batch_decode(written)}
            rows.append(row)
            run.say(f"{row['method']}: {len(points)} temperatures")

    # 3. Report
    result = {**identity, "rows": rows, "real": real}
    figure(result, run.out / "generation.png")
    print(table(result))
    return run.finish(result)


if __name__ == "__main__":
    main()
