"""REPLACE: train a diffusion bridge that generates h[l], so that blocks 1..l of the model can go.

    python bridge.py                            # the toy, at the layer that geometry.py chose
    python bridge.py --objective regression     # the control: same network, no diffusion
    python bridge.py --generate                 # also learns tokens it cannot see: for generate.py
    torchrun --nproc_per_node 8 bridge.py --layer 6 --preset 8b --model meta-llama/Llama-3.1-8B

The network, its loss and its sampler are in core/diffusion.py. Without --generate all tokens are
known. Then h[l] is a deterministic function of the input and plain regression is a serious rival.

Writes bridge.safetensors (running mean of the weights), bridge.json, log.jsonl and result.json.

Shapes: B batch, T tokens, D width of the backbone, V vocabulary, N held-out sequences.
"""
import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

import data
from core import backbone, diffusion, optim
from core.common import (StopSignal, UserError, entry, generator, normal, parse, pick_dtype, setup,
                         split_batch)
from core.diffusion import (Bridge, BridgeConfig, bridge_loss, calibrate, hidden_tokens,
                            noise_levels, position_noise, readout_loss, sample)
from core.run import TRACKERS, Clock, Run, finished, plan, read_json


@dataclass
class Config:
    # what and where
    preset: Literal["auto", "tiny", "toy", "135m", "0.6b", "8b"] = "auto"  # auto: by model size
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = ""               # run folder (empty: out/bridge, regression, generator or bridge_lN)
    layer: str = "auto"         # the layer l; auto: the choice of geometry.py next to --out
    seed: int = 0               # every random number is a function of it
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU
    compile: bool = False       # torch.compile, block by block
    dry_run: bool = False       # print size, memory and time of this training, then leave
    # what is learned
    objective: Literal["diffusion", "regression"] = "diffusion"  # regression: one call, no noise
    generate: bool = False      # the settings that generate.py needs (see PRESETS)
    visible: Literal["full", "prefix", "span", "mix"] = "full"  # the tokens that the bridge knows
    self_condition: bool = False  # the last estimate of h[l] is an input
    head_start: Literal["none", "tokens"] = "none"  # start from token means and a linear map
    sink: Literal["own", "shared"] = "own"  # units of position 0: its own, or those of the others
    # network
    width: int = 0              # width of the bridge (0: the backbone's)
    depth: int = 0              # blocks of the bridge (0: as many as it replaces)
    recompute: bool = False     # activation checkpointing
    # optimisation
    steps: int = 400            # optimizer steps
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: its whole share)
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.02            # Muon, for the matrices inside the blocks (0: AdamW there too)
    lr_adam: float = 2e-3       # AdamW, for everything else
    warmup: int = 20            # steps
    cooldown: float = 0.0       # share of the run in which the rate falls to zero
    ema: float = 0.995          # decay of the running mean of the weights
    skip: int = 4               # first positions: attention sinks, scaled and reported separately
    calibration: int = 64       # sequences that set the units and the head start
    # measurement
    nfes: tuple[int, ...] = (1, 2, 4)  # network calls to measure; the last is the hybrid's default
    eval_batches: int = 512     # held-out sequences
    log_every: int = 50         # steps between log lines
    save_every: int = 200       # steps between checkpoints, each with a validation
    track: Literal[tuple(TRACKERS)] = ""  # log there, too


PRESETS = {
    "tiny": dict(steps=20, batch_size=4, seq_len=32, warmup=5, calibration=8, eval_batches=4,
                 log_every=10, save_every=10),
    "toy": dict(steps=300, head_start="tokens", sink="shared", calibration=1024, nfes=(1, 4)),
    "135m": dict(steps=300, batch_size=8, lr=0.0, head_start="tokens", calibration=1024,
                 nfes=(1, 4), eval_batches=128),
    "0.6b": dict(steps=5000, batch_size=32, seq_len=1024, compile=True, lr=0.01, lr_adam=6e-4,
                 warmup=200, cooldown=1.0, ema=0.999, save_every=500),
    "8b": dict(steps=20000, batch_size=256, micro_batch=8, seq_len=1024, compile=True,
               dtype="bf16", lr=0.01, lr_adam=3e-4, warmup=500, cooldown=1.0, ema=0.9995,
               save_every=500),
}
GENERATE = dict(visible="mix", self_condition=True, cooldown=1.0, nfes=(8,))
for name, settings in list(PRESETS.items()):
    PRESETS[f"{name}_generate"] = {**settings, **GENERATE}
