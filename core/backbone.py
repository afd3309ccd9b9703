"""backbone.py: any Hugging Face causal LM, cut at a layer: found, checked, loaded, saved.

    lm = load("out/toy", device, dtype)              # or Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B, ...
    h0 = lm.embed(ids)                               # h[0]
    hl = lm.through(h0, 0, l)                        # h[l]: after blocks 1..l
    logits = lm.head(lm.through(hl, l, lm.L))        # bit for bit the model's own logits

Which hidden state h[l] is: the residual stream after block l, l = 1..L, before the final norm, also at l = L, where the
library's hidden_states[-1] is after it; h[0] is the output of the embedding (with GPT-2's learned positions).
Why neither code nor pickles from the Hub are ever run: to open either is to run what a stranger wrote. All weights are
safetensors, all architectures the library's own (trust_remote_code=False), and what fails `check` is refused.

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary.
"""
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from core.common import UserError, why
from core.run import beside, read_json

EOS = "<|endoftext|>"  # of a tokenizer that we train ourselves
TWIN = "nanodihal_twin"  # what transformers is told a converted model is
SIZES = {"toy": 3e7, "135m": 4e8, "0.6b": 3e9, "8b": math.inf}  # preset -> below how many parameters it is meant


def blocks_of(model):
    """(name of the module that runs the blocks, name of its list of blocks), found by structure: that module takes
    `inputs_embeds` and holds a ModuleList of num_hidden_layers. Raises UserError where there is none."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if "inputs_embeds" in inspect.signature(module.forward).parameters:
            for key, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return name, key
    raise cannot(model.config, "no part of it takes inputs_embeds and runs one list of blocks")


def cannot(config, reason, what="be cut at a layer"):
    return UserError(f"a model of type {config.model_type!r} cannot {what}: {reason}")


class Given(tuple):
    """What a decoder stack returns, whatever the library's class for it is: a last hidden state and nothing else."""

    def __getattr__(self, name):
        return self[0] if name == "last_hidden_state" else None


