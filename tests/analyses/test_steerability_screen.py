import numpy as np
import pytest

from mechsub.analyses.registry import find_lacks, load_analyses
from mechsub.analyses.steerability_screen import TOO_FEW, _centre, _decide
from mechsub.statistics.prediction import area_under_curve


@pytest.mark.parametrize(
    ("count", "passed", "verdict"),
    [(11, 5, TOO_FEW), (12, 0, TOO_FEW), (12, 12, TOO_FEW), (12, 6, "above-null")],
)
def test_a_claim_over_traits_needs_twelve_of_them_and_both_outcomes(count, passed, verdict):
    score = np.arange(count, dtype=float)
    is_positive = np.arange(count) >= count - passed
    curve = area_under_curve(score, is_positive, np.arange(count))
    found, reason = _decide(count, curve, is_positive, "so many")
    assert found == verdict and "so many" in reason


def test_scores_that_foretell_nothing_are_inconclusive():
    score = np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    is_positive = np.arange(12) % 2 == 0
    found, _ = _decide(12, area_under_curve(score, is_positive, np.arange(12)), is_positive, "")
    assert found == "inconclusive"


def test_members_own_levels_are_taken_out_before_they_are_ranked_together():
    values = np.array([[1.0, 10.0], [2.0, 11.0]])
    np.testing.assert_allclose(_centre(values), [[-0.5, -0.5], [0.5, 0.5]])


def test_a_run_of_one_trait_has_nothing_to_compare(tiny_run):
    known = {"steerability_screen": load_analyses()["steerability_screen"]}
    assert "this run has one" in find_lacks(known, tiny_run)["steerability_screen"]
