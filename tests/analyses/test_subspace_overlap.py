import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import load_file

from mechsub.analyses.subspace_overlap import subspace_overlap
from mechsub.api import analyze_run, open_run
from mechsub.checkpoints import write_tensors
from mechsub.lineages import checkpoint_name
from mechsub.parameters.subspace_cases import ALONG_TRAINING, AT_THE_END, OF_TEACHERS
from mechsub.parameters.subspaces import NOT_FINITE, NOT_RUN, OK, SPANS, ZERO
from mechsub.results import read_group, read_result, write_result
from mechsub.run import Run

MATRICES = ("layers.0.weight", "layers.1.weight")
HEADS = ("class_head.weight", "auxiliary_head.weight")


@pytest.fixture
def data(tiny_run):
    return tiny_run.results["subspace_overlap"].sel(taught="digits")


def last(run, lineage):
    return run.lineages[lineage].steps[-1]


def moved(run, lineage, member, tensor, start=None):
    end = run.lineages[lineage].load_tensor(last(run, lineage), tensor, member).double()
    begin = run.lineages[start or lineage]
    return (end - begin.load_tensor(begin.steps[-1] if start else 0, tensor, member).double()).numpy()


def overlap(first, second, k):
    """[left, right], from plain SVDs."""
    (left, _, right), (other_left, _, other_right) = (np.linalg.svd(one, full_matrices=False) for one in (first, second))
    pairs = ((left.T[:k], other_left.T[:k]), (right[:k], other_right[:k]))
    return np.array([((own @ other.T) ** 2).sum() / k for own, other in pairs])


@pytest.mark.parametrize("condition", ["same-init", "different-init", "permuted-init", "all-logits"])
@pytest.mark.parametrize("member", range(3))
def test_every_overlap_equals_the_slow_one(tiny_run, data, condition, member):
    step = last(tiny_run, f"student.{condition}")
    tensors = (*MATRICES, HEADS[0]) if condition == "all-logits" else MATRICES
    for k in (1, 2, 4):
        found, differences = [], []
        for tensor in tensors:
            student, control = (moved(tiny_run, f"{role}.{condition}", member, tensor) for role in ("student", "control"))
            teacher, neutral = (moved(tiny_run, name, member, tensor) for name in ("teacher", "neutral.relabelled"))
            difference = moved(tiny_run, f"student.{condition}", member, tensor, start=f"control.{condition}")
            pair = moved(tiny_run, "teacher", member, tensor, start="neutral.relabelled")
            expected = {
                "overlap": overlap(student, teacher, k),
                "overlap_of_control": overlap(control, teacher, k),
                "overlap_with_neutral": overlap(student, neutral, k),
                "specific_overlap": overlap(difference, pair, k),
            }
            expected["overlap_excess"] = expected["overlap"] - expected["overlap_of_control"]
            for name, values in expected.items():
                cell = data[name].sel(condition=condition, member=member, scope=tensor, k=k)
                cell = cell.sel(step=step) if "step" in cell.dims else cell
                np.testing.assert_allclose(cell.values, [*values, values.mean()], atol=1e-4, err_msg=name)
            np.testing.assert_allclose(
                data.teacher_overlap_with_neutral.sel(member=member, scope=tensor, k=k, side=["left", "right"]),
                overlap(teacher, neutral, k),
                atol=1e-4,
            )
            found.append(expected["overlap"].mean())
            differences.append(expected["overlap_excess"].mean())
        model = data.sel(condition=condition, member=member, step=step, scope="model", side="both", k=k)
        assert float(model.overlap) == pytest.approx(np.mean(found), abs=1e-4)
        assert float(model.overlap_excess) == pytest.approx(np.mean(differences), abs=1e-4)


