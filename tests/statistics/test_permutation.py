import numpy as np
import pytest
from scipy import stats

from mechsub.statistics.permutation import flip_signs


def test_the_test_is_exact_on_few_members():
    # All eight sign flips of (1, 2, 3): only the observed one reaches their mean of 2.
    assert flip_signs(np.array([1.0, 2.0, 3.0])).p_above == 1 / 8
    assert flip_signs(-np.array([1.0, 2.0, 3.0])).p_above == 1.0


def test_the_null_is_symmetric_and_spans_the_observed_sizes():
    test = flip_signs(np.array([1.0, 2.0, 3.0]))
    assert test.null_low == pytest.approx(-test.null_high)
    assert 0 < test.null_high <= 2


def test_many_members_give_the_same_p_each_time():
    values = np.random.default_rng(0).standard_normal(30) + 0.3
    assert flip_signs(values) == flip_signs(values)


def test_fewer_than_two_members_give_nothing():
    assert np.isnan(flip_signs(np.array([1.0, np.nan])).p_above)


@pytest.mark.parametrize("members", [2, 5, 9])
def test_p_and_null_are_those_of_scipy(members):
    values = np.random.default_rng(members).standard_normal(members) + 0.4
    values[0] = values[1]  # ties count as reached
    slow = stats.permutation_test((values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf)
    found = flip_signs(values, confidence=0.9)
    assert found.p_above == pytest.approx(slow.pvalue, abs=1e-12)
    np.testing.assert_allclose([found.null_low, found.null_high], np.quantile(slow.null_distribution, [0.05, 0.95]), atol=1e-12)
