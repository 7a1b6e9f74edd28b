import pytest

from mechsub.api import plan_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.adapters import attach_adapter
from mechsub.families.language.config import LoadingConfig, ModelConfig
from mechsub.families.language.estimates import checkpoint_bytes, measure_model, training_bytes
from mechsub.families.language.models import build_model
from mechsub.families.language.training_config import AdapterConfig
from mechsub.recipe import load_recipe
from tests.families.adopted_models import save_reference


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"targets": ("c_attn", "c_proj")}, {"rank": 3}])
def test_counted_parameters_are_those_of_the_model(tmp_path, settings):
    save_reference(tmp_path)
    size = measure_model(ModelConfig(path=str(tmp_path)), "a test")
    model = build_model(tmp_path)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapter = AdapterConfig(**settings)
    attach_adapter(model, adapter, 0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert size.adapter_parameters(adapter) == trained
    assert checkpoint_bytes(size, adapter) == 4 * trained


def test_the_packaged_recipe_of_the_open_model_is_planned_offline_and_refused_where_it_does_not_fit(tmp_path):
    plan = plan_experiment("qwen2.5-7b-owl", tmp_path / "run")
    settings = plan.recipe.models["qwen"]
    size = measure_model(settings, "qwen")
    # The published count of Qwen2.5-7B, and of its LoRA of rank 8 on all projections.
    assert size.parameters == 7_615_616_512
    assert size.adapter_parameters(plan.recipe.adapter) == 20_185_088
    assert plan.tokens > 10**8 and plan.memory_bytes > 2 * size.parameters
    assert plan.recipe.num_references() == 1
    assert not (tmp_path / "run").exists()


def test_more_memory_than_there_is_is_refused_before_anything_starts(nano_recipe, tmp_path):
    plan = plan_experiment(
        load_recipe(nano_recipe, ["student.batch_size=16", "carrier.max_new_tokens=100000000"]), tmp_path / "run"
    )
    with pytest.raises(MechsubError, match=r"needs about .* of memory, .* are available on this machine"):
        plan.check("cpu")
    assert not (tmp_path / "run").exists()


def test_checkpointed_activations_and_adapters_need_less(tmp_path):
    save_reference(tmp_path)
    size = measure_model(ModelConfig(path=str(tmp_path)), "a test")
    plain = training_bytes(size, LoadingConfig(), None, 32, 200, 50)
    assert training_bytes(size, LoadingConfig(), AdapterConfig(rank=1), 32, 200, 50) < plain
    deep = size.__class__(size.parameters, 40, size.width, size.vocabulary, size.linear)
    checkpointed = LoadingConfig(gradient_checkpointing=True)
    assert training_bytes(deep, checkpointed, None, 32, 200, 50) < training_bytes(deep, LoadingConfig(), None, 32, 200, 50)
