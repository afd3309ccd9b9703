"""bridge.py: REPLACE. Train a conditional diffusion bridge that produces h[l], so that blocks 1..l can go.

    python bridge.py                                             # the toy at the layer geometry chose: ~1 min, 2 cores
    torchrun --nproc_per_node 2 bridge.py --layer 2 --model out/toy    # on CPU too: same weights to rounding
    torchrun --nproc_per_node 8 bridge.py --layer 6 --preset 8b --model meta-llama/Llama-3.1-8B
    python bridge.py --preset blocks --layer 2 --blocks 4 --out out/blocks    # meets unknown tokens: for generate.py

The maths is in diffusion.py, the network in denoiser.py. Expected on the default toy: next-token CE within 0.01 nats of
the intact model at NFE 4. There every token is known, so h[l] is a deterministic function of the input and plain
regression (`--objective regression`) is a serious rival: train both and look. Writes bridge.safetensors (EMA weights),
bridge.json, log.jsonl and result.json to --out.

Letters: B batch, T tokens, D hidden width of the backbone, W width of the bridge, L blocks of the backbone, H heads,
l the replaced layer, z the standardised h[l], c the standardised h[0].
"""
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
from core import backbone, optim
from core.common import (
    GradientSum,
    StopSignal,
    UserError,
    check_replicas,
    entry,
    parse,
    peak_flops,
    pick_dtype,
    setup,
    split_batch,
)
from core.denoiser import Bridge, save
from core.diffusion import hide, position_noise, readout_loss, sample, times, token_loss
from core.draws import generator, normal
from core.run import Clock, Run, finished, read_json


@dataclass
class Config:
    preset: Literal["tiny", "toy", "blocks", "0.6b", "8b"] = "toy"  # for tests, a minute, generation, one GPU, eight
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = ""               # run folder [out/bridge, or out/bridge_lN when --layer N is given]
    layer: str = "auto"         # auto: geometry's choice beside --out; 1..L (0 with --visible: embeddings); all
    seed: int = 0               # every draw is keyed by it
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the frozen backbone and of autocast
    compile: bool = False       # torch.compile the bridge block by block
    random_init: bool = False   # a backbone of this shape with random weights: for throughput without a download
    visible: Literal["full", "prefix", "span", "mix"] = "full"  # which tokens are known; mix: some of each
    bidirectional: bool = False  # let unknown tokens see each other and what follows (needed to fill a span)
    objective: Literal["diffusion", "regression"] = "diffusion"  # regression: the same network, once, without noise
    prediction: Literal["x", "v", "eps"] = "x"  # what the network outputs: z, e - z, or e
    source: Literal["noise", "embedding"] = "noise"  # e ~ N(0, I), or c + noise / 2: a bridge between the two ends
    times: Literal["logit-normal", "uniform"] = "logit-normal"  # law of t in training
    t_mean: float = 0.0         # mean of logit t; above 0 trains more near t = 1, where sampling starts
    weighting: Literal["z", "v"] = "z"  # error of z as it is, or over t^2 (t >= 0.1): the error of the velocity
    self_condition: bool = False  # feed the last estimate of z back in (half of the time in training)
    sampler: Literal["euler", "heun"] = "euler"  # on a grid from t = 1 to 0
    shift: float = 1.0          # of that grid: 1 is uniform, above 1 spends more calls near t = 1
    nfe: int = 4                # network calls that the hybrid will use by default
    width: int = 0              # W (0: D)
    blocks: int = 0             # of the bridge (0: as many as it replaces)
    recompute: bool = False     # activation checkpointing: less memory, a third more compute
    overlap: Literal["auto", "on", "off"] = "auto"  # send gradients during backward; auto: with NCCL, not with gloo
    bucket_mb: float = 25.0     # size of the buckets in which they are sent
    ema: float = 0.995          # decay of the weights' running mean, reached by min(ema, (1+k)/(10+k))
    steps: int = 400            # optimizer steps
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: its whole share)
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.02            # Muon, for the matrices inside the blocks
    lr_adam: float = 2e-3       # AdamW, for everything else
    weight_decay: float = 0.01  # decoupled
    warmup: int = 20            # steps
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the learning rate, after the warm-up
    cooldown: float = 1.0       # share of the run in which wsd descends to zero
    clip: float = 1.0           # gradient norm
    skip: int = 4               # first positions of a sequence (attention sinks): own loss scale, reported apart
    calibration: int = 64       # sequences for mu and sigma
    eval_batches: int = 64      # held-out sequences of the final numbers
    noise_seeds: int = 3        # sampler noises whose spread is reported
    eval_every: int = 200       # steps between validations
    log_every: int = 50         # steps between log lines
    save_every: int = 200       # steps between checkpoints
    dry_run: bool = False       # print sizes and cost, then leave


