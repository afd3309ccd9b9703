"""HYBRID: bridge + upper blocks + head as one Hugging Face causal LM.

    python hybrid.py                                        # out/bridge and its base -> out/hybrid
    python hybrid.py --bridge out/bridge_l6 --out out/hybrid_l6
    python sample.py --model out/hybrid --prompt "import os"            # write text with it

    import hybrid                                           # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/hybrid")          # generate() works as usual

The bridge (core/diffusion.py) takes the place of blocks 1..l. The model is saved, loaded again and
then measured as bridge.py measures.

Writes config.json, bridge.safetensors, bridge.json, the tokenizer and result.json. The upper blocks
and the head are not copied: they stay in the folder of the base model.

Shapes: B batch, T new tokens, K all tokens (cached ones first), D width of the backbone,
V vocabulary, L blocks of the backbone, l the replaced layer.
"""
import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import (AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig,
                          PreTrainedModel)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

import data
from bridge import measure
from core import backbone, diffusion
from core.common import Dtype, UserError, entry, parse, pick_dtype, setup
from core.run import Run, finished, read_json


@dataclass
class Config:
    preset: backbone.Preset = "auto"  # auto: by model size
    bridge: str = "out/bridge"  # folder of a trained bridge
    out: str = "out/hybrid"     # folder to save the hybrid to
    model: str = ""             # where the base model is now, if it moved
    data: str = "stdlib"        # held-out text; see data.py
    device: str = "auto"        # auto, cpu, cuda
    dtype: Dtype = "auto"       # of the upper blocks; auto: bf16 on a GPU
    seq_len: int = 128          # tokens a sequence
    eval_batches: int = 512     # held-out sequences
    skip = 4                    # no flag: the first positions, attention sinks, are not measured


PRESETS = {
    "tiny": dict(seq_len=32, eval_batches=4),
    "135m": dict(eval_batches=128),
}


# -------------------------------------------------------------------------------------------------
# The model

