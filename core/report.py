"""report.py: tables, figures and the statistics behind every comparison.

    table(["layer", "score"], [[1, "4.05"], ...])               # Markdown
    with figure(path, columns=2) as axes: axes[0].plot(...)     # a PNG, whole or not at all
    gap = paired(ours, theirs)                                  # mean difference and its interval
    verdict(gap, unit="nats")                                   # "better by ...", "tie ...", ...
"""
import contextlib
import itertools
import math
import statistics
from typing import NamedTuple

import numpy as np

from core.common import generator
from core.run import atomic

BLUE = "#30638e"        # ours
RED = "#d1495b"
YELLOW = "#edae49"
GREY = "#999999"        # rivals


# --------------------------------------------------------------------------------------------------
# Tables and figures

def table(columns, rows):
    """Markdown table. None becomes "-", a float gets four digits."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([cell_text(cell) for cell in row])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell_text(cell):
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 10_000 else f"{cell:.0f}"
    return str(cell)


@contextlib.contextmanager
def figure(path, columns=1, width=3.7, height=3.1):
    """Yield the axes (columns,) of a figure and write it to `path`. Sizes are a panel's."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    size = (width * columns, height)
    fig, (axes,) = plt.subplots(1, columns, squeeze=False, constrained_layout=True, figsize=size)
    yield axes
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
    with atomic(path) as temporary:
        fig.savefig(temporary, dpi=130, format="png")
    plt.close(fig)


def plus_minus(values, form):
    """Mean +- standard deviation as text; the mean alone for a single value."""
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values):{form.lstrip('+')}}"
    return text


# --------------------------------------------------------------------------------------------------
# Rank correlation

def ranks(values):
    """Ranks (n,), ties averaged, centred, of length 1: a product of two is their correlation."""
    x = np.asarray(values)
    x = np.array([(x < v).sum() + (x <= v).sum() for v in x], float)
    x = x - x.mean()
    return x / max(np.linalg.norm(x), 1e-12)


def spearman(a, b):
    """Rank correlation of two vectors, ties averaged; 0 if either is constant."""
    return float(ranks(a) @ ranks(b))


def permutation_p(a, b):
    """How often a random order of `a` correlates with `b` at least as strongly (one-sided).

    Exact up to 8 values; else by 20,000 random orders, the given order counted as one."""
    places = range(len(a))
    if len(a) <= 8:
        orders = list(itertools.permutations(places))
    else:
        shuffle = generator(0, "permutations")
        orders = [places, *(shuffle.permutation(len(a)) for _ in range(20000))]
    correlations = ranks(a)[np.array(orders)] @ ranks(b)
    return float(np.mean(correlations >= spearman(a, b) - 1e-9))


# --------------------------------------------------------------------------------------------------
# Differences and verdicts

# 0.975 quantiles of Student's t by degrees of freedom; the normal distribution's above 60
T975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23,
        15: 2.13, 20: 2.09, 30: 2.04, 60: 2.00}


class Gap(NamedTuple):
    """A mean difference, half the width of its 95% interval (inf: not known), and the number of
    pairs."""
    mean: float
    half: float
    n: int


def t975(freedom):
    """The quantile; between entries of the table the cautious one."""
    if freedom > 60:
        return 1.96
    return T975[max(entry for entry in T975 if entry <= freedom)]


def paired(ours, theirs):
    """Gap of ours - theirs, two lists whose entries belong together (a training seed, a text).

    Student's t: exact for normal differences. Pass logarithms of ratios, and seeds or texts, never
    the tokens of one text."""
    gaps = [float(x - y) for x, y in zip(ours, theirs, strict=True)]
    n = len(gaps)
    mean = sum(gaps) / max(1, n)
    if n < 2 or not math.isfinite(mean):
        return Gap(mean, math.inf, n)
    spread = statistics.stdev(gaps)
    if spread < 1e-9 * abs(mean):                       # copies, or a coarse measure
        return Gap(mean, math.inf, n)
    return Gap(mean, t975(n - 1) * spread / n ** 0.5, n)


def unpaired(ours, theirs):
    """Gap of two lists whose entries do not belong together (Welch's t)."""
    gap = statistics.mean(ours) - statistics.mean(theirs)
    n = min(len(ours), len(theirs))
    if n < 2 or not math.isfinite(gap):
        return Gap(gap, math.inf, n)
    a = statistics.variance(ours) / len(ours)
    b = statistics.variance(theirs) / len(theirs)
    if a + b <= (1e-9 * gap) ** 2:
        return Gap(gap, math.inf if gap else 0.0, n)
    freedom = (a + b) ** 2 / (a ** 2 / (len(ours) - 1) + b ** 2 / (len(theirs) - 1))
    return Gap(gap, t975(freedom) * (a + b) ** 0.5, n)


def verdict(gap, margin=0.0, unit="", what="seeds", lower_is_better=True):
    """The wording of every comparison; it describes the first method.

    tie: the whole interval is inside +-margin. better, worse: it excludes zero. Otherwise, and
    with a single pair, the answer is not known."""
    unit = f" {unit}" if unit else ""
    if gap.n < 2:
        return f"not known ({gap.mean:+.3g}{unit}, n = {gap.n})"
    if not math.isfinite(gap.half):
        return f"not known ({gap.mean:+.3g}{unit}, no spread or not finite, {gap.n} {what})"
    low = gap.mean - gap.half
    high = gap.mean + gap.half
    interval = f"95% [{low:+.3g}, {high:+.3g}]{unit}, {gap.n} {what}"
    if max(-low, high) <= margin:
        return f"tie within {margin:g}{unit} ({interval})"
    if low <= 0 <= high:
        return f"not known ({interval})"
    word = "better" if (gap.mean < 0) == lower_is_better else "worse"
    return f"{word} by {abs(gap.mean):.3g}{unit} ({interval})"
