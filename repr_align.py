"""CONVERT: turn an AR model into a masked diffusion LM with states near those of the AR model.

    python repr_align.py                            # w = 10 on the toy, a minute on two cores
    python repr_align.py --align_weight 0           # the control: same batches, same masks
    python repr_align.py --align_weight 0 --attention block     # token block after token block
    torchrun --nproc_per_node 8 repr_align.py --preset 8b --shard --model meta-llama/Llama-3.1-8B

The student has the AR weights, sees the whole text and predicts its masked tokens. The teacher has
the same weights, is frozen and causal, and sees the text without masks. Over the masked tokens:

    loss = CE + path * p_correct * CE + w * (1 - cosine of student's and teacher's states)

This is REPR-ALIGN (arXiv 2605.06885). The path term adds weight to tokens that a sampler would
reveal early, those of high probability. The published code divides it by r, the share of masked
tokens (--path published); ours does not. CE has no weight 1/r either, so the loss is no bound on
-log p: core/masked.py computes one.

With --attention block a token sees its token block and the text before it. With --context noisy
that text is masked, too. With --context causal each pass holds a clean copy of it, at twice the
cost, with the attention of the AR model. Who sees whom is in core/masked.py.

Writes a Hugging Face folder (core/masked.py loads it, sample.py writes with it), convert.png,
log.jsonl and result.json.

Shapes: B batch, T tokens, L blocks, D width, V vocabulary, n masked tokens of a batch,
N held-out sequences, r share of masked tokens, w weight of the alignment.
"""
import dataclasses
import math
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import data
from core import backbone, optim, report
from core.common import (Dtype, UserError, entry, generator, parse, pick_dtype, setup,
                         split_batch)
from core.masked import Arm, Student, add_mask, predictors, text_likelihood
from core.run import TRACKERS, Run, finished, plan, training_flops


@dataclass
class Config:
    # model, data, folder
    preset: Literal["auto", "tiny", "toy", "tasks", "135m", "0.6b", "8b"] = "auto"  # by model size
    model: str = "toy"          # toy (the folder next to --out), a model folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = ""               # run folder (empty: out/convert/w10 by --align_weight, or block)
    seed: int = 0               # every random number is a function of it
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # auto: bf16 on a GPU
    dry_run: bool = False       # print size, memory and time of this training, then leave
    # loss
    attention: Literal["bidirectional", "block"] = "bidirectional"  # block: by token blocks
    block_size: int = 16        # tokens of a token block
    grow_blocks: tuple[int, ...] = ()   # sizes of the token block, at equal shares of the run
    context: Literal["noisy", "causal"] = "noisy"  # text before a token block: masked, or a copy
    ar_weight: float = 0.0      # weight of the next-token loss on the clean copy
    align_weight: float = 10.0  # w (0: no alignment, no teacher)
    align_until: int = 0        # step from which w is 0 (0: none)
    path: Literal["none", "plain", "published"] = "plain"   # path term; published: over r
    mask_min: float = 0.0       # share r of masked tokens: uniform between mask_min and mask_max.
    mask_max: float = 1.0       # 0.2: learns tasks that need nearly the whole text (COMPARE)
    # optimisation
    steps: int = 120            # optimizer steps
    batch_size: int = 8         # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: its whole share)
    seq_len: int = 128          # tokens a sequence
    train_tokens: int = 0       # train on this many first tokens of the corpus (0: all)
    lr: float = 0.01            # Muon, for the matrices inside the blocks (0: AdamW there too)
    lr_adam: float = 1e-3       # AdamW, for everything else
    warmup: int = 20            # steps (0: none)
    shard: bool = False         # spread the blocks over the processes (FSDP2, AdamW alone)
    # measurement
    eval_batches: int = 64      # held-out sequences
    eval_every: int = 40        # steps between validations and checkpoints
    track: Literal[tuple(TRACKERS)] = ""    # also send the log to a tracker


