"""INTERFACES: what should diffusion produce? A hidden state, an embedding, a latent, a simplex.

    python -m studies.interfaces                        # the toy, six targets, 3 seeds: 15 minutes
    python -m studies.interfaces --kinds hidden causal --seeds 1 --steps 50 --out out/look
    python -m studies.interfaces --layer 4 --out out/interfaces4

Every target predicts the next token from the same context, with the same network, optimizer, text
and steps. The likelihood of a token is its mean probability over 16 noises. `hidden` and
`bottleneck` get the pretrained upper blocks for free. `causal` shows what the same network and
steps are worth without diffusion. "True targets" is the NLL of a perfect denoiser, so only the gap
to it is due to diffusion. For `hidden` it is the intact model's NLL. All targets are learned by
squared error; published simplex models use cross-entropy. A new target is one function and one line
of TARGETS.

Writes result.json, and a file for every target and seed as soon as it is finished.

Shapes: B batch, T tokens, D width of the backbone, V vocabulary, d width of the target, n states.
"""
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

import bridge
import data
from core import backbone, optim, report
from core.common import entry, normal, parse, pick, setup
from core.diffusion import (Bridge, BridgeConfig, bridge_loss, noise_levels, position_noise,
                            regress, sample)
from core.run import Run, finished, read_json, write_json


@dataclass
class Config:
    # model, text, output
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/interfaces"  # run folder
    kinds: tuple[str, ...] = ()  # names of TARGETS (none: all)
    layer: str = "auto"         # of hidden and bottleneck; auto: the choice of geometry.py
    seeds: int = 3              # training seeds: 0, 1, ...
    steps: int = 300            # optimizer steps
    nfe: int = 4                # network calls a sample


SEQ_LEN = 128           # tokens of a sequence
BATCH_SIZE = 8          # sequences a step
WINDOWS = 128           # held-out sequences
SAMPLES = 16            # noises over which a likelihood is averaged
SKIP = 4                # first positions: attention sinks, as in bridge.py
DEPTH = 4               # blocks of the network; its width is the backbone's
LATENT = 32             # dimensions of `latent` and `bottleneck`
WIDTHS = [2.0 ** i for i in range(-10, 14)]


# -------------------------------------------------------------------------------------------------
# The targets

@dataclass
class Target:
    """A vector to diffuse, and the function that turns it into a distribution of the next token."""
    d: int                      # its width
    make: Callable = None       # ids (B, T + 1) -> z (B, T, d); None: nothing is diffused
    read: Callable = None       # (z (B, T, d), width) -> logits (B, T, V)
    of_next: bool = False       # z is the next token's own; the reader's width is then fitted


def moments(h):
    """Mean and standard deviation per channel of h (B, T, D)."""
    flat = h.flatten(0, 1)
    return flat.mean(0), flat.std(0).clamp_min(1e-4)


def unigrams(lm, rows):
    """Share (V,) of every token in rows."""
    count = torch.bincount(rows.flatten(), minlength=lm.V) + 1.0
    return count / count.sum()


def hidden(lm, layer, rows):
    """h[l] of the last token, read by the pretrained upper blocks"""
    mean, sd = moments(lm.hidden(rows, layer)[:, SKIP:])
    return Target(
        d=lm.D,
        make=lambda ids: (lm.hidden(ids[:, :-1], layer) - mean) / sd,
        read=lambda z, width: lm.head(lm.through(z * sd + mean, layer, lm.L)))


def embedding(lm, layer, rows):
    """the next token's embedding, read by Bayes' rule: a Gaussian of fitted width, and unigrams"""
    table = lm.model.get_input_embeddings().weight                              # (V, D)
    mean, sd = moments(table[rows])
    table = (table - mean) / sd
    prior = unigrams(lm, rows).log()
    return Target(
        d=lm.D, of_next=True,
        make=lambda ids: table[ids[:, 1:]],
        read=lambda z, width: prior - torch.cdist(z, table[None]).square() / (2 * width ** 2))


