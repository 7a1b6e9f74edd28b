import pytest
import torch

from mechsub.training.config import OptimizerConfig
from mechsub.training.optimizers import make_optimizer, restore_state, state_tensors

CONFIGS = [
    OptimizerConfig(name="sgd", learning_rate=0.1),
    OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerConfig(name="adam", learning_rate=0.1),
    OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.1),
]


def steps(optimizer, parameters, count):
    for _ in range(count):
        optimizer.zero_grad()
        sum((parameter**2).sum() for parameter in parameters).backward()
        optimizer.step()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.momentum}")
def test_saved_and_restored_state_goes_on_bit_for_bit(config):
    names = ["a", "b"]
    undisturbed = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    optimizer = make_optimizer(undisturbed, config)
    steps(optimizer, undisturbed, 3)
    resumed = [parameter.detach().clone().requires_grad_() for parameter in undisturbed]
    saved = {name: tensor.clone() for name, tensor in state_tensors(optimizer, names).items()}
    steps(optimizer, undisturbed, 4)
    second = make_optimizer(resumed, config)
    restore_state(second, names, saved)
    steps(second, resumed, 4)
    assert all(torch.equal(left, right) for left, right in zip(undisturbed, resumed, strict=True))


def test_weight_decay_is_decoupled_under_adamw_only():
    start = torch.full((1,), 10.0)
    moved = {}
    for name in ("adam", "adamw"):
        parameter = start.clone().requires_grad_()
        optimizer = make_optimizer([parameter], OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.5))
        parameter.grad = torch.zeros(1)
        optimizer.step()
        moved[name] = float((start - parameter).detach())
    assert moved["adamw"] == pytest.approx(0.01 * 0.5 * 10.0, rel=1e-4)
    assert moved["adam"] == pytest.approx(0.01, rel=1e-4)
