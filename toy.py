"""BACKBONE: train a small causal LM that stands in for a pretrained one, offline and in minutes.

    python toy.py                                   # 8 blocks of width 128, ~3 min on 2 cores
    python toy.py --preset tiny --out out/tiny/toy  # seconds, for a first try
    python toy.py --preset tasks --out out/tasks/toy    # smaller, learns core/tasks.py
    torchrun --nproc_per_node 2 toy.py              # the same weights up to rounding

The default reaches about 1.7 bits per byte on held-out standard library source.

It writes a Hugging Face folder (config.json, model.safetensors, tokenizer), log.jsonl and
result.json. Every other stage takes this folder, or any other causal LM, by --model.

Shapes: B batch, T tokens, V vocabulary.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import data
from core import backbone, optim
from core.common import entry, parse, setup, split_batch
from core.run import TRACKERS, Run, finished, training_flops


@dataclass
class Config:
    # model, text, folder
    preset: Literal["auto", "tiny", "toy", "tasks"] = "auto"    # auto: toy
    data: str = "stdlib"        # see data.py
    out: str = "out/toy"        # run folder
    seed: int = 0               # every random number is a function of the seed
    device: str = "auto"        # auto, cpu, cuda
    # network and text
    layers: int = 8             # blocks
    width: int = 128            # hidden width
    heads: int = 4              # query heads; there is a key and value head for every two
    vocab: int = 2048           # tokens of the byte-level BPE
    tasks: float = 0.0          # share of generated task lines in the training text
    # optimisation
    steps: int = 1000           # optimizer steps
    batch_size: int = 8         # sequences a step, over all processes
    seq_len: int = 128          # tokens a sequence
    lr: float = 0.02            # Muon, for the matrices inside the blocks
    lr_adam: float = 8e-3       # AdamW, for everything else
    warmup: int = 50            # steps (0: none)
    log_every: int = 50         # steps between log lines
    save_every: int = 500       # steps between checkpoints
    track: Literal[tuple(TRACKERS)] = ""    # tracker that also gets the log


PRESETS = {
    "tiny": dict(layers=4, width=32, heads=2, vocab=512, steps=20, batch_size=4, seq_len=32,
                 warmup=5, log_every=10, save_every=10),
    "tasks": dict(layers=4, width=64, heads=2, tasks=0.8, steps=2000, batch_size=16, seq_len=64),
}
COOLDOWN = 0.6                  # share of the run in which the rate descends to zero
WEIGHT_DECAY = 0.1


def build(cfg):
    """An untrained Qwen3, a function of the seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(cfg.seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=3 * cfg.width,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=max(1, cfg.heads // 2), head_dim=cfg.width // cfg.heads,
        max_position_embeddings=max(1024, cfg.seq_len), tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0))


def next_token_loss(lm, ids):
    """Mean cross-entropy in nats over ids (B, T+1)."""
    logits = lm.head(lm.hidden(ids[:, :-1], lm.L))                      # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validate(lm, rows):
    """Mean loss over held-out rows (N, T+1)."""
    losses = [next_token_loss(lm, ids).item() * len(ids) for ids in rows.split(32)]
    return sum(losses) / len(rows)


def summary(result):
    return (f"{result['val_loss']:.3f} nats a token = {result['bits_per_byte']:.3f} bits per byte "
            f"on held-out text, {result['seconds']:.0f} s")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS)
    world = setup(cfg.device)
    slots, _ = split_batch(cfg.batch_size, 0, world)
    identity = {"data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        print(f"{cfg.out} is finished: {summary(result)}")
        return result

    # Model, data, optimizers
    model = build(cfg).to(world.device)
    shards, meta = data.prepare(cfg.data, None, Path(cfg.out).parent / "data", world,
                                vocab=cfg.vocab, tasks=cfg.tasks)
    train = data.Tokens(shards, "train", cfg.seq_len)
    if world.main:
        train.warn(cfg.steps, cfg.batch_size)
    held_out = data.Tokens(shards, "val", cfg.seq_len).windows(512).to(world.device)
    lm = backbone.Backbone(model)
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    flops = training_flops(size, 0, cfg.layers, model.config, cfg.seq_len)
    run = Run(cfg, world, identity)
    optimizers = optim.build(model.named_parameters(), cfg.lr, cfg.lr_adam, WEIGHT_DECAY,
                             inside="layers.", world=world)
    state = run.resume([model], optimizers)
    run.say(f"training {size:,} parameters on a corpus of {meta['tokens']['train']:,} tokens")

    # The loop
    for step in run.steps(state["step"], cfg.steps):
        # 1. Gradient of the mean loss over the global batch
        ids = train.batch(cfg.seed, step, slots, cfg.batch_size).to(world.device)       # (b, T+1)
        loss = next_token_loss(lm, ids) * (len(ids) / cfg.batch_size)
        loss.backward()
        optim.sum_gradients(params, world)
        # 2. Clip and step
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        share = optim.share_at(step, cfg.steps, cfg.warmup, COOLDOWN)
        optim.step_all(optimizers, share, norm, f"step {step}")
        # 3. Log, save, leave if a signal asked for it
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            loss = world.sum([loss.item()])[0]
            run.progress(done, cfg.steps, cfg.batch_size * cfg.seq_len, flops,
                         loss=loss, gnorm=norm)
        is_due = done % cfg.save_every == 0 or done == cfg.steps
        run.save(is_due, done, [model], optimizers)

    # The result
    seconds = run.clock.seconds()
    val_loss = validate(lm, held_out)
    tokenizer = backbone.load_tokenizer(shards)
    nats = val_loss * held_out[:, 1:].numel()
    bits = nats / math.log(2) / data.count_bytes(tokenizer, held_out)
    if world.main:
        backbone.save_model(model.eval(), tokenizer, run.out)
    world.barrier()
    result = run.finish({
        "val_loss": val_loss, "bits_per_byte": bits,
        "parameters": size, "steps": cfg.steps, "seconds": seconds,
        "base": backbone.identity(run.out)})
    run.say(f"{run.out}: {summary(result)}")
    return result


if __name__ == "__main__":
    main()
