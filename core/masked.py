"""masked.py: a masked diffusion LM: how to fill masks, and how likely it finds a text. repr_align.py trains one.

    model, tokenizer = load_converted("out/repr_align/w10", device, dtype)
    ids = fill(model, ids, is_mask, steps=32, order="confidence")      # ORDERS has the orders
    nats, error = likelihood(model, ids, calls=64)                     # a bound on -log p(ids), its standard error

The first token is always visible: with the next-token shift of the AR model it came from, no state predicts it. So
likelihoods run over the other T-1. A block model (conversion.Arm) writes block after block, what is finished cached.

Letters: B batch, T tokens, D hidden width, V vocabulary, N tokens of a block that can be masked, k of them masked.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from core import backbone
from core.common import UserError, pick
from core.conversion import BIDIRECTIONAL, Arm, predictors, who_sees, who_sees_cached
from core.draws import generator
from core.measure import LOGITS
from core.run import read_json

MASK = "<|mask|>"  # of a tokenizer that has no mask token of its own


class Student(nn.Module):
    """A Backbone run as its `arm` says, whose mask token may be learned while every other embedding stays frozen:
    `shift` is added to the mask row's embedding, and folded into it when the model is saved."""

    def __init__(self, lm, mask_id, arm=BIDIRECTIONAL):
        super().__init__()
        (backbone.check_copies if arm.attention == "block" else backbone.check_wide)(lm)
        self.lm, self.mask_id, self.arm = lm, mask_id, arm
        self.shift = nn.Parameter(torch.zeros(lm.D, device=lm.model.device))

    def embed(self, ids, is_mask, positions=None):
        return self.lm.embed(ids.masked_fill(is_mask, self.mask_id), positions, is_mask[..., None] * self.shift)

    def states(self, ids, is_mask, cache=None, see=None, judging=False, positions=None):
        """Yields h[0], ..., h[L-1] and the normed h[L], each (B, K, D), one at a time: never stacked. With a `cache`
        the tokens follow those in it, which cannot see them; `see` (T, K) then says who sees whom (None: all), and
        `positions` (1, T) where they stand (None: one after the other)."""
        T, past = ids.shape[1], cache.get_seq_length() if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)[None]          # (1, T)
        if cache is None and self.arm.attention == "block":
            see = who_sees(T, *self.arm.plan(T, judging))                              # (K, K)
            if len(see) == 2 * T:
                ids, is_mask = torch.cat([ids, ids], 1), torch.cat([torch.zeros_like(is_mask), is_mask], 1)
                positions = positions.repeat(1, 2)
        yield (h := self.embed(ids, is_mask, positions))
        see = see if see is None else see[None, None].to(ids.device)                   # (1, 1, K, K)
        side = self.lm.side(h, positions, cache=cache, causal=False, see=see)
        for i in range(self.lm.L):
            h = self.lm.block(h, i, side)
            yield h if i < self.lm.L - 1 else self.lm.norm(h)

    def foretell(self, ids, is_mask):
        """Normed states (B, T-1, D) that predict tokens 1..T-1 of ids (B, T); what lies before a block is known."""
        *_, normed = self.states(ids, is_mask, judging=True)
        T = ids.shape[1]
        return normed[:, predictors(T, *self.arm.plan(T, judging=True), self.arm.shift)]

    def logits(self, normed):
        """Normed h[L] (..., D) -> logits (..., V); the mask token itself is never predicted."""
        out = self.lm.unnormed_head(normed).float()
        return out.index_fill(-1, torch.tensor([self.mask_id], device=out.device), -torch.inf)

    def fold(self):
        """Write the learned shift into the mask row (divided by Gemma's embedding scale, where there is one)."""
        embedding = self.lm.model.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        with torch.no_grad():
            embedding.weight[self.mask_id] += (self.shift / scale).to(embedding.weight.dtype)
            self.shift.zero_()