def test_the_sham_is_two_controls_in_the_students_places(tiny_run, data):
    for tensor in MATRICES:
        sham = moved(tiny_run, "sham.same-init", 1, tensor, start="control.same-init")
        pair = moved(tiny_run, "teacher", 1, tensor, start="neutral.relabelled")
        cell = data.sham_overlap.sel(condition="same-init", member=1, scope=tensor, k=2, side=["left", "right"])
        np.testing.assert_allclose(cell, overlap(sham, pair, 2), atol=1e-4)
    assert (data.sham_overlap_status.sel(condition="all-logits") == NOT_RUN).all()


def test_ranks_and_shares_equal_the_slow_ones(tiny_run, data):
    spectra = read_group(tiny_run.path / "results" / "subspace_overlap.h5", "spectra").sel(taught="digits")
    names = {
        "student": "student.same-init",
        "control": "control.same-init",
        "teacher": "teacher",
        "neutral": "neutral.relabelled",
    }
    for who, lineage in names.items():
        values = np.linalg.svd(moved(tiny_run, lineage, 2, MATRICES[1]), compute_uv=False)
        shares = values**2 / (values**2).sum()
        cell = data.sel(condition="same-init", who=who, member=2, scope=MATRICES[1])
        assert float(cell.effective_rank) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        assert float(cell.stable_rank) == pytest.approx(1 / shares[0], rel=1e-5)
        stored = spectra.sel(condition="same-init", who=who, member=2, matrix=MATRICES[1])
        np.testing.assert_allclose(stored.singular_values[: len(values)], values, rtol=1e-4, atol=1e-6)
        assert float(stored.backward_error) < 1e-7
    mean = data.effective_rank.sel(condition="same-init", who="teacher", scope=[*MATRICES, HEADS[0]]).mean("scope")
    np.testing.assert_allclose(data.effective_rank.sel(condition="same-init", who="teacher", scope="model"), mean)
    rows = data.cumulative_share.sel(condition="same-init", scope="model")
    assert (rows.diff("value") >= -1e-12).all() and (abs(rows[:, -1] - 1) < 1e-6).all()


def test_the_stored_angles_are_those_of_the_overlaps(tiny_run, data):
    angles = read_group(tiny_run.path / "results" / "subspace_overlap.h5", "principal_angles").sel(taught="digits")
    own = angles.principal_angles.sel(pair="student and teacher", condition="same-init", matrix=MATRICES[0], k=2)
    step = last(tiny_run, "student.same-init")
    expected = data.overlap.sel(condition="same-init", scope=MATRICES[0], k=2, step=step, side=["left", "right"])
    np.testing.assert_allclose((np.cos(own[..., :2]) ** 2).mean("angle"), expected, atol=1e-9)
    assert np.isnan(own[..., 2:]).all()
    assert (np.isnan(angles.principal_angles) == (angles.principal_angles_status != OK)).all()


def test_what_has_no_overlap_says_why(tiny_run, data):
    cell = data.overlap_status.sel(condition="same-init", step=last(tiny_run, "student.same-init"))
    for head in HEADS:  # a student by auxiliary logits moves one head, its teacher the other
        assert (cell.sel(scope=head) == ZERO).all()
    assert (data.overlap_status.sel(step=0) == ZERO).all()
    spanned = cell.sel(scope=MATRICES[1], k=8)  # 8 × 12: its outputs have 8 dimensions
    assert (spanned.sel(side="left") == SPANS).all() and (spanned.sel(side="both") == spanned.sel(side="right")).all()


def test_the_random_line_is_that_of_the_matrices_that_have_an_overlap(data):
    cell = data.haar_overlap.sel(condition="same-init", k=4)
    assert cell.sel(scope="model", side="both") == pytest.approx(np.mean([4 / 12, 4 / 64, 4 / 8, 4 / 12]))
    assert cell.sel(scope=MATRICES[0], side="right") == pytest.approx(4 / 64)
    assert np.isnan(cell.sel(scope=HEADS[0])).all()
    low, high = (data[f"haar_{side}"].sel(condition="same-init", k=4) for side in ("low", "high"))
    known = np.isfinite(cell)
    assert (low < cell).where(known, True).all() and (cell < high).where(known, True).all()


