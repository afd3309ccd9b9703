"""interfaces.py: at equal budget, what should diffusion produce? A hidden state, an embedding, a latent, a simplex.

    python -m studies.interfaces                     # the toy, six targets, 3 seeds: ~15 min on 2 cores
    python -m studies.interfaces --kinds hidden,embedding --seeds 1 --steps 50 --out out/interfaces_look    # a look
    python -m studies.interfaces --layer 4 --out out/interfaces4

Every target (--help lists them) predicts the next token from the same context with the same denoiser, optimizer,
batches and steps; its likelihood is the mean over --draws noises. `hidden` has the retained blocks for free, and so has
`bottleneck`; `causal` shows what the same network and steps buy without. Only a gap to what a reader makes of true
targets is diffusion's own. All learn by squared error; published simplex models by cross-entropy. Writes section.md
and result.json to --out; each cell is kept as soon as it is finished.

Letters: B batch, T tokens, D width of the backbone, V vocabulary, d width of what is diffused.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.interfaces\n")
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data
from core import backbone, masked, metrics, optim, report
from core.common import UserError, entry, parse, pick, setup
from core.denoiser import Bridge
from core.diffusion import position_noise, regress, sample, times, token_loss
from core.draws import generator, normal
from core.run import Run, finished, read_json, write_json
from core.stats import paired, plus_minus, verdict


@dataclass
class Config:
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/interfaces"  # run folder
    kinds: str = ""             # which targets, such as hidden,causal (empty: all)
    layer: int = 0              # of `hidden` (0: the one that geometry.py chose beside --out)
    seeds: int = 3              # training seeds
    seed: int = 0               # the first one
    steps: int = 300            # optimizer steps
    batch_size: int = 8         # sequences a step
    seq_len: int = 128          # tokens a sequence
    blocks: int = 4             # of the denoiser, whose width is the backbone's
    latent: int = 32            # dimensions of `latent` and `bottleneck`
    lr: float = 0.02            # Muon
    lr_adam: float = 2e-3       # AdamW
    nfe: int = 4                # network calls of a draw
    draws: int = 16             # noises over which a likelihood is averaged
    windows: int = 128          # held-out sequences of the likelihood
    MEASURES = ("kinds", "seeds")  # which cells; the others stay valid


SKIP, MARGIN = 4, 0.01  # first positions: attention sinks, as in bridge.py; nats within which two targets are tied
WIDTHS = (1e-3, 1e-2, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 1e2, 1e4)


# ----------------------------------------------------------------------------------------------------- the targets
class Target(NamedTuple):
    """What a function of TARGETS makes. One without `target` is learned by cross-entropy."""
    d: int
    recovery: str                    # what reading costs
    target: Callable = None          # ids (B, T + 1) -> z (B, T, d)
    read: Callable = None            # estimate of z (B, T, d), width -> logits (B, T, V)
    widths: tuple = ()               # of which the reader's free number is fitted, on 8 training windows
    of_next: bool = False            # z is the next token's own: true targets are drawn from the intact model's law


def hidden(lm, layer, rows, latent):
    """h[l] of the last token; read by the retained blocks and the head (they are given, pretrained)"""
    mean, sd = standard(state(lm, rows, layer)[:, SKIP:])
    return Target(lm.D, retained(lm, layer), lambda ids: (state(lm, ids[:, :-1], layer) - mean) / sd,
                  lambda z, width: lm.head(lm.through(z * sd + mean, layer, lm.L)))


def embedding(lm, layer, rows, latent):
    """the next token's embedding; read by Bayes' rule: a Gaussian of fitted width, unigrams as the prior"""
    table, prior = lm.model.get_input_embeddings().weight, unigrams(lm, rows)             # (V, D), (V,)
    mean, sd = standard(table[rows])
    table = (table - mean) / sd
    return Target(lm.D, "the embedding table, a fitted width, unigrams", lambda ids: table[ids[:, 1:]],
                  lambda z, width: prior.log() - torch.cdist(z, table[None]).square() / (2 * width ** 2), WIDTHS, True)


def latent(lm, layer, rows, latent):
    """the last state in a few dimensions (its principal components, in closed form); read by the head"""
    return components(latent, rows, lambda ids: lm.norm(state(lm, ids, lm.L)), lm.unnormed_head, "the head")


def bottleneck(lm, layer, rows, latent):
    """h[l] in as few dimensions; read like `hidden`: a latent that gets the same retained blocks"""
    return components(latent, rows, lambda ids: state(lm, ids, layer),
                      lambda h: lm.head(lm.through(h, layer, lm.L)), retained(lm, layer))


def simplex(lm, layer, rows, latent):
    """+-1 for every token of the vocabulary; (z + 1)/2 is read as its law, mixed with unigrams (fitted share)"""
    prior = unigrams(lm, rows)
    return Target(lm.V, "unigrams, their share fitted", lambda ids: 2.0 * F.one_hot(ids[:, 1:], lm.V) - 1,
                  lambda z, width: ((z + 1) / 2).clamp_min(0).add(width * prior).log(), WIDTHS, True)


def causal(lm, layer, rows, latent):
    """no diffusion: the same network and an output matrix, trained on next-token cross-entropy"""
    return Target(lm.D, "its own output matrix, trained")


TARGETS = {  # name -> function of (lm, layer, training windows (N, T), dimensions of a latent)
    "hidden": hidden, "embedding": embedding, "latent": latent, "bottleneck": bottleneck, "simplex": simplex,
    "causal": causal}


def state(lm, ids, layer):
    return lm.through(lm.embed(ids), 0, layer)                                            # (B, T, D)


def standard(h):
    """Mean and standard deviation per channel of (..., D)."""
    flat = h.flatten(0, -2)
    return flat.mean(0), flat.std(0).clamp_min(1e-4)


def unigrams(lm, rows):
    count = torch.bincount(rows.flatten(), minlength=lm.V) + 1.0
    return (count / count.sum()).to(rows.device)                                          # (V,)


def retained(lm, layer):
    given = sum(p.numel() for block in lm.blocks[layer:] for p in block.parameters())
    return f"{given:,} pretrained parameters of the retained blocks, not trained, and the head"


def components(d, rows, of, decode, reader):
    """A Target: the first d principal components of `of` (ids -> states), which `decode` turns into logits."""
    h = of(rows).flatten(0, 1).double()                                                   # (n, D)
    mean = h.mean(0)
    _, values, basis = torch.linalg.svd(h - mean, full_matrices=False)
    basis, scale = basis[:d].T, values[:d] / len(h) ** 0.5                                # (D, d), (d,)
    return Target(d, f"{d} principal components, in closed form from {len(rows)} training windows, and {reader}",
                  lambda ids: ((of(ids[:, :-1]).double() - mean) @ basis / scale).float(),
                  lambda z, width: decode(((z.double() * scale) @ basis.T + mean).float()))


# ------------------------------------------------------------------------------------------------- train, measure
class Way:
    """A target and what all have in common: condition, network, loss, and the law of the next token."""

    def __init__(self, kind, lm, layer, rows, latent):
        self.lm, self.goal, self.width = lm, TARGETS[kind](lm, layer, rows, latent), 1.0
        self.d, self.diffuses, self.c = self.goal.d, self.goal.target is not None, standard(lm.embed(rows)[:, SKIP:])

    def condition(self, ids):
        return (self.lm.embed(ids) - self.c[0]) / self.c[1]                               # (B, T, D)

    def network(self, blocks):
        net = Bridge(self.d, self.lm.D, blocks, max(1, self.lm.D // 32), "diffusion" if self.diffuses else "regression",
                     C=self.lm.D)
        net.output = None if self.diffuses else nn.Linear(self.d, self.lm.V, bias=False)
        return net

    def loss(self, net, ids, t, noise):
        """ids (B, T + 1), t (B,), noise (B, T, d); the first positions are scaled by their own size, or left out."""
        if not self.diffuses:
            return -right(self.law(net, ids[:, :-1], 1, noise), ids).mean()
        return token_loss(net, self.goal.target(ids), self.condition(ids[:, :-1]), t, noise, SKIP)[0].mean()

    def read(self, z):
        return self.goal.read(z, self.width).float().log_softmax(-1)                      # (B, T, V)

    def law(self, net, ids, nfe, noise):
        """log p of the next token after every prefix of ids (B, T), for one noise (T, d) or (B, T, d): (B, T, V)."""
        if self.diffuses:
            return self.read(sample(net, self.condition(ids), nfe, noise))
        return net.output(regress(net, self.condition(ids))).log_softmax(-1)


def train(way, net, rows, cfg, seed):
    """Train in place: 1 batch, noise levels and noise by their keys  2 loss  3 clip, step. Returns seconds."""
    optimizers = optim.build(net.named_parameters(), cfg.lr, cfg.lr_adam, 0.01)
    start, params, slots = time.perf_counter(), list(net.parameters()), list(range(cfg.batch_size))
    for step in range(cfg.steps):
        ids = rows.batch(seed, step, slots, cfg.batch_size).to(params[0].device)          # (B, T + 1)
        t = times("logit-normal", 0.0, seed, step, slots).to(ids.device)
        noise = torch.stack([normal((cfg.seq_len, way.d), ids.device, seed, "noise", step, s) for s in slots])
        way.loss(net, ids, t, noise).backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0).item()
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, 20), norm, f"step {step}")
    return time.perf_counter() - start


def sum_nll(each):
    """Log-probabilities of the right tokens (draws, B, T) -> sum over B and T of -log of their mean over draws."""
    return -(each.logsumexp(0) - math.log(len(each))).sum().item()


def right(logp, ids):
    """logp (B, T, V), ids (B, T + 1) -> that of the next tokens, without the first positions: (B, T - SKIP)."""
    return logp.gather(-1, ids[:, 1:, None])[:, SKIP:, 0]


@torch.no_grad()
def next_token_nll(way, net, rows, cfg):
    """Mean -log of the next token's probability, averaged over all draws, on rows (N, T + 1), nats."""
    noises = [position_noise(s, range(rows.shape[1] - 1), way.d, rows.device)
              for s in range(cfg.draws if way.diffuses else 1)]
    total = sum(sum_nll(torch.stack([right(way.law(net, ids[:, :-1], cfg.nfe, noise), ids) for noise in noises]))
                for ids in rows.split(8))
    return total / rows[:, 1 + SKIP:].numel()


