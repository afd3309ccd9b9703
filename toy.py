"""toy.py: train the small causal LM that stands in for a pretrained one: offline, minutes, an ordinary model folder.

    python toy.py --preset tiny --out out/tiny/toy               # seconds: a model for trying things
    python toy.py                                                # the toy: 8 blocks of width 128, ~3 min on 2 cores
    torchrun --nproc_per_node 2 toy.py                           # the same weights up to rounding

The default reaches about 1.7 bits per byte on held-out standard library. Writes a Hugging Face folder (config.json,
model.safetensors, tokenizer, README.md), log.jsonl, section.md and result.json to --out; any other causal LM takes its
place by --model.

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import data
from core import backbone, optim
from core.backbone import Backbone, flops_per_token
from core.common import GradientSum, StopSignal, UserError, entry, parse, peak_flops, setup, split_batch
from core.run import TRACKERS, Clock, Run, card, finished


@dataclass
class Config:
    preset: Literal["tiny", "toy"] = "toy"  # tiny: seconds, for tests; toy: minutes
    data: str = "stdlib"        # see data.py
    out: str = "out/toy"        # run folder; the shards are kept in `data` beside it
    seed: int = 0               # every draw is keyed by it
    device: str = "auto"        # auto, cpu, cuda
    steps: int = 1000           # optimizer steps
    batch_size: int = 8         # sequences a step, over all processes
    seq_len: int = 128          # tokens a sequence
    layers: int = 8             # blocks
    width: int = 128            # hidden width D
    heads: int = 4              # query heads; half as many key/value heads
    vocab: int = 2048           # vocabulary of the byte-level BPE
    tasks: float = 0.0          # share of generated task lines in its training text; see core/tasks.py
    lr: float = 0.02            # Muon, for the matrices inside the blocks
    lr_adam: float = 8e-3       # AdamW, for embeddings and norms
    weight_decay: float = 0.1   # decoupled, on both
    warmup: int = 50            # steps
    cooldown: float = 0.6       # share of the run in which the rate descends to zero (0: constant, so --steps may grow)
    eval_every: int = 250       # steps between validations
    log_every: int = 50         # steps between log lines
    save_every: int = 250       # steps between checkpoints
    keep_state: bool = False    # keep state.pt of the finished run, to go on from
    track: Literal[tuple(TRACKERS)] = ""  # also send the log to wandb or tensorboard
    dry_run: bool = False       # print sizes and cost, then leave


PRESETS = {"tiny": dict(steps=20, batch_size=4, seq_len=32, layers=4, width=32, heads=2, vocab=512, eval_every=10,
                        log_every=10, save_every=10, warmup=5)}


def build_toy(cfg, vocab):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    if cfg.width % cfg.heads or (cfg.width // cfg.heads) % 2:
        raise UserError(f"--width {cfg.width} must be an even multiple of --heads {cfg.heads}")
    torch.manual_seed(cfg.seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=cfg.width, intermediate_size=3 * cfg.width, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=max(1, cfg.heads // 2), head_dim=cfg.width // cfg.heads,
        max_position_embeddings=max(1024, cfg.seq_len), tie_word_embeddings=True, bos_token_id=0, eos_token_id=0))


def text_loss(lm, ids):
    """Mean next-token loss (nats) of ids (B, T+1)."""
    logits = lm.head(lm.through(lm.embed(ids[:, :-1]), 0, lm.L))                              # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(lm, rows, world, micro=32):
    """Mean next-token loss (nats) over rows (N, T+1), shared out over the processes."""
    total = 0.0
    for ids in rows[world.rank::world.size].split(micro):
        total += text_loss(lm, ids.to(world.device)).item() * len(ids)
    return world.sum([total])[0] / len(rows)


def summary(result):
    return (f"val loss {result['val_loss']:.3f} nats a token = {result['bits_per_byte']:.3f} bits per byte, "
            f"{result['tokens']:,} training tokens in {result['seconds']:.0f} s")


def section(result):
    """Its part of the report, a function of result.json."""
    return (f"## The backbone\n\nA small causal LM trained here, {result['parameters']:,} parameters, one seed "
            f"({result['seed']}): {summary(result)}, on {result['val_windows']} held-out windows.\n")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    if not 0 <= cfg.cooldown <= 1:
        raise UserError(f"--cooldown {cfg.cooldown} is a share of the run: it must lie in [0, 1]")
    world = setup(cfg.device)
    slots, _ = split_batch(cfg.batch_size, 0, world)
    if (result := finished(cfg, {})) and not cfg.dry_run:
        print(f"{cfg.out} is finished: " + summary(result))
        return result
    model = build_toy(cfg, cfg.vocab).to(world.device)
    size, flops = sum(p.numel() for p in model.parameters()), flops_per_token(model, cfg.seq_len)
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    if cfg.dry_run:
        seconds = tokens * flops / (0.4 * peak_flops(world.device) * world.size)
        print(f"{cfg}\n{size:,} parameters, {tokens:,} tokens, {flops:.2e} FLOPs a token: "
              f"about {seconds:.0f} s at 40% MFU")
        return None

    # --------------------------------------------------------------------------------- data, model, optimizer
    shards, meta = data.prepare(cfg.data, None, Path(cfg.out).parent / "data", world, vocab=cfg.vocab, tasks=cfg.tasks)
    if meta["vocab_size"] > cfg.vocab:
        raise UserError(f"the shards in {shards} have {meta['vocab_size']} token ids, more than --vocab {cfg.vocab}; "
                        "delete that folder or pass another --out")
    train = data.Tokens(shards, "train", cfg.seq_len)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(512)                                # (N, T+1)
    lm, params = Backbone(model), list(model.parameters())
    optimizers = optim.build(model.named_parameters(), cfg.lr, cfg.lr_adam, cfg.weight_decay, inside="layers.",
                             world=world)
    run = Run(cfg, world, {})
    state = run.resume([model], optimizers)
    run.say(f"training {size:,} parameters on a corpus of {meta['tokens']['train']:,} tokens")

    # -------------------------------------------------------------------------------------------------- loop
    gradients, stop, clock = GradientSum(params, world, overlap=False), StopSignal(world), Clock(state["seconds"])
    for step in range(state["step"], cfg.steps):
        # 1 gradient of the mean loss over the global batch
        ids = train.batch(cfg.seed, step, slots, cfg.batch_size).to(world.device)                 # (b, T+1)
        loss = text_loss(lm, ids) * (len(ids) / cfg.batch_size)
        loss.backward()
        gradients.finish()
        # 2 clip, step
        norm = nn.utils.clip_grad_norm_(params, 1.0).item()
        optim.step_all(optimizers, optim.share_at(step, cfg.steps, cfg.warmup, cfg.cooldown), norm, f"step {step}")
        # 3 report, validate, save: at the last step before the final validation, which may fail
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.progress(done, cfg.steps, clock, cfg.batch_size * cfg.seq_len, flops, loss=world.sum([loss.item()])[0],
                         lr=optimizers[0].param_groups[0]["lr"], gnorm=norm)
        if done % cfg.eval_every == 0 and done < cfg.steps:
            with clock.paused():
                run.log(done, cfg.steps, val_loss=evaluate(lm, held_out[::4], world))
        leaving = stop.poll()
        if leaving or done % cfg.save_every == 0 or done == cfg.steps:
            run.save(done, clock, [model], optimizers, wait=done == cfg.steps)
        if leaving:
            run.leave(done)
    stop.done()

    # ------------------------------------------------------------------------------------------------- result
    seconds, val = clock.seconds(), evaluate(lm, held_out, world)
    bits = val / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
    if world.main:
        backbone.save_model(model.eval(), backbone.load_tokenizer(shards), run.out)
        card(run.out, "A small causal LM, the toy of nanoDiHAL", "", {"bits per byte": bits, "training tokens": tokens})
    world.barrier()
    result = {"val_loss": val, "bits_per_byte": bits, "tokens": tokens, "seconds": seconds, "parameters": size,
              "val_windows": len(held_out), "seed": cfg.seed, "base": backbone.identity(run.out),
              "headline": [["the toy backbone", f"{bits:.3f} bits per byte"]]}
    run.finish(result, section(result))
    run.say(f"saved to {run.out}: " + summary(run.result))
    return run.result


if __name__ == "__main__":
    main()
