"""conversion.py: what REPR-ALIGN minimises: which tokens are masked, and the loss of a student beside its teacher.

    is_mask = corrupt(T, seed, "mask", step, slots)
    loss = conversion_loss(student, teacher, ids, is_mask, path=1.0)        # Losses
    total = loss.each.sum() / count + w * loss.apart / spots

Letters: B batch, T tokens, D hidden width, L blocks, V vocabulary, r the share of masked tokens, n masked tokens.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from core import backbone
from core.common import UserError, pick
from core.draws import generator


# ------------------------------------------------------------------------------------------------------ corruption
def corrupt(T, seed, purpose, step, slots, r=None):
    """Which tokens are masked: (B, T) bool for the B slots. One r ~ U(0, 1) a sequence, clamped to [1/500, 1 - 1/500],
    each token masked with probability r; position 0 never is: its state predicts token 1, nothing predicts token 0."""
    draws = [generator(seed, purpose, step, s) for s in slots]
    share = np.clip([g.random() if r is None else r for g in draws], 1 / 500, 1 - 1 / 500)               # (B,)
    is_mask = torch.from_numpy(np.stack([g.random(T) for g in draws]) < share[:, None])                  # (B, T)
    is_mask[:, 0] = False
    return is_mask


# ------------------------------------------------------------------------------------------------------- alignment
# Where states are compared, (B, T-1). The loss sits on the states that predict a masked token: i where token i+1 is
# masked, since the AR model's next-token shift is kept. Alignment looks at the same states unless told otherwise.
POSITIONS = {"next-masked": lambda is_mask: is_mask[:, 1:],
             "masked": lambda is_mask: is_mask[:, :-1],
             "all": lambda is_mask: torch.ones_like(is_mask[:, 1:])}


def align_layers(name, L):
    """--align_layers -> which of the states 0 (embeddings) to L (the normed final state) are aligned; the published
    loss takes all of them, each with the same weight."""
    if name == "all":
        return set(range(L + 1))
    found = {int(part) if part.isdigit() else L + 1 for part in name.split(",")}
    if max(found) > L:
        raise UserError(f"--align_layers {name} must be all or numbers of 0..{L} such as 0,4,8")
    return found


def teacher_states(lm, ids):
    """The AR model's own h[0], ..., h[L-1] and normed h[L] on the clean input, causal."""
    yield (h := lm.embed(ids))
    side = lm.side(h)
    for i in range(lm.L):
        h = lm.block(h, i, side)
        yield h if i < lm.L - 1 else lm.norm(h)


# ------------------------------------------------------------------------------------------------------------ loss
class Losses(NamedTuple):
    """All but the first are sums over positions, so that any split of a batch adds up to the same."""
    each: torch.Tensor     # (n,) CE and path term of every masked token
    apart: torch.Tensor    # () 1 - cosine, mean over the aligned layers
    ce: torch.Tensor       # () CE in nats
    cosines: torch.Tensor  # (L+1,) with the teacher's state of each layer; NaN without a teacher


def flat(where, device):
    """where (B, T-1) bool -> the places of what is true (n,) in the flattened batch, on `device`: found where `where`
    lies, so that with masks on the CPU no GPU is waited for."""
    return where.flatten().nonzero()[:, 0].to(device)


def conversion_loss(student, teacher, ids, is_mask, path, layers=None, positions="next-masked"):
    """Losses on ids (B, T), masked where is_mask (B, T; best on the CPU). No teacher: no alignment. No layers: all.

    1 student and teacher in step, cosines summed layer by layer, never stacked  2 CE of token i+1 from state i, where
    token i+1 is masked  3 path term: CE again, weighted by the model's own confidence."""
    spots = flat(pick(POSITIONS, positions, "--align_positions")(is_mask), ids.device)     # (n,)
    predicts = flat(is_mask[:, 1:], ids.device)                                        # (n,)
    layers = set(range(student.lm.L + 1)) if layers is None else layers
    clean = teacher_states(teacher, ids) if teacher is not None else None
    apart = ids.new_zeros((), dtype=torch.float32)
    cosines = torch.full((student.lm.L + 1,), torch.nan, device=ids.device)
    for i, h in enumerate(student.states(ids, is_mask.to(ids.device))):
        h = h[:, :-1].flatten(0, 1)                                                    # (B (T-1), D)
        if clean is not None:
            with torch.no_grad():
                theirs = next(clean)[:, :-1].flatten(0, 1).index_select(0, spots).float()  # (n, D)
            cosine = F.cosine_similarity(h.index_select(0, spots).float(), theirs, dim=-1)   # (n,)
            cosines[i] = cosine.detach().sum()
            if i in layers:
                apart = apart + (1 - cosine).sum() / len(layers)
    logits = student.logits(h.index_select(0, predicts))                               # (n, V)
    ce = F.cross_entropy(logits, ids[:, 1:].flatten().index_select(0, predicts), reduction="none")     # (n,)
    each = ce + path * torch.exp(-ce).detach() * ce
    return Losses(each, apart, ce.detach().sum(), cosines)


def flops_per_token(lm, T, teacher):
    """Of training the student, whose attention looks both ways and whose head sees the masked half of the tokens, and
    of the teacher's blocks, causal and forward only."""
    blocks = sum(p.numel() for p in lm.blocks.parameters())
    attention = lm.L * backbone.attention_width(lm.config) * T
    return 6 * blocks + 12 * attention + 2 * lm.V * lm.D + (2 * blocks + 2 * attention if teacher else 0)
