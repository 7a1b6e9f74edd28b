import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from mechsub.checkpoints import write_tensors
from mechsub.errors import MechsubError, RecipeError
from mechsub.families.language.adapters import adapter_table, attach_adapter, attach_saved_adapter, read_adapter_config
from mechsub.families.language.models import parameters_of, tensor_table
from mechsub.families.language.training_config import AdapterConfig
from mechsub.lineages import LineageSpec, Origin, checkpoint_folder, checkpoint_name, open_lineage, write_spec
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.directions import displacement, displacement_difference, displacement_label, origin_direction
from mechsub.parameters.gram import stream_gram
from mechsub.recipe import load_recipe

ARCHITECTURES = {
    "gpt2": GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1),
    "qwen2": Qwen2Config(
        vocab_size=60, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=1,
    ),
}  # fmt: skip
QUERY = {"gpt2": "c_attn", "qwen2": "q_proj"}
OUT = {"gpt2": "c_proj", "qwen2": "down_proj"}


def make_base(architecture, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])


def make_adapter(base, seed, **settings):
    """An adapter as `peft` makes it, with weights as if it had been trained."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


class Bench:
    """A run directory with one base and adapters on it."""

    def __init__(self, run, architecture):
        self.run, self.base = run, make_base(architecture)
        # Whole tensors, which the slow way knows by their names; sections are cut in the tests of the Gram matrices.
        self.table = {name: replace(info, sections=()) for name, info in tensor_table(self.base).items()}
        write_tensors(run / checkpoint_name("reference", 0, 0), parameters_of(self.base), {})
        self._spec("reference", self.table, (0,), False)

    def add(self, name, model):
        folder = self.run / checkpoint_folder(name, 5, 0)
        model.save_pretrained(folder)
        held = list(load_file(folder / "adapter_model.safetensors"))
        inner = model.base_model.model
        return self._spec(name, adapter_table(inner, self.table, held, name), (0, 5), True)

    def _spec(self, name, table, steps, is_adapter):
        spec = LineageSpec(
            name, "student", None, None, "language", {}, Origin("reference", (0,)), None, 1, steps, table, 0,
            is_adapter=is_adapter, holds_start=not is_adapter,
        )  # fmt: skip
        write_spec(self.run / f"lineages/{name}/member-000", spec)
        return open_lineage(self.run, name)

    def merged(self, model):
        """The slow way: what `peft` merges, minus the base, in float64, by tensor."""
        # The order matters: in float64 before the merge, or the merge would round.
        whole = copy.deepcopy(model).double().merge_and_unload()
        before = dict(self.base.double().named_parameters())
        self.base.float()
        return {
            name: (parameter - before[name].double()).detach().numpy().ravel() for name, parameter in whole.named_parameters()
        }

    def gram(self, *directions, anchor, **settings):
        return stream_gram(list(directions), list_blocks(self.table), [anchor], **settings)


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


def total_cosine(gram, first, second):
    total = gram.within[0].sum(0)
    return total[first, second] / np.sqrt(total[first, first] * total[second, second])


@pytest.fixture(params=["gpt2", "qwen2"])
def architecture(request):
    return request.param


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"QUERY": 2}, "alpha_pattern": {"OUT": 11}},
        {"init_lora_weights": "gaussian", "bias": "all"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "patterns", "biases", "whole module"],
)
def test_two_adapters_align_as_their_merged_weights_do(tmp_path, architecture, settings):
    words = {"QUERY": QUERY[architecture], "OUT": OUT[architecture]}
    settings = json.loads(json.dumps(settings).replace("QUERY", words["QUERY"]).replace("OUT", words["OUT"]))
    if architecture == "gpt2" and "modules_to_save" in settings:
        settings = {"modules_to_save": ["wpe"]}  # its head is tied
    bench = Bench(tmp_path, architecture)
    models = {"one": make_adapter(bench.base, 1, **settings), "two": make_adapter(bench.base, 2, **settings)}
    one, two = (bench.add(name, model) for name, model in models.items())
    gram = bench.gram(
        displacement(one, 5), displacement(two, 5), displacement_difference(one, two, 5), origin_direction(one),
        anchor=displacement_label("two", 5),
    )  # fmt: skip
    slow = [bench.merged(model) for model in models.values()]
    slow.append({name: slow[0][name] - slow[1][name] for name in slow[0]})
    slow.append({name: tensor.double().numpy().ravel() for name, tensor in parameters_of(bench.base).items()})
    products = np.array([[[left[name] @ right[name] for right in slow] for left in slow] for name in gram.blocks])
    scale = np.sqrt(np.einsum("tii->ti", products))
    bound = 1e-6 * scale[:, :, None] * scale[:, None, :] + 1e-12
    # Against the base, which is float32, products are in float32: there the bound is that of its rounding.
    assert (np.abs(gram.within[0] - products)[:, :3, :3] <= bound[:, :3, :3]).all()
    assert (np.abs(gram.within[0] - products) <= 5 * bound).all()
    np.testing.assert_allclose(gram.across[0, :, :, 0, 0], gram.within[0, :, :, 1], rtol=1e-6, atol=1e-9)
    flat = [np.concatenate([vector[name] for name in gram.blocks]) for vector in slow]
    assert total_cosine(gram, 0, 1) == pytest.approx(cosine(flat[0], flat[1]), abs=1e-6)


def test_the_chunk_size_changes_nothing_of_mixed_directions(tmp_path, architecture):
    bench = Bench(tmp_path, architecture)
    one = bench.add("one", make_adapter(bench.base, 1))
    two = bench.add("two", make_adapter(bench.base, 2, use_dora=True))
    asked = displacement(one, 5), displacement(two, 5), displacement_difference(one, two, 5), origin_direction(one)
    whole = bench.gram(*asked, anchor=displacement_label("two", 5))
    parts = bench.gram(*asked, anchor=displacement_label("two", 5), chunk_bytes=300)
    np.testing.assert_allclose(parts.within, whole.within, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(parts.across, whole.across, rtol=1e-5, atol=1e-7)


def test_a_gauge_transform_changes_nothing(tmp_path, architecture):
    bench = Bench(tmp_path, architecture)
    model = make_adapter(bench.base, 1)
    one, other = bench.add("one", model), bench.add("other", make_adapter(bench.base, 2))
    before = bench.gram(displacement(one, 5), displacement(other, 5), anchor=displacement_label("other", 5))
    path = tmp_path / checkpoint_folder("one", 5, 0) / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "lora_A" in name]:
        mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64))[0] * 3
        down, up = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        tensors[name], tensors[name.replace("lora_A", "lora_B")] = mix @ down, up @ torch.linalg.inv(mix)
    save_file(tensors, path)
    after = bench.gram(displacement(one, 5), displacement(other, 5), anchor=displacement_label("other", 5))
    np.testing.assert_allclose(after.within, before.within, rtol=1e-9, atol=1e-12)
    assert total_cosine(after, 0, 1) == pytest.approx(total_cosine(before, 0, 1), abs=1e-9)


def test_adapters_of_other_ranks_and_targets_compare_on_what_both_have(tmp_path, architecture):
    bench = Bench(tmp_path, architecture)
    narrow = make_adapter(bench.base, 1, r=1, target_modules=[QUERY[architecture]])
    wide = make_adapter(bench.base, 2, r=6)
    one, two = bench.add("one", narrow), bench.add("two", wide)
    gram = bench.gram(displacement(one, 5), displacement(two, 5), anchor=displacement_label("two", 5))
    slow = [bench.merged(narrow), bench.merged(wide)]
    shared = [place for place, name in enumerate(gram.blocks) if QUERY[architecture] in name and name.endswith("weight")]
    for place, name in enumerate(gram.blocks):
        assert (gram.within[0, place, 0, 0] > 0) == (place in shared)
        assert gram.within[0, place, 0, 1] == pytest.approx(slow[0][name] @ slow[1][name], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_state_is_what_peft_merges(tmp_path, architecture, dora):
    bench = Bench(tmp_path, architecture)
    model = make_adapter(bench.base, 1, use_dora=dora)
    lineage = bench.add("one", model)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, tensor in lineage.load_state(5, 0).items():
        torch.testing.assert_close(tensor, merged[name].detach(), atol=1e-6, rtol=1e-5)
    start = lineage.load_state(0, 0)
    assert all(torch.equal(start[name], parameter) for name, parameter in bench.base.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "its first step is not its base"),
        ({"init_lora_weights": "olora"}, "its first step is not its base"),
        ({"init_lora_weights": False}, "its first step is not its base"),
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_read_exactly_are_refused(tmp_path, change, message):
    make_adapter(make_base("qwen2"), 1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecipeError, match=message):
        read_adapter_config(tmp_path, "a test")


def test_an_adapter_on_a_tied_tensor_is_refused(tmp_path):
    bench = Bench(tmp_path, "gpt2")
    with pytest.raises(RecipeError, match="which is tied"):
        bench.add("one", make_adapter(bench.base, 1, target_modules=["wte"]))


def test_an_adapter_in_a_pickle_is_refused_with_the_way_out(tmp_path):
    make_adapter(make_base("qwen2"), 1).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(RecipeError, match=r"adapter_model.bin, which is pickled.*save_pretrained"):
        read_adapter_config(tmp_path, "a test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter={initialisation: pissa}"], "changes the base weights before the first step"),
        (["adapter={initialisation: orthogonl}"], "no initialisation is called"),
        (["conditions={same-adapter-init: }"], "teachers train none"),
        (["adapter={rank: 2}", "conditions={mine: {adapter_init: teacher, adapter: {rank: 3}}}"], "must be the teacher's"),
        (["models.nano-gpt2.loading={dtype: bfloat16}"], "a nano model is computed in float32"),
        (["models={mine: {hub: a/b}}", "model=mine", "conditions={same-init: }"], "`hub` and `revision` belong together"),
    ],
)
def test_recipes_of_adapters_that_cannot_be_are_refused(nano_recipe, settings, message):
    with pytest.raises(MechsubError, match=message):
        load_recipe(nano_recipe, settings)


@pytest.mark.parametrize("dora", [False, True])
def test_on_a_base_in_half_precision_adapters_start_at_it_and_keep_their_own_precision(tmp_path, architecture, dora):
    base = make_base(architecture).bfloat16()
    model = copy.deepcopy(base)
    attach_adapter(model, AdapterConfig(rank=2, dora=dora), 0)
    for name, module in model.named_modules():
        if dora and hasattr(module, "lora_magnitude_vector"):
            rows = module.get_base_layer().weight.float()
            norms = rows.norm(dim=0 if module.fan_in_fan_out else 1)
            torch.testing.assert_close(module.lora_magnitude_vector["default"].weight.data, norms, atol=0, rtol=1e-6, msg=name)
    saved = make_adapter(make_base(architecture), 1, use_dora=dora)
    saved.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    attach_saved_adapter(loaded, tmp_path, "a test")
    kept = load_file(tmp_path / "adapter_model.safetensors")
    found = {name: parameter for name, parameter in loaded.named_parameters() if "lora_" in name}
    assert len(found) == len(kept) and {parameter.dtype for parameter in found.values()} == {torch.float32}
    for name, tensor in kept.items():
        own = name.removeprefix("base_model.model.").replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
        own = own.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        assert torch.equal(found[own], tensor)