def test_stored_order_changes_no_spectrum_and_only_the_sides_that_it_stores_otherwise(tiny_run, data):
    same, permuted = (data.sel(condition=name) for name in ("same-init", "permuted-init"))
    student = dict(who="student", scope=list(MATRICES))
    np.testing.assert_allclose(same.effective_rank.sel(student), permuted.effective_rank.sel(student), rtol=1e-3)
    end = dict(step=last(tiny_run, "student.same-init"), scope=MATRICES[0], k=4)
    inputs, outputs = (abs((same.overlap - permuted.overlap).sel(end).sel(side=side)) for side in ("right", "left"))
    assert (inputs < 1e-3).all() and (outputs > 1e-2).any()


def test_findings_name_scope_null_and_n(tiny_run):
    found = tiny_run.findings.query("analysis == 'subspace_overlap'")
    judged = found.query("quantity == 'subspace_overlap'")
    assert len(judged) == 7 and (judged.verdict != "").all() and (judged.margin == 0.05).all()
    assert (found[found.quantity != "subspace_overlap"].verdict == "").all() and (found.reason != "").all()
    assert (found.n == 3).all() and (found["null"] != "").all() and (found.formula != "").all()
    for condition, num in (("same-init", 2), ("all-logits", 3)):
        scope = f"plain mean over the {num} matrices where student, control and teacher have 4 directions"
        assert (judged[judged.condition == condition].scope == scope).all()


def test_a_run_that_was_begun_without_the_settings_of_subspaces_is_analysed(tiny_run, tmp_path):
    path = tmp_path / "old"
    dump_recipe = partial(yaml.safe_dump, sort_keys=False)
    shutil.copytree(tiny_run.path, path)
    recipe, header = path / "recipe.yaml", path / "run.json"
    for file, read, write in ((recipe, yaml.safe_load, dump_recipe), (header, json.loads, json.dumps)):
        content = read(file.read_text())
        verdict = content.get("recipe", content)["verdict"]
        del verdict["subspace_rank"], verdict["subspace_margin"]
        file.write_text(write(content))
    analyze_run(path, ["subspace_overlap"], device="cpu", workers=0)
    assert open_run(path).recipe.verdict.subspace_rank == 4
    assert open_run(path).results["subspace_overlap"].overlap.equals(tiny_run.results["subspace_overlap"].overlap)


class Uncontrolled(Run):
    """A run that was adopted without controls and without a neutral teacher."""

    neutral = None

    def control(self, condition):
        return None

    def sham(self, condition):
        return None


def test_a_run_without_controls_has_overlaps_and_no_verdict(tiny_run, tmp_path):
    result = subspace_overlap(Uncontrolled(tiny_run.directory))
    assert result.data.overlap.equals(tiny_run.results["subspace_overlap"].overlap)
    for name in ("overlap_of_control", "overlap_excess", "specific_overlap", "teacher_overlap_with_neutral"):
        assert (result.data[f"{name}_status"] == NOT_RUN).all() and np.isnan(result.data[name]).all()
    assert {finding.verdict for finding in result.findings} == {""}
    assert "give --control" in result.findings[0].reason
    assert any("there is no control" in sentence for sentence in result.summary)
    write_result(tmp_path / "result.h5", "subspace_overlap", {}, "0", result)  # it refuses a NaN without a reason


def test_a_run_without_controls_names_no_null_in_its_captions(tiny_run):
    figures = subspace_overlap(Uncontrolled(tiny_run.directory)).figures
    assert [figure.name for figure in figures] == [
        "subspace_overlap_scopes",
        "displacement_spectra",
        "subspace_overlap_training",
    ]
    for figure in figures:
        assert "there is no control" in figure.caption.lower() and "the null is" not in figure.caption.lower()


