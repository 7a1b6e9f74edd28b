import pytest
import torch

from mechsub.families.classifier.config import ModelConfig
from mechsub.families.classifier.model import Classifier, draw_reference, model_spec, permute_units
from mechsub.families.classifier.symmetry import list_unit_groups
from mechsub.parameters.symmetry import Arrangement


@pytest.mark.parametrize("channels", [(), (4,), (4, 6)])
@pytest.mark.parametrize("widths", [(9,), (9, 7), (6, 6, 6)])
@pytest.mark.parametrize("num_auxiliary", [0, 3])
def test_any_order_of_any_groups_units_computes_the_same_function(channels, widths, num_auxiliary):
    config = ModelConfig(channels=channels, hidden_widths=widths, dtype="float64", num_auxiliary=num_auxiliary)
    spec = model_spec(config, 25, 4)
    torch.manual_seed(0)
    model, images = Classifier(spec), torch.randn(8, 25, dtype=torch.float64)
    state, before = model.state_dict(), model(images)
    groups = list_unit_groups(spec)
    assert len(groups) == len(channels) + len(widths)
    for group in groups:
        arrangement = Arrangement.as_stored(groups).permute(group, torch.randperm(group.num_units))
        shown = {name: arrangement.arrange(name, tensor) for name, tensor in state.items()}
        assert any(not torch.equal(shown[name], state[name]) for name in state)
        changed = Classifier(spec)
        changed.load_state_dict(shown)
        torch.testing.assert_close(changed(images), before, rtol=0, atol=1e-10)


def test_an_arrangement_is_what_the_recipe_calls_permuted_units():
    spec = model_spec(ModelConfig(hidden_widths=(9, 7), dtype="float64"), 5, 4)
    reference, order = draw_reference(spec, 1.0, 0, range(1)), torch.randperm(9)
    groups = list_unit_groups(spec)
    arrangement = Arrangement.as_stored(groups).permute(groups[0], order)
    for name, expected in permute_units(reference, 0, order[None]).items():
        assert torch.equal(arrangement.arrange(name, reference[name][0]), expected[0])