def add_mask(lm, tokenizer):
    """The id of the mask token: the tokenizer's own, else a new one. Its embedding is a spare row of the table, else
    a new row that starts as the mean of the others (the library would draw it at random: two arms would differ)."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.mask_token_id >= lm.V:
        with backbone.quiet(), torch.no_grad():
            lm.model.resize_token_embeddings(tokenizer.mask_token_id + 1, mean_resizing=False)
            for part in (lm.model.get_input_embeddings(), lm.model.get_output_embeddings()):
                part.weight[lm.V:] = part.weight[:lm.V].mean(0)
        lm.V = lm.config.vocab_size
    return tokenizer.mask_token_id


def load_converted(folder, device, dtype, attention=""):
    """(Student, tokenizer) of a folder that repr_align.py wrote; refuses an AR model, and one that does not attend by
    `attention` where that is all the caller can use."""
    if "mask_id" not in read_json(Path(folder) / "result.json", "convert a model with: python repr_align.py"):
        raise UserError(f"{folder} is no converted model; make one with: python repr_align.py")
    flags = read_json(Path(folder) / "config.json")["dihal"]["config"]
    arm = Arm(**{name: flags[name] for name in Arm._fields if name in flags})          # an older folder: as ever
    if attention not in ("", arm.attention):
        raise UserError(f"{folder} was converted to {arm}, but {attention} attention is needed here; make such a model "
                        f"with: python repr_align.py --attention {attention}")
    tokenizer = backbone.load_tokenizer(folder)
    return Student(backbone.load(folder, device, dtype), tokenizer.mask_token_id, arm), tokenizer


# ------------------------------------------------------------------------------------------------------- samplers
def choose(logits, temperature, top_p, u):
    """Tokens (...) from float64 logits (..., V), at u (...) uniform in [0, 1); argmax at temperature 0.

    Inverting the distribution function draws the token; which position is revealed is decided elsewhere. One joint draw
    over {tokens, mask} by float32 Gumbel noise is biased towards too few reveals (arXiv 2409.02908)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        high, order = p.sort(-1, descending=True)
        high = high.masked_fill(high.cumsum(-1) - high >= top_p, 0)                    # the smallest set holding top_p
        p = torch.zeros_like(p).scatter(-1, order, high / high.sum(-1, keepdim=True))
    return torch.searchsorted(p.cumsum(-1), u[..., None]).clamp_max(p.shape[-1] - 1)[..., 0]


# How soon a position is revealed, the highest first: (n,) from its logits (n, V), the token drawn there (n,) and u (n,)
# uniform in [0, 1), the n positions in reading order. From the model's own law, whatever temperature the draw had.
def confidence(logits, token, u):
    return torch.softmax(logits, -1).gather(-1, token[..., None])[..., 0]


# To add an order: a function and an entry here. Those in TAKES_BACK also judge tokens already revealed, and mask them
# again when they have become the least certain ("p2", arXiv 2502.03540).
ORDERS = {
    "random": lambda logits, token, u: u,
    "confidence": confidence,
    "entropy": lambda logits, token, u: -torch.special.entr(torch.softmax(logits, -1)).sum(-1),          # low is soon
    "margin": lambda logits, token, u: -torch.softmax(logits, -1).topk(2, -1).values.diff()[..., 0],    # best - second
    "p2": confidence}
TAKES_BACK = {"p2"}