def spoil(run, path, lineage, step, member, tensor):
    """A copy of a run in which one number of one checkpoint is NaN; its analyses are called directly."""
    shutil.copytree(run.path, path)
    file = path / checkpoint_name(lineage, step)
    tensors = load_file(file)
    tensors[tensor][member, 0, 0] = np.nan
    write_tensors(file, tensors, {})
    return subspace_overlap(open_run(path))


SPOILT = {
    "student.same-init": ({"overlap", "overlap_excess", "overlap_with_neutral", "specific_overlap"}, ["same-init"]),
    "control.same-init": ({"overlap_of_control", "overlap_excess", "specific_overlap", "sham_overlap"}, ["same-init"]),
    "teacher": ({*ALONG_TRAINING, *AT_THE_END, *OF_TEACHERS} - {"overlap_with_neutral", "overlap_with_other_traits"}, None),
}


@pytest.mark.parametrize("lineage", SPOILT)
def test_a_nan_spoils_the_scopes_that_it_lies_in_and_no_other_number(tiny_run, tmp_path, data, lineage):
    step, member, tensor = last(tiny_run, lineage), 1, MATRICES[0]
    result = spoil(tiny_run, tmp_path / "spoilt", lineage, step, member, tensor)
    names, conditions = SPOILT[lineage]
    found = result.data.sel(taught="digits")
    info = tiny_run.reference.spec.tensors[tensor]
    touched = [name for name in (tensor, info.layer, f"every {info.kind}", "model") if name in found.scope.values]
    for name in {*ALONG_TRAINING, *AT_THE_END, *OF_TEACHERS}:
        is_new = found[f"{name}_status"].isin([NOT_FINITE]) & (data[f"{name}_status"] != NOT_FINITE)
        own = found[name].where(~is_new)
        xr.testing.assert_allclose(own, data[name].where(~is_new))
        assert is_new.any() == (name in names), name
        assert not is_new.sel(member=[0, 2]).any() and not is_new.drop_sel(scope=touched).any()
        if name in names:
            chosen = is_new.sel(member=member, scope=touched)
            if "condition" in chosen.dims and conditions:
                assert not chosen.drop_sel(condition=conditions).any()
                chosen = chosen.sel(condition=conditions)
            at_end = chosen.isel(step=-1) if "step" in chosen.dims else chosen
            assert at_end.sel(k=1).isel(condition=[0]).all() if "condition" in at_end.dims else at_end.sel(k=1).all()
    told = [sentence for sentence in result.summary if sentence.startswith("Not finite")]
    assert len(told) == 1
    for word in (f"tensor {tensor}", f"of {lineage} at step {step}", f"member {member}", ".safetensors"):
        assert word in told[0]
    judged = {finding.condition: finding for finding in result.findings if finding.quantity == "subspace_overlap"}
    assert {name for name, finding in judged.items() if finding.n == 2} == set(conditions or judged)
    write_result(tmp_path / "result.h5", "subspace_overlap", {}, "0", result)
    assert any(re.search(r"n = 2( to 3)?\)", figure.caption) for figure in result.figures)


def make_low_rank(path, lineage, tensor, members, rank):
    """Leave the leading directions of what a lineage's last step moved in one tensor."""
    steps = open_run(path).lineages[lineage].steps
    start, end = (load_file(path / checkpoint_name(lineage, step)) for step in (steps[0], steps[-1]))
    for member in members:
        left, values, right = torch.linalg.svd((end[tensor][member] - start[tensor][member]).double(), full_matrices=False)
        moved = (left[:, :rank] * values[:rank]) @ right[:rank]
        end[tensor][member] = (start[tensor][member].double() + moved).to(end[tensor].dtype)
    write_tensors(path / checkpoint_name(lineage, steps[-1]), end, {})