PRESETS = {
    "tiny": {"steps": 20, "batch_size": 4, "seq_len": 32, "calibration": 8, "eval_batches": 4, "eval_every": 10,
             "save_every": 10, "log_every": 10, "warmup": 5},
    "blocks": {"visible": "mix", "bidirectional": True, "self_condition": True, "t_mean": 0.7, "shift": 3.0,
               "batch_size": 8, "steps": 800, "noise_seeds": 1},
    "0.6b": {"steps": 5000, "batch_size": 32, "seq_len": 1024, "calibration": 64, "compile": True, "ema": 0.999,
             "lr": 0.01, "lr_adam": 6e-4, "warmup": 200, "eval_every": 1000, "save_every": 500},
    "8b": {"steps": 20000, "batch_size": 256, "micro_batch": 8, "seq_len": 1024, "calibration": 64, "compile": True,
           "ema": 0.9995, "lr": 0.01, "lr_adam": 3e-4, "warmup": 500, "eval_every": 2000, "save_every": 500},
}
NFES = (1, 2, 4, 8)
LOGITS = 2 ** 27  # at most so many logits at once when the final numbers are taken: five such tensors live together


# -------------------------------------------------------------------------------------------------- train, measure
@torch.no_grad()
def targets(lm, net, ids, layer):
    """ids (B, T) -> (z, c), both (B, T, D): the pair the bridge learns from, by one pass through the frozen prefix."""
    h0 = lm.embed(ids)
    return net.standard_z(lm.through(h0, 0, layer)), net.standard_c(h0)


@torch.no_grad()
def calibrate(lm, net, rows, layer, skip):
    """Set mu, sigma of h[l] and h[0] per dimension from rows (N, T), positions >= skip, eight rows at a time."""
    sums = {letter: torch.zeros(2, lm.D, dtype=torch.float64, device=rows.device) for letter in "cz"}
    for ids in rows.split(8):
        h0 = lm.embed(ids)
        for letter, h in (("c", h0), ("z", lm.through(h0, 0, layer))):
            flat = h[:, skip:].flatten(0, 1).double()                                  # (n, D)
            sums[letter] += torch.stack([flat.sum(0), flat.square().sum(0)])
    for letter, total in sums.items():
        mean, square = total / (rows.shape[0] * (rows.shape[1] - skip))
        variance = (square - mean.square()).clamp_min(0)
        getattr(net, f"mu_{letter}").copy_(mean)
        getattr(net, f"sigma_{letter}").copy_(variance.sqrt().clamp_min(1e-4 * variance.mean().sqrt() + 1e-8))


