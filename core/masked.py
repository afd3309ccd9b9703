"""A masked diffusion LM: who sees whom, how masks are filled, how likely a text is.

    student, tokenizer = load_converted("out/convert/w10", device, dtype)
    ids = fill(student, ids, is_mask, steps=32)          # most certain tokens first
    nats, error = likelihood(student, ids, calls=64)     # bound on -log p(ids), standard error

The same model through transformers:

    import core.masked                                   # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/convert/w10")
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)

repr_align.py trains such a model. It keeps the next-token shift of the AR model: the state at token
i predicts token i + 1. No state predicts the first token. So this token is always visible, and a
likelihood counts the other T - 1 tokens.

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
from core.common import UserError, generator
from core.run import read_json

MASK = "<|mask|>"       # for a tokenizer that has no mask token
LOGITS = 2 ** 27        # logits that `likelihood` computes at once


# -------------------------------------------------------------------------------------------------
# Who sees whom

@dataclass(frozen=True)
class Arm:
    """Who sees whom in a converted model: three flags of repr_align.py. In a comparison of
    conversions it is the arm."""
    attention: str = "bidirectional"    # or block: token block after token block
    block_size: int = 16                # tokens of a token block
    context: str = "noisy"              # before a token block: noisy (masked) or causal (clean)

    def __str__(self):
        if self.attention == "bidirectional":
            return "two-way"
        return f"token blocks of {self.block_size}, {self.context} context"

    def size(self, T):
        """Tokens of a token block. With bidirectional attention the whole text is one."""
        return T if self.attention == "bidirectional" else self.block_size

    def has_copy(self, as_written):
        """Whether a pass holds a clean copy of the text before the masked one. Each token block
        then sees the clean text before it, as it does when `fill` writes. `as_written` asks for
        that whatever the context of the training was."""
        return self.attention == "block" and (as_written or self.context == "causal")


TWO_WAY = Arm()


def one_copy_sees(arm, T):
    """(T, T) bool: whether the token of a row sees the token of a column. A token sees its token
    block and the text before. With a causal context it sees the text up to itself, as in the AR
    model."""
    place = torch.arange(T)
    if arm.context == "noisy":
        place = place // arm.block_size
    return place[:, None] >= place


def who_sees(arm, T, as_written):
    """(K, K) bool: the same for a whole pass, which may hold a clean copy. None: all see all."""
    if arm.attention == "bidirectional":
        return None
    clean = one_copy_sees(arm, T)
    if not arm.has_copy(as_written):
        return clean
    block = torch.arange(T) // arm.block_size
    # A masked token sees the clean text before its token block, and its block in the masked copy
    before = block[:, None] > block
    same = block[:, None] == block
    upper = torch.cat([clean, torch.zeros_like(clean)], 1)
    lower = torch.cat([before, same], 1)
    return torch.cat([upper, lower])


def predictors(arm, T, as_written):
    """(T-1,): which of the K states predicts tokens 1, ..., T-1. The state before the token does.
    With a clean copy, a state of the copy predicts the first token of a token block."""
    i = torch.arange(1, T)
    if not arm.has_copy(as_written):
        return i - 1
    return torch.where(i % arm.block_size == 0, i - 1, T + i - 1)


# -------------------------------------------------------------------------------------------------
# The model

class Student(nn.Module):
    """A Backbone with the attention of `arm`. `shift` is added to the embedding of the mask. It
    learns while all embeddings are frozen, and `fold` writes it into the mask's row."""

    def __init__(self, lm, mask_id, arm=TWO_WAY):
        super().__init__()
        backbone.check_wide(lm)
        self.lm = lm
        self.mask_id = mask_id
        self.arm = arm
        self.shift = nn.Parameter(torch.zeros(lm.D, device=lm.model.device))

    def run(self, ids, is_mask, positions, see=None, cache=None):
        """Yield h[0], ..., h[L-1] and the normed h[L], each (B, K, D). `see` (K, keys) says who
        sees whom. None: every token sees every other one."""
        shift = is_mask[..., None] * self.shift
        h = self.lm.embed(ids.masked_fill(is_mask, self.mask_id), positions, shift)
        if see is not None:
            see = see[None, None].to(ids.device)
        side = self.lm.side(h, positions, cache=cache, causal=False, see=see)
        return self.lm.trace(h, side)

    def states(self, ids, is_mask, as_written=False):
        """`run` on whole texts ids (B, T) with masks where is_mask (B, T)."""
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)[None]
        if self.arm.has_copy(as_written):
            ids = torch.cat([ids, ids], 1)
            is_mask = torch.cat([torch.zeros_like(is_mask), is_mask], 1)
            positions = positions.repeat(1, 2)
        return self.run(ids, is_mask, positions, who_sees(self.arm, T, as_written))

    def predict(self, ids, is_mask):
        """Normed states (B, T-1, D) that predict tokens 1..T-1. Token blocks see the clean text
        before them."""
        *_, normed = self.states(ids, is_mask, as_written=True)
        return normed[:, predictors(self.arm, ids.shape[1], as_written=True)]

    def extend(self, cache, ids, is_mask, see=None):
        """Normed states (B, S, D) of tokens that follow those in the cache, and join them."""
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
        table.weight[self.mask_id] += self.shift / scale
        self.shift.zero_()