def components(rows, states, decode):
    """The first principal components of `states` (ids -> h). `decode` turns h into logits."""
    h = states(rows).flatten(0, 1).double()                                     # (n, D)
    mean = h.mean(0)
    _, values, basis = torch.linalg.svd(h - mean, full_matrices=False)
    basis = basis[:LATENT]                                                      # (d, D)
    scale = values[:LATENT] / len(h) ** 0.5                                     # (d,)
    return Target(
        d=len(basis),
        make=lambda ids: ((states(ids[:, :-1]).double() - mean) @ basis.T / scale).float(),
        read=lambda z, width: decode(((z.double() * scale) @ basis + mean).float()))


def latent(lm, layer, rows):
    """the last state in a few dimensions, read by the head"""
    return components(rows, lambda ids: lm.norm(lm.hidden(ids, lm.L)), lm.unnormed_head)


def bottleneck(lm, layer, rows):
    """h[l] in a few dimensions, read by the pretrained upper blocks"""
    return components(rows, lambda ids: lm.hidden(ids, layer),
                      lambda h: lm.head(lm.through(h, layer, lm.L)))


def simplex(lm, layer, rows):
    """+-1 for every token, read as a distribution that is mixed with unigrams (fitted share)"""
    prior = unigrams(lm, rows)
    return Target(
        d=lm.V, of_next=True,
        make=lambda ids: 2.0 * F.one_hot(ids[:, 1:], lm.V) - 1,
        read=lambda z, width: ((z + 1) / 2).clamp_min(0).add(width * prior).log())


def causal(lm, layer, rows):
    """no diffusion: the same network with an output matrix, trained by cross-entropy"""
    return Target(d=lm.D)


TARGETS = {"hidden": hidden, "embedding": embedding, "latent": latent, "bottleneck": bottleneck,
           "simplex": simplex, "causal": causal}


# -------------------------------------------------------------------------------------------------
# Train and measure one target

