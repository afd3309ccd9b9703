"""hybrid.py: bridge + retained upper blocks + LM head = one causal LM that transformers can load and sample from.

    python hybrid.py --bridge out/bridge                                   # save it to out/hybrid, measure it: ~10 s
    python hybrid.py --bridge out/bridge --prompt "import os" --nfe 4      # text on stdout
    python hybrid.py --bridge out/bridge --prompt "import os" --compare    # beside the intact model's continuation
    python hybrid.py --bridge out/blocks --prompt "import os" --block 32 --nfe 16 --show    # whole blocks at once

    import hybrid                                                          # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/hybrid")             # the upper blocks come from the base model

The CE gap on held-out text is the bridge's own (about 0.004 nats on the default toy). Writes config.json,
hybrid.safetensors, the tokenizer and result.json to --out.

Letters: B batch, T tokens, D hidden width, L blocks, l the replaced layer.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    TextStreamer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import data
from core import backbone, denoiser, diffusion, masked
from core.common import UserError, entry, parse, pick_dtype, setup
from core.draws import generator, normal
from core.run import Run, finished, read_json


@dataclass
class Config:
    bridge: str = "out/bridge"  # folder of a trained bridge
    out: str = "out/hybrid"     # folder to save the hybrid to
    model: str = ""             # the base model, when it is no longer where the bridge was trained
    data: str = "stdlib"        # held-out text of the CE gap; see data.py
    seed: int = 0               # of sampling
    device: str = "auto"        # auto, cpu, cuda
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the retained blocks
    nfe: int = 0                # network calls of the bridge (0: the bridge's default)
    prompt: str = ""            # continue this text instead of saving
    max_new_tokens: int = 64    # tokens to generate
    temperature: float = 0.0    # 0: greedy
    block: int = 0              # draw blocks of so many tokens at once, by diffusion (0: token by token)
    suffix: str = ""            # with --block: the text after the gap of max_new_tokens
    rounds: int = 8             # with --block: refinements of each block (0: none)
    alpha: float = 1.0          # with --block: weight of the token readout beside the retained blocks
    top_p: float = 1.0          # with --block: nucleus
    show: bool = False          # with --block: print what the readout makes of every denoising step
    compare: bool = False       # print the intact model's continuation beside it
    standalone: bool = False    # copy the base model's folder too, so that the hybrid can travel
    seq_len: int = 128          # tokens a sequence of the CE gap
    eval_batches: int = 64      # sequences of the CE gap
    dry_run: bool = False       # print what would be loaded, then leave


PROMPT = "def main(args):"      # of the sample that is shown after saving


class HybridConfig(PretrainedConfig):
    """What a hybrid is made of: the bridge's shape, the layer, and the base model with the hash of its weights."""
    model_type = "dihal_hybrid"

    def __init__(self, base_model="", base="", layer=0, nfe=4, noise_seed=0, bridge=None, use_cache=True,
                 tokenizer=None, **rest):
        self.base_model, self.base, self.layer, self.nfe, self.tokenizer = base_model, base, layer, nfe, tokenizer
        self.noise_seed, self.bridge, self.use_cache = noise_seed, bridge or {}, use_cache
        super().__init__(**rest)


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of blocks l+1..L and the head on the bridge's h[l]. The noise is a function of (noise_seed, position):
    logits are deterministic, and those of token i depend on tokens 0..i only.

    One cache serves both: its first calls * blocks layers hold the bridge's keys and values at each of its network
    calls, the rest those of the retained blocks. The base model is held but is no submodule: its weights are frozen,
    stay in their own folder and are not saved again.
    """
    config_class = HybridConfig
    main_input_name = "input_ids"

    def __init__(self, config, net, lm):
        super().__init__(config)
        self.net = net
        self.__dict__["lm"] = lm
        self.register_buffer("noise", torch.zeros(0, net.settings["D"]), persistent=False)
        for i in range(config.layer):  # the replaced blocks are gone
            lm.blocks[i] = torch.nn.Identity()
        self.set_nfe(config.nfe)

    def _apply(self, fn, *args, **kwargs):
        """`.to(device)` moves the base too, though it is no submodule."""
        self.lm._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def set_nfe(self, nfe):
        """Use `nfe` network calls from now on: the retained blocks' layers in the cache move accordingly."""
        if nfe < 1:
            raise UserError(f"the number of network calls must be at least 1, not {nfe}")
        calls = nfe if self.net.settings["objective"] == "diffusion" else 1
        first = calls * self.net.settings["blocks"]
        for i in range(self.config.layer, self.lm.L):
            for module in self.lm.blocks[i].modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = first + i - self.config.layer
        self.config.nfe, self.config.num_hidden_layers = nfe, first + self.lm.L - self.config.layer

    def noise_at(self, positions):
        """Noise (..., D) of positions (...): a row of a table that grows as text does."""
        count = int(positions.max()) + 1
        if count > len(self.noise):
            new = range(len(self.noise), max(count, 2 * len(self.noise)))
            more = diffusion.position_noise(self.config.noise_seed, new, self.lm.D, self.noise.device)
            self.noise = torch.cat([self.noise, more])
        return self.noise[positions]

    def hidden(self, input_ids, positions, attention_mask=None, cache=None):
        """The bridge's h[l] (B, T, D) of the new tokens, and the `side` the retained blocks need."""
        h0 = self.lm.embed(input_ids, positions)                                       # (B, T, D)
        side = self.lm.side(h0, positions, attention_mask, cache)
        T, past = input_ids.shape[1], cache.get_seq_length() if cache is not None else 0
        padded = attention_mask is not None and not bool(attention_mask.all())
        mask = None
        if padded or past:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=h0.device).tril(past)                # (T, K) causal
            if padded:                                                                 # pads see themselves: no NaN
                own = torch.zeros_like(mask).diagonal_scatter(mask.new_ones(T), past)
                mask = (mask & (attention_mask[:, None, None, :] > 0)) | own           # (B, 1, T, K)
            mask = mask.expand(len(h0), 1, T, past + T)
        z = diffusion.sample(self.net, self.net.standard_c(h0), self.config.nfe, self.noise_at(positions), positions,
                             mask, cache)
        return self.net.hidden(z).to(h0.dtype) if self.config.layer else h0, side

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, **_):
        """input_ids (B, T), the tokens after those in `past_key_values` -> logits (B, T, V), and with labels (B, T;
        -100 ignored) the mean next-token loss. attention_mask (B, K) covers cached and new tokens and is 0 on padding,
        on either side. With `logits_to_keep` only that many last positions get logits."""
        T = input_ids.shape[1]
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -T:]                          # (B, T)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]                   # (1, T)
        h, side = self.hidden(input_ids, position_ids, attention_mask, past_key_values)
        h = self.lm.through(h, self.config.layer, self.lm.L, side)                                           # (B, T, D)
        logits = self.lm.head(h[:, -logits_to_keep:])                                                    # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())        # ignores -100
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    # ------------------------------------------------------------------------------------------- blocks of tokens
    @torch.no_grad()
    def generate_blocks(self, input_ids, max_new_tokens=64, block=64, nfe=8, alpha=1.0, temperature=1.0, top_p=1.0,
                        rounds=8, back=0.25, expert="both", seed=0, suffix_ids=None, watch=None):
        """input_ids (B, T) -> (B, T + max_new_tokens [+ suffix]): whole blocks are drawn in hidden space, and each is
        decoded by one pass through the retained blocks. Rows do not depend on one another.

        One block: `nfe` denoising calls on the unknown positions -> decode -> `rounds` times (encode the decoded tokens
        as visible ones by one call, add noise, make the last `back` share of the calls again, decode). Blocks follow
        one another on a cache; with suffix_ids (B, S) one block fills the gap before them, which needs a bidirectional
        bridge.

        Each token is drawn from log p = log p_upper(x_i | h[<i]) + alpha log p_read(x_i | h[i]), over temperature and
        cut to the `top_p` nucleus; expert "upper" or "readout" is one of the two alone."""
        total = input_ids.shape[1] + max_new_tokens + (0 if suffix_ids is None else suffix_ids.shape[1])
        self._refuse_blocks(total, suffix_ids is not None, expert, top_p, min(nfe, block, max_new_tokens,
                                                                             input_ids.shape[1]),
                            min(alpha, temperature, rounds, back, 0.999 - back))
        if self.net.settings["objective"] == "regression":
            rounds = 0  # nothing to refine: it would answer the same
        if rounds and self.net.settings["sampler"] == "heun":
            raise UserError("refinements run a part of the Euler grid; with a Heun bridge set rounds (--rounds) to 0")
        kept = self.config.nfe
        self.set_nfe(nfe)
        how = dict(nfe=nfe, alpha=alpha, temperature=temperature, top_p=top_p, rounds=rounds, expert=expert, seed=seed,
                   done=nfe - again(nfe, back), watch=watch)
        try:
            if suffix_ids is not None:
                gap = input_ids.new_zeros(len(input_ids), max_new_tokens)
                ids = torch.cat([input_ids, gap, suffix_ids], 1)                        # (B, T + n + S)
                unknown = torch.zeros_like(ids, dtype=torch.bool)
                unknown[:, input_ids.shape[1]:input_ids.shape[1] + max_new_tokens] = True
                return self._draw(ids, unknown, None, None, how, 0)
            cache, ids = DynamicCache(config=self.config), input_ids
            last = self(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits           # (B, 1, V)
            while ids.shape[1] < total:
                n = min(block, total - ids.shape[1])
                empty = ids.new_zeros(len(ids), n)
                new = self._draw(empty, empty == 0, cache, last, how, ids.shape[1])     # (B, n)
                ids = torch.cat([ids, new], 1)
                if ids.shape[1] < total:
                    last = self(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return ids
        finally:
            self.set_nfe(kept)

    def _refuse_blocks(self, total, suffix, expert, top_p, least_one, least_zero):
        """Raise UserError for what `generate_blocks` cannot do."""
        if not self.net.generates:
            raise UserError("this bridge has never met an unknown token; train one with: python bridge.py --preset "
                            "blocks --layer N")
        if least_one < 1:
            raise UserError("nfe, block, max_new_tokens and the length of the prompt must be at least 1")
        if least_zero < 0:
            raise UserError("alpha, temperature and rounds must not be negative, and back must lie in [0, 1)")
        if not 0 < top_p <= 1 or expert not in ("both", "upper", "readout"):
            raise UserError("top_p must lie in (0, 1], and expert be both, upper or readout")
        if total > self.config.max_position_embeddings:
            raise UserError(f"prompt, new tokens and suffix are {total} tokens; they must fit the model's "
                            f"{self.config.max_position_embeddings} positions")
        if suffix and not self.net.settings["bidirectional"]:
            raise UserError("a suffix can only be seen by a bridge trained with --bidirectional")

    def _draw(self, ids, unknown, cache, last, how, key):
        """ids (B, T) with its `unknown` (B, T) tokens drawn. They follow the tokens in `cache`, whose next-token
        logits are `last` (B, 1, V)."""
        (B, T), past, device = ids.shape, cache.get_seq_length() if cache is not None else 0, ids.device
        positions = torch.arange(past, past + T, device=device)[None]                                  # (1, T)
        causal = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)                   # (T, K)
        wide = (causal | unknown[:, :, None])[:, None] if self.net.settings["bidirectional"] else causal

        def run(function, *args, **more):
            out = function(*args, **more)
            backbone.trim(cache, past)                                                 # the block leaves no trace
            return out

        def noise(turn):
            rows = [normal((T, self.lm.D), device, how["seed"], "block", key, turn, b) for b in range(B)]
            return torch.stack(rows)                                                                   # (B, T, D)

        def denoise(turn, **more):
            return run(diffusion.sample, self.net, self.net.standard_c(self.lm.embed(ids, positions)), how["nfe"],
                       noise(turn), positions, wide, cache, unknown=unknown, watch=how["watch"], **more)
        # 1 draw the block's hidden states
        z = denoise(0)
        for turn in range(how["rounds"] + 1):
            # 2 decode it by both experts
            ids = torch.where(unknown, run(self._decode, z, positions, cache, last, how, (key, turn)), ids)
            # 3 refine: one call encodes the decoded tokens as visible ones; go back up the path and down again
            if turn < how["rounds"]:
                c = self.net.standard_c(self.lm.embed(ids, positions))
                seen = run(diffusion.sample, self.net, c, 1, self.noise_at(positions), positions, causal, cache)
                z = denoise(turn + 1, z=seen, done=how["done"])
        return ids

    def _decode(self, z, positions, cache, last, how, key):
        """Tokens (B, T) of z (B, T, D). Draws are float64; the draw is keyed by row."""
        h = self.net.hidden(z).to(self.lm.norm.weight.dtype)
        side = self.lm.side(h, positions, None, cache)
        upper = self.lm.head(self.lm.through(h, self.config.layer, self.lm.L, side))                       # (B, T, V)
        upper = torch.cat([upper[:, :1] if last is None else last, upper[:, :-1]], 1)  # token i is foretold at i-1
        upper, read = (F.log_softmax(part.double(), -1) for part in (upper, self.net.readout(z)))
        logits = {"both": upper + how["alpha"] * read, "upper": upper, "readout": read}[how["expert"]]
        u = [generator(how["seed"], "decode", *key, b).random(z.shape[1]) for b in range(len(z))]
        u = torch.tensor(np.stack(u), device=z.device)
        return masked.choose(logits, how["temperature"], how["top_p"], 0, u)

    def save_pretrained(self, folder, standalone=False, **_):
        """config.json and hybrid.safetensors (the bridge alone); `standalone` puts a copy of the base's folder beside
        them, so that the hybrid can travel."""
        from safetensors.torch import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, folder / "hybrid.safetensors")
        config = self.config.to_dict()
        if standalone:
            shutil.copytree(self.config.base_model, folder / "base", ignore=shutil.ignore_patterns(".lock", "*.jsonl"))
            config["base_model"] = "base"
        (folder / "config.json").write_text(json.dumps({"architectures": ["HybridForCausalLM"], **config}, indent=1))

    @classmethod
    def from_pretrained(cls, folder, *_, config=None, base_model=None, dtype=None, device="cpu", **__):
        """Rebuild from a saved hybrid; `base_model` is where the base is now, if it moved. Raises UserError when the
        base's weights are not the ones the bridge was trained under."""
        from safetensors.torch import load_file
        config = config or HybridConfig.from_pretrained(folder)
        net = denoiser.Bridge(**config.bridge)
        try:
            net.load_state_dict(load_file(Path(folder) / "hybrid.safetensors"))
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{folder}/hybrid.safetensors could not be read ({reason}); save it again") from None
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        inside = str(Path(folder) / "base") if config.base_model == "base" else config.base_model
        return assemble(net, config, base_model or inside, torch.device(device), dtype)


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)


