"""Three backends reach the same activations, and leave the model as it was."""

import importlib.util
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

from mechsub.activations.backends import BACKENDS, ForwardStopped, open_backend
from mechsub.activations.hook_points import HookPoint, find_hook_point
from mechsub.activations.recording import Means, record
from mechsub.activations.steering import add_vector, keep_components, project_out, replace_components
from mechsub.errors import ActivationError
from mechsub.families.classifier.prompts import list_hook_points as classifier_points
from mechsub.families.language.hook_points import list_hook_points
from tests.activations.tiny_models import (
    BLOCKS,
    WIDTH,
    add_adapter,
    make_classifier,
    make_model,
    make_prompts,
    pad,
    prompt_set,
)

OTHERS = ("nnsight", "transformer_lens")
BOTH = ("gpt2", "qwen2")
TOLERANCE = {"nnsight": 0.0, "transformer_lens": 2e-6}
"""As a share of the largest value: TransformerLens computes attention in another order, in float32."""


def assert_near(found: torch.Tensor, wanted: torch.Tensor, backend: str) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE[backend] * wanted.abs().max()


def means(model: nn.Module, backend: str, points=None) -> dict[str, torch.Tensor]:
    prompts = prompt_set(make_prompts())
    found = Means([weights[..., None] for weights in prompts.weigh("all")])
    with open_backend(backend).open(model) as view:
        record(view, prompts.batches, points or list_hook_points(model), [found])
    return found.sums


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", BOTH)
def test_backends_record_the_same_means_at_every_hook_point(name, backend):
    model = make_model(name)
    wanted, found = means(model, "hooks"), means(model, backend)
    assert set(found) == set(wanted) == {point.name for point in list_hook_points(model)}
    for point, value in wanted.items():
        assert_near(found[point], value, backend)


def steered_logits(model: nn.Module, backend: str, visits) -> torch.Tensor:
    batch = pad(make_prompts())
    with torch.no_grad(), open_backend(backend).open(model) as view, view.visiting(visits):
        return view.model(**batch.arguments, logits_to_keep=1).logits


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", BOTH)
def test_backends_steer_to_the_same_logits_at_every_hook_point(name, backend):
    model = make_model(name)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    kept: list[torch.Tensor] = []
    plain = steered_logits(model, "hooks", {})
    assert_near(steered_logits(model, backend, {}), plain, backend)
    steered_logits(model, "hooks", {list_hook_points(model)[0]: keep_components(vector[None], kept)})
    for point in list_hook_points(model):
        for steer in (
            lambda: add_vector(vector),
            lambda: project_out(vector[None]),
            lambda: replace_components(vector[None], [one + 1 for one in kept]),
        ):
            wanted = steered_logits(model, "hooks", {point: steer()})
            assert not torch.equal(wanted, plain)
            assert_near(steered_logits(model, backend, {point: steer()}), wanted, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_visits_at_several_points_and_in_two_contexts_are_made_in_the_order_of_the_forward_pass(backend):
    model = make_model("gpt2")
    points = list_hook_points(model)
    order: list[str] = []
    visits = {point: lambda _, name=point.name: order.append(name) for point in points}
    first, second = dict(list(visits.items())[::2]), dict(reversed(list(visits.items())[1::2]))
    with open_backend(backend).open(model) as view, view.visiting(first):
        with view.visiting(second):
            view.model(**pad(make_prompts()).arguments)
        assert order == [point.name for point in points]
        view.model(**pad(make_prompts()).arguments)
    assert order[len(points) :] == [point.name for point in first]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_stands_in_for_the_model_where_answers_are_sampled(backend):
    model = make_model("qwen2")
    batch = pad(make_prompts())
    arguments = {name: batch.arguments[name] for name in ("input_ids", "attention_mask")}
    point = find_hook_point(list_hook_points(model), "blocks.1.hook_resid_post")
    visit = add_vector(3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))

    def answer(backend: str, visits) -> torch.Tensor:
        with open_backend(backend).open(model) as view, view.visiting(visits):
            assert view.model.device == model.device
            return view.model.generate(**arguments, max_new_tokens=5, do_sample=False, eos_token_id=None)

    wanted = answer("hooks", {point: visit})
    assert wanted.shape[1] == arguments["input_ids"].shape[1] + 5
    assert not torch.equal(wanted, model.generate(**arguments, max_new_tokens=5, do_sample=False, eos_token_id=None))
    assert torch.equal(answer(backend, {point: visit}), wanted)


