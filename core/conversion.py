"""conversion.py: what an AR model is converted to, and by which loss: who sees whom, which tokens are masked, what the
student is held to beside its teacher.

    is_mask = corrupt(T, seed, "mask", step, slots)
    loss = conversion_loss(student, teacher, ids, is_mask, path=1.0)        # Losses
    total = loss.each.sum() / count + w * loss.apart / count

Letters: B batch, T tokens, K states of a pass, D hidden width, L blocks, V vocabulary, r the share of masked tokens,
n masked tokens.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from core import backbone
from core.draws import generator


# --------------------------------------------------------------------------------------------------- who sees whom
class Arm(NamedTuple):
    """What a model is converted to: flags of repr_align.py, kept in the config.json beside its weights."""
    attention: str = "bidirectional"
    block_size: int = 16    # of "block"; a bidirectional text is one block
    context: str = "noisy"  # of "block": what a block sees of the text before it
    shift: bool = True      # the state at i predicts token i+1, as the AR model's did, and not token i

    def plan(self, T, judging=False):
        """(block_size, context) of a pass over T tokens. Where a text is judged, what lies before a block is known."""
        if self.attention == "bidirectional":
            return T, "noisy"
        return self.block_size, "clean" if judging and self.context == "noisy" else self.context

    def __str__(self):
        kind = f"blocks of {self.block_size}, {self.context} context" if self.attention == "block" else self.attention
        return kind if self.shift else f"{kind}, no shift"


BIDIRECTIONAL = Arm()


def who_sees(T, block_size, context):
    """(K, K) bool: whether the token of a row sees that of a column. A token sees its own block and those before it.

    "noisy": one copy of the text, K = T. Otherwise K = 2T, the clean text and then the masked one: a masked block sees
    itself and the clean blocks before it, so that one pass trains every block on the context it is written after; the
    clean copy sees itself by blocks ("clean") or, as the AR model did, by tokens ("causal")."""
    block = torch.arange(T) // block_size
    own, before = block[:, None] == block, block[:, None] > block                      # (T, T)
    if context == "noisy":
        return own | before
    clean = torch.ones(T, T, dtype=torch.bool).tril() if context == "causal" else own | before
    return torch.cat([torch.cat([clean, torch.zeros_like(own)], 1), torch.cat([before, own], 1)])


def who_sees_cached(known, lo, hi, block_size, context):
    """(hi - known, hi) bool: `who_sees` while the block lo..hi-1 is written, `known` tokens before it are cached and
    the others before it, which are finished, are read by the same call."""
    i, k = torch.arange(known, hi)[:, None], torch.arange(hi)
    return (i >= lo) | (k <= i if context == "causal" else k // block_size <= i // block_size)


def predictors(T, block_size, context, shift):
    """(T-1,): which of the K states predicts token 1, 2, ..., T-1. With the shift it is the state before the token,
    which for the first of a block lies in the block before: the clean copy's, where there is one."""
    i = torch.arange(1, T)
    noisy = i - int(shift) + (T if context != "noisy" else 0)
    return torch.where(i % block_size == 0, i - 1, noisy) if shift else noisy


def corrupt(T, seed, purpose, step, slots, r=None, block_size=0):
    """Which tokens are masked: (B, T) bool for the B slots. One r ~ U(0, 1) a sequence, or a block of one, clamped to
    [1/500, 1 - 1/500], each token masked with probability r; position 0 never is: it is given."""
    draws, size = [generator(seed, purpose, step, s) for s in slots], block_size or T
    share = np.stack([g.random(-(-T // size)) if r is None else np.full(-(-T // size), r) for g in draws])
    share = np.clip(share, 1 / 500, 1 - 1 / 500).repeat(size, 1)[:, :T]                                  # (B, T)
    is_mask = torch.from_numpy(np.stack([g.random(T) for g in draws]) < share)                           # (B, T)
    is_mask[:, 0] = False
    return is_mask


# ------------------------------------------------------------------------------------------------------- alignment
# Where: at every layer, embeddings and normed final state too, each with the same weight; for every masked token the
# two states that predict it are compared, the student's and the AR model's, which is the state at the token before.
def teacher_states(lm, ids):
    """The AR model's own h[0], ..., h[L-1] and normed h[L] on the clean input, causal."""
    for layer, h, *_ in lm.at(ids, range(lm.L + 1)):
        yield h if layer < lm.L else lm.norm(h)


# ------------------------------------------------------------------------------------------------------------ loss
class Losses(NamedTuple):
    """All but the first are sums over positions, so that any split of a batch adds up to the same."""
    each: torch.Tensor     # (n,) CE and path term of every masked token
    apart: torch.Tensor    # () 1 - cosine, mean over the layers
    ce: torch.Tensor       # () CE in nats
    cosines: torch.Tensor  # (L+1,) with the teacher's state of each layer; NaN without a teacher
    ar: torch.Tensor       # () next-token CE of T-1 tokens on a causal clean copy; 0 unless asked for


def conversion_loss(student, teacher, ids, is_mask, path, ar=False):
    """Losses on ids (B, T), masked where is_mask (B, T; best on the CPU). No teacher: no alignment.

    1 student and teacher in step, cosines summed layer by layer, never stacked  2 CE of the masked tokens  3 path term:
    CE again, weighted by the model's own confidence  4 the AR model's own task, which the clean copy can go on with."""
    T, zero = ids.shape[1], ids.new_zeros((), dtype=torch.float32)
    at = predictors(T, *student.arm.plan(T), student.arm.shift).to(ids.device)         # (T-1,)
    # the masked tokens are found where the masks lie, so that with masks on the CPU no GPU is waited for
    b, i = (index.to(ids.device) for index in is_mask[:, 1:].nonzero(as_tuple=True))   # (n,), (n,): token i+1
    clean = teacher_states(teacher, ids) if teacher is not None else None
    apart, cosines = zero, torch.full((student.lm.L + 1,), torch.nan, device=ids.device)
    for number, h in enumerate(student.states(ids, is_mask.to(ids.device))):
        if clean is not None:
            with torch.no_grad():
                theirs = next(clean)                                                   # (B, T, D)
            cosine = F.cosine_similarity(h[b, at[i]].float(), theirs[b, i].float(), dim=-1)     # (n,)
            cosines[number] = cosine.detach().sum()
            apart = apart + (1 - cosine).sum() / len(cosines)
    logits = student.logits(h[b, at[i]])                                               # (n, V)
    ce = F.cross_entropy(logits, ids[b, i + 1], reduction="none")                      # (n,)
    each = ce + path * torch.exp(-ce).detach() * ce
    forgot = F.cross_entropy(student.logits(h[:, :T - 1]).flatten(0, 1), ids[:, 1:].flatten(),
                             reduction="sum") if ar else zero
    return Losses(each, apart, ce.detach().sum(), cosines, forgot)


def flops_per_token(lm, T, teacher, copies=1):
    """Of training the student, whose attention looks both ways and whose head sees the masked half of the tokens, with
    `copies` of the text in a pass, and of the teacher's blocks, causal and forward only."""
    blocks = sum(p.numel() for p in lm.blocks.parameters())
    attention = lm.L * lm.config.num_attention_heads * backbone.head_size(lm.config) * T
    student = copies * (6 * blocks + 12 * attention) + 2 * lm.V * lm.D
    return student + (2 * blocks + 2 * attention if teacher else 0)
