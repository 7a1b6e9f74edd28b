import numpy as np
import pytest
from scipy import stats

from mechsub.statistics.intervals import fieller_interval, student_interval


def test_a_ratio_of_means_is_where_the_interval_of_the_difference_holds_zero():
    rng = np.random.default_rng(0)
    y = rng.normal(3, 1, 9)
    x = 0.6 * y + rng.normal(0, 0.5, 9)
    share = fieller_interval(x, y, 0.9)
    assert share.estimate == pytest.approx(x.mean() / y.mean()) and share.n == 9
    for bound in (share.low, share.high):
        assert stats.ttest_1samp(x - bound * y, 0).pvalue == pytest.approx(0.1)
    assert share.low < share.estimate < share.high


def test_it_scales_with_its_parts_and_knows_no_order_of_members():
    rng = np.random.default_rng(1)
    x, y = rng.normal(1, 0.5, 12), rng.normal(2, 0.5, 12)
    share, order = fieller_interval(x, y, 0.95), rng.permutation(12)
    same = fieller_interval(x[order], y[order], 0.95)
    scaled = fieller_interval(-3 * x, -3 * y, 0.95)
    for other in (same, scaled):
        assert (other.low, other.estimate, other.high) == pytest.approx((share.low, share.estimate, share.high))
    whole = fieller_interval(y, y, 0.95)
    assert (whole.low, whole.estimate, whole.high) == pytest.approx((1, 1, 1))
    exact = fieller_interval(x, np.full(12, 2.0), 0.95)
    mean = student_interval(x / 2, 0.95)
    assert (exact.low, exact.high) == pytest.approx((mean.low, mean.high))


def test_it_is_unbounded_exactly_where_the_denominator_is_not_told_from_zero():
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(300):
        x, y = rng.normal(1, 1, 6), rng.normal(0.8, 1, 6)
        of_y, share = student_interval(y, 0.95), fieller_interval(x, y, 0.95)
        told = of_y.low > 0 or of_y.high < 0
        assert np.isfinite(share.low) == told == np.isfinite(share.high)
        seen.add(told)
    assert seen == {True, False}


def test_too_few_members_have_no_interval_and_missing_ones_do_not_count():
    nan = float("nan")
    one = fieller_interval(np.array([1.0, nan, 3.0]), np.array([2.0, 2.0, nan]), 0.95)
    assert one.n == 1 and one.estimate == 0.5 and np.isnan(one.low) and np.isnan(one.high)
    none = fieller_interval(np.array([nan]), np.array([1.0]), 0.95)
    assert none.n == 0 and np.isnan(none.estimate)
    assert np.isnan(fieller_interval(np.ones(3), np.array([-1.0, 0.0, 1.0]), 0.95).estimate)


@pytest.mark.parametrize(("n", "share", "correlation"), [(5, 0.4, 0.0), (5, 1.0, 0.8), (16, 0.4, 0.8)])
def test_it_covers_as_often_as_it_says(n, share, correlation):
    rng = np.random.default_rng(3)
    trials = 2000
    covariance = [[0.2, 0.2 * correlation], [0.2 * correlation, 0.2]]
    covered = 0
    for _ in range(trials):
        x, y = rng.multivariate_normal([2 * share, 2.0], covariance, n).T
        interval = fieller_interval(x, y, 0.9)
        covered += bool(interval.low <= share <= interval.high)
    assert abs(covered / trials - 0.9) < 4 * np.sqrt(0.09 / trials)