@torch.no_grad()
def fill(model, ids, is_mask, steps, temperature=0.8, seed=0, order="confidence", top_p=1.0, block_size=0, watch=None,
         threshold=0.0):
    """Fill the masked positions of ids (B, T) in `steps` steps, a network call each. Position 0 must be visible.

    With `block_size`, positions are filled left to right in blocks of so many, `steps` shared out among them; what lies
    before a block is cached and does not see it. A block model always does so, by the blocks of its training. With a
    `threshold` a call reveals every token more likely than that, but at least one a row, and `steps` does not count.
    `watch` is called with (ids, is_mask), whole, after every call."""
    pick(ORDERS, order, "--order")
    if not 0 <= threshold <= 1 or threshold and order in TAKES_BACK:
        raise UserError("--threshold must lie in (0, 1], or be 0: --sample_steps calls; order p2 takes only 0")
    if steps < 1 or not 0 < top_p <= 1 or temperature < 0:
        raise UserError("--sample_steps must be at least 1, --top_p lie in (0, 1], --temperature not be negative")
    if is_mask[:, 0].any():
        raise UserError("the first token cannot be a mask: give a prompt")
    ids, is_mask, T, of_blocks = ids.clone(), is_mask.clone(), ids.shape[1], model.arm.attention == "block"
    if T > (most := model.lm.config.max_position_embeddings):
        raise UserError(f"text and masks are {T} tokens, more than the model's {most}; shorten one")
    if of_blocks and block_size not in (0, model.arm.block_size):
        raise UserError(f"this model was converted to {model.arm}; leave --block_size {block_size} out")
    cache, stretches, size = None, [(0, T)], model.arm.block_size if of_blocks else block_size
    if size and is_mask.any():
        from transformers import DynamicCache
        if not is_mask[:, -1].any():
            raise UserError("blocks of tokens see nothing after them: leave --suffix or --block_size out")
        cache, first = DynamicCache(), int(is_mask.any(0).nonzero()[0])                # no windows: masks have them
        starts = range(first - first % size, T, size) if of_blocks else range(first, T, size)
        stretches = [(lo - (not of_blocks), min(lo + size, T)) for lo in starts]       # its first token is visible
    masks, done = is_mask.any(0).cpu(), 0                                              # (T,)
    for number, (lo, hi) in enumerate(stretches):
        known = cache.get_seq_length() if cache is not None else 0
        if lo > known and not of_blocks:
            for _ in model.states(ids[:, known:lo], is_mask[:, known:lo], cache=cache):
                pass                                                                   # what is filled joins the cache
        until = steps * int(masks[:hi].sum()) // max(1, int(masks.sum()))              # its share, by its masks

        def show(some, hidden, lo=lo, hi=hi):
            if watch is not None:
                watch(*(torch.cat([a[:, :lo], b, a[:, hi:]], 1) for a, b in ((ids, some), (is_mask, hidden))))
        ids[:, lo:hi] = fill_stretch(model, ids[:, :hi], is_mask[:, lo:hi], max(1, until - done), temperature,
                                     (seed, number), order, top_p, show, cache, threshold)
        is_mask[:, lo:hi], done = False, until
    return ids


def foretell_cached(model, ids, is_mask, cache, before):
    """Normed states (B, S, D) that predict the last tokens of ids (B, T), is_mask (B, S), and the state before those. A
    finished block between them and the cache is read by the same call, and joins it; where there is none, the state
    `before` is that of an earlier call (None at the start of a text, whose first token nothing predicts)."""
    S, known = is_mask.shape[1], cache.get_seq_length() if cache is not None else 0
    lo = ids.shape[1] - S
    new = lo - known
    see = who_sees_cached(known, lo, lo + S, *model.arm.plan(S)) if model.arm.attention == "block" else None
    *_, normed = model.states(ids[:, known:], F.pad(is_mask, (new, 0)), cache=cache, see=see)
    backbone.trim(cache, lo)
    before, normed = normed[:, new - 1:new] if new else before, normed[:, new:]
    if not model.arm.shift:
        return normed, before
    first = normed[:, :1] if before is None else before                                # a visible token needs no state
    return torch.cat([first, normed[:, :-1]], 1), before


