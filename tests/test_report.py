"""Known answers: tables, correlations by hand, intervals by Student's t, every wording."""
import itertools
import math
import statistics

import numpy as np
import pytest

from core import report
from core.report import Gap


def test_table():
    assert report.table(["a", "b"], [[1, None]]) == "| a | b |\n| --- | --- |\n| 1 | - |"
    assert report.table(["a", "b"], [[0.123456, 17932.4]]).endswith("| 0.1235 | 17932 |")


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    with report.figure(tmp_path / "f.png", columns=2) as axes:
        axes[1].plot([1, 2], label="x")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError), report.figure(tmp_path / "g.png"):
        raise ValueError
    assert not (tmp_path / "g.png").exists()


def test_plus_minus():
    assert report.plus_minus([1.0, 2.0, 3.0], ".2f") == "2.00 +- 1.00"
    assert report.plus_minus([1.0, 2.0, 3.0], "+.1f") == "+2.0 +- 1.0"      # a spread has no sign
    assert report.plus_minus([-0.5], "+.1f") == "-0.5"


def test_spearman():
    assert report.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert report.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    by_hand = 1 - 6 * 4 / (5 * 24)                                          # sum of d^2 is 4
    assert report.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(by_hand)
    tied = 4.5 / math.sqrt(4.5 * 5)
    assert report.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(tied)
    assert report.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_permutation_p_is_exact_for_few_values():
    assert report.permutation_p([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1 / 24)
    assert report.permutation_p([4, 3, 2, 1], [1, 2, 3, 4]) == 1            # one-sided
    a = [3, 1, 4, 2, 5]
    b = [2, 1, 5, 3, 4]
    least = report.spearman(a, b) - 1e-9
    by_hand = [report.spearman(order, b) >= least for order in itertools.permutations(a)]
    assert report.permutation_p(a, b) == pytest.approx(np.mean(by_hand))
    assert report.permutation_p([1, 1, 1], [1, 2, 3]) == 1


def test_permutation_p_by_random_orders():
    up = list(range(12))
    assert report.permutation_p(up, up) == pytest.approx(1 / 20_001)        # never zero
    noise = np.random.default_rng(0).random(12)
    p = report.permutation_p(up, noise)
    assert 0.9 < p + report.permutation_p(up, -noise) < 1.1
    assert p == report.permutation_p(up, noise)


def test_paired_is_students_t():
    ours = [1.0, 2.0, 3.0]
    theirs = [2.0, 2.5, 4.5]
    gap = report.paired(ours, theirs)                                       # -1, -0.5, -1.5
    assert gap.mean == pytest.approx(-1) and gap.n == 3
    assert gap.half == pytest.approx(4.30 * 0.5 / math.sqrt(3))
    assert report.paired(theirs, ours).mean == -gap.mean
    with pytest.raises(ValueError):
        report.paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("n, quantile", [(2, 12.71), (3, 4.30), (11, 2.23), (13, 2.23), (21, 2.09),
                                         (61, 2.00), (500, 1.96)])
def test_the_quantile_is_that_of_the_next_smaller_table_entry(n, quantile):
    values = [float(i % 2) for i in range(n)]
    half = report.paired(values, [0.0] * n).half
    assert half == pytest.approx(quantile * statistics.stdev(values) / math.sqrt(n))


def test_intervals_cover_what_they_say():
    """1,000 samples each: three pairs, and two independent groups of unequal spread and size."""
    random = np.random.default_rng(1)
    hits = []
    welch = []
    for _ in range(1000):
        gap = report.paired(random.normal(0.7, 2.0, 3), np.zeros(3))
        hits.append(abs(gap.mean - 0.7) <= gap.half)
        ours = random.normal(0.7, 2.0, 3).tolist()
        gap = report.unpaired(ours, random.normal(0.0, 1.0, 5).tolist())
        welch.append(abs(gap.mean - 0.7) <= gap.half)
    assert 0.93 < np.mean(hits) < 0.97
    assert 0.93 < np.mean(welch) < 0.98


def test_unpaired_is_welchs_t():
    gap = report.unpaired([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])                 # 2 degrees of freedom
    assert gap == Gap(-3.0, pytest.approx(4.30 / math.sqrt(3)), 3)
    assert report.unpaired([1.0], [2.0, 3.0]).half == math.inf
    assert report.unpaired([1.0, 1.0], [2.0, 2.0]) == Gap(-1.0, math.inf, 2)


@pytest.mark.parametrize("gap, more, words", [
    (Gap(-0.02, 0.005, 3), {}, "better by 0.02 (95% [-0.025, -0.015], 3 seeds)"),
    (Gap(0.02, 0.005, 3), {}, "worse by 0.02 (95% [+0.015, +0.025], 3 seeds)"),
    (Gap(0.02, 0.005, 3), dict(lower_is_better=False),
     "better by 0.02 (95% [+0.015, +0.025], 3 seeds)"),
    (Gap(-0.02, 0.005, 512), dict(unit="nats", what="texts", lower_is_better=False),
     "worse by 0.02 nats (95% [-0.025, -0.015] nats, 512 texts)"),
    (Gap(0.001, 0.003, 3), dict(margin=0.005, unit="nats"),
     "tie within 0.005 nats (95% [-0.002, +0.004] nats, 3 seeds)"),
    (Gap(0.002, 0.001, 3), dict(margin=0.005),
     "tie within 0.005 (95% [+0.001, +0.003], 3 seeds)"),                   # known, and small
    (Gap(0.004, 0.002, 3), dict(margin=0.005), "worse by 0.004 (95% [+0.002, +0.006], 3 seeds)"),
    (Gap(0.0, 0.006, 3), dict(margin=0.005), "not known (95% [-0.006, +0.006], 3 seeds)"),
    (Gap(0.01, 0.01, 3), {}, "not known (95% [+0, +0.02], 3 seeds)"),       # zero is in it
    (Gap(0.0, 0.0, 3), {}, "tie within 0 (95% [+0, +0], 3 seeds)"),         # equal, all three
])
def test_every_wording(gap, more, words):
    assert report.verdict(gap, **more) == words


def test_one_pair_is_never_enough():
    one = report.paired([1.0], [1.5])
    assert one == Gap(-0.5, math.inf, 1)
    for margin in (0, 10, math.inf):
        assert report.verdict(one, margin, "nats") == "not known (-0.5 nats, n = 1)"
    assert report.verdict(report.paired([], []), 1.0) == "not known (+0, n = 0)"


def test_a_value_that_is_not_finite_is_not_known():
    for bad in (math.inf, math.nan):
        gap = report.paired([1.0, bad, 2.0], [1.0, bad, 1.0])
        assert gap.half == math.inf
        assert "no spread or not finite, 3 seeds" in report.verdict(gap, margin=9)


def test_equal_values_have_no_interval():
    """Copies of a run, or a coarse measure: the spread of two equal seeds is not known."""
    same = report.paired([0.75, 0.75], [0.5, 0.5])
    assert report.verdict(same).startswith("not known (+0.25, no spread")
    assert report.verdict(report.unpaired([1.0, 1.0], [1.1, 1.1])).startswith("not known")
    assert report.verdict(report.paired([0.5, 0.5], [0.5, 0.5]), margin=0.1).startswith("tie")
    assert report.verdict(report.paired([0.7, 0.8, 0.9], [0.6, 0.7, 0.8])).startswith("not known")
    assert report.verdict(report.unpaired([0.1 + 0.2, 0.3], [0.4, 0.4])).startswith("not known")