@pytest.mark.parametrize("name", ("gpt2", "qwen2", "llama", "gpt_neox"))
def test_what_is_added_to_the_stream_is_what_the_hook_points_give(name):
    """Σ of attn_out and mlp_out up to a layer, on the first resid_pre, is its resid_post: also what the names promise."""
    model = make_model(name, torch.float64)
    found = means(model, "hooks")
    stream = found["blocks.0.hook_resid_pre"]
    for layer in range(3):
        stream = stream + found[f"blocks.{layer}.hook_attn_out"] + found[f"blocks.{layer}.hook_mlp_out"]
        torch.testing.assert_close(stream, found[f"blocks.{layer}.hook_resid_post"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOTH)
def test_a_forward_pass_ends_after_the_last_hook_point_that_is_asked_for(name, backend):
    model = make_model(name)
    points = [point for point in list_hook_points(model) if point.layer == 0 and point.site != "resid_post"]
    entered: list[str] = []
    later = [f"{BLOCKS[name]}.{layer}" for layer in (1, 2)]
    with open_backend(backend).open(model) as view:
        for path in (f"{BLOCKS[name]}.0", *later, "lm_head"):
            view.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: entered.append(path))
        record(view, prompt_set(make_prompts()).batches, points, [])
        assert entered == [f"{BLOCKS[name]}.0"] * 2
        with torch.no_grad(), view.visiting({points[0]: stop}), pytest.raises(ForwardStopped):
            view.model(**pad(make_prompts()).arguments)
        view.model(**pad(make_prompts()).arguments)
    assert entered[3:] == [f"{BLOCKS[name]}.0", *later, "lm_head"]


def stop(_: torch.Tensor) -> None:
    raise ForwardStopped


def state_of(model: nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "held": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[dict(getattr(module, kind)) for kind in hooks] for module in model.modules()],
        "parameters": [(name, id(one), one.requires_grad, one.grad) for name, one in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "backward": torch.Tensor.backward,
    }


@pytest.mark.parametrize("error", (None, RuntimeError, ForwardStopped))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOTH)
def test_a_model_is_as_it_was_when_a_context_closes_also_by_an_error(name, backend, error):
    model = make_model(name)
    list(model.parameters())[1].requires_grad_(False)
    model.get_submodule(BLOCKS[name]).train()
    batch = pad(make_prompts())
    before, weights = state_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    logits = model.eval()(**batch.arguments).logits
    model.get_submodule(BLOCKS[name]).train()
    points = list_hook_points(model)

    def visit(activations: torch.Tensor) -> torch.Tensor:
        if error is not None:
            raise error("in the middle")
        return activations + 1

    with suppress(RuntimeError, ForwardStopped), open_backend(backend).open(model) as view:
        with view.visiting({points[4]: visit}):
            view.model(**batch.arguments)
        raise RuntimeError
    assert state_of(model) == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(**batch.arguments).logits, logits)


