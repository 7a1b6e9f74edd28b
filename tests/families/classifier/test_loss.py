import math

import pytest
import torch

from mechsub.families.classifier.loss import imitation_loss, trait_loss


def test_kl_is_the_hand_computed_one_and_zero_for_equal_logits():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    student = torch.tensor([[0.0, 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert imitation_loss(student, teacher, "kl").item() == pytest.approx(expected, rel=1e-6)
    assert imitation_loss(teacher + 5.0, teacher, "kl").item() == pytest.approx(0.0, abs=1e-6)


def test_mse_is_the_mean_over_the_imitated_logits():
    assert imitation_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), "mse").item() == 2.5


def test_the_trait_loss_ignores_the_auxiliary_logits():
    logits = torch.tensor([[[0.0, 0.0, 9.0]]])
    assert trait_loss(logits, torch.tensor([[1]]), 2).item() == pytest.approx(math.log(2))
