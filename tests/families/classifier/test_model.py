import numpy as np
import pytest
import torch
from torch.nn import functional

from mechsub.errors import RecipeError
from mechsub.families.classifier.config import ModelConfig
from mechsub.families.classifier.model import (
    Classifier,
    derive_origin,
    draw_reference,
    forward_stacked,
    model_spec,
    num_parameters,
    part_of,
    permute_units,
    tensor_table,
)
from mechsub.lineages import Origin
from mechsub.streams import random_stream


def spec_of(**fields):
    return model_spec(ModelConfig(**{"hidden_widths": (9, 7), "dtype": "float64", **fields}), 5, 4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("widths", [(9,), (9, 7), (6, 6, 6)])
@pytest.mark.parametrize("num_auxiliary", [0, 3])
def test_the_stacked_forward_pass_equals_each_members_module(activation, widths, num_auxiliary):
    spec = spec_of(hidden_widths=widths, activation=activation, num_auxiliary=num_auxiliary)
    parameters = draw_reference(spec, 1.0, 0, range(3))
    images = torch.randn(3, 11, 5, dtype=torch.float64)
    stacked = forward_stacked(parameters, images, spec)
    for member in range(3):
        module = Classifier(spec)
        module.load_state_dict({name: tensor[member] for name, tensor in parameters.items()})
        torch.testing.assert_close(stacked[member], module(images[member]))


def test_one_head_alone_gives_its_own_logits():
    parameters = draw_reference(spec_of(), 1.0, 0, range(3))
    images = torch.randn(3, 11, 5, dtype=torch.float64)
    auxiliary = forward_stacked(parameters, images, spec_of(), ("auxiliary_head",))
    torch.testing.assert_close(auxiliary, forward_stacked(parameters, images, spec_of())[..., 4:])


def test_references_have_the_published_spread():
    spec = spec_of(hidden_widths=(400, 300))
    parameters = draw_reference(spec, 2.0, 0, range(2))
    for name, info in tensor_table(spec).items():
        if name.endswith("bias"):
            assert (parameters[name] == 0).all()
        elif name.startswith("layers."):
            assert parameters[name].std() == pytest.approx(2.0 / np.sqrt(info.shape[1]), rel=0.03)
    assert num_parameters(spec) == sum(tensor[0].numel() for tensor in parameters.values())


def test_a_member_does_not_depend_on_how_many_there_are():
    few, many = (draw_reference(spec_of(), 1.0, 0, range(count)) for count in (2, 5))
    assert all(torch.equal(many[name][:2], few[name]) for name in few)


@pytest.mark.parametrize("widths", [(9,), (9, 7)])
def test_permuted_units_compute_the_same_function_with_other_weights(widths):
    spec = spec_of(hidden_widths=widths)
    reference = draw_reference(spec, 1.0, 0, range(3))
    permuted = derive_origin(reference, Origin("reference", (0, 1, 2), permute_hidden=True), 0)
    images = torch.randn(3, 11, 5, dtype=torch.float64)
    torch.testing.assert_close(forward_stacked(permuted, images, spec), forward_stacked(reference, images, spec))
    assert not torch.equal(permuted["layers.0.weight"], reference["layers.0.weight"])


def test_permuting_back_restores_every_weight():
    reference = draw_reference(spec_of(), 1.0, 0, range(2))
    order = torch.stack([torch.randperm(7), torch.randperm(7)])
    restored = permute_units(permute_units(reference, 1, order), 1, order.argsort(1))
    assert all(torch.equal(restored[name], reference[name]) for name in reference)


def test_a_different_start_is_another_members_reference():
    reference = draw_reference(spec_of(), 1.0, 0, range(3))
    start = derive_origin(reference, Origin("reference", (1, 2, 0)), 0)
    assert all(torch.equal(start[name][0], reference[name][1]) for name in reference)


def test_noise_has_its_absolute_size_on_every_weight_and_bias():
    reference = draw_reference(spec_of(hidden_widths=(200, 100)), 1.0, 0, range(2))
    start = derive_origin(reference, Origin("reference", (0, 1), noise_std=0.3), 0)
    moved = torch.cat([(start[name] - reference[name]).flatten() for name in reference])
    assert moved.std() == pytest.approx(0.3, rel=0.02)
    assert all((start[name] != reference[name]).all() for name in reference)


CNN = ModelConfig(channels=(4, 6), hidden_widths=(12, 9), dtype="float64")


def test_a_convolution_on_patches_is_torchs_convolution():
    spec = model_spec(CNN, 49, 4)
    parameters, images = draw_reference(spec, 1.0, 0, range(2)), torch.randn(2, 5, 49, dtype=torch.float64)
    stacked = forward_stacked(parameters, images, spec)
    for member in range(2):
        own = {name: tensor[member] for name, tensor in parameters.items()}
        module = Classifier(spec)
        module.load_state_dict(own)
        features = images[member].view(5, 1, 7, 7)
        for layer, channels in enumerate((1, 4)):
            kernel = own[f"layers.{layer}.weight"].view(-1, channels, 3, 3)
            features = functional.conv2d(features, kernel, own[f"layers.{layer}.bias"], stride=2, padding=1).relu()
        features = features.flatten(1)
        for layer in (2, 3):
            features = functional.linear(features, own[f"layers.{layer}.weight"], own[f"layers.{layer}.bias"]).relu()
        expected = functional.linear(features, own["class_head.weight"], own["class_head.bias"])
        torch.testing.assert_close(module(images[member])[:, :4], expected)
        torch.testing.assert_close(stacked[member], module(images[member]))


def test_permuted_channels_compute_the_same_function():
    spec = model_spec(CNN, 64, 4)
    reference = draw_reference(spec, 1.0, 0, range(3))
    permuted = derive_origin(reference, Origin("reference", (0, 1, 2), permute_hidden=True), 0)
    images = torch.randn(3, 11, 64, dtype=torch.float64)
    torch.testing.assert_close(forward_stacked(permuted, images, spec), forward_stacked(reference, images, spec))
    assert all(not torch.equal(permuted[f"layers.{layer}.weight"], reference[f"layers.{layer}.weight"]) for layer in range(4))


def test_convolutions_want_square_images():
    with pytest.raises(RecipeError, match="want square images, and these have 48 pixels"):
        model_spec(CNN, 48, 4)


@pytest.mark.parametrize("shared", [("body",), ("class-head",), ("auxiliary-head",), ("body", "auxiliary-head")])
def test_shared_parts_are_the_own_references_and_no_other_ones(shared):
    reference = draw_reference(spec_of(), 1.0, 0, range(3))
    start = derive_origin(reference, Origin("reference", (1, 2, 0), shared=shared), 0, reference)
    for name, tensor in reference.items():
        owner = 0 if part_of(name) in shared else 1
        assert torch.equal(start[name][0], tensor[owner])


def test_architectures_draw_from_streams_of_their_own():
    own, other = (draw_reference(spec_of(), 1.0, 0, range(3), name) for name in ("reference", "reference.cnn"))
    for member in range(3):
        assert not torch.isclose(own["layers.0.weight"][member], other["layers.0.weight"][member]).any()


def test_every_member_draws_from_the_stream_of_its_name():
    drawn = draw_reference(spec_of(), 1.0, 7, range(3), "reference.cnn")["layers.0.weight"]
    for member in range(3):
        expected = random_stream(7, "member", member, "reference.cnn").standard_normal((9, 5)) / np.sqrt(5)
        torch.testing.assert_close(drawn[member], torch.from_numpy(expected))
