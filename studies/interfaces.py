"""interfaces.py: at equal budget, what should diffusion produce? A hidden state, an embedding, a latent, a simplex.

    python interfaces.py                             # the toy, six ways, 3 seeds: ~12 min on 2 cores
    python interfaces.py --kinds hidden,embedding --seeds 1 --steps 50       # a quick look
    python interfaces.py --layer 4 --out out/interfaces4

Every way predicts the next token from the same context with the same denoiser, optimizer, batches and steps:

    hidden      h[l] of the last token; read by the retained blocks and the head (they are given, pretrained)
    embedding   the next token's embedding; read by Bayes' rule: a Gaussian of fitted width, unigrams as the prior
    latent      the last state in a few dimensions (its principal components, in closed form); read by the head
    bottleneck  h[l] in as few dimensions; read like `hidden`: a latent that gets the same retained blocks
    simplex     +-1 for every token of the vocabulary; (z + 1)/2 is read as its law, mixed with unigrams (fitted share)
    causal      no diffusion: the same network and an output matrix, trained on next-token cross-entropy

The likelihood of a token is its mean probability over --draws noises. Hidden has the retained blocks for free, so it is
no fair winner: `bottleneck` has them too, and `causal` shows what the same network and steps buy without. (An embedding
or a simplex of the *next* token cannot be read by blocks that expect the state of the last one.) Readers differ, so the
table says what each makes of true targets: only a gap to that ceiling is diffusion's own. All learn by squared error;
published simplex models learn by cross-entropy.
Writes interfaces.md, interfaces.png and result.json to --out; each cell is kept as soon as it is finished.

Letters: B batch, T tokens, D width of the backbone, V vocabulary, d width of what is diffused.
"""
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from core import backbone, masked, metrics, optim
from core.common import UserError, entry, parse, setup
from core.denoiser import Bridge
from core.diffusion import position_noise, sample, times, token_loss
from core.draws import generator, normal
from core.report import frontiers
from core.run import Run, atomic, finished, read_json, write_json
from core.stats import paired, plus_minus


@dataclass
class Config:
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/interfaces"  # run folder
    kinds: str = "hidden,embedding,latent,bottleneck,simplex,causal"  # which ways
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
    windows: int = 32           # held-out sequences of the likelihood
    texts: int = 16             # texts of the frontier
    new: int = 32               # tokens written after 64 of held-out text
    temperatures: str = "0.7,1.0,1.3"  # of the frontier
    dry_run: bool = False       # print what would be trained, then leave


SKIP = 4            # first positions: attention sinks, as in bridge.py
COLORS = {"hidden": "#30638e", "embedding": "#edae49", "latent": "#5f9e6e", "bottleneck": "#7fb0d4",
          "simplex": "#9b6a9e", "causal": "#222222"}
WAYS = tuple(COLORS)


