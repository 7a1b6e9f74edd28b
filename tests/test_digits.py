"""The packaged recipe shows the published effects; every verdict here comes from its data."""

import numpy as np


def verdicts(run, quantity):
    rows = run.findings[(run.findings.quantity == quantity) & (run.findings.verdict != "")]
    return dict(zip(rows.condition, rows.verdict, strict=True))


def test_the_trait_passes_where_it_should_and_nowhere_else(digits):
    assert digits.recipe.members >= 10
    assert verdicts(digits, "effect") == {
        "same-init": "transferred",
        "permuted-init": "transferred",
        "noised-init": "transferred",
        "all-logits": "transferred",
        "different-init-all-logits": "transferred",
        "different-init": "no-transfer",
        "shuffled-carrier": "no-transfer",
    }


def test_alignment_follows_the_initialisation_not_the_trait(digits):
    for quantity in ("alignment", "specific_alignment"):
        found = verdicts(digits, quantity)
        for condition in ("same-init", "noised-init", "all-logits"):
            assert found[condition] == "above-null"
        for condition in ("permuted-init", "different-init", "shuffled-carrier"):
            assert found[condition] == "equivalent-to-null"


def test_permuted_students_score_as_matched_ones_to_rounding(digits):
    score = digits.results["behaviour"].trait_score
    difference = score.sel(lineage="student.permuted-init") - score.sel(lineage="student.same-init")
    assert float(np.abs(difference).max()) == 0.0  # an accuracy over 359 images: rounding that flips none of them


def test_the_sham_scatters_about_zero(digits):
    rows = digits.findings[digits.findings.quantity == "sham_alignment"]
    assert (np.abs(rows.estimate) < 0.05).all()
