"""The oracle is a loop of backward passes, one example at a time, in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from mechsub.errors import AnalysisError
from mechsub.families.classifier.model import Classifier
from mechsub.gradients.losses import ExampleLosses
from mechsub.gradients.per_example import record_gram, record_overlaps

VOCABULARY, LENGTHS = 23, (9, 4, 7, 9, 2, 6, 5)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomise(model):
    """Every parameter far from its special start: norms not 1, biases and B not 0."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def classifier():
    spec = {"num_pixels": 6, "hidden_widths": [5, 4], "num_classes": 3, "num_auxiliary": 2, "activation": "gelu"}
    return randomise(Classifier(spec | {"dtype": "float64"}))


def gpt2(**settings):
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return randomise(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **settings)))


def qwen2(**settings):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    return randomise(Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **sizes, **settings)))


def adapted(model, modules):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=modules, lora_dropout=0.3, task_type="CAUSAL_LM")
    return randomise(get_peft_model(model, config))


class Norms(nn.Module):
    """Norms, the first with a weight of 0, and an embedding with a padding row, on [row, token] numbers."""

    def __init__(self, *norms):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, padding_idx=3)
        self.norms = nn.Sequential(*norms)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, ids):
        return self.head(self.norms(self.embedding(ids)))


def norms(*more):
    model = randomise(Norms(nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm((9, 6)), *more))
    with torch.no_grad():
        model.norms[0].weight[2] = 0.0
    return model


def image_losses(at_once=64):
    images = torch.randn(7, 6, dtype=torch.float64)
    wanted = torch.randn(7, 2, dtype=torch.float64).softmax(-1)

    def compute(model, examples):
        part = slice(examples.start, examples.stop)
        return functional.cross_entropy(model(images[part])[:, 3:], wanted[part], reduction="none")

    return ExampleLosses(7, compute, "images", at_once=at_once)


