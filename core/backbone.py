"""backbone.py: any Hugging Face causal LM, cut at a layer.

    lm = load("out/toy", device, dtype)              # or Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B
    h0 = lm.embed(ids)                               # h[0]
    hl = lm.through(h0, 0, l)                        # h[l]: after blocks 1..l
    logits = lm.head(lm.through(hl, l, lm.L))        # bit for bit the model's own logits

h[l] is the residual stream after block l, l = 1..L, before the final norm. (The library's
hidden_states[-1] is after the norm.) h[0] is the input of the first block.

The trick. Nothing here knows an architecture. A block needs more than h: a mask, rotary tables,
ALiBi, a cache. Every family prepares them in its own way, in the forward of the model. So we run
this forward once with stand-ins in place of the blocks. A stand-in writes down its arguments:

    the model's forward     ids -> embed ->  block 1  ->  block 2  -> ... ->  block L  -> norm
    with stand-ins          ids -> embed -> stand-in  -> stand-in  -> ... -> stand-in  -> norm
                                                |            |                   |
                                           (args, kwargs) of every block = its side

    a side of Llama         (), {"attention_mask": mask, "position_embeddings": (cos, sin),
                                 "past_key_values": cache, "position_ids": positions, ...}

The real block i then runs on any h: blocks[i](h, *args, **kwargs). Sides do not depend on h, so
they serve every pass over the same positions. At every load `check` compares the result with the
model, bit for bit. A model that fails is refused by name.

Code and pickles from the Hub are never run, because a stranger wrote them.

Letters: B batch, T tokens, K keys, D hidden width, L blocks, V vocabulary.
"""
import contextlib
import hashlib
import inspect
import json
import math
import os
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from core.common import UserError, why
from core.run import nearby, read_json

EOS = "<|endoftext|>"   # end-of-text token of a tokenizer that we train
TWIN = "nanodihal_twin"  # model_type of a converted model, so that nobody runs it as an AR model
SIZES = {"toy": 3e7, "135m": 4e8, "0.6b": 3e9, "8b": math.inf}  # preset -> parameters, at most
Preset = Literal["auto", "tiny", *SIZES]                # of the flag --preset


# -------------------------------------------------------------------------------------------------
# The cut

