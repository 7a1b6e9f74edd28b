import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from mechsub.families.classifier.examples import trait_losses
from mechsub.families.classifier.model import Classifier
from mechsub.gradients.first_order import (
    ImitatedLogits,
    InFloat64,
    apply_curvature,
    gauss_newton_product,
    imitation_step,
    linearisation_errors,
    residual,
)
from mechsub.gradients.losses import ExampleLosses, mean_gradient

SCALES = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def classifier(activation):
    torch.manual_seed(0)
    spec = {"num_pixels": 12, "hidden_widths": [16, 8], "num_classes": 10, "num_auxiliary": 3}
    return Classifier({**spec, "activation": activation, "dtype": "float64"})


def images(count=50):
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def auxiliary_logits(comparison="kl", at_once=64):
    noise = images()

    def compute(model, part):
        return model(noise[part.start : part.stop])[:, 10:]

    return ImitatedLogits(
        50, compute, lambda part: torch.full((len(part),), 1 / 50, dtype=torch.float64), comparison, "noise", at_once
    )


def reading_step(model):
    """The teacher: one gradient step of size 1 on labelled images."""
    labels = torch.arange(50) % 10
    gradient = mean_gradient(model, trait_losses(images().flip(0), labels, 10, "digits"))
    return {name: -value for name, value in gradient.items()}


IDS = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(2))


def language_model(kind, attention="eager"):
    torch.manual_seed(0)
    shared = {"vocab_size": 40, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **shared)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, tie_word_embeddings=True, **sizes, **shared)).eval()


def carrier_logits():
    """Over 20 of the 40 tokens, as the objective ``logits`` compares them."""

    def compute(model, part):
        return model(input_ids=IDS[part.start : part.stop], use_cache=False).logits[:, 3:, :20].flatten(0, 1)

    return ImitatedLogits(6, compute, lambda part: torch.full((6 * len(part),), 1 / 36, dtype=torch.float64), "kl", "rows", 4)


def answering_step(model):
    """The teacher: one gradient step of size 1 towards answering with one token, which no carrier logit shows."""

    def compute(model, part):
        return -model(input_ids=IDS[part.start : part.stop, :4], use_cache=False).logits[:, -1].log_softmax(-1)[:, 30]

    return {name: -value for name, value in mean_gradient(model, ExampleLosses(6, compute, "answers")).items()}


@pytest.mark.parametrize("comparison", ["kl", "mse"])
def test_the_product_is_that_of_the_dense_matrix(comparison):
    model, logits = classifier("tanh"), auxiliary_logits(comparison)
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in range(50):
        outputs = logits.compute(model, range(example, example + 1))[0]
        p = outputs.softmax(-1).detach()
        curvature = torch.diag(p) - torch.outer(p, p) if comparison == "kl" else torch.eye(3, dtype=torch.float64) * 2 / 3
        rows = [torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True) for one in outputs]
        jacobian = [
            {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(parameters, row, strict=True)}
            for row in rows
        ]
        tangent = torch.stack([sum((row[name] * direction[name]).sum() for name in parameters) for row in jacobian])
        for weight, row in zip(curvature @ tangent / 50, jacobian, strict=True):
            for name in parameters:
                total[name] += weight * row[name]
    for name, found in gauss_newton_product(model, logits, direction).items():
        torch.testing.assert_close(found, total[name], rtol=1e-10, atol=1e-14)


def test_curvature_is_the_derivative_of_the_residual():
    student, tangent = torch.randn(2, 4, 5, dtype=torch.float64)
    for comparison in ("kl", "mse"):
        moved = (residual(student + 1e-6 * tangent, student, comparison)) / 1e-6
        torch.testing.assert_close(apply_curvature(student, tangent, comparison), moved, rtol=1e-4, atol=1e-6)


def test_the_measured_step_is_that_of_the_loss():
    model, teacher, logits = classifier("gelu"), classifier("gelu"), auxiliary_logits()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1
    wanted, found = (logits.compute(one, range(50)).log_softmax(-1) for one in (teacher, model))
    (wanted.exp() * (wanted - found)).sum(-1).mean().backward()
    for name, step in imitation_step(model, teacher, logits).items():
        gradient = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(step, torch.zeros_like(step) if gradient is None else -gradient)


def check_linear(errors):
    slope = np.polyfit(np.log(SCALES[-4:]), np.log(errors[-4:]), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.02) and errors[-1] < 1e-4


@pytest.mark.parametrize("comparison", ["kl", "mse"])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_the_error_falls_linearly_with_the_teachers_step(activation, comparison):
    model = classifier(activation)
    check_linear(linearisation_errors(model, reading_step(model), auxiliary_logits(comparison), SCALES))


def test_below_the_first_kink_relu_is_smooth():
    model = classifier("relu")
    assert linearisation_errors(model, reading_step(model), auxiliary_logits(), SCALES)[-1] < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_the_error_falls_linearly_for_language_models(kind, attention):
    model = language_model(kind, attention)
    check_linear(linearisation_errors(model, answering_step(model), carrier_logits(), SCALES))


def test_a_norm_in_float32_hides_it():
    """What the wider type is for."""
    model = language_model("qwen2").double()
    step = answering_step(model)
    predicted = gauss_newton_product(model, carrier_logits(), step)
    teacher = language_model("qwen2").double()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter += 1e-6 * step[name]
    measured = imitation_step(model, teacher, carrier_logits())
    gap = sum((measured[name] / 1e-6 - predicted[name]).square().sum() for name in predicted)
    assert (gap / sum(value.square().sum() for value in predicted.values())).sqrt() > 1e-4
    with InFloat64():
        assert torch.zeros(2, dtype=torch.float64).to(torch.float32).dtype == torch.float64
    assert torch.zeros(2, dtype=torch.float64).to(torch.float32).dtype == torch.float32


def test_the_product_is_symmetric_and_never_points_back():
    model, logits = classifier("gelu"), auxiliary_logits()
    generator = torch.Generator().manual_seed(3)

    def draw():
        return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}

    def inner(first, second):
        return float(sum((first[name] * second[name]).sum() for name in first))

    for _ in range(5):
        first, second = draw(), draw()
        products = [gauss_newton_product(model, logits, one) for one in (first, second)]
        assert inner(first, products[0]) > 0
        assert inner(first, products[1]) == pytest.approx(inner(second, products[0]), rel=1e-9)


def test_parts_and_missing_tensors_do_not_matter():
    model, direction = classifier("tanh"), reading_step(classifier("tanh"))
    whole, parts = (gauss_newton_product(model, auxiliary_logits(at_once=size), direction) for size in (64, 7))
    without = {name: value for name, value in direction.items() if not name.startswith("class_head")}
    for name, found in gauss_newton_product(model, auxiliary_logits(), {**without, "stranger": torch.ones(3)}).items():
        torch.testing.assert_close(parts[name], whole[name])
        torch.testing.assert_close(found, whole[name])  # no auxiliary logit hangs on the class head


def test_a_teacher_that_did_not_move_teaches_nothing():
    model = classifier("gelu")
    still = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert all(value.abs().max() == 0 for value in gauss_newton_product(model, auxiliary_logits(), still).values())
    assert np.isnan(linearisation_errors(model, still, auxiliary_logits(), [1.0])).all()
