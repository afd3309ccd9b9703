"""A masked diffusion LM: who sees whom, how masks are filled, how likely a text is.

    student, tokenizer = load_converted("out/convert/w10", device, dtype)
    ids = fill(student, ids, is_mask, steps=32)          # most certain tokens first
    nats, error = likelihood(student, ids, calls=64)     # bound on -log p(ids), standard error

The same model through transformers:

    import core.masked                                   # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/convert/w10")
    ids = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=64)

repr_align.py trains such a model. It keeps the next-token shift of the AR model: the state at token
i predicts token i + 1. No state predicts the first token, so it is always visible, and a likelihood
is that of the other T - 1.

Shapes: B batch, T tokens, K states of a pass (T, or 2T with a clean copy), D width, V vocabulary,
S tokens of a token block, N of them that can be masked, n masked tokens of a batch.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig,
                          PreTrainedModel)
from transformers.modeling_outputs import CausalLMOutput

from core import backbone
from core.common import UserError, generator, pick
from core.run import read_json

MASK = "<|mask|>"       # for a tokenizer that has no mask token
LOGITS = 2 ** 27        # logits that `likelihood` computes at once


# -------------------------------------------------------------------------------------------------
# Who sees whom

@dataclass(frozen=True)
class Arm:
    """What a model is converted to: flags of repr_align.py."""
    attention: str = "bidirectional"    # or block: token block after token block
    block_size: int = 16                # tokens of a token block
    context: str = "noisy"              # before a token block: noisy (masked) or causal (clean)

    def __str__(self):
        if self.attention == "bidirectional":
            return "two-way"
        return f"token blocks of {self.block_size}, {self.context} context"

    def size(self, T):
        """Tokens of a token block. A bidirectional text is one."""
        return T if self.attention == "bidirectional" else self.block_size

    def has_copy(self, known):
        """Whether a clean copy of the text precedes the masked one in a pass. Each token block then
        sees the clean text before it, as when it is written. `known` asks for that."""
        return self.attention == "block" and (known or self.context == "causal")


TWO_WAY = Arm()


def one_copy_sees(arm, T):
    """(T, T) bool: whether the token of a row sees that of a column. It sees its token block and
    the text before that; with a causal context only the text up to itself, as in the AR model."""
    place = torch.arange(T)
    if arm.context == "noisy":
        place = place // arm.block_size
    return place[:, None] >= place


def who_sees(arm, T, known):
    """(K, K) bool: the same for a pass over token blocks, with its clean copy if there is one."""
    clean = one_copy_sees(arm, T)
    if not arm.has_copy(known):
        return clean
    block = torch.arange(T) // arm.block_size
    before = block[:, None] > block                     # a masked token sees clean text before
    same = block[:, None] == block                      # its token block, then the block itself
    nothing = torch.zeros_like(clean)
    return torch.cat([torch.cat([clean, nothing], 1), torch.cat([before, same], 1)])


def predictors(arm, T, known):
    """(T-1,): which of the K states predicts tokens 1, ..., T-1. It is the state before the token;
    for the first token of a token block that is a state of the clean copy, where there is one."""
    i = torch.arange(1, T)
    if not arm.has_copy(known):
        return i - 1
    return torch.where(i % arm.block_size == 0, i - 1, T + i - 1)


# -------------------------------------------------------------------------------------------------
# The model

class Student(nn.Module):
    """A Backbone that attends as its `arm` says. `shift` is added to the embedding of the mask: it
    can learn while all other embeddings are frozen. `fold` writes it into the mask's row."""

    def __init__(self, lm, mask_id, arm=TWO_WAY):
        super().__init__()
        backbone.check_wide(lm)
        self.lm = lm
        self.mask_id = mask_id
        self.arm = arm
        self.shift = nn.Parameter(torch.zeros(lm.D, device=lm.model.device))

    def embed(self, ids, is_mask, positions=None):
        shift = is_mask[..., None] * self.shift
        return self.lm.embed(ids.masked_fill(is_mask, self.mask_id), positions, shift)

    def run(self, ids, is_mask, positions, see=None, cache=None):
        """Yield h[0], ..., h[L-1] and the normed h[L], each (B, K, D). They are never stacked.
        `see` (K, keys) says who sees whom; None: every token sees every other one."""
        h = self.embed(ids, is_mask, positions)
        yield h
        if see is not None:
            see = see[None, None].to(ids.device)
        side = self.lm.side(h, positions, cache=cache, causal=False, see=see)
        for i in range(self.lm.L - 1):
            h = self.lm.block(h, i, side)
            yield h
        h = self.lm.block(h, self.lm.L - 1, side)
        yield self.lm.norm(h)

    def states(self, ids, is_mask, known=False):
        """`run` on whole texts ids (B, T) with masks where is_mask (B, T)."""
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)[None]
        if self.arm.attention == "bidirectional":
            return self.run(ids, is_mask, positions)
        if self.arm.has_copy(known):
            ids = torch.cat([ids, ids], 1)
            is_mask = torch.cat([torch.zeros_like(is_mask), is_mask], 1)
            positions = positions.repeat(1, 2)
        return self.run(ids, is_mask, positions, who_sees(self.arm, T, known))

    def predict(self, ids, is_mask):
        """Normed states (B, T-1, D) that predict tokens 1..T-1. Token blocks see clean text."""
        *_, normed = self.states(ids, is_mask, known=True)
        return normed[:, predictors(self.arm, ids.shape[1], known=True)]

    def extend(self, cache, ids, is_mask, see=None):
        """Normed states (B, S, D) of the tokens that follow those in the cache. They join it."""
        known = cache.get_seq_length()
        positions = torch.arange(known, known + ids.shape[1], device=ids.device)[None]
        *_, normed = self.run(ids, is_mask, positions, see, cache)
        return normed

    def logits(self, normed):
        """Normed h[L] (..., D) -> logits (..., V). The mask itself is never predicted."""
        logits = self.lm.unnormed_head(normed).float()
        logits[..., self.mask_id] = -torch.inf
        return logits

    @torch.no_grad()
    def fold(self):
        table = self.lm.model.get_input_embeddings()
        scale = getattr(table, "embed_scale", 1.0)          # Gemma scales what the table gives
        table.weight[self.mask_id] += (self.shift / scale).to(table.weight.dtype)
        self.shift.zero_()