PRESETS["toy_generate"] |= dict(depth=4, steps=800, batch_size=8, head_start="none",
                                calibration=64, eval_batches=64)
WEIGHT_DECAY = 0.01


def choose(cfg):
    """The name of the preset."""
    size = cfg.preset
    if size == "auto":
        size = backbone.preset_of(cfg.model, cfg.out or "out/bridge")
    return f"{size}_generate" if cfg.generate else size


# -------------------------------------------------------------------------------------------------
# Data parallelism by hand

class GradientSum:
    """Sums gradients over processes; with NCCL while the backward pass is still running.

    Gradients live in flat buckets, filled from the last parameter to the first: the order in which
    backward finishes them. NCCL sends a bucket as soon as it is complete. gloo sends all buckets
    after backward, since both would compete for the processor. All processes send the buckets in
    the same order. A parameter without a gradient counts as zero. The loss is divided by the global
    batch, so the sum is the gradient. There is no wrapper module, so parameter names stay clean."""

    def __init__(self, params, world, bucket_bytes=25e6):
        self.overlap = world.device.type == "cuda"
        self.sending = False
        self.buckets = []       # (flat gradient, its parameters)
        self.views = {}         # parameter -> its part of a flat gradient
        self.works = []         # the all-reduces of the buckets that were sent
        groups = defaultdict(list)
        offset = 0
        for p in reversed(params if world.size > 1 else []):
            groups[offset // bucket_bytes].append(p)
            offset += p.nbytes
        for number, group in enumerate(groups.values()):
            sizes = [p.numel() for p in group]
            flat = group[0].new_zeros(sum(sizes))
            self.buckets.append((flat, group))
            for p, part in zip(group, flat.split(sizes)):
                self.views[p] = part.view_as(p)
                p.register_post_accumulate_grad_hook(partial(self.ready, number))

    def start(self):
        """Call before the backward pass of the last micro-batch: buckets may be sent from now."""
        self.sending = self.overlap
        self.missing = [len(group) for _, group in self.buckets]

    def ready(self, number, p):
        """Hook: the gradient of p, in bucket `number`, is complete for this micro-batch."""
        if p.grad is not self.views[p]:                 # the first micro-batch makes a fresh tensor
            p.grad = self.views[p].copy_(p.grad)
        if self.sending:
            self.missing[number] -= 1
            self.send()

    def send(self):
        """Send the next buckets, in order, as far as they are complete."""
        while len(self.works) < len(self.buckets) and self.missing[len(self.works)] == 0:
            flat, _ = self.buckets[len(self.works)]
            self.works.append(dist.all_reduce(flat, async_op=True))

    def finish(self):
        """Send the other buckets and wait until all gradients are summed."""
        for p, view in self.views.items():
            if p.grad is not view:                      # it got no gradient in this step
                p.grad = view.zero_()
        self.missing = [0] * len(self.buckets)
        self.send()
        for work in self.works:
            work.wait()
        self.works = []
        self.sending = False


# -------------------------------------------------------------------------------------------------
# One batch

@dataclass
class Batch:
    """One micro-batch of b sequences."""
    ids: torch.Tensor           # (b, T)
    t: torch.Tensor             # (b,) noise level
    noise: torch.Tensor         # (b, T, D)
    self_conditioned: torch.Tensor  # (b,) bool: sees the network's own first estimate
    unknown: torch.Tensor       # (b, T) bool, or None: all tokens are known


def make_batch(cfg, train, D, device, step, slots):
    """Everything random about these slots of the batch: a function of (seed, step, slot) alone, so
    any number of processes and any micro-batch train the same weights."""
    ids = train.batch(cfg.seed, step, slots, cfg.batch_size)[:, :-1].to(device)
    shape = (cfg.seq_len, D)
    noise = [normal(shape, device, cfg.seed, "noise", step, slot) for slot in slots]
    coins = [generator(cfg.seed, "self", step, slot).random() < 0.5 for slot in slots]
    return Batch(
        ids=ids,
        t=noise_levels(cfg.seed, step, slots).to(device),
        noise=torch.stack(noise),
        self_conditioned=torch.tensor(coins, device=device),
        unknown=hidden_tokens(cfg.visible, ids, cfg.seed, step, slots))


@torch.no_grad()
def both_ends(lm, layer, ids):
    """h[0] and h[l] (B, T, D) of the tokens: the frozen blocks 1..l run."""
    h0 = lm.embed(ids)
    return h0, lm.through(h0, 0, layer)


def batch_loss(lm, bridge, layer, cfg, batch):
    """(loss summed over the sequences, error of each sequence (b,))."""
    h0, hl = both_ends(lm, layer, batch.ids)
    z = bridge.target(h0, hl)                                                   # (b, T, D)
    c = bridge.condition(h0, batch.ids)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=cfg.dtype == "bf16"):
        error, z_hat = bridge_loss(bridge, z, c, batch.t, batch.noise, cfg.skip,
                                   batch.self_conditioned, batch.unknown)
        error = error.mean(1)                                                   # (b,)
        loss = error.sum()
        if bridge.config.generates:
            loss = loss + readout_loss(bridge, z_hat, batch.ids).mean(1).sum()
    return loss, error.detach()


