import numpy as np
import pytest
import torch

from mechsub.analyses.first_order_theory import TOLERANCE, first_order_theory
from mechsub.gradients.first_order import imitation_step
from mechsub.gradients.losses import mean_gradient
from mechsub.parameters.alignment import MODEL

ELIGIBLE = ("same-init", "all-logits")
MEMBER = 1


@pytest.fixture(scope="module")
def result(tiny_run):
    return first_order_theory(tiny_run)


def flat(vector):
    return np.concatenate([value.double().numpy().ravel() for value in vector.values()])


def moved(run, name, step=None):
    lineage = run.lineages[name]
    first, then = (lineage.load_state(at, MEMBER) for at in (0, lineage.last if step is None else step))
    return {key: then[key].double() - first[key].double() for key in first}


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


def slow_prediction(run, condition, displacement):
    """G d by the difference of two gradients in float64, at θ₀ ± a thousandth of d."""
    student = run.student(condition, "digits")
    logits = run.family.imitated_logits(student, MEMBER, 256)
    model = run.family.load_model(student, 0, MEMBER).double()
    found = []
    for scale in (1e-3, -1e-3):
        teacher = run.family.load_model(student, 0, MEMBER).double()
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter += scale * displacement[name]
        found.append(flat(imitation_step(model, teacher, logits)) / 2e-3)
    return found[0] - found[1]


@pytest.mark.parametrize("condition", ELIGIBLE)
def test_every_number_equals_the_slow_one(tiny_run, result, condition):
    teacher, neutral = moved(tiny_run, "teacher"), moved(tiny_run, "neutral.relabelled")
    by_teacher, by_neutral = (slow_prediction(tiny_run, condition, one) for one in (teacher, neutral))
    student = tiny_run.student(condition, "digits")
    start = tiny_run.family.load_model(student, 0, MEMBER)
    measured = -flat(mean_gradient(start, tiny_run.family.imitation_losses(student, MEMBER, 256)))
    cell = result.data.sel(condition=condition, taught="digits", member=MEMBER, scope=MODEL)
    expected = {
        "predicted_cosine": cosine(by_teacher, flat(teacher)),
        "predicted_cosine_of_neutral": cosine(by_neutral, flat(teacher)),
        "linearisation_cosine": cosine(by_teacher, measured),
        "linearisation_error": np.linalg.norm(measured - by_teacher) / np.linalg.norm(by_teacher),
        "predicted_norm": np.linalg.norm(by_teacher),
        "measured_norm": np.linalg.norm(measured),
    }
    for name, value in expected.items():
        assert float(cell[name]) == pytest.approx(value, rel=5e-3, abs=2e-3), name
    for step in (step for step in student.steps if step > 0):
        at = cell.sel(step=step)
        own, control = (flat(moved(tiny_run, f"{role}.{condition}", step)) for role in ("student", "control"))
        assert float(at.prediction_of_student) == pytest.approx(cosine(own, by_teacher), abs=2e-3)
        assert float(at.prediction_of_control) == pytest.approx(cosine(control, by_teacher), abs=2e-3)
        assert float(at.prediction_from_neutral) == pytest.approx(cosine(own, by_neutral), abs=2e-3)


def test_the_prediction_never_points_away_from_the_teacher(result):
    cells = result.data.predicted_cosine.sel(condition=list(ELIGIBLE), scope=MODEL)
    assert (cells > 0).all()


def test_the_self_test_keeps_its_tolerance(result):
    errors = result.data.self_test_error.values
    assert errors[-1] < TOLERANCE and (np.diff(errors) < 0).all()
    found = next(one for one in result.findings if one.quantity == "self_test_error")
    assert found.estimate == errors[-1] and found.n == 1 and "within the tolerance" in found.reason


def test_other_starts_and_other_outputs_have_no_prediction(result):
    flags = result.data.predicted_cosine_status.attrs["flag_meanings"].split()
    for condition, reason in (
        ("different-init", "starts_elsewhere"),
        ("permuted-init", "starts_elsewhere"),
        ("shuffled-carrier", "not_its_teachers_outputs"),
    ):
        assert (result.data.predicted_cosine_status.sel(condition=condition) == flags.index(reason)).all()
        assert np.isnan(result.data.prediction_of_student.sel(condition=condition)).all()
        assert any(sentence.startswith(f"{condition}: no prediction") for sentence in result.summary)


def test_findings_hold_the_student_against_its_control(result):
    found = {(one.quantity, one.condition): one for one in result.findings}
    for condition in ELIGIBLE:
        for quantity, step in (("prediction_of_first_update", 1), ("prediction_of_displacement", 6)):
            one = found[quantity, condition]
            assert one.step == step and one.verdict and np.isfinite([one.null_low, one.null_high]).all() and one.n == 3
        assert found["predicted_cosine", condition].verdict == "" and found["predicted_cosine", condition].reason
    assert {figure.name for figure in result.figures} == {"first_order_prediction", "first_order_self_test"}