@torch.no_grad()
def add_mask(lm, tokenizer):
    """The id of the mask token. A tokenizer without one gets a new token. The row of the mask
    starts as the mean of all rows: a spare row was never trained."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    mask_id = tokenizer.mask_token_id
    mean = lm.model.get_input_embeddings().weight.mean(0)
    if mask_id >= lm.V:
        with backbone.quiet():
            lm.model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
        lm.model.get_output_embeddings().weight[lm.V:] = 0  # the library fills in random numbers
        lm.V = lm.config.vocab_size
    lm.model.get_input_embeddings().weight[mask_id] = mean
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
    0, like top_p 0, takes the most likely token. The distribution function is inverted in float64:
    one joint float32 Gumbel sample over {tokens, mask} reveals too few (arXiv 2409.02908)."""
    assert temperature >= 0, "the temperature must not be negative"
    if temperature == 0 or top_p <= 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        high, token = p.sort(-1, descending=True)
        before = high.cumsum(-1) - high
        high = high.masked_fill(before >= top_p, 0)         # keeps the smallest set with top_p
        high = high / high.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, token, high)
    token = torch.searchsorted(p.cumsum(-1), u[..., None])[..., 0]
    return token.clamp_max(p.shape[-1] - 1)


def random_order(logits, token, u):
    return u


def confidence(logits, token, u):
    """Probability of the sampled token at temperature 1."""
    p = torch.softmax(logits, -1)
    return p.gather(-1, token[..., None])[..., 0]


def negative_entropy(logits, token, u):
    p = torch.softmax(logits, -1)
    return -torch.special.entr(p).sum(-1)


# Scores of the masks: logits (n, V), sampled token (n,) and uniform u (n,) -> (n,). The mask with
# the largest score is replaced first. A new order is a function and an entry here.
ORDERS = {"random": random_order, "confidence": confidence, "entropy": negative_entropy}


def most_certain(score, is_mask, count):
    """(B, S) bool: the `count` (B, 1) masks of each row with the largest score (n,)."""
    scores = score.new_full(is_mask.shape, -torch.inf).masked_scatter(is_mask, score)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    return is_mask & (rank < count)


def within(entropy, is_mask, bound):
    """(B, S) bool: the masks of each row to replace together (Ben-Hamu et al. 2025, arXiv
    2505.24857). They are the surest ones; their entropies (n,), without the largest, add up to at
    most `bound` nats. That bounds how much they can depend on each other. The surest mask always
    counts."""
    values = entropy.new_full(is_mask.shape, torch.inf).masked_scatter(is_mask, entropy)
    value, place = values.sort(dim=1, stable=True)
    before = value.cumsum(1) - value
    return is_mask & torch.zeros_like(is_mask).scatter(1, place, before <= bound)


@dataclass(frozen=True)
class Sampling:
    """How masks are filled."""
    temperature: float = 0.8
    seed: int = 0
    order: str = "confidence"   # in ORDERS: which masks come first
    top_p: float = 1.0
    bound: float = 0.0          # nats: replace masks `within` it, in the calls that this takes