PRESETS = {                     # "toy": the defaults
    "tiny": dict(steps=20, batch_size=4, seq_len=32, warmup=5, eval_batches=4, eval_every=10),
    # A task's answer is determined only when nearly all of its line is visible. Small shares teach
    # that, but the model is no generator: its masked CE over all shares rises
    "tasks": dict(steps=2500, mask_max=0.2, batch_size=16, seq_len=64, eval_batches=16,
                  eval_every=500),
    "135m": dict(steps=40, lr=0.0, lr_adam=3e-4, eval_batches=16, eval_every=20),
    "0.6b": dict(steps=5000, batch_size=32, micro_batch=4, seq_len=1024, lr=0.0, lr_adam=3e-4,
                 warmup=200, eval_every=500),
    "8b": dict(steps=20000, batch_size=96, micro_batch=1, seq_len=4096, lr=0.0, lr_adam=3e-4,
               warmup=500, eval_every=1000),
}
COOLDOWN = 0.5                  # share of the run in which the rates descend to zero
WEIGHT_DECAY = 0.01
LOG_EVERY = 10                  # steps between log lines
BOUND_CALLS = 4                 # network calls a sequence for the bound on -log p


# -------------------------------------------------------------------------------------------------
# Masks and loss

def sample_masks(T, block_size, seed, step, slots, purpose="mask", between=(0.0, 1.0)):
    """(B, T) bool, which tokens are masked, and the shares r (B, T) they were masked with.

    Every token block of a sequence gets a share, uniform `between` two bounds, and masks each of
    its tokens with that probability. The first token stays visible, because no state predicts it.
    Shares are clipped to [1/500, 1 - 1/500]. Other bounds than 0 and 1 are the clipped schedule of
    block diffusion (arXiv 2503.09573)."""
    low, high = between
    blocks = math.ceil(T / block_size)
    masks = []
    shares = []
    for slot in slots:
        gen = generator(seed, purpose, step, slot)
        share = np.full(blocks, low)
        if low < high:
            share = low + (high - low) * gen.random(blocks)
        share = share.clip(1 / 500, 1 - 1 / 500).repeat(block_size)[:T]
        shares.append(share)
        masks.append(gen.random(T) < share)
    is_mask = torch.from_numpy(np.stack(masks))
    is_mask[:, 0] = False
    return is_mask, torch.from_numpy(np.stack(shares)).float()


# Weight of the path term as a function of r (B, T)
PATHS = {"none": torch.zeros_like, "plain": torch.ones_like, "published": torch.reciprocal}


def conversion_loss(student, teacher, ids, is_mask, path, with_ar=False):
    """(loss, alignment, ar, ce) of ids (B, T) with masks where is_mask (B, T; on the CPU). `path`
    (B, T), on the CPU too, is the weight of the path term.

    All are sums over tokens, so the parts of a batch add up to the batch. loss: CE and path term.
    alignment: distance, mean over the layers; 0 without a teacher. ar: next-token CE of the clean
    copy. ce: CE alone, in nats. For a masked token i + 1 we compare the student's state that
    predicts it (`predictors`) with the teacher's state at token i. Every layer has the same weight,
    embeddings and normed last state included."""
    T = ids.shape[1]
    zero = torch.zeros((), device=ids.device)
    at = predictors(student.arm, T, as_written=False).to(ids.device)                 # (T-1,)
    # 1. The n masked tokens: row b, token i + 1. Located on the CPU, so that no GPU is waited for
    path = path[:, 1:][is_mask[:, 1:]].to(ids.device)                                # (n,)
    b, i = is_mask[:, 1:].nonzero().to(ids.device).unbind(1)
    # 2. Alignment: student and teacher layer by layer, never stacked
    alignment = zero
    targets = teacher.trace(teacher.embed(ids)) if teacher else repeat(None)
    for h, target in zip(student.states(ids, is_mask.to(ids.device)), targets):
        if teacher:
            state = h[b, at[i]].float()                                         # (n, D)
            cosine = F.cosine_similarity(state, target[b, i].float(), dim=-1)
            alignment = alignment + (1 - cosine).sum() / (student.lm.L + 1)
    normed = h                                          # the last state that was yielded
    # 3. Cross-entropy of the masked tokens
    logits = student.logits(normed[b, at[i]])                                   # (n, V)
    ce = F.cross_entropy(logits, ids[b, i + 1], reduction="none")               # (n,)
    # 4. Path term: CE again, weighted by the student's probability of the right token
    p_correct = torch.exp(-ce).detach()
    loss = ce + path * p_correct * ce
    # 5. The AR model's task, the next token, on the clean copy
    ar = zero
    if with_ar:
        logits = student.logits(normed[:, :T - 1]).flatten(0, 1)
        ar = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    return loss.sum(), alignment, ar, ce.detach().sum()


