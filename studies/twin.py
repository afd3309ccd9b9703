"""twin.py: use a converted model: continue a text, fill a gap.

    python -m studies.twin --load out/repr_align/block --prompt "import " --sample_steps 64 --show --gif film.gif
    python -m studies.twin --load out/mine/both --prompt "import " --drafts 2     # the AR mode's text in fewer calls
    python -m studies.twin --load out/repr_align/w10 --prompt "def f(" --suffix "return x" --middle 32

Prints text; writes nothing but the film. repr_align.py makes such models, core/masked.py holds the samplers.
"""
import argparse

if not __package__:
    argparse.ArgumentParser().exit(2, "error: start it as: python -m studies.twin\n")
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
        film(cfg.gif, [tokenizer.decode(i) for i in out], masks)
    return tokenizer.decode(out)


def film(path, words, masks):
    """A GIF of words (tokens) appearing: masks, a list of bool a call, says which are hidden still; new ones in red."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation
    words, column = list(words), 0
    for i, word in enumerate(words):
        if (column := len(word) + column * ("\n" not in word)) > 86:                   # a line has so many characters
            words[i], column = "\n" + word, len(word)
    rows = "".join(words).count("\n") + 1
    fig = plt.figure(figsize=(max(7, 0.08 * max(map(len, "".join(words).split("\n")))), 0.17 * rows + 0.2))
    layers = [[fig.text(0.01, 1 - (row + 1) / (rows + 1), "", family="monospace", size=9, color=color, parse_math=False)
               for row in range(rows)] for color in (report.BLACK, report.RED, report.GREY)]

    def draw(call):
        now, before = (masks[min(max(0, i), len(masks) - 1)] for i in (call, call - 1))
        hidden = ["." * len(w) if n else w for w, n in zip(words, now, strict=True)]
        shown = [2 if n else 1 if b else 0 for b, n in zip(before, now, strict=True)]    # the layer of each token
        for number, layer in enumerate(layers):
            text = "".join(w if n == number else " " * len(w) for w, n in zip(hidden, shown, strict=True))
            ends = [i for i, c in enumerate("".join(words)) if c == "\n"]
            for line, lo, hi in zip(layer, [-1, *ends], [*ends, None], strict=True):
                line.set_text(text[lo + 1:hi])
    FuncAnimation(fig, draw, len(masks) + 8).save(path, writer="pillow", fps=5)
    plt.close(fig)


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    if cfg.drafts and (cfg.suffix or cfg.threshold or cfg.block_size):
        raise UserError("--drafts continue a prompt greedily: leave --suffix, --threshold and --block_size out")
    if cfg.gif and not cfg.gif.endswith(".gif"):
        raise UserError(f"--gif {cfg.gif}: the name of a film must end in .gif")
    world = setup(cfg.device)
    model, tokenizer = load_converted(cfg.load, world.device, pick_dtype(cfg, world.device))
    print(text := write(cfg, model, tokenizer))
    return text


if __name__ == "__main__":
    main()