@torch.no_grad()
def measure(lm, net, rows, layer, nfes, noise_seeds, skip):
    """The bridge's numbers on held-out rows (N, T+1), at each NFE, means over positions >= skip and noise seeds:
    fvu = E|z_hat - z|^2 / E|z|^2, then through the retained blocks kl(original || hybrid), ce_gap (nats over the
    intact model), agree (top-1). *_noise_sd: spread over sampler noises; ce_gap_se: standard error over sequences."""
    sums = {n: torch.zeros(noise_seeds, 5, dtype=torch.float64) for n in nfes}         # se, kl, ce, agree, sink se
    gaps, energy, ce_intact = {n: [] for n in nfes}, torch.zeros(2, dtype=torch.float64), 0.0
    T = rows.shape[1] - 1
    batch = max(1, min(8, LOGITS // (T * lm.V)))
    noises = [position_noise(s, range(T), lm.D, rows.device) for s in range(noise_seeds)]
    for ids in rows.split(batch):
        h0 = lm.embed(ids[:, :-1])
        side = lm.side(h0)
        hl = lm.through(h0, 0, layer, side)
        z, c = net.standard_z(hl), net.standard_c(h0)
        intact = F.log_softmax(lm.head(lm.through(hl, layer, lm.L, side)).float(), -1)     # (B, T, V)
        ce = -intact.gather(-1, ids[:, 1:, None])[:, skip:, 0]                         # (B, T - skip)
        ce_intact += ce.sum().item()
        energy += torch.stack([z[:, skip:].square().sum(), z[:, :skip].square().sum()]).double().cpu()
        for n in nfes:
            for s in range(noise_seeds):
                z_hat = sample(net, c, n, noises[s])
                hybrid = F.log_softmax(lm.head(lm.through(net.hidden(z_hat).to(hl.dtype), layer, lm.L, side)).float(), -1)
                error = (z_hat - z).square()
                kl = (intact.exp() * (intact - hybrid)).sum(-1)[:, skip:]
                gap = -hybrid.gather(-1, ids[:, 1:, None])[:, skip:, 0] - ce
                agree = (hybrid.argmax(-1) == intact.argmax(-1))[:, skip:]
                sums[n][s] += torch.stack([error[:, skip:].sum(), kl.sum(), gap.sum(), agree.sum(),
                                           error[:, :skip].sum()]).double().cpu()
                gaps[n].append(gap.mean(1))
    for n in nfes:  # per sequence, mean over noises
        parts = [torch.stack(gaps[n][i:i + noise_seeds]).mean(0) for i in range(0, len(gaps[n]), noise_seeds)]
        gaps[n] = torch.cat(parts)                                                     # (N,)
    count, out = len(rows) * (T - skip), {}
    for n in nfes:
        mean, sd = sums[n].mean(0), sums[n].std(0) if noise_seeds > 1 else torch.zeros(5)
        out[str(n)] = {"fvu": (mean[0] / energy[0]).item(), "kl": (mean[1] / count).item(),
                       "ce_gap": (mean[2] / count).item(), "agree": (mean[3] / count).item(),
                       "ce_gap_se": (gaps[n].std() / len(rows) ** 0.5).item() if len(rows) > 1 else 0.0,
                       "ce_gap_rows": gaps[n].tolist(),
                       "fvu_noise_sd": (sd[0] / energy[0]).item(), "ce_gap_noise_sd": (sd[2] / count).item(),
                       "fvu_sinks": (mean[4] / energy[1].clamp_min(1e-12)).item()}
    return out, ce_intact / count


def choose_layer(cfg):
    """--layer -> a number. `auto` is what geometry.py wrote beside --out."""
    if cfg.layer == "auto":
        return read_json(Path(cfg.out).parent / "geometry" / "result.json",
                         "run python geometry.py first, or pass --layer N")["best_layer"]
    if not cfg.layer.isdigit():
        raise UserError(f"--layer {cfg.layer} must be auto, all or a number")
    return int(cfg.layer)


@torch.no_grad()
def validate(lm, net, rows, layer, cfg, world):
    """(training loss, share of tokens that the readout names from the true z or None) on held-out rows (N, T+1), shared
    out over the processes: t on an even grid, noise with its own key, so that how often this runs changes nothing."""
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(world.rank, len(rows), world.size):
        ids = rows[i:i + 1, :-1]
        z, c = targets(lm, net, ids, layer)
        t = torch.tensor([(i + 0.5) / len(rows)], device=world.device)
        noise = normal(z.shape, world.device, cfg.seed, "validate", i)
        unknown = to(world.device, hide(cfg.visible, cfg.seq_len, cfg.seed, 0, [i], "validate"))
        loss, _ = token_loss(net, z, c, t, noise, cfg.skip, last_seen=torch.ones_like(t), unknown=unknown)
        named = (net.readout(z).argmax(-1) == ids).float().mean() if net.generates else 0.0
        total += torch.tensor([loss.mean().item(), float(named)])
    loss, named = world.sum((total / len(rows)).tolist())
    return loss, named if net.generates else None


def to(device, tensor):
    """`tensor` on `device`; None stays None."""
    return None if tensor is None else tensor.to(device)


def train_flops(net, replaced, layer, T):
    """FLOPs a training token: forward and backward of the bridge (6 a parameter), forward only of the `layer` blocks of
    the frozen prefix (2 a parameter), and causal attention (6 and 2 per attended key and channel)."""
    own = sum(p.numel() for n, p in net.named_parameters() if p.ndim == 2 and not n.startswith(("time", "readout")))
    blocks, W, D = net.settings["blocks"], net.settings["W"], net.settings["D"]
    passes = 8 if net.settings["self_condition"] else 6                         # one more forward for the first estimate
    readout = 4 * D * net.settings["V"] if net.generates else 0                 # its input needs no gradient
    return passes * (own + blocks * W * T) + readout + 2 * (replaced + layer * D * T)


def report_size(cfg, net, shape, layer, world, micro, dtype):
    """--dry_run: parameters by group, bytes by component on one GPU, FLOPs, and the speed at 50% MFU on an H100.

    Activations: bytes saved for backward per token, counted with saved-tensor hooks (about 100 W a block, with bf16
    autocast or without it; 4 W with --recompute), plus the states themselves and one MLP of the prefix."""
    from transformers import AutoModelForCausalLM
    print("\n".join(f"  {k} = {v}" for k, v in dataclasses.asdict(cfg).items()))
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(shape))
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in net.named_children()}
    size, replaced = sum(count.values()), sum(p.numel() for b in lm.blocks[:layer] for p in b.parameters())
    upper = sum(p.numel() for b in lm.blocks[layer:] for p in b.parameters())
    flops, tokens = train_flops(net, replaced, layer, cfg.seq_len), micro * cfg.seq_len
    matrices = sum(p.numel() for p in net.blocks.parameters() if p.ndim == 2) if cfg.lr > 0 else 0
    W, D = net.settings["W"], net.settings["D"]
    saved = (4 if cfg.recompute else 100) * W * net.settings["blocks"] + (100 * W if cfg.recompute else 0)
    wide = getattr(shape, "intermediate_size", None) or 4 * D
    gigabytes = {
        "frozen prefix": dtype.itemsize * (sum(p.numel() for p in lm.parameters()) - upper), "weights": 4 * size,
        "gradients": 4 * size * (2 if world.size > 1 or cfg.preset == "8b" else 1),  # and the buffer that travels
        "optimizer": 4 * matrices + 8 * (size - matrices),
        "EMA": 4 * size, "activations": tokens * (saved + 36 * D + 3 * wide * dtype.itemsize)}
    measuring = {  # the final numbers, on rank 0: the whole backbone and logits, no gradients and no activations
        "backbone": dtype.itemsize * sum(p.numel() for p in lm.parameters()), "logits": 5 * 4 * max(
            LOGITS, cfg.seq_len * shape.vocab_size), **{k: gigabytes[k] for k in ("weights", "optimizer", "EMA")}}
    total, after = sum(gigabytes.values()) / 1e9, sum(measuring.values()) / 1e9
    print(f"bridge at layer {layer} of {shape.num_hidden_layers}: {size:,} parameters, {size / max(1, replaced):.2f}x "
          "the blocks it replaces: " + ", ".join(f"{name} {n:,}" for name, n in count.items()))
    print(f"GB on one GPU at {micro} sequences a pass: "
          + ", ".join(f"{name} {n / 1e9:.2f}" for name, n in gigabytes.items())
          + f"; together {total:.1f}, and {after:.1f} for the final numbers, which "
          f"{'fits' if max(total, after) < 80 else 'does NOT fit'} 80 GB")
    print(f"{flops:.3e} FLOPs a token: {0.5 * 989e12 / flops:,.0f} tokens/s a GPU at 50% of 989 TFLOP/s")
    return {"parameters": size, "gigabytes": total, "flops_per_token": flops}