class HybridConfig(PretrainedConfig):
    """`info` is the bridge.json of the bridge: its layer, its base, its shape."""
    model_type = "dihal_hybrid"

    def __init__(self, info=None, base_model="", nfe=0, **rest):
        info = info or {}
        self.info = info
        self.layer = info.get("layer")
        self.base_model = base_model or info.get("model")
        self.nfe = nfe or info.get("nfe_default")       # network calls of the bridge
        super().__init__(**rest)
        self.load_with = "import hybrid (nanoDiHAL), then AutoModelForCausalLM"


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of blocks l+1..L and the head on the h[l] that the bridge generates.

    The noise is a function of the position, as in bridge.measure. So logits are deterministic, and
    those of token i depend on tokens 0..i only.

    One transformers cache serves all parts. A network call at another noise level has other keys
    and values, so every call of the bridge has cache layers of its own:

        layer 0             counts the tokens: the library reads their number from it
        1 .. L-l            blocks l+1..L
        then                blocks 1..l, kept only for a bridge that generates text
        then i * depth + j  call i, block j of the bridge

    So the number of cached tokens is right whatever the bridge is made of, at l = L too.
    config.num_hidden_layers counts all layers: the library sizes the cache by it.

    The backbone `lm` is no submodule: its weights stay in their folder and are not saved again."""
    config_class = HybridConfig

    def __init__(self, config, net, lm):
        super().__init__(config)
        self.net = net
        self.__dict__["lm"] = lm
        self.register_buffer("noise", torch.zeros(0, lm.D), persistent=False)
        self.generation_config = copy.deepcopy(lm.model.generation_config)  # end tokens of the base

        kept = list(lm.blocks[config.layer:])
        if net.config.generates:
            kept += lm.blocks[:config.layer]    # generate.py reads tokens by the intact model
        else:
            for i in range(config.layer):
                lm.blocks[i] = torch.nn.Identity()
        for place, block in enumerate(kept, start=1):
            number_cache_layer(block, place)
        self.first = 1 + len(kept)              # cache layer of the bridge
        self.set_nfe(config.nfe)

    def set_nfe(self, nfe):
        """Use `nfe` network calls from now on. Regression always makes one."""
        assert nfe >= 1, "a bridge needs at least one network call"
        self.config.nfe = nfe
        self.config.num_hidden_layers = self.first + self.net.cache_layers(nfe)

    def _apply(self, fn):
        """`.to(device)` moves bridge and backbone. A cast to bf16 is for the backbone alone: the
        bridge stays in fp32, as in from_bridge(dtype=bf16)."""
        self.lm._apply(fn)
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device))

    def noise_at(self, positions):
        """Noise (..., D) at positions (...): rows of a table that grows with the text."""
        count = int(positions.max()) + 1
        limit = getattr(self.config, "max_position_embeddings", count)
        assert count <= limit, f"the base has only {limit} positions"
        trained = self.config.info.get("seq_len", count)
        if count > 2 * trained:
            warnings.warn(f"the bridge was trained on texts of {trained} tokens; beyond twice that "
                          "length it grows worse", stacklevel=2)
        if count > len(self.noise):
            self.noise = diffusion.position_noise(0, range(2 * count), self.lm.D, positions.device)
        return self.noise[positions]

    def states(self, h0, ids, nfe, noise, positions, mask, cache, **more):
        """Sample z, the standardised h[l] (B, T, D), of tokens ids (B, T) whose h[0] is h0."""
        part = SimpleNamespace(                         # the bridge numbers its layers from 0
            update=lambda keys, values, layer: cache.update(keys, values, self.first + layer))
        return diffusion.sample(self.net, self.net.condition(h0, ids), nfe, noise,
                                positions=positions, mask=mask, cache=part, **more)

    def hidden(self, input_ids, positions, cache, attention_mask=None):
        """The bridge's h[l] (B, T, D) of new tokens, and the `side` that the upper blocks need.

        The tokens join the bridge's part of the cache and are not counted yet."""
        noise = self.noise_at(positions)                # first: it refuses a text that is too long
        h0 = self.lm.embed(input_ids, positions)                                # (B, T, D)
        side = self.lm.side(h0, positions, attention_mask, cache)
        mask = bridge_mask(input_ids, cache.get_seq_length(), attention_mask)
        z = self.states(h0, input_ids, self.config.nfe, noise, positions, mask, cache)
        if self.config.layer == 0:
            return h0, side             # h[0] is exact: z was sampled for the bridge's cache alone
        return self.net.restore(h0, z, positions).to(h0.dtype), side

    def upper(self, h, positions, cache):
        """h[l] (B, T, D) -> h[L] (B, T, D). The tokens join the upper blocks' part of the cache."""
        side = self.lm.side(h, positions, None, cache)
        return self.lm.through(h, self.config.layer, self.lm.L, side)

    def read(self, ids, positions, cache):
        """Exact h[l] and h[L] (B, T, D) of tokens (B, T) by the intact model, which only a bridge
        that generates keeps. The tokens join its part of the cache and are counted: known tokens
        go through `hidden` first."""
        h = self.lm.hidden(ids, self.config.layer, positions, cache=cache)
        states = self.upper(h, positions, cache)
        count_tokens(cache, h)
        return h, states

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                labels=None, use_cache=True, logits_to_keep=0, **ignored):
        """input_ids (B, T), the tokens after those in `past_key_values` -> logits (B, T, V).

        attention_mask (B, K) is 0 on padding, on either side. With labels (B, T; -100 ignored) the
        mean next-token loss, too. `logits_to_keep` > 0: only the last positions get logits."""
        T = input_ids.shape[1]
        cache = past_key_values
        if cache is None:
            cache = DynamicCache(config=self.config)
        assert isinstance(cache, DynamicCache), "a static cache does not work"
        if position_ids is None:
            is_token = attention_mask
            if is_token is None:
                is_token = input_ids.new_ones(1, cache.get_seq_length() + T)
            position_ids = (is_token.cumsum(-1) - 1).clamp_min(0)[:, -T:]       # (1 or B, T)

        h, side = self.hidden(input_ids, position_ids, cache, attention_mask)
        h = self.lm.through(h, self.config.layer, self.lm.L, side)              # (B, T, D)
        count_tokens(cache, h)
        logits = self.lm.head(h[:, -logits_to_keep:])                           # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits,
                                      past_key_values=cache if use_cache else None)

    def get_input_embeddings(self):
        return self.lm.model.get_input_embeddings()

    def resize_token_embeddings(self, *_, **__):
        raise NotImplementedError("the vocabulary is the base's: train a bridge on a resized base")

    def save_pretrained(self, folder, **ignored):
        """The bridge's files and a config.json that transformers understands."""
        config = self.config
        info = {**config.info, "model": config.base_model, "nfe_default": config.nfe}
        config.save_pretrained(folder)
        diffusion.save(self.net, folder, info)

    @classmethod
    def from_pretrained(cls, folder, *, config=None, base_model="", dtype=None, device="cpu",
                        **library):
        """Load a saved hybrid. `base_model` says where the base is now, if it moved."""
        for name in set(library) - {"revision", "trust_remote_code", "adapter_kwargs"}:
            raise TypeError(f"from_pretrained of a hybrid takes no {name}")
        config = config or HybridConfig.from_pretrained(folder)
        assert config._attn_implementation is None, "attn_implementation is not taken"
        config.base_model = base_model or config.base_model
        dtype = backbone.as_dtype(dtype)                # "auto" and None stand for fp32
        net, _ = diffusion.load(folder, device)
        return assemble(net, config, device, dtype)


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)


