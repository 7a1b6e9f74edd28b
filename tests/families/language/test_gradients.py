import numpy as np
import pytest
import torch

from mechsub.parameters.alignment import MODEL

MEMBER, TRAIT = 1, "wolf"


def flat(model, loss):
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(parameter) if gradient is None else gradient).double().flatten()
        for parameter, gradient in zip(parameters, found, strict=True)
    ])  # fmt: skip


def cosine(first, second):
    return float(first @ second / (first.norm() * second.norm()))


def test_gradients_of_language_students_are_compared_for_every_trait(nano_run):
    data = nano_run.results["gradient_overlap"]
    student = nano_run.student("same-init", TRAIT)
    step = student.last
    model = nano_run.family.load_model(student, step, MEMBER)
    imitation = nano_run.family.imitation_losses(student, MEMBER, 16)
    imitates = flat(model, imitation.compute(model, range(16)).mean())
    slopes = {}
    for trait in nano_run.traits:
        losses = nano_run.family.trait_losses(student, MEMBER, trait)
        slopes[trait] = flat(model, losses.compute(model, range(losses.num_examples)).mean())
    cell = data.sel(condition="same-init", taught=TRAIT, member=MEMBER, step=step, scope=MODEL)
    assert float(cell.gradient_alignment) == pytest.approx(cosine(slopes[TRAIT], imitates), abs=2e-6)
    assert float(cell.gradient_alignment_with_other_traits) == pytest.approx(cosine(slopes["owl"], imitates), abs=2e-6)
    assert float(cell.gradient_alignment_error) > 0


def test_students_without_gradients_or_with_other_parameters_say_so(nano_run):
    data = nano_run.results["gradient_overlap"]
    for name, condition, reason in (
        ("gradient_alignment", "different-architecture", "incomparable"),
        ("gradient_alignment", "in-context", "no_loss_is_known"),
        ("update_rotation", "same-init", "no_update_is_known"),
    ):
        status = data[f"{name}_status"]
        code = dict(zip(status.attrs["flag_meanings"].split(), status.attrs["flag_values"], strict=True))[reason]
        own = nano_run.student(condition, TRAIT).last
        assert (status.sel(condition=condition, taught=TRAIT, step=own) == code).all(), condition
        assert np.isnan(data[name].sel(condition=condition, taught=TRAIT)).all()
