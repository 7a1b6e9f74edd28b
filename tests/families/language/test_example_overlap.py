"""Overlaps of a language model's examples, padded in batches, against backward passes on one row at a time."""

import numpy as np
import pytest

from mechsub.analyses.example_overlap import STATUS
from mechsub.parameters.directions import displacement, load_dense

MEMBER, TRAIT = 1, "wolf"


def codes(data, name, **chosen):
    return {STATUS[code] for code in np.unique(data[f"{name}_status"].sel(**chosen))}


@pytest.mark.parametrize("condition", ["same-init", "all-logits"])
def test_overlaps_are_those_of_one_row_at_a_time(nano_run, condition):
    found = nano_run.results["example_overlap"].sel(condition=condition, taught=TRAIT, member=MEMBER, toward="teacher")
    teacher = nano_run.teacher(TRAIT)
    lineages = {"": nano_run.student(condition, TRAIT), "_of_control": nano_run.control(condition)}
    for who, lineage in lineages.items():
        model = nano_run.family.load_model(lineage, 0, MEMBER, merged=True)
        losses = nano_run.family.imitation_losses(lineage, MEMBER, 512)
        direction = {
            name: load_dense(displacement(teacher, teacher.last), name, MEMBER) for name, _ in model.named_parameters()
        }
        overlaps, norms = [], []
        for number in range(losses.num_examples):
            model.zero_grad()
            losses.compute(model, range(number, number + 1)).sum().backward()
            own = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
            overlaps.append(-sum(float((own[name] * direction[name]).sum()) for name in own))
            norms.append(sum(float(gradient.square().sum()) for gradient in own.values()) ** 0.5)
        length = sum(float(part.double().square().sum()) for part in direction.values()) ** 0.5
        shown = slice(losses.num_examples)
        np.testing.assert_allclose(found[f"gradient_norm{who}"][shown], norms, rtol=1e-4)
        np.testing.assert_allclose(found[f"overlap{who}"][shown], overlaps, atol=1e-5 * max(norms) * length)


def test_what_cannot_be_measured_says_why(nano_run):
    data = nano_run.results["example_overlap"]
    assert codes(data, "overlap", condition="in-context") == {"no_imitation_loss"}
    assert codes(data, "cosine", condition="different-architecture", toward="teacher") == {"incomparable"}
    assert codes(data, "cosine", condition="different-architecture", toward="trait") == {"ok"}
    assert codes(data, "specific_cosine", condition="same-init") == {"ok"}
