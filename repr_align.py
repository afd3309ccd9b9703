"""repr_align.py: CONVERT. The AR model becomes a masked diffusion LM, each layer held near the AR model's own states.

    python repr_align.py                                          # w = 10 on the toy: ~1 min on 2 cores
    python repr_align.py --align_weight 0 --out out/repr_align/w0     # the control arm: same batches, same masks
    python repr_align.py --load out/repr_align/w10 --prompt "import " --sample_steps 32

Student = the AR weights with bidirectional attention on masked input; teacher = the same weights, frozen, causal, on
the clean input. loss = CE + path * p_correct * CE + w * (1 - mean cosine over layers) on the positions whose next token
is masked (REPR-ALIGN, arXiv 2605.06885; the next-token shift of the AR model is kept). On the default toy the masked
validation CE falls from 6.6 to about 5.3 nats, with or without alignment. Writes an ordinary Hugging Face folder,
log.jsonl and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary, r the share of masked tokens.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import backbone
import data
import optim
from common import (GradientSum, StopSignal, UserError, entry, generator, parse, pick_dtype, setup,
                    split_batch)
from run import Clock, Run, finished, read_json


@dataclass
class Config:
    preset: Literal["tiny", "toy"] = "toy"  # tiny: tests; toy: a minute
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/repr_align/w10"  # run folder
    seed: int = 0               # every draw is keyed by it: arms with one seed see the same batches and masks
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the teacher and of autocast
    random_init: bool = False   # random weights of the same shape
    align_weight: float = 10.0  # w (0: no alignment, no teacher)
    path: float = 1.0           # weight of the p_correct * CE term (always on in the published code)
    freeze_embed: bool = True   # keep embeddings and head; only the mask token's vector is learned
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
    load: str = ""              # sample from this converted model instead of training
    prompt: str = ""            # text before the masks, with --load
    max_new_tokens: int = 64    # masks to fill
    sample_steps: int = 32      # denoising steps, however many masks there are
    temperature: float = 0.8    # of token draws (0: argmax)
    dry_run: bool = False       # print sizes, then leave


PRESETS = {"tiny": {"steps": 20, "batch_size": 4, "seq_len": 32, "eval_batches": 4, "eval_every": 10, "log_every": 10,
                    "save_every": 10, "warmup": 5}}
MASK = "<|mask|>"


# --------------------------------------------------------------------------------------------- corruption and loss
def corrupt(T, seed, purpose, step, slots, r=None):
    """Which tokens are masked: (B, T) bool for the B slots. One r ~ U(0, 1) a sequence, clamped to [1/500, 1 - 1/500],
    each token masked with probability r; position 0 never is: its state predicts token 1, nothing predicts token 0."""
    draws = [generator(seed, purpose, step, s) for s in slots]
    share = np.clip([g.random() if r is None else r for g in draws], 1 / 500, 1 - 1 / 500)               # (B,)
    masked = torch.from_numpy(np.stack([g.random(T) for g in draws]) < share[:, None])                   # (B, T)
    masked[:, 0] = False
    return masked


class Student(nn.Module):
    """A Backbone run bidirectionally, whose mask token may be learned while every other embedding stays frozen:
    `shift` is added to the mask row's embedding, and folded into it when the model is saved."""

    def __init__(self, lm, mask_id):
        super().__init__()
        self.lm, self.mask_id = lm, mask_id
        self.shift = nn.Parameter(torch.zeros(lm.D, device=lm.norm.weight.device))

    def embed(self, ids, masked):
        h = self.lm.embed(ids.masked_fill(masked, self.mask_id))                       # (B, T, D)
        return h + (masked[..., None] * self.shift).to(h.dtype)

    def states(self, ids, masked):
        """Yields h[0], ..., h[L-1] and the normed h[L], each (B, T, D), one at a time: never stacked."""
        yield (h := self.embed(ids, masked))
        side = self.lm.side(h, causal=False)
        for i in range(self.lm.L):
            h = self.lm.block(h, i, side)
            yield h if i < self.lm.L - 1 else self.lm.norm(h)

    def logits(self, normed):
        """Normed h[L] (..., D) -> logits (..., V); the mask token itself is never predicted."""
        out = self.lm.unnormed_head(normed).float()
        return out.index_fill(-1, torch.tensor([self.mask_id], device=out.device), -torch.inf)

    def fold(self):
        """Write the learned shift into the mask row (divided by Gemma's embedding scale, where there is one)."""
        embedding = self.lm.model.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        with torch.no_grad():
            embedding.weight[self.mask_id] += (self.shift / scale).to(embedding.weight.dtype)
            self.shift.zero_()


