from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn

from mechsub.errors import AnalysisError
from mechsub.families.classifier.config import ModelConfig
from mechsub.families.classifier.model import Classifier, model_spec
from mechsub.families.classifier.symmetry import list_unit_groups
from mechsub.parameters.matching import connect_groups, match_activations, match_weights
from mechsub.parameters.symmetry import Arrangement, UnitGroup, UnitPlace
from mechsub.parameters.unit_activations import record_reader_inputs

SPEC = model_spec(ModelConfig(hidden_widths=(12, 10), dtype="float64"), 6, 4)
GROUPS = list_unit_groups(SPEC)
PAIRED = [
    UnitGroup("groups", "groups", 3, (UnitPlace("k", 0, 0, 2), UnitPlace("q", 0, 0, 4), UnitPlace("o.weight", 1, 0, 4)), "o"),
    *(
        UnitGroup(f"queries {one}", "queries", 2, (UnitPlace("q", 0, 4 * one, 2), UnitPlace("o.weight", 1, 4 * one, 2)), "o")
        for one in range(3)
    ),
]
"""Heads in groups, as grouped-query attention has them."""


def stream():
    return np.random.default_rng(0)


def draw_state(seed, spec=SPEC):
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) for name, tensor in Classifier(spec).state_dict().items()}


def shuffle(groups):
    arrangement = Arrangement.as_stored(groups)
    for group in groups:
        arrangement = arrangement.permute(group, torch.randperm(group.num_units))
    return arrangement


def show(state, arrangement):
    return {name: arrangement.arrange(name, tensor) for name, tensor in state.items()}


def activations(state, images):
    model = Classifier(SPEC)
    model.load_state_dict(state)
    return record_reader_inputs(model, [group.reader for group in GROUPS], [images])


def inner(first, second, groups):
    tensors = {place.tensor for group in groups for place in group.places}
    return sum(float((first[name] * second[name]).sum()) for name in tensors)


def test_a_planted_order_is_found_exactly_from_weights():
    reference = draw_state(0)
    other = show(reference, shuffle(GROUPS))
    found = match_weights(GROUPS, reference.__getitem__, other.__getitem__, stream())
    assert found.after == pytest.approx(1.0, abs=1e-12) and found.before < 0.5
    restored = show(other, found.arrangement)
    assert all(torch.equal(restored[name], reference[name]) for name in reference)


def test_a_planted_order_is_found_exactly_from_activations():
    reference = draw_state(0)
    other, images = show(reference, shuffle(GROUPS)), torch.randn(300, 6, dtype=torch.float64)
    found = match_activations(GROUPS, activations(reference, images), activations(other, images), stream())
    restored = show(other, found.arrangement)
    assert all(torch.equal(restored[name], reference[name]) for name in reference)


@pytest.mark.parametrize("seed", range(3))
def test_heads_inside_groups_are_found_with_their_groups(seed):
    torch.manual_seed(seed)
    reference = {"k": torch.randn(6, 30), "q": torch.randn(12, 30), "o.weight": torch.randn(30, 12)}
    other = show(reference, shuffle(PAIRED))
    found = match_weights(PAIRED, reference.__getitem__, other.__getitem__, stream())
    assert all(torch.equal(show(other, found.arrangement)[name], reference[name]) for name in reference)


def test_the_same_model_is_left_as_it_is():
    reference = draw_state(0)
    found = match_weights(GROUPS, reference.__getitem__, reference.__getitem__, stream())
    assert found.arrangement.moved_share == 0.0 and found.before == found.after == pytest.approx(1.0)
    silent = {name: torch.zeros_like(tensor) for name, tensor in reference.items()}
    assert match_weights(GROUPS, silent.__getitem__, reference.__getitem__, stream()).arrangement.moved_share == 0.0


def test_unrelated_models_are_matched_too_and_nothing_lost():
    reference, other = draw_state(0), draw_state(1)
    found = match_weights(GROUPS, reference.__getitem__, other.__getitem__, stream())
    assert found.after > found.before + 0.1, "matching always finds something"
    assert inner(reference, show(other, found.arrangement), GROUPS) > inner(reference, other, GROUPS)
    names = {place.tensor for group in GROUPS for place in group.places}
    norms = [np.sqrt(sum(float(state[name].square().sum()) for name in names)) for state in (reference, other)]
    assert found.after == pytest.approx(inner(reference, show(other, found.arrangement), GROUPS) / np.prod(norms))