def token_losses(at_once=64, positions=True, kept=None):
    """Left-padded rows of several lengths with repeated tokens; the last tokens of each are predicted."""
    tokens = [torch.randint(0, VOCABULARY // 3, (length,)) for length in LENGTHS]

    def compute(model, examples):
        rows = [tokens[number] for number in examples]
        width = max(len(row) for row in rows)
        ids = torch.stack([functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        more = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
        more |= {"logits_to_keep": min(kept, width)} if kept else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, :-1]
        losses = functional.cross_entropy(logits.mT, ids[:, ids.shape[1] - logits.shape[1] :], reduction="none")
        is_predicted = mask.cumsum(-1) > 1  # a row's first token has nothing before it but padding
        return (losses * is_predicted[:, mask.shape[1] - logits.shape[1] :]).sum(-1)

    return ExampleLosses(len(tokens), compute, "tokens", at_once=at_once)


def equal_length_losses(at_once=64):
    ids = torch.randint(0, VOCABULARY // 3, (7, 9))

    def compute(model, examples):
        part = ids[examples.start : examples.stop]
        found = model(part)
        logits = getattr(found, "logits", found)[:, :-1]
        return functional.cross_entropy(logits.mT, part[:, 1:], reduction="none").mean(-1)

    return ExampleLosses(7, compute, "equal lengths", at_once=at_once)


CASES = {
    "classifier": (classifier, image_losses),
    "GPT-2, tied": (gpt2, token_losses),
    "GPT-2, untied": (lambda: gpt2(tie_word_embeddings=False), lambda: token_losses(kept=4)),
    "GPT-2, positions looked up once for all rows": (gpt2, equal_length_losses),
    "Qwen2, tied": (lambda: qwen2(tie_word_embeddings=True), token_losses),
    "Qwen2, untied, padding row": (lambda: qwen2(tie_word_embeddings=False, pad_token_id=2), lambda: token_losses(kept=4)),
    "Qwen2, tied, padding row": (lambda: qwen2(tie_word_embeddings=True, pad_token_id=2), token_losses),
    "GPT-2 with LoRA": (lambda: adapted(gpt2(), ["c_attn", "c_proj"]), token_losses),
    "Qwen2 with LoRA": (lambda: adapted(qwen2(), ["q_proj", "down_proj"]), token_losses),
    "norms": (norms, equal_length_losses),
}


def gradients_one_by_one(model, losses):
    """[example] dicts; zero where the loss does not reach a parameter."""
    model.requires_grad_(True)
    found = []
    for number in range(losses.num_examples):
        model.zero_grad()
        losses.compute(model, range(number, number + 1)).sum().backward()
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return found


def random_directions(model, count=3):
    return [{name: torch.randn_like(parameter) for name, parameter in model.named_parameters()} for _ in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_overlaps_and_norms_equal_a_loop_of_backward_passes(case):
    model, losses = (make() for make in CASES[case])
    directions, wanted = random_directions(model), gradients_one_by_one(model, losses)
    found = record_overlaps(model, losses, directions)
    assert found.parameters == tuple(dict(model.named_parameters()))
    for column, name in enumerate(found.parameters):
        overlaps = [[(gradient[name] * direction[name]).sum() for direction in directions] for gradient in wanted]
        torch.testing.assert_close(found.overlaps[:, :, column], torch.tensor(overlaps), rtol=1e-9, atol=1e-10)
        squares = torch.stack([gradient[name].square().sum() for gradient in wanted])
        torch.testing.assert_close(found.squared_norms[:, column], squares, rtol=1e-9, atol=1e-10)
    values = torch.cat([losses.compute(model, range(k, k + 1)) for k in range(losses.num_examples)]).detach()
    torch.testing.assert_close(found.losses, values)


def test_a_norm_whose_weight_counts_from_1_is_told_from_the_others():
    """It computes in float32, whatever the model's type is."""
    model, losses = norms(GemmaRMSNorm(6)), equal_length_losses()
    wanted = torch.stack([gradient["norms.3.weight"] for gradient in gradients_one_by_one(model, losses)])
    direction = torch.randn(6, dtype=torch.float64)
    found = record_overlaps(model, losses, [{"norms.3.weight": direction}], ["norms.3.weight"])
    torch.testing.assert_close(found.overlaps[:, 0, 0], wanted @ direction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.squared_norms[:, 0], wanted.square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_gram_matrix_is_that_of_the_gradients(case):
    model, losses = (make() for make in CASES[case])
    wanted = gradients_one_by_one(model, losses)
    found = record_gram(model, losses)
    for number, name in enumerate(found.parameters):
        flat = torch.stack([gradient[name].flatten() for gradient in wanted])
        torch.testing.assert_close(found.by_parameter[number], flat @ flat.T, rtol=1e-9, atol=1e-10)
    assert float(torch.linalg.eigvalsh(found.total).min()) > -1e-9 * float(found.total.abs().max())
    overlaps = record_overlaps(model, losses, [])
    torch.testing.assert_close(found.by_parameter.diagonal(dim1=1, dim2=2).T, overlaps.squared_norms, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["classifier", "GPT-2, tied", "Qwen2, tied"])
def test_batches_change_nothing(case, monkeypatch):
    make, make_losses = CASES[case]
    model, losses = make(), make_losses()
    directions = random_directions(model)
    whole, gram = record_overlaps(model, losses, directions), record_gram(model, losses)
    monkeypatch.setattr("mechsub.gradients.factors._NUMBERS_AT_ONCE", 300)
    for at_once in (1, 3):
        cut = ExampleLosses(losses.num_examples, losses.compute, losses.description, at_once=at_once)
        found = record_overlaps(model, cut, directions)
        torch.testing.assert_close(found.overlaps, whole.overlaps)
        torch.testing.assert_close(found.squared_norms, whole.squared_norms)
        torch.testing.assert_close(record_gram(model, cut).by_parameter, gram.by_parameter)


def test_some_parameters_are_measured_alone():
    model, losses = adapted(gpt2(), ["c_attn"]), token_losses()
    directions = random_directions(model, 1)
    everything = record_overlaps(model, losses, directions)
    trained = [name for name in everything.parameters if "lora_" in name]
    found = record_overlaps(model, losses, directions, trained)
    assert found.parameters == tuple(trained)
    columns = [everything.parameters.index(name) for name in trained]
    torch.testing.assert_close(found.overlaps, everything.overlaps[:, :, columns])
    partial = record_overlaps(model, losses, [{trained[0]: directions[0][trained[0]]}])
    assert partial.overlaps.abs().sum(0)[0].nonzero().tolist() == [[columns[0]]]


def test_what_the_loss_does_not_reach_is_exactly_zero():
    model, losses = classifier(), image_losses()
    found = record_overlaps(model, losses, random_directions(model, 1))
    column = found.parameters.index("class_head.weight")
    assert found.squared_norms[:, column].max() == 0 == found.overlaps[:, :, column].abs().max()
    constant = ExampleLosses(2, lambda model, examples: torch.ones(len(examples)), "a constant")
    assert record_overlaps(model, constant, []).squared_norms.max() == 0


def test_the_model_is_left_as_it_was():
    model, losses = adapted(gpt2(), ["c_attn"]), token_losses()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    logits = losses.compute(model, range(2))
    record_overlaps(model, losses, random_directions(model, 1))
    record_gram(model, losses)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(losses.compute(model, range(2)), logits, rtol=0, atol=0)


def test_half_precision_is_multiplied_in_float32():
    """Inputs and gradients are as the model has them; nothing more is lost in their products."""
    model = nn.Linear(64, 48).bfloat16()
    inputs, gradients = (torch.randn(5, 30, width).bfloat16() for width in (64, 48))

    def compute(model, examples):
        part = slice(examples.start, examples.stop)
        return (model(inputs[part]).float() * gradients[part].float()).sum((1, 2))

    direction = torch.randn(48, 64)
    found = record_overlaps(model, ExampleLosses(5, compute, "products"), [{"weight": direction}])
    wanted = torch.einsum("ito,itp->iop", gradients.double(), inputs.double())
    torch.testing.assert_close(found.overlaps[:, 0, 0], (wanted * direction.double()).sum((1, 2)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.squared_norms[:, 0], wanted.square().sum((1, 2)), rtol=1e-5, atol=1e-4)


class Functional(nn.Module):
    """Reads out with the embedding's weight, without calling it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)

    def forward(self, ids):
        return functional.linear(self.embedding(ids), self.embedding.weight)


class Bare(Functional):
    """A parameter of no module of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, ids):
        return functional.linear(self.embedding(ids) * self.scale, self.embedding.weight.detach())


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.mix = nn.Conv1d(6, VOCABULARY, 1)

    def forward(self, ids):
        return self.mix(self.embedding(ids).mT).mT


class Cumulative(nn.Module):
    """A weight and nothing else, but not element by element."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, inputs):
        return inputs * self.weight.cumsum(0)


class Sequential(nn.Sequential):
    def __init__(self, *modules):
        super().__init__(nn.Embedding(VOCABULARY, 6), *modules, nn.Linear(6, VOCABULARY))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Functional, "embedding.weight.*2 times.*explain 1.*leave them out"),
        (Bare, r"scale cannot.*the model \(Bare\).*no kind"),
        (Convolution, r"mix.weight \(1 further.*Conv1d.*no kind"),
        (lambda: Sequential(Cumulative()), "1.weight.*Cumulative.*no kind"),
    ],
)
def test_an_unknown_use_is_refused_by_name(make, message):
    with pytest.raises(AnalysisError, match=message):
        record_overlaps(make().double(), equal_length_losses(), [])


def test_an_unknown_use_does_not_stop_the_others():
    model, losses = randomise(Convolution()), equal_length_losses()
    direction = random_directions(model, 1)
    found = record_overlaps(model, losses, direction, ["embedding.weight"])
    wanted = [
        (gradient["embedding.weight"] * direction[0]["embedding.weight"]).sum()
        for gradient in gradients_one_by_one(model, losses)
    ]
    torch.testing.assert_close(found.overlaps[:, 0, 0], torch.stack(wanted))


class Meeting(nn.Module):
    def forward(self, inputs):
        return inputs - inputs.mean(0)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, inputs):
        inputs = inputs * 1
        found = self.linear(inputs)
        return inputs.add_(found)


class Choosing(nn.Module):
    """Another linear layer for later rows."""

    def __init__(self):
        super().__init__()
        self.first, self.later = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, inputs):
        return self.first(inputs) if len(inputs) == 2 else self.later(inputs)


class Flattening(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, inputs):
        return self.linear(inputs.flatten(0, 1)).view_as(inputs)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Meeting, "depends on the others of its batch.*at_once"),
        (Choosing, "examples 0 to 6 use 1.later.* more often than the first two"),
        (Flattening, r"Linear was given 63 rows for 7 examples \(shape \[63, 6\]\)"),
    ],
)
def test_a_model_whose_gradients_cannot_be_told_apart_is_refused(layer, message):
    with pytest.raises(AnalysisError, match=message):
        record_overlaps(Sequential(layer()).double(), equal_length_losses(), [])


def test_an_overwritten_input_is_noticed():
    """One example alone has no company to be told from, in which torch would see it."""
    losses = equal_length_losses()
    with pytest.raises(AnalysisError, match="input of a Linear .*1.linear.weight.*overwritten"):
        record_overlaps(Sequential(Overwriting()).double(), ExampleLosses(1, losses.compute, "one"), [])


def test_wrong_directions_and_losses_are_named():
    model, losses = classifier(), image_losses()
    with pytest.raises(AnalysisError, match="'nobody', which is no parameter of the model.*layers.0.weight"):
        record_overlaps(model, losses, [{"nobody": torch.ones(2)}])
    with pytest.raises(AnalysisError, match=r"shape \[2\] in layers.0.weight, the parameter \[5, 6\]"):
        record_overlaps(model, losses, [{"layers.0.weight": torch.ones(2)}])
    with pytest.raises(AnalysisError, match="no parameter 'lm_head'"):
        record_overlaps(model, losses, [], ["lm_head"])
    with pytest.raises(AnalysisError, match="no examples in nothing"):
        record_overlaps(model, ExampleLosses(0, losses.compute, "nothing"), [])
    with pytest.raises(AnalysisError, match=r"2 examples gave losses of shape \[\]"):
        record_overlaps(model, ExampleLosses(4, lambda *a: losses.compute(*a).mean(), "a mean"), [])
