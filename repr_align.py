"""repr_align.py: CONVERT. The AR model becomes a masked diffusion LM, each layer held near the AR model's own states.

    python repr_align.py --out out/mine/w10                           # w = 10 on the toy: ~1 min on 2 cores
    python repr_align.py --align_weight 0 --out out/mine/w0           # the control arm: same batches, same masks
    python repr_align.py --attention block --align_weight 0 --out out/mine/block     # writes block after block
    torchrun --nproc_per_node 8 repr_align.py --preset 8b --shard --model meta-llama/Llama-3.1-8B

Student = the AR weights with bidirectional attention on masked input; teacher = the same weights, frozen, causal, on
the clean input. loss = CE + path * p_correct * CE + w * (1 - mean cosine over layers) on the positions whose next token
is masked (REPR-ALIGN, arXiv 2605.06885; core/conversion.py). studies/twin.py uses the converted model.
A block model sees its block of tokens and what is before it, masked (--context noisy) or as it is: a clean copy in the
same pass, at twice the compute, which sees itself by blocks (clean) or by tokens (causal, as the AR model did).
Writes a Hugging Face folder (see core/twin_lm.py), section.md with convert.png, log.jsonl and result.json to --out.

Letters: B batch, T tokens, L blocks, N held-out rows, w the weight of alignment.
"""
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from core import backbone, optim, report
from core.common import GradientSum, StopSignal, UserError, entry, parse, pick_dtype, setup, split_batch
from core.conversion import Arm, conversion_loss, corrupt, flops_per_token
from core.masked import Student, add_mask, fill, text_likelihood
from core.run import Clock, Run, card, finished
from core.shard import Whole, clip, is_sharded, report_size, shard, whole


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m", "0.6b", "8b"] = "auto"  # auto: by the model's size
    model: str = "toy"          # toy (the folder beside --out), a folder or a Hub id
    data: str = "stdlib"        # see data.py
    out: str = "out/repr_align/w10"  # run folder
    seed: int = 0               # every draw is keyed by it: arms with one seed see the same batches and masks
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the teacher and of autocast
    random_init: bool = False   # random weights of the same shape
    attention: Literal["bidirectional", "block"] = "bidirectional"  # of the student: all to all, or block after block
    block_size: int = 16        # tokens of a block, with --attention block
    context: Literal["noisy", "clean", "causal"] = "noisy"  # what a block sees before it: masks, or a clean copy
    shift: bool = True          # the state at a token predicts the next one, as in the AR model, not the token itself
    ar_weight: float = 0.0      # weight of the next-token loss on a causal clean copy (0: off)
    align_weight: float = 10.0  # w (0: no alignment, no teacher)
    align_until: int = 0        # step from which w is 0 (0: none)
    path: float = 1.0           # weight of the p_correct * CE term (always on in the published code)
    freeze: Literal["embed", "none"] = "embed"  # what stays as it is: embeddings and head, or nothing
    shard: bool = False         # spread blocks of student and teacher over the processes (FSDP2; AdamW only)
    cooldown: float = 0.5       # share of the run in which lr descends to zero (0: constant, so that --steps may grow)
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
    keep_state: bool = False    # keep state.pt when finished, so that --steps can be raised
    track: Literal["", "wandb", "tensorboard"] = ""  # where the values of log.jsonl also go
    dry_run: bool = False       # print sizes, then leave


PRESETS = {
    "tiny": {"steps": 20, "batch_size": 4, "seq_len": 32, "eval_batches": 4, "eval_every": 10, "log_every": 10,
             "save_every": 10, "warmup": 5},
    "135m": {"steps": 40, "batch_size": 8, "lr": 0.0, "lr_adam": 3e-4, "eval_batches": 16, "eval_every": 20,
             "log_every": 10},                                               # four seconds a step on two cores
    "0.6b": {"steps": 5000, "batch_size": 32, "micro_batch": 4, "seq_len": 1024, "lr": 0.0, "lr_adam": 3e-4,
             "warmup": 200, "eval_every": 500, "save_every": 500},
    "8b": {"steps": 20000, "batch_size": 96, "micro_batch": 1, "seq_len": 4096, "lr": 0.0, "lr_adam": 3e-4,
           "warmup": 500, "eval_every": 1000, "save_every": 1000},
}
PROMPT = "def main(args):"      # of the sample at the end
GAP = 8                         # tokens that are hidden in the middle of a text and filled in
SURE = 0.9                      # a call reveals all tokens more likely than that: how many a call are they?