@pytest.mark.parametrize("backend", ("hooks", "nnsight"))
def test_the_classifiers_hidden_layers_go_through_the_same_protocol(backend):
    model = make_classifier()
    images = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = classifier_points({"num_pixels": 6, "hidden_widths": [5, 4]})
    shift = torch.arange(4.0, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), open_backend(backend).open(model) as view:
        with view.visiting({point: lambda value, name=point.name: seen.update({name: value}) for point in points}):
            view.model(images=images)
        with view.visiting({points[-1]: add_vector(shift)}):
            steered = view.model(images=images)
    hidden = images
    for number, layer in enumerate(model.layers):
        hidden = nn.functional.gelu(hidden @ layer.weight.T + layer.bias)
        torch.testing.assert_close(seen[f"blocks.{number}.mlp.hook_post"], hidden)
    head = torch.cat([model.class_head.weight, model.auxiliary_head.weight])
    torch.testing.assert_close(steered - model(images), (head @ shift).expand(7, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_in_16_bits_is_read(backend):
    model = make_model("qwen2", torch.bfloat16)
    wide, found = means(model.float(), "hooks"), means(model.bfloat16(), backend)
    for point, value in wide.items():
        assert found[point].dtype == torch.float64
        torch.testing.assert_close(found[point], value, rtol=0, atol=0.05 * float(value.abs().max()))


@pytest.mark.parametrize("backend", OTHERS)
def test_adapters_count_in_every_backend(backend):
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = means(make_model("qwen2"), "hooks")
    model = add_adapter(make_model("qwen2"), modules)
    wanted, found = means(model, "hooks"), means(model, backend)
    for point, value in wanted.items():
        assert point == "blocks.0.hook_resid_pre" or not torch.allclose(value, plain[point], rtol=1e-3)
        assert_near(found[point], value, backend)


def test_transformer_lens_refuses_an_adapter_that_it_would_leave_out():
    model = add_adapter(make_model("gpt2"), ["c_attn"], fan_in_fan_out=True)
    message = "would leave the adapter out; `--backend hooks` and `--backend nnsight` read a model's own modules"
    with pytest.raises(ActivationError, match=message), open_backend("transformer_lens").open(model):
        pass


def test_transformer_lens_refuses_64_bits():
    with pytest.raises(ActivationError, match="NaN for padded prompts"):
        means(make_model("qwen2", torch.float64), "transformer_lens")


def test_transformer_lens_says_which_backend_knows_a_classifier():
    message = "does not know the architecture Classifier; `--backend hooks` and `--backend nnsight`"
    with pytest.raises(ActivationError, match=message), open_backend("transformer_lens").open(make_classifier()):
        pass


@pytest.mark.parametrize("backend", ("hooks", "nnsight"))
def test_a_backend_says_which_one_knows_an_architecture_that_it_does_not(backend):
    message = (
        f"{backend} does not know which module of a Gemma2ForCausalLM is blocks.0.hook_resid_pre; `--backend transformer_l"
    )
    with pytest.raises(ActivationError, match=message):
        means(make_model("gemma2"), backend)


def test_transformer_lens_reads_an_architecture_that_puts_a_norm_before_the_stream():
    found = means(make_model("gemma2"), "transformer_lens")
    stream = found["blocks.0.hook_resid_pre"]
    for layer in range(3):
        stream = stream + found[f"blocks.{layer}.hook_attn_out"] + found[f"blocks.{layer}.hook_mlp_out"]
        torch.testing.assert_close(stream, found[f"blocks.{layer}.hook_resid_post"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("hooks", "nnsight"))
def test_a_hook_point_of_another_architecture_is_refused(backend):
    with pytest.raises(ActivationError, match=r"no module 'model.layers.0', where blocks.0.hook_resid_pre is read"):
        means(make_model("gpt2"), backend, list_hook_points(make_model("qwen2")))


def test_transformer_lens_refuses_a_hook_point_that_it_lacks():
    point = HookPoint("blocks.0.mlp.hook_past", 0, "past", "transformer.h.0", "output", WIDTH)
    with pytest.raises(ActivationError, match=r"has no hook point blocks.0.mlp.hook_past"):
        means(make_model("gpt2"), "transformer_lens", [point])


def test_a_backend_that_is_not_known_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(ActivationError, match="there is no backend 'transformerlens'; did you mean `transformer_lens`?"):
        open_backend("transformerlens")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert open_backend("hooks").name == "hooks"
    for backend in OTHERS:
        with pytest.raises(ActivationError, match=r"pip install 'mechsub\[backends\]'"):
            open_backend(backend)


def test_the_adapter_can_be_imported_after_the_library_itself():
    """Which by then has given every object a method ``save``."""
    program = "import nnsight; from mechsub.activations.backends import open_backend; print(open_backend('nnsight').name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "nnsight", done.stderr