@torch.no_grad()
def validate(lm, bridge, layer, rows, cfg, world):
    """Training loss on held-out rows (N, T+1), each with its own fixed noise and noise level."""
    total = 0.0
    for i in range(world.rank, len(rows), world.size):
        ids = rows[i:i + 1, :-1]
        t = torch.tensor([(i + 0.5) / len(rows)], device=ids.device)
        noise = normal((1, cfg.seq_len, lm.D), ids.device, cfg.seed, "validate", i)
        unknown = hidden_tokens(cfg.visible, ids, cfg.seed, 0, [i], "validate")
        batch = Batch(ids, t, noise, t > 0, unknown)
        _, error = batch_loss(lm, bridge, layer, cfg, batch)
        total += error.item()
    return world.sum([total])[0] / len(rows)


# -------------------------------------------------------------------------------------------------
# Measurement

@torch.no_grad()
def measure(lm, bridge, layer, rows, calls, cfg):
    """Compare the hybrid with the intact model on held-out rows (N, T+1), positions >= cfg.skip.
    Every stage that measures a hybrid calls this function.

    fvu: unexplained share of the variance of z. kl: KL(intact || hybrid) of the next token, in
    nats. ce_intact: next-token loss of the intact model. ce_gap: loss of the hybrid less that, with
    _se, its standard error over sequences. agree: how often both have the same most likely token.
    readout_accuracy: how often the readout names the token from the true z. _rows: a number per
    sequence."""
    noise = position_noise(0, range(rows.shape[1] - 1), lm.D, rows.device)      # (T, D)
    columns = defaultdict(list)
    for ids in rows.split(1 if lm.V > 2 ** 16 else 8):          # the logits must fit the memory
        inputs = ids[:, :-1]
        targets = ids[:, 1:, None]
        # 1. h[l] of the intact model, and the bridge's
        h0, hl = both_ends(lm, layer, inputs)
        z = bridge.target(h0, hl)
        z_hat = sample(bridge, bridge.condition(h0, inputs), calls, noise)
        hl_hat = bridge.restore(h0, z_hat).to(hl.dtype)
        # 2. What the upper blocks predict from both
        intact = lm.head(lm.through(hl, layer, lm.L)).float().log_softmax(-1)   # (b, T, V)
        hybrid = lm.head(lm.through(hl_hat, layer, lm.L)).float().log_softmax(-1)
        gap = intact - hybrid
        # 3. Numbers of every token (b, T), averaged over positions
        values = {"error": (z_hat - z).square().sum(-1), "energy": z.square().sum(-1),
                  "kl": (intact.exp() * gap).sum(-1),
                  "ce_gap": gap.gather(-1, targets)[..., 0],
                  "ce_intact": -intact.gather(-1, targets)[..., 0],
                  "agree": intact.argmax(-1) == hybrid.argmax(-1)}
        if bridge.config.generates:
            values["readout_accuracy"] = bridge.readout(z).argmax(-1) == inputs
        for name, value in values.items():
            columns[name] += value[:, cfg.skip:].double().mean(1).tolist()
    result = {name: mean(column) for name, column in columns.items()}
    result["fvu"] = result.pop("error") / result.pop("energy")
    spread = stdev(columns["ce_gap"]) if len(rows) > 1 else 0.0
    return {**result, "ce_gap_se": spread / len(rows) ** 0.5,
            "kl_rows": columns["kl"], "ce_gap_rows": columns["ce_gap"]}


def show(result):
    """Print the result of a run and return it."""
    print(f"layer {result['layer']}, {result['objective']}, {result['parameters']:,} parameters")
    for calls, row in result["nfe"].items():
        print(f"NFE {calls}: FVU {row['fvu']:.4f}, KL {row['kl']:.4f}, CE gap {row['ce_gap']:+.4f} "
              f"+- {row['ce_gap_se']:.4f} nats, agreement {row['agree']:.1%}")
    return result