def ceiling(way, rows, draws, seed):
    """The same number for a perfect denoiser, whose samples are true targets; those of the next token itself are drawn
    from the intact model's law, `draws` times. None where nothing is diffused."""
    if not way.diffuses:
        return None
    total = 0.0
    for number, ids in enumerate(rows.split(8)):
        goals = [ids]
        if way.goal.of_next:
            p = way.lm.head(way.lm.through(way.lm.embed(ids[:, :-1]), 0, way.lm.L)).double().log_softmax(-1)
            u = torch.from_numpy(generator(seed, "ceiling", number).random((draws, *p.shape[:2]))).to(ids.device)
            goals = [torch.cat([ids[:, :1], masked.choose(p, 1.0, 1.0, some)], 1) for some in u]
        total += sum_nll(torch.stack([right(way.read(way.goal.target(g)), ids) for g in goals]))
    return total / rows[:, 1 + SKIP:].numel()


def fit_width(way, net, rows, cfg):
    """The width that makes training windows `rows` most likely, by as many draws as the held-out ones."""
    c, found = way.condition(rows[:, :-1]), {}
    zs = [sample(net, c, cfg.nfe, position_noise(s, range(c.shape[1]), way.d, rows.device)) for s in range(cfg.draws)]
    for width in way.goal.widths:
        way.width = width
        found[width] = sum_nll(torch.stack([right(way.read(z), rows) for z in zs]))
    way.width = min(found, key=found.get)