def assemble(net, config, base_model, device, dtype):
    """Load the base, check that it is the one the bridge knows, join the two."""
    if not Path(base_model).exists() and (base_model.startswith(".") or Path(base_model).is_absolute()):
        raise UserError(f"the base model is not at {base_model} any more; say where it is with --model "
                        "(or base_model= in from_pretrained)")
    lm = backbone.load(base_model, device, dtype)
    if backbone.identity(base_model) != config.base:
        raise UserError(f"the weights in {base_model} are not those this bridge was trained under (hash "
                        f"{backbone.identity(base_model)}, expected {config.base}); pass the right --model")
    if net.settings["D"] != lm.D or not 1 - net.generates <= config.layer <= lm.L:
        raise UserError(f"the bridge makes states of width {net.settings['D']} at layer {config.layer}, but {base_model} "
                        f"has width {lm.D} and {lm.L} blocks; pass the right --model")
    config.vocab_size, config.hidden_size, config.base_model = lm.V, lm.D, base_model
    config.eos_token_id, config.bos_token_id = lm.config.eos_token_id, lm.config.bos_token_id
    config.max_position_embeddings = lm.config.max_position_embeddings
    return HybridForCausalLM(config, net.to(device), lm).to(device).eval()


def from_bridge(folder, model="", nfe=0, device="cpu", dtype=torch.float32):
    """HybridForCausalLM from a bridge folder. Raises UserError for a bridge of another base, or nfe < 1."""
    net, info = denoiser.load(folder, device)
    config = HybridConfig(base_model=model or info["model"], base=info["base"], layer=info["layer"],
                          nfe=nfe or info["nfe_default"], bridge=net.settings, tokenizer=info["tokenizer"])
    return assemble(net, config, config.base_model, torch.device(device), dtype)


