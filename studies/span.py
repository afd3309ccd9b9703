"""span.py: where can diffusion win? Only where h[l] is no function of what is known: hide the tokens that follow.

    python -m studies.span                                          # layers 2 and 4, 3 seeds: ~8 min on 2 cores
    python -m studies.span --suffix 16 --out out/span_filled        # the same with visible text after the gap
    python -m studies.span --layers 2 --seeds 1 --steps 100 --texts 32 --out out/span_look      # a quick look

After P visible tokens come n hidden ones. A bridge gives states z of all positions; the retained blocks and the head,
which look back only, turn them into a law of every hidden token, p(x_i | z) = p_upper(x_i | h_hat[<i]). z never saw the
hidden tokens, so each of these is an honest prediction, and so is a mean over S drawn z_s. Compared, in nats:

    sampled states         -log (1/S) sum_s p(x_i | z_s)    the diffusion bridge
    mean state             -log p(x_i | E z)                the same network, steps and text by plain regression
    averaged first         -log p(x_i | (1/S) sum_s z_s)    the diffusion bridge's states, but their mean
    readout                both, by the bridge's token readout p(x_i | z_s[i]) instead

States from the true posterior give the intact model's own marginal of x_i, as "its own continuations" do. "tempered":
at the temperature that is best on texts apart (mere overconfidence?). "jointly": the gap as a whole. The log of a mean
of S is too low on average: S = 1, 4, 16 err against diffusion, less and less. x_P follows from visible tokens alone: a
control. Each bridge is an ordinary run of bridge.py below --out. Writes section.md and result.json to --out.

Letters: B batch, T = P + n tokens (and a suffix), n hidden ones, S states, V vocabulary, z the standardised h[l].
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.span\n")
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from core import backbone
from core.common import UserError, entry, parse, setup
from core.denoiser import load
from core.diffusion import sample
from core.draws import generator, normal
from core.masked import choose
from core.report import table
from core.run import Run
from core.stats import paired, plus_minus, verdict
from studies.ablate import execute, settled, stage


@dataclass
class Config:
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # its text
    out: str = "out/span"       # run folder, with the bridges in it
    layers: str = "2,4"         # where the bridges are
    seeds: int = 3              # training seeds
    steps: int = 400            # of each bridge, of either objective
    batch_size: int = 8         # sequences a step
    blocks: int = 2             # of every bridge
    prefix: int = 32            # P
    hidden: int = 16            # n
    suffix: int = 0             # visible tokens after the gap (0: what follows is all hidden, in training too)
    texts: int = 256            # held-out windows; every fourth one only chooses temperatures
    samples: int = 16           # S
    nfe: int = 8                # network calls a state
    margin: float = 0.01        # nats a token; "ties" needs the whole interval within it
    device: str = "auto"        # auto, cpu, cuda
    jobs: int = 2               # bridges at a time, one thread each
    seed: int = 0               # the first training seed, and of every draw
    MEASURES = ("prefix", "hidden", "texts", "samples", "nfe", "margin", "seeds", "layers")


HEATS = (1.0, 0.8, 1.25, 1.6, 2.0, 2.5)  # temperatures; the first is as it is
NAMES, AVERAGED = {"diffusion": "sampled states", "regression": "mean state"}, "sampled states, averaged first"
PAIRS = [("sampled states", "mean state", "tempered"), ("sampled states", "unigrams", "used"),  # deciding ones first
         ("sampled states", "unigrams", "tempered"), ("sampled states", "mean state", "used"),
         ("sampled states", "mean state", "jointly"), ("sampled states", AVERAGED, "used"),
         ("sampled states, readout", "mean state, readout", "used"), ("sampled states", "mean state, readout", "used"),
         ("sampled states", "mean state", "x_P")]                          # ours, theirs, the column compared


def cells(cfg):
    """(layer, seed, objective, folder, command) of every bridge."""
    how = f"--preset blocks --visible {'span' if cfg.suffix else 'prefix'} --blocks {cfg.blocks} --steps {cfg.steps}"
    how += f" --batch_size {cfg.batch_size} --nfe {cfg.nfe} --nfes {cfg.nfe} --eval_batches 64"
    for seed, layer, objective in itertools.product(
            range(cfg.seed, cfg.seed + cfg.seeds), cfg.layers.split(","), ("diffusion", "regression")):
        folder = Path(cfg.out) / f"cell_layer{layer}_{objective}_seed{seed}"
        flags = f"{how} --layer {layer} --objective {objective} --seed {seed}"
        yield int(layer), seed, objective, folder, stage("bridge", cfg.model, cfg.data, folder, flags)


# ---------------------------------------------------------------------------------------------------------- states
def states(net, info, lm, ids, unknown, cfg, first):
    """z (S, B, T, D) of a bridge: draws, or the one mean of a regression. ids are hidden from it where `unknown`."""
    c, shape = net.standard_c(lm.embed(ids), ids), (*ids.shape, net.settings["D"])
    how = {"sampler": info.get("sampler", "euler"), "shift": info.get("shift", 1.0), "unknown": unknown}
    draws = cfg.samples if net.settings["objective"] == "diffusion" else 1
    return torch.stack([sample(net, c, cfg.nfe, normal(shape, c.device, cfg.seed, "span", s, first), **how)
                        for s in range(draws)])


def decode(net, lm, layer, z, gap):
    """z (S, B, T, D) -> logits (S, B, n, V) of the tokens in the slice `gap`, by the retained blocks and the head."""
    h = net.hidden(z).flatten(0, 1).to(lm.model.dtype)                           # (S B, T, D)
    return lm.head(lm.through(h, layer, lm.L)[:, gap.start - 1:gap.stop - 1]).unflatten(0, z.shape[:2])


def continuations(lm, prompt, n, samples, seed, first):
    """Logits (S, B, n, V) of the n tokens after prompt (B, P), each after what the intact model has drawn."""
    ids, cache, out = prompt.repeat(samples, 1), None, []                              # (S B, P)
    u = torch.from_numpy(generator(seed, "span own", first).random((n, len(ids)))).to(prompt.device)
    for i in range(n):
        step = lm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = step.past_key_values, step.logits[:, -1].float()               # (S B, V)
        out.append(logits)
        ids = choose(logits.double(), 1.0, 1.0, u[i])[:, None]
    return torch.stack(out, 1).unflatten(0, (samples, len(prompt)))


# ------------------------------------------------------------------------------------------------------ likelihoods
def log_p(logits, target, heat=1.0):
    """log p of target (B, n) under logits (S, B, n, V) -> (S, B, n)."""
    logits = logits.float() / heat
    return logits.gather(-1, target.expand(len(logits), -1, -1)[..., None])[..., 0] - logits.logsumexp(-1)


def mixture(each, size):
    """log of the mean probability over `size` states: each (S, ...) -> (...). All S / size groups are used, and their
    logarithms averaged."""
    return (each.unflatten(0, (-1, size)).logsumexp(1) - math.log(size)).mean(0)


def summary(each):
    """each (heats, S, N, n) of one row of the table -> ({column: nats a token}, nats of each text). All but x_P are of
    the n - 1 tokens after it, on the texts that chose no temperature; "used" is the largest S as it is."""
    S, apart = each.shape[1], torch.arange(each.shape[2]) % 4 == 0                     # (N,)
    nats = -torch.stack([mixture(warm, S) for warm in each])                           # (heats, N, n)
    best, rest = nats[:, apart, 1:].mean((1, 2)).argmin(), each[0][:, ~apart, 1:]
    columns = {**{f"S = {s}": -mixture(rest, s).mean() for s in (1, 4, 16, 64) if S % s == 0},
               "used": nats[0, ~apart, 1:].mean(), "tempered": nats[best, ~apart, 1:].mean(),
               "jointly": -mixture(rest.sum(-1), S).mean() / rest.shape[-1], "x_P": nats[0, ~apart, 0].mean()}
    return {name: value.item() for name, value in columns.items()}, nats[0, ~apart, 1:].mean(1).tolist()


@torch.no_grad()
def measure(cfg, lm, bridges, rows, unigram):
    """{row of the table: each (heats, S, N, n)} on rows (N, T), by {objective: (net, info)} of one layer and seed, or
    without any bridge by the bounds."""
    gap, out = slice(cfg.prefix, cfg.prefix + cfg.hidden), {}
    for first in range(0, len(rows), size := max(1, min(16, 2 ** 26 // (cfg.samples * cfg.hidden * lm.V)))):
        ids, found = rows[first:first + size], {}
        unknown = torch.zeros_like(ids, dtype=torch.bool)
        unknown[:, gap] = True
        if not bridges:
            true = lm.through(lm.embed(ids), 0, lm.L)[None]                            # (1, B, T, D)
            found["intact model, true tokens"] = lm.head(true[:, :, gap.start - 1:gap.stop - 1])
            found["intact model, its own continuations"] = continuations(
                lm, ids[:, :cfg.prefix], cfg.hidden, cfg.samples, cfg.seed, first)
            found["unigrams"] = unigram.expand(1, len(ids), cfg.hidden, -1)
        for objective, (net, info) in bridges.items():
            z, name = states(net, info, lm, ids, unknown, cfg, first), NAMES[objective]
            found[name] = decode(net, lm, info["layer"], z, gap)
            if objective == "diffusion":
                found[AVERAGED] = decode(net, lm, info["layer"], z.mean(0, keepdim=True), gap)
            found[f"{name}, readout"] = net.readout(z[:, :, gap])
        for name, logits in found.items():
            each = torch.stack([log_p(logits, ids[:, gap], heat) for heat in HEATS]).cpu()
            out.setdefault(name, []).append(each)
    return {name: torch.cat(parts, 2) for name, parts in out.items()}


# ------------------------------------------------------------------------------------------------------------ tables
def compare(rows, margin):
    """[layer, ours, theirs, column, verdict over seeds, verdict over texts (means over seeds)] for all PAIRS."""
    out, by = [], {(row["layer"], row["name"]): row for row in rows}
    for layer in dict.fromkeys(row["layer"] for row in rows if row["layer"] is not None):
        for ours, theirs, column in PAIRS:
            one, other = by[layer, ours], by.get((layer, theirs)) or by[None, theirs]      # the latter has no seeds
            mine, rival = one["values"][column], other["values"].get(column, other["values"]["used"])
            seeds = paired(mine, rival if len(rival) == len(mine) else rival * len(mine))
            texts = paired(*([sum(t) / len(t) for t in zip(*row["texts"])] for row in (one, other)))
            out.append([layer, ours, theirs, column, verdict(seeds, margin, "nats"),
                        verdict(texts, margin, "nats", "texts") if column == "used" else None])
    return out


def section(result):
    """The study as Markdown."""
    how, rows = result["measured"], result["rows"]
    columns = [c for c in max((row["values"] for row in rows), key=len) if c != "used"]    # a mean has no S = 16
    return f"""## Where diffusion can win: tokens that are hidden

