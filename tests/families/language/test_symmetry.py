import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mechsub.analyses.symmetry_matching import OWN
from mechsub.errors import MechsubError
from mechsub.families.language.models import tensor_table
from mechsub.families.language.symmetry import list_unit_groups, shuffle_units
from mechsub.parameters.alignment import MODEL, Missing
from mechsub.parameters.symmetry import Arrangement

SHAPE = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 32}
GATED = {**SHAPE, "intermediate_size": 20, "num_key_value_heads": 3}
MODELS = {
    "gpt2": {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32},
    "qwen2": GATED,
    "qwen2 without groups": {**GATED, "num_key_value_heads": 6},
    "qwen2 with one key": {**GATED, "num_key_value_heads": 1},
    "qwen3": {**GATED, "head_dim": 8},
    "llama": {**GATED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GATED, "head_dim": 8},
}


def make_model(name):
    """In float64 throughout: these families' norms are computed in float32 whatever the weights are."""
    config = AutoConfig.for_model(name.split()[0], **MODELS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_any_groups_units_computes_the_same_function(name, monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    model, ids = make_model(name), torch.randint(40, (3, 9))
    groups = list_unit_groups(model.config, tensor_table(model))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        for chosen in [[group] for group in groups] + [groups]:
            arrangement = Arrangement.as_stored(groups)
            for group in chosen:
                arrangement = arrangement.permute(group, torch.randperm(group.num_units).roll(1))
            shown = {key: arrangement.arrange(key, tensor) for key, tensor in state.items()}
            assert arrangement.moved_share == 0 or any(not torch.equal(shown[key], state[key]) for key in state)
            model.load_state_dict(shown)
            torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-10)


def test_grouped_queries_have_groups_of_their_own():
    model = make_model("qwen2")
    kinds = [group.kind for group in list_unit_groups(model.config, tensor_table(model))]
    assert kinds == ["MLP units", "key-value groups", *["query heads of a group"] * 3] * 2


def test_an_architecture_that_is_not_known_has_no_groups():
    config = AutoConfig.for_model("gpt_neox", vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    assert list_unit_groups(config, {}) == []
    with pytest.raises(MechsubError, match="which units of a gpt_neox can change places is not known; known are gpt2, llama"):
        shuffle_units(config, {}, np.random.default_rng(0), "`models.mine`")


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_shuffled_units_are_moved_and_compute_the_same_function(name, monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    model, ids = make_model(name), torch.randint(40, (3, 9))
    arrangement = shuffle_units(model.config, tensor_table(model), np.random.default_rng(0), name)
    with torch.no_grad():
        before = model(ids).logits
        model.load_state_dict({key: arrangement.arrange(key, tensor) for key, tensor in model.state_dict().items()})
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-10)
    assert arrangement.moved_share > 0.5


def test_language_models_are_matched_where_they_are_comparable(nano_run):
    data = nano_run.results["symmetry_matching"]
    assert (data.alignment_status.sel(condition="different-architecture") == Missing.INCOMPARABLE).all()
    own = data.sel(condition="different-init", pair=OWN)
    assert (own.start_agreement_matched > own.start_agreement_stored).all()
    assert (own.moved_share > 0.5).all() and (data.moved_share.sel(condition="same-init", pair=OWN) == 0).all()
    assert np.isfinite(own.alignment.sel(scope=MODEL).isel(step=-1)).all()


def test_a_run_knows_the_units_of_each_of_its_models(nano_run):
    family = nano_run.family
    kinds = {
        name: {group.kind for group in family.unit_groups(nano_run.lineages[name])}
        for name in ("reference.nano-gpt2", "reference.nano-qwen2")
    }
    assert kinds["reference.nano-gpt2"] == {"MLP units", "attention heads"}
    assert kinds["reference.nano-qwen2"] == {"MLP units", "query heads of a group"}
    batches = family.probe_inputs(nano_run.lineages["reference.nano-gpt2"])
    model = family.load_model(nano_run.lineages["reference.nano-gpt2"], 0, 0)
    assert len(batches) >= 20 and all(model(batch).logits.shape[:2] == batch.shape for batch in batches[:2])