def find_blocks(model):
    """(path of the module that runs the blocks, name of its list of blocks).

    This module takes `inputs_embeds` and holds a list of num_hidden_layers modules."""
    L = getattr(model.config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if "inputs_embeds" not in inspect.signature(module.forward).parameters:
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == L:
                return path, name
    raise cannot(model.config, "no part of it takes inputs_embeds and runs one list of blocks")


def cannot(config, reason, action="be cut at a layer"):
    return UserError(f"a model of type {config.model_type!r} cannot {action}: {reason}")


class Backbone(nn.Module):
    """A causal LM as embed -> blocks 1..L -> head. With `L` given, `model` holds only the lower
    blocks of a model of L blocks."""

    def __init__(self, model, L=None):
        super().__init__()
        self.model = model
        self.config = model.config
        path, self.list_name = find_blocks(model)
        self.stack = model.get_submodule(path)          # the module whose forward runs the blocks
        self.blocks = getattr(self.stack, self.list_name)
        self.blocks_name = f"{path}.{self.list_name}."  # prefix of the names of their parameters
        self.L = L or len(self.blocks)
        self.D = self.config.hidden_size
        self.V = self.config.vocab_size
        self.known_side = {}                            # the last plain `side`
        if model.device.type != "meta":                 # a meta model has sizes only
            require(self, self.look, "its parts could not be told from one run")

    def look(self):
        """Learn from one run: the final norm, which is the last part called; whether a block
        returns a tuple; the class of the output; whether the embedding is one module."""
        calls = []
        hooks = []
        for part in [self.blocks[0], *self.stack.children()]:
            hooks.append(part.register_forward_hook(lambda *call: calls.append(call)))
        ids = probe_ids(self)
        output = self.stack(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        _, (h, *_), block_output = next(call for call in calls if call[0] is self.blocks[0])
        self.norm = calls[-1][0]
        self.tuples = isinstance(block_output, tuple)
        self.output_class = type(output)
        self.plain_embedding = torch.equal(self.model.get_input_embeddings()(ids), h)
        return True

    def handed(self, **inputs):
        """The trick: (h[0], [(args, kwargs) of every block]), from the model's own forward."""
        entered = []
        side = []

        def stand_in(h, *args, **kwargs):
            entered.append(h)
            side.append((args, kwargs))
            return (h,) if self.tuples else h

        forward = inspect.unwrap(type(self.stack).forward)      # without its decorators: faster
        self.stack._modules[self.list_name] = [stand_in] * len(self.blocks)
        try:
            forward(self.stack, **{"use_cache": False, **inputs})
        finally:
            self.stack._modules[self.list_name] = self.blocks
        return entered[0], side

    def embed(self, ids, positions=None, shift=0):
        """ids (B, T) -> h[0] (B, T, D), as the first block gets it: with learned positions, a norm
        or a scale where the family has one. `shift` (B, T, D) is added to the table's vectors."""
        h = self.model.get_input_embeddings()(ids)
        if torch.is_tensor(shift):
            h = h + shift.to(h.dtype)
        if not self.plain_embedding:
            h, _ = self.handed(inputs_embeds=h, position_ids=positions)
        return h

    @torch.no_grad()
    def side(self, h, positions=None, attention_mask=None, cache=None, causal=True, see=None):
        """[(args, kwargs)]: the arguments of every block next to h (B, T, D). Only the shape of h
        counts.

        attention_mask (B, K) is 1 on tokens and 0 on padding; (B, 1, T, K) is added to the scores.
        see (1 or B, 1, T, K) bool says which keys a token sees. Sliding windows still hold.
        With causal=False every token sees every key, without windows. `see` and `causal` set an
        additive mask, because the library's flags for this fail silently in some families."""
        T = h.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if causal and positions is attention_mask is cache is see is None:  # every training step
            key = (h.shape, h.dtype, h.device)
            if key not in self.known_side:              # kept, because `handed` makes a GPU wait
                self.known_side = {key: self.handed(inputs_embeds=h)[1]}
            return self.known_side[key]
        if positions is None:
            positions = torch.arange(past, past + T, device=h.device)[None]         # (1, T)
        if see is not None:
            attention_mask = h.new_zeros(see.shape).masked_fill(~see, torch.finfo(h.dtype).min)
        elif not causal:
            attention_mask = h.new_zeros(1, 1, T, past + T)
        _, side = self.handed(inputs_embeds=h, position_ids=positions, past_key_values=cache,
                              attention_mask=attention_mask, use_cache=cache is not None)
        if see is not None and getattr(self.config, "sliding_window", None):
            self.restore_windows(side, attention_mask, positions, past)
        return side

    def restore_windows(self, side, mask, positions, past):
        """Put the sliding windows back, which an additive mask replaces in every block."""
        keys = torch.cat([torch.arange(past, device=mask.device), positions[0]])    # (K,)
        far = (positions[..., None] - keys).abs() >= self.config.sliding_window     # (1, T, K)
        narrow = mask.masked_fill(far[:, None], torch.finfo(mask.dtype).min)
        kinds = getattr(self.config, "layer_types", None)
        for i, (_, kwargs) in enumerate(side):
            if kinds is None or kinds[i] == "sliding_attention":
                kwargs["attention_mask"] = narrow

    def block(self, h, i, side):
        """h[i] -> h[i+1]."""
        args, kwargs = side[i]
        h = self.blocks[i](h, *args, **kwargs)
        return h[0] if self.tuples else h

    def through(self, h, lo, hi, side=None):
        """h[lo] -> h[hi] (B, T, D): blocks lo+1..hi. Passes over the same tokens share a side."""
        side = side or self.side(h)
        for i in range(lo, hi):
            h = self.block(h, i, side)
        return h

    def hidden(self, ids, layer, positions=None, **kwargs):
        """h[layer] (B, T, D) of tokens ids (B, T). kwargs are those of `side`."""
        h = self.embed(ids, positions)
        return self.through(h, 0, layer, self.side(h, positions, **kwargs))

    def trace(self, h, side=None):
        """Yield h[0], ..., h[L-1] and the normed h[L], each (B, T, D). They are never stacked."""
        side = side or self.side(h)
        for i in range(self.L):
            yield h
            h = self.block(h, i, side)
        yield self.norm(h)

    def head(self, h):
        """h[L] (B, T, D) -> logits (B, T, V)."""
        return self.unnormed_head(self.norm(h))

    def unnormed_head(self, normed):
        """After the final norm: LM head, scales, soft caps. (..., D) -> (..., V)."""
        output = self.output_class(last_hidden_state=normed.reshape(1, -1, self.D))
        self.stack.forward = lambda *_, **__: output
        try:
            logits = self.model(inputs_embeds=normed).logits
        finally:
            del self.stack.forward                      # uncovers the forward of the class
        return logits.reshape(*normed.shape[:-1], logits.shape[-1])


# -------------------------------------------------------------------------------------------------
# Checks at load

def probe_ids(lm):
    """16 different tokens (1, 16)."""
    return torch.arange(1, 17, device=lm.model.device)[None] * 37 % lm.V


def require(lm, test, reason, action="be cut at a layer"):
    """Raise UserError with the reason unless test() is true. A test that raises is not true."""
    try:
        with torch.no_grad():
            passed = test()
    except Exception as error:
        passed = False
        reason = f"{reason} ({type(error).__name__}: {why(error)})"
    if not passed:
        raise cannot(lm.config, reason, action)


def near(a, b):
    """Equal up to rounding: experts group tokens in another way, a GPU adds in another order."""
    tolerance = max(1e-4, 16 * torch.finfo(a.dtype).eps)
    return (a - b).abs().max() < tolerance * max(1, b.abs().max())


def check(lm):
    """Compare the cut model with the model itself on 16 tokens."""
    from transformers import DynamicCache
    ids = probe_ids(lm)
    other = torch.cat([ids[:, :12], (ids[:, 12:] + 1) % lm.V], 1)
    equal = torch.equal if ids.device.type == "cpu" else near

    def logits(ids, lo=0, hi=16, cache=None):
        positions = torch.arange(lo, hi, device=ids.device)[None]
        return lm.head(lm.hidden(ids[:, lo:hi], len(lm.blocks), positions, cache=cache))

    def same():
        return equal(logits(ids), lm.model(ids, use_cache=False).logits)

    def causal():
        return near(logits(other)[:, :12], logits(ids)[:, :12])

    def cached():                                       # 12 tokens, 4 wrong ones, then the right 4
        cache = DynamicCache()
        logits(ids, 0, 12, cache)
        logits(other, 12, 16, cache)
        trim(cache, 12)
        return near(logits(ids, 12, 16, cache), logits(ids)[:, 12:])

    require(lm, same, "its blocks, run one by one, do not give its own logits")
    require(lm, causal, "a later token changes the logits of earlier ones")
    require(lm, cached, "its cache does not give the logits of the whole text")


def check_wide(lm):
    """With causal=False, a text and its reversal, positions included, must have the same states.

    Then the mask alone decides which keys a token sees, and positions alone decide the order. So
    one pass can also hold two copies of a text."""
    ids = probe_ids(lm)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def same():
        forwards = lm.hidden(ids, lm.L, positions, causal=False)
        backwards = lm.hidden(ids.flip(1), lm.L, positions.flip(1), causal=False)
        return near(backwards.flip(1), forwards)

    reason = "under a mask that shows everything its states still depend on the order of tokens"
    require(lm, same, reason, "be converted")


def trim(cache, length):
    """Drop all but the first `length` tokens of a transformers cache. Layers without keys stay."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]


# -------------------------------------------------------------------------------------------------
# Names and folders

def resolve(model, out):
    """`toy` is the folder `toy` next to --out. A local folder is returned as an absolute path."""
    folder = Path(model)
    if model == "toy":
        folder = nearby(out, "toy").resolve()
        if not (folder / "result.json").exists():
            raise UserError(f"there is no toy model near {out}; make it with: python toy.py")
    elif not folder.exists():
        return model                                    # a Hub id
    config = folder / "config.json"
    if config.exists() and read_json(config).get("model_type") == TWIN:
        raise UserError(f"{model} is a converted model, not an AR model; pass the one it came from")
    return str(folder.resolve())


def identity(name):
    """16 hex digits of a model's weights, in milliseconds for any size. They are a hash over each
    safetensors file: its size and 64 evenly spaced pieces of 16 KiB. A Hub id has its commit."""
    if not Path(name).exists():
        from transformers.utils import cached_file
        read_config(name)                               # refuses a name that cannot be opened
        return Path(cached_file(name, "config.json")).parent.name[:16]
    digest = hashlib.sha256(b"false")                   # kept: saved bridges name their base by it
    files = sorted(Path(name).glob("model*.safetensors")) or Path(name).glob("*.safetensors")
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(max(0, size - 2 ** 14) * i // 63)
                digest.update(file.read(2 ** 14))
    return digest.hexdigest()[:16]


def read_config(name, seq_len=0):
    """The transformers config of a folder or Hub id."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
        if values.get("model_type") == TWIN:            # the config of its AR model, renamed
            kind = values["backbone_type"]
            config = CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"no model could be opened at {name} ({why(error)}); "
                        "pass a folder or a Hub id") from None
    if not getattr(config, "max_position_embeddings", None):        # ALiBi has no last position
        config.max_position_embeddings = getattr(config, "max_seq_len", 2 ** 20)
    positions = config.max_position_embeddings
    if seq_len > positions:
        raise UserError(f"--seq_len {seq_len} is longer than the {positions} positions of {name}")
    return config


def preset_of(cfg, bridge=""):
    """The preset behind `--preset auto`: the first of SIZES that cfg.model fits in, or the base of
    a `bridge`. A model that cannot be opened counts as a toy: the stage refuses it."""
    try:
        if bridge:
            config = read_config(read_json(Path(bridge) / "bridge.json")["model"])
        else:
            config = read_config(resolve(cfg.model, cfg.out or "out/bridge"))
    except UserError:
        return "toy"
    blocks = 12 * config.num_hidden_layers * config.hidden_size ** 2
    size = blocks + config.vocab_size * config.hidden_size
    for preset, limit in SIZES.items():
        if size < limit:
            return preset


# -------------------------------------------------------------------------------------------------
# Load and save

def load(name, device, dtype, blocks=None):
    """The frozen, checked Backbone of a local folder or Hub id. With `blocks` only the first
    `blocks` blocks are read."""
    from transformers import AutoModelForCausalLM
    config = read_config(name)
    L = config.num_hidden_layers
    if blocks is not None:
        shorten(config, min(max(1, blocks), L))         # `look` needs one block to look at
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True)
        missing = [*report["missing_keys"], *report["mismatched_keys"]]
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, one is {missing[0]}")
    except Exception as error:      # the library and safetensors raise many types
        raise UserError(f"the weights in {name} could not be read ({type(error).__name__}: "
                        f"{why(error)}); download or make the folder again") from None
    lm = Backbone(model.to(device).eval().requires_grad_(False), L)
    check(lm)
    return lm