The {how["hidden"]} tokens after {how["prefix"]} visible ones are hidden. A bridge of {result["blocks"]} blocks
({result["steps"]} steps of {result["batch_size"]} sequences, {how["seeds"]} training seeds from {result["seed"]}) gives
the states of all positions, the retained blocks and the head the law of every hidden token. Nats a token, mean +- sd
over seeds, on {result["judged"]} held-out texts: by S drawn states, {how["nfe"]} network calls each; "tempered" and
"jointly" (the gap as a whole) by the largest S; "x_P", the first hidden token, follows from visible tokens alone.

""" + table(["layer", "states", *columns], [
        [row["layer"], row["name"], *(plus_minus(row["values"][c], ".3f") if c in row["values"] else None
                                      for c in columns)] for row in rows]) + f"""

"ties": the whole interval within {how["margin"]:g} nats. "used": the largest S, as it is.

""" + table(["layer", "ours", "against", "by", "over seeds", "over texts"], result["verdicts"]) + "\n"


def headline(cfg, verdicts):
    """For the README: sampled states against regression's mean, at most two layers; both at their best temperature,
    since a law that is too sure of itself gains from any averaging."""
    what = f"{cfg.samples} sampled states against regression's mean, both tempered, {cfg.seeds} seeds"
    return [[f"{cfg.hidden} hidden tokens, layer {layer}: {what}", words.split(" (")[0]]
            for layer, *pair, words, _ in verdicts if tuple(pair) == PAIRS[0]][:2]


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    work = list(cells(cfg)) if all(layer.isdigit() for layer in cfg.layers.split(",")) else []
    if not work or cfg.hidden < 2 or cfg.texts < 8:
        raise UserError("--layers must be numbers such as 2,4, --hidden at least 2 and --texts at least 8")
    world, model = setup(cfg.device), backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model)}

    def make():
        shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
        T = cfg.prefix + cfg.hidden + cfg.suffix
        rows = data.Tokens(shards, "val", T - 1).windows(cfg.texts).to(world.device)           # (N, T)
        backbone.read_config(model, T)
        run = Run(cfg, world, identity)
        execute([(f"{what}, layer {layer}, seed {seed}", command) for layer, seed, what, _, command in work], cfg.jobs)
        lm = backbone.load(model, world.device, torch.float32)
        train = data.Tokens(shards, "train", T).windows(4096).flatten()
        unigram = (torch.bincount(train, minlength=lm.V) + 1.0).log().to(world.device)         # (V,)
        found, pairs = {}, {(None, None): {}}                                                  # the bounds: no bridge
        for layer, seed, what, folder, _ in work:
            pairs.setdefault((layer, seed), {})[what] = load(folder, world.device)
        for (layer, seed), bridges in pairs.items():
            for name, each in measure(cfg, lm, bridges, rows, unigram).items():
                values, texts = summary(each)
                row = found.setdefault((layer, name), {"layer": layer, "name": name, "values": {}, "texts": []})
                row["texts"].append(texts)
                for column, value in values.items():
                    row["values"].setdefault(column, []).append(value)
            run.say(f"layer {layer}, seed {seed}: measured")
        verdicts = compare(list(found.values()), cfg.margin)
        return run, {"judged": len(rows) - (len(rows) + 3) // 4, "rows": list(found.values()), "verdicts": verdicts,
                     "headline": headline(cfg, verdicts), "findings": [
                         f"{cfg.hidden} hidden tokens, layer {layer}, {by}: {ours} against {theirs}: {words}"
                         for layer, ours, theirs, by, words, _ in verdicts if by != "x_P"], **{
                         name: getattr(cfg, name) for name in ("suffix", "blocks", "steps", "batch_size", "seed")}}
    return settled(cfg, identity, {k: getattr(cfg, k) for k in cfg.MEASURES}, section, make)


if __name__ == "__main__":
    main()
