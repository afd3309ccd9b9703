"""bridge.py: REPLACE. Train a conditional diffusion bridge that produces h[l], so that blocks 1..l can go.

    python bridge.py --out out/mine                              # the toy at the layer geometry chose: ~1 min, 2 cores
    torchrun --nproc_per_node 2 bridge.py --layer 2 --model out/toy    # on CPU too: same weights to rounding
    torchrun --nproc_per_node 8 bridge.py --layer 6 --preset 8b --model meta-llama/Llama-3.1-8B
    python bridge.py --preset blocks --layer 1 --blocks 4 --out out/blocks1   # meets unknown tokens: for generate.py

The maths is in core/diffusion.py, the network in core/denoiser.py, the numbers (FVU, KL, CE gap) in core/measure.py.
Expected on the default toy: next-token CE less than 0.01 nats above the intact model's. All tokens are known, so h[l]
is a deterministic function of the input and plain regression (`--objective regression`) is a serious rival: train both
and look. Writes bridge.safetensors (EMA weights), bridge.json, log.jsonl, section.md and result.json to --out.

Letters: B batch, T tokens, D hidden width of the backbone, W width of the bridge, L blocks of the backbone, H heads,
l the replaced layer, z the standardised h[l], c the standardised h[0].
"""
import contextlib
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

import data
from core import backbone, cache, denoiser, optim
from core.common import GradientSum, StopSignal, UserError, check_replicas, entry, parse, pick_dtype, setup, split_batch
from core.denoiser import Bridge, calibrate, targets
from core.diffusion import SAMPLERS, TIMES, hide, readout_loss, times, token_loss
from core.draws import generator, normal
from core.measure import NOISE_ROWS, most_that_fits, numbers, report_size, section, summary, train_flops
from core.run import TRACKERS, Clock, Run, finished, read_json


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "blocks", "135m", "0.6b", "8b"] = "auto"  # auto: by the model's size
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = ""               # run folder [out/bridge, or out/bridge_lN when --layer N is given]
    layer: str = "auto"         # auto: geometry's choice beside --out; 1..L (0 with --visible: embeddings)
    seed: int = 0               # every draw is keyed by it
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the frozen backbone and of autocast
    cache_states: str = ""      # folder to keep h[l] of the training text in, for other runs of this seed (empty: none)
    compile: bool = False       # torch.compile the frozen prefix and the bridge, block by block
    random_init: bool = False   # a backbone of this shape with random weights: for throughput without a download
    visible: Literal["full", "prefix", "span", "mix"] = "full"  # which tokens are known; mix: some of each
    bidirectional: bool = False  # let unknown tokens see each other and what follows (needed to fill a span)
    objective: Literal["diffusion", "regression"] = "diffusion"  # regression: the same network, once, without noise
    prediction: Literal["x", "v"] = "x"  # what the network outputs: z, or e - z
    source: Literal["noise", "embedding"] = "noise"  # e ~ N(0, I), or c + noise / 2: a bridge between the two ends
    times: Literal[tuple(TIMES)] = "logit-normal"  # law of t in training
    t_mean: float = 0.7         # mean of logit t; above 0 trains more near t = 1, where sampling starts
    sink: Literal["own", "shared"] = "own"  # units of h[l] at position 0, an attention sink: its own, or the others'
    head_start: Literal["none", "ridge", "tokens"] = "none"  # a ridge of h[0], or of it and its token's mean h[l]
    self_condition: bool = False  # feed the last estimate of z back in (half of the time in training)
    width: int = 0              # W (0: D)
    blocks: int = 0             # of the bridge (0: as many as it replaces)
    recompute: bool = False     # activation checkpointing: less memory, a third more compute; on its own if needed
    overlap: Literal["auto", "on", "off"] = "auto"  # send gradients during backward; auto: with NCCL, not with gloo
    bucket_mb: float = 25.0     # size of the buckets in which they are sent
    ema: float = 0.995          # decay of the weights' running mean, reached by min(ema, (1+k)/(10+k))
    steps: int = 400            # optimizer steps
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: what fits a GPU; on a CPU its whole share)
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.02            # Muon, for the matrices inside the blocks (0: AdamW there too)
    lr_adam: float = 2e-3       # AdamW, for everything else
    weight_decay: float = 0.01  # decoupled
    warmup: int = 20            # steps
    cooldown: float = 0.0       # share of the run in which the rate descends to zero; 0: --ema settles it, see LOG.md
    skip: int = 4               # first positions of a sequence (attention sinks): own loss scale, reported apart
    calibration: int = 64       # sequences for mu, sigma and the head start
    sampler: Literal[tuple(SAMPLERS)] = "euler"  # of the final numbers, and the hybrid's default; not of training
    shift: float = 1.0          # of its grid: 1 is even in t, above 1 spends more calls near t = 1
    nfe: int = 4                # its network calls
    nfes: str = "1,2,4,8"       # numbers of calls that are measured, beside --nfe
    eval_batches: int = 512     # held-out sequences of the final numbers
    noise_seeds: int = 3        # sampler noises whose spread is reported (on the first 64 sequences)
    eval_every: int = 200       # steps between validations
    log_every: int = 50         # steps between log lines
    save_every: int = 200       # steps between checkpoints
    track: Literal[tuple(TRACKERS)] = ""  # also log there (an optional package)
    keep_state: bool = False    # keep the training state of a finished run, to go on to more --steps later
    dry_run: bool = False       # print sizes and cost, then leave
    MEASURES = ("sampler", "shift", "nfe", "nfes", "eval_batches", "noise_seeds")  # no part of what is trained


