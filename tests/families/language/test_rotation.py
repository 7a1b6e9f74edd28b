"""Rotations of the residual stream: the same function, and what training makes of them."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mechsub.api import run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.models import load_parameters, parameters_of, tensor_table
from mechsub.families.language.rotation import draw_haar, find_layout, rotate_state
from mechsub.recipe import load_recipe
from tests.families.language.test_derived_references import ONE
from tests.families.language.test_symmetry import MODELS

IDS = torch.arange(27).reshape(3, 9)
TIED = {True: "tied", False: "untied"}


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """In float64 throughout: some families' norms are computed in float32 whatever the weights are."""
    monkeypatch.setattr(torch, "float32", torch.float64)


def make_model(name, tied, equal_gains=False):
    config = AutoConfig.for_model(name.split()[0], tie_word_embeddings=tied, **MODELS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if equal_gains:
            final = model.get_submodule("transformer.ln_f" if name == "gpt2" else "model.norm").weight
            final.fill_(1.3)
            final[:6] = 0.7
    return model


def rotate(model, seed=0):
    layout = find_layout(model.config, tensor_table(model), "the model")
    state, words = rotate_state(parameters_of(model), layout, np.random.default_rng(seed), "the model")
    return load_parameters(AutoModelForCausalLM.from_config(model.config).double().eval(), state), words


@pytest.mark.parametrize("equal_gains", [False, True])
@pytest.mark.parametrize("tied", TIED, ids=TIED.values())
@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_stream_computes_the_same_function(name, tied, equal_gains):
    model = make_model(name, tied, equal_gains)
    rotated, words = rotate(model)
    with torch.no_grad():
        torch.testing.assert_close(rotated(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)
        streams = [one(IDS, output_hidden_states=True).hidden_states[1] for one in (model, rotated)]
    assert not torch.allclose(*streams, atol=0.1)
    kind = "Haar-random" if equal_gains or not tied else "permutation"
    assert kind in words and ("in 2 groups" in words) == (equal_gains and tied)


@pytest.mark.parametrize("tied", TIED, ids=TIED.values())
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_stream_turns_by_one_orthogonal_matrix(name, tied):
    model = make_model(name, tied)
    rotated, _ = rotate(model)
    before, after = (one.get_input_embeddings().weight.detach() for one in (model, rotated))
    turn = torch.linalg.lstsq(before, after).solution
    torch.testing.assert_close(turn @ turn.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-9)
    is_permutation = bool(((turn.abs() - 1).abs().min(1).values < 1e-9).all())
    assert is_permutation == tied
    if name == "gpt2":
        torch.testing.assert_close(turn.sum(0), torch.ones(24, dtype=torch.float64))


def test_haar_matrices_are_orthogonal_and_have_the_moments_of_the_haar_measure():
    stream = np.random.default_rng(0)
    for fixes_ones, size in ((False, 4), (True, 5)):
        drawn = torch.stack([draw_haar(size, stream, fixes_ones=fixes_ones) for _ in range(4000)])
        torch.testing.assert_close(drawn @ drawn.mT, torch.eye(size, dtype=torch.float64).expand_as(drawn))
        mean = torch.full((size, size), 1 / size if fixes_ones else 0.0, dtype=torch.float64)
        torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.04)
        if not fixes_ones:
            torch.testing.assert_close(drawn.square().mean(0), torch.full((4, 4), 0.25, dtype=torch.float64), rtol=0, atol=0.02)


def train(model, make_optimizer, steps=4):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_follows_a_signed_permutation_whatever_the_optimizer(name, optimizer):
    model = make_model(name, tied=True)
    rotated, _ = rotate(model)
    settings = {"lr": 1e-2} | ({"eps": 1e-4} if optimizer is torch.optim.Adam else {})
    found = [train(one, partial(optimizer, **settings)) for one in (model, rotated)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_training_follows_any_rotation_under_sgd_with_fixed_gains_but_not_under_adam(name):
    start, _ = rotate(make_model(name, tied=False))  # folded, so that the gains of both are 1
    rotated, _ = rotate(start, seed=1)
    found = {}
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        pair = []
        for model in (start, rotated):
            copied = load_parameters(AutoModelForCausalLM.from_config(model.config).double().eval(), parameters_of(model))
            for key, parameter in copied.named_parameters():
                parameter.data = parameter.data.clone()
                parameter.requires_grad_("norm" not in key and "ln_" not in key)
            before = copied(IDS).logits.detach()
            pair.append(train(copied, partial(optimizer, lr=1e-2)) - before)
        found[optimizer] = float((pair[0] - pair[1]).norm() / pair[0].norm())
    assert found[torch.optim.SGD] < 1e-8 < 0.01 < found[torch.optim.Adam]


def test_an_architecture_that_is_not_known_is_refused():
    config = AutoConfig.for_model("gpt_neox", vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(MechsubError, match="gpt_neox model is not known.*known are gpt2, llama"):
        find_layout(config, {}, "`models.mine`")


def test_a_shift_that_no_unembedding_can_hold_is_refused():
    model = make_model("gpt2", tied=False)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0.0
    with pytest.raises(MechsubError, match="ln_f.weight is zero where transformer.ln_f.bias is not"):
        rotate(model)


def test_students_start_at_a_rotated_reference(nano_recipe, nano_cache, tmp_path, monkeypatch):
    monkeypatch.undo()  # runs are in float32
    recipe = load_recipe(nano_recipe, [ONE, "traits=[owl]", "conditions={same-init: , rotated-residual: }"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    reference, rotated = (run.lineages[f"reference.nano-gpt2{end}"] for end in ("", ".rotated"))
    before, after = (run.family.load_model(one, 0, 1) for one in (reference, rotated))
    torch.testing.assert_close(after(IDS).logits, before(IDS).logits, rtol=1e-5, atol=1e-5)
    assert rotated.spec.model["rotation"].startswith("a permutation")
    student = run.student("rotated-residual", "owl")
    assert student.spec.origin.lineage == rotated.name and not student.spec.origin.only_permuted
    assert not student.spec.origin.is_reference and run.starts_elsewhere(student)