class Predictor(Bridge):
    """The network of a bridge, with a target as z and the text's h[0] as the condition."""

    def __init__(self, lm, target, rows):
        super().__init__(BridgeConfig(D=target.d, W=lm.D, depth=DEPTH, H=max(1, lm.D // 32)))
        self.enter = nn.Linear(target.d + lm.D, lm.D)
        self.mu_c, self.sigma_c = moments(lm.embed(rows)[:, SKIP:])
        self.embed = lm.embed
        self.target = target
        self.width = 1.0
        if target.make is None:
            self.output = nn.Linear(lm.D, lm.V, bias=False)

    def read(self, z):
        """z (B, T, d) -> log p (B, T, V) of the next token."""
        return self.target.read(z, self.width).float().log_softmax(-1)

    def predict(self, ids, nfe, noise):
        """log p (B, T, V) of the next token after every prefix of ids (B, T + 1), for one noise."""
        c = self.condition(self.embed(ids[:, :-1]), ids)
        if self.target.make is None:
            return self.output(regress(self, c)).log_softmax(-1)
        return self.read(sample(self, c, nfe, noise))

    def loss(self, ids, t, noise):
        """ids (B, T + 1), t (B,), noise (B, T, d)."""
        if self.target.make is None:
            return -right(self.predict(ids, 1, noise), ids).mean()
        c = self.condition(self.embed(ids[:, :-1]), ids)
        error, _ = bridge_loss(self, self.target.make(ids), c, t, noise, SKIP)
        return error.mean()


def train(predictor, tokens, cfg, seed, device):
    optimizers = optim.build(predictor.named_parameters(), lr=0.02, lr_adam=2e-3, weight_decay=0.01)
    slots = range(BATCH_SIZE)
    shape = (BATCH_SIZE, SEQ_LEN, predictor.target.d)
    for step in range(cfg.steps):
        # 1. A batch, noise levels and noise: functions of (seed, step)
        ids = tokens.batch(seed, step, slots, BATCH_SIZE)                       # (B, T + 1)
        t = noise_levels(seed, step, slots)
        noise = normal(shape, device, seed, "noise", step)
        # 2. Loss, clip, step
        predictor.loss(ids.to(device), t.to(device), noise).backward()
        norm = nn.utils.clip_grad_norm_(predictor.parameters(), 1.0).item()
        share = optim.share_at(step, cfg.steps, warmup=20)
        optim.step_all(optimizers, share, norm, f"step {step}")


def right(logp, ids):
    """log p (B, T - SKIP) of the true next tokens, from logp (B, T, V) and ids (B, T + 1)."""
    return logp.gather(-1, ids[:, 1:, None])[:, SKIP:, 0]


@torch.no_grad()
def mean_nll(rows, predict):
    """-log of the next token's probability in nats, averaged over rows (N, T + 1).

    predict(ids) gives several log p (B, T, V): their probabilities are averaged."""
    losses = []
    for ids in rows.split(8):
        logp = torch.stack([right(logp, ids) for logp in predict(ids)])         # (samples, B, T)
        losses.append(math.log(len(logp)) - logp.logsumexp(0))
    return torch.cat(losses).mean().item()


def run_cell(kind, seed, lm, layer, tokens, held_out, cfg):
    """Train and measure one target with one seed."""
    device = held_out.device
    torch.manual_seed(seed)
    rows = tokens.windows(64, seed)[:, :-1].to(device)
    target = TARGETS[kind](lm, layer, rows)
    predictor = Predictor(lm, target, rows).to(device)
    train(predictor, tokens, cfg, seed, device)
    noises = [position_noise(i, range(SEQ_LEN), target.d, device) for i in range(SAMPLES)]

    def predictions(ids):
        return (predictor.predict(ids, cfg.nfe, noise) for noise in noises)

    if target.of_next:                                  # the width that suits training text best
        few = tokens.windows(8, seed + 1).to(device)

        def loss(width):
            predictor.width = width
            return mean_nll(few, predictions)
        predictor.width = min(WIDTHS, key=loss)
    cell = {"kind": kind, "seed": seed, "d": target.d,
            "nll": mean_nll(held_out, predictions), "true_targets": None}
    if target.make and not target.of_next:
        cell["true_targets"] = mean_nll(held_out, lambda ids: [predictor.read(target.make(ids))])
    return cell


# -------------------------------------------------------------------------------------------------
# Table, main

def show(result):
    """A row a target: mean +- sd over seeds, and the paired difference to the control."""
    nlls = defaultdict(list)                            # {kind: numbers, one a seed}
    for cell in result["cells"]:
        nlls[cell["kind"]].append(cell["nll"])
    rows = []
    control = nlls.get("causal")                        # None: it was left out
    for cell in result["cells"][:len(nlls)]:            # those of the first seed
        nll = nlls[cell["kind"]]
        words = control and report.verdict(report.paired(nll, control), margin=0.01, unit="nats")
        rows.append([cell["kind"], cell["d"], report.plus_minus(nll, ".3f"), cell["true_targets"],
                     words])
    print(report.table(["target", "d", "NLL", "true targets", "compared with causal"], rows))


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    kinds = list(dict.fromkeys(cfg.kinds or TARGETS))   # a target counts once
    for kind in kinds:
        pick(TARGETS, kind, "--kinds")
    world = setup()
    model = backbone.resolve(cfg.model, cfg.out)
    L = backbone.read_config(model, SEQ_LEN).num_hidden_layers
    layer = bridge.choose_layer(bridge.Config(layer=cfg.layer, out=cfg.out), L)
    identity = {"base": backbone.identity(model), "layer_number": layer,
                "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result

    lm = backbone.load(model, world.device, torch.float32)
    tokens, held_out = data.splits(cfg, backbone.load_tokenizer(model), world, SEQ_LEN)
    held_out = held_out.windows(WINDOWS).to(world.device)
    run = Run(cfg, world, identity)
    cells = []
    for seed, kind in product(range(cfg.seeds), kinds):
        file = run.out / f"{kind}_seed{seed}.json"
        if not file.exists():
            write_json(file, run_cell(kind, seed, lm, layer, tokens, held_out, cfg))
        cells.append(read_json(file))
        run.say(f"{kind}, seed {seed}: {cells[-1]['nll']:.3f} nats")
    result = {**identity, "cells": cells}
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
