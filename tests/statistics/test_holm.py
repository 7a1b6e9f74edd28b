import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from mechsub.statistics.holm import adjust_holm


def test_the_textbook_case():
    assert adjust_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_is_that_of_statsmodels_with_ties_and_at_the_ends(seed):
    p_values = np.concatenate([np.random.default_rng(seed).uniform(size=9) ** 3, [0.2, 0.2, 0.0, 1.0]])
    adjusted = adjust_holm(dict(enumerate(p_values)))
    np.testing.assert_allclose(list(adjusted.values()), multipletests(p_values, method="holm")[1], rtol=1e-12)


def test_what_was_not_tested_is_not_counted_and_the_order_stays():
    adjusted = adjust_holm({"b": 0.03, "missing": np.nan, "a": 0.01})
    assert list(adjusted) == ["b", "missing", "a"]
    assert adjusted["a"] == pytest.approx(0.02) and adjusted["b"] == pytest.approx(0.03) and np.isnan(adjusted["missing"])
    assert adjust_holm({}) == {}


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"between 0 and 1, not \{'x': 1.5\}"):
        adjust_holm({"x": 1.5, "y": 0.5})