# ---------------------------------------------------------------------------------------------------------- set-up
def check(cfg):
    """Refuse what can be seen from the flags alone."""
    blocks = cfg.attention == "block"
    for wrong, why in (
        (min(cfg.align_weight, cfg.path, cfg.ar_weight) < 0,
         "--align_weight, --path and --ar_weight must not be negative"),
        (cfg.seq_len < 3, "--seq_len must be at least 3: the first token is never masked"),
        (not blocks and cfg.context != "noisy", f"--context {cfg.context} is of blocks: add --attention block"),
        (blocks and cfg.seq_len % cfg.block_size, f"--block_size {cfg.block_size} must divide --seq_len {cfg.seq_len}"),
        (cfg.ar_weight and cfg.context != "causal", "--ar_weight needs a clean copy: add --context causal"),
        (cfg.align_until > cfg.steps, f"--align_until {cfg.align_until} lies beyond --steps {cfg.steps}"),
    ):
        if wrong:
            raise UserError(why)


def load_models(cfg, model, tokenizer, world, dtype):
    """(student in fp32, teacher or None): the same weights twice."""
    load = dict(device=world.device, random_init=cfg.random_init)
    teacher = backbone.load(model, dtype=dtype, **load) if cfg.align_weight > 0 else None
    lm = backbone.load(model, dtype=torch.float32, **load)
    student = Student(lm, add_mask(lm, tokenizer), Arm(*(getattr(cfg, name) for name in Arm._fields)))
    student.requires_grad_(True)                                             # the mask token's own vector always learns
    if cfg.freeze == "embed":
        lm.model.get_input_embeddings().requires_grad_(False)
        lm.model.get_output_embeddings().requires_grad_(False)
    if cfg.shard:
        shard([m for m in (lm, teacher) if m is not None], world, dtype)
    return student, teacher


def build_optimizers(cfg, student, world):
    """(what learns, its optimizers): shards and whole tensors apart, since no step may mix the two."""
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    groups = [[(n, p) for n, p in named if is_sharded(p) == there] for there in (True, False)]
    lr = 0.0 if cfg.shard else cfg.lr
    return [p for _, p in named], [o for group in groups if group for o in optim.build(
        group, lr, cfg.lr_adam, cfg.weight_decay, inside=student.lm.blocks_name, world=world)]


