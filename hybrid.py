"""hybrid.py: bridge + retained upper blocks + LM head = one causal LM that transformers can load and sample from.

    python hybrid.py --bridge out/bridge                                   # save it to out/hybrid, measure it: ~10 s
    python hybrid.py --bridge out/bridge --prompt "import os" --nfe 4      # text on stdout
    python hybrid.py --bridge out/bridge --prompt "import os" --compare    # beside the intact model's continuation
    python hybrid.py --bridge out/blocks --prompt "import os" --block_size 32 --show    # 32 tokens at once

    import hybrid                                                          # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/hybrid")             # the upper blocks come from the base model

The CE gap on held-out text is the bridge's own (about 0.01 nats on the default toy). Writes config.json,
hybrid.safetensors, the tokenizer, a model card and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, l the replaced layer, V vocabulary.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from core import backbone, diffusion
from core.common import UserError, entry, parse, pick_dtype, setup
from core.metrics import against
from core.report import film, table
from core.run import Run, beside, card, finished, read_json

if __name__ != "__main__":  # as a program it looks whether its run is finished before transformers load (2 s)
    from core.hybrid_lm import HybridConfig, HybridForCausalLM, from_bridge, product  # noqa: F401


@dataclass
class Config:
    preset: Literal["auto", "tiny", "toy", "135m"] = "auto"  # auto: by the base's size
    bridge: str = "out/bridge"  # folder of a trained bridge
    out: str = "out/hybrid"     # folder to save the hybrid to
    model: str = ""             # the base model, when it is no longer where the bridge was trained
    data: str = "stdlib"        # held-out text of the CE gap; see data.py
    seed: int = 0               # of sampling
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the retained blocks
    nfe: int = 0                # network calls of the bridge (0: the bridge's default, 4 with --block_size)
    sampler: Literal["", *diffusion.SAMPLERS] = ""  # how it goes from noise to a state (empty: the bridge's default)
    shift: float = 0.0          # of the sampler's grid, above 1: more calls near noise (0: the bridge's default)
    prompt: str = ""            # continue this text instead of saving
    max_new_tokens: int = 64    # tokens to generate
    temperature: float = 0.0    # 0: greedy
    block_size: int = 0         # draw so many tokens at once, by diffusion (0: token by token)
    suffix: str = ""            # with --block_size: the text after the gap of max_new_tokens
    refinements: int = 14       # with --block_size: of each block of tokens (0: none)
    alpha: float = 0.6          # with --block_size: weight of the token readout beside the retained blocks
    beta: float = 0.6           # with --block_size: share of the token prior that is divided out of their product
    top_p: float = 1.0          # with --block_size: nucleus
    show: bool = False          # with --block_size: print what the readout makes of every denoising step
    gif: str = ""               # with --block_size, of one block: a GIF file that shows the same
    compare: bool = False       # print the intact model's continuation beside it
    seq_len: int = 128          # tokens a sequence of the CE gap
    eval_batches: int = 512     # sequences of the CE gap
    MEASURES = ("prompt", "max_new_tokens", "temperature", "block_size", "suffix", "refinements", "alpha", "beta",
                "top_p", "show", "gif", "compare")


PRESETS = {"tiny": {"seq_len": 32, "eval_batches": 4}, "135m": {"eval_batches": 128, "alpha": 0.8, "beta": 0.8}}
PROMPT = "def main(args):"      # of the sample that is shown after saving


def token_prior(shards, V):
    """log p (V,) of the tokens of training text (at most 2M of them), each counted once more than it occurs."""
    rows = data.Tokens(shards, "train", 127).windows(2 ** 14)                          # (N, 128)
    return (torch.bincount(rows.flatten(), minlength=V) + 1.0).double().log().log_softmax(0)


def tokenizer_of(model):
    """The base's tokenizer. Raises UserError when it is not the one the bridge was trained with."""
    tokenizer = backbone.load_tokenizer(model.config.base_model)
    if backbone.tokenizer_hash(tokenizer) != model.config.tokenizer:
        raise UserError(f"the tokenizer in {model.config.base_model} is not the one this bridge was trained with")
    return tokenizer


