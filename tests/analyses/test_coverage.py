import numpy as np
import pytest

from mechsub.analyses.coverage import coverage
from mechsub.api import run_experiment
from mechsub.parameters.alignment import MODEL, STATUS, Missing
from mechsub.recipe import load_recipe

CONDITIONS = ("same-init", "different-init", "permuted-init", "noised-init", "all-logits")
SCOPES = ("layers.0.weight", "layer 1", MODEL)


@pytest.fixture(scope="module")
def result(tiny_run):
    return coverage(tiny_run)


def moved(run, name, member, step, scope=MODEL):
    """θ(step) − θ(0) over the tensors of a scope, read anew."""
    lineage = run.lineages[name]
    last = lineage.last if step is None else step
    first, then = (lineage.load_state(at, member) for at in (0, last))
    names = [tensor for tensor in first if scope in (MODEL, tensor, lineage.spec.tensors[tensor].layer)]
    return np.concatenate([(then[tensor].double() - first[tensor].double()).numpy().ravel() for tensor in names])


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_coverage_is_the_cosine_of_the_first_update_with_the_whole_way_of_the_teacher(tiny_run, result, condition, scope):
    for member in range(3):
        student, control = (moved(tiny_run, f"{role}.{condition}", member, 1, scope) for role in ("student", "control"))
        teacher, neutral = (moved(tiny_run, name, member, None, scope) for name in ("teacher", "neutral.relabelled"))
        cell = result.data.sel(condition=condition, taught="digits", member=member, scope=scope)
        assert float(cell.coverage) == pytest.approx(cosine(student, teacher), abs=1e-5)
        assert float(cell.coverage_of_control) == pytest.approx(cosine(control, teacher), abs=1e-5)
        assert float(cell.specific_coverage) == pytest.approx(cosine(student - control, teacher - neutral), abs=1e-5)
        assert float(cell.first_update_norm) == pytest.approx(np.linalg.norm(student), rel=1e-5)
        whole = moved(tiny_run, f"student.{condition}", member, None, scope)
        assert float(cell.displacement_norm) == pytest.approx(np.linalg.norm(whole), rel=1e-5)


def test_what_cannot_be_covered_says_why(result):
    cell = result.data.sel(condition="same-init", taught="digits")
    assert (cell.coverage_status.sel(scope="class head") == Missing.NO_SHARED_SUPPORT).all()
    assert (cell.coverage_status.sel(scope=MODEL) == Missing.OK).all()
    assert (result.data.sham_coverage_status.sel(condition="all-logits") == Missing.NOT_RUN).all()


def test_a_student_that_has_not_moved_and_one_of_another_width_have_no_coverage(tiny_recipe, tmp_path):
    settings = ["members=2", "student.optimizer={name: sgd, learning_rate: 1.0e-30}", "conditions={same-init: }"]
    still = run_experiment(load_recipe(tiny_recipe, settings), tmp_path / "still", device="cpu", workers=0)
    found = coverage(still)
    assert np.isnan(found.data.coverage).all()
    assert (found.data.coverage_status.sel(scope=MODEL) == Missing.ZERO_DISPLACEMENT).all()
    assert STATUS[Missing.ZERO_DISPLACEMENT].replace("_", " ") in found.summary[0]
    assert all(np.isnan(finding.estimate) and finding.n == 0 for finding in found.findings)


def test_findings_name_null_verdict_and_step(result):
    found = {(one.quantity, one.condition): one for one in result.findings if one.scope == "all parameters"}
    for condition in CONDITIONS:
        one = found["coverage", condition]
        assert one.step == 1 and one.n == 3 and one.verdict and "control's value" in one.null
        assert np.isfinite([one.null_low, one.null_high]).all()
        assert found["specific_coverage", condition].verdict
    assert found["sham_coverage", "same-init"].verdict == "" and found["sham_coverage", "same-init"].reason


def test_the_figures_show_students_beside_their_null(result):
    assert [figure.name for figure in result.figures] == ["coverage_by_condition", "coverage_by_scope"]
    for figure in result.figures:
        assert "null" in figure.caption and {"coverage", "coverage_of_control"} <= set(figure.variables)
