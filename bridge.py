"""REPLACE: train a diffusion bridge that generates h[l], so that blocks 1..l of the model can go.

    python bridge.py                            # the toy, at the layer that geometry.py chose
    python bridge.py --objective regression     # the control: same network, no diffusion
    python bridge.py --generate                 # also learns tokens it cannot see: for generate.py
    torchrun --nproc_per_node 8 bridge.py --layer 6 --preset 8b --model meta-llama/Llama-3.1-8B

The network, its loss and its sampler are in core/diffusion.py. Without --generate all tokens are
known. Then h[l] is a deterministic function of the input and plain regression is a serious rival.

Writes bridge.safetensors (running mean of the weights), bridge.json, log.jsonl and result.json.

Shapes: B batch, T tokens, D width of the backbone, V vocabulary, N held-out sequences. A slot is
the place of a sequence in the global batch; a micro-batch of this process has b of them.
"""
import copy
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

import data
from core import backbone, diffusion, optim
from core.common import (Dtype, UserError, entry, generator, normal, parse, pick_dtype, setup,
                         split_batch)
from core.diffusion import (Bridge, BridgeConfig, bridge_loss, calibrate, hidden_tokens,
                            noise_levels, position_noise, readout_loss, sample)
from core.run import TRACKERS, Run, finished, plan, read_json, training_flops


@dataclass
class Config:
    # what and where
    preset: backbone.Preset = "auto"  # auto: by model size
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = ""               # run folder (empty: out/bridge, regression, generator or bridge_lN)
    layer: str = "auto"         # the layer l; auto: the choice of geometry.py next to --out
    seed: int = 0               # every random number of the training is a function of it
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # auto: bf16 on a GPU
    compile: bool = False       # torch.compile, block by block
    dry_run: bool = False       # print size, memory and time of this training, then leave
    # what is learned
    objective: Literal["diffusion", "regression"] = "diffusion"  # regression: one call, no noise
    generate: bool = False      # the settings that generate.py needs (see PRESETS)
    visible: Literal["full", "mix"] = "full"  # the tokens that the bridge knows: all, or a part
    self_condition: bool = False  # the last estimate of h[l] is an input
    head_start: Literal["none", "tokens"] = "none"  # start from token means and a linear map
    sink: Literal["own", "shared"] = "own"  # units of position 0: its own, or those of the others
    # network
    depth: int = 0              # blocks of the bridge (0: the number that it replaces)
    recompute: bool = False     # activation checkpointing
    # optimisation
    steps: int = 400            # optimizer steps
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: its whole share)
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.02            # Muon, for the matrices inside the blocks (0: AdamW there too)
    lr_adam: float = 2e-3       # AdamW, for everything else
    warmup: int = 20            # steps (0: none)
    cooldown: float = 0.0       # share of the run in which the rate falls to zero
    ema: float = 0.995          # decay of the running mean of the weights
    skip: int = 4               # first positions: sinks, scaled and reported separately (0: none)
    calibration: int = 64       # sequences that set the units and the head start
    # measurement
    nfes: tuple[int, ...] = (1, 2, 4)  # network calls to measure; the last is the hybrid's default
    eval_batches: int = 512     # held-out sequences
    log_every: int = 50         # steps between log lines
    save_every: int = 200       # steps between checkpoints, each with a validation
    track: Literal[tuple(TRACKERS)] = ""  # log there, too


LARGE = dict(seq_len=1024, compile=True, lr=0.01, cooldown=1.0, save_every=500)
PRESETS = {
    "tiny": dict(steps=20, batch_size=4, seq_len=32, warmup=5, calibration=8, eval_batches=4,
                 log_every=10, save_every=10),
    "toy": dict(steps=300, head_start="tokens", sink="shared", calibration=1024, nfes=(1, 4)),
    "135m": dict(steps=300, batch_size=8, lr=0.0, head_start="tokens", calibration=1024,
                 nfes=(1, 4), eval_batches=128),
    "0.6b": dict(steps=5000, batch_size=32, lr_adam=6e-4, warmup=200, ema=0.999, **LARGE),
    "8b": dict(steps=20000, batch_size=256, micro_batch=8, dtype="bf16", lr_adam=3e-4, warmup=500,
               ema=0.9995, **LARGE),
}
GENERATE = dict(visible="mix", self_condition=True, cooldown=1.0, nfes=(8,))
GENERATE_PRESETS = {name: {**settings, **GENERATE} for name, settings in PRESETS.items()}
GENERATE_PRESETS["toy"] |= dict(depth=4, steps=800, batch_size=8, head_start="none",
                                calibration=64, eval_batches=64)
