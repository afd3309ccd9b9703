"""Write text with a trained model: token by token, or by diffusion.

    python sample.py                                            # out/hybrid, streamed
    python sample.py --prompt "import os" --temperature 0       # always the most likely token
    python sample.py --model out/generator --show               # every denoising step
    python sample.py --model out/convert/block --gif film.gif   # a film of the unmasking
    python sample.py --model out/convert/w0 --prompt "def f(" --suffix "return x"

The folder decides how text is written:

    hybrid.py, bridge.py      one token after another
    bridge.py --generate      token blocks, by hidden-state diffusion (generate.py)
    repr_align.py             masks, filled in the order of the model's confidence (core/masked.py)

Tokens are sampled from the whole distribution, which --top_p alone can cut (there is no top-k).

Shapes: T tokens, D width, V vocabulary. One text at a time.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from core import backbone, masked
from core.common import Dtype, UserError, entry, generator, parse, pick_dtype, setup
from core.run import atomic, nearby, read_json, recorded
from generate import generate_blocks, hybrid, token_prior


@dataclass
class Config:
    # the text
    model: str = "out/hybrid"   # folder of a hybrid, a bridge or a converted model
    prompt: str = "def main(args):"  # given text
    suffix: str = ""            # given text after the new tokens (converted models)
    new: int = 64               # tokens to write
    temperature: float = 0.8    # 0: always the most likely token
    top_p: float = 1.0          # sample from the most likely tokens that hold this probability
    seed: int = 0               # every random number is a function of it
    # diffusion
    steps: int = 0              # network calls a token, token block or text (0: its own, 4, 32)
    bound: float = 0.0          # converted model: entropy of tokens revealed together (0: --steps)
    block_size: int = 0         # tokens that a bridge samples together (0: 32)
    refinements: int = 14       # of each token block (0: none)
    # output
    show: bool = False          # print every step
    gif: str = ""               # write a film of the steps to this file
    # machine
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # auto: bf16 on a GPU


# -------------------------------------------------------------------------------------------------
# Three ways to write. They take ids (1, T), call watch(ids, hidden) after every step and return
# the whole text. A nonzero `hidden` marks tokens that may still change.

@torch.no_grad()
def write_tokens(model, ids, cfg, watch):
    """One token after another, until an end token."""
    model.set_nfe(cfg.steps or model.config.nfe)
    ends = model.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [ends]
    cache = None
    token = ids
    for i in range(cfg.new):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        u = torch.tensor([generator(cfg.seed, "sample", i).random()], device=ids.device)
        logits = out.logits[:, -1].double()                                     # (1, V)
        token = masked.choose(logits, cfg.temperature, cfg.top_p, u)[:, None]   # (1, 1)
        ids = torch.cat([ids, token], dim=1)
        watch(ids, torch.zeros_like(ids))
        if token.item() in ends:
            break
    return ids


def write_blocks(model, ids, cfg, watch):
    """One token block after another. A step shows the tokens that the bridge's states stand for."""
    shards = nearby(cfg.model, "data")
    meta = read_json(shards / "meta.json", "run python data.py")
    same = meta["tokenizer"] == model.config.info["tokenizer"]
    assert same, f"{shards} was tokenized for another model; copy the bridge's own shards there"
    prior = token_prior(shards, model.lm.V).to(ids.device)
    end = ids.shape[1] + cfg.new
    while ids.shape[1] < end:
        def show_guess(z, given=ids):                                           # z (1, n, D)
            guess = model.net.readout(z).argmax(-1)
            watch(torch.cat([given, guess], dim=1), torch.ones_like(guess))
        size = min(cfg.block_size or 32, end - ids.shape[1])
        ids = generate_blocks(
            model, ids, size, prior, show_guess, block_size=size, nfe=cfg.steps or 4,
            refinements=cfg.refinements, temperature=cfg.temperature, top_p=cfg.top_p,
            seed=cfg.seed)
        watch(ids, torch.zeros_like(ids))
    return ids


def write_masks(model, ids, cfg, watch):
    """All masks, the most certain ones first."""
    sampling = masked.Sampling(cfg.temperature, cfg.seed, top_p=cfg.top_p, bound=cfg.bound)
    steps = masked.fill_steps(model, ids, ids == model.mask_id, cfg.steps or 32, sampling)
    for ids, hidden in steps:
        watch(ids, hidden)
    return ids


# -------------------------------------------------------------------------------------------------
# Screen and film

class Screen:
    """Prints finished text as it comes, or with `show` every step in a line."""

    def __init__(self, tokenizer, show):
        self.tokenizer = tokenizer
        self.show = show
        self.printed = ""
        self.steps = []             # the text after every step

    def __call__(self, ids, hidden):
        text = self.tokenizer.decode(ids[0])
        if hidden.any():
            text = text.replace(masked.MASK, "_")
        self.steps.append(text)
        if self.show:
            print(f"{len(self.steps):3d} {text!r}")
        elif not hidden.any() and not text.endswith("\ufffd"):      # half of a character waits
            print(text[len(self.printed):], end="", flush=True)
            self.printed = text


def film(path, steps):
    """Write a GIF of the text after every step. The last one stays for two seconds."""
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.truetype(findfont("monospace"), 13)
    images = []
    for text in steps:
        image = Image.new("RGB", (700, 400), "white")
        text = re.sub("(.{85})", r"\1\n", text)         # long lines are wrapped
        ImageDraw.Draw(image).text((5, 5), text, "black", font)
        images.append(image)
    with atomic(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=[200] * (len(steps) - 1) + [2000])


# -------------------------------------------------------------------------------------------------
# Main

def load(folder, device, dtype):
    """(model, tokenizer, the function that writes with it)."""
    if (folder / "bridge.json").exists():
        model = hybrid.from_bridge(folder, device=device, dtype=dtype)
        write = write_blocks if model.net.config.generates else write_tokens
        return model, hybrid.load_tokenizer(model), write
    read_json(folder / "result.json", "run hybrid.py, bridge.py --generate or repr_align.py")
    recorded(folder)                                    # refuses a folder of the second edition
    return *masked.load_converted(folder, device, dtype), write_masks


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    model, tokenizer, write = load(Path(cfg.model), world.device, dtype)

    # Bytes are read as UTF-8 in any locale. Special tokens spelled out are text, as in training
    texts = [os.fsencode(text).decode(errors="replace") for text in (cfg.prompt, cfg.suffix)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    prompt, suffix = encoded["input_ids"]
    bos = backbone.bos_id(tokenizer)
    if bos is not None:
        prompt = [bos, *prompt]
    prompt = prompt or [tokenizer.eos_token_id]
    room = model.lm.config.max_position_embeddings - len(prompt) - len(suffix)
    if not 1 <= cfg.new <= room:
        raise UserError(f"--new {cfg.new} must lie in 1..{room}: prompt, --new and --suffix share "
                        "the positions of the model")
    if write is write_masks:
        prompt += [model.mask_id] * cfg.new + suffix
    elif suffix:
        raise UserError(f"{cfg.model} is no converted model, so it cannot see a --suffix")
    ids = torch.tensor([prompt], device=world.device)                           # (1, T)
    screen = Screen(tokenizer, cfg.show)
    text = tokenizer.decode(write(model, ids, cfg, screen)[0])
    print("" if cfg.show else text[len(screen.printed):])   # half a character at the end
    if cfg.gif:
        film(cfg.gif, screen.steps)
    return text


if __name__ == "__main__":
    main()