def again(nfe, back):
    """How many of `nfe` calls a refinement makes again, at least one."""
    return max(1, round(back * nfe))


def tokenizer_of(model):
    """The base's tokenizer. Raises UserError when it is not the one the bridge was trained with."""
    tokenizer = backbone.load_tokenizer(model.config.base_model)
    if backbone.tokenizer_hash(tokenizer) != model.config.tokenizer:
        raise UserError(f"the tokenizer in {model.config.base_model} is not the one this bridge was trained with")
    return tokenizer


@torch.no_grad()
def continue_text(model, tokenizer, prompt, max_new_tokens, temperature, seed, stream=False):
    """The prompt's continuation as text; greedy at temperature 0. With `stream` it is printed as it comes."""
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)         # (1, T)
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty after tokenization; give at least one token")
    streamer = TextStreamer(tokenizer) if stream else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(ids, max_new_tokens=max_new_tokens, streamer=streamer,
                         attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id or 0, **sampling)
    return tokenizer.decode(out[0, ids.shape[1]:])


@torch.no_grad()
def write_blocks(model, tokenizer, cfg):
    """The prompt, the drawn blocks and the suffix as text; with --show each denoising step is printed as it is made."""
    def ids(text):
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)     # (1, T)

    def watch(z):
        print(repr(tokenizer.decode(model.net.readout(z[0]).argmax(-1))))
    out = model.generate_blocks(
        ids(cfg.prompt).long(), cfg.max_new_tokens, cfg.block, cfg.nfe or model.config.nfe, cfg.alpha, cfg.temperature,
        cfg.top_p, cfg.rounds, seed=cfg.seed, suffix_ids=ids(cfg.suffix) if cfg.suffix else None,
        watch=watch if cfg.show else None)
    return tokenizer.decode(out[0])


