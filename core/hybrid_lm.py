"""hybrid_lm.py: bridge + retained blocks + LM head as one Hugging Face causal LM; hybrid.py saves and measures it.

    model = from_bridge("out/bridge")                     # forward(ids) -> logits, generate(), save_pretrained
    ids = model.generate_blocks(ids, 64, block_size=32, prior=prior)    # 32 tokens at a time, drawn in hidden space

Letters: B batch, T tokens, D hidden width, L blocks, l the replaced layer, V vocabulary.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from core import backbone, denoiser, diffusion, masked
from core.common import UserError, pick, why
from core.draws import generator, normal

LAYER_NUMBERS = "layer_idx", "layer_id"  # what the library calls a module's place in the cache


def product(upper, read, alpha=0.6, beta=0.6, prior=None):
    """log p (..., V), not normalised, of a token from what two experts make of it, both (..., V): the retained blocks
    see the states before it, the readout its own. Each is a posterior, p(x | a) and p(x | b), that holds the prior p(x)
    once; where a and b are independent given x, p(x | a, b) ~ p(x | a) p(x | b) / p(x): one copy has to go (beta). They
    are not quite, as both know the prefix, so that what the readout adds, p(x | b) / p(x), counts less than once: by 32
    calls alpha = beta = 0.8 was best after 400 steps and 0.6 after 800, on texts apart (LOG.md)."""
    logits = upper + alpha * read
    return logits - beta * prior.to(logits) if beta else logits


class HybridConfig(PretrainedConfig):
    """What a hybrid is made of: the bridge's shape, the layer, how states are sampled, and the base model with the hash
    of its weights."""
    model_type = "dihal_hybrid"

    def __init__(self, base_model="", base="", layer=0, nfe=4, sampler="euler", shift=1.0, noise_seed=0, bridge=None,
                 use_cache=True, tokenizer=None, **rest):
        self.base_model, self.base, self.layer, self.tokenizer = base_model, base, layer, tokenizer
        self.nfe, self.sampler, self.shift, self.noise_seed = nfe, sampler, shift, noise_seed
        self.bridge, self.use_cache = dict(bridge or {}), use_cache
        super().__init__(**rest)


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of blocks l+1..L and the head on the bridge's h[l]. The noise is a function of (noise_seed, position):
    logits are deterministic, and those of token i depend on tokens 0..i only.

    The base model is held but is no submodule: its weights are frozen, stay in their folder and are not saved again.
    """
    # One transformers cache serves bridge and upper blocks. A network call at another noise level has other keys and
    # values, so each of the NFE calls has cache layers of its own: call i, bridge block j is layer i * blocks + j. The
    # retained blocks come after them (set_nfe writes their layer_idx), and config.num_hidden_layers counts all, by
    # which the library sizes the cache. A new token then costs one pass of NFE bridges and L - l blocks over itself.
    # A bridge that generates keeps the blocks it replaces too, last in the cache: they encode what it has drawn.
    config_class = HybridConfig
    main_input_name = "input_ids"

    def __init__(self, config, net, lm):
        super().__init__(config)
        self.net = net
        self.__dict__["lm"] = lm
        self.register_buffer("noise", torch.zeros(0, net.settings["D"]), persistent=False)
        for i in range(0 if net.generates else config.layer):  # the replaced blocks are gone
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
        first = (nfe if self.net.settings["objective"] == "diffusion" else 1) * self.net.settings["blocks"]
        gone, L = self.config.layer, self.lm.L
        for i in range(0 if self.net.generates else gone, L):
            numbered = [(m, name) for m in self.lm.blocks[i].modules() for name in LAYER_NUMBERS if hasattr(m, name)]
            if not numbered:
                raise backbone.cannot(self.lm.config, "its blocks do not say which layer of a cache is theirs",
                                      "be the base of a hybrid")
            for module, name in numbered:
                setattr(module, name, first + (i - gone) % L)                      # l+1..L first, then 1..l
        self.config.nfe, self.config.num_hidden_layers = nfe, first + L - (0 if self.net.generates else gone)

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
        z = self.states(h0, input_ids, self.config.nfe, self.noise_at(positions), positions, mask, cache)
        return self.net.hidden(z, positions).to(h0.dtype) if self.config.layer else h0, side

    def states(self, h0, ids, nfe, *noise_positions_mask_cache, **more):
        """Standardised h[l] (B, T, D) of h[0] of ids (B, T), by the sampler and shift of the config."""
        return diffusion.sample(self.net, self.net.standard_c(h0, ids), nfe, *noise_positions_mask_cache,
                                sampler=self.config.sampler, shift=self.config.shift, **more)

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
        loss = None if labels is None else F.cross_entropy(                                              # ignores -100
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    # ------------------------------------------------------------------------------------------- blocks of tokens
    @torch.no_grad()
    def generate_blocks(self, input_ids, max_new_tokens=64, block_size=64, nfe=4, *, prior=None, alpha=0.6, beta=0.6,
                        temperature=1.0, top_p=1.0, refinements=14, back=0.25, seed=0, suffix_ids=None, watch=None):
        """input_ids (B, T) -> (B, T + max_new_tokens [+ suffix]): `block_size` tokens at a time are drawn in hidden
        space and decoded. Rows do not depend on one another.

        One block of tokens: `nfe` denoising calls on the unknown positions -> decode -> `refinements` times (one pass
        of the intact model over the drawn tokens gives their h[l] and its law of each next one; add noise to that h[l],
        make the last `back` share of the calls again, decode). They follow one another on a cache; with suffix_ids
        (B, S) one of them fills the gap before the suffix, which needs a bidirectional bridge.

        Tokens are drawn from the `product` of two experts: the readout of the drawn state, and what the retained blocks
        foretell from the states before it: the drawn ones at first, then those of the tokens drawn last. `prior`
        (V,) is log p of every token as `token_prior` counts it; the law is tempered and cut to the `top_p` nucleus."""
        ahead = 0 if suffix_ids is None else suffix_ids.shape[1]
        how = dict(nfe=nfe, prior=prior, alpha=alpha, beta=beta, temperature=temperature, top_p=top_p, back=back,
                   refinements=refinements, seed=seed, watch=watch, done=nfe - diffusion.again(nfe, back))
        self._refuse(how, block_size, max_new_tokens, input_ids.shape[1], ahead)
        if self.net.settings["objective"] == "regression":
            how["refinements"] = 0  # nothing to refine: it would answer the same
        total, kept = input_ids.shape[1] + max_new_tokens + ahead, self.config.nfe
        self.set_nfe(nfe)
        try:
            if suffix_ids is not None:
                gap = input_ids.new_zeros(len(input_ids), max_new_tokens)
                ids = torch.cat([input_ids, gap, suffix_ids], 1)                        # (B, T + n + S)
                unknown = torch.zeros_like(ids, dtype=torch.bool)
                unknown[:, input_ids.shape[1]:input_ids.shape[1] + max_new_tokens] = True
                return self._draw(ids, unknown, None, None, how, 0)
            cache, ids = DynamicCache(config=self.config), input_ids
            last = self._know(ids, cache)                                               # (B, 1, V)
            while ids.shape[1] < total:
                empty = ids.new_zeros(len(ids), min(block_size, total - ids.shape[1]))
                new = self._draw(empty, empty == 0, cache, last, how, ids.shape[1])     # (B, n)
                ids = torch.cat([ids, new], 1)
                if ids.shape[1] < total:
                    last = self._know(new, cache)
            return ids
        finally:
            self.set_nfe(kept)

    def _refuse(self, how, block_size, new, prompt, ahead):
        """Raise UserError for what `generate_blocks` cannot do."""
        if not self.net.generates:
            raise UserError("this bridge has never met an unknown token; train one with: python bridge.py --preset "
                            "blocks --layer N")
        for name, value in {"nfe": how["nfe"], "block_size": block_size, "max_new_tokens": new,
                            "the number of tokens in the prompt": prompt}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        for name in ("alpha", "beta", "temperature", "refinements"):
            if how[name] < 0:
                raise UserError(f"{name} must not be negative, as {how[name]} is")
        if not 0 <= how["back"] < 1 or not 0 < how["top_p"] <= 1:
            raise UserError("back must lie in [0, 1), and top_p in (0, 1]")
        if how["prior"] is None and how["beta"] > 0:
            raise UserError("a product of two experts holds the token prior twice: give prior=token_prior(shards, V), "
                            "or beta=0 to leave it in")
        if prompt + new + ahead > self.config.max_position_embeddings:
            raise UserError(f"prompt, new tokens and suffix are {prompt + new + ahead} tokens; they must fit the "
                            f"model's {self.config.max_position_embeddings} positions")
        if ahead and not self.net.settings["bidirectional"]:
            raise UserError("a suffix can only be seen by a bridge trained with --bidirectional")

    def _draw(self, ids, unknown, cache, last, how, key):
        """ids (B, T) with its `unknown` (B, T) tokens drawn. They follow the tokens in `cache`, whose next-token
        logits are `last` (B, 1, V)."""
        (B, T), past, device = ids.shape, cache.get_seq_length() if cache is not None else 0, ids.device
        positions = torch.arange(past, past + T, device=device)[None]                                  # (1, T)
        causal = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)                   # (T, K)
        wide = (causal | unknown[:, :, None])[:, None] if self.net.settings["bidirectional"] else causal

        def on_cache(function, *args, **more):
            out = function(*args, **more)
            backbone.trim(cache, past)                                                 # what is drawn leaves no trace
            return out

        def denoise(turn, **more):
            h0 = self.lm.embed(ids, positions)                                                         # (B, T, D)
            noise = torch.stack([normal(h0.shape[1:], device, how["seed"], "block", key, turn, b) for b in range(B)])
            return on_cache(self.states, h0, ids, how["nfe"], noise, positions, wide, cache, unknown=unknown,
                            watch=how["watch"], **more)
        # 1 draw the hidden states; the retained blocks foretell tokens from them
        z = denoise(0)
        h = self.net.hidden(z, positions).to(self.lm.model.dtype)
        if not unknown.all():                                       # before and after a gap h is known, as tokens are
            h = torch.where(unknown[..., None], h, on_cache(self._read, ids, positions, cache)[0])
        states = on_cache(self._upper, h, positions, cache)
        for turn in range(how["refinements"] + 1):
            # 2 decode them by both experts; token i is foretold at i-1
            upper = self.lm.head(states)                                                               # (B, T, V)
            upper = torch.cat([upper[:, :1] if last is None else last, upper[:, :-1]], 1)
            ids = torch.where(unknown, self._decode(z, upper, how, (key, turn)), ids)
            # 3 refine: the intact model reads what was drawn; its h[l] goes back up the path and down again
            if turn < how["refinements"]:
                h, states = on_cache(self._read, ids, positions, cache)
                z = denoise(turn + 1, z=self.net.standard_z(h, positions), done=how["done"])
        return ids

    def _upper(self, h, positions, cache):
        """h[l] (B, T, D), after the tokens in `cache` -> the retained blocks' last states (B, T, D), for the head."""
        return self.lm.through(h, self.config.layer, self.lm.L, self.lm.side(h, positions, None, cache))

    def _read(self, ids, positions, cache):
        """Tokens (B, T), after those in `cache` -> h[l] and the last states, (B, T, D) each, both exact."""
        h0 = self.lm.embed(ids, positions)
        h = self.lm.through(h0, 0, self.config.layer, self.lm.side(h0, positions, None, cache))
        return h, self._upper(h, positions, cache)

    def _know(self, ids, cache):
        """Known tokens (B, T) join the cache, as the bridge and as the intact model see them: logits (B, 1, V) of what
        follows."""
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]                   # (1, T)
        _, states = self._read(ids, positions, cache)     # first: the bridge's layers tell the cache's length
        self.hidden(ids, positions, None, cache)
        return self.lm.head(states[:, -1:])

    def _decode(self, z, upper, how, key):
        """Tokens (B, T) of z (B, T, D) and the retained blocks' logits for them (B, T, V). Draws are float64; the draw
        is keyed by row."""
        upper, read = (F.log_softmax(part.double(), -1) for part in (upper, self.net.readout(z)))
        logits = product(upper, read, how["alpha"], how["beta"], how["prior"])
        u = [generator(how["seed"], "decode", *key, b).random(z.shape[1]) for b in range(len(z))]
        u = torch.tensor(np.stack(u), device=z.device)
        return masked.choose(logits, how["temperature"], how["top_p"], u)

    def save_pretrained(self, folder, **_):
        """config.json and hybrid.safetensors (the bridge alone)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, folder / "hybrid.safetensors")
        config = {"architectures": ["HybridForCausalLM"], **self.config.to_dict()}
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    @classmethod
    def from_pretrained(cls, folder, *_, config=None, base_model=None, dtype=None, device="cpu", **__):
        """Rebuild from a saved hybrid; `base_model` is where the base is now, if it moved. Raises UserError when the
        base's weights are not the ones the bridge was trained under."""
        config = config or HybridConfig.from_pretrained(folder)
        pick(diffusion.SAMPLERS, config.sampler, f"{folder}: the sampler")
        try:
            net = denoiser.Bridge(**config.bridge)
            net.load_state_dict(load_file(Path(folder) / "hybrid.safetensors"))
        except Exception as error:
            raise UserError(f"{folder}/hybrid.safetensors could not be read ({why(error)}); save it again") from None
        return assemble(net, config, base_model or config.base_model, torch.device(device), backbone.as_dtype(dtype))


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
    config.vocab_size, config.hidden_size, config.base_model = lm.V, lm.D, base_model
    config.eos_token_id, config.bos_token_id = lm.config.eos_token_id, lm.config.bos_token_id
    config.max_position_embeddings = lm.config.max_position_embeddings
    return HybridForCausalLM(config, net.to(device), lm).to(device).eval()


def from_bridge(folder, model="", nfe=0, sampler="", shift=0.0, device="cpu", dtype=torch.float32):
    """HybridForCausalLM from a bridge folder; what is 0 or empty is the bridge's default. Raises UserError for a bridge
    of another base, or nfe < 1."""
    net, info = denoiser.load(folder, device)
    sampler = sampler or info.get("sampler", "euler")
    pick(diffusion.SAMPLERS, sampler, "--sampler")
    if shift < 0:
        raise UserError(f"--shift must be above 0, or 0 for the bridge's default, not {shift}")
    config = HybridConfig(base_model=model or info["model"], base=info["base"], layer=info["layer"],
                          nfe=nfe or info["nfe_default"], sampler=sampler, shift=shift or info.get("shift", 1.0),
                          bridge=net.settings, tokenizer=info["tokenizer"])
    return assemble(net, config, config.base_model, torch.device(device), dtype)
