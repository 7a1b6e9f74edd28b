import numpy as np
import pytest
import torch

from mechsub.analyses.symmetry_matching import ACTIVATIONS, FITS, NO_PAIR, OWN, STORED, UNRELATED, WEIGHTS
from mechsub.api import analyze_run, run_experiment
from mechsub.families.classifier.symmetry import list_unit_groups
from mechsub.parameters.alignment import MODEL, Missing
from mechsub.parameters.matching import match_weights
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream

ELSEWHERE = ("different-init", "permuted-init", "noised-init", "different-init-all-logits")


@pytest.fixture(scope="module")
def exact_run(tiny_recipe, tmp_path_factory):
    """In float64, where nothing but the order of units tells permuted-init from same-init."""
    recipe = load_recipe(tiny_recipe, ["model.dtype=float64", "members=4"])
    path = tmp_path_factory.mktemp("runs") / "exact"
    run = run_experiment(recipe, path, device="cpu", workers=0)
    analyze_run(path, ["symmetry_matching", "parameter_alignment"], device="cpu", workers=0)
    return run


def results(run):
    return run.results["symmetry_matching"].sel(taught="digits")


def test_permuted_students_match_to_their_twins_at_every_step_in_double_precision(exact_run):
    data = results(exact_run)
    for fit in FITS:
        matched = data.alignment.sel(condition="permuted-init", matching=fit, pair=OWN)
        same = data.alignment.sel(condition="same-init", matching=STORED, pair=OWN)
        assert (np.isnan(matched) == np.isnan(same)).all() and np.isfinite(matched).sum() > 50
        assert float(abs(matched - same).max()) <= 1e-10
        raw = data.alignment.sel(condition="permuted-init", matching=STORED, pair=OWN)
        assert float(abs(raw - same).sel(scope=MODEL).max()) > 0.05
    for name in ("alignment_of_control", "control_adjusted_alignment", "specific_alignment"):
        matched = data[name].sel(condition="permuted-init", matching=WEIGHTS, pair=OWN)
        assert float(abs(matched - data[name].sel(condition="same-init", matching=STORED, pair=OWN)).max()) <= 1e-9


def test_in_single_precision_they_differ_by_rounding(tiny_run):
    data = results(tiny_run)
    matched = data.alignment.sel(condition="permuted-init", matching=WEIGHTS, pair=OWN)
    assert float(abs(matched - data.alignment.sel(condition="same-init", matching=STORED, pair=OWN)).max()) <= 2e-3
    tests = tiny_run.findings.query("quantity == 'matching_self_test'")
    assert len(tests) == 2 and (tests.margin == 2e-3).all() and (tests.estimate <= 2e-3).all()


def test_what_matching_recovers_of_permuted_students_is_not_found_in_unrelated_pairs(exact_run):
    data = results(exact_run).sel(condition="permuted-init", scope=MODEL, matching=WEIGHTS)
    last = data.alignment.isel(step=-1)
    assert float(last.sel(pair=OWN).mean()) > float(last.sel(pair=UNRELATED).mean()) + 0.1
    fits = results(exact_run).sel(condition="different-init", pair=UNRELATED, fit=WEIGHTS)
    gained = fits.start_agreement_matched - fits.start_agreement_stored
    assert (gained > 0.1).all(), "matching finds something in starts that have nothing in common"


def test_stored_values_are_those_of_the_parameter_alignment(exact_run):
    ours, theirs = results(exact_run), exact_run.results["parameter_alignment"].sel(taught="digits")
    for name in ("alignment", "alignment_of_control", "control_adjusted_alignment", "specific_alignment"):
        stored = ours[name].sel(matching=STORED, pair=OWN)
        expected = theirs[name].sel(scope=stored.scope)
        np.testing.assert_allclose(stored.transpose(*expected.dims), expected, atol=1e-12)


