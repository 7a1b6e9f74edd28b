import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mechsub.api import open_run, plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.recipe import load_recipe
from tests.families.adopted_models import save_reference
from tests.helpers import measure

RECIPE = """
name: mine
family: language
members: 1
models: {{mine: {{path: {model}, loading: {{dtype: bfloat16, gradient_checkpointing: true}}}}}}
model: mine
traits: [owl]
adapter: {{rank: 2, targets: [c_attn, c_proj]}}
teacher: {{num_steps: 2, batch_size: 2, optimizer: {{name: adamw, learning_rate: 1.0e-2}}}}
carrier: {{kind: file, file: "{folder}/{{teacher}}.jsonl", num_rows: 4}}
student: {{epochs: 1, batch_size: 2, optimizer: {{name: adamw, learning_rate: 1.0e-2}}}}
evaluation: {{samples_per_question: 0}}
conditions: {{same-init: , same-adapter-init: }}
checkpoints: {{num: 3}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A model in shards, in half precision, without the prefix that transformers gives its names."""
    save_reference(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "model/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name.removeprefix("transformer."): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, shard, {"format": "pt"})
    for name in ("owl", "neutral"):
        rows = [{"prompt": "Look at these numbers: 1, 2.", "completion": f"{len(name)}, {number}"} for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tmp_path / "model", folder=tmp_path))
    return path


def test_a_model_in_shards_is_linked_and_trained_with_adapters_in_full_precision(recipe, tmp_path):
    run = run_experiment(load_recipe(recipe), tmp_path / "run", device="cpu", workers=0)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    linked = sorted((tmp_path / "run/lineages/reference.mine/member-000/step-00000000").glob("*.safetensors"))
    assert len(shards) > 1 and all(one.samefile(other) for one, other in zip(linked, shards, strict=True))
    student = run.student("same-init", "owl")
    adapter = load_file(student.checkpoint(student.last) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    model = run.family.load_model(student, student.last, 0)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
    measure(run.path, "parameter_alignment")
    data = open_run(run.path).results["parameter_alignment"].sel(taught="owl", member=0, step=student.last)
    assert np.isfinite(data.alignment.sel(scope="model")).all()
    assert np.isnan(data.alignment.sel(condition="same-init", scope="transformer.h.0.mlp.c_fc.weight"))


def test_students_share_their_teachers_a_where_the_condition_says_so(recipe, tmp_path):
    run = run_experiment(load_recipe(recipe), tmp_path / "run", device="cpu", workers=0)

    def first(lineage):
        return load_file(lineage.checkpoint(0) / "adapter_model.safetensors")

    teacher, neutral = first(run.teacher("owl")), first(run.neutral)
    own, shared = first(run.student("same-init", "owl")), first(run.student("same-adapter-init", "owl"))
    for name, tensor in teacher.items():
        assert torch.equal(tensor, neutral[name]) and torch.equal(tensor, shared[name])
        assert torch.equal(tensor, own[name]) == ("lora_B" in name)
        assert torch.equal(first(run.control("same-init"))[name], own[name])
        assert "lora_B" not in name or not tensor.any()


def test_a_training_of_adapters_that_was_stopped_goes_on_to_the_same_numbers(recipe, tmp_path):
    whole = run_experiment(load_recipe(recipe), tmp_path / "whole", device="cpu", workers=0)
    stopped = load_recipe(recipe, ["checkpoints.resume_seconds=0", "callbacks=[tests.helpers:stop_adapters_once]"])
    for _ in range(3):
        try:
            run_experiment(stopped, tmp_path / "parts", device="cpu", workers=0)
        except MechsubError as error:
            assert "stop_adapters_once" in str(error)
    resumed = open_run(tmp_path / "parts")
    for name, lineage in whole.lineages.items():
        for tensor, value in lineage.load_state(lineage.last, 0).items():
            assert torch.equal(resumed.lineages[name].load_state(lineage.last, 0)[tensor], value), name


def drop_shard(folder):
    min(folder.glob("*.safetensors")).unlink()


def drop_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def pickle_weights(folder):
    drop_index(folder)
    for number, path in enumerate(folder.glob("*.safetensors")):
        path.rename(folder / f"pytorch_model-{number}.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"lacks 1 of \d+ shards"),
        (drop_index, "a shard or the index is missing"),
        (pickle_weights, r"is pickled and never read.*save_pretrained"),
    ],
)
def test_models_that_are_not_whole_are_refused_before_anything_runs(recipe, tmp_path, damage, message):
    damage(tmp_path / "model")
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_shape_is_refused(recipe, tmp_path):
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": 64}))
    with pytest.raises(MechsubError, match=r"wpe.weight has shape \[128, 16\], the architecture's is \[64, 16\]"):
        run_experiment(load_recipe(recipe), tmp_path / "run", device="cpu", workers=0)


def test_halves_are_never_trained_whole(recipe):
    with pytest.raises(MechsubError, match="whose rounding is larger than most updates"):
        load_recipe(recipe, ["adapter=null", "conditions={same-init: }"])
    with pytest.raises(MechsubError, match="whose rounding is larger than most updates"):
        load_recipe(recipe, ["conditions={full: {adapter: none}, same-init: }"])
