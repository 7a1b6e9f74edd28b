import numpy as np
import pytest

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