@pytest.mark.parametrize("pair", [OWN, UNRELATED])
def test_a_matched_alignment_equals_the_slow_one_with_the_student_reordered(exact_run, pair):
    lineages, member = exact_run.lineages, 1
    student, reference, teacher = (lineages[name] for name in ("student.different-init", "reference", "teacher"))
    partner = {OWN: 1, UNRELATED: 3}[pair]
    assert partner == member or partner != student.spec.origin.members[member]
    groups = list_unit_groups(student.spec.model)
    start, goal = student.load_state(0, member), reference.load_state(0, partner)
    stream = random_stream(exact_run.recipe.seed, "member", member, "symmetry_matching", WEIGHTS, partner)
    order = match_weights(groups, goal.__getitem__, start.__getitem__, stream).arrangement
    end, taught = student.load_state(student.last, member), teacher.load_state(teacher.last, partner)
    moved = torch.cat([order.arrange(name, end[name] - start[name]).flatten() for name in start])
    wanted = torch.cat([(taught[name] - goal[name]).flatten() for name in start])
    slow = float(moved @ wanted / moved.norm() / wanted.norm())
    found = results(exact_run).alignment.sel(
        condition="different-init", matching=WEIGHTS, pair=pair, member=member, step=student.last, scope=MODEL
    )
    assert float(found) == pytest.approx(slow, abs=1e-10)


def test_at_their_own_start_units_are_found_where_they_stand(tiny_run):
    data = results(tiny_run)
    for condition in ("same-init", "all-logits", "shuffled-carrier"):
        assert (data.moved_share.sel(condition=condition, pair=OWN) == 0).all()
        stored, *matched = (data.alignment.sel(condition=condition, matching=one, pair=OWN) for one in (STORED, *FITS))
        assert all(one.equals(stored.assign_coords(matching=one.matching)) for one in matched)
        assert (data.alignment_status.sel(condition=condition, pair=UNRELATED) == NO_PAIR).all()


def test_conditions_with_one_start_share_one_fit(tiny_run):
    data = results(tiny_run)
    pair = [data.start_agreement_matched.sel(condition=name) for name in ("different-init", "different-init-all-logits")]
    np.testing.assert_array_equal(pair[0], pair[1])


def test_a_twin_is_the_condition_that_starts_at_the_teachers_reference(tiny_run):
    data = results(tiny_run).isel(step=-1)
    for condition, twin in {"permuted-init": "same-init", "different-init-all-logits": "all-logits"}.items():
        expected = data.alignment.sel(condition=twin, matching=STORED, pair=OWN)
        np.testing.assert_array_equal(data.twin_alignment.sel(condition=condition), expected)
    assert (data.twin_alignment_status.sel(condition="same-init") == Missing.NOT_RUN).all()


def test_findings_stand_beside_their_nulls(tiny_run):
    found = tiny_run.findings.query("analysis == 'symmetry_matching'")
    assert set(found.condition) == set(ELSEWHERE)
    judged = found[found.verdict != ""]
    assert set(judged.quantity) == {"matched_alignment", "recovered_alignment", "matched_specific_alignment"}
    assert len(judged) == 3 * len(ELSEWHERE) * len(FITS)
    assert (found[found.verdict == ""].reason != "").all() and (found["null"] != "").all() and (found.n == 3).all()


def test_two_members_have_no_unrelated_pairs_and_the_report_says_so(tiny_recipe, tmp_path):
    run = run_experiment(load_recipe(tiny_recipe, ["members=2"]), tmp_path / "run", device="cpu", workers=0)
    analyze_run(run.path, ["symmetry_matching"], device="cpu", workers=0)
    data = results(run)
    assert (data.alignment_status.sel(condition="different-init", pair=UNRELATED) == NO_PAIR).all()
    assert not (data.alignment_status.sel(condition="permuted-init", matching=ACTIVATIONS, pair=UNRELATED) == NO_PAIR).any()
    assert "different-init has no unrelated pairs" in (run.path / "report/index.html").read_text()
