"""repr_align.py: CONVERT. The AR model becomes a masked diffusion LM, each layer held near the AR model's own states.

    python repr_align.py                                          # w = 10 on the toy: ~1 min on 2 cores
    python repr_align.py --align_weight 0 --out out/repr_align/w0     # the control arm: same batches, same masks
    python repr_align.py --load out/repr_align/w10 --prompt "import " --sample_steps 64 --show
    python repr_align.py --load out/repr_align/w10 --prompt "def f(" --suffix "return x" --middle 32
    python repr_align.py --load out/repr_align/w10 --judge README.md      # bits per byte of a file, with its error
    torchrun --nproc_per_node 8 repr_align.py --preset 8b --shard --model meta-llama/Llama-3.1-8B

Student = the AR weights with bidirectional attention on masked input; teacher = the same weights, frozen, causal, on
the clean input. loss = CE + path * p_correct * CE + w * (1 - mean cosine over layers) on the positions whose next token
is masked (REPR-ALIGN, arXiv 2605.06885; the next-token shift of the AR model is kept). On the default toy the masked
validation CE falls from 6.6 to about 5.3 nats, with or without alignment. What such a model can do stands in masked.py.
Writes an ordinary Hugging Face folder, log.jsonl and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary, r the share of masked tokens.
"""
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import distribute_tensor

import data
from core import backbone, optim
from core.common import GradientSum, StopSignal, UserError, entry, parse, pick_dtype, setup, split_batch
from core.draws import generator
from core.masked import ORDERS, Student, add_mask, sample_text
from core.run import Clock, Run, finished


@dataclass
class Config:
    preset: Literal["tiny", "toy", "0.6b", "8b"] = "toy"  # for tests, a minute, one GPU, eight
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/repr_align/w10"  # run folder
    seed: int = 0               # every draw is keyed by it: arms with one seed see the same batches and masks
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the teacher and of autocast
    random_init: bool = False   # random weights of the same shape
    align_weight: float = 10.0  # w (0: no alignment, no teacher)
    path: float = 1.0           # weight of the p_correct * CE term (always on in the published code)
    layers: str = "all"         # states that are aligned: all, lower, middle, upper, or numbers of 0..L such as 0,4,8
    distance: Literal["cosine", "l2"] = "cosine"  # 1 - cosine, or squared error over the teacher's square
    positions: Literal["next-masked", "masked", "all"] = "next-masked"  # where: predictors of masked tokens, those, all
    weighting: Literal["mean", "1/t"] = "mean"  # of CE: every masked token alike, or over its sequence's masked share
    freeze: str = "embed"       # parts that stay as they are: embed (and head), attention, mlp, comma-separated; none
    shard: bool = False         # spread blocks of student and teacher over the processes (FSDP2; AdamW only)
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the learning rate, after the warm-up
    cooldown: float = 0.5       # share of the run in which wsd descends to zero (0: constant, to read steps to a loss)
    train_tokens: int = 0       # use only the first so many training tokens (0: all): the low-data regime
    steps: int = 200            # optimizer steps
    batch_size: int = 16        # sequences a step, over all processes
    micro_batch: int = 0        # sequences a forward pass of one process (0: its whole share)
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.01            # Muon, for the matrices inside the blocks
    lr_adam: float = 1e-3       # AdamW, for everything else
    weight_decay: float = 0.01  # decoupled
    warmup: int = 20            # steps
    eval_batches: int = 64      # held-out sequences
    eval_every: int = 25        # steps between validations
    log_every: int = 50         # steps between log lines
    save_every: int = 100       # steps between checkpoints
    load: str = ""              # use this converted model instead of training
    prompt: str = ""            # text before the masks, with --load
    suffix: str = ""            # text after them
    max_new_tokens: int = 64    # masks to fill after a prompt
    middle: int = 32            # masks to fill between prompt and suffix
    sample_steps: int = 32      # rounds, however many masks there are
    order: Literal[ORDERS] = "confidence"  # which masks are filled first; p2 also takes tokens back
    block: int = 0              # fill left to right in blocks of so many, what is before cached (0: all at once)
    temperature: float = 0.8    # of token draws (0: argmax)
    top_p: float = 1.0          # nucleus
    top_k: int = 0              # only so many best tokens (0: all)
    show: bool = False          # print the text after every round
    judge: str = ""             # with --load: a text file whose likelihood is bounded
    calls: int = 16             # network calls a window for that
    dry_run: bool = False       # print sizes, then leave


