"""metrics.py: what is measured of a law, of a text (perplexity, entropy, repetition) and of a program (seconds, bytes).

    ce, gaps = against(intact, right); kl, gap = gaps(logits)      # of next-token laws
    row = measure(lm, ids, prefix)                 # all metrics of what was written after the prefix, judged by lm
    seconds = seconds_of(5, call)                  # the fastest of five calls
    with PeakBytes() as peak: call()               # peak.most: bytes held at once by tensors made meanwhile

Letters: N texts, T tokens, V vocabulary.
"""
import math
import timeit
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

LOGITS = 2 ** 27  # at most so many logits at once where laws are compared: five such tensors live together
SHAPE = ("entropy", "diversity", "rep_4")  # of a text, whoever judges it


# ---------------------------------------------------------------------------------------------- next-token laws
def against(logits, right):
    """(CE (B, T) of the tokens `right` (B, T, 1), a function of other logits -> KL of their law from that of these (B,
    T, V), and CE less this one). Text by text: over 49,152 tokens each temporary tensor of a batch is new memory. The
    difference before the sum: sums of the logits themselves would carry their common offset into fp32's last digits."""
    own = logits.float()                                                                         # (B, T, V)
    total, p, mine = own.logsumexp(-1), own.softmax(-1), own.gather(-1, right)[..., 0]

    def gaps(other):
        other = other.float()
        more = other.logsumexp(-1) - total                                                       # (B, T)
        apart = torch.stack([(a * (b - c)).sum(-1) for a, b, c in zip(p, own, other, strict=True)])
        return more + apart, more + mine - other.gather(-1, right)[..., 0]
    return total - mine, gaps


# --------------------------------------------------------------------------------------------------------- texts
@torch.no_grad()
def judge(lm, ids, prefix):
    """Negative log-likelihood (nats, float64) of each text's tokens after the prefix: ids (N, T) -> (N, T - prefix)."""
    rows = []
    for part in ids.split(16):
        logits = lm.head(lm.through(lm.embed(part[:, :-1]), 0, lm.L))[:, prefix - 1:]             # (n, T - prefix, V)
        nll = F.cross_entropy(logits.double().flatten(0, 1), part[:, prefix:].flatten(), reduction="none")
        rows.append(nll.view(len(part), -1))
    return torch.cat(rows)


def judge_text(lm, theirs, ours, ids, prefix):
    """The same by a judge with another tokenizer: ids (N, T) are decoded by `ours`, prefix and continuation apart, and
    encoded by `theirs`. A list of N vectors, one number a token of the judge's."""
    out = []
    for row in ids.tolist():
        head, tail = (theirs(ours.decode(part), add_special_tokens=False)["input_ids"]
                      for part in (row[:prefix], row[prefix:]))
        head = head or [theirs.eos_token_id or 0]
        out.append(judge(lm, torch.tensor([[*head, *tail]], device=ids.device), len(head))[0])
    return out


def entropy(ids):
    """Entropy (nats) of a text's own token histogram, mean over ids (N, T). At most ln T."""
    shares = [row.unique(return_counts=True)[1].double() / len(row) for row in ids.cpu()]
    return sum(torch.special.entr(share).sum().item() for share in shares) / len(ids)


def repetition(ids, n):
    """rep-n: the share of n-grams, pooled over all texts, that repeat an earlier one. ids (N, T)."""
    grams = [tuple(row[i:i + n]) for row in ids.tolist() for i in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def gen_ppl(nll):
    """exp(sum NLL / number of tokens) over texts: judge's (N, T) or judge_text's list of vectors."""
    return math.exp(sum(float(row.sum()) for row in nll) / sum(map(len, nll)))


def measure(lm, ids, prefix, second=None, end=None):
    """All metrics of what was written, ids[:, prefix:end] of ids (N, T), at one setting: gen_ppl, by the judge lm, of
    it and of as many tokens after it, where there are such; entropy, diversity = product over n = 2, 3, 4 of the share
    of distinct n-grams, rep_4; second_ppl by another judge, `second` = (lm, theirs, ours) of judge_text."""
    end = end or ids.shape[1]
    new, ids = ids[:, prefix:end], ids[:, :2 * end - prefix]
    more = {"second_ppl": gen_ppl(judge_text(*second, ids, prefix))} if second else {}
    return {**more, "gen_ppl": gen_ppl(judge(lm, ids, prefix)), "entropy": entropy(new),
            "diversity": math.prod(1 - repetition(new, n) for n in (2, 3, 4)), "rep_4": repetition(new, 4)}


def at_entropy(points, target, key="gen_ppl"):
    """gen-PPL at real text's entropy: the number by which methods are compared, everywhere in this project.

    gen-PPL is how surprised a judge, the intact model, is by what a method wrote: exp of the mean -log p(token | what
    is before it). Alone it can be bought: a text that repeats itself is cheap. The price is seen in the entropy of a
    text's own token histogram, so each method is drawn at several temperatures, its frontier, and read off where that
    entropy equals that of the real continuations (`target`): linear in (entropy, log gen-PPL) between neighbouring
    temperatures; of several crossings the dearest counts. A frontier that stays above it even when cold is read at its
    lowest entropy: a bound, which errs against it. None if it stays below: nothing is extrapolated."""
    points = [(p["entropy"], math.log(p[key])) for p in sorted(points, key=lambda p: p["temperature"])]
    found = [y0 + (y1 - y0) * (target - h0) / (h1 - h0 or 1e-9) for (h0, y0), (h1, y1) in zip(points, points[1:])
             if min(h0, h1) <= target <= max(h0, h1)]
    if not found and points and min(points)[0] > target:
        found = [min(points)[1]]
    return math.exp(max(found)) if found else None


# ------------------------------------------------------------------------------------------------------ programs
def seconds_of(repeats, run):
    """The fastest of `repeats` calls: the least disturbed one."""
    def whole():
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return min(timeit.repeat(whole, number=1, repeat=repeats))


class PeakBytes(TorchDispatchMode):
    """Within this context, `most` is the largest number of bytes held at once by tensors made in it, on any device;
    `known` are tensors that were there before."""

    def __init__(self, known=()):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage):
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self.known:
            return
        self.known.add(pointer)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer, size):
        self.known.discard(pointer)
        self.now -= size