def shorten(config, blocks):
    """Cut a config to the first blocks. Lists with an entry a layer become shorter too."""
    for name, value in vars(config).items():
        per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if per_layer and "layer" in name:               # layer_types, no_rope_layers, ...
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks


@contextlib.contextmanager
def quiet():
    """Hide the library's progress bars and its report of tensors that we chose not to load."""
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def as_dtype(dtype):
    """The `dtype` of from_pretrained (a dtype, its name, "auto" or None) -> a dtype, else fp32."""
    return getattr(torch, str(dtype).removeprefix("torch."), torch.float32)


def load_tokenizer(folder):
    """The tokenizer of a shard folder, a model folder or a Hub id."""
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
    if (Path(folder) / "meta.json").exists():
        file = str(Path(folder) / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=EOS)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("it knows no words")       # the library makes one of a bare config
        if not tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no end-of-text token")
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        written = {tokenizer.eos_token_id, bos_id(tokenizer) or 0}      # special, and in use
        largest = max(set(tokenizer.get_vocab().values()) - special | written)
        rows = PretrainedConfig.get_config_dict(folder)[0].get("vocab_size", math.inf)
        if largest >= rows:
            raise ValueError(f"it has ids up to {largest}, but the model has only {rows} rows")
    except Exception as error:
        raise UserError(f"no tokenizer could be loaded from {folder} ({why(error)})") from None
    return tokenizer


def bos_id(tokenizer):
    """The id of the token that the tokenizer puts before every text (BOS), or None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer("a")["input_ids"][0] == bos else None


def tokenizer_hash(tokenizer):
    """16 hex digits that change with any token, merge or id."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values |= {"padding": None, "truncation": None}     # settings of a call, not of the vocabulary
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def save_model(model, tokenizer, out, converted=False, **kwargs):
    """Save as a Hugging Face folder. All files are written to another folder, then renamed into
    place. The settings of the run stay in config.json, under "dihal"."""
    new = Path(out) / ".saving"
    with quiet():
        model.save_pretrained(new, **kwargs)
    tokenizer.save_pretrained(new)
    config = read_json(new / "config.json")
    if converted:
        config["backbone_type"] = config["model_type"]
        config["model_type"] = TWIN
        config["load_with"] = "import core.masked (nanoDiHAL), then AutoModelForCausalLM"
    config["dihal"] = read_json(Path(out) / "config.json")["dihal"]
    (new / "config.json").write_text(json.dumps(config, indent=1))
    for file in new.iterdir():
        os.replace(file, Path(out) / file.name)
    new.rmdir()
