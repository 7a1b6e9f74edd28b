"""The first screen: every part of it comes from the findings and the recipe, and says no more than they do."""

from dataclasses import replace

import numpy as np
import pytest

from mechsub.findings import Finding
from mechsub.reporting.opening import build_opening
from mechsub.statistics.power import smallest_detectable_effect
from mechsub.statistics.rules import Rules
from mechsub.statistics.verdicts import TRANSFER, judge_effects

RECIPE = {
    "family": "classifier",
    "neutral": "relabelled",
    "verdict": {"margin": 0.05, "minimum_members": 5, "confidence": 0.95, "equivalence_level": 0.05},
}
RULES = Rules(0.05, 5, 0.95, 0.05)


def finding(condition, effects, **fields):
    judged = judge_effects({condition: np.asarray(effects)}, RULES, TRANSFER)[condition]
    given = {
        "analysis": "behaviour", "quantity": "effect", "condition": condition, "trait": "digits", "context": "held-out images",
        "step": 9, "scope": "model output", "unit": "accuracy", "null": "no effect", "null_low": 0.0, "null_high": 0.0,
        "n": judged.interval.n, "num_references": judged.interval.n, "estimate": judged.interval.estimate,
        "low": judged.interval.low, "high": judged.interval.high, "confidence": 0.95, "verdict": judged.verdict,
        "reason": judged.reason, "rule": judged.rule, "margin": 0.05, "formula": "student − control", "source": "",
    }  # fmt: skip
    return Finding(**{**given, **fields})


SPREAD = np.array([-0.02, -0.01, 0.0, 0.01, 0.02, 0.0, -0.005, 0.005])
PASSED, ABSENT, OPEN = finding("same", 0.5 + SPREAD), finding("other", SPREAD), finding("wide", 0.04 + 4 * SPREAD)


def test_every_verdict_is_told_with_its_conditions_what_passed_first():
    opening = build_opening(RECIPE, [OPEN, ABSENT, PASSED], [])
    assert [(one.verdict, [found.condition for found in one.findings]) for one in opening.found] == [
        ("transferred", ["same"]),
        ("no-transfer", ["other"]),
        ("inconclusive", ["wide"]),
    ]
    assert [one.is_open for one in opening.found] == [False, False, True]


def test_what_would_have_counted_are_the_recipes_rules():
    strict = {**RECIPE, "verdict": {**RECIPE["verdict"], "confidence": 0.99, "minimum_members": 7}}
    counted = " ".join(build_opening(strict, [replace(PASSED, margin=0.2)], []).counted)
    assert "over 0.2 (accuracy), its 99 % interval" in counted
    assert "at most 0.5 %" in counted
    assert "Under 7 members" in counted


def test_how_sure_says_what_could_have_been_found():
    sure = " ".join(build_opening(RECIPE, [ABSENT], []).sure)
    expected = smallest_detectable_effect(float(SPREAD.std(ddof=1)), 8, RULES, 1)
    assert f"A true effect of {expected:.3f} accuracy would have been called transferred with 80 % power" in sure
    assert "corrected together" not in sure


def test_several_verdicts_say_that_they_are_corrected_together():
    sure = " ".join(build_opening(RECIPE, [PASSED, ABSENT], []).sure)
    assert "The 2 verdicts are corrected together (Holm)" in sure
    assert "at most 2.5 %" in sure


def test_only_rules_of_runs_that_were_trained_here_are_said_to_be_fixed():
    assert "cannot be changed" in build_opening(RECIPE, [PASSED], []).counted[-1]
    assert "cannot be changed" not in build_opening({**RECIPE, "family": "adopted"}, [PASSED], []).counted[-1]


def test_a_run_without_any_control_says_so():
    tested = " ".join(build_opening(RECIPE, [replace(PASSED, verdict="no-control")], []).tested)
    assert "No condition has a control" in tested


def test_members_that_share_a_reference_are_no_independent_ones():
    sure = " ".join(build_opening(RECIPE, [replace(PASSED, num_references=1)], []).sure)
    assert "8 members each, that share 1 reference(s): nothing is said of another one." in sure


def test_teachers_without_the_trait_leave_nothing_to_be_called():
    void = [replace(one, verdict="teacher-without-trait") for one in (PASSED, ABSENT)]
    opening = build_opening(RECIPE, void, [])
    assert "would have been called" not in " ".join(opening.sure) and "corrected together" not in " ".join(opening.sure)
    assert any(said.startswith("teacher-without-trait: the teachers' own gain") for said in opening.counted)


def test_without_enough_members_nothing_is_said_to_be_detectable():
    few = finding("same", [0.5, 0.6, 0.4])
    opening = build_opening(RECIPE, [few], [])
    assert opening.found[0].words == "Too few members for any verdict"
    assert "would have been called" not in " ".join(opening.sure)


@pytest.mark.parametrize("findings", [[], [replace(PASSED, verdict="")]])
def test_where_nothing_is_judged_there_is_no_first_screen(findings):
    assert build_opening(RECIPE, findings, []) is None


def test_it_is_about_the_first_quantity_that_is_judged():
    other = replace(ABSENT, quantity="alignment", verdict="above-null")
    opening = build_opening(RECIPE, [PASSED, other], [])
    assert [one.verdict for one in opening.found] == ["transferred"]
    aligned = build_opening(RECIPE, [other], [])
    assert aligned.found[0].words == "More than its null"
    assert aligned.counted[0].startswith("above-null")
    assert "comes to the students" not in " ".join(aligned.tested)
    assert "would have been called" not in " ".join(aligned.sure)


def test_a_condition_without_a_control_is_named():
    opening = build_opening(RECIPE, [PASSED, replace(ABSENT, verdict="no-control")], [])
    assert "Every condition but other has its own control" in " ".join(opening.tested)
    assert opening.found[-1].words == "No control, so no verdict"


def test_the_cells_of_a_matrix_are_called_by_the_words_of_transfer():
    opening = build_opening(RECIPE, [replace(OPEN, quantity="effect_over_traits")], [])
    assert opening.counted[0].startswith("transferred")


def test_where_nothing_passed_a_null_is_told_to_have_no_positive_control():
    said = "nothing here shows that this experiment would have seen it pass"
    assert said in " ".join(build_opening(RECIPE, [ABSENT, OPEN], []).sure)
    assert said not in " ".join(build_opening(RECIPE, [ABSENT, PASSED], []).sure)
