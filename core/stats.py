"""stats.py: from numbers to words, in one place: correlations, paired differences, and the one wording of a verdict.

    spearman(a, b), permutation_p(a, b)            # rank correlation, and how often chance does as well
    gap = paired(ours, theirs)                     # mean difference over seeds or texts, half its 95% interval, n
    verdict(gap, margin=0.005, unit="nats")        # "ahead by ...", "behind by ...", "ties within ...", "not known ..."
"""
import itertools
import math
import statistics
from typing import NamedTuple

import numpy as np

from core.draws import generator


def plus_minus(values, form):
    """Mean +- standard deviation as text; the mean alone for a single value."""
    sd = f" +- {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{sd}"


def ranks(x):
    """Ranks of x (n,), ties averaged, centred and of length 1: the product of two is their rank correlation."""
    x = np.asarray(x)
    x = np.array([(x < v).sum() + (x <= v).sum() for v in x], float)
    return (x - x.mean()) / max(np.linalg.norm(x - x.mean()), 1e-12)


def spearman(a, b):
    """Rank correlation of two vectors, ties averaged; 0 if either is constant."""
    return float(ranks(a) @ ranks(b))


def permutation_p(a, b, seed=0):
    """How often a random order of `a` correlates with `b` at least as strongly (one-sided): exact up to 8 values, else
    by 20,000 draws, the given order counted as one."""
    n, draw = len(a), generator(seed, "permutations")
    orders = np.array(list(itertools.permutations(range(n))) if n <= 8 else [draw.permutation(n) for _ in range(20000)])
    hits = (ranks(a)[orders] @ ranks(b) >= spearman(a, b) - 1e-9).sum()
    return float(hits / len(orders) if n <= 8 else (1 + hits) / (1 + len(orders)))


def steps_to(curve, loss):
    """The step, interpolated, at which a validation curve first reaches `loss`; None if it never does."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (a, y, *_), (b, z, *_) in zip(curve, curve[1:]):
        if z <= loss:                                                                    # so y > loss
            return a + (b - a) * (y - loss) / (y - z)
    return None


# 0.975 quantiles of Student's t by degrees of freedom; beyond these the normal law's is near enough
T975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 15: 2.13, 20: 2.09,
        30: 2.04, 60: 2.00}


class Gap(NamedTuple):
    """A paired difference: mean of ours - theirs, half the width of its 95% interval (inf where it is not known: one
    pair, or a value that is not finite), number of pairs."""
    mean: float
    half: float
    n: int


def paired(ours, theirs):
    """Gap of two lists of equal length, whose entries belong together (a training seed, a text). Student's t: exact for
    normal differences, so give it logarithms of ratios, and seeds or texts, never the tokens of one text."""
    gaps = [float(x - y) for x, y in zip(ours, theirs, strict=True)]
    n, mean = len(gaps), sum(gaps) / max(1, len(gaps))
    if n < 2 or not math.isfinite(mean):
        return Gap(mean, math.inf, n)
    quantile = T975[max(k for k in T975 if k <= n - 1)] if n <= 61 else 1.96             # cautious between entries
    return Gap(mean, quantile * statistics.stdev(gaps) / n ** 0.5, n)


def verdict(gap, margin=0.0, unit="", what="seeds", lower_is_better=True):
    """The wording of every comparison. `margin`: differences within +-margin are of no practical interest.

    "ties within X" needs the whole interval inside the margin, also where it excludes zero; "ahead" and "behind" need
    it to exclude zero; else nothing is known, and one pair is never enough."""
    unit = f" {unit}" if unit else ""
    size = f"{abs(gap.mean):.3g}{unit}"
    if gap.n < 2:
        where = f"{'lower' if gap.mean < 0 else 'higher'} by {size}" if gap.mean else "equal"
        return f"not known (n = {gap.n}{', ' + where if gap.n else ''})"
    if not math.isfinite(gap.half):
        return f"not known (a value is not finite, {gap.n} {what})"
    interval = f"95% [{gap.mean - gap.half:+.3g}, {gap.mean + gap.half:+.3g}]{unit}, {gap.n} {what}"
    if abs(gap.mean) + gap.half <= margin:
        return f"ties within {margin:g}{unit} ({interval})"
    if abs(gap.mean) > gap.half:
        return f"{'ahead' if (gap.mean < 0) == lower_is_better else 'behind'} by {size} ({interval})"
    return f"not known ({interval})"