PRESETS = {
    "tiny": {"steps": 20, "batch_size": 4, "seq_len": 32, "calibration": 8, "eval_batches": 4, "eval_every": 10,
             "save_every": 10, "log_every": 10, "warmup": 5},
    "toy": {"head_start": "tokens", "calibration": 1024, "sink": "shared"},
    # run_all.sh spells these out: those are the published numbers
    "blocks": {"visible": "mix", "bidirectional": True, "self_condition": True, "batch_size": 8, "steps": 800,
               "noise_seeds": 1, "sink": "shared", "cooldown": 1.0},         # constant draws worse text: LOG.md
    "135m": {"steps": 300, "batch_size": 8, "calibration": 1024, "head_start": "tokens", "nfes": "1,4",
             "noise_seeds": 1, "eval_batches": 128, "lr": 0.0},    # minutes on two cores; Muon: half of a step, LOG.md
    "0.6b": {"steps": 5000, "batch_size": 32, "seq_len": 1024, "compile": True, "ema": 0.999,
             "lr": 0.01, "lr_adam": 6e-4, "warmup": 200, "cooldown": 1.0, "eval_every": 1000, "save_every": 500},
    "8b": {"steps": 20000, "batch_size": 256, "seq_len": 1024, "compile": True, "ema": 0.9995,
           "lr": 0.01, "lr_adam": 3e-4, "warmup": 500, "cooldown": 1.0, "eval_every": 2000, "save_every": 500},
}


# ---------------------------------------------------------------------------------------------- one micro-batch
class Batch(NamedTuple):
    """One micro-batch of b sequences; all of it is a function of (seed, step, slot), whoever draws it."""
    ids: torch.Tensor           # (b, T)
    t: torch.Tensor             # (b,) noise level
    noise: torch.Tensor         # (b, T, D)
    seen: torch.Tensor          # (b,) bool: shown the network's own first estimate
    unknown: torch.Tensor       # (b, T) bool, or None: every token is known
    state: torch.Tensor         # (b, T, D) h[l] from --cache_states, or None: the prefix makes it


def draw(cfg, train, states, D, device, step, slots):
    """The Batch of these slots at `step`; `states` are those of core/cache.py, or None."""
    ids = train.batch(cfg.seed, step, slots, cfg.batch_size)[:, :-1]
    t = times(cfg.times, cfg.t_mean, cfg.seed, step, slots)
    noise = torch.stack([normal((cfg.seq_len, D), device, cfg.seed, "noise", step, s) for s in slots])
    seen = torch.tensor([cfg.self_condition and generator(cfg.seed, "self", step, s).random() < 0.5 for s in slots])
    kept = states and states.rows([step * cfg.batch_size + s for s in slots])
    parts = ids, t, noise, seen, hide(cfg.visible, cfg.seq_len, cfg.seed, step, slots), kept
    return Batch(*(None if part is None else part.to(device) for part in parts))