def number_cache_layer(block, place):
    """Tell the modules of a transformer block the number of their cache layer."""
    numbered = False
    for module in block.modules():
        for name in ("layer_idx", "layer_id"):          # the library has two words for it
            if hasattr(module, name):
                setattr(module, name, place)
                numbered = True
    assert numbered, "this architecture does not say which layer of a cache a block uses"


def count_tokens(cache, h):
    """Count the tokens of h (B, T, D) in layer 0 of the cache: every token is a key of width 1."""
    key = h[:, None, :, :1]
    cache.update(key, key, 0)


def bridge_mask(ids, past, attention_mask):
    """The keys that a new token sees in the bridge, (1 or B, 1, T, K) bool. None: all before it."""
    T = ids.shape[1]
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and past == 0:
        return None
    mask = torch.ones(1, 1, T, past + T, dtype=torch.bool, device=ids.device).tril(past)
    if padded:
        itself = mask.triu(past)                        # padding sees itself: no NaN
        mask = (mask & (attention_mask[:, None, None] > 0)) | itself
    return mask


def assemble(net, config, device, dtype):
    """Load the base, check that it is the one the bridge was trained on, join the two."""
    base = config.base_model
    if backbone.identity(base) != config.info["base"]:
        raise UserError(f"the weights in {base} are not those this bridge was trained on; pass the "
                        "right --model (base_model= in from_pretrained)")
    lm = backbone.load(base, device, dtype)
    config.vocab_size = lm.V
    config.max_position_embeddings = lm.config.max_position_embeddings
    return HybridForCausalLM(config, net, lm).eval()


def from_bridge(folder, model="", device="cpu", dtype=torch.float32):
    """HybridForCausalLM of a bridge folder. model="": the base that the bridge was trained on."""
    net, info = diffusion.load(folder, device)
    return assemble(net, HybridConfig(info, model), device, dtype)


def load_tokenizer(model):
    """The tokenizer of the base, checked."""
    base = model.config.base_model
    tokenizer = backbone.load_tokenizer(base)
    if backbone.tokenizer_hash(tokenizer) != model.config.info["tokenizer"]:
        raise UserError(f"the tokenizer in {base} is not the one this bridge was trained with")
    return tokenizer


# -------------------------------------------------------------------------------------------------
# Main

def choose(cfg):
    return backbone.preset_of(cfg, "" if cfg.model else cfg.bridge)


def show(result):
    print(f"layer {result['layer']}, {result['nfe_default']} calls: FVU {result['fvu']:.4f}, "
          f"KL {result['kl']:.4f}, CE gap {result['ce_gap']:+.4f} nats, "
          f"equal top-1 tokens {result['agree']:.1%}")


@entry
def main(argv):
    cfg = parse(Config, argv, __doc__, PRESETS, choose)
    world = setup(cfg.device)
    dtype = pick_dtype(cfg, world.device)

    # Has this very run finished already?
    info = read_json(Path(cfg.bridge) / "bridge.json", "train a bridge with: python bridge.py")
    identity = {"base": info["base"], "bridge_weights": backbone.identity(cfg.bridge),
                "data": data.identity(cfg.data)}
    result = finished(cfg, identity)
    if result:
        show(result)
        return result

    # 1. Join, save, load again
    model = from_bridge(cfg.bridge, cfg.model, device=world.device, dtype=dtype)
    tokenizer = load_tokenizer(model)
    backbone.read_config(model.config.base_model, cfg.seq_len)      # has it enough positions?
    _, held_out = data.splits(cfg, tokenizer, world, cfg.seq_len)
    rows = held_out.windows(cfg.eval_batches).to(world.device)
    run = Run(cfg, world, identity)
    backbone.save_model(model, tokenizer, run.out)
    model = HybridForCausalLM.from_pretrained(run.out, dtype=dtype, device=world.device)

    # 2. Measure what was saved
    config = model.config
    intact = backbone.load(config.base_model, world.device, dtype)
    measured = measure(intact, model.net, config.layer, rows, config.nfe, cfg)
    result = {**identity, **measured, "layer": config.layer, "nfe_default": config.nfe}
    show(result)
    return run.finish(result)


if __name__ == "__main__":
    main()