def test_one_layer_is_matched_as_trying_every_order_would():
    spec = model_spec(ModelConfig(hidden_widths=(5,), dtype="float64"), 6, 4)
    groups, reference, other = list_unit_groups(spec), draw_state(0, spec), draw_state(1, spec)
    found = match_weights(groups, reference.__getitem__, other.__getitem__, stream())
    stored = Arrangement.as_stored(groups)
    tried = [stored.permute(groups[0], torch.tensor(order)) for order in permutations(range(5))]
    best = max(inner(reference, show(other, one), groups) for one in tried)
    assert inner(reference, show(other, found.arrangement), groups) == pytest.approx(best)


def test_restarts_find_no_less_and_many_of_them_the_best():
    spec = model_spec(ModelConfig(hidden_widths=(4, 4), dtype="float64"), 3, 4)
    groups = list_unit_groups(spec)
    stored = Arrangement.as_stored(groups)
    orders = [torch.tensor(order) for order in permutations(range(4))]
    reference, other = draw_state(0, spec), draw_state(10, spec)

    def reach(restarts):
        found = match_weights(groups, reference.__getitem__, other.__getitem__, stream(), restarts)
        return inner(reference, show(other, found.arrangement), groups)

    tried = [stored.permute(groups[0], one).permute(groups[1], two) for one, two in product(orders, orders)]
    best = max(inner(reference, show(other, one), groups) for one in tried)
    assert reach(0) <= reach(3) <= reach(200) + 1e-9
    assert reach(200) == pytest.approx(best)


def test_a_fit_is_a_function_of_its_stream():
    reference, other = draw_state(0), draw_state(1)
    fits = [match_weights(GROUPS, reference.__getitem__, other.__getitem__, stream()) for _ in range(2)]
    assert all(
        torch.equal(fits[0].arrangement.index[axis], fits[1].arrangement.index[axis]) for axis in fits[0].arrangement.index
    )


def test_silent_units_correlate_with_none_and_stay():
    reference = {group.reader: torch.randn(50, group.num_units) for group in GROUPS}
    other = {name: values.clone() for name, values in reference.items()}
    reference["layers.1"][:, :3] = other["layers.1"][:, :3] = 1.5
    found = match_activations(GROUPS, reference, other, stream())
    assert found.arrangement.moved_share == 0.0 and found.after == pytest.approx(1.0)


def test_what_is_not_finite_is_refused_rather_than_matched_by_nothing():
    reference, other = draw_state(0), draw_state(1)
    other["layers.1.weight"][0, 0] = float("nan")
    with pytest.raises(AnalysisError, match="cannot be matched"):
        match_weights(GROUPS, reference.__getitem__, other.__getitem__, stream())
    seen = {group.reader: torch.randn(50, group.num_units) for group in GROUPS}
    spoilt = {name: values.clone() for name, values in seen.items()}
    spoilt[GROUPS[0].reader][3, 0] = float("inf")
    with pytest.raises(AnalysisError, match="cannot be matched"):
        match_activations(GROUPS, seen, spoilt, stream())


def test_groups_that_share_no_tensor_are_matched_apart():
    assert [len(component) for component in connect_groups(GROUPS)] == [2]
    assert [len(one) for one in connect_groups(GROUPS, lambda group: (group.activations,))] == [1, 1]
    apart = UnitGroup("other", "units", 2, (UnitPlace("x.weight", 1),), "x")
    assert sorted(len(component) for component in connect_groups([*PAIRED, apart])) == [1, 4]


def test_recording_leaves_the_model_as_it_was():
    model = Classifier(SPEC)
    images = torch.randn(7, 6, dtype=torch.float64)
    before = model(images)
    found = record_reader_inputs(model, ["layers.1"], [images[:3], images[3:]])
    torch.testing.assert_close(found["layers.1"], torch.relu(model.layers[0](images)).detach())
    assert torch.equal(model(images), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_a_failure():
    model = Classifier(SPEC)
    with pytest.raises(RuntimeError):
        record_reader_inputs(model, ["class_head"], [torch.randn(2, 99, dtype=torch.float64)])
    assert not any(module._forward_pre_hooks for module in nn.ModuleList([model]).modules())
