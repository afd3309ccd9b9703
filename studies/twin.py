"""twin.py: use a converted model: continue a text, fill a gap.

    python -m studies.twin --load out/repr_align/block --prompt "import " --sample_steps 64 --show --gif film.gif
    python -m studies.twin --load out/mine/both --prompt "import " --drafts 2     # the AR mode's text in fewer calls
    python -m studies.twin --load out/repr_align/w10 --prompt "def f(" --suffix "return x" --middle 32

Prints text; writes nothing but the film. repr_align.py makes such models, core/masked.py holds the samplers.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.twin\n")
import re
from dataclasses import dataclass
from typing import Literal

import torch

from core import report
from core.common import UserError, entry, parse, pick_dtype, setup
from core.masked import ORDERS, fill, load_converted, speculate


@dataclass
class Config:
    load: str = "out/repr_align/w10"  # folder of a converted model
    prompt: str = ""            # text before the masks
    suffix: str = ""            # text after them
    max_new_tokens: int = 64    # masks to fill after a prompt
    middle: int = 32            # masks to fill between prompt and suffix
    order: Literal[tuple(ORDERS)] = "confidence"  # which masks are filled first; p2 also takes tokens back
    sample_steps: int = 32      # network calls, however many masks there are
    block_size: int = 0         # fill left to right in blocks of so many, what is before cached (0: as it was trained)
    threshold: float = 0.0      # reveal all tokens this certain in a call, at least one (0: by --sample_steps)
    drafts: int = 0             # greedy text of its AR mode, so many tokens drafted and verified in a call (0: no)
    temperature: float = 0.8    # of token draws (0: argmax)
    top_p: float = 1.0          # nucleus
    show: bool = False          # print the text after every step
    gif: str = ""               # a GIF file that shows the tokens as they appear
    seed: int = 0               # of every draw
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the weights


def write(cfg, model, tokenizer):
    """The prompt, the filled masks and the suffix as text."""
    before = tokenizer(cfg.prompt)["input_ids"] or [tokenizer.eos_token_id or 0]
    after = tokenizer(cfg.suffix, add_special_tokens=False)["input_ids"] if cfg.suffix else []
    count = cfg.middle if cfg.suffix else cfg.max_new_tokens
    if tokenizer.mask_token_id in [*before, *after]:
        raise UserError("the prompt or the suffix holds the mask token itself; leave it out")
    ids = torch.tensor([[*before, *[model.mask_id] * count, *after]], device=model.shift.device)         # (1, tokens)
    masks = [(ids == model.mask_id)[0].tolist()]

    def watch(ids, is_mask):
        masks.append(is_mask[0].tolist())
        if cfg.show:
            text = tokenizer.decode(ids[0].masked_fill(is_mask[0], model.mask_id))
            print(repr(text.replace(tokenizer.mask_token, "_")))
    out = (speculate(model, ids[:, :len(before)], count, cfg.drafts, watch) if cfg.drafts else fill(
        model, ids, ids == model.mask_id, cfg.sample_steps, cfg.temperature, cfg.seed, cfg.order, cfg.top_p,
        block_size=cfg.block_size, watch=watch, threshold=cfg.threshold))[0]
    calls = len(masks) - 1
    print(f"{count} tokens in {calls} network calls, {count / calls:.1f} a call")
    if cfg.gif:
        report.film(cfg.gif, [[(re.sub(r"[^\n]", ".", word) if hidden else word, hidden) for word, hidden in zip(
            map(tokenizer.decode, out), mask, strict=True)] for mask in masks])
    return tokenizer.decode(out)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.drafts and (cfg.suffix or cfg.threshold or cfg.block_size):
        raise UserError("--drafts continue a prompt greedily: leave --suffix, --threshold and --block_size out")
    world = setup(cfg.device)
    model, tokenizer = load_converted(cfg.load, world.device, pick_dtype(cfg, world.device))
    print(text := write(cfg, model, tokenizer))
    return text


if __name__ == "__main__":
    main()
