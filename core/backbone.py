"""backbone.py: any Hugging Face causal LM, cut at a layer: found, checked, loaded, saved.

    lm = load("out/toy", device, dtype)              # or Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B, ...
    h0 = lm.embed(ids)                               # h[0]
    hl = lm.through(h0, 0, l)                        # h[l]: after blocks 1..l
    logits = lm.head(lm.through(hl, l, lm.L))        # bit for bit the model's own logits

Which hidden state h[l] is: the residual stream after block l, l = 1..L, before the final norm, also at l = L, where the
library's hidden_states[-1] is after it; h[0] is the output of the embedding (with GPT-2's learned positions).
Why neither code nor pickles from the Hub are ever run: to open either is to run what a stranger wrote. All weights are
safetensors, all architectures the library's own (trust_remote_code=False), and what FAMILIES lacks is refused.

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary.
"""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core.common import UserError
from core.run import beside

EOS = "<|endoftext|>"  # of a tokenizer that we train ourselves


# ------------------------------------------------------------------------------------------------ cut at a layer
class Family(NamedTuple):
    """Where the parts of an architecture are. To add one:

    1 an entry in FAMILIES under the `model_type` of its config.json
    2 its random tiny config in tests/conftest.py, with a window below the tests' length if it has one: every test of
      families then runs on it (prefix + suffix, padding, bidirectional, hybrid, conversion), bit for bit
    3 `adds_up`, for circuits.py, only where a head's output joins the residual stream as it is
    4 what `Backbone` does not know yet (a scaled embedding outside the module, a block that returns more, another
      mask) makes those tests fail: add a field here, not a question about model_type there"""
    stack: str                        # of the model: the decoder stack
    blocks: str                       # of the stack: its ModuleList of blocks
    norm: str                         # of the stack: the final norm
    adds_up: tuple = ()               # in a block: norm, attention, its output matrix, second norm
    joint: bool = False               # one matrix for q, k and v, stored (in, out)
    positions: str = ""               # of the stack: a learned position embedding, added to h[0]
    cache: str = "past_key_values"    # what a block calls its cache
    rotary_by_type: bool = False      # sliding and full layers turn at different speeds


LLAMA = Family("model", "layers", "norm", ("input_layernorm", "self_attn", "o_proj", "post_attention_layernorm"))
FAMILIES = {  # model_type -> Family. Others are refused, never silently wrong.
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), LLAMA),
    **dict.fromkeys(("gemma2", "olmo2"), LLAMA._replace(adds_up=())),        # these norm a sublayer's output
    "gemma3_text": LLAMA._replace(adds_up=(), rotary_by_type=True),
    "gpt2": Family("transformer", "h", "ln_f", ("ln_1", "attn", "c_proj", "ln_2"), joint=True, positions="wpe"),
    "gpt_neox": Family("gpt_neox", "layers", "final_layer_norm", cache="layer_past"),   # attention beside the MLP
}


