import pytest
import torch
from torch.nn import functional

from mechsub.errors import RunDirectoryError
from mechsub.families.trained import task_that_made
from mechsub.gradients.losses import mean_gradient
from mechsub.lineages import spec_name

MEMBER = 1


def test_the_imitation_losses_are_those_that_the_student_was_trained_on(tiny_run):
    """Adam's first step is the sign of the gradient of the first batch, which here is the whole carrier."""
    for condition in ("same-init", "shuffled-carrier", "all-logits", "different-init"):
        student = tiny_run.student(condition, "digits")
        losses = tiny_run.family.imitation_losses(student, MEMBER, 96)
        start, first = (tiny_run.family.load_model(student, step, MEMBER) for step in (0, 2))
        assert losses.num_examples == 96
        values = [
            losses.compute(model, range(96)).mean().item()
            for model in (start, tiny_run.family.load_model(student, student.last, MEMBER))
        ]
        assert values[1] < values[0], condition
        gradient = mean_gradient(start, losses)
        moved = {name: first.state_dict()[name] - tensor for name, tensor in start.state_dict().items()}
        assert sum(float((gradient[name] * moved[name]).sum()) for name in moved) < 0


def test_an_examples_loss_does_not_depend_on_its_company(tiny_run):
    student = tiny_run.student("shuffled-carrier", "digits")
    losses = tiny_run.family.imitation_losses(student, MEMBER, 40)
    model = tiny_run.family.load_model(student, student.last, MEMBER)
    together = losses.compute(model, range(40))
    torch.testing.assert_close(torch.cat([losses.compute(model, range(k, k + 5)) for k in range(0, 40, 5)]), together)
    more = tiny_run.family.imitation_losses(student, MEMBER, 96)
    torch.testing.assert_close(more.compute(model, range(40)), together)


def test_the_trait_gradient_is_that_of_the_cross_entropy_under_the_traits_labels(tiny_run):
    student = tiny_run.student("same-init", "digits")
    model = tiny_run.family.load_model(student, student.last, MEMBER)
    for trait, shift in (("digits", 0), ("relabelled", 1)):
        losses = tiny_run.family.trait_losses(student, MEMBER, trait)
        found = mean_gradient(model, losses)
        images, labels = tiny_run.family._images, (tiny_run.family._labels["digits"] + shift) % 10
        model.zero_grad()
        functional.cross_entropy(model(images)[:, :10], labels).backward()
        for name, parameter in model.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], wanted)
        assert found["auxiliary_head.weight"].abs().max() == 0


def test_a_file_that_no_stage_made_is_named(tiny_run):
    with pytest.raises(RunDirectoryError, match="lineages/nobody"):
        task_that_made(tiny_run.path, spec_name("nobody"), "cpu")
