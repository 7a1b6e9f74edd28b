import numpy as np
import pytest

from mechsub.api import run_experiment
from mechsub.parameters.alignment import MODEL, Missing
from mechsub.recipe import load_recipe
from tests.helpers import measure


@pytest.fixture
def data(tiny_run):
    return tiny_run.results["parameter_alignment"].sel(taught="digits")


def displacement(run, lineage, member, step=None):
    opened = run.lineages[lineage]
    first, last = (opened.load_state(at, member) for at in (0, opened.steps[-1] if step is None else step))
    return np.concatenate([(last[name].double() - first[name].double()).numpy().ravel() for name in first])


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


def final(run, data, name, condition):
    return data[name].sel(condition=condition, scope=MODEL, step=run.lineages[f"student.{condition}"].steps[-1])


CONDITIONS = ("same-init", "different-init", "permuted-init", "noised-init", "all-logits")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("member", range(3))
def test_every_alignment_equals_the_slow_one(tiny_run, data, condition, member):
    student, control = (displacement(tiny_run, f"{role}.{condition}", member) for role in ("student", "control"))
    teacher, neutral = (displacement(tiny_run, name, member) for name in ("teacher", "neutral.relabelled"))
    expected = {
        "alignment": cosine(student, teacher),
        "alignment_of_control": cosine(control, teacher),
        "alignment_with_neutral": cosine(student, neutral),
        "control_adjusted_alignment": cosine(student - control, teacher),
        "specific_alignment": cosine(student - control, teacher - neutral),
        "projection": student @ teacher / (teacher @ teacher),
        "control_adjusted_projection": (student - control) @ teacher / (teacher @ teacher),
        "student_norm": np.linalg.norm(student),
        "teacher_norm": np.linalg.norm(teacher),
    }
    for name, value in expected.items():
        assert float(final(tiny_run, data, name, condition).sel(member=member)) == pytest.approx(value, abs=2e-5), name


def test_the_sham_is_two_controls_in_the_students_places(tiny_run, data):
    member = 2
    sham, control = (displacement(tiny_run, f"{role}.same-init", member) for role in ("sham", "control"))
    teacher, neutral = (displacement(tiny_run, name, member) for name in ("teacher", "neutral.relabelled"))
    found = float(final(tiny_run, data, "sham_alignment", "same-init").sel(member=member))
    assert found == pytest.approx(cosine(sham - control, teacher - neutral), abs=2e-5)
    assert (final(tiny_run, data, "sham_alignment_status", "all-logits") == Missing.NOT_RUN).all()


def test_an_init_mate_is_the_teacher_of_the_start(tiny_run, data):
    partners = tiny_run.lineages["student.different-init"].spec.origin.members
    for member, partner in enumerate(partners):
        expected = cosine(displacement(tiny_run, "student.different-init", member), displacement(tiny_run, "teacher", partner))
        found = final(tiny_run, data, "init_mate_alignment", "different-init").sel(member=member)
        assert float(found) == pytest.approx(expected, abs=2e-5)
    assert (final(tiny_run, data, "init_mate_alignment_status", "same-init") == Missing.NOT_RUN).all()


def test_every_nan_has_its_reason_and_every_number_none(tiny_run):
    for data in tiny_run.results.values():
        for name, variable in data.data_vars.items():
            if variable.dtype.kind == "f" and np.isnan(variable).any():
                assert (np.isnan(variable) == (data[f"{name}_status"] != 0)).all(), name


def test_norms_at_the_start_and_over_the_shared_support(tiny_run, data):
    teacher = np.linalg.norm(displacement(tiny_run, "teacher", 0))
    start = data.sel(condition="same-init", member=0, step=0, scope=MODEL)
    assert float(start.student_norm) == 0.0 and float(start.teacher_norm) == pytest.approx(teacher, rel=1e-5)
    last = data.sel(condition="same-init", member=0, step=data.step[-1])
    squares = [float(last.teacher_norm.sel(scope=scope)) ** 2 for scope in ("layer 0", "layer 1")]
    assert float(last.teacher_norm.sel(scope="shared support")) == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)


def test_a_close_pair_is_exact_in_every_tensor(tiny_recipe, tmp_path):
    # In float32 a student and its control that hardly differ: Gram entries alone would leave rounding.
    recipe = load_recipe(tiny_recipe, ["student.optimizer.learning_rate=1e-7", "members=2"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    measure(run.path, "parameter_alignment")
    data = run.results["parameter_alignment"].sel(
        condition="noised-init", taught="digits", step=run.lineages["student.noised-init"].steps[-1]
    )
    student, control, teacher = (
        run.lineages[name].load_state(run.lineages[name].steps[-1], 1)
        for name in ("student.noised-init", "control.noised-init", "teacher")
    )
    start = run.lineages["teacher"].load_state(0, 1)
    for tensor in ("layers.0.weight", "layers.1.weight"):
        difference, moved = (
            (left[tensor].double() - right[tensor].double()).numpy().ravel()
            for left, right in ((student, control), (teacher, start))
        )
        found = float(data.control_adjusted_alignment.sel(member=1, scope=tensor))
        assert found == pytest.approx(cosine(difference, moved), abs=1e-5)


def test_heads_that_only_one_side_moves_have_no_shared_support(data):
    cell = data.alignment_status.sel(condition="same-init", step=data.step[-1])
    for scope in ("class_head.weight", "auxiliary_head.bias", "class head", "auxiliary head"):
        assert (cell.sel(scope=scope) == Missing.NO_SHARED_SUPPORT).all()
    assert (data.alignment_status.sel(condition="all-logits", scope="class head", step=data.step[-1]) == 0).all()
    assert (data.alignment_status.sel(step=0) == Missing.ZERO_DISPLACEMENT).all()


def test_findings_name_scope_null_and_n(tiny_run):
    found = tiny_run.findings.query("analysis == 'parameter_alignment'")
    assert set(found.quantity) >= {"alignment", "specific_alignment", "sham_alignment", "neutral_norm_ratio"}
    assert (found.n == 3).all()
    assert (found["null"] != "").all() and (found.scope != "").all() and (found.formula != "").all()
    assert (found.verdict != "").sum() == 7 + 7 + 2
    assert (found[found.verdict == ""].reason != "").all()


def test_permuted_students_are_explained_in_the_report(tiny_run):
    page = (tiny_run.path / "report/index.html").read_text()
    assert "stored in other coordinates" in page