PRESETS = {
    "tiny": {"steps": 20, "batch_size": 4, "seq_len": 32, "eval_batches": 4, "eval_every": 10, "log_every": 10,
             "save_every": 10, "warmup": 5},
    "0.6b": {"steps": 5000, "batch_size": 32, "micro_batch": 4, "seq_len": 1024, "lr": 0.0, "lr_adam": 3e-4,
             "warmup": 200, "eval_every": 500, "save_every": 500},
    "8b": {"steps": 20000, "batch_size": 96, "micro_batch": 1, "seq_len": 4096, "lr": 0.0, "lr_adam": 3e-4,
           "warmup": 500, "eval_every": 1000, "save_every": 1000},
}


# --------------------------------------------------------------------------------------------- corruption and loss
def corrupt(T, seed, purpose, step, slots, r=None):
    """Which tokens are masked: (B, T) bool for the B slots. One r ~ U(0, 1) a sequence, clamped to [1/500, 1 - 1/500],
    each token masked with probability r; position 0 never is: its state predicts token 1, nothing predicts token 0."""
    draws = [generator(seed, purpose, step, s) for s in slots]
    share = np.clip([g.random() if r is None else r for g in draws], 1 / 500, 1 - 1 / 500)               # (B,)
    masked = torch.from_numpy(np.stack([g.random(T) for g in draws]) < share[:, None])                   # (B, T)
    masked[:, 0] = False
    return masked


def teacher_states(lm, ids):
    """The AR model's own h[0], ..., h[L-1] and normed h[L] on the clean input, causal."""
    yield (h := lm.embed(ids))
    side = lm.side(h)
    for i in range(lm.L):
        h = lm.block(h, i, side)
        yield h if i < lm.L - 1 else lm.norm(h)


def depth(name, L):
    """--layers -> the set of states that are aligned, of 0 (embeddings) to L (the normed final state)."""
    thirds = {"all": (0, 1), "lower": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "upper": (2 / 3, 1)}
    if name in thirds:
        lo, hi = thirds[name]
        return {i for i in range(L + 1) if lo * (L + 1) <= i < hi * (L + 1)}
    if not all(part.isdigit() and int(part) <= L for part in name.split(",")):
        raise UserError(f"--layers {name} must be all, lower, middle, upper or numbers of 0..{L} such as 0,4,8")
    return {int(part) for part in name.split(",")}


def aligned(positions, masked):
    """Where states are compared, (B, T-1) bool: at the predictors of masked tokens, at masked tokens, everywhere."""
    return {"next-masked": masked[:, 1:], "masked": masked[:, :-1], "all": torch.ones_like(masked[:, 1:])}[positions]


def conversion_loss(student, teacher, ids, masked, path, layers=None, kind="cosine", positions="next-masked"):
    """(loss per masked token, its row, alignment loss, CE, cosine per layer (L+1,) or None) of ids (B, T), masked
    (B, T). All but the first two are sums over positions, so that any split of a batch adds up to the same.

    1 student and teacher in step, distances summed layer by layer, never stacked  2 CE of token i+1 from state i, where
    token i+1 is masked  3 path term: CE again, weighted by the model's own confidence."""
    predictors, where = masked[:, 1:], aligned(positions, masked)                      # (B, T-1) each
    layers = set(range(student.lm.L + 1)) if layers is None else layers
    clean = teacher_states(teacher, ids) if teacher is not None else None
    apart, cosines = ids.new_zeros((), dtype=torch.float32), []
    for i, h in enumerate(student.states(ids, masked)):
        if clean is not None and (i <= max(layers) or not torch.is_grad_enabled()):      # no teacher above the asked
            with torch.no_grad():
                target = next(clean)[:, :-1][where].float()                            # (n, D)
            here = h[:, :-1][where].float()
            cosine = F.cosine_similarity(here, target, dim=-1)                         # (n,)
            cosines.append(cosine.detach().sum())
            if i in layers and kind == "cosine":
                apart = apart + (1 - cosine).sum() / len(layers)
            elif i in layers:  # squared error over the teacher's own square
                apart = apart + ((here - target).square().sum(-1) / target.square().sum(-1)).sum() / len(layers)
    logits = student.logits(h[:, :-1][predictors])                                     # (n, V)
    ce = F.cross_entropy(logits, ids[:, 1:][predictors], reduction="none")             # (n,)
    each = ce + path * torch.exp(-ce).detach() * ce
    if clean is None:
        return each, predictors.nonzero()[:, 0], apart, ce.detach().sum(), None
    cosines += [torch.full_like(apart, torch.nan)] * (student.lm.L + 1 - len(cosines))  # above the highest aligned one
    return each, predictors.nonzero()[:, 0], apart, ce.detach().sum(), torch.stack(cosines)


