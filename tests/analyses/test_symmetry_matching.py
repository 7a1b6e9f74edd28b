import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr

from mechsub.analyses.symmetry_matching import (
    ACTIVATIONS,
    FITS,
    NO_PAIR,
    OWN,
    QUANTITIES,
    SAME_FILE,
    STORED,
    TOO_MANY,
    UNRELATED,
    WEIGHTS,
    _self_tests,
    symmetry_matching,
)
from mechsub.api import analyze_run, open_run, run_experiment
from mechsub.checkpoints import load_stacked, write_tensors
from mechsub.families.classifier.symmetry import list_unit_groups
from mechsub.parameters.alignment import MODEL, Missing
from mechsub.parameters.matching import match_weights
from mechsub.recipe import load_recipe
from mechsub.run import Run
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


def spoil(run, tmp_path, lineage, step, member):
    """A copy of a run with one number of one member's checkpoint that is NaN."""
    shutil.copytree(run.path, tmp_path / "copy")
    copy = open_run(tmp_path / "copy")
    path = copy.lineages[lineage].checkpoint(step)
    tensors = load_stacked(path)
    tensors["layers.1.weight"][member, 0, 0] = float("nan")
    write_tensors(path, tensors, {})
    return copy


def same_but(found, clean):
    """Where a value is gone that was there; all other values are as they were, and what is gone says why."""
    gone = {}
    for quantity in QUANTITIES:
        ours, theirs = found[quantity.name], clean[quantity.name]
        gone[quantity.name] = np.isnan(ours) & np.isfinite(theirs)
        assert (found[f"{quantity.name}_status"].values[gone[quantity.name]] == Missing.NOT_FINITE).all()
        xr.testing.assert_allclose(ours, theirs.where(~gone[quantity.name]), atol=1e-9)
    return xr.Dataset(gone)


def held_by(gone, *dims):
    """The places along some dimensions at which anything is gone."""
    kept = gone.any([dim for dim in gone.dims if dim not in dims])
    return {
        tuple(str(point[dim].values) for dim in dims)
        for point in kept.stack(at=dims).at
        if bool(kept.sel(dict(zip(dims, point.item(), strict=True))))
    }


@pytest.mark.parametrize("who", ["student", "control"])
def test_a_checkpoint_that_is_not_finite_costs_its_own_numbers_and_is_named(tiny_run, tmp_path, who):
    name = f"{who}.permuted-init"
    last = tiny_run.lineages[name].last
    result = symmetry_matching(spoil(tiny_run, tmp_path, name, last, 1))
    gone = same_but(result.data, tiny_run.results["symmetry_matching"])
    quantity = {"student": "alignment", "control": "alignment_of_control"}[who]
    assert held_by(gone[quantity], "condition", "member", "step") == {("permuted-init", "1", str(last))}
    assert not gone[{"student": "alignment_of_control", "control": "alignment"}[who]].any()
    assert gone[quantity].sel(condition="permuted-init", member=1, step=last, scope=MODEL).all()
    assert [line for line in result.summary if f"tensor layers.1.weight of {name} at step {last}, member 1" in line]
    tests = [found for found in result.findings if found.quantity == "matching_self_test"]
    assert [found.n for found in tests] == ([2, 2] if who == "student" else [3, 3])
    assert all("within the bound" in found.reason for found in tests)
    assert "n = 2 to 3" in result.figures[0].caption or who == "control"


def test_a_teacher_that_is_not_finite_is_named_as_itself_where_it_is_shown_in_another_order(tiny_run, tmp_path):
    teacher = tiny_run.lineages["teacher"]
    result = symmetry_matching(spoil(tiny_run, tmp_path, "teacher", teacher.last, 1))
    gone = same_but(result.data, tiny_run.results["symmetry_matching"])
    assert held_by(gone.alignment.sel(pair=OWN), "member") == {("1",)}
    assert gone.alignment.sel(pair=UNRELATED, condition="permuted-init", matching=WEIGHTS, scope=MODEL).any("step").sum() == 1
    named = [line for line in result.summary if line.startswith("Not finite")]
    assert len(named) == 1 and f"of teacher at step {teacher.last}, member 1" in named[0]