def test_estimate_null_and_difference_are_of_the_same_matrices(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    make_low_rank(tmp_path / "run", "control.same-init", MATRICES[1], [0], rank=2)
    make_low_rank(tmp_path / "run", "student.same-init", MATRICES[0], [2], rank=3)
    result = subspace_overlap(open_run(tmp_path / "run"))
    found = next(one for one in result.findings if (one.quantity, one.condition) == ("subspace_overlap", "same-init"))
    run, step = open_run(tmp_path / "run"), last(tiny_run, "student.same-init")
    expected = [[], []]
    for member, tensors in enumerate((MATRICES[:1], MATRICES, MATRICES[1:])):
        for values, role in zip(expected, ("student", "control"), strict=True):
            pairs = [(moved(run, f"{role}.same-init", member, t), moved(run, "teacher", member, t)) for t in tensors]
            values.append(np.mean([overlap(*pair, 4).mean() for pair in pairs]))
    assert found.estimate == pytest.approx(np.mean(expected[0]), abs=1e-4)
    assert (found.null_low + found.null_high) / 2 == pytest.approx(np.mean(expected[1]), abs=1e-4)
    excess = result.data.overlap_excess.sel(condition="same-init", taught="digits", step=step, scope="model", side="both", k=4)
    np.testing.assert_allclose(excess, np.subtract(*expected), atol=1e-4)
    assert "over the 1 to 2 (by member) matrices" in found.scope
    sentence = next(one for one in result.summary if one.startswith("same-init"))
    told = [
        float(number.replace("−", "-")) for number in re.findall(r"(?:overlap|control's|difference) ([−\d.]+) \[", sentence)
    ]
    assert told[0] - told[1] == pytest.approx(told[2], abs=0.0011) and "1 to 2 (by member)" in sentence


def test_displacements_of_fewer_directions_than_k_have_a_rank_and_a_reason(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    for tensor in MATRICES:
        make_low_rank(tmp_path / "run", "student.same-init", tensor, range(3), rank=2)
    result = subspace_overlap(open_run(tmp_path / "run"))
    found = {one.quantity: one for one in result.findings if one.condition == "same-init"}
    assert found["subspace_overlap"].n == 0 and "rank 2 < k = 4 of the student" in found["subspace_overlap"].reason
    assert found["displacement_effective_rank"].n == 3 and 1 < found["displacement_effective_rank"].estimate <= 2
    sentence = next(one for one in result.summary if one.startswith("same-init"))
    assert "rank 2 < k = 4 of the student" in sentence and "effective rank" in sentence


def test_the_random_line_of_specific_overlap_is_that_of_its_own_matrices(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "run")
    make_low_rank(tmp_path / "run", "student.same-init", MATRICES[0], range(3), rank=2)
    data = subspace_overlap(open_run(tmp_path / "run")).data.sel(
        taught="digits", condition="same-init", scope="model", side="both"
    )
    assert float(data.haar_overlap.sel(k=4)) == pytest.approx(np.mean([4 / 8, 4 / 12]))
    assert float(data.haar_specific_overlap.sel(k=4)) == pytest.approx(np.mean([4 / 12, 4 / 64, 4 / 8, 4 / 12]))


def test_a_model_without_matrices_has_a_result_that_says_so(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mechsub.analyses.subspace_overlap.list_matrices", lambda tensors: [])
    result = subspace_overlap(open_run(tiny_run.path))
    assert not result.findings and "no matrix" in result.summary[0]
    write_result(tmp_path / "result.h5", "subspace_overlap", {}, "0", result)
    assert list(read_result(tmp_path / "result.h5").summary) == list(result.summary)


def test_there_is_one_sentence_a_condition(tiny_run):
    summary = subspace_overlap(tiny_run).summary
    for condition in tiny_run.conditions:
        told = [sentence for sentence in summary if sentence.startswith(f"{condition}:")]
        assert len(told) == 1 and "positive" not in told[0]
