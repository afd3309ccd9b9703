"""Known answers: correlations by hand, intervals by the table of Student's t, and every wording of a verdict."""
import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from core import metrics, stats
from core.stats import Gap


def test_plus_minus():
    assert stats.plus_minus([1.0, 2.0, 3.0], ".2f") == "2.00 +- 1.00"
    assert stats.plus_minus([1.0, 2.0, 3.0], "+.1f") == "+2.0 +- 1.0"              # a spread has no sign
    assert stats.plus_minus([-0.5], "+.1f") == "-0.5"


def test_spearman():
    assert stats.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)     # ranks only
    assert stats.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert stats.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)   # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert stats.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ties averaged
    assert stats.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_permutation_p_is_exact_for_few_values():
    assert stats.permutation_p([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1 / 24)
    assert stats.permutation_p([4, 3, 2, 1], [1, 2, 3, 4]) == 1                     # one-sided
    a, b = [3, 1, 4, 2, 5], [2, 1, 5, 3, 4]
    mine = stats.spearman(a, b)
    by_hand = [stats.spearman(order, b) >= mine - 1e-9 for order in itertools.permutations(a)]
    assert stats.permutation_p(a, b) == pytest.approx(np.mean(by_hand))
    assert stats.permutation_p([1, 1, 1], [1, 2, 3]) == 1                           # a constant knows nothing


def test_permutation_p_by_draws():
    up = list(range(12))
    assert stats.permutation_p(up, up) == pytest.approx(1 / 20_001)                 # never zero
    noise = np.random.default_rng(0).random(12)
    p, against = stats.permutation_p(up, noise), stats.permutation_p(up, -noise)
    assert 0.9 < p + against < 1.1 and p == stats.permutation_p(up, noise)


def test_steps_to():
    curve = [[0, 6.0, "x"], [10, 5.0, "x"], [20, 5.5, "x"], [30, 4.0, "x"]]
    assert stats.steps_to(curve, 5.5) == pytest.approx(5) and stats.steps_to(curve, 4.75) == pytest.approx(25)
    assert stats.steps_to(curve, 6.5) == 0 and stats.steps_to(curve, 3.9) is None and stats.steps_to([], 1) is None
    assert stats.steps_to([(0, 1.0), (10, 2.0)], 1.5) == 0                          # reached, though left again


def test_paired_is_students_t():
    ours, theirs = [1.0, 2.0, 3.0], [2.0, 2.5, 4.5]
    gap = stats.paired(ours, theirs)                                                # gaps -1, -0.5, -1.5
    assert gap.mean == pytest.approx(-1) and gap.n == 3
    assert gap.half == pytest.approx(4.30 * 0.5 / math.sqrt(3))
    assert stats.paired(theirs, ours).mean == -gap.mean                             # and pairs, not groups: 1.1 alone
    assert gap.half < 4.30 * statistics.stdev(ours) / math.sqrt(3)
    with pytest.raises(ValueError):
        stats.paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("n, quantile", [(2, 12.71), (3, 4.30), (11, 2.23), (13, 2.23), (21, 2.09), (61, 2.00),
                                         (500, 1.96)])
def test_the_quantile_is_that_of_the_next_smaller_table_entry(n, quantile):
    values = [float(i % 2) for i in range(n)]
    half = stats.paired(values, [0.0] * n).half
    assert half == pytest.approx(quantile * statistics.stdev(values) / math.sqrt(n))


def test_intervals_cover_what_they_say():
    """95% of intervals of three normal differences hold the true mean: 1,000 draws, within three standard errors."""
    draws = np.random.default_rng(1).normal(0.7, 2.0, (1000, 3))
    gaps = [stats.paired(row, np.zeros(3)) for row in draws]
    assert 0.93 < np.mean([abs(g.mean - 0.7) <= g.half for g in gaps]) < 0.97


@pytest.mark.parametrize("gap, more, words", [
    (Gap(-0.02, 0.005, 3), {}, "ahead by 0.02 (95% [-0.025, -0.015], 3 seeds)"),
    (Gap(0.02, 0.005, 3), {}, "behind by 0.02 (95% [+0.015, +0.025], 3 seeds)"),
    (Gap(0.02, 0.005, 3), dict(lower_is_better=False), "ahead by 0.02 (95% [+0.015, +0.025], 3 seeds)"),
    (Gap(-0.02, 0.005, 512), dict(unit="nats", what="texts", lower_is_better=False),
     "behind by 0.02 nats (95% [-0.025, -0.015] nats, 512 texts)"),
    (Gap(0.001, 0.003, 3), dict(margin=0.005, unit="nats"),
     "ties within 0.005 nats (95% [-0.002, +0.004] nats, 3 seeds)"),
    (Gap(0.002, 0.001, 3), dict(margin=0.005), "ties within 0.005 (95% [+0.001, +0.003], 3 seeds)"),  # known and small
    (Gap(0.004, 0.002, 3), dict(margin=0.005), "behind by 0.004 (95% [+0.002, +0.006], 3 seeds)"),    # leaves it
    (Gap(0.0, 0.006, 3), dict(margin=0.005), "not known (95% [-0.006, +0.006], 3 seeds)"),            # no tie: too wide
    (Gap(0.01, 0.02, 3), {}, "not known (95% [-0.01, +0.03], 3 seeds)"),
    (Gap(0.01, 0.01, 3), {}, "not known (95% [+0, +0.02], 3 seeds)"),                                 # zero is in it
    (Gap(0.0, 0.0, 3), {}, "ties within 0 (95% [+0, +0], 3 seeds)"),                                  # equal, all three
])
def test_every_wording(gap, more, words):
    assert stats.verdict(gap, **more) == words


def test_one_pair_is_never_enough():
    one = stats.paired([1.0], [1.5])
    assert one == Gap(-0.5, math.inf, 1)
    for margin in (0, 10, math.inf):
        assert stats.verdict(one, margin, "nats") == "not known (n = 1, lower by 0.5 nats)"
    assert stats.verdict(stats.paired([2.0], [1.5]), lower_is_better=False) == "not known (n = 1, higher by 0.5)"
    assert stats.verdict(stats.paired([1.0], [1.0])) == "not known (n = 1, equal)"
    assert stats.verdict(stats.paired([], []), 1.0) == "not known (n = 0)"


def test_what_is_not_finite_is_not_known():
    for bad in (math.inf, math.nan):
        gap = stats.paired([1.0, bad, 2.0], [1.0, bad, 1.0])
        assert gap.half == math.inf
        assert stats.verdict(gap, margin=9) == "not known (a value is not finite, 3 seeds)"


def test_gaps_of_next_token_laws_by_their_definition():
    """At a real model's vocabulary and with its logits' offset, where sums of fp32 logits would be off by 1e-4."""
    a, b = (3 * torch.randn(2, 3, 49152, generator=torch.Generator().manual_seed(i)) - 30 for i in (0, 1))
    right = torch.randint(49152, (2, 3, 1), generator=torch.Generator().manual_seed(2))
    ce, gaps = metrics.against(a, right)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl, gap = gaps(b)
    assert torch.allclose(ce.double(), -p.gather(-1, right)[..., 0], atol=1e-5)
    assert torch.allclose(kl.double(), (p.exp() * (p - q)).sum(-1), atol=1e-5)
    assert torch.allclose(gap.double(), (p - q).gather(-1, right)[..., 0], atol=1e-5)
    assert max(x.abs().max() for x in gaps(a.clone())) < 1e-6
    assert gaps(a + 7)[0].abs().max() < 1e-5                                   # the same law: logits know no zero