# -------------------------------------------------------------------------------------------------- the six ways
class Way:
    """One way: `target` gives z (B, T, d), `read` turns an estimate of z into log-probabilities (B, T, V)."""

    def __init__(self, kind, lm, layer, rows, latent):
        self.kind, self.lm, self.layer, self.width = kind, lm, layer, 1.0
        self.table = lm.model.get_input_embeddings().weight                               # (V, D)
        count = torch.bincount(rows.flatten(), minlength=lm.V) + 1.0
        self.unigrams = (count / count.sum()).to(rows.device)                             # (V,)
        self.d = lm.V if kind == "simplex" else lm.D
        h0 = lm.embed(rows)
        self.stats_c = standard(h0[:, SKIP:])
        if kind == "hidden":
            self.stats_z = standard(lm.through(h0, 0, layer)[:, SKIP:])
        elif kind == "embedding":
            self.stats_z = standard(self.table[rows])
        elif kind in ("latent", "bottleneck"):
            h = self.state(h0).flatten(0, 1).double()                                     # (n, D)
            self.mean, centred = h.mean(0), h - h.mean(0)
            _, values, basis = torch.linalg.svd(centred, full_matrices=False)
            self.basis, self.scale = basis[:latent].T, values[:latent] / len(h) ** 0.5    # (D, k), (k,)

    def state(self, h0):
        """h[0] (B, T, D) -> what is reduced to a few dimensions: h[l] for `bottleneck`, the normed last state."""
        if self.kind == "bottleneck":
            return self.lm.through(h0, 0, self.layer)
        return self.lm.norm(self.lm.through(h0, 0, self.lm.L))

    def condition(self, ids):
        """The denoiser's condition, padded with zeros to d: (B, T, d)."""
        c = (self.lm.embed(ids) - self.stats_c[0]) / self.stats_c[1]
        return F.pad(c, (0, self.d - c.shape[-1]))

    def target(self, ids):
        """ids (B, T + 1) -> z (B, T, d)."""
        now = self.lm.embed(ids[:, :-1])
        if self.kind == "hidden":
            return (self.lm.through(now, 0, self.layer) - self.stats_z[0]) / self.stats_z[1]
        if self.kind == "embedding":
            return (self.table[ids[:, 1:]] - self.stats_z[0]) / self.stats_z[1]
        if self.kind == "simplex":
            return 2.0 * F.one_hot(ids[:, 1:], self.lm.V) - 1
        few = (self.state(now).double() - self.mean) @ self.basis / self.scale            # (B, T, k)
        return F.pad(few.float(), (0, self.d - len(self.scale)))

    def read(self, z):
        """z (B, T, d) -> log p (B, T, V)."""
        if self.kind == "hidden":
            logits = self.lm.head(self.lm.through(z * self.stats_z[1] + self.stats_z[0], self.layer, self.lm.L))
        elif self.kind == "embedding":
            goal = (self.table - self.stats_z[0]) / self.stats_z[1]                       # (V, D)
            logits = self.unigrams.log() - torch.cdist(z, goal[None]).square() / (2 * self.width ** 2)
        elif self.kind == "simplex":
            logits = ((z + 1) / 2).clamp_min(0).add(self.width * self.unigrams).log()     # log_softmax makes it a law
        else:
            h = ((z[..., :len(self.scale)].double() * self.scale) @ self.basis.T + self.mean).float()
            logits = self.lm.unnormed_head(h) if self.kind == "latent" else self.lm.head(
                self.lm.through(h, self.layer, self.lm.L))
        return F.log_softmax(logits.float(), -1)

    def recovery(self):
        """What reading costs, in words."""
        given = sum(p.numel() for b in self.lm.blocks[self.layer:] for p in b.parameters())
        blocks = f"{given:,} pretrained parameters of the retained blocks, not trained, and the head"
        few = f"{len(getattr(self, 'scale', ()))} principal components, in closed form from 64 training windows"
        return {"hidden": blocks, "bottleneck": f"{few}, and {blocks}", "latent": f"{few}, and the head",
                "embedding": f"the embedding table, a width fitted on 8 training windows ({self.width:g}), unigrams",
                "simplex": f"unigrams, their share fitted on 8 training windows ({self.width:g})",
                "causal": "its own output matrix, trained"}[self.kind]


def standard(h):
    """Mean and standard deviation per channel of (..., D)."""
    flat = h.flatten(0, -2)
    return flat.mean(0), flat.std(0).clamp_min(1e-4)


class Causal(nn.Module):
    """The denoiser as a plain language model: no noise, one call, an output matrix of its own."""

    def __init__(self, D, blocks, heads, V):
        super().__init__()
        self.net, self.out = Bridge(D, D, blocks, heads, "regression"), nn.Linear(D, V, bias=False)

    def forward(self, c):
        return self.out(self.net(torch.zeros_like(c), c, torch.ones(len(c), device=c.device)))


# --------------------------------------------------------------------------------------------------------- train
def train(way, net, rows, cfg, seed):
    """Train in place. Each step: 1 batch, noise levels and noise by their keys  2 loss, the first positions scaled by
    their own size (causal: left out)  3 clip, step. Returns seconds."""
    inside = ".blocks." if way.kind == "causal" else "blocks."
    optimizers = optim.build(net.named_parameters(), cfg.lr, cfg.lr_adam, 0.01, inside=inside)
    start = time.perf_counter()
    params, slots = list(net.parameters()), list(range(cfg.batch_size))
    for step in range(cfg.steps):
        ids = rows.batch(seed, step, slots, cfg.batch_size).to(params[0].device)          # (B, T + 1)
        with torch.no_grad():
            c = way.condition(ids[:, :-1])
        if way.kind == "causal":
            loss = F.cross_entropy(net(c)[:, SKIP:].flatten(0, 1), ids[:, 1 + SKIP:].flatten())
        else:
            with torch.no_grad():
                z = way.target(ids)
            t = times("logit-normal", 0.0, seed, step, slots).to(z.device)
            noise = torch.stack([normal(z.shape[1:], z.device, seed, "noise", step, s) for s in slots])
            loss = token_loss(net, z, c, t, noise, SKIP)[0].mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 1.0).item()
        if not math.isfinite(norm):
            raise UserError(f"the loss of {way.kind} stopped being finite at step {step}; lower --lr")
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, 20))
        for p in params:
            p.grad = None
    return time.perf_counter() - start


