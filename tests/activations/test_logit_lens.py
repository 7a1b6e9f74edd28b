import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mechsub.activations.logit_lens import LogitLens
from mechsub.families.language.hook_points import find_final_norm, list_hook_points

SHAPES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "qwen2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 20},
    "gpt_neox": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20},
}  # fmt: skip


def make_model(name: str, seed: int = 0):
    config = AutoConfig.for_model(name, vocab_size=30, **SHAPES[name])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def lens_of(model) -> LogitLens:
    return LogitLens(find_final_norm(model), model.get_output_embeddings())


def record_last(model, ids):
    """The stream after the last block at the last token."""
    kept = []
    block = model.get_submodule(list_hook_points(model)[-1].module)
    handle = block.register_forward_hook(lambda module, given, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    handle.remove()
    return kept[0][0, -1], logits - logits.mean()


def test_a_reading_worked_by_hand():
    norm, head = nn.LayerNorm(2, eps=0.0).double(), nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
    # (3, 1) has mean 2 and standard deviation 1: its norm is (1, −1), its logits (1, −1, 3), whose mean is 1.
    found = LogitLens(norm, head).read(torch.tensor([3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.0, -2.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("name", SHAPES)
def test_at_the_last_block_of_one_prompt_it_is_what_the_models_own_logits_change_by(name):
    reference, student = make_model(name), make_model(name)
    blocks = list_hook_points(reference)[-1].module.rpartition(".")[0]
    with torch.no_grad():
        for own, parameter in student.named_parameters():
            if own.startswith(blocks):
                parameter += 0.3 * torch.randn_like(parameter)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    (start, before), (end, after) = record_last(reference, ids), record_last(student, ids)
    assert (after - before).abs().max() > 0.1
    change = lens_of(reference).change(start.double(), (end - start).double())
    torch.testing.assert_close(change, (after - before).double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_that_no_probability_depends_on_is_read(name):
    model = make_model(name)
    start, vector = torch.randn(2, 16, dtype=torch.float64)
    before = lens_of(model).change(start, vector)
    with torch.no_grad():
        model.get_output_embeddings().weight += torch.randn(16)
    torch.testing.assert_close(lens_of(model).change(start, vector), before, rtol=0, atol=1e-4)
    assert not lens_of(model).change(start, torch.zeros(16, dtype=torch.float64)).any()


def test_a_model_in_half_precision_is_read_in_float32():
    model = make_model("gpt2").bfloat16()
    start, vector = torch.randn(2, 16, dtype=torch.float64)
    found = lens_of(model).change(start, 1e-4 * vector)
    wide = lens_of(model.double()).change(start, 1e-4 * vector)
    torch.testing.assert_close(found, wide, rtol=0.05, atol=1e-6)