def cell(kind, seed, lm, layer, train_rows, held_out, cfg):
    """One target and one seed: trained and measured."""
    torch.manual_seed(seed)
    way = Way(kind, lm, layer, train_rows.windows(64, seed)[:, :-1].to(held_out.device), cfg.latent)
    net = way.network(cfg.blocks).to(held_out.device)
    seconds = train(way, net, train_rows, cfg, seed)
    net.eval()
    if way.goal.widths:
        fit_width(way, net, train_rows.windows(8, seed + 1).to(held_out.device), cfg)
    return {"kind": kind, "seed": seed, "seconds": seconds, "parameters": sum(p.numel() for p in net.parameters()),
            "d": way.d, "nll": next_token_nll(way, net, held_out, cfg), "width": way.width,
            "recovery": way.goal.recovery, "ceiling": ceiling(way, held_out, cfg.draws, seed)}


# --------------------------------------------------------------------------------------------------------- report
def by_kind(cells):
    """kind -> its cells, one a seed, in the order of the result."""
    return {kind: [c for c in cells if c["kind"] == kind] for kind in dict.fromkeys(c["kind"] for c in cells)}


def verdicts(groups):
    """The first target against each other one, and each against `causal`, the control; paired by training seed."""
    for (one, ours), (other, theirs) in itertools.combinations(groups.items(), 2):
        both = [(a["nll"], b["nll"]) for a, b in itertools.product(ours, theirs) if a["seed"] == b["seed"]]
        if both and (one == next(iter(groups)) or other == "causal"):
            yield f"next token, {one} against {other}: {verdict(paired(*zip(*both)), MARGIN, 'nats')}"