def losses(lm, net, batch, layer, cfg, dtype):
    """(the loss summed over the batch's sequences, error of each sequence (b,)).

    1 the two ends of the path, from the frozen prefix  2 the bridge's error  3 the readout's, beside it."""
    z, c = targets(lm, net, batch.ids, layer, batch.state)                             # (b, T, D) each
    with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
        error, z_hat = token_loss(net, z, c, batch.t, batch.noise, cfg.skip, batch.seen, batch.unknown)
        each = error.mean(1)                                                           # (b,)
        total = each.sum()
        if net.generates:
            total = total + readout_loss(net, z_hat, batch.ids).mean(1).sum()
    return total, each.detach()


@torch.no_grad()
def validate(lm, net, rows, layer, cfg, world):
    """(training loss, share of tokens that the readout names from the true z or None) on held-out rows (N, T+1), shared
    out over the processes: t on an even grid, noise with its own key, so that how often this runs changes nothing."""
    total = torch.zeros(2, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():    # for single rows
        for i in range(world.rank, len(rows), world.size):
            ids = rows[i:i + 1, :-1]
            z, c = targets(lm, net, ids, layer)
            t = torch.tensor([(i + 0.5) / len(rows)], device=world.device)
            noise = normal(z.shape, world.device, cfg.seed, "validate", i)
            unknown = hide(cfg.visible, cfg.seq_len, cfg.seed, 0, [i], "validate")
            loss, _ = token_loss(net, z, c, t, noise, cfg.skip, torch.ones_like(t),
                                 None if unknown is None else unknown.to(world.device))
            named = (net.readout(z).argmax(-1) == ids).float().mean() if net.generates else 0.0
            total += torch.tensor([loss.mean().item(), float(named)])
    loss, named = world.sum((total / len(rows)).tolist())
    return loss, named if net.generates else None


# ------------------------------------------------------------------------------------------------------- choices
def choose_layer(cfg):
    """--layer -> a number. `auto` is what geometry.py wrote beside --out."""
    if cfg.layer == "auto":
        return read_json(Path(cfg.out).parent / "geometry" / "result.json",
                         "run python geometry.py first, or pass --layer N")["best_layer"]
    if not cfg.layer.isdigit():
        raise UserError(f"--layer {cfg.layer} must be auto or a number")
    return int(cfg.layer)


def check(cfg):
    """Raise UserError for flags that make no sense, alone or together."""
    for name, fine, want in (
            ("ema", 0 <= cfg.ema < 1, "lie in [0, 1)"), ("skip", 0 <= cfg.skip < cfg.seq_len, "be below --seq_len"),
            ("calibration", cfg.head_start != "tokens" or cfg.calibration > 1, "be 2 or more: tokens halve them"),
            ("shift", cfg.shift > 0, "be above 0"), ("bucket_mb", cfg.bucket_mb > 0, "be above 0"),
            ("nfes", all(n.isdigit() and int(n) > 0 for n in cfg.nfes.split(",")), "be numbers such as 1,2,4,8")):
        if not fine:
            raise UserError(f"--{name} {getattr(cfg, name)} must {want}")
    if cfg.bidirectional and cfg.visible == "full":
        raise UserError("--bidirectional would let the replaced layer see the future; it needs --visible prefix, span "
                        "or mix")
    if cfg.cache_states and cfg.random_init:
        raise UserError("--cache_states keeps the states of a real text: not with --random_init")
    if cfg.head_start != "none" and (cfg.prediction, cfg.source) != ("x", "noise"):
        raise UserError(f"--head_start {cfg.head_start} is a first guess of z: with --prediction {cfg.prediction} and "
                        f"--source {cfg.source} choose --head_start none")


def build(cfg, shape, layer):
    """The untrained Bridge, a function of cfg.seed. Raises UserError for a layer or a width that cannot be."""
    first = 1 if cfg.visible == "full" else 0  # h[0] is worth producing only where tokens are unknown
    if not first <= layer <= shape.num_hidden_layers:
        raise UserError(f"--layer {layer} must lie in {first}..{shape.num_hidden_layers}, the blocks of {cfg.model}")
    W, blocks = cfg.width or shape.hidden_size, cfg.blocks or max(1, layer)
    each = 64 if W >= 512 else 32
    H = max(1, W // each)
    if W % (2 * H):
        raise UserError(f"--width {W} does not split into {H} heads; use a multiple of {each}")
    torch.manual_seed(cfg.seed)
    return Bridge(shape.hidden_size, W, blocks, H, cfg.objective, cfg.prediction, cfg.source, cfg.self_condition,
                  cfg.visible, cfg.bidirectional, shape.vocab_size, head_start=cfg.head_start, sink=cfg.sink)


def texts(cfg, model, vocab, world):
    """(tokenizer, training windows, held-out rows (N, T+1))."""
    if cfg.random_init:  # nothing to learn from, only to measure: no tokenizer and no text are needed
        train = data.RandomTokens(vocab, cfg.seq_len)
        return None, train, train.windows(cfg.eval_batches, 1).to(world.device)
    tokenizer = backbone.load_tokenizer(model)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches)
    return tokenizer, data.Tokens(shards, "train", cfg.seq_len), held_out.to(world.device)


def keep_states(cfg, lm, train, layer, identity, world):
    """--cache_states: what core/cache.py keeps of the layer, written where it is missing; None without the flag."""
    if not cfg.cache_states:
        return None
    if world.main:
        cache.write(cfg.cache_states, lm, train, [layer], cfg, identity["base"])
    world.barrier()
    return cache.States(cfg.cache_states, layer)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of(cfg.model, cfg.out))
    cfg.out = cfg.out or ("out/bridge" if cfg.layer == "auto" else f"out/bridge_l{cfg.layer}")
    check(cfg)

    # -------------------------------------------------------------------------------------------------- setup
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    world.size = max(world.size, 8 * (cfg.dry_run and cfg.preset == "8b" and not cfg.micro_batch))   # the headline's
    slots, micro = split_batch(cfg.batch_size, cfg.micro_batch, world)
    model = backbone.resolve(cfg.model, cfg.out)
    layer = choose_layer(cfg)
    identity = {"layer_number": layer, "base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(f"{cfg.out} is finished: " + summary(result))
        return result
    shape = backbone.read_config(model, cfg.seq_len)
    with torch.device("meta" if cfg.dry_run else "cpu"):
        net = build(cfg, shape, layer)
    auto = not cfg.micro_batch and (cfg.dry_run or world.device.type == "cuda")
    micro, recompute = most_that_fits(cfg, net, shape, layer, world, micro, dtype) if auto else (micro, cfg.recompute)
    if cfg.dry_run:
        return report_size(cfg, net, shape, layer, world, micro, dtype, recompute)

    # -------------------------------------------------------------------------------------------- model, data
    net, net.recompute = net.to(world.device), recompute
    lm = backbone.load(model, world.device, dtype, blocks=layer, random_init=cfg.random_init)     # only the prefix
    tokenizer, train, held_out = texts(cfg, model, lm.V, world)
    states = keep_states(cfg, lm, train, layer, identity, world)
    windows = train.windows(cfg.calibration, cfg.seed)[:, :-1].to(world.device)
    calibrate(lm, net, windows, layer, cfg.skip, states and states.calibration(windows).to(world.device))
    run = Run(cfg, world, identity)
    mean_net = copy.deepcopy(net).requires_grad_(False)                                           # EMA
    params = list(net.parameters())
    own = [p for name, p in net.named_parameters() if not name.startswith("readout")]  # the readout learns beside it
    optimizers = optim.build(net.named_parameters(), cfg.lr, cfg.lr_adam, cfg.weight_decay, world=world)
    state = run.resume([net, mean_net], optimizers)
    if cfg.compile:
        for block in [*lm.blocks[:layer], *net.blocks]:
            block.compile(dynamic=False)                                    # in place: parameter names stay clean
    size, replaced = sum(p.numel() for p in params), sum(p.numel() for b in lm.blocks[:layer] for p in b.parameters())
    flops = train_flops(net, *(0, 0) if states else (replaced, layer), cfg.seq_len)        # kept ones cost nothing
    run.say(f"layer {layer} of {lm.L}: {cfg.objective} bridge of {net.settings['blocks']} blocks of width "
            f"{net.settings['W']}, {size:,} parameters"
            + (f" = {size / replaced:.2f}x the blocks it replaces" if layer else "")
            + f"; {micro} sequences a pass{', recomputed' * recompute}")

    # --------------------------------------------------------------------------------------------------- loop
    overlap = cfg.overlap == "on" or cfg.overlap == "auto" and world.device.type == "cuda"
    gradients = GradientSum(params, world, overlap, cfg.bucket_mb * 1e6)    # no DDP wrapper: see there
    stop, clock, waited = StopSignal(world), Clock(state["seconds"]), 0.0
    bins = torch.zeros(8, 2, dtype=torch.float64)                           # loss sum and count by noise level
    parts = [some.tolist() for some in torch.tensor(slots).split(micro)]    # this process's micro-batches
    ready = data.prefetch(lambda key: draw(cfg, train, states, lm.D, world.device, *key),
                          ((step, some) for step in range(state["step"], cfg.steps) for some in parts))

    for step in range(state["step"], cfg.steps):
        found = []
        for some in parts:
            # 1 a batch that a thread has drawn meanwhile
            waiting = time.perf_counter()
            batch = next(ready)
            waited += time.perf_counter() - waiting
            # 2 gradient of the mean loss over the global batch
            total, each = losses(lm, net, batch, layer, cfg, dtype)
            if some is parts[-1]:
                gradients.arm()
            (total / cfg.batch_size).backward()
            found.append(torch.stack([batch.t, each]).double())             # stays on the device: nothing waits
        # 3 sum over processes, clip
        gradients.finish()
        norm = nn.utils.clip_grad_norm_(own, 1.0).item()
        t, each = torch.cat(found, 1).cpu()                                 # (slots,) each
        bins.index_add_(0, (t * 8).long().clamp(max=7), torch.stack([each, torch.ones_like(each)], 1))
        bad = next((f", slot {s}" for s, fine in zip(slots, torch.isfinite(each)) if not fine), "")
        # 4 step, running mean of the weights
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown), norm, f"step {step}{bad}")
        with torch.no_grad():
            torch._foreach_lerp_(list(mean_net.parameters()), params, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        # 5 report, validate, save, leave when asked
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            total, *by_t = world.sum([each.sum().item() / cfg.batch_size, *bins.flatten().tolist()])
            by_t = torch.tensor(by_t).view(8, 2)
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, loss=total,
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm,
                         wait=waited / max(1e-9, clock.seconds() - state["seconds"]),
                         loss_by_t=(by_t[:, 0] / by_t[:, 1].clamp_min(1)).tolist(), count_by_t=by_t[:, 1].tolist())
            bins.zero_()
        if done % cfg.eval_every == 0 and done < cfg.steps:
            with clock.paused():
                run.log(done, cfg.steps, val_loss=validate(lm, mean_net, held_out[:NOISE_ROWS], layer, cfg, world)[0])
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0 or done == cfg.steps:
            check_replicas([*params, *mean_net.parameters()], world)
            run.save(done, clock, [net, mean_net], optimizers, wait=done == cfg.steps)
        if leaving:
            run.leave(done)
    stop.done()
    seconds = clock.seconds()
    del gradients.buckets, gradients.views                                  # the final numbers want their memory

    # ------------------------------------------------------------------------------------------------- result
    val_loss, named = validate(lm, mean_net, held_out[:NOISE_ROWS], layer, cfg, world)
    if not world.main:  # the final numbers need the whole backbone: rank 0 alone loads it
        return world.barrier()
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    info = {"layer": layer, "head_start": cfg.head_start, "objective": cfg.objective, "visible": cfg.visible,
            "seed": cfg.seed, "model": model, "size_ratio": size / replaced if layer else None,
            "base": identity["base"], "nfe_default": cfg.nfe, "sampler": cfg.sampler, "shift": cfg.shift}
    denoiser.save(mean_net, run.out, {**info, "tokenizer": tokenizer and backbone.tokenizer_hash(tokenizer)})
    result = {**info, "val_loss": val_loss, "readout_accuracy": named, "parameters": size, "steps": cfg.steps,
              "table": mean_net.means.numel() if cfg.head_start == "tokens" else 0,
              "replaced_parameters": replaced, "tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds,
              "mfu": run.mfu(tokens / seconds, flops), "flops_per_token": flops, "nfe": {}}
    if not cfg.random_init:  # a network of random weights has no upper blocks worth asking
        lm = backbone.load(model, world.device, dtype)
        result |= numbers(lm, mean_net, net.requires_grad_(False), held_out, layer, cfg)
    run.finish(result, section(result) if result["nfe"] else "")
    print(section(result) if result["nfe"] else summary(result))
    return run.result


if __name__ == "__main__":
    main()