def continue_text(model, tokenizer, prompt, max_new_tokens, temperature, seed, stream=False):
    """The prompt's continuation as text; greedy at temperature 0. With `stream` it is printed as it comes."""
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)         # (1, T)
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty after tokenization; give at least one token")
    from transformers import TextStreamer
    streamer = TextStreamer(tokenizer) if stream else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(ids, max_new_tokens=max_new_tokens, streamer=streamer,
                         attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id or 0, **sampling)
    return tokenizer.decode(out[0, ids.shape[1]:])


def write_blocks(model, tokenizer, cfg):
    """The prompt, the drawn tokens and the suffix as text; --show and --gif show each denoising step."""
    def ids(text):
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)     # (1, T)

    def words(some):
        return [(tokenizer.decode(i), False) for i in some]
    before, frames = ids(cfg.prompt).long(), []

    def watch(z):                                                    # (1, T, D) of all of a gapped text, or of a block
        new = model.net.readout(z[0, before.shape[1] * bool(cfg.suffix):][:cfg.max_new_tokens]).argmax(-1)
        frames.append(words(before[0]) + words(new))
        if cfg.show:
            print(repr(tokenizer.decode(new)))
    out = model.generate_blocks(
        before, cfg.max_new_tokens, cfg.block_size, cfg.nfe or 4, alpha=cfg.alpha,
        beta=cfg.beta, prior=prior_beside(cfg.bridge, model) if cfg.beta > 0 else None, temperature=cfg.temperature,
        top_p=cfg.top_p, refinements=cfg.refinements, seed=cfg.seed, suffix_ids=ids(cfg.suffix) if cfg.suffix else None,
        watch=watch if cfg.show or cfg.gif else None)
    if cfg.gif:
        film(cfg.gif, [*frames, words(out[0, :before.shape[1] + cfg.max_new_tokens])])
    return tokenizer.decode(out[0])


def prior_beside(bridge, model):
    """token_prior of the shards beside a bridge folder. Raises UserError where there are none of this tokenizer."""
    shards = beside(bridge, "data")
    meta = read_json(shards / "meta.json", "it is what the token prior is counted from, so make it with data.py, or "
                                           "leave the prior in by --beta 0")
    if meta["tokenizer"] != model.config.tokenizer:
        raise UserError(f"{shards} holds tokens of another tokenizer than the bridge's; leave the prior in by --beta 0")
    return token_prior(shards, model.lm.V)


@torch.no_grad()
def compare(model, intact, rows):
    """On rows (N, T+1), all positions, as a reader of text would count: ce_gap = CE of the hybrid - CE of the intact
    model (nats) and its standard error over rows, kl(intact || hybrid), agree = share of equal top-1 tokens."""
    gaps, total = [], torch.zeros(3, dtype=torch.float64)
    for ids in rows.split(16):
        token, logits = ids[:, 1:, None], model(ids[:, :-1], use_cache=False).logits   # (B, T, 1), (B, T, V)
        own = intact.head(intact.through(intact.embed(ids[:, :-1]), 0, intact.L))      # (B, T, V)
        ce, gaps_of = against(own, token)
        kl, gap = gaps_of(logits)                                                      # (B, T) each
        gaps += gap.double().mean(1).tolist()
        total += torch.stack([kl.sum(), (own.argmax(-1) == logits.argmax(-1)).sum(), ce.sum()]).double().cpu()
    kl, agree, ce_intact = (total / rows[:, 1:].numel()).tolist()
    return {"ce_gap": statistics.mean(gaps), "kl": kl, "agree": agree, "ce_intact": ce_intact,
            "ce_gap_se": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None}


def section(result):
    """This run's part of the report."""
    se = f" +- {result['ce_gap_se']:.4f}" if result["ce_gap_se"] is not None else ""
    return "\n".join([
        "## HYBRID", "",
        f"Bridge and retained blocks as one causal LM, saved, loaded again and measured: layer {result['layer']}, "
        f"{result['sampler']} sampler with shift {result['shift']:g}; {result['eval_sequences']} held-out sequences of "
        f"{result['seq_len']} tokens, all positions (+- standard error over sequences), seed {result['seed']}.", "",
        table(["NFE", "CE gap (nats)", "KL", "top-1 agreement", "CE of the intact model"],
              [[result["nfe_default"], f"{result['ce_gap']:+.4f}{se}", f"{result['kl']:.4f}", f"{result['agree']:.1%}",
                f"{result['ce_intact']:.3f}"]]), "",
        f"Greedy after `{result['prompt']}`:", "", "```", result["sample"], "```", ""])