WEIGHT_DECAY = 0.01


# -------------------------------------------------------------------------------------------------
# Data parallelism by hand

class GradientSum:
    """Sums gradients over processes while the backward pass is still running.

    A gradient is sent as soon as it is complete. All processes complete them in the same order. The
    loss is divided by the global batch, so the sum is the gradient. There is no wrapper module, so
    parameter names stay clean."""

    def __init__(self, params, world):
        self.sending = False    # True in the last micro-batch: it completes the gradients
        self.works = []         # the all-reduces that run
        if world.size > 1:
            for p in params:
                p.register_post_accumulate_grad_hook(self.send)

    def send(self, p):
        if self.sending:
            self.works.append(dist.all_reduce(p.grad, async_op=True))

    def wait(self):
        for work in self.works:
            work.wait()
        self.works = []


# -------------------------------------------------------------------------------------------------
# One batch

def make_batch(cfg, train, D, device, step, slots):
    """Tokens ids (b, T), and their corruption: the other arguments of `bridge_loss`.

    Everything random is a function of (seed, step, slot) alone. So any number of processes and any
    micro-batch train the same weights."""
    ids = train.batch(cfg.seed, step, slots, cfg.batch_size)[:, :-1].to(device)
    noise = [normal((cfg.seq_len, D), device, cfg.seed, "noise", step, slot) for slot in slots]
    coins = [generator(cfg.seed, "self", step, slot).random() < 0.5 for slot in slots]
    return ids, {
        "t": noise_levels(cfg.seed, step, slots).to(device),                    # (b,)
        "noise": torch.stack(noise),                                            # (b, T, D)
        "self_conditioned": torch.tensor(coins, device=device),                 # (b,) bool
        "unknown": hidden_tokens(cfg.visible, ids, cfg.seed, step, slots)}


@torch.no_grad()
def both_ends(lm, layer, ids):
    """h[0] and h[l] (B, T, D) of the tokens: the frozen blocks 1..l run."""
    h0 = lm.embed(ids)
    return h0, lm.through(h0, 0, layer)


def batch_loss(lm, bridge, layer, cfg, ids, corruption):
    """(loss, its part that is the bridge's error), summed over the sequences ids (b, T)."""
    h0, hl = both_ends(lm, layer, ids)
    z = bridge.target(h0, hl)                                                   # (b, T, D)
    c = bridge.condition(h0, ids)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=cfg.dtype == "bf16"):
        error, z_hat = bridge_loss(bridge, z, c, skip=cfg.skip, **corruption)
        error = error.mean(1).sum()
        loss = error
        if bridge.config.generates:
            loss = loss + readout_loss(bridge, z_hat, ids)
    return loss, error.detach()


@torch.no_grad()
def validate(lm, bridge, layer, rows, cfg, world):
    """The mean error on held-out rows (N, T+1). Each has its own fixed noise and noise level."""
    total = 0.0
    for i in range(world.rank, len(rows), world.size):
        ids = rows[i:i + 1, :-1]
        corruption = {
            "t": torch.tensor([(i + 0.5) / len(rows)], device=ids.device),
            "noise": normal((1, cfg.seq_len, lm.D), ids.device, cfg.seed, "validate", i),
            "self_conditioned": ids.new_ones(1),
            "unknown": hidden_tokens(cfg.visible, ids, cfg.seed, 0, [i], "validate")}
        _, error = batch_loss(lm, bridge, layer, cfg, ids, corruption)
        total += error.item()
    return world.sum([total])[0] / len(rows)


# -------------------------------------------------------------------------------------------------
# Measurement

def check_sequences(rows):
    assert len(rows) > 1, "an error needs two held-out sequences: --eval_batches, or more text"