@torch.no_grad()
def compare(model, intact, rows):
    """On rows (N, T+1), all positions, as a reader of text would count: CE of the hybrid - CE of the intact model
    (nats), KL(intact || hybrid), share of equal top-1 tokens, CE of the intact model."""
    total = torch.zeros(4, dtype=torch.float64)
    for ids in rows.split(16):
        p = F.log_softmax(intact.head(intact.through(intact.embed(ids[:, :-1]), 0, intact.L)).float(), -1)   # (B, T, V)
        q = F.log_softmax(model(ids[:, :-1], use_cache=False).logits.float(), -1)
        token = ids[:, 1:, None]
        total += torch.stack([(p - q).gather(-1, token).sum(), (p.exp() * (p - q)).sum(),
                              (p.argmax(-1) == q.argmax(-1)).sum(), -p.gather(-1, token).sum()]).double().cpu()
    return (total / rows[:, 1:].numel()).tolist()


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__)
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)
    if not 0 <= cfg.temperature:
        raise UserError(f"--temperature {cfg.temperature} must not be negative")
    info = read_json(Path(cfg.bridge) / "bridge.json", "train a bridge with: python bridge.py")
    if cfg.dry_run:
        print(f"would join the bridge at layer {info['layer']} in {cfg.bridge} to blocks {info['layer'] + 1}.. of "
              f"{cfg.model or info['model']} and save to {cfg.out}")
        return None

    if not cfg.block and (cfg.suffix or cfg.show) or cfg.block and (cfg.compare or not cfg.prompt):
        raise UserError("--suffix and --show go with --block, and --block with --prompt and without --compare")
    if cfg.prompt:
        model = from_bridge(cfg.bridge, cfg.model, cfg.nfe, world.device, dtype)
        tokenizer = tokenizer_of(model)
        if cfg.block:
            print(text := write_blocks(model, tokenizer, cfg))
            return text
        sample = (tokenizer, cfg.prompt, cfg.max_new_tokens, cfg.temperature, cfg.seed)
        continue_text(model, *sample, stream=True)
        if cfg.compare:
            intact = backbone.load(model.config.base_model, world.device, dtype)
            print("--- the intact model:")
            text = cfg.prompt + continue_text(intact.model, *sample, stream=True)
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(world.device)
            print("--- on the intact model's text: CE gap {:+.4f} nats, KL {:.4f}, top-1 agreement {:.1%}".format(
                *compare(model, intact, ids)))
        return None

    identity = {"base": info["base"], "layer": info["layer"], "bridge_weights": backbone.identity(cfg.bridge)}
    if result := finished(cfg, identity):
        print(f"{cfg.out} is finished: layer {result['layer']}, CE gap {result['ce_gap']:+.4f} nats")
        return result
    model = from_bridge(cfg.bridge, cfg.model, cfg.nfe, world.device, dtype)
    tokenizer = tokenizer_of(model)
    shards, _ = data.shards_beside(cfg, tokenizer, world)
    rows = data.Tokens(shards, "val", cfg.seq_len).windows(cfg.eval_batches).to(world.device)
    run = Run(cfg, world, identity)
    backbone.save_model(model, tokenizer, run.out, standalone=cfg.standalone)
    model = HybridForCausalLM.from_pretrained(run.out, dtype=dtype, device=world.device)  # measure what was saved
    intact = backbone.load(model.config.base_model, world.device, dtype)
    ce_gap, kl, agree, ce_intact = compare(model, intact, rows)
    run.finish({**identity, "base_model": model.config.base_model,
                "nfe_default": model.config.nfe, "ce_gap": ce_gap, "kl": kl, "agree": agree, "ce_intact": ce_intact,
                "eval_sequences": len(rows), "seq_len": cfg.seq_len, "seed": cfg.seed,
                "prompt": PROMPT, "sample": continue_text(model, tokenizer, PROMPT, 32, 0.0, cfg.seed)})
    print(f"saved to {cfg.out}: layer {info['layer']}, NFE {model.config.nfe}, CE gap {ce_gap:+.4f} nats over the "
          f"intact model's {ce_intact:.3f}\nsample: {PROMPT}{run.result['sample']}")
    return run.result


if __name__ == "__main__":
    main()