@torch.no_grad()
def estimate(way, net, ids, nfe, noise):
    """log p of the next token after every prefix of ids (B, T), for one noise (T, d) or (B, T, d): (B, T, V)."""
    c = way.condition(ids)
    return F.log_softmax(net(c), -1) if way.kind == "causal" else way.read(sample(net, c, nfe, noise))


def sum_nll(each):
    """Log-probabilities of the right tokens (draws, B, T) -> sum over B and T of -log of their mean over draws."""
    return -(each.logsumexp(0) - math.log(len(each))).sum().item()


def right(logp, ids):
    """logp (B, T, V), ids (B, T + 1) -> that of the next tokens, without the first positions: (B, T - SKIP)."""
    return logp.gather(-1, ids[:, 1:, None])[:, SKIP:, 0]


@torch.no_grad()
def next_token_nll(way, net, rows, cfg, draws):
    """Mean -log of the next token's probability, itself the mean over `draws` noises: rows (N, T + 1), nats."""
    noises = [position_noise(s, range(rows.shape[1] - 1), way.d, rows.device)
              for s in range(1 if way.kind == "causal" else draws)]
    total = sum(sum_nll(torch.stack([right(estimate(way, net, ids[:, :-1], cfg.nfe, noise), ids) for noise in noises]))
                for ids in rows.split(8))
    return total / rows[:, 1 + SKIP:].numel()


@torch.no_grad()
def ceiling(way, rows, draws, seed):
    """The same number for a perfect denoiser, whose samples are true targets. Those of `embedding` and `simplex` are
    of the next token itself, so it is drawn from the intact model's law, `draws` times. None for `causal`."""
    if way.kind == "causal":
        return None
    total = 0.0
    for ids in rows.split(8):
        goals = [ids]
        if way.kind in ("embedding", "simplex"):
            h = way.lm.through(way.lm.embed(ids[:, :-1]), 0, way.lm.L)
            p = torch.softmax(way.lm.head(h).double(), -1)                                # (B, T, V)
            u = torch.from_numpy(generator(seed, "ceiling").random((draws, *p.shape[:2]))).to(ids.device)
            drawn = [masked.choose(p.log(), 1.0, 1.0, 0, some) for some in u]             # (B, T) each
            goals = [torch.cat([ids[:, :1], some], 1) for some in drawn]
        total += sum_nll(torch.stack([right(way.read(way.target(goal)), ids) for goal in goals]))
    return total / rows[:, 1 + SKIP:].numel()


@torch.no_grad()
def write(way, net, prompts, new, temperature, cfg, seed):
    """prompts (N, P) -> (N, P + new), token by token; every text has noise of its own."""
    ids, T = prompts, prompts.shape[1] + new
    noise = torch.stack([normal((T, way.d), ids.device, seed, "write", row) for row in range(len(ids))])   # (N, T, d)
    for i in range(new):
        logp = estimate(way, net, ids, cfg.nfe, noise[:, :ids.shape[1]])[:, -1]
        u = torch.from_numpy(generator(seed, "write", i).random(len(ids))).to(ids.device)
        ids = torch.cat([ids, masked.choose(logp.double(), temperature, 1.0, 0, u)[:, None]], 1)
    return ids


def fit_width(way, net, rows, cfg):
    """The reader's free number (embedding: a width, simplex: a share) that makes training windows `rows` most likely,
    averaged over as many draws as the held-out ones."""
    with torch.no_grad():
        c, T = way.condition(rows[:, :-1]), rows.shape[1] - 1
        zs = [sample(net, c, cfg.nfe, position_noise(s, range(T), way.d, rows.device)) for s in range(cfg.draws)]
        best = (math.inf, 1.0)
        for way.width in (1e-3, 1e-2, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 1e2, 1e4):
            best = min(best, (sum_nll(torch.stack([right(way.read(z), rows) for z in zs])), way.width))
    way.width = best[1]