def family_of(config):
    """The Family of a config. Raises UserError for an architecture that cannot be cut."""
    if config.model_type not in FAMILIES:
        raise UserError(f"a model of type {config.model_type!r} cannot be cut at a layer; "
                        f"supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]


class Backbone(nn.Module):
    """A causal LM as embed -> blocks 1..L -> head; with `L` given only a prefix of the L blocks is in `model`."""

    def __init__(self, model, L=None):
        super().__init__()
        self.model, self.config = model, model.config
        self.family = family = family_of(self.config)
        self.stack = getattr(model, family.stack)
        self.blocks, self.norm = getattr(self.stack, family.blocks), getattr(self.stack, family.norm)
        self.blocks_name = f"{family.stack}.{family.blocks}."    # as in the names of their parameters
        self.L = L or len(self.blocks)                   # of the whole model, also when only a prefix is loaded
        self.D, self.V = self.config.hidden_size, self.config.vocab_size
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None) if self.config.model_type == "mistral" else None
        self.types = types or ["sliding_attention" if window else "full_attention"] * len(self.blocks)

    def embed(self, ids, positions=None):
        """ids (B, T) int64 -> h[0] (B, T, D). GPT-2 adds its learned positions here."""
        h = self.model.get_input_embeddings()(ids)                                    # (B, T, D)
        if self.family.positions:
            positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
            h = h + getattr(self.stack, self.family.positions)(positions)
        return h

    def side(self, h, positions=None, attention_mask=None, cache=None, causal=True, see=None):
        """What every block needs beside h: positions (B, T), one mask and one rotary table per attention type.

        attention_mask (B, T) is 1 on tokens and 0 on padding. causal=False lets every token see every other one and
        lifts sliding windows, by an explicit mask: the library's flags for this fail silently on some families. `see`
        (1 | B, 1, T, K) bool says who sees whom; windows stay, by the positions, which may come twice."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
        past = cache.get_seq_length() if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + h.shape[1], device=h.device)[None]      # (1, T)
        kinds = set(self.types)
        if see is not None:
            keys = torch.cat([torch.arange(past, device=h.device), positions[0]])             # (K,)
            near = (positions[..., None] - keys).abs() < (getattr(self.config, "sliding_window", None) or 1)
            masks = {k: h.new_zeros(see.shape).masked_fill(  # additive
                ~(see & near[:, None] if k == "sliding_attention" else see), torch.finfo(h.dtype).min) for k in kinds}
        elif causal:
            make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {k: make[k](config=self.config, inputs_embeds=h, attention_mask=attention_mask,
                                past_key_values=cache, position_ids=positions) for k in kinds}
        else:
            mask = h.new_zeros(1, 1, h.shape[1], past + h.shape[1])                          # (1, 1, T, K), additive
            if attention_mask is not None:
                mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(h.dtype).min)
            masks = dict.fromkeys(kinds, mask)
        turn = getattr(self.stack, "rotary_emb", None)
        if self.family.rotary_by_type:
            rotary = {k: turn(h, positions, k) for k in kinds}
        else:
            rotary = dict.fromkeys(kinds, turn and turn(h, positions))
        return {"positions": positions, "masks": masks, "rotary": rotary, "cache": cache}

    def through(self, h, lo, hi, side=None):
        """h[lo] -> h[hi] (B, T, D): blocks lo+1..hi. `side` is shared between calls on the same tokens."""
        side = side or self.side(h)
        for i in range(lo, hi):
            h = self.block(h, i, side)
        return h

    def block(self, h, i, side):
        """h[i] -> h[i+1]."""
        kind, cache = self.types[i], side["cache"]
        extra = {self.family.cache: cache}
        if side["rotary"][kind] is not None:
            extra["position_embeddings"] = side["rotary"][kind]
        h = self.blocks[i](h, attention_mask=side["masks"][kind], position_ids=side["positions"],
                           use_cache=cache is not None, **extra)
        return h[0] if isinstance(h, tuple) else h

    def head(self, h):
        """h[L] (B, T, D) -> logits (B, T, V): final norm, LM head and, for Gemma-2, its soft cap."""
        return self.unnormed_head(self.norm(h))

    def unnormed_head(self, normed):
        """What follows the final norm. normed (..., D) -> logits (..., V)."""
        logits = self.model.get_output_embeddings()(normed)                           # (..., V)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap is not None else logits


def trim(cache, length):
    """Drop all but the first `length` tokens of a transformers cache (whose own `crop` changed its meaning)."""
    for layer in cache.layers if cache is not None else []:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def resolve(model, out):
    """`toy` means the folder `toy` beside --out. A local folder is given back whole, so that it can be found again from
    another working directory."""
    if model != "toy":
        return str(Path(model).resolve()) if Path(model).exists() else model
    folder = beside(out, "toy").resolve()
    if not (folder / "result.json").exists():
        raise UserError(f"there is no finished backbone in {folder}; make it with: python toy.py --out {folder}")
    return str(folder)


def no_model(name, error):
    reason = str(error).strip().split("\n")[0]
    return UserError(f"no model could be opened at {name} ({reason}); pass a local folder or a Hub id")


def identity(name, random_init=False):
    """16 hex digits of a model's weights: the size and 64 evenly spread 16 KiB pieces of each safetensors file, so that
    8B weights take milliseconds and no loading. Another training differs; a change of a few tensors between the pieces
    need not. A Hub id has its commit, random weights (which are seeded) their config."""
    folder, digest = Path(name), hashlib.sha256(json.dumps(random_init).encode())
    if not folder.exists():
        from transformers.utils import cached_file
        try:
            commit = Path(cached_file(name, "config.json")).parent.name
        except Exception as error:
            raise no_model(name, error) from None
        return hashlib.sha256(f"{random_init} {name} {commit}".encode()).hexdigest()[:16]
    for file in sorted(folder.glob("*.safetensors")) if not random_init else [folder / "config.json"]:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as f:
            for i in range(64):
                f.seek(max(0, size - 2 ** 14) * i // 63)
                digest.update(f.read(2 ** 14))
    return digest.hexdigest()[:16]


def made_of(out, folders):
    """{path from --out: identity} of the weights that a run used: a report can tell when they have changed since."""
    return {os.path.relpath(folder, out): identity(folder) for folder in folders if Path(folder).exists()}


def read_config(name, seq_len=0):
    """The transformers config of a folder or Hub id; raises UserError for what is no causal LM, or too short a one."""
    from transformers import AutoConfig
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise UserError(f"{name} is no model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise no_model(name, error) from None
    family_of(config)
    if seq_len > config.max_position_embeddings:
        raise UserError(f"--seq_len {seq_len} is longer than the {config.max_position_embeddings} positions of {name}")
    return config


def load(name, device, dtype, blocks=None, random_init=False):
    """Backbone of a local folder or Hub id, frozen, in eval mode; with `blocks` only the first so many are read.

    Raises UserError for a folder that is no model, an architecture that cannot be cut, damaged or missing weights."""
    from transformers import AutoModelForCausalLM
    config = read_config(name)
    L = config.num_hidden_layers
    if blocks is not None and blocks < L:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    try:
        with quiet():
            if random_init:
                torch.manual_seed(0)
                model, report = AutoModelForCausalLM.from_config(config, dtype=dtype), {}
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                    output_loading_info=True)
    except Exception as error:  # safetensors, OSError, RuntimeError: the library has many ways to say no
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the weights in {name} could not be read ({type(error).__name__}: {reason}); "
                        "download or make the folder again") from None
    if missing := [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]:
        raise UserError(f"the weights in {name} lack {len(missing)} tensors, {min(map(str, missing))} among them; "
                        "download or make the folder again")
    return Backbone(model.to(device).eval().requires_grad_(False), L)


@contextlib.contextmanager
def quiet():
    """Without the library's progress bars and its report of the tensors we chose not to load."""
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def load_tokenizer(folder):
    """The tokenizer of a shard folder or a model folder / Hub id."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if (Path(folder) / "meta.json").exists():
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), eos_token=EOS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # the library makes an empty one of a bare config
            raise ValueError("it knows no words")
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"no tokenizer could be loaded from {folder} ({reason}); save one beside the model") from None
    return tokenizer


def tokenizer_hash(tokenizer):
    """16 hex digits that change when any token, merge or id does."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"padding": None, "truncation": None}            # settings of the day, not of the vocabulary
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def next_token_loss(logits, ids):
    """Mean cross-entropy in nats. logits (B, T, V) of ids[:, :-1]; ids (B, T+1)."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def save_model(model, tokenizer, out, **how):
    """Save as a Hugging Face folder: all files are written apart, then renamed into place, config.json last. The
    run's own settings stay in it under `dihal`; a README.md that core.run.card wrote stays as well."""
    out, apart = Path(out), Path(out) / ".saving"
    shutil.rmtree(apart, ignore_errors=True)
    with quiet():
        model.save_pretrained(apart, **how)
    tokenizer.save_pretrained(apart)
    settings = json.loads((out / "config.json").read_text())["dihal"]
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps({**config, "dihal": settings}, indent=1))
    for file in sorted(apart.iterdir(), key=lambda f: f.name == "config.json"):
        shutil.rmtree(out / file.name, ignore_errors=True)  # a folder: left by an earlier try
        os.replace(file, out / file.name)
    apart.rmdir()


def attention_width(config):
    """Channels of all query heads together: a head's width need not be D over their number."""
    each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * each


def flops_per_token(model, T):
    """Training FLOPs a token: 6 per parameter (forward 2, backward 4) and 6 per attended key and channel, causal.
    A tied embedding counts once, as the head."""
    n = sum(p.numel() for p in model.parameters())
    return 6 * n + 6 * model.config.num_hidden_layers * attention_width(model.config) * T