def row_weights(kind, masked):
    """What a masked token's CE counts, per row (B,) of the whole batch: 1 over all masked tokens, or "1/t": each row
    over its own masked share, as in the ELBO. Either way the expected total is that of a mean."""
    own = masked.sum(1).clamp_min(1)
    return torch.full((len(masked),), 1 / max(1, masked.sum().item())) if kind == "mean" else 1 / (own * len(masked))


@torch.no_grad()
def validate(student, teacher, rows, cfg, world):
    """(masked CE in nats over all masked tokens, mean cosine or None) on rows (N, T); r on an even grid, own keys."""
    totals = torch.zeros(3, dtype=torch.float64)
    for i in range(world.rank, -(-len(rows) // world.size) * world.size, world.size):  # as many passes on every rank:
        counts, i = i < len(rows), min(i, len(rows) - 1)                               # with --shard each is collective
        masked = corrupt(rows.shape[1], cfg.seed, "validate", 0, [i], r=(i + 0.5) / len(rows)).to(world.device)
        _, _, _, ce, cosines = conversion_loss(student, teacher, rows[i:i + 1].to(world.device), masked, 0.0)
        cosine = 0.0 if cosines is None else cosines.mean().item()
        totals += counts * torch.tensor([ce.item(), masked.sum().item(), cosine])
    ce, count, cosine = world.sum(totals.tolist())
    return ce / count, cosine / count if teacher is not None else None


def freeze(student, parts):
    """Everything learns but `parts`: embed (input embeddings and head; the mask token's own vector still learns),
    attention, mlp."""
    student.requires_grad_(True)
    model = student.lm.model
    for part in parts.split(",") if parts != "none" else []:
        if part == "embed":
            found = [model.get_input_embeddings(), model.get_output_embeddings()]
        else:
            words = {"attention": ("attn", "attention"), "mlp": ("mlp",)}.get(part)
            if words is None:
                raise UserError(f"--freeze {parts}: {part!r} is not embed, attention or mlp (or none)")
            found = [m for b in student.lm.blocks for n, m in b.named_children() if n.endswith(words)]
        for module in found:
            module.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- sharding
def shard(models, world, dtype):
    """Spread every block over the processes (FSDP2). What is not in a block stays whole: norms, embeddings, head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if world.size == 1:
        raise UserError("--shard spreads weights over processes; start it with torchrun --nproc_per_node 2 or more")
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else None
    for lm in models:
        for block in lm.blocks if lm is not None else []:
            fully_shard(block, mesh=mesh, **({"mp_policy": policy} if policy else {}))


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensors, world):
    """{name: tensor} with every shard gathered, kept on the CPU of rank 0 alone: one tensor at a time, so that a GPU
    never holds more than its share. Collective: every process calls it."""
    gathered = {}
    for name, t in tensors.items():
        t = t.full_tensor() if is_sharded(t) else t
        if world.main:
            gathered[name] = t.cpu() if torch.is_tensor(t) else t
    return gathered


class Whole:
    """A module or an optimizer whose state is saved and loaded as whole tensors, sharded or not: a run may change its
    number of processes."""

    def __init__(self, thing, world):
        self.thing, self.world = thing, world
        groups = getattr(thing, "param_groups", [])
        self.params = [p for g in groups for p in g["params"]]

    def state_dict(self):
        if not self.params:  # a module, each tensor once: a Backbone holds its blocks under several names
            return whole({n: p.detach() for n, p in self.thing.named_parameters()}, self.world)
        state = self.thing.state_dict()
        return {**state, "state": {i: whole(s, self.world) for i, s in state["state"].items()}}

    def load_state_dict(self, saved):
        def spread(t, like):
            same = is_sharded(like) and torch.is_tensor(t) and t.shape == like.shape
            return distribute_tensor(t.to(like.device), like.device_mesh, like.placements) if same else t
        if not self.params:
            with torch.no_grad():
                for name, p in self.thing.named_parameters():
                    p.copy_(spread(saved[name], p))
            return
        state = {i: {k: spread(t, self.params[i]) for k, t in s.items()} for i, s in saved["state"].items()}
        self.thing.load_state_dict({**saved, "state": state})


def clip(params, limit, world):
    """Scale gradients down to a joint norm of `limit`; returns the norm before."""
    if not any(map(is_sharded, params)):
        return nn.utils.clip_grad_norm_(params, limit).item()
    mine = [p.grad.to_local() if is_sharded(p) else p.grad for p in params]
    shares = sum(g.double().square().sum().item() for p, g in zip(params, mine, strict=True) if is_sharded(p))
    rest = sum(g.double().square().sum().item() for p, g in zip(params, mine, strict=True) if not is_sharded(p))
    norm = math.sqrt(world.sum([shares])[0] + rest)
    torch._foreach_mul_(mine, min(1.0, limit / (norm + 1e-6)))
    return norm


def report_size(cfg, shape, world, dtype):
    """--dry_run: parameters, gigabytes on one GPU by component (with --shard over the processes, 8 if started without
    torchrun), FLOPs a token."""
    from transformers import AutoModelForCausalLM
    print("\n".join(f"  {k} = {v}" for k, v in vars(cfg).items()))
    with torch.device("meta"):
        lm = backbone.Backbone(AutoModelForCausalLM.from_config(shape))
    inside = sum(p.numel() for p in lm.blocks.parameters())
    outside = sum(p.numel() for p in lm.parameters()) - inside
    ways = (world.size if world.size > 1 else 8) if cfg.shard else 1
    micro = cfg.micro_batch or max(1, cfg.batch_size // world.size)
    tokens, D, wide = micro * cfg.seq_len, shape.hidden_size, getattr(shape, "intermediate_size", 4 * shape.hidden_size)
    muon = cfg.lr > 0 and not cfg.shard
    held = {"student": 4 * (inside / ways + outside), "gradients": 4 * inside / ways, "optimizer": (4 if muon else 8) *
            inside / ways, "teacher": dtype.itemsize * (inside / ways + outside) * (cfg.align_weight > 0),
            "gathered block": dtype.itemsize * 2 * inside / lm.L * (ways > 1),
            "activations": tokens * lm.L * (16 * D + 4 * wide) * dtype.itemsize,  # saved for backward, a rough count
            "logits": tokens / 2 * shape.vocab_size * 4 * 3}                      # half of the tokens are masked
    total = sum(held.values()) / 1e9
    flops = backbone.flops_per_token(lm.model, cfg.seq_len) * (4 / 3 if cfg.align_weight > 0 else 1)
    print(f"{inside + outside:,} parameters, {inside:,} of them in {lm.L} blocks; GB on one GPU, {ways}-way shards: "
          + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in held.items())
          + f"; together {total:.1f}, which {'fits' if total < 80 else 'does NOT fit'} 80 GB\n"
          f"{flops:.3e} FLOPs a token: {0.5 * 989e12 / flops:,.0f} tokens/s a GPU at 50% of 989 TFLOP/s")
    return {"gigabytes": total, "flops_per_token": flops}


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    if cfg.align_weight < 0 or cfg.path < 0 or cfg.temperature < 0:
        raise UserError("--align_weight, --path and --temperature must not be negative")

    # -------------------------------------------------------------------------------------------------- setup
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    if not cfg.load and (cfg.prompt or cfg.suffix or cfg.judge):
        raise UserError("--prompt, --suffix and --judge use a converted model; name it with --load")
    if cfg.load:
        print(text := sample_text(cfg, world, dtype))
        return text
    slots, micro = split_batch(cfg.batch_size, cfg.micro_batch, world)
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(f"{cfg.out} is finished: w = {result['w']:g}, masked val CE {result['val_loss']:.3f} nats")
        return result
    if cfg.seq_len < 3:
        raise UserError("--seq_len must be at least 3: the first token is never masked")
    shape = backbone.read_config(model, cfg.seq_len)
    if cfg.dry_run:
        return report_size(cfg, shape, world, dtype)

    # -------------------------------------------------------------------------------------------- data, models
    tokenizer = backbone.load_tokenizer(model)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    train = data.Tokens(shards, "train", cfg.seq_len, cfg.train_tokens)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches)[:, :-1]           # (N, T)
    load = dict(device=world.device, random_init=cfg.random_init)
    teacher = backbone.load(model, dtype=dtype, **load) if cfg.align_weight > 0 else None
    lm = backbone.load(model, dtype=torch.float32, **load)
    student = Student(lm, add_mask(lm, tokenizer))
    freeze(student, cfg.freeze)
    if cfg.shard:
        shard([student.lm, teacher], world, dtype)
    names = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    params = [p for _, p in names]
    groups = [[(n, p) for n, p in names if is_sharded(p) == there] for there in (True, False)]  # no step mixes the two
    lr = 0.0 if cfg.shard else cfg.lr
    optimizers = [o for group in groups if group
                  for o in optim.build(group, lr, cfg.lr_adam, cfg.weight_decay, inside=lm.blocks_name)]
    layers = depth(cfg.layers, lm.L)
    run = Run(cfg, world, identity)
    things = [Whole(student, world)], [Whole(o, world) for o in optimizers]
    state = run.resume(*things)
    curve = state.get("curve", [])
    run.say(f"converting {model}: w = {cfg.align_weight:g}, {sum(p.numel() for p in params):,} parameters learn")

    # --------------------------------------------------------------------------------------------------- loop
    flops = backbone.flops_per_token(lm.model, cfg.seq_len) * (4 / 3 if teacher is not None else 1)   # + one forward
    local = [p for p in params if not is_sharded(p)]
    gradients, stop, clock = GradientSum(local, world, overlap=False), StopSignal(world), Clock(state["seconds"])
    for step in range(state["step"], cfg.steps):
        if step % cfg.eval_every == 0:
            with clock.paused():
                curve = [row for row in curve if row[0] < step]
                curve.append([step, *validate(student, teacher, held_out, cfg, world)])
                run.log(step, cfg.steps, val_loss=curve[-1][1])
        # 1 batch and masks: functions of (seed, step, slot)
        everyone = corrupt(cfg.seq_len, cfg.seed, "mask", step, range(cfg.batch_size))            # (B, T)
        count, spots = max(1, everyone.sum().item()), max(1, aligned(cfg.positions, everyone).sum().item())
        weights = row_weights(cfg.weighting, everyone)                                            # (B,)
        sums = torch.zeros(2 + lm.L)
        for some in torch.tensor(slots).split(micro):
            ids = train.batch(cfg.seed, step, some.tolist(), cfg.batch_size)[:, :-1].to(world.device)   # (b, T)
            # 2 gradient of the mean over the whole batch's masked tokens and aligned states
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                each, row, apart, ce, cosines = conversion_loss(
                    student, teacher, ids, everyone[some].to(world.device), cfg.path, layers, cfg.distance,
                    cfg.positions)
            loss = (each * weights[some].to(world.device)[row]).sum() + cfg.align_weight * apart / spots
            (loss * (world.size if cfg.shard else 1)).backward()  # fully_shard takes the mean, we take sums
            sums += torch.cat([ce[None] / count, ce.new_zeros(lm.L + 1) if cosines is None else cosines / spots]).cpu()
        for p in local if cfg.shard else []:
            p.grad /= world.size
        gradients.finish()
        # 3 clip, step
        norm = clip(params, 1.0, world)
        if not math.isfinite(norm):
            raise UserError(f"the loss or its gradient stopped being finite at step {step}; lower --lr and run again "
                            f"({cfg.out} keeps the last good state)")
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown, cfg.schedule))
        for p in params:
            p.grad = None
        # 4 report, save, leave when asked
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            ce, *cosines = world.sum(sums.tolist())
            cosines = [c if math.isfinite(c) else None for c in cosines]
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, ce=ce,
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm, cosine_by_layer=cosines)
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0:
            run.save(done, clock, *things, curve=curve)
        if leaving:
            run.leave(done)
    stop.done()
    seconds = clock.seconds()

    # ------------------------------------------------------------------------------------------------- result
    curve.append([cfg.steps, *validate(student, teacher, held_out, cfg, world)])
    student.fold()
    weights = whole(lm.model.state_dict(), world) if cfg.shard else None
    if world.main:
        backbone.save_model(lm.model, tokenizer, run.out, **({"state_dict": weights} if cfg.shard else {}))
    world.barrier()
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    run.finish({"val_loss": curve[-1][1], "curve": curve, "w": cfg.align_weight, "cosine": curve[-1][2],
                "tokens_per_s": tokens / seconds, "tokens": tokens, "steps": cfg.steps, "seconds": seconds,
                "seed": cfg.seed, "mask_id": student.mask_id, "eval_sequences": len(held_out),
                **identity})
    run.say(f"saved to {cfg.out}: w = {cfg.align_weight:g}, masked val CE {curve[0][1]:.3f} -> {curve[-1][1]:.3f} nats "
            f"in {seconds:.0f} s")
    return run.result


if __name__ == "__main__":
    main()