@torch.no_grad()
def add_mask(lm, tokenizer):
    """The id of the mask token: the tokenizer's own, or a new one. A new row of the embedding, or a
    spare one that was never trained, starts as the mean of the others."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    mask_id = tokenizer.mask_token_id
    mean = lm.model.get_input_embeddings().weight.mean(0)
    if mask_id >= lm.V:
        with backbone.quiet():
            lm.model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
        for table in (lm.model.get_input_embeddings(), lm.model.get_output_embeddings()):
            table.weight[lm.V:] = 0                         # the library fills in random numbers
        lm.V = lm.config.vocab_size
    rows = lm.model.get_input_embeddings().weight
    norms = rows.norm(dim=1)
    if norms[mask_id] < norms.median() / 10:                # a norm layer would blow it up
        rows[mask_id] = mean
    return mask_id


def load_converted(folder, device, dtype):
    """(Student, tokenizer) of a folder that repr_align.py wrote."""
    result = read_json(Path(folder) / "result.json", "convert a model with: python repr_align.py")
    if "mask_id" not in result:
        raise UserError(f"{folder} is no converted model; make one with: python repr_align.py")
    arm = Arm(result["attention"], result["block_size"], result["context"])
    lm = backbone.load(folder, device, dtype)
    return Student(lm, result["mask_id"], arm), backbone.load_tokenizer(folder)


# -------------------------------------------------------------------------------------------------
# Filling masks

def choose(logits, temperature, top_p, u):
    """Sample tokens (...) from float64 logits (..., V), with u (...) uniform in [0, 1). Temperature
    0 takes the best one. The distribution function is inverted in float64: one joint float32 Gumbel
    sample over {tokens, mask} would reveal too few tokens (arXiv 2409.02908)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        high, token = p.sort(-1, descending=True)
        before = high.cumsum(-1) - high
        high = high.masked_fill(before >= top_p, 0)         # the smallest set that holds top_p
        high = high / high.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, token, high)
    token = torch.searchsorted(p.cumsum(-1), u[..., None])[..., 0]
    return token.clamp_max(p.shape[-1] - 1)


def random_order(logits, token, u):
    return u


def confidence(logits, token, u):
    """Probability of the sampled token at temperature 1."""
    return torch.softmax(logits, -1).gather(-1, token[..., None])[..., 0]


def negative_entropy(logits, token, u):
    return -torch.special.entr(torch.softmax(logits, -1)).sum(-1)