@pytest.mark.parametrize("lineage", ["student.permuted-init", "student.same-init"])
def test_a_start_that_is_not_finite_is_not_matched_and_others_are(tiny_run, tmp_path, lineage):
    condition = lineage.removeprefix("student.")
    result = symmetry_matching(spoil(tiny_run, tmp_path, lineage, 0, 1))
    data, clean = result.data, tiny_run.results["symmetry_matching"]
    gone = same_but(data, clean)
    assert held_by(gone.alignment, "condition", "member") == {(condition, "1")}
    assert (data.alignment_status.sel(condition=condition, member=1, matching=list(FITS), pair=OWN) == Missing.NOT_FINITE).any()
    for name in ("start_agreement_stored", "start_agreement_matched", "moved_share"):
        lost = np.isnan(data[name]) & np.isfinite(clean[name])
        assert held_by(lost, "condition", "member") == {(condition, "1")}
        assert (data[f"{name}_status"].values[lost] == Missing.NOT_FINITE).all()
        xr.testing.assert_allclose(data[name], clean[name].where(~lost))
    assert any(f"of {lineage} at step 0, member 1" in line for line in result.summary)


def test_a_reference_that_is_not_finite_leaves_its_partners_unmatched(tiny_run, tmp_path):
    result = symmetry_matching(spoil(tiny_run, tmp_path, "reference", 0, 2))
    data, clean = result.data, tiny_run.results["symmetry_matching"]
    same_but(data, clean)
    for pair in (OWN, UNRELATED):
        lost = np.isnan(data.moved_share.sel(pair=pair)) & np.isfinite(clean.moved_share.sel(pair=pair))
        assert (lost.sel(condition="permuted-init").sum("member") == 1).all()
    assert any("of reference at step 0, member 2" in line for line in result.summary)


def test_a_start_read_from_the_references_own_file_has_no_agreement(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "copy")
    for name in ("student.same-init", "control.same-init"):
        folder = tmp_path / "copy" / "lineages" / name
        spec = json.loads((folder / "lineage.json").read_text())
        (folder / "lineage.json").write_text(json.dumps({**spec, "holds_start": False}))
        (folder / "step-00000000.safetensors").unlink()
    result = symmetry_matching(open_run(tmp_path / "copy"))
    own = result.data.sel(condition="same-init", pair=OWN)
    assert np.isnan(own.start_agreement_matched).all() and (own.start_agreement_matched_status == SAME_FILE).all()
    assert (own.moved_share == 0).all()
    xr.testing.assert_allclose(result.data.alignment, tiny_run.results["symmetry_matching"].alignment, atol=1e-9)
    assert "In same-init the start is the reference itself: there was nothing to match." in result.summary
    found = [line for line in result.summary if line.startswith("At the teachers' own start")]
    assert len(found) == 1 and "same-init" not in found[0]


def test_groups_over_the_bound_are_not_matched_and_the_report_says_why(tiny_run, monkeypatch):
    monkeypatch.setattr("mechsub.analyses.symmetry_matching.MOST_UNITS", 10)
    result = symmetry_matching(open_run(tiny_run.path))
    assert (result.data.alignment_status.sel(condition="permuted-init", matching=list(FITS)) == TOO_MANY).all()
    assert result.summary[0].startswith("Nothing was matched: ") and "12 hidden units" in result.summary[0]
    assert np.isfinite(
        result.data.alignment.sel(condition="permuted-init", matching=STORED, pair=OWN, scope=MODEL)[..., 1:]
    ).all()


def test_without_control_and_neutral_teacher_captions_name_no_null_that_is_not_there(tiny_run, monkeypatch):
    monkeypatch.setattr(Run, "control", lambda run, condition: None)
    monkeypatch.setattr(Run, "neutral", property(lambda run: None))
    result = symmetry_matching(open_run(tiny_run.path))
    assert {found.quantity for found in result.findings if found.verdict} == {"recovered_alignment"}
    assert not any(
        "control" in figure.caption or "control" in json.dumps(figure.spec["layer"][1]["encoding"]["color"])
        for figure in result.figures[:1]
    )
    assert not any("its control" in line for line in result.summary)
    for name in ("alignment_of_control", "control_adjusted_alignment", "specific_alignment"):
        assert np.isnan(result.data[name]).all() and (result.data[f"{name}_status"] != 0).all()


def test_a_self_test_needs_values_on_both_sides(tiny_run):
    data = tiny_run.results["symmetry_matching"].copy(deep=True)
    where = {"condition": "permuted-init", "matching": WEIGHTS, "pair": OWN, "member": 0, "step": data.step[-1]}
    data.alignment.loc[{**where, "scope": MODEL}] = np.nan
    weights, activations = _self_tests(tiny_run, data)
    assert "beyond its bound: 1 values" in weights.reason and "within the bound" in activations.reason
    data.alignment_status.loc[{"condition": "permuted-init", "scope": MODEL}] = Missing.NOT_FINITE
    assert all(
        found.n == 0 and "not testable" in found.reason and np.isnan(found.estimate) for found in _self_tests(tiny_run, data)
    )