class Backbone(nn.Module):
    """A causal LM as embed -> blocks 1..L -> head; with `L` given only a prefix of the L blocks is in `model`.

    Nothing here knows an architecture. What a block needs beside h (masks, rotary tables, ALiBi, the cache) is what the
    model's own forward hands it: for one call stand-ins take the blocks' places and note it. What runs after the blocks
    is its own forward too, unless a look-up or a product is seen to give the same bits. `check` compares the two."""

    def __init__(self, model, L=None):
        super().__init__()
        self.model, self.config = model, model.config
        name, self.key = blocks_of(model)
        self.stack = model.get_submodule(name)
        self.blocks = getattr(self.stack, self.key)
        self.blocks_name = f"{name}.{self.key}."                 # as in the names of their parameters
        self.L = L or len(self.blocks)                   # of the whole model, also when only a prefix is loaded
        self.D, self.V = self.config.hidden_size, self.config.vocab_size
        self.seen, self.plain = [], {}
        if next(model.parameters()).device.type != "meta":       # there only sizes are wanted
            refuse(self, {"no single final norm follows its blocks": self._look})

    def _look(self):
        """What only a run tells: the final norm, whether blocks return tuples, whether embedding or head are plain.
        False where what follows the blocks is not one module."""
        seen, training, ids = [], self.model.training, tokens(self)
        parts = {**dict(self.stack.named_children()), "first": self.blocks[0], "last": self.blocks[-1]}
        hooks = [part.register_forward_hook(lambda _, args, out, name=name: seen.append((name, args, out)))
                 for name, part in parts.items()]
        self.stack.eval()(input_ids=ids, use_cache=False)
        self.model.train(training)
        for hook in hooks:
            hook.remove()
        names = [name for name, *_ in seen]
        after, (_, (h, *_), out) = names[names.index("last") + 1:], seen[names.index("first")]
        self.last, self.norm, self.tuples = after[0], parts[after[0]], isinstance(out, tuple)
        self.own = inspect.unwrap(type(self.stack).forward)          # its decorators would take as long again
        self.plain_embedding = torch.equal(self.model.get_input_embeddings()(ids), h)
        self.plain_head = False
        self.plain_head = torch.equal(self.model.get_output_embeddings()(h), self.unnormed_head(h))
        return len(after) == 1

    def _stand_in(self, h, *args, **kwargs):
        self.seen.append((h, args, kwargs))
        return (h,) if self.tuples else h

    def _handed(self, **inputs):
        """[(h, args, kwargs) of every block]: what the stack's own forward would hand it, if blocks changed nothing."""
        parts = self.stack._modules
        parts[self.key], parts[self.last] = [self._stand_in] * len(self.blocks), lambda h: h
        try:
            self.own(self.stack, **{"use_cache": False, **inputs})
            return list(self.seen)
        finally:
            parts[self.key], parts[self.last] = self.blocks, self.norm
            self.seen.clear()

    def embed(self, ids, positions=None, shift=0):
        """ids (B, T) int64 -> h[0] (B, T, D), as the first block gets it: with learned positions, a norm or a scale.
        `shift` (B, T, D) is added to what the table gives."""
        h = self.model.get_input_embeddings()(ids)                                    # (B, T, D)
        h = h + shift.to(h.dtype) if torch.is_tensor(shift) else h
        return h if self.plain_embedding else self._handed(inputs_embeds=h, position_ids=positions)[0][0]

    @torch.no_grad()
    def side(self, h, positions=None, attention_mask=None, cache=None, causal=True, see=None):
        """What every block needs beside h (B, T, D), of which only the shape counts: [(args, kwargs)].

        attention_mask (B, T) is 1 on tokens and 0 on padding; (B, 1, T, K) is added to the scores as it is.
        causal=False lets every token see every other one and lifts sliding windows, by such a mask: the library's flags
        for this fail silently on some families. `see` (1 | B, 1, T, K) bool says who sees whom; windows stay, by the
        positions, which may come twice."""
        past, low = cache.get_seq_length() if cache is not None else 0, torch.finfo(h.dtype).min
        if positions is attention_mask is cache is see is None and causal:               # as in every training step
            key = h.shape, h.dtype, h.device
            if key not in self.plain:      # the last one is kept: to look for packed texts, the library asks the GPU
                self.plain = {key: [call[1:] for call in self._handed(inputs_embeds=h)]}
            return self.plain[key]
        if positions is None:
            positions = torch.arange(past, past + h.shape[1], device=h.device)[None]      # (1, T)
        if see is not None:
            attention_mask = h.new_zeros(see.shape).masked_fill(~see, low)                   # additive
        elif not causal:
            attention_mask = h.new_zeros(1, 1, h.shape[1], past + h.shape[1])                # (1, 1, T, K), additive
        calls = [call[1:] for call in self._handed(inputs_embeds=h, position_ids=positions, past_key_values=cache,
                                                   attention_mask=attention_mask, use_cache=cache is not None)]
        window = getattr(self.config, "sliding_window", None)
        if see is None or not window:
            return calls
        keys = torch.cat([torch.arange(past, device=h.device), positions[0]])             # (K,)
        far = ((positions[..., None] - keys).abs() >= window)[:, None]                    # (1, 1, T, K)
        windowed, kinds = attention_mask.masked_fill(far, low), getattr(self.config, "layer_types", None)
        return [(args, {k: windowed if v is attention_mask else v for k, v in kwargs.items()})
                if kinds is None or kinds[i] == "sliding_attention" else (args, kwargs)
                for i, (args, kwargs) in enumerate(calls)]

    def through(self, h, lo, hi, side=None):
        """h[lo] -> h[hi] (B, T, D): blocks lo+1..hi. `side` is shared between calls on the same tokens."""
        side = side or self.side(h)
        for i in range(lo, hi):
            h = self.block(h, i, side)
        return h

    def block(self, h, i, side):
        """h[i] -> h[i+1]."""
        args, kwargs = side[i]
        h = self.blocks[i](h, *args, **kwargs)
        return h[0] if isinstance(h, tuple) else h

    def at(self, ids, layers):
        """(layer, h[layer], h[0], side) for each of the layers, the lowest first, by one pass over ids (B, T)."""
        h0 = h = self.embed(ids)
        side, at = self.side(h0), 0
        for layer in sorted(layers):
            h, at = self.through(h, at, layer, side), layer
            yield layer, h, h0, side

    def head(self, h):
        """h[L] (B, T, D) -> logits (B, T, V): final norm, then `unnormed_head`."""
        return self.unnormed_head(self.norm(h))

    def unnormed_head(self, normed):
        """What follows the final norm: the LM head, scales and soft caps. normed (..., D) -> logits (..., V)."""
        if self.plain_head:
            return self.model.get_output_embeddings()(normed)
        self.stack.forward = lambda *_, **__: Given([normed.reshape(1, -1, self.D)])
        try:
            return self.model(inputs_embeds=normed).logits.unflatten(1, normed.shape[:-1])[0]
        finally:
            del self.stack.forward