@torch.no_grad()
def validate(student, teacher, rows, cfg, world):
    """[masked CE in nats over all masked tokens, mean cosine or None] on rows (N, T); r on an even grid, own keys. With
    a causal clean copy also its next-token loss: what the student has forgotten of the AR model's task."""
    totals, ar = torch.zeros(4, dtype=torch.float64), cfg.context == "causal"
    for i in range(world.rank, -(-len(rows) // world.size) * world.size, world.size):  # as many passes on every rank:
        counts, i = i < len(rows), min(i, len(rows) - 1)                               # with --shard each is collective
        is_mask = corrupt(rows.shape[1], cfg.seed, "validate", 0, [i], r=(i + 0.5) / len(rows))
        loss = conversion_loss(student, teacher, rows[i:i + 1].to(world.device), is_mask, 0.0, ar=ar)
        totals += counts * torch.tensor([loss.ce.item(), is_mask.sum().item(), loss.cosines.mean().item(),
                                         loss.ar.item() / rows[:, 1:].numel()])
    ce, count, cosine, forgot = world.sum(totals.tolist())
    return [ce / count, cosine / count if teacher is not None else None] + [forgot] * ar


def infilled(student, rows, seed):
    """Share of GAP hidden tokens in the middle of rows (N, T) that greedy filling, two a call, gets right. A block
    model, which sees nothing after a block, is given only what comes before them."""
    lo = rows.shape[1] // 2 - GAP // 2
    rows = rows if student.arm.attention == "bidirectional" else rows[:, :lo + GAP]
    hidden = torch.zeros_like(rows, dtype=torch.bool)
    hidden[:, lo:lo + GAP] = True
    ids = fill(student, rows.masked_fill(hidden, student.mask_id), hidden, GAP // 2, temperature=0.0, seed=seed)
    return (ids == rows)[hidden].double().mean().item()


def tokens_a_call(student, rows, seed):
    """How many tokens a call reveals, by threshold SURE, where the last 64 of rows (N, T), or half, are to write."""
    hidden = torch.zeros_like(rows, dtype=torch.bool)
    hidden[:, max(rows.shape[1] // 2, rows.shape[1] - 64):] = True
    masks = [hidden]
    fill(student, rows.masked_fill(hidden, student.mask_id), hidden, 1, seed=seed, threshold=SURE,
         watch=lambda _, is_mask: masks.append(is_mask))
    calls = sum((a != b).any(1).sum().item() for a, b in zip(masks, masks[1:]))           # each row makes its own
    return hidden.sum().item() / calls


# ------------------------------------------------------------------------------------------------- what is reported
def sample(student, tokenizer, seed):
    """What the model writes after PROMPT, one token a call; studies/twin.py has it write by other settings."""
    prompt = tokenizer(PROMPT)["input_ids"]
    new = min(32, student.lm.config.max_position_embeddings - len(prompt))
    ids = torch.tensor([[*prompt, *[student.mask_id] * new]], device=student.shift.device)           # (1, T)
    return tokenizer.decode(fill(student, ids, ids == student.mask_id, new, seed=seed)[0])


def summary(result):
    return (f"w = {result['w']:g}, masked val CE {result['curve'][0][1]:.3f} -> {result['val_loss']:.3f} nats in "
            f"{result['seconds']:.0f} s\n{result['sample']}")


def section(result):
    """This run's section of the report; report.compare_arms compares two runs."""
    flags = ", ".join(f"{k} {v}" for k, v in result["flags"].items())
    columns = ["step", "masked CE (nats)", "cosine with the AR model's states", "next-token CE, clean copy (nats)"]
    a_call = result["tokens_a_call"]
    sure = f"; by calls that reveal what is likelier than {SURE:g}, {a_call:.2f} tokens a call" if a_call else ""
    rows = [[step, *(None if value is None else f"{value:.3f}" for value in rest)] for step, *rest in result["curve"]]
    return f"""## CONVERT, {result["headline"][0][0].removeprefix("masked twin, ")}

{result['steps']} steps of {result['batch_size']} x {result['seq_len']} tokens in {result['seconds']:.0f} s \
({result['tokens_per_s']:,.0f} tokens/s), one training seed ({result['seed']}); means over {result['eval_sequences']} \
held-out sequences, their shares of masks on an even grid. {flags}.

{report.table(columns[:len(rows[0])], rows)}

-log p of these texts is at most {result["bound"][0]:.3f} +- {result["bound"][1]:.3f} nats a token (standard error). \
Of {GAP} hidden tokens in the middle of a text {result["infilled"]:.1%} are filled in right{sure}.

![masked CE on held-out text over the steps of training](convert.png)

It writes, one token a call:

{textwrap.indent(result['sample'], '    ')}
"""


def publish(run, cfg, result, model, student, tokenizer):
    """Save the model; sample from it; write the section, the figure, the model card and the result."""
    student.fold()
    weights = {"state_dict": whole(student.lm.model.state_dict(), run.world)} if cfg.shard else {}
    result["sample"] = sample(student, tokenizer, cfg.seed)
    arm = "" if student.arm == Arm() else f", {student.arm}"
    result["headline"] = [[f"masked twin, w = {result['w']:g}{arm}", f"masked CE {result['curve'][0][1]:.3f} -> "
                           f"{result['val_loss']:.3f} nats, {result['seconds']:.0f} s"]]
    if run.world.main:
        backbone.save_model(student.lm.model, tokenizer, run.out, twin=True, **weights)
        card(run.out, "A masked diffusion language model", "" if Path(model).exists() else model, result)
        with report.figure(run.out / "convert.png") as axes:
            steps, ce, *_ = zip(*result["curve"], strict=True)
            axes[0, 0].plot(steps, ce, "o-", markersize=3, color=report.BLUE)
            axes[0, 0].set(title=f"CONVERT: masked CE, w = {result['w']:g}", xlabel="step",
                           ylabel="nats a masked token")
    run.finish(result, section(result))


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of(cfg.model, cfg.out))
    check(cfg)
    world = setup(cfg.device)
    dtype, (slots, micro) = pick_dtype(cfg, world.device), split_batch(cfg.batch_size, cfg.micro_batch, world)
    model = backbone.resolve(cfg.model, cfg.out)
    identity = {"base": backbone.identity(model, cfg.random_init)}
    if not cfg.dry_run and (result := finished(cfg, identity)):
        if world.main:
            print(f"{cfg.out} is finished: {summary(result)}")
        return result
    config = backbone.read_config(model, cfg.seq_len)
    if cfg.dry_run:
        return report_size(cfg, config, world, micro, dtype)

    tokenizer = backbone.load_tokenizer(model)
    shards, meta = data.shards_beside(cfg, tokenizer, world)
    train = data.Tokens(shards, "train", cfg.seq_len, cfg.train_tokens)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches)[:, :-1]             # (N, T)
    student, teacher = load_models(cfg, model, tokenizer, world, dtype)
    params, optimizers = build_optimizers(cfg, student, world)
    run = Run(cfg, world, identity)
    things = [Whole(student, world)], [Whole(o, world) for o in optimizers]
    state = run.resume(*things)
    curve, copies = state.get("curve", []), 1 + (cfg.context != "noisy")
    flops = flops_per_token(student.lm, cfg.seq_len, teacher is not None, copies)
    run.say(f"converting {model} to {student.arm}: w = {cfg.align_weight:g}, {sum(p.numel() for p in params):,} "
            "parameters learn")

    gradients = GradientSum([p for p in params if not is_sharded(p)], world, overlap=False)
    stop, clock = StopSignal(world), Clock(state["seconds"])
    for step in range(state["step"], cfg.steps):
        if step % cfg.eval_every == 0:
            with clock.paused():
                curve.append([step, *validate(student, teacher, held_out, cfg, world)])
                run.log(step, cfg.steps, val_loss=curve[-1][1])
        # 1 masks of the whole batch, text of this process: functions of (seed, step, slot)
        is_mask = corrupt(cfg.seq_len, cfg.seed, "mask", step, range(cfg.batch_size), None,
                          student.arm.plan(cfg.seq_len)[0])                                              # (B, T)
        count = max(1, is_mask.sum().item())
        w = cfg.align_weight if step < (cfg.align_until or cfg.steps) else 0.0
        sums = torch.zeros(2 + student.lm.L, device=world.device)
        for some in torch.tensor(slots).split(micro):
            ids = train.batch(cfg.seed, step, some.tolist(), cfg.batch_size)[:, :-1].to(world.device)    # (b, T)
            # 2 gradient of the mean over the whole batch's masked tokens and aligned states
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                loss = conversion_loss(student, teacher if w else None, ids, is_mask[some], cfg.path, cfg.ar_weight > 0)
            (loss.each.sum() / count + w * loss.apart / count
             + cfg.ar_weight * loss.ar / (cfg.batch_size * (cfg.seq_len - 1))).backward()
            sums += torch.cat([loss.ce[None] / count, loss.cosines / count])
        gradients.finish()
        # 3 clip, step
        norm = clip(params, 1.0, world)
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown), norm, f"step {step}")
        # 4 report, save (at the end too, before anything is measured), leave when asked
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            ce, *cosines = world.sum(sums.tolist())
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, ce=ce,
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm,
                         cosine_by_layer=[c if math.isfinite(c) else None for c in cosines])
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0 or done == cfg.steps:
            run.save(done, clock, *things, wait=done == cfg.steps, curve=curve)
        if leaving:
            run.leave(done)
    stop.done()

    seconds, tokens = clock.seconds(), cfg.steps * cfg.batch_size * cfg.seq_len
    curve.append([cfg.steps, *validate(student, teacher, held_out, cfg, world)])
    held_out = held_out.to(world.device)
    judged = text_likelihood(student, held_out, 4, cfg.seed)
    arms = ("path", "ar_weight", "align_until", *Arm._fields)                       # shown where they are not as ever
    flags = ["freeze", "train_tokens", *(flag for flag in arms if getattr(cfg, flag) != getattr(Config, flag))]
    publish(run, cfg, {
        "val_loss": curve[-1][1], "curve": curve, "w": cfg.align_weight, "cosine": curve[-1][2], "steps": cfg.steps,
        "bound": [nats / held_out[:, 1:].numel() for nats in judged], "batch_size": cfg.batch_size,
        "infilled": infilled(student, held_out[:32], cfg.seed), "seq_len": cfg.seq_len, "tokens": tokens,
        "tokens_a_call": None if cfg.shard else tokens_a_call(student, held_out[:8], cfg.seed),    # calls could differ
        "tokens_per_s": tokens / seconds, "seconds": seconds, "seed": cfg.seed, "mask_id": student.mask_id,
        "eval_sequences": len(held_out), "tasks": meta.get("tasks", 0),
        "flags": {flag: getattr(cfg, flag) for flag in flags}, **identity}, model, student, tokenizer)
    run.say(f"saved to {cfg.out}: {summary(run.result)}")
    return run.result


if __name__ == "__main__":
    main()