def teacher_states(lm, ids):
    """The AR model's own h[0], ..., h[L-1] and normed h[L] on the clean input, causal."""
    yield (h := lm.embed(ids))
    side = lm.side(h)
    for i in range(lm.L):
        h = lm.block(h, i, side)
        yield h if i < lm.L - 1 else lm.norm(h)


def conversion_loss(student, teacher, ids, masked, path, weight):
    """(loss, CE, cosine per layer (L+1,) or None) of ids (B, T), masked (B, T): sums over the masked tokens, so that
    any split of a batch adds up to the same.

    1 positions i whose next token is masked  2 student and teacher in step, cosines summed layer by layer
    3 CE of token i+1 from state i  4 path term: CE again, weighted by the model's own confidence  5 sum."""
    where = masked[:, 1:]                                                              # (B, T-1): i -> i+1 masked
    clean = teacher_states(teacher, ids) if teacher is not None else None
    cosines = []
    for h in student.states(ids, masked):
        if clean is not None:
            with torch.no_grad():
                target = next(clean)[:, :-1][where].float()                            # (n, D)
            cosines.append(F.cosine_similarity(h[:, :-1][where].float(), target, dim=-1).sum())
    logits = student.logits(h[:, :-1][where])                                          # (n, V)
    ce = F.cross_entropy(logits, ids[:, 1:][where], reduction="none")                  # (n,)
    loss = ce.sum() + path * (torch.exp(-ce).detach() * ce).sum()
    if clean is None:
        return loss, ce.detach().sum(), None
    cosines = torch.stack(cosines)                                                     # (L+1,)
    return loss + weight * (len(ce) - cosines.mean()), ce.detach().sum(), cosines.detach()


@torch.no_grad()
def validate(student, teacher, rows, cfg, world):
    """(masked CE in nats over all masked tokens, mean cosine or None) on rows (N, T); r on an even grid, own keys."""
    totals = torch.zeros(3, dtype=torch.float64)
    for i in range(world.rank, len(rows), world.size):
        masked = corrupt(rows.shape[1], cfg.seed, "validate", 0, [i], r=(i + 0.5) / len(rows)).to(world.device)
        _, ce, cosines = conversion_loss(student, teacher, rows[i:i + 1].to(world.device), masked, 0.0, 0.0)
        totals += torch.tensor([ce.item(), masked.sum().item(), 0.0 if cosines is None else cosines.mean().item()])
    ce, count, cosine = world.sum(totals.tolist())
    return ce / count, cosine / count if teacher is not None else None