# How soon a mask is replaced, the largest first: its logits (n, V), the token sampled for it (n,)
# and uniform u (n,) -> (n,). To add an order: a function and an entry here.
ORDERS = {"random": random_order, "confidence": confidence, "entropy": negative_entropy}


def most_certain(score, is_mask, count):
    """(B, S) bool: the `count` (B, 1) masks of each row with the largest score (n,)."""
    scores = score.new_full(is_mask.shape, -torch.inf).masked_scatter(is_mask, score)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    return is_mask & (rank < count)


@torch.no_grad()
def fill(model, ids, is_mask, steps, temperature=0.8, seed=0, order="confidence", top_p=1.0,
         block_size=0, watch=None):
    """Fill the masks of ids (B, T) in `steps` network calls. The first token must be visible.

    A model of token blocks fills one after the other and gives each its share of the calls. With
    `block_size` a two-way model does so too. Finished tokens are cached and cannot attend to later
    ones. `watch(ids, is_mask)` is called after every call."""
    T = ids.shape[1]
    ids = ids.clone()
    is_mask = is_mask.clone()
    by_blocks = model.arm.attention == "block"
    size = model.arm.block_size if by_blocks else block_size or T
    to_fill = is_mask.any(0).cpu()                                              # (T,)
    if size < T and not to_fill[-1]:
        raise UserError("a token block sees nothing after it: leave --suffix or --block_size out")
    cache = DynamicCache()
    first = int(to_fill.nonzero()[0])
    done = 0                                                                    # calls
    for number, lo in enumerate(range(first - first % size, T, size)):
        hi = min(lo + size, T)
        until = steps * int(to_fill[:hi].sum()) // int(to_fill.sum())
        calls = max(1, until - done)
        done = until
        # 1. Finished tokens join the cache. The state at the last one predicts the next token
        if lo > 0:
            known = cache.get_seq_length()
            see = one_copy_sees(model.arm, lo)[known:] if by_blocks else None
            before = model.extend(cache, ids[:, known:lo], is_mask[:, known:lo], see)[:, -1]
        see = torch.ones(hi - lo, hi, dtype=torch.bool) if by_blocks else None
        for step in range(calls):
            hidden = is_mask[:, lo:hi]                                          # (B, S)
            if not hidden.any():
                break
            # 2. Logits of the n masks, each from the state before it
            normed = model.extend(cache, ids[:, lo:hi], hidden, see).roll(1, 1)     # (B, S, D)
            backbone.trim(cache, lo)
            if lo > 0:
                normed[:, 0] = before
            logits = model.logits(normed[hidden]).double()                      # (n, V)
            # 3. Sample a token for every mask
            keys = [(number, step, row) for row in range(len(ids))]
            u = [generator(seed, "fill", *key).random((2, hi - lo)) for key in keys]
            u = torch.from_numpy(np.stack(u, 1)).to(ids.device)                 # (2, B, S)
            u = u[:, hidden]                                                    # (2, n)
            token = choose(logits, temperature, top_p, u[0])
            sampled = ids[:, lo:hi].masked_scatter(hidden, token)
            # 4. Reveal the most certain ones, as many as it takes to be done at the last call
            score = pick(ORDERS, order, "--order")(logits, token, u[1])
            count = -(-hidden.sum(1, keepdim=True) // (calls - step))           # rounded up
            revealed = most_certain(score, hidden, count)
            ids[:, lo:hi] = torch.where(revealed, sampled, ids[:, lo:hi])
            is_mask[:, lo:hi] = hidden & ~revealed
            if watch:
                watch(ids.clone(), is_mask.clone())
    return ids


# -------------------------------------------------------------------------------------------------
# Likelihood

def mask_counts(sizes, calls, seed, *key):
    """Numbers of masked tokens (calls, token blocks), uniform on 1..N for every N in `sizes`. Two
    calls lie in each of calls/2 equal slices of 1..N: a pair tells the spread inside its slice."""
    pairs = calls // 2
    u = generator(seed, "count", *key).random((len(sizes), pairs, 2))
    place = (np.arange(pairs)[:, None] + u) / pairs                             # (., pairs, 2)
    counts = np.floor(place * np.reshape(sizes, (-1, 1, 1))).astype(int) + 1
    return counts.reshape(len(sizes), calls).T


@torch.no_grad()
def likelihood(model, ids, calls=64, seed=0, given=1, key=0):
    """(bound, standard error) in nats of -log p(ids[given:] | ids[:given]) for one text ids (T,).

    Sum over token blocks of -log p(block | text before) <= E_k [N/k * CE of k masked tokens], k
    uniform on 1..N and the k tokens a uniform subset: the exact mask-count form of the masked
    diffusion ELBO (Ou et al. 2024; Nie et al. 2025, equation 6). `calls` is even and at least 4."""
    T = len(ids)
    size = model.arm.size(T)
    starts = range(given - given % size, T, size)
    blocks = [range(max(lo, given), min(lo + size, T)) for lo in starts]
    counts = mask_counts([len(block) for block in blocks], calls, seed, key)
    weight = torch.zeros(calls, T, dtype=torch.float64, device=ids.device)     # N/k where masked
    for call in range(calls):
        subset = generator(seed, "subset", key, call)
        for block, k in zip(blocks, counts[call], strict=True):
            places = subset.permutation(len(block))[:k]
            weight[call, block.start + torch.from_numpy(places)] = len(block) / k
    rows = max(1, min(16, LOGITS // (T * model.lm.V)))
    sums = [masked_ce(model, ids, part) for part in weight.split(rows)]
    pairs = torch.cat(sums).view(-1, 2)                                         # (calls / 2, 2)
    spread = pairs[:, 0] - pairs[:, 1]
    error = spread.square().sum().sqrt() / 2 / len(pairs)
    return pairs.mean().item(), error.item()


def masked_ce(model, ids, weight):
    """Weighted sum of CE (nats, float64) over the tokens with a weight, which are masked: ids (T,)
    and weight (n, T) -> (n,)."""
    rows = ids.expand(len(weight), -1)
    logits = model.logits(model.predict(rows, weight > 0))                      # (n, T-1, V)
    targets = rows[:, 1:]
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    ce = ce.view_as(targets).double()
    return (ce * weight[:, 1:]).sum(1).cpu()


def text_likelihood(model, windows, calls, seed=0):
    """(nats, standard error) summed over windows (., T); the first token of each is given."""
    bounds = [likelihood(model, ids, calls, seed, key=i) for i, ids in enumerate(windows)]
    nats, errors = zip(*bounds)
    return sum(nats), math.hypot(*errors)


# -------------------------------------------------------------------------------------------------
# As a model of transformers

class ConvertedConfig(PretrainedConfig):
    """The AR model's config under another name: transformers must not take it for an AR model."""
    model_type = backbone.TWIN


class ConvertedForCausalLM(PreTrainedModel):
    """A Student that transformers can load. repr_align.py saves it; to copy it, copy its folder."""
    config_class = ConvertedConfig

    def __init__(self, config, student):
        super().__init__(config)
        self.student = student
        self.mask_id = student.mask_id

    @classmethod
    def from_pretrained(cls, folder, config=None, dtype=None, device="cpu", revision=None,
                        trust_remote_code=None, adapter_kwargs=None):
        """AutoModelForCausalLM passes the last three. Others of the library are refused."""
        dtype = backbone.as_dtype(dtype)
        student, _ = load_converted(folder, torch.device(device), dtype)
        return cls(config or ConvertedConfig.from_pretrained(folder), student).eval()

    def forward(self, input_ids, labels=None, **_):
        """Logits (B, T-1, V), those at i of token i + 1. The loss is the mean CE of labels (B, T)
        that are not -100."""
        normed = self.student.predict(input_ids, input_ids == self.mask_id)
        logits = self.student.logits(normed)
        loss = None if labels is None else F.cross_entropy(logits.mT, labels[:, 1:])
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(self, input_ids, attention_mask=None, max_new_tokens=64, steps=0, **sampling):
        """Prompts (B, P), padded on the left, and new tokens after them: as many as asked for, in
        `steps` network calls (0: one a token). sampling: temperature, seed, order, top_p."""
        text = F.pad(input_ids, (0, max_new_tokens), value=self.mask_id)
        padding = torch.zeros_like(input_ids) if attention_mask is None else 1 - attention_mask
        starts = padding.sum(1)                                                 # (B,)
        for start in starts.unique():                                           # no padding is seen
            rows = starts == start
            ids = text[rows, start:]
            text[rows, start:] = fill(self.student, ids, ids == self.mask_id,
                                      steps or max_new_tokens, **sampling)
        return text


AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM)