def tokens(lm):
    """16 random tokens (1, 16), always the same: they take nothing from the global generator."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(lm.V, (1, 16), generator=g).to(next(lm.model.parameters()).device)


def refuse(lm, tests, **what):
    """Raise UserError with the reason of the first of the tests {reason: function} that is not true, or fails."""
    for reason, test in tests.items():
        try:
            with torch.no_grad():
                true, said = test(), ""
        except Exception as error:
            true, said = False, f" ({type(error).__name__}: {why(error)})"
        if not true:
            raise cannot(lm.config, reason + said, **what)


def near(a, b):  # not equal: experts see other tokens beside a token, and a GPU may add in another order
    return (a - b).abs().max() < max(1e-4, 16 * torch.finfo(a.dtype).eps) * b.abs().max().clamp_min(1)


def check(lm):
    """Raise UserError, with the reason, unless on 16 random tokens the cut model is the model, bit for bit; a changed
    token changes no logit before it; and a cache, cut back once, gives what the whole text gives."""
    from transformers import DynamicCache
    ids, n = tokens(lm), len(lm.blocks)
    other = torch.cat([ids[:, :12], (ids[:, 12:] + 1) % lm.V], 1)

    def logits(ids, lo=0, hi=16, cache=None):
        positions = torch.arange(lo, hi, device=ids.device)[None]
        h = lm.embed(ids[:, lo:hi], positions)
        side = lm.side(h, positions, cache=cache)
        return lm.head(lm.through(lm.through(h, 0, n // 2, side), n // 2, n, side))

    def cached():
        cache = DynamicCache()
        logits(ids, 0, 12, cache)
        logits(other, 12, 16, cache)
        trim(cache, 12)
        return near(logits(ids, 12, 16, cache), mine()[:, 12:])
    mine, same = functools.cache(lambda: logits(ids)), torch.equal if ids.device.type == "cpu" else near
    refuse(lm, {"its blocks, run one by one, do not give its own logits":
                lambda: same(mine(), lm.model(ids, use_cache=False).logits),
                "a later token changes what it says of earlier ones":
                lambda: near(logits(other)[:, :12], mine()[:, :12]),
                "its cache does not give what the whole text gives": cached})


def check_wide(lm):
    """Raise UserError unless, with causal=False, a changed last token changes every state before it."""
    def last(ids):
        h = lm.embed(ids)
        return lm.through(h, 0, len(lm.blocks), lm.side(h, causal=False))
    ids = tokens(lm)
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % lm.V], 1)
    refuse(lm, {"its attention stays causal under a mask that shows everything":
                lambda: (last(ids) != last(other)).any(-1).all()}, what="be made bidirectional")


def check_copies(lm):
    """Raise UserError unless a second copy of a text in one pass, each token of which sees itself and what is before it
    in the first copy, has the first one's causal states: where a token stands must be its position, not its place."""
    ids, positions, causal = tokens(lm)[:, :8].repeat(1, 2), torch.arange(8).repeat(2)[None], torch.ones(8, 8).tril()
    see = torch.cat([torch.cat([causal, torch.zeros(8, 8)], 1), torch.cat([causal.tril(-1), torch.eye(8)], 1)]) > 0

    def same():
        where = positions.to(ids.device)
        h = lm.embed(ids, where)
        h = lm.through(h, 0, len(lm.blocks), lm.side(h, where, see=see[None, None].to(ids.device)))
        return near(h[:, 8:], h[:, :8])
    refuse(lm, {"it goes by a token's place in the pass, so two copies of a text in one differ": same},
           what="be converted to blocks")