# -------------------------------------------------------------------------------------------------
# Main

def choose_layer(cfg, L):
    layer = cfg.layer
    if layer == "auto":
        file = Path(cfg.out).parent / "geometry" / "result.json"
        layer = read_json(file, "run python geometry.py first, or pass --layer N")["best_layer"]
    lowest = 1 if cfg.visible == "full" else 0          # h[0] is worth generating only if hidden
    if str(layer) not in [str(i) for i in range(lowest, L + 1)]:
        raise UserError(f"--layer {layer} must be auto or lie in {lowest}..{L}")
    return int(layer)


def build(cfg, shape, layer):
    """An untrained bridge, a function of the seed. `shape` is the backbone's config."""
    width = cfg.width or shape.hidden_size
    heads = max(1, width // (64 if width >= 512 else 32))
    if width % (2 * heads):
        raise UserError(f"--width {width} does not split into {heads} heads of an even size")
    torch.manual_seed(cfg.seed)
    return Bridge(BridgeConfig(
        D=shape.hidden_size, W=width, depth=cfg.depth or max(1, layer), H=heads,
        V=shape.vocab_size, objective=cfg.objective, head_start=cfg.head_start,
        generates=cfg.visible != "full", bidirectional=cfg.visible != "full",
        self_condition=cfg.self_condition, sink=cfg.sink))


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


def flops_per_token(bridge, lm, layer, T):
    trained = count(bridge.parameters())
    replaced = count(lm.blocks[:layer].parameters())
    layers = len(bridge.blocks) + layer / 3             # a frozen block runs forward only
    return backbone.training_flops(trained, replaced, layers, lm.config, T)


def forecast(cfg, world, shape, layer):
    """--dry_run: what this training costs, from shapes alone. For the 8b preset on 8 processes."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(shape))
        bridge = build(cfg, shape, layer)
    if cfg.preset.startswith("8b"):
        world.size = max(world.size, 8)
    trained = count(bridge.parameters())
    weights = count(bridge.state_dict().values())
    muon = count(bridge.blocks.parameters()) if cfg.lr else 0   # one moment; AdamW has two
    frozen = count(lm.parameters()) - count(lm.blocks[layer:].parameters())
    # Bytes per channel, token and block that wait for backward, traced at the 8B shape
    waiting = 62 if cfg.dtype == "bf16" else 100
    blocks = len(bridge.blocks)
    channels = lm.D * 41 + bridge.config.W * waiting * blocks
    if cfg.recompute:
        channels = lm.D * 41 + bridge.config.W * (waiting + 4 * blocks)
    tokens = cfg.seq_len * (cfg.micro_batch or cfg.batch_size // world.size)
    memory = {"lower blocks": frozen * (2 if cfg.dtype == "bf16" else 4), "weights": 4 * weights,
              "EMA": 4 * weights, "gradients": 4 * trained, "optimizer": 8 * trained - 4 * muon,
              "activations": tokens * channels}
    flops = flops_per_token(bridge, lm, layer, cfg.seq_len)
    return plan(cfg, world, trained, flops, cfg.steps * cfg.batch_size * cfg.seq_len, memory)


def set_units(lm, bridge, layer, ids, skip):
    """Calibrate the bridge on tokens ids (N, T)."""
    ends = [both_ends(lm, layer, part) for part in ids.split(8)]
    h0, hl = map(torch.cat, zip(*ends))                                         # (N, T, D)
    calibrate(bridge, h0, hl, ids, skip)


@torch.no_grad()
def update_ema(ema, bridge, decay, step):
    decay = min(decay, (1 + step) / (10 + step))        # short memory at first
    torch._foreach_lerp_(list(ema.parameters()), list(bridge.parameters()), 1 - decay)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, choose)
    if not cfg.out:
        name = "generator" if cfg.generate else cfg.objective.replace("diffusion", "bridge")
        cfg.out = f"out/{name}" if cfg.layer == "auto" else f"out/{name}_l{cfg.layer}"
    if min(cfg.nfes, default=0) < 1 or cfg.skip >= cfg.seq_len:
        raise UserError("--nfes must be numbers from 1 on, and --skip must be below --seq_len")
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)

    # Has this very run finished already?
    model = backbone.resolve(cfg.model, cfg.out)
    shape = backbone.read_config(model, cfg.seq_len)
    layer = choose_layer(cfg, shape.num_hidden_layers)
    if cfg.dry_run:
        return forecast(cfg, world, shape, layer)
    identity = {"layer_number": layer, "base": backbone.identity(model)}
    result = finished(cfg, identity)
    if result:
        return show(result)

    # Data, the frozen lower blocks, the bridge
    tokenizer = backbone.load_tokenizer(model)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    train = data.Tokens(shards, "train", cfg.seq_len)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches).to(world.device)
    lm = backbone.load(model, world.device, dtype, blocks=layer)
    bridge = build(cfg, shape, layer).to(world.device)
    bridge.recompute = cfg.recompute
    ids = train.windows(cfg.calibration, cfg.seed)[:, :-1].to(world.device)
    set_units(lm, bridge, layer, ids, cfg.skip)
    ema = copy.deepcopy(bridge).requires_grad_(False)
    if cfg.compile:
        for block in [*lm.blocks[:layer], *bridge.blocks]:
            block.compile(dynamic=False)                # in place: parameter names stay as they are

    # Optimizers, resume
    run = Run(cfg, world, identity)
    named = dict(bridge.named_parameters())
    optimizers = optim.build(named.items(), cfg.lr, cfg.lr_adam, WEIGHT_DECAY, world=world)
    state = run.resume([bridge, ema], optimizers)
    clipped = [p for name, p in named.items() if not name.startswith("readout")]
    slots, micro_batch = split_batch(cfg.batch_size, cfg.micro_batch, world)
    parts = [part.tolist() for part in torch.tensor(slots).split(micro_batch)]
    gradients = GradientSum(list(named.values()), world)
    tokens = cfg.batch_size * cfg.seq_len
    flops = flops_per_token(bridge, lm, layer, cfg.seq_len)
    stop = StopSignal(world)
    clock = Clock(state["seconds"])
    size = count(named.values())
    run.say(f"layer {layer} of {lm.L}: {cfg.objective} bridge, {size:,} parameters")

    # The loop. A thread makes the batches, a few steps ahead.
    steps = range(state["step"], cfg.steps)
    batches = data.prefetch(lambda key: make_batch(cfg, train, lm.D, world.device, *key),
                            product(steps, parts))
    for step in steps:
        # 1. Gradient of the mean loss over the global batch, one micro-batch after another
        errors = []
        for part in parts:
            loss, error = batch_loss(lm, bridge, layer, cfg, next(batches))
            if part is parts[-1]:
                gradients.start()
            (loss / cfg.batch_size).backward()
            errors.append(error)
        gradients.finish()
        # 2. Clip and step
        norm = nn.utils.clip_grad_norm_(clipped, 1.0).item()
        share = optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown)
        optim.step_all(optimizers, share, norm, f"step {step}")
        # 3. Running mean of the weights
        update_ema(ema, bridge, cfg.ema, step)
        # 4. Log, validate, save, leave if asked to
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            loss = world.sum([torch.cat(errors).sum().item() / cfg.batch_size])[0]
            run.progress(done, cfg.steps, clock, tokens, flops, loss=loss, gnorm=norm)
        if done % cfg.save_every == 0 and done < cfg.steps:
            with clock.paused():
                val_loss = validate(lm, ema, layer, held_out[:64], cfg, world)
                run.log(done, cfg.steps, val_loss=val_loss)
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0 or done == cfg.steps:
            run.save(done, clock, [bridge, ema], optimizers)
        if leaving:
            run.leave(done)
    stop.done()

    # The result: rank 0 alone loads the whole backbone
    val_loss = validate(lm, ema, layer, held_out[:64], cfg, world)
    if not world.main:
        return world.barrier()
    lm = backbone.load(model, world.device, dtype)
    info = {"layer": layer, "objective": cfg.objective, "visible": cfg.visible, "seed": cfg.seed,
            "model": model, "base": identity["base"], "seq_len": cfg.seq_len,
            "nfe_default": 1 if cfg.objective == "regression" else cfg.nfes[-1],
            "tokenizer": backbone.tokenizer_hash(tokenizer)}
    diffusion.save(ema, run.out, info)
    nfes = [1] if cfg.objective == "regression" else cfg.nfes
    measured = {str(calls): measure(lm, ema, layer, held_out, calls, cfg) for calls in nfes}
    return show(run.finish({
        **info, "val_loss": val_loss, "parameters": size, "steps": cfg.steps,
        "tokens": cfg.steps * tokens, "seconds": clock.seconds(), "eval_sequences": len(held_out),
        "nfe": measured}))


if __name__ == "__main__":
    main()
