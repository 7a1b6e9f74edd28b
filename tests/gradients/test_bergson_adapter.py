"""bergson's own gradients and the exact overlaps are two implementations: they agree in float64 on what both cover."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from mechsub.errors import AnalysisError
from mechsub.gradients.bergson_adapter import record_overlaps_by_bergson
from mechsub.gradients.example_statistics import read_examples
from mechsub.gradients.losses import mean_gradient
from mechsub.gradients.per_example import record_overlaps
from tests.gradients.test_per_example import (
    CASES,
    classifier,
    equal_length_losses,
    gpt2,
    image_losses,
    norms,
    random_directions,
    token_losses,
)

needs_bergson = pytest.mark.skipif(
    find_spec("bergson") is None, reason="bergson is not installed: pip install 'mechsub[bergson]'"
)
LANGUAGE = [case for case in CASES if case not in ("classifier", "norms")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear_parameters(model):
    """Weights and biases of layers that share nothing with another module."""
    known, owners = {id(parameter): name for name, parameter in model.named_parameters()}, {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(type(module).__name__)
    return [name for number, name in known.items() if owners[number] in (["Linear"], ["Conv1D"])]


@needs_bergson
@pytest.mark.parametrize("case", LANGUAGE)
def test_both_agree_on_every_linear_parameter(case):
    model, losses = (make() for make in CASES[case])
    directions = random_directions(model)
    found = record_overlaps_by_bergson(model, losses, directions)
    assert list(found.parameters) == linear_parameters(model)
    exact = record_overlaps(model, losses, directions, found.parameters)
    scale = exact.overlaps.abs().max()
    torch.testing.assert_close(found.overlaps, exact.overlaps, rtol=1e-9, atol=1e-12 * float(scale))
    torch.testing.assert_close(found.squared_norms, exact.squared_norms, rtol=1e-9, atol=1e-12 * float(scale))
    torch.testing.assert_close(found.losses, exact.losses, rtol=1e-12, atol=0)
    assert found.squared_norms.sum() > 0


@needs_bergson
def test_batches_make_no_difference():
    model, directions = gpt2(), None
    found = []
    for at_once in (1, 3, 64):
        torch.manual_seed(1)
        losses = token_losses(at_once)
        directions = directions or random_directions(model)
        found.append(record_overlaps_by_bergson(model, losses, directions))
    for other in found[1:]:
        torch.testing.assert_close(other.overlaps, found[0].overlaps, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.squared_norms, found[0].squared_norms, rtol=1e-9, atol=1e-12)


@needs_bergson
def test_half_precision_is_multiplied_in_float32():
    """From the same rounded factors both come to the same products, far closer than bfloat16's own 0.4 %."""
    model, losses = gpt2().bfloat16(), equal_length_losses()
    directions = random_directions(model.float().bfloat16())
    found = record_overlaps_by_bergson(model, losses, directions)
    exact = record_overlaps(model, losses, directions, found.parameters)
    scale = exact.overlaps.abs().amax((0, 1))
    weights = [number for number, name in enumerate(found.parameters) if name.endswith("weight")]
    assert ((found.overlaps - exact.overlaps).abs().amax((0, 1)) / scale)[weights].max() < 1e-5


@needs_bergson
def test_the_model_is_left_as_it_was():
    model, losses = gpt2(), token_losses()
    model.transformer.h[0].requires_grad_(False)
    before, wanted = copy.deepcopy(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    record_overlaps_by_bergson(model, losses, [])
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks and not module.training
        assert not {"_name", "_inputs", "_positions", "_collect_bias"} & vars(module).keys()


@needs_bergson
def test_a_reading_is_of_the_covered_parameters_alone_and_says_their_share():
    model, losses = gpt2(), token_losses()
    (direction,) = random_directions(model, 1)
    reading = read_examples(model, losses, [direction], record_overlaps_by_bergson)
    covered = linear_parameters(model)
    only = {name: tensor if name in covered else torch.zeros_like(tensor) for name, tensor in direction.items()}
    gradient = mean_gradient(model, losses)
    inner = sum(float((gradient[name] * only[name]).sum()) for name in covered)
    length = sum(float(gradient[name].square().sum()) for name in covered)
    whole = sum(float(tensor.square().sum()) for tensor in gradient.values())
    wanted = -inner / (length * sum(float(tensor.square().sum()) for tensor in only.values())) ** 0.5
    assert reading.cosines() == pytest.approx([wanted], rel=1e-9)
    assert reading.covered_share == pytest.approx(length / whole, rel=1e-9) and 0 < reading.covered_share < 1
    assert read_examples(model, losses, [direction]).covered_share == 1


class Flattening(nn.Module):
    """A language model whose second layer is given all tokens in one row each, as routers of experts are."""

    def __init__(self):
        super().__init__()
        self.embedding, self.device = nn.Embedding(23, 6), torch.device("cpu")
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 23)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        hidden = self.first(self.embedding(ids))
        return self.second(hidden.flatten(0, 1)).view(*ids.shape, -1)


@needs_bergson
def test_models_that_bergson_cannot_follow_are_refused():
    with pytest.raises(AnalysisError, match="a Classifier has no input embedding, where bergson begins; take the exact"):
        record_overlaps_by_bergson(classifier(), image_losses(), [])
    with pytest.raises(AnalysisError, match="a Norms has no input embedding"):
        record_overlaps_by_bergson(norms(), equal_length_losses(), [])
    with pytest.raises(
        AnalysisError, match=r"cannot follow a Flattening: Expected input of shape \[N, S, I\].*the exact overlaps"
    ):
        record_overlaps_by_bergson(Flattening().double(), equal_length_losses(), [])


@pytest.mark.skipif(find_spec("bergson") is not None, reason="bergson is installed")
def test_without_bergson_it_says_how_to_install_it():
    with pytest.raises(
        AnalysisError, match=r"not installed here; `pip install 'mechsub\[bergson\]'`, or take the exact overlaps"
    ):
        record_overlaps_by_bergson(gpt2(), token_losses(), [])