def continue_prompt(cfg, model, tokenizer, world, dtype):
    """--prompt: its continuation on stdout, token by token or so many at once; no model is saved."""
    if cfg.block_size:
        print(text := write_blocks(model, tokenizer, cfg))
        return text
    sample = (tokenizer, cfg.prompt, cfg.max_new_tokens, cfg.temperature, cfg.seed)
    text = continue_text(model, *sample, stream=True)
    if cfg.compare:
        intact = backbone.load(model.config.base_model, world.device, dtype)
        print("--- the intact model:")
        theirs = cfg.prompt + continue_text(intact.model, *sample, stream=True)
        ids = tokenizer(theirs, return_tensors="pt")["input_ids"].to(world.device)
        print("--- on the intact model's text: CE gap {ce_gap:+.4f} nats, KL {kl:.4f}, top-1 agreement {agree:.1%}"
              .format(**compare(model, intact, ids)))
    return text


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, lambda cfg: backbone.preset_of(
        cfg.model, cfg.out, "" if cfg.model else cfg.bridge))
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    if cfg.temperature < 0:
        raise UserError(f"--temperature {cfg.temperature} must not be negative")
    if (cfg.suffix or cfg.show or cfg.gif) and not cfg.block_size:
        raise UserError("--suffix, --show and --gif go with --block_size")
    if cfg.gif and cfg.block_size < cfg.max_new_tokens:
        raise UserError("--gif shows one block of tokens: --block_size must be at least --max_new_tokens")
    if cfg.block_size and (cfg.compare or not cfg.prompt):
        raise UserError("--block_size goes with --prompt and without --compare")
    info = read_json(Path(cfg.bridge) / "bridge.json", "train a bridge with: python bridge.py")
    identity = {"base": info.get("base"), "layer": info.get("layer"), "bridge_weights": backbone.identity(cfg.bridge)}
    if not cfg.prompt and (result := finished(cfg, identity)):
        print(f"{cfg.out} is finished: layer {result['layer']}, CE gap {result['ce_gap']:+.4f} nats")
        return result
    # 1 join, save, load again
    from core.hybrid_lm import HybridForCausalLM, from_bridge
    model = from_bridge(cfg.bridge, cfg.model, cfg.nfe, cfg.sampler, cfg.shift, world.device, dtype)
    tokenizer = tokenizer_of(model)
    if cfg.prompt:
        return continue_prompt(cfg, model, tokenizer, world, dtype)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    rows = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches).to(world.device)
    run = Run(cfg, world, identity)
    backbone.save_model(model, tokenizer, run.out)
    model = HybridForCausalLM.from_pretrained(run.out, dtype=dtype, device=world.device)
    # 2 measure what was saved
    intact = backbone.load(model.config.base_model, world.device, dtype)
    how = model.config
    measured = compare(model, intact, rows)
    result = {**identity, **measured, "base_model": how.base_model, "nfe_default": how.nfe, "sampler": how.sampler,
              "shift": how.shift, "eval_sequences": len(rows), "seq_len": cfg.seq_len, "seed": cfg.seed,
              "prompt": PROMPT, "sample": continue_text(model, tokenizer, PROMPT, 32, 0.0, cfg.seed),
              "headline": [[f"hybrid, blocks 1..{how.layer} replaced, {how.nfe} calls",
                            f"CE {measured['ce_gap']:+.4f} nats over {measured['ce_intact']:.3f}"]]}
    # 3 report
    card(run.out, f"Blocks 1..{how.layer} replaced by a diffusion bridge",
         "" if Path(how.base_model).exists() else how.base_model, {**measured, "layer": how.layer, "nfe": how.nfe})
    run.finish({**result, "made_of": backbone.made_of(cfg.out, [cfg.bridge])}, section(result))
    print(f"saved to {cfg.out}: layer {how.layer}, NFE {how.nfe}, CE gap {measured['ce_gap']:+.4f} nats over the "
          f"intact model's {measured['ce_intact']:.3f}\nsample: {PROMPT}{result['sample']}")
    return run.result


if __name__ == "__main__":
    main()