def section(result):
    """The section of the report: a pure function of result.json."""
    groups, rows = by_kind(result["cells"]), []
    for kind, group in groups.items():
        ceilings = [c["ceiling"] for c in group]
        rows.append([kind, group[0]["d"], f"{group[0]['parameters']:,}", plus_minus([c["nll"] for c in group], ".3f"),
                     None if None in ceilings else plus_minus(ceilings, ".3f"),
                     plus_minus([c["seconds"] for c in group], ".0f"), group[0]["recovery"]])
    return "\n".join([
        "## Interfaces at equal budget", "",
        f"Hidden states of layer {result['layer']}; {result['steps']} steps of {result['batch_size']} x "
        f"{result['seq_len']} tokens, NFE {result['nfe']}, {result['draws']} draws, {result['windows']} held-out "
        f"windows, {max(map(len, groups.values()))} seeds from {result['seed']}, mean +- sd. The intact "
        f"model: {result['intact']:.3f} nats, unigrams {result['unigram']:.3f}. Ties: within {MARGIN:g} nats.", "",
        report.table(["what is diffused", "d", "trained parameters", "next-token NLL", "with true targets",
                      "train (s)", "read by"], rows), "", *(f"- {line}." for line in verdicts(groups)), ""])


@entry
def main(argv):
    targets = "\n".join(f"    {name:<11} {way.__doc__}" for name, way in TARGETS.items())
    cfg = parse(Config, argv, f"{__doc__}\nTargets:\n{targets}")
    kinds = cfg.kinds.split(",") if cfg.kinds else list(TARGETS)
    for kind in kinds:
        pick(TARGETS, kind, "--kinds")
    world, model = setup("cpu"), backbone.resolve(cfg.model, cfg.out)
    layer = cfg.layer or read_json(Path(cfg.out).parent / "geometry" / "result.json",
                                   "run python geometry.py first, or pass --layer N")["best_layer"]
    identity = {"base": backbone.identity(model), "layer_number": layer}
    result = finished(cfg, identity, quiet=True)
    wanted = list(itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), kinds))
    known = [(c["seed"], c["kind"]) for c in result["cells"]] if result else []
    if result and set(wanted) <= set(known):                               # else there is a new target, or a new seed
        print(section(result))
        return result
    shape = backbone.read_config(model, cfg.seq_len)
    if not 1 <= layer <= shape.num_hidden_layers or cfg.latent > shape.hidden_size:
        raise UserError(f"--layer {layer} must lie in 1..{shape.num_hidden_layers} and --latent {cfg.latent} in "
                        f"1..{shape.hidden_size}")
    lm = backbone.load(model, world.device, torch.float32)
    shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
    train_rows = data.Tokens(shards, "train", cfg.seq_len)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.windows).to(world.device)            # (N, T + 1)
    run = Run(cfg, world, identity)
    cells = []
    for seed, kind in dict.fromkeys([*known, *wanted]):
        file = run.out / f"{kind}_seed{seed}.json"
        if not file.exists():
            write_json(file, cell(kind, seed, lm, layer, train_rows, held_out, cfg))
        cells.append(read_json(file))
        run.say(f"{kind}, seed {seed}: next-token NLL {cells[-1]['nll']:.3f} ({cells[-1]['seconds']:.0f} s)")

    count = torch.bincount(train_rows.windows(512).flatten(), minlength=lm.V).double() + 1
    mean = {kind: sum(c["nll"] for c in group) / len(group) for kind, group in by_kind(cells).items()}
    result = {**identity, "cells": cells, "layer": layer, "seed": cfg.seed, "windows": len(held_out),
              "findings": list(verdicts(by_kind(cells))),
              "intact": metrics.judge(lm, held_out, 1 + SKIP).mean().item(),
              "unigram": -(count / count.sum()).log()[held_out[:, 1 + SKIP:].cpu()].mean().item(),
              **{k: getattr(cfg, k) for k in ("steps", "batch_size", "seq_len", "nfe", "draws")},
              "headline": [["next token by what is diffused, nats", ", ".join(
                  f"{kind} {mean[kind]:.2f}" for kind in sorted(mean, key=mean.get)[:3])]]}
    run.finish(result, section(result))
    print(section(result))
    return run.result


if __name__ == "__main__":
    main()