@torch.no_grad()
def validate(student, teacher, rows, world, seed):
    """[masked CE in nats, distance or None, AR loss or None] on held-out rows (N, T). The shares r
    lie on an even grid. The AR loss is the next-token CE on the clean copy."""
    N, T = rows.shape
    has_copy = student.arm.has_copy(as_written=False)
    totals = torch.zeros(4, dtype=torch.float64)
    for start in range(0, N, world.size):       # FSDP gathers weights in the passes of all ranks
        i = min(start + world.rank, N - 1)
        r = (i + 0.5) / N
        is_mask, share = sample_masks(T, T, seed, 0, [i], "validate", between=(r, r))
        path = torch.zeros_like(share)
        _, *sums = conversion_loss(student, teacher, rows[i:i + 1], is_mask, path, has_copy)
        if start + world.rank < N:
            totals += torch.tensor([value.item() for value in [*sums, is_mask.sum()]])
    alignment, ar, ce, count = world.sum(totals.tolist())
    return [ce / count,
            alignment / count if teacher else None,
            ar / rows[:, 1:].numel() if has_copy else None]


# -------------------------------------------------------------------------------------------------
# --shard: FSDP2

def shard(lm, world, dtype):
    """Spread the weights of the blocks over the processes. Everything else stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    settings = {"mesh": init_device_mesh(world.device.type, (world.size,)),
                "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)}
    for block in lm.blocks:
        fully_shard(block, **settings)
        block.set_gradient_divide_factor(1.0)           # a sum: losses are divided by the batch
        block.set_force_sum_reduction_for_comms(True)
    # One root without weights, so that the blocks share streams and fetch each other ahead in the
    # backward pass. We call the blocks and never the root, so it is started by hand.
    whole = {p for p in lm.stack.parameters() if not is_sharded(p)}
    root = fully_shard(lm.stack, ignored_params=whole, **settings)
    root._get_fsdp_state()._lazy_init()


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


class WholeState:
    """A sharded module and its optimizers, saved as whole tensors on the CPU of rank 0. Another
    number of processes can resume from them."""

    def __init__(self, module, optimizers=()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions
        self.module = module
        self.optimizers = optimizers
        self.options = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def state_dict(self):
        from torch.distributed.checkpoint.state_dict import get_state_dict
        return get_state_dict(self.module, self.optimizers, options=self.options)

    def load_state_dict(self, saved):
        from torch.distributed.checkpoint.state_dict import set_state_dict
        weights, moments = saved
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]          # torch loads only keys that are there
        set_state_dict(self.module, self.optimizers, model_state_dict=weights,
                       optim_state_dict=moments, options=self.options)


def clip(params, limit):
    """Scale the gradients down to a joint norm of `limit`. Returns the norm before."""
    params = [p for p in params if p.grad is not None]          # an expert may get no token
    shards = [p for p in params if is_sharded(p)]
    whole = [p for p in params if not is_sharded(p)]
    norm = nn.utils.get_total_norm([p.grad for p in whole])
    if shards:
        norm_of_shards = nn.utils.get_total_norm([p.grad for p in shards])
        norm = torch.hypot(norm_of_shards.full_tensor(), norm)
    for group in (shards, whole):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm.item()


# -------------------------------------------------------------------------------------------------
# Set-up and result

def out_folder(cfg):
    name = "block" if cfg.attention == "block" else f"w{cfg.align_weight:g}"
    return cfg.out or f"out/convert/{name}"


def arm_at(cfg, step):
    """Who sees whom at this step. A conversion that begins with token blocks of 1 and a causal copy
    begins as the AR model: its first loss is the next-token loss. Larger blocks follow."""
    sizes = cfg.grow_blocks or (cfg.block_size,)
    stage = min(step * len(sizes) // cfg.steps, len(sizes) - 1)
    return Arm(cfg.attention, sizes[stage], cfg.context)


def check_growth(cfg):
    """Set --block_size to the last of --grow_blocks."""
    sizes = cfg.grow_blocks
    growing = list(sizes) == sorted(set(sizes)) and min(sizes) > 0
    divide = all(cfg.seq_len % size == 0 for size in sizes)
    assert growing and divide and cfg.context == "causal", (
        "--grow_blocks needs --context causal, and sizes that grow and divide --seq_len")
    cfg.block_size = sizes[-1]


def load_models(cfg, model, tokenizer, world, dtype):
    """(student in fp32, teacher or None): the same weights twice."""
    teacher = None
    if cfg.align_weight > 0:
        teacher = backbone.load(model, world.device, dtype)
    lm = backbone.load(model, world.device, torch.float32)
    mask_id = add_mask(lm, tokenizer)
    student = Student(lm, mask_id, arm_at(cfg, cfg.steps))
    student.requires_grad_(True)
    lm.model.get_input_embeddings().requires_grad_(False)   # student.shift learns instead
    lm.model.get_output_embeddings().requires_grad_(False)
    if cfg.shard:
        shard(lm, world, dtype)
        if teacher:
            shard(teacher, world, dtype)
    return student, teacher


def build_optimizers(cfg, student, world):
    """(trained parameters, optimizers). One optimizer cannot step on both shards and whole tensors,
    and Muon cannot step on shards."""
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    optimizers = []
    for sharded in (True, False):
        group = [(name, p) for name, p in named if is_sharded(p) == sharded]
        if group:
            optimizers += optim.build(group, 0.0 if cfg.shard else cfg.lr, cfg.lr_adam,
                                      WEIGHT_DECAY, inside=student.lm.blocks_name, world=world)
    return [p for _, p in named], optimizers


def flops_per_token(cfg, lm):
    """Two-way attention counts twice, a clean copy twice. The head runs on half of the tokens."""
    size = sum(p.numel() for p in lm.blocks.parameters())
    copies = 2 if cfg.context == "causal" else 1
    taught = cfg.align_weight > 0
    frozen = lm.V * lm.D + taught * size
    layers = lm.L * (2 * copies + taught / 3)
    return training_flops(copies * size, frozen, layers, lm.config, cfg.seq_len)


def forecast(cfg, world, config, dtype, micro_batch):
    """--dry_run: the cost of this training. --shard is planned for eight processes."""
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(config))
    inside = sum(p.numel() for p in lm.blocks.parameters())
    outside = sum(p.numel() for p in lm.parameters()) - inside
    shares = inside / 8 if cfg.shard else inside        # of the blocks, in one process
    tokens = micro_batch * cfg.seq_len
    states = tokens * (2 if cfg.context == "causal" else 1)
    moments = 8 if cfg.shard or cfg.lr == 0 else 4      # bytes: AdamW keeps two numbers, Muon one
    memory = {
        "weights": 4 * (shares + outside),
        "gradients": 4 * shares,
        "optimizer": moments * shares,
        "teacher": dtype.itemsize * (shares + outside) * (cfg.align_weight > 0),
        "activations": dtype.itemsize * states * lm.L * 32 * lm.D,      # roughly
        "logits": 13 * tokens * lm.V}                                   # if all tokens are masked
    total = cfg.steps * cfg.batch_size * cfg.seq_len
    return plan(cfg, world, inside, flops_per_token(cfg, lm), total, memory)


def publish(cfg, run, student, tokenizer, curve):
    """Save the converted model and the figure."""
    student.fold()
    weights = {}
    if cfg.shard:
        weights["state_dict"], _ = WholeState(student.lm.model).state_dict()
    if run.world.main:
        backbone.save_model(student.lm.model, tokenizer, run.out, converted=True, **weights)
        with report.figure(run.out / "convert.png") as (ax,):
            steps, ce, *_ = zip(*curve)
            ax.plot(steps, ce, "o-", color=report.BLUE)
            ax.set(title=f"CONVERT, w = {cfg.align_weight:g} (lower is better)", xlabel="step",
                   ylabel="nats a masked token")


def show(result, world):
    """Print the result of a run and return it."""
    curve = result["curve"]
    if world.main:
        print(f"w = {result['align_weight']:g}: masked CE {curve[0][1]:.3f} -> {curve[-1][1]:.3f} "
              f"nats; -log p at most {result['bound'][0]:.3f} nats a token")
    return result


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, backbone.preset_of)
    cfg.out = out_folder(cfg)
    needs_copy = cfg.ar_weight > 0 or cfg.context == "causal"
    if needs_copy and (cfg.attention, cfg.context) != ("block", "causal"):
        raise UserError("--ar_weight needs --context causal, and that needs --attention block")
    assert 0 <= cfg.mask_min < cfg.mask_max <= 1, "masked shares: 0 <= mask_min < mask_max <= 1"
    if cfg.grow_blocks:
        check_growth(cfg)
    world = setup(cfg.device)
    slots, micro_batch = split_batch(cfg.batch_size, cfg.micro_batch, world)
    dtype = pick_dtype(cfg, world.device)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)

    # Has this very run finished already?
    model = backbone.resolve(cfg.model, cfg.out)
    config = backbone.read_config(model, cfg.seq_len)
    if cfg.dry_run:
        return forecast(cfg, world, config, dtype, micro_batch)
    if cfg.shard and world.size == 1:
        raise UserError("--shard spreads weights over processes; start it with torchrun")
    identity = {"base": backbone.identity(model), "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        return show(result, world)

    # Data, models
    tokenizer = backbone.load_tokenizer(model)
    train, held_out = data.splits(cfg, tokenizer, world, cfg.seq_len)
    if cfg.train_tokens:
        count = (cfg.train_tokens - cfg.seq_len) // (cfg.seq_len + 1)
        train.n = min(train.n, max(1, count))
    if world.main:
        train.warn(cfg.steps, cfg.batch_size)
    held_out = held_out.windows(cfg.eval_batches)[:, :-1].to(world.device)      # (N, T)
    student, teacher = load_models(cfg, model, tokenizer, world, dtype)

    # Optimizers, resume
    run = Run(cfg, world, identity)
    params, optimizers = build_optimizers(cfg, student, world)
    whole = [p for p in params if not is_sharded(p)]
    saved = ([student], optimizers)
    if cfg.shard:
        shift = nn.ParameterList([student.shift])
        module = nn.ModuleDict({"model": student.lm.model, "shift": shift})
        saved = ([WholeState(module, optimizers)], [])
    state = run.resume(*saved)
    curve = state.get("curve", [])
    parts = [part.tolist() for part in torch.tensor(slots).split(micro_batch)]
    tokens = cfg.batch_size * cfg.seq_len
    flops = flops_per_token(cfg, student.lm)

    # The loop
    for step in run.steps(state["step"], cfg.steps):
        if step % cfg.eval_every == 0:
            student.arm = arm_at(cfg, cfg.steps)
            with run.clock.paused():
                curve.append([step, *validate(student, teacher, held_out, world, cfg.seed)])
                assert math.isfinite(curve[-1][1]), (
                    "the held-out loss is not finite: does the text hold the mask token?")
                run.log(step, cfg.steps, val_loss=curve[-1][1])
        # 1. Masks of the whole batch: the loss is a mean over its masked tokens
        student.arm = arm_at(cfg, step)
        size = student.arm.size(cfg.seq_len)
        is_mask, share = sample_masks(cfg.seq_len, size, cfg.seed, step, range(cfg.batch_size),
                                      between=(cfg.mask_min, cfg.mask_max))
        path = PATHS[cfg.path](share)
        count = max(1, is_mask.sum().item())
        w = cfg.align_weight if step < (cfg.align_until or cfg.steps) else 0.0
        # 2. Gradient, one micro-batch after another
        sums = torch.zeros(2, device=world.device)
        for part in parts:
            ids = train.batch(cfg.seed, step, part, cfg.batch_size)[:, :-1].to(world.device)
            with autocast:
                loss, alignment, ar, ce = conversion_loss(
                    student, teacher if w else None, ids, is_mask[part], path[part],
                    with_ar=cfg.ar_weight > 0)
            total = loss / count + w * alignment / count
            total = total + cfg.ar_weight * ar / (cfg.batch_size * (cfg.seq_len - 1))
            total.backward()
            sums += torch.stack([ce, alignment.detach()]) / count
        optim.sum_gradients(whole, world)               # FSDP sums those of shards
        # 3. Clip and step
        norm = clip(params, 1.0)
        share = optim.share_at(step, cfg.steps, cfg.warmup, COOLDOWN)
        optim.step_all(optimizers, share, norm, f"step {step}")
        # 4. Log, save, leave if asked to
        done = step + 1
        if done % LOG_EVERY == 0 or done == cfg.steps:
            ce, alignment = world.sum(sums.tolist())
            run.progress(done, cfg.steps, tokens, flops, ce=ce, alignment=alignment,
                         gnorm=norm)
        is_due = done % cfg.eval_every == 0 or done == cfg.steps
        run.save(is_due, done, *saved, curve=curve)

    # The result
    student.arm = arm_at(cfg, cfg.steps)
    seconds = run.clock.seconds()
    curve.append([cfg.steps, *validate(student, teacher, held_out, world, cfg.seed)])
    bound = text_likelihood(student, held_out, BOUND_CALLS, cfg.seed)
    publish(cfg, run, student, tokenizer, curve)
    return show(run.finish({
        **dataclasses.asdict(cfg), **identity, "curve": curve, "val_loss": curve[-1][1],
        "bound": [nats / held_out[:, 1:].numel() for nats in bound], "seconds": seconds,
        "parameters": sum(p.numel() for p in params), "mask_id": student.mask_id}), world)


if __name__ == "__main__":
    main()