def trim(cache, length):
    """Drop all but the first `length` tokens of a transformers cache (whose own `crop` changed its meaning)."""
    for layer in cache.layers if cache is not None else []:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def resolve(model, out):
    """`toy` means the folder `toy` beside --out. A local folder is given back whole, so that it can be found again from
    another working directory."""
    if model != "toy":
        if (Path(model) / "result.json").exists() and "mask_id" in read_json(Path(model) / "result.json"):
            raise UserError(f"{model} is a converted model, no AR model; pass the one that it came from")
        return str(Path(model).resolve()) if Path(model).exists() else model
    folder = beside(out, "toy").resolve()
    if not (folder / "result.json").exists():
        raise UserError(f"there is no finished backbone in {folder}; make it with: python toy.py --out {folder}")
    return str(folder)


def no_model(name, error):
    return UserError(f"no model could be opened at {name} ({why(error)}); pass a local folder or a Hub id")


def identity(name, random_init=False):
    """16 hex digits of a model's weights: the size and 64 evenly spread 16 KiB pieces of each safetensors file, so that
    8B weights take milliseconds and no loading. Another training differs; a change of a few tensors between the pieces
    need not. A Hub id has its commit, random weights (seeded, other ones on a GPU) their config."""
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
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise UserError(f"{name} is no model folder: it has no config.json")
    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
        if raw.get("model_type") == TWIN:                                  # core.twin_lm's, of an ordinary model
            config = CONFIG_MAPPING[raw["backbone_type"]].from_dict(raw | {"model_type": raw["backbone_type"]})
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise no_model(name, error) from None
    try:
        with quiet(), torch.device("meta"):
            blocks_of(AutoModelForCausalLM.from_config(config))
    except ValueError:
        raise cannot(config, "it is no causal LM") from None
    if not getattr(config, "max_position_embeddings", None):              # ALiBi has no last position
        config.max_position_embeddings = getattr(config, "max_seq_len", 2 ** 20)
    if seq_len > config.max_position_embeddings:
        raise UserError(f"--seq_len {seq_len} is longer than the {config.max_position_embeddings} positions of {name}")
    return config


def free_bytes(device):
    """Memory that a model may still take on this device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device)                                                            # what torch holds for later is free too
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def refuse_large(name, config, device, dtype):
    """Raise UserError for weights that do not fit the device's memory: the system would end the process unheard."""
    from transformers import AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        needed = dtype.itemsize * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if needed > (free := free_bytes(device)):
        raise UserError(f"the weights of {name} take {needed / 1e9:.2f} GB in {dtype}, {(needed - free) / 1e9:.2f} GB "
                        f"more than {device} has free; use a smaller model" + (
                            ", or --dtype bf16 for half of it" if dtype == torch.float32 else ""))


