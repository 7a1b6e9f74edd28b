import numpy as np
import pytest
import torch
from torch.nn import functional

from mechsub.api import open_run, run_experiment
from mechsub.parameters.alignment import MODEL
from tests.helpers import measure

MEMBER, CONDITION = 1, "same-init"


@pytest.fixture(scope="module")
def kept_run(tiny_recipe, tmp_path_factory):
    """The optimizer's state at every one of the first steps, in float64."""
    out = tmp_path_factory.mktemp("kept") / "run"
    settings = ["checkpoints={num: 7, spacing: linear, optimizer_state: true}", "model.dtype=float64"]
    settings += ["conditions={same-init: {}, different-init: {}, shuffled-carrier: {}}", "student.optimizer.name=adamw"]
    settings += ["student.optimizer.weight_decay=0.1"]
    run_experiment(tiny_recipe, out, settings, device="cpu", workers=0)
    measure(out, "gradient_overlap")
    return open_run(out)


def flat(tensors, model):
    return torch.cat([tensors[name].double().flatten() for name, _ in model.named_parameters()])


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return flat(found, model)


def cosine(first, second):
    return float(first @ second / (first.norm() * second.norm()))


@pytest.mark.parametrize("role", ["student", "control"])
def test_every_cosine_is_that_of_plain_gradients(kept_run, role):
    run, data = kept_run, kept_run.results["gradient_overlap"]
    step = run.student(CONDITION, "digits").steps[2]
    lineage = run.student(CONDITION, "digits") if role == "student" else run.control(CONDITION)
    model = run.family.load_model(lineage, step, MEMBER)
    imitation = run.family.imitation_losses(lineage, MEMBER, 96)
    images, labels = run.family._images, run.family._labels["digits"]
    trait = gradient(model, functional.cross_entropy(model(images)[:, :10], labels))
    imitates = gradient(model, imitation.compute(model, range(96)).mean())
    teacher = run.teacher("digits")
    moved = flat(teacher.load_state(teacher.last, MEMBER), model) - flat(run.reference.load_state(0, MEMBER), model)
    wanted = {
        "gradient_alignment": cosine(trait, imitates),
        "gradient_inner_product": float(trait @ imitates),
        "imitation_along_teacher": cosine(-imitates, moved),
        "trait_along_teacher": cosine(-trait, moved),
        "imitation_gradient_norm": float(imitates.norm()),
        "trait_gradient_norm": float(trait.norm()),
    }
    cell = data.sel(condition=CONDITION, taught="digits", member=MEMBER, step=step, scope=MODEL)
    for name, value in wanted.items():
        found = cell[name if role == "student" else f"{name}_of_control"]
        assert float(found) == pytest.approx(value, rel=1e-9), name
    each = torch.stack([gradient(model, imitation.compute(model, range(k, k + 1)).sum()) for k in range(96)])
    lengths = trait.norm() * imitates.norm()
    influence = each @ trait / lengths - wanted["gradient_alignment"] * (each @ imitates) / (imitates @ imitates)
    error = cell["gradient_alignment_error" if role == "student" else "gradient_alignment_of_control_error"]
    assert float(error) == pytest.approx(float(influence.std() / 96**0.5), rel=1e-9)


def test_updates_are_those_that_the_optimizer_made(kept_run):
    run, data = kept_run, kept_run.results["gradient_overlap"]
    student = run.student(CONDITION, "digits")
    rate = run.recipe.student.optimizer.learning_rate
    assert list(student.steps) == list(range(student.last + 1))
    model = run.family.load_model(student, 0, MEMBER)
    for step in student.steps[1:]:
        found = flat(run.family.last_update(student, step, MEMBER), model) * rate
        after, before = (flat(student.load_state(at, MEMBER), model) for at in (step, step - 1))
        torch.testing.assert_close(found, after - before, rtol=1e-9, atol=1e-14)
        imitation = run.family.imitation_losses(student, MEMBER, 96)
        there = run.family.load_model(student, step, MEMBER)
        slope = gradient(there, imitation.compute(there, range(96)).mean())
        cell = data.sel(condition=CONDITION, taught="digits", member=MEMBER, step=step, scope=MODEL)
        assert float(cell.update_rotation) == pytest.approx(cosine(found, -slope), rel=1e-9)
        assert float(cell.update_gain) == pytest.approx(float(found.norm() / rate / slope.norm()), rel=1e-9)


def test_without_kept_states_the_result_says_how_to_have_them(tiny_run):
    data = tiny_run.results["gradient_overlap"]
    status = data.update_rotation_status
    codes = dict(zip(status.attrs["flag_meanings"].split(), status.attrs["flag_values"], strict=True))
    assert (
        status.sel(condition=CONDITION, step=tiny_run.student(CONDITION, "digits").last) == codes["no_update_is_known"]
    ).all()
    assert np.isnan(data.update_rotation).all()
    assert "checkpoints.optimizer_state=true" in data.attrs["summary"]


def test_at_the_start_student_and_control_have_one_trait_gradient(tiny_run):
    data = tiny_run.results["gradient_overlap"].sel(step=0)
    np.testing.assert_array_equal(data.trait_gradient_norm, data.trait_gradient_norm_of_control)
    own = data.gradient_alignment.sel(condition="permuted-init", scope=MODEL)
    np.testing.assert_allclose(own, data.gradient_alignment.sel(condition="same-init", scope=MODEL), atol=1e-4)


def test_one_finding_a_condition_has_the_verdict_and_every_number_its_null_or_why_not(tiny_run):
    found = tiny_run.findings.query("analysis == 'gradient_overlap'")
    judged = found[found.verdict != ""]
    assert list(judged.condition) == tiny_run.conditions and set(judged.quantity) == {"gradient_alignment"}
    assert (judged.margin == tiny_run.recipe.verdict.gradient_margin).all()
    assert ((found.null != "") & (found.reason != "")).all()
    data = tiny_run.results["gradient_overlap"]
    cell = data.sel(condition=CONDITION, taught="digits", scope=MODEL)
    steps = list(tiny_run.student(CONDITION, "digits").steps)
    estimate = judged.set_index("condition").estimate[CONDITION]
    assert estimate == pytest.approx(float(cell.gradient_alignment.sel(step=steps).mean()))