# ------------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def fill(student, ids, masked, steps, temperature, seed):
    """Fill the masked positions of ids (B, T) in `steps` rounds, most confident first. Position 0 must be visible.

    1 logits of all masked tokens  2 draw a token for each, in float64  3 keep the most confident draws, enough to be
    done in time  4 repeat. Which token and which position are decided apart: one joint draw in float32 is biased."""
    ids, masked = ids.clone(), masked.clone()
    for step in range(steps):
        left = masked.sum(1)                                                           # (B,)
        if not left.any():
            break
        *_, normed = student.states(ids, masked)
        logits = student.logits(normed[:, :-1]).double()                               # (B, T-1, V): of tokens 1..T-1
        p = torch.softmax(logits / temperature if temperature > 0 else logits, -1)
        if temperature > 0:
            u = torch.from_numpy(generator(seed, "tokens", step).random(p.shape[:2])).to(p.device)
            token = (p.cumsum(-1) < u[..., None] * p.sum(-1, keepdim=True)).sum(-1).clamp_max(p.shape[-1] - 1)
        else:
            token = p.argmax(-1)                                                       # (B, T-1)
        confidence = p.gather(-1, token[..., None])[..., 0].masked_fill(~masked[:, 1:], -1)
        keep = -(-left // (steps - step))                                              # ceil: done at the last step
        rank = confidence.argsort(-1, descending=True).argsort(-1)                     # (B, T-1)
        reveal = (rank < keep[:, None]) & masked[:, 1:]
        ids[:, 1:] = torch.where(reveal, token, ids[:, 1:])
        masked[:, 1:] &= ~reveal
    return ids


def add_mask(lm, tokenizer):
    """The mask token's id: the tokenizer's own, or a new one; the vocabulary grows by a row if none is spare. The new
    row starts as the mean of the others (the library would draw it at random, and two arms would differ)."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.mask_token_id >= lm.V:
        with backbone.quiet(), torch.no_grad():
            lm.model.resize_token_embeddings(tokenizer.mask_token_id + 1, mean_resizing=False)
            for part in (lm.model.get_input_embeddings(), lm.model.get_output_embeddings()):
                part.weight[lm.V:] = part.weight[:lm.V].mean(0)
        lm.V = lm.config.vocab_size
    return tokenizer.mask_token_id


def load_converted(folder, device, dtype):
    """(Student, tokenizer) of a folder this file wrote; refuses an AR model."""
    if "mask_id" not in read_json(Path(folder) / "result.json", "convert a model with: python repr_align.py"):
        raise UserError(f"{folder} is no converted model; make one with: python repr_align.py")
    tokenizer = data.load_tokenizer(folder)
    return Student(backbone.load(folder, device, dtype), tokenizer.mask_token_id), tokenizer


def sample_text(cfg, world, dtype):
    student, tokenizer = load_converted(cfg.load, world.device, dtype)
    prompt = tokenizer(cfg.prompt)["input_ids"] or [tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *[tokenizer.mask_token_id] * cfg.max_new_tokens]], device=world.device)   # (1, T)
    if ids.shape[1] > student.lm.config.max_position_embeddings:
        raise UserError(f"prompt and masks are {ids.shape[1]} tokens, more than the model's "
                        f"{student.lm.config.max_position_embeddings}; shorten one")
    masked = torch.arange(ids.shape[1], device=world.device)[None] >= len(prompt)
    return tokenizer.decode(fill(student, ids, masked, cfg.sample_steps, cfg.temperature, cfg.seed)[0])


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    if cfg.align_weight < 0 or cfg.path < 0 or cfg.temperature < 0:
        raise UserError("--align_weight, --path and --temperature must not be negative")

    # -------------------------------------------------------------------------------------------------- setup
    world = setup(cfg.device)
    dtype = pick_dtype(cfg.dtype, world.device)
    if cfg.load:
        print(text := sample_text(cfg, world, dtype))
        return text
    slots, micro = split_batch(cfg.batch_size, cfg.micro_batch, world)
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model, cfg.random_init)}
    if (result := finished(cfg, identity)) and not cfg.dry_run:
        print(f"{cfg.out} is finished: w = {result['w']:g}, masked val CE {result['val_loss']:.3f} nats")
        return result
    shape = backbone.read_config(model, cfg.seq_len)
    if cfg.dry_run:
        print("\n".join(f"  {k} = {v}" for k, v in vars(cfg).items()) + f"\n{model}: {shape.num_hidden_layers} blocks "
              f"of width {shape.hidden_size}; {cfg.steps * cfg.batch_size * cfg.seq_len:,} tokens")
        return None

    # -------------------------------------------------------------------------------------------- data, models
    tokenizer = data.load_tokenizer(model)
    shards, _ = backbone.shards_beside(cfg, tokenizer, world)
    train = data.Tokens(shards, "train", cfg.seq_len, cfg.train_tokens)
    held_out = data.Tokens(shards, "val", cfg.seq_len).spread(cfg.eval_batches)[:, :-1]           # (N, T)
    load = dict(device=world.device, random_init=cfg.random_init)
    teacher = backbone.load(model, dtype=dtype, **load) if cfg.align_weight > 0 else None
    lm = backbone.load(model, dtype=torch.float32, **load)
    student = Student(lm, add_mask(lm, tokenizer))
    student.requires_grad_(True)
    if cfg.freeze_embed:
        for part in (lm.model.get_input_embeddings(), lm.model.get_output_embeddings()):
            part.requires_grad_(False)
    params = [p for p in student.parameters() if p.requires_grad]
    names = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    optimizers = optim.build(names, cfg.lr, cfg.lr_adam, cfg.weight_decay, inside=lm.blocks_name)
    run = Run(cfg, world, identity)
    state = run.resume([student], optimizers)
    curve = state.get("curve", [])
    run.say(f"converting {model}: w = {cfg.align_weight:g}, {sum(p.numel() for p in params):,} parameters learn")

    # --------------------------------------------------------------------------------------------------- loop
    flops = backbone.flops_per_token(lm.model, cfg.seq_len) * (4 / 3 if teacher is not None else 1)   # + one forward
    gradients, stop, clock = GradientSum(params, world, overlap=False), StopSignal(world), Clock(state["seconds"])
    for step in range(state["step"], cfg.steps):
        if step % cfg.eval_every == 0:
            with clock.paused():
                curve = [row for row in curve if row[0] < step]
                curve.append([step, *validate(student, teacher, held_out, cfg, world)])
                run.log(step, cfg.steps, val_loss=curve[-1][1])
        # 1 batch and masks: functions of (seed, step, slot)
        everyone = corrupt(cfg.seq_len, cfg.seed, "mask", step, range(cfg.batch_size))            # (B, T)
        count, sums = max(1, everyone.sum().item()), torch.zeros(2 + lm.L)
        for some in torch.tensor(slots).split(micro):
            ids = train.batch(cfg.seed, step, some.tolist(), cfg.batch_size)[:, :-1].to(world.device)   # (b, T)
            # 2 gradient of the mean over the whole batch's masked tokens
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                loss, ce, cosines = conversion_loss(student, teacher, ids, everyone[some].to(world.device), cfg.path,
                                                    cfg.align_weight)
            (loss / count).backward()
            sums += torch.cat([ce[None], ce.new_zeros(lm.L + 1) if cosines is None else cosines]).cpu() / count
        gradients.finish()
        # 3 clip, step
        norm = nn.utils.clip_grad_norm_(params, 1.0).item()
        if not math.isfinite(norm):
            raise UserError(f"the loss or its gradient stopped being finite at step {step}; lower --lr and run again "
                            f"({cfg.out} keeps the last good state)")
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cooldown=0.5))
        for p in params:
            p.grad = None
        # 4 report, save, leave when asked
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            ce, *cosines = world.sum(sums.tolist())
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, ce=ce,
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm, cosine_by_layer=cosines)
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0:
            run.save(done, clock, [student], optimizers, curve=curve)
        if leaving:
            run.leave(done)
    stop.done()
    seconds = clock.seconds()

    # ------------------------------------------------------------------------------------------------- result
    curve.append([cfg.steps, *validate(student, teacher, held_out, cfg, world)])
    student.fold()
    if world.main:
        backbone.save_model(lm.model, tokenizer, run.out)
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