def summary(result):
    if not result["nfe"]:
        return f"{result['tokens_per_s']:,.0f} tokens/s at random weights"
    last = str(max(int(n) for n in result["nfe"] if int(n) <= 4))
    return (f"layer {result['layer']}, {result['objective']}, NFE {last}: FVU {result['nfe'][last]['fvu']:.4f}, CE gap "
            f"{result['nfe'][last]['ce_gap']:+.4f} nats, {result['parameters']:,} parameters")


def print_table(result):
    print(f"{'NFE':>4} {'FVU':>8} {'KL':>8} {'CE gap':>8} {'+- se':>7} {'agree':>6}   (EMA weights; raw FVU, CE gap)")
    for n, row in result["nfe"].items():
        raw = result["raw_nfe"][n]
        print(f"{n:>4} {row['fvu']:8.4f} {row['kl']:8.4f} {row['ce_gap']:+8.4f} {row['ce_gap_se']:7.4f} "
              f"{row['agree']:6.1%}   ({raw['fvu']:.4f}, {raw['ce_gap']:+.4f})")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    cfg.out = cfg.out or ("out/bridge" if cfg.layer in ("auto", "all") else f"out/bridge_l{cfg.layer}")
    if cfg.nfe < 1 or not 0 <= cfg.ema < 1 or not 0 <= cfg.skip < cfg.seq_len or min(cfg.shift, cfg.bucket_mb) <= 0:
        raise UserError("--nfe must be at least 1, --ema in [0, 1), --skip below --seq_len, --shift and --bucket_mb "
                        "above 0")

    # -------------------------------------------------------------------------------------------------- setup
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    slots, micro = split_batch(cfg.batch_size, cfg.micro_batch, world)
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"layer_number": choose_layer(cfg) if cfg.layer != "all" else None,
                "base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(f"{cfg.out} is finished: " + summary(result))
        return result
    shape = backbone.read_config(model, cfg.seq_len)
    if cfg.layer == "all":  # one run a layer, each in its own folder: a rerun resumes where it stopped
        return [main.__wrapped__([*argv, f"--layer={n}", f"--model={model}", f"--out={cfg.out}_l{n}"])
                for n in range(1, shape.num_hidden_layers + 1)]
    layer, D = identity["layer_number"], shape.hidden_size
    first = 1 if cfg.visible == "full" else 0  # h[0] is worth producing only where tokens are unknown
    if not first <= layer <= shape.num_hidden_layers:
        raise UserError(f"--layer {layer} must lie in {first}..{shape.num_hidden_layers}, the blocks of {model}")
    if cfg.bidirectional and cfg.visible == "full":
        raise UserError("--bidirectional would let the replaced layer see the future; it needs --visible prefix, span "
                        "or mix")
    W, blocks = cfg.width or D, cfg.blocks or max(1, layer)
    H = max(1, W // (64 if W >= 512 else 32))
    if W % (2 * H):
        raise UserError(f"--width {W} does not split into {H} heads; use a multiple of {64 if W >= 512 else 32}")
    torch.manual_seed(cfg.seed)
    with torch.device("meta" if cfg.dry_run else "cpu"):
        net = Bridge(D, W, blocks, H, cfg.objective, cfg.prediction, cfg.source, cfg.sampler, cfg.self_condition,
                     cfg.shift, cfg.visible, cfg.bidirectional, shape.vocab_size)
    if cfg.dry_run:
        return report_size(cfg, net, shape, layer, world, micro, dtype)

    # -------------------------------------------------------------------------------------------- model, data
    net, net.recompute = net.to(world.device), cfg.recompute
    size = sum(p.numel() for p in net.parameters())
    lm = backbone.load(model, world.device, dtype, blocks=layer, random_init=cfg.random_init)     # only the prefix
    replaced = sum(p.numel() for b in lm.blocks[:layer] for p in b.parameters())
    if cfg.random_init:  # nothing to learn from, only to measure: no tokenizer and no text are needed
        tokenizer, train = None, data.RandomTokens(lm.V, cfg.seq_len)
        held_out = train.windows(cfg.eval_batches, 1).to(world.device)
    else:
        tokenizer = backbone.load_tokenizer(model)
        shards, _ = data.shards_beside(cfg, tokenizer, world)
        train = data.Tokens(shards, "train", cfg.seq_len)
        held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches).to(world.device)  # (N, T+1)
    calibrate(lm, net, train.windows(cfg.calibration, cfg.seed)[:, :-1].to(world.device), layer, cfg.skip)
    run = Run(cfg, world, identity)
    mean_net = copy.deepcopy(net).requires_grad_(False)                                           # EMA
    run.say(f"layer {layer} of {lm.L}: {cfg.objective} bridge of {blocks} blocks of width {W}, {size:,} parameters"
            + (f" = {size / replaced:.2f}x the blocks it replaces" if layer else ""))

    # ---------------------------------------------------------------------------------------------- optimizer
    params = list(net.parameters())
    own = [p for name, p in net.named_parameters() if not name.startswith("readout")]  # the readout learns beside it
    optimizers = optim.build(net.named_parameters(), cfg.lr, cfg.lr_adam, cfg.weight_decay)
    state = run.resume([net, mean_net], optimizers)
    if cfg.compile:
        for block in net.blocks:
            block.compile(dynamic=False)                                    # in place: parameter names stay clean

    # --------------------------------------------------------------------------------------------------- loop
    flops = train_flops(net, replaced, layer, cfg.seq_len)
    overlap = cfg.overlap == "on" or cfg.overlap == "auto" and world.device.type == "cuda"
    gradients = GradientSum(params, world, overlap, cfg.bucket_mb * 1e6)
    stop, clock, waited = StopSignal(world), Clock(state["seconds"]), 0.0
    bins = torch.zeros(8, 2, dtype=torch.float64)                           # loss sum and count by noise level
    parts = [some.tolist() for some in torch.tensor(slots).split(micro)]    # this process's micro-batches

    def draw(key):
        """Tokens, noise level, noise and what is hidden of one micro-batch: functions of (seed, step, slot), whoever
        draws them."""
        step, some = key
        ids = train.batch(cfg.seed, step, some, cfg.batch_size)[:, :-1].to(world.device)          # (b, T)
        t = times(cfg.times, cfg.t_mean, cfg.seed, step, some).to(world.device)                   # (b,)
        noise = [normal((cfg.seq_len, D), world.device, cfg.seed, "noise", step, s) for s in some]
        seen = torch.tensor([cfg.self_condition and generator(cfg.seed, "self", step, s).random() < 0.5 for s in some])
        unknown = hide(cfg.visible, cfg.seq_len, cfg.seed, step, some)
        return ids, t, torch.stack(noise), seen.to(world.device), to(world.device, unknown)
    ready = data.prefetch(draw, ((step, some) for step in range(state["step"], cfg.steps) for some in parts))

    for step in range(state["step"], cfg.steps):
        loss, bad = 0.0, []
        for some in parts:
            # 1 a batch that a thread has drawn meanwhile
            waiting = time.perf_counter()
            ids, t, noise, seen, unknown = next(ready)
            waited += time.perf_counter() - waiting
            # 2 the two ends of the path, from the frozen prefix
            z, c = targets(lm, net, ids, layer)                                                   # (b, T, D) each
            # 3 gradient of the mean loss over the global batch
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                error, z_hat = token_loss(net, z, c, t, noise, cfg.skip, cfg.weighting, seen, unknown)
                each = error.mean(1)                                                              # (b,)
                total = each.sum()
                if net.generates:
                    total = total + readout_loss(net, z_hat, ids).mean(1).sum()
            if some is parts[-1]:
                gradients.arm()
            (total / cfg.batch_size).backward()
            each = each.detach().double().cpu()
            bad += [slot for slot, fine in zip(some, torch.isfinite(each).tolist()) if not fine]
            which = (t.cpu() * 8).long().clamp(max=7)
            bins.index_add_(0, which, torch.stack([each, torch.ones_like(each)], 1))
            loss += each.sum().item() / cfg.batch_size
        # 4 sum over processes, clip, step, running mean
        gradients.finish()
        norm = nn.utils.clip_grad_norm_(own, cfg.clip).item()
        if not math.isfinite(norm):  # on every process alike, before anything is changed
            where = f", slot {bad[0]}" if bad else ""
            raise UserError(f"the loss or its gradient stopped being finite at step {step}{where}; lower --lr and run "
                            f"again ({cfg.out} keeps the last good state)")
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown, cfg.schedule))
        decay = min(cfg.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean_net.parameters()), params, 1 - decay)
            for p in params:
                p.grad = None
        # 5 report, validate, save, leave when asked
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            total, *table = world.sum([loss, *bins.flatten().tolist()])
            table = torch.tensor(table).view(8, 2)
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, loss=total,
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm,
                         wait=waited / max(1e-9, clock.seconds() - state["seconds"]),
                         loss_by_t=(table[:, 0] / table[:, 1].clamp_min(1)).tolist(), count_by_t=table[:, 1].tolist())
            bins.zero_()
        if done % cfg.eval_every == 0 and done < cfg.steps:
            with clock.paused():
                run.log(done, cfg.steps, val_loss=validate(lm, mean_net, held_out, layer, cfg, world)[0])
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0:
            check_replicas([*params, *mean_net.parameters()], world)
            run.save(done, clock, [net, mean_net], optimizers)
        if leaving:
            run.leave(done)
    check_replicas([*params, *mean_net.parameters()], world)
    stop.done()
    seconds = clock.seconds()

    # ------------------------------------------------------------------------------------------------- result
    val_loss, named = validate(lm, mean_net, held_out, layer, cfg, world)
    if not world.main:  # the final numbers need the whole backbone: rank 0 alone loads it
        world.barrier()
        return None
    table, raw, ce = {}, {}, None
    if not cfg.random_init:  # a network of random weights has no upper blocks worth asking
        del lm  # the prefix is in it
        whole = backbone.load(model, world.device, dtype)
        nfes = sorted({*NFES, cfg.nfe}) if cfg.objective == "diffusion" else (1,)
        table, ce = measure(whole, mean_net, held_out, layer, nfes, cfg.noise_seeds, cfg.skip)
        raw, _ = measure(whole, net.requires_grad_(False), held_out, layer, nfes, 1, cfg.skip)
    mfu = cfg.steps * cfg.batch_size * cfg.seq_len / seconds * flops / (peak_flops(world.device) * world.size)
    settings = {"layer": layer, "objective": cfg.objective, "visible": cfg.visible, "seed": cfg.seed,
                "size_ratio": size / replaced if layer else None, "nfe_default": cfg.nfe, "model": model,
                "base": identity["base"]}
    save(mean_net, run.out, {**settings, "tokenizer": tokenizer and backbone.tokenizer_hash(tokenizer)})
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    run.finish({**settings, "nfe": table, "raw_nfe": raw, "val_loss": val_loss, "readout_accuracy": named,
                "ce_intact": ce, "parameters": size, "replaced_parameters": replaced, "steps": cfg.steps,
                "tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds,
                "mfu": mfu if math.isfinite(mfu) else None, "flops_per_token": flops,
                "eval_sequences": len(held_out), "noise_seeds": cfg.noise_seeds, "sampler": cfg.sampler})
    print_table(run.result)
    return run.result


if __name__ == "__main__":
    main()