@torch.no_grad()
def measure(lm, bridge, layer, rows, calls, cfg):
    """Compare the hybrid with the intact model on held-out rows (N, T+1), positions >= cfg.skip.
    Every stage that measures a hybrid calls this function.

    fvu: unexplained share of the variance of z. kl: KL(intact || hybrid) of the next token, in
    nats. ce_intact: next-token loss of the intact model. ce_gap: loss of the hybrid less that, with
    _se, its standard error over sequences. agree: how often both have the same most likely token.
    kl_rows: kl of every sequence."""
    check_sequences(rows)
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
        for name, value in values.items():
            columns[name] += value[:, cfg.skip:].double().mean(1).tolist()
    result = {name: mean(column) for name, column in columns.items()}
    result["fvu"] = result.pop("error") / result.pop("energy")
    error = stdev(columns["ce_gap"]) / len(rows) ** 0.5
    return {**result, "ce_gap_se": error, "kl_rows": columns["kl"]}


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
    D = shape.hidden_size
    generates = cfg.visible != "full"
    torch.manual_seed(cfg.seed)
    return Bridge(BridgeConfig(
        D=D, W=D, depth=cfg.depth or max(1, layer), H=max(1, D // (64 if D >= 512 else 32)),
        V=shape.vocab_size, objective=cfg.objective, head_start=cfg.head_start,
        generates=generates, bidirectional=generates, self_condition=cfg.self_condition,
        sink=cfg.sink))


def count(module):
    return sum(p.numel() for p in module.parameters())


def flops_per_token(bridge, lm, layer, T):
    """Self-conditioning is one more forward pass. The readout's input needs no gradient."""
    config = bridge.config
    passes = 4 / 3 if config.self_condition else 1
    readout = config.D * config.V * config.generates
    trained = passes * (count(bridge) - readout)
    frozen = count(lm.blocks[:layer]) + 2 * readout
    layers = passes * len(bridge.blocks) + layer / 3    # a frozen block runs forward only
    return training_flops(trained, frozen, layers, lm.config, T)


def forecast(cfg, world, shape, layer, dtype):
    """--dry_run: what this training costs, from shapes alone."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(shape))
        bridge = build(cfg, shape, layer)
    trained = count(bridge)
    muon = count(bridge.blocks) if cfg.lr else 0        # one moment; AdamW has two
    frozen = count(lm) - count(lm.blocks[layer:])
    # Bytes per channel and token that wait for backward, traced at the 8B shape
    blocks = len(bridge.blocks)
    half = dtype == torch.bfloat16
    block = 100
    if half:
        block = 38 if cfg.compile else 62
    waiting = 41 + (block + 4 * blocks if cfg.recompute else block * blocks)
    logits = 8 * lm.V * bridge.config.generates             # bytes per token, of the readout
    copies = 2 * trained * (half and not cfg.recompute)     # bf16 weights, until backward
    tokens = cfg.seq_len * (cfg.micro_batch or cfg.batch_size // world.size)
    memory = {
        "lower blocks": frozen * dtype.itemsize,
        "weights": 4 * trained,
        "EMA": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained - 4 * muon,
        "activations": tokens * (lm.D * waiting + logits) + copies}
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
    presets = GENERATE_PRESETS if "--generate" in argv else PRESETS
    cfg = parse(Config, argv, __doc__, presets, backbone.preset_of)
    if not cfg.out:
        name = "generator" if cfg.generate else cfg.objective.replace("diffusion", "bridge")
        cfg.out = f"out/{name}" if cfg.layer == "auto" else f"out/{name}_l{cfg.layer}"
    assert cfg.skip < cfg.seq_len, "--skip must be below --seq_len"
    nfes = [1] if cfg.objective == "regression" else cfg.nfes
    if min(nfes, default=0) < 1:
        raise UserError("--nfes must be numbers from 1 on")
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)

    # Has this very run finished already?
    model = backbone.resolve(cfg.model, cfg.out)
    shape = backbone.read_config(model, cfg.seq_len)
    layer = choose_layer(cfg, shape.num_hidden_layers)
    if cfg.dry_run:
        return forecast(cfg, world, shape, layer, dtype)
    identity = {"layer_number": layer, "base": backbone.identity(model),
                "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        return show(result)

    # Data, the frozen lower blocks, the bridge
    tokenizer = backbone.load_tokenizer(model)
    train, held_out = data.splits(cfg, tokenizer, world, cfg.seq_len)
    if world.main:
        train.warn(cfg.steps, cfg.batch_size)
    held_out = held_out.windows(cfg.eval_batches).to(world.device)             # (N, T+1)
    check_sequences(held_out)
    lm = backbone.load(model, world.device, dtype, blocks=layer)
    bridge = build(cfg, shape, layer).to(world.device)
    bridge.recompute = cfg.recompute
    ids = train.windows(cfg.calibration, cfg.seed)[:, :-1].to(world.device)
    assert len(ids) > 1, "--calibration must be at least 2: the head start halves the sequences"
    set_units(lm, bridge, layer, ids, cfg.skip)
    ema = copy.deepcopy(bridge).requires_grad_(False)
    if cfg.compile:
        for block in [*lm.blocks, *bridge.blocks]:
            block.compile(dynamic=False)                # in place: parameter names stay as they are

    # Optimizers, resume
    run = Run(cfg, world, identity)
    named = list(bridge.named_parameters())
    optimizers = optim.build(named, cfg.lr, cfg.lr_adam, WEIGHT_DECAY, world=world)
    state = run.resume([bridge, ema], optimizers)
    clipped = [p for name, p in named if not name.startswith("readout")]
    slots, micro_batch = split_batch(cfg.batch_size, cfg.micro_batch, world)
    parts = [part.tolist() for part in torch.tensor(slots).split(micro_batch)]
    gradients = GradientSum(bridge.parameters(), world)
    tokens = cfg.batch_size * cfg.seq_len
    flops = flops_per_token(bridge, lm, layer, cfg.seq_len)
    run.say(f"layer {layer} of {lm.L}: {cfg.objective} bridge, {count(bridge):,} parameters")

    # The loop. A thread makes the batches, a few steps ahead.
    batches = data.prefetch(lambda key: make_batch(cfg, train, lm.D, world.device, *key),
                            product(range(state["step"], cfg.steps), parts))
    for step in run.steps(state["step"], cfg.steps):
        # 1. Gradient of the mean loss over the global batch, one micro-batch after another
        total = 0.0
        for part in parts:
            loss, error = batch_loss(lm, bridge, layer, cfg, *next(batches))
            gradients.sending = part is parts[-1]
            (loss / cfg.batch_size).backward()
            total += error
        gradients.wait()
        # 2. Clip and step
        norm = nn.utils.clip_grad_norm_(clipped, 1.0).item()
        share = optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown)
        optim.step_all(optimizers, share, norm, f"step {step}")
        # 3. Running mean of the weights
        update_ema(ema, bridge, cfg.ema, step)
        # 4. Log, validate, save, leave if asked to
        done = step + 1
        is_last = done == cfg.steps
        if done % cfg.log_every == 0 or is_last:
            loss = world.sum([total.item()])[0] / cfg.batch_size
            run.progress(done, cfg.steps, tokens, flops, loss=loss, gnorm=norm)
        saves = done % cfg.save_every == 0
        if saves and not is_last:
            with run.clock.paused():
                val_loss = validate(lm, ema, layer, held_out[:64], cfg, world)
                run.log(done, cfg.steps, val_loss=val_loss)
        run.save(saves or is_last, done, [bridge, ema], optimizers)

    # The result: rank 0 alone loads the whole backbone
    seconds = run.clock.seconds()
    val_loss = validate(lm, ema, layer, held_out[:64], cfg, world)
    if not world.main:
        return world.barrier()
    lm = backbone.load(model, world.device, dtype)
    info = {"layer": layer, "objective": cfg.objective, "visible": cfg.visible, "seed": cfg.seed,
            "model": model, "base": identity["base"], "seq_len": cfg.seq_len,
            "nfe_default": nfes[-1], "tokenizer": backbone.tokenizer_hash(tokenizer)}
    diffusion.save(ema, run.out, info)
    measured = {str(calls): measure(lm, ema, layer, held_out, calls, cfg) for calls in nfes}
    return show(run.finish({
        **info, "val_loss": val_loss, "parameters": count(bridge), "steps": cfg.steps,
        "seconds": seconds, "nfe": measured}))


if __name__ == "__main__":
    main()