def fill(model, ids, is_mask, steps, **sampling):
    """Fill the masks of ids (B, T) in `steps` network calls. The first token must be visible.

    A model with attention by token blocks fills one after the other. Every token block gets its
    share of the calls, at least one, and one more call puts each finished block into the cache.
    Finished tokens cannot attend to later ones."""
    history = list(fill_steps(model, ids, is_mask, steps, Sampling(**sampling)))
    return history[-1][0]


@torch.no_grad()
def fill_steps(model, ids, is_mask, steps, sampling):
    """Yield (ids, is_mask) after every network call of `fill`."""
    assert sampling.bound >= 0, "the bound of the entropy must not be negative"
    assert not is_mask[:, 0].any(), "the first token must be visible: no state predicts it"
    T = ids.shape[1]
    ids = ids.clone()
    is_mask = is_mask.clone()
    by_blocks = model.arm.attention == "block"
    size = model.arm.size(T)
    to_fill = is_mask.any(0).cpu()                                              # (T,)
    if by_blocks and not to_fill[-1]:
        raise UserError("a token block sees nothing after it: leave --suffix out")
    cache = DynamicCache()
    first = int(to_fill.nonzero()[0])
    done = 0                                                                    # calls
    for number, lo in enumerate(range(first - first % size, T, size)):
        hi = min(lo + size, T)
        until = steps * int(to_fill[:hi].sum()) // int(to_fill.sum())
        calls = size if sampling.bound else max(1, until - done)
        done = until
        # 1. Finished tokens join the cache. The state at the last one predicts the next token
        if lo > 0:
            known = cache.get_seq_length()
            see = one_copy_sees(model.arm, lo)[known:]
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
            u = [generator(sampling.seed, "fill", number, step, row).random((2, hi - lo))
                 for row in range(len(ids))]
            u = torch.from_numpy(np.stack(u, 1))                                # (2, B, S)
            u = u.to(ids.device)[:, hidden]                                     # (2, n)
            token = choose(logits, sampling.temperature, sampling.top_p, u[0])
            sampled = ids[:, lo:hi].masked_scatter(hidden, token)
            # 4. Reveal the most certain ones. The last call reveals the last masks
            if sampling.bound:
                revealed = within(-negative_entropy(logits, token, u[1]), hidden, sampling.bound)
            else:
                score = ORDERS[sampling.order](logits, token, u[1])             # (n,)
                count = -(-hidden.sum(1, keepdim=True) // (calls - step))       # rounded up
                revealed = most_certain(score, hidden, count)
            ids[:, lo:hi] = torch.where(revealed, sampled, ids[:, lo:hi])
            is_mask[:, lo:hi] = hidden & ~revealed
            yield ids.clone(), is_mask.clone()


# -------------------------------------------------------------------------------------------------
# Likelihood

def mask_counts(sizes, calls, seed, key):
    """Numbers of masked tokens (calls, token blocks), uniform on 1..N for every N in `sizes`. They
    are stratified: two calls lie in each of calls/2 equal slices of 1..N, so that a pair tells the
    spread inside its slice."""
    pairs = calls // 2
    u = generator(seed, "count", key).random((len(sizes), pairs, 2))
    place = (np.arange(pairs)[:, None] + u) / pairs                             # (., pairs, 2)
    sizes = np.reshape(sizes, (-1, 1, 1))
    counts = (place * sizes).astype(int) + 1
    return counts.reshape(-1, calls).T


@torch.no_grad()
def likelihood(model, ids, calls=64, seed=0, given=1, key=0):
    """(bound, standard error) in nats of -log p(ids[given:] | ids[:given]) for one text ids (T,).

    Sum over token blocks of -log p(block | text before) <= E_k [N/k * CE of k masked tokens], k
    uniform on 1..N and the k tokens a uniform subset: the exact mask-count form of the masked
    diffusion ELBO (Ou et al. 2024; Nie et al. 2025, equation 6). `calls` is even and at least 4."""
    assert calls >= 4 and calls % 2 == 0, "calls must be an even number, at least 4"
    T = len(ids)
    size = model.arm.size(T)
    starts = range(given - given % size, T, size)
    blocks = [range(max(lo, given), min(lo + size, T)) for lo in starts]
    counts = mask_counts([len(block) for block in blocks], calls, seed, key)
    weight = torch.zeros(calls, T, dtype=torch.float64, device=ids.device)     # N/k where masked
    for call in range(calls):
        subset = generator(seed, "subset", key, call)
        for block, k in zip(blocks, counts[call], strict=True):
            weight[call, subset.permutation(block)[:k]] = len(block) / k
    rows = max(1, min(16, LOGITS // (T * model.lm.V)))
    sums = [masked_ce(model, ids, part) for part in weight.split(rows)]
    pairs = torch.cat(sums).view(-1, 2)                                         # (calls / 2, 2)
    error = pairs.diff().norm() / 2 / len(pairs)
    return pairs.mean().item(), error.item()


def masked_ce(model, ids, weight):
    """ids (T,) and weight (n, T) -> weighted sums (n,) of CE in nats, float64. Tokens with a weight
    are masked."""
    rows = ids.expand(len(weight), -1)
    logits = model.logits(model.predict(rows, weight > 0))                      # (n, T-1, V)
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(-1, rows[:, 1:, None])[..., 0]                           # (n, T-1)
    weight = weight[:, 1:]
    return (ce.double() * weight).masked_fill(weight == 0, 0).sum(1).cpu()  # CE can be infinite


def text_likelihood(model, windows, calls, seed=0):
    """(nats, standard error) summed over windows (., T); the first token of each is given. The
    error is that of the estimate for these windows, not that of other text."""
    bounds = [likelihood(model, ids, calls, seed, key=i) for i, ids in enumerate(windows)]
    nats, errors = zip(*bounds)
    return sum(nats), math.hypot(*errors)


# -------------------------------------------------------------------------------------------------
# As a model of transformers

class ConvertedConfig(PretrainedConfig):
    """The AR model's config under another name, so that transformers does not load an AR model."""
    model_type = backbone.TWIN


class ConvertedForCausalLM(PreTrainedModel):
    """A Student that transformers can load. repr_align.py writes its folder."""
    config_class = ConvertedConfig

    def __init__(self, config, student):
        super().__init__(config)
        self.student = student

    @classmethod
    def from_pretrained(cls, folder, config=None, dtype=None, device="cpu", revision=None,
                        trust_remote_code=None, adapter_kwargs=None):
        """AutoModelForCausalLM passes the config and the last three. No other argument is taken."""
        config = config or ConvertedConfig.from_pretrained(folder)
        assert config._attn_implementation is None, "attn_implementation is not taken"
        dtype = backbone.as_dtype(dtype)
        student, _ = load_converted(folder, torch.device(device), dtype)
        return cls(config, student).eval()

    def save_pretrained(self, *_, **__):
        raise NotImplementedError("copy the folder that repr_align.py wrote")

    def forward(self, input_ids, attention_mask=None, labels=None):
        """Logits (B, T-1, V) of whole texts. Those at i predict token i + 1. Padding is refused."""
        assert attention_mask is None or attention_mask.all(), "texts must have one length"
        if labels is not None:
            raise TypeError("labels: a masked model has no next-token loss")
        normed = self.student.predict(input_ids, input_ids == self.student.mask_id)
        return CausalLMOutput(logits=self.student.logits(normed))

    def generate(self, input_ids, attention_mask=None, max_new_tokens=0, max_length=0, steps=0,
                 **sampling):
        """Continue prompts (B, P) of one length in `steps` network calls (0: one a new token), by
        max_new_tokens, or up to max_length, or by 64 tokens. sampling: temperature, seed, order and
        top_p of `fill`, which refuses any other argument by name."""
        assert attention_mask is None or attention_mask.all(), "prompts must have one length"
        P = input_ids.shape[1]
        new = max_new_tokens or 64
        if max_length and not max_new_tokens:
            new = max_length - P
        positions = self.student.lm.config.max_position_embeddings
        assert 0 < new <= positions - P, f"{P} + {new} tokens do not fit {positions} positions"
        mask_id = self.student.mask_id
        ids = F.pad(input_ids, (0, new), value=mask_id)
        return fill(self.student, ids, ids == mask_id, steps or new, **sampling)


AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM)
