import json
import shutil
from functools import partial

import numpy as np
import pytest
import yaml

from mechsub.analyses.subspace_overlap import subspace_overlap
from mechsub.api import analyze_run, open_run
from mechsub.parameters.subspaces import NOT_RUN, OK, SPANS, ZERO
from mechsub.results import read_group, write_result
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
    assert (judged[judged.condition == "same-init"].scope == "plain mean over the 2 matrices that both moved").all()
    assert (judged[judged.condition == "all-logits"].scope == "plain mean over the 3 matrices that both moved").all()


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