def load(name, device, dtype, blocks=None, random_init=False):
    """Backbone of a local folder or Hub id, frozen, in eval mode; with `blocks` only the first so many are read.

    Raises UserError for a folder that is no model, an architecture that cannot be cut, damaged or missing weights."""
    from transformers import AutoModelForCausalLM
    config = read_config(name)
    L, blocks = config.num_hidden_layers, max(1, blocks or 0) if blocks is not None else None   # one block to look at
    if blocks is not None and blocks < L:
        for key, value in vars(config).items():                                # layer_types, no_rope_layers, ...
            if "layer" in key and isinstance(value, list) and len(value) == L:
                setattr(config, key, value[:blocks])
        config.num_hidden_layers = blocks
    refuse_large(name, config, device, dtype)
    try:
        with quiet(), torch.device(device) if random_init else contextlib.nullcontext():
            if random_init:
                torch.manual_seed(0)
                model, report = AutoModelForCausalLM.from_config(config, dtype=dtype), {}
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    name, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                    output_loading_info=True)
    except Exception as error:  # safetensors, OSError, RuntimeError: the library has many ways to say no
        raise UserError(f"the weights in {name} could not be read ({type(error).__name__}: {why(error)}); "
                        "download or make the folder again") from None
    if missing := [*report.get("missing_keys", ()), *report.get("mismatched_keys", ())]:
        raise UserError(f"the weights in {name} lack {len(missing)} tensors, {min(map(str, missing))} among them; "
                        "download or make the folder again")
    lm = Backbone(model.to(device).eval().requires_grad_(False), L)
    check(lm)
    return lm


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
        with quiet():                                                    # it knows no TWIN, and needs none
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # the library makes an empty one of a bare config
            raise ValueError("it knows no words")
    except Exception as error:
        raise UserError(f"no tokenizer could be loaded from {folder} ({why(error)}); save one beside it") from None
    return tokenizer


def tokenizer_hash(tokenizer):
    """16 hex digits that change when any token, merge or id does."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"padding": None, "truncation": None}            # settings of the day, not of the vocabulary
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def as_dtype(dtype):
    """What from_pretrained may be given (None, "auto", "bfloat16", a dtype) -> a dtype; fp32 where it says nothing."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def save_model(model, tokenizer, out, twin=False, **how):
    """Save as a Hugging Face folder: all files are written apart, then renamed into place, config.json last. The
    run's own settings stay in it under `dihal`; a README.md that core.run.card wrote stays as well. A converted model
    goes by a type of its own (core/twin_lm.py), lest the library take it for an AR model."""
    out, apart = Path(out), Path(out) / ".saving"
    shutil.rmtree(apart, ignore_errors=True)
    with quiet():
        model.save_pretrained(apart, **how)
    tokenizer.save_pretrained(apart)
    settings = json.loads((out / "config.json").read_text())["dihal"]
    config = json.loads((apart / "config.json").read_text())
    config |= {"model_type": TWIN, "backbone_type": config["model_type"]} if twin else {}
    (apart / "config.json").write_text(json.dumps({**config, "dihal": settings}, indent=1))
    for file in sorted(apart.iterdir(), key=lambda f: f.name == "config.json"):
        shutil.rmtree(out / file.name, ignore_errors=True)  # a folder: left by an earlier try
        os.replace(file, out / file.name)
    apart.rmdir()


def head_size(config):
    """Channels of one head: they need not be D over the number of heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flops_per_token(model, T):
    """Training FLOPs a token: 6 per parameter (forward 2, backward 4) and 6 per attended key and channel, causal.
    A tied embedding counts once, as the head."""
    n, config = sum(p.numel() for p in model.parameters()), model.config
    return 6 * n + 6 * config.num_hidden_layers * config.num_attention_heads * head_size(config) * T


def preset_of(model, out, bridge=""):
    """What `--preset auto` stands for: the first of SIZES that the model, or the base of a `bridge`, fits in, by the
    shapes in its files or, where they are not here, by its config. What cannot be opened is a toy: the stage itself
    then says what is wrong."""
    try:
        model = read_json(Path(bridge) / "bridge.json")["model"] if bridge else model
        folder, count = Path(resolve(model, out)), 0
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as f:                                        # its header: 8 bytes of length, JSON
                shapes = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            count += sum(math.prod(about.get("shape", [0])) for about in shapes.values())
        if not count:
            config = read_config(str(model))
            count = 12 * config.num_hidden_layers * config.hidden_size ** 2 + config.vocab_size * config.hidden_size
    except (UserError, ValueError, KeyError):
        return "toy"
    return next(name for name, most in SIZES.items() if count < most)