def fill_stretch(model, ids, is_mask, steps, temperature, key, order, top_p, watch, cache, threshold):
    """`fill` on the last tokens of ids (B, T), a stretch is_mask (B, S): its tokens (B, S).

    Each step: 1 logits of all masked tokens  2 draw a token for each, in float64  3 reveal the most certain ones by
    `order`, enough to be done in time, or all that are certain enough."""
    S, before = is_mask.shape[1], None
    known, ids = ids[:, :-S], ids[:, -S:]
    asked, count = is_mask, is_mask.sum(1)                                             # (B, S); (B,)
    for step in range(int(count.max()) if threshold else steps):
        judged = asked if order in TAKES_BACK else is_mask                             # (B, S): all may be taken back
        b, i = judged.nonzero(as_tuple=True)                                           # n positions of the batch
        if len(b) == 0:
            break
        normed, before = foretell_cached(model, torch.cat([known, ids], 1), is_mask, cache, before)
        logits = model.logits(normed[b, i]).double()                                   # (n, V)
        u = [generator(key[0], "fill", key[1], step, row).random((2, S)) for row in range(len(ids))]
        u = torch.from_numpy(np.stack(u, 1)).to(logits.device)[:, b, i]                # (2, n)
        token = choose(logits, temperature, top_p, u[0])
        standing = torch.where(is_mask[b, i], token, ids[b, i])                        # judged: what is there already
        score = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=ids.device)
        score[b, i] = ORDERS[order](logits, standing, u[1]).double()
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)         # (B, S): 0 is the most certain
        if threshold:
            keep = b[confidence(logits, token, u[1]) >= threshold].bincount(minlength=len(ids)).clamp_min(1)    # (B,)
        elif order in TAKES_BACK:
            keep = count - (count * (1 - (step + 1) / steps)).floor().long()
        else:
            keep = -(-is_mask.sum(1) // (steps - step))                                # ceil: done at the last step
        chosen = rank < keep[:, None]
        fresh = ids.clone()
        fresh[b, i] = token
        ids = torch.where(chosen & is_mask, fresh, ids)
        is_mask = judged & ~chosen
        watch(ids, is_mask)
    return ids


@torch.no_grad()
def speculate(model, ids, new, drafts, watch=None):
    """ids (1, T) and `new` tokens after them: the greedy text of the model's own AR mode, token for token (in fp32; in
    bf16 rounding decides near-ties), drafted by its diffusion mode. It wants blocks of tokens after a causal context,
    trained with --ar_weight. A call reads the newest tokens as the AR mode does, drafts among them, and `drafts` masks
    after each that may prove the last right one, for which the text ends there: it judges drafts and makes the next,
    whichever are right (quadratic decoding, arXiv 2507.11851). `watch` is called as by `fill`."""
    arm, draft = model.arm, []
    if not (arm.attention == "block" and arm.context == "causal" and arm.shift and 0 < drafts < arm.block_size
            and len(ids) == 1):
        raise UserError(f"{drafts} drafts need larger blocks of tokens and an AR mode, for one text at a time; this is "
                        f"{arm}: repr_align.py --attention block --context causal --ar_weight 1")
    from transformers import DynamicCache
    text, end, cache = ids[0].tolist(), ids.shape[1] + new, DynamicCache()
    if end > (most := model.lm.config.max_position_embeddings):
        raise UserError(f"prompt and new tokens are {end}, more than the model's {most}; shorten one")
    while len(text) < end:
        # 1 n tokens that follow the cache, then masks after the last one that is sure and after each draft
        known = cache.get_seq_length()
        read, sure = [*text[known:], *draft], len(text) - known
        n, last = len(read), torch.arange(sure - 1, len(read)).repeat_interleave(drafts)
        last = torch.cat([torch.arange(n), last])                                      # (K,): of its text, where it is
        is_mask = torch.arange(len(last)) >= n                                         # (K,)
        place = last + is_mask * (1 + (torch.arange(len(last)) - n) % drafts)          # (K,)
        see = torch.where(is_mask, is_mask[:, None] & (last == last[:, None]), place <= last[:, None])   # (K, K)
        place = (known + place).clamp_max(most - 1)[None].to(ids.device)               # (1, K): some lie past the end
        tokens = ids.new_tensor([[*read, *[model.mask_id] * (len(last) - n)]])         # (1, K)
        see, is_mask = F.pad(see, (known, 0), value=True), is_mask[None].to(ids.device)
        *_, normed = model.states(tokens, is_mask, cache, see, positions=place)
        best = model.logits(normed[0, sure - 1:]).argmax(-1).tolist()                  # from the last sure token on
        # 2 drafts are right up to the first that the AR mode would not have written; what it writes there is sure
        right = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        text += [*draft[:right], best[right]]
        backbone.trim(cache, known + sure + right)
        masks = len(draft) + 1 + right * drafts
        draft = best[masks:masks + drafts]
        whole = ids.new_tensor([[*text, *[model.mask_id] * (end - len(text))][:end]])  # (1, T + new)
        if watch is not None:
            watch(whole, whole == model.mask_id)
    return whole


# ----------------------------------------------------------------------------------------------------- likelihood
def strata(sizes, calls, seed, purpose, *key):
    """Mask counts (calls, blocks), k of N for every size N: two calls in each of calls/2 equal slices of 1..N, so that
    every count is as likely as every other one and a pair tells the spread inside its slice."""
    pairs = calls // 2
    u = generator(seed, purpose, *key).random((len(sizes), pairs, 2))
    u = (np.arange(pairs)[:, None] + u) / pairs * np.array(sizes)[:, None, None]
    return np.floor(u).astype(int).reshape(len(sizes), calls).T + 1                    # floor, not round: unbiased


@torch.no_grad()
def likelihood(model, ids, calls=64, seed=0, given=1, batch=16, key=0):
    """(bound, standard error) in nats of -log p(ids[given:] | ids[:given]) for one text ids (T,).

    The sum over blocks, one for a bidirectional model, of -log p(block | before it) <= E_k [ (N/k) sum of CE over k
    masked tokens ], k uniform on 1..N, the k tokens a uniform subset: the exact mask-count form of the masked diffusion
    ELBO (Ou et al. 2024; Nie et al. 2025, equation 6), stratified over k. A call masks k tokens of every block."""
    T = len(ids)
    if T - given < 1 or given < 1:
        raise UserError("a text needs a visible first token and one to judge")
    if calls < 4 or calls % 2:
        raise UserError("the likelihood needs an even number of calls, at least 4")
    size = model.arm.plan(T)[0]
    blocks = [range(max(lo, given), min(lo + size, T)) for lo in range(given - given % size, T, size)]
    weight = torch.zeros(calls, T, dtype=torch.float64, device=ids.device)             # N/k where a call masks
    for i, counts in enumerate(strata(list(map(len, blocks)), calls, seed, "count", key)):
        draw = generator(seed, "subset", key, i)
        for block, k in zip(blocks, counts, strict=True):
            weight[i, block.start + torch.from_numpy(draw.permutation(len(block))[:k])] = len(block) / k
    batch = max(1, min(batch, LOGITS // (T * model.lm.V)))                             # a row of 8B is 2 GB of logits
    pairs = torch.cat([masked_ce(model, ids, some) for some in weight.split(batch)]).view(-1, 2)   # (calls / 2, 2)
    error = (pairs[:, 0] - pairs[:, 1]).square().sum().sqrt() / 2 / len(pairs)         # a pair's mean errs by |a-b|/2
    return pairs.mean().item(), error.item()


@torch.no_grad()
def masked_ce(model, ids, weight):
    """Sum of CE (nats, float64) over the masked tokens of each row: ids (T,), their weights or bool (n, T) -> (n,)."""
    rows = ids.expand(len(weight), -1)
    logits = model.logits(model.foretell(rows, weight > 0))                            # (n, T-1, V)
    ce = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    return torch.where(weight[:, 1:] > 0, ce.double() * weight[:, 1:], 0).sum(1).cpu()


def text_likelihood(model, windows, calls, seed=0):
    """(nats, standard error) summed over windows (N, T) of a text; each window's first token is given."""
    found = [likelihood(model, ids, calls, seed, key=i) for i, ids in enumerate(windows)]
    return sum(f[0] for f in found), math.sqrt(sum(f[1] ** 2 for f in found))