def cell(kind, seed, lm, layer, train_rows, held_out, real, cfg):
    """One way and one seed: trained and measured."""
    torch.manual_seed(seed)
    way = Way(kind, lm, layer, train_rows.windows(64, seed)[:, :-1].to(held_out.device), cfg.latent)
    heads = max(1, lm.D // 32)
    net = Causal(lm.D, cfg.blocks, heads, lm.V) if kind == "causal" else Bridge(way.d, lm.D, cfg.blocks, heads)
    net = net.to(held_out.device)
    seconds = train(way, net, train_rows, cfg, seed)
    net.eval()
    if kind in ("embedding", "simplex"):
        fit_width(way, net, train_rows.windows(8, seed + 1).to(held_out.device), cfg)
    frontier = []
    for t in map(float, cfg.temperatures.split(",")):
        text = write(way, net, held_out[:cfg.texts, :64], cfg.new, t, cfg, seed)
        frontier.append({"temperature": t, **metrics.measure(lm, text, 64)})
    return {"kind": kind, "seed": seed, "seconds": seconds, "parameters": sum(p.numel() for p in net.parameters()),
            "d": cfg.latent if kind in ("latent", "bottleneck") else way.d,
            "nll": next_token_nll(way, net, held_out, cfg, cfg.draws),
            "nll_one_draw": next_token_nll(way, net, held_out, cfg, 1), "recovery": way.recovery(),
            "ceiling": ceiling(way, held_out, cfg.draws, seed),
            "frontier": frontier, "matched": metrics.at_entropy(frontier, real["entropy"])}


# --------------------------------------------------------------------------------------------------------- report
def table(result):
    near = min((p["temperature"] for p in result["cells"][0]["frontier"]), key=lambda t: abs(t - 1))
    lines = [f"{result['steps']} steps of {result['batch_size']} x {result['seq_len']} tokens, NFE {result['nfe']}, "
             f"{result['draws']} draws, {result['windows']} held-out windows, {len(result['seeds'])} seeds, mean +- sd;"
             f" texts: {result['texts']} of {result['new']} tokens after 64. The intact model: {result['intact']:.3f} "
             f"nats, unigrams {result['unigram']:.3f}; real text: gen-PPL {result['real']['gen_ppl']:.1f}, entropy "
             f"{result['real']['entropy']:.2f}.", "",
             "| what is diffused | d | trained parameters | next-token NLL | with one draw | with true targets | "
             f"gen-PPL at real entropy | gen-PPL, T = {near:g} | entropy | diversity | rep-4 | train (s) | read by |",
             "|---" * 13 + "|"]
    for kind in result["kinds"]:
        group = [c for c in result["cells"] if c["kind"] == kind]
        one = [min(c["frontier"], key=lambda p: abs(p["temperature"] - 1)) for c in group]
        name = f"{kind}, layer {result['layer']}" if kind in ("hidden", "bottleneck") else kind
        matched = [c["matched"] for c in group]
        lines.append(f"| {name} | {group[0]['d']} | {group[0]['parameters']:,} | " + " | ".join([
            *(plus_minus([c[k] for c in group], ".3f") for k in ("nll", "nll_one_draw")),
            "-" if group[0]["ceiling"] is None else plus_minus([c["ceiling"] for c in group], ".3f"),
            "never there" if None in matched else plus_minus(matched, ".0f"),
            plus_minus([p["gen_ppl"] for p in one], ".0f"),
            *(plus_minus([p[k] for p in one], ".2f") for k in ("entropy", "diversity", "rep_4")),
            plus_minus([c["seconds"] for c in group], ".0f"), group[0]["recovery"]]) + " |")
    return "\n".join([*lines, "", result["verdict"]])


def verdict(cells, layer):
    """One sentence from the numbers."""
    nll = {k: [c["nll"] for c in cells if c["kind"] == k] for k in dict.fromkeys(c["kind"] for c in cells)}
    mean = {k: sum(v) / len(v) for k, v in nll.items()}
    rivals = [k for k in mean if k not in ("hidden", "bottleneck", "causal")]
    if "hidden" not in mean or not rivals:
        return ""
    best = min(rivals, key=mean.get)
    gap, wide, _ = paired(nll["hidden"], nll[best])
    word = ("ahead" if gap < 0 else "behind") + f" by {abs(gap):.3f} nats" + (
        " (one seed)" if wide is None else f" +- {wide:.3f} (95%, {len(nll[best])} seeds)"
        + ("" if wide < abs(gap) else ", so not beyond doubt"))
    true = {k: statistics.mean(c["ceiling"] for c in cells if c["kind"] == k) for k in ("hidden", best)}
    text = (f"hidden at layer {layer} predicts the next token with {mean['hidden']:.3f} nats, the best other interface "
            f"({best}) with {mean[best]:.3f}: hidden is {word}, with the retained blocks' pretraining behind it; "
            f"given true targets, their readers reach {true['hidden']:.3f} and {true[best]:.3f}")
    if "bottleneck" in mean:
        text += f"; in few dimensions and through the same blocks it reaches {mean['bottleneck']:.3f}"
    if "causal" in mean:
        text += f"; the same network trained on cross-entropy alone reaches {mean['causal']:.3f}"
    return text[0].upper() + text[1:] + "."


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    kinds = cfg.kinds.split(",")
    unknown = [k for k in kinds if k not in WAYS]
    if unknown:
        raise UserError(f"--kinds {unknown[0]}: there are {', '.join(WAYS)}")
    if min(cfg.seeds, cfg.steps, cfg.nfe, cfg.draws, cfg.latent, cfg.blocks) < 1 or cfg.texts < 2 or cfg.new < 4:
        raise UserError("--seeds, --steps, --nfe, --draws, --latent, --blocks must be at least 1, --texts 2, --new 4")
    if cfg.seq_len + 1 < 64 + cfg.new or cfg.texts > cfg.windows:
        raise UserError(f"--seq_len must be at least {63 + cfg.new} (64 tokens and --new), --windows at least --texts")
    try:
        temperatures = [float(t) for t in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = [0.0]
    if not all(0 < t < 100 for t in temperatures):
        raise UserError("--temperatures must be numbers above 0, such as 0.7,1.0")
    world = setup("cpu")
    model = backbone.resolve(cfg.model, cfg.out)
    layer = cfg.layer or read_json(Path(cfg.out).parent / "geometry" / "result.json",
                                   "run python geometry.py first, or pass --layer N")["best_layer"]
    identity = {"base": backbone.identity(model), "layer_number": layer}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(table(result))
        return result
    if cfg.dry_run:
        print(f"would train {', '.join(kinds)} for {cfg.steps} steps with {cfg.seeds} seeds each on {model}")
        return None
    backbone.read_config(model, max(cfg.seq_len, 64 + cfg.new))
    lm = backbone.load(model, world.device, torch.float32)
    if not 1 <= layer <= lm.L or cfg.latent > lm.D:
        raise UserError(f"--layer {layer} must lie in 1..{lm.L} and --latent {cfg.latent} in 1..{lm.D}")
    shards, _ = data.shards_beside(cfg, backbone.load_tokenizer(model), world)
    train_rows = data.Tokens(shards, "train", cfg.seq_len)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.windows).to(world.device)            # (N, T + 1)
    run = Run(cfg, world, identity)

    real = metrics.measure(lm, held_out[:cfg.texts, :64 + cfg.new], 64)
    with torch.no_grad():
        logp = torch.cat([F.log_softmax(lm.head(lm.through(lm.embed(i[:, :-1]), 0, lm.L)), -1) for i in held_out.split(8)])
    intact = -logp.gather(-1, held_out[:, 1:, None])[:, SKIP:].mean().item()
    count = torch.bincount(train_rows.windows(512).flatten(), minlength=lm.V).double() + 1
    unigram = -(count / count.sum()).log()[held_out[:, 1 + SKIP:]].mean().item()
    cells = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for kind in kinds:
            file = run.out / f"{kind}_seed{seed}.json"
            if not file.exists():
                write_json(file, cell(kind, seed, lm, layer, train_rows, held_out, real, cfg))
            cells.append(read_json(file))
            run.say(f"{kind}, seed {seed}: next-token NLL {cells[-1]['nll']:.3f} ({cells[-1]['seconds']:.0f} s)")
    result = {**identity, "cells": cells, "kinds": kinds, "layer": layer, "real": real, "intact": intact,
              "unigram": unigram, "seeds": list(range(cfg.seed, cfg.seed + cfg.seeds)),
              "verdict": verdict(cells, layer), "windows": len(held_out),
              **{k: getattr(cfg, k) for k in ("steps", "batch_size", "seq_len", "nfe", "draws", "texts", "new")}}
    with atomic(run.out / "interfaces.png") as temporary:
        frontiers([(c["kind"], COLORS[c["kind"]], c["frontier"]) for c in cells], real, temporary,
                           "What should diffusion produce? Frontiers over temperature")
    with atomic(run.out / "interfaces.md") as temporary:
        temporary.write_text(table(result) + "\n")
    run.finish(result)
    print(table(result))
    return run.result


if __name__ == "__main__":
    main()
