"""Collectors against slow plain code in float64: every prompt by itself, without padding, every position by itself."""

import pytest
import torch

from mechsub.activations.backends import open_backend
from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.activations.recording import Covariances, Means, Projections, record
from mechsub.activations.steering import add_vector
from mechsub.errors import ActivationError
from mechsub.families.classifier.prompts import POSITION
from mechsub.families.classifier.prompts import list_hook_points as hidden_points
from mechsub.families.language.hook_points import list_hook_points
from tests.activations.tiny_models import WIDTH, make_classifier, make_model, make_prompts, pad, prompt_set

POLICIES = ("last", "all", "even")
NAMES = ("gpt2", "qwen2")
TOLERANCE = {"gpt2": 1e-12, "qwen2": 2e-6}
"""Qwen2 takes its norms and rotations in float32, also in a model of float64."""


def even_prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Each holds an even number."""
    prompts = make_prompts([3 + 5 * number % 7 for number in range(count)], seed)
    for prompt in prompts:
        prompt[1] = 2
    return prompts


def slow_states(model, prompts) -> list[dict[str, torch.Tensor]]:
    """What passes at each hook point, by prompt: [position, width] in float64, taken by hooks of its own."""
    found = []
    for prompt in prompts:
        states: dict[str, torch.Tensor] = {}
        handles = []
        for point in list_hook_points(model):
            module = model.get_submodule(point.module)

            def after(_, inputs, output, point=point, states=states):
                value = inputs[0] if point.side == "input" else output[0] if isinstance(output, tuple) else output
                states[point.name] = value[0].double()

            handles.append(module.register_forward_hook(after))
        with torch.no_grad():
            model(input_ids=prompt[None], use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(states)
    return found


def slow_places(prompt: torch.Tensor, policy: str) -> list[int]:
    return {
        "last": [len(prompt) - 1],
        "all": list(range(len(prompt))),
        "even": [place for place, token in enumerate(prompt.tolist()) if token % 2 == 0],
    }[policy]


def slow_mean(values: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total / len(values)


def collect(model, prompts: PromptSet, *collectors) -> None:
    with open_backend("hooks").open(model) as view:
        record(view, prompts.batches, list_hook_points(model), collectors)


@pytest.mark.parametrize("name", NAMES)
def test_means_are_the_mean_over_prompts_of_each_prompts_mean(name):
    model, prompts = make_model(name, torch.float64), even_prompts(7)
    states = slow_states(model, prompts)
    batched = prompt_set(prompts, at_once=3)
    columns = [batched.weigh(policy) for policy in POLICIES]
    weights = [torch.stack(batch, dim=-1) for batch in zip(*columns, strict=True)]
    found, placed = Means(weights), Means(weights, list_hook_points(model))
    collect(model, batched, found, placed)
    for point in list_hook_points(model):
        assert torch.equal(placed.sums[point.name], found.sums[point.name])
        for group, policy in enumerate(POLICIES):
            chosen = [
                [state[point.name][place] for place in slow_places(prompt, policy)]
                for state, prompt in zip(states, prompts, strict=True)
            ]
            wanted = slow_mean([slow_mean(rows) for rows in chosen])
            norm = slow_mean([slow_mean([row.square().sum().sqrt() for row in rows]) for rows in chosen])
            assert (found.sums[point.name][group] - wanted).abs().max() <= TOLERANCE[name] * wanted.abs().max()
            assert (found.norms[point.name][group] - norm).abs() <= TOLERANCE[name] * norm


@pytest.mark.parametrize("name", NAMES)
def test_neither_batch_size_nor_padding_changes_a_mean(name):
    model, prompts = make_model(name), even_prompts(9)
    wanted: dict[str, torch.Tensor] = {}
    ways = [
        prompt_set(prompts, at_once=1),
        prompt_set(prompts, at_once=4),
        prompt_set(prompts, at_once=9),
        prompt_set(prompts, at_once=4, side="right"),
        PromptSet("wider", [pad(prompts[:5], width=20), pad(prompts[5:], "right", width=17)]),
    ]
    for way in ways:
        for policy in POLICIES:
            found = Means([weights[..., None] for weights in way.weigh(policy)])
            collect(model, way, found)
            for point, value in found.sums.items():
                first = wanted.setdefault(f"{policy} {point}", value)
                assert (value - first).abs().max() <= 5e-6 * first.abs().max()


def test_covariances_are_those_of_all_chosen_positions_also_far_from_zero():
    model, prompts = make_model("gpt2", torch.float64), even_prompts(7)
    with torch.no_grad():
        model.transformer.wpe.weight += 1e5  # the stream lies far from 0, where squares cancel
    states = slow_states(model, prompts)
    batched = prompt_set(prompts, at_once=2)
    found = Covariances(batched.weigh("all"))
    collect(model, batched, found)
    for point in list_hook_points(model):
        rows = [(state[point.name], 1 / (len(prompts) * len(prompt))) for state, prompt in zip(states, prompts, strict=True)]
        mean = sum(weight * one for state, weight in rows for one in state)
        wanted = sum(weight * torch.outer(one - mean, one - mean) for state, weight in rows for one in state)
        assert (found.covariance(point) - wanted).abs().max() <= 1e-9 * wanted.diagonal().max()


def test_projections_are_inner_products_at_every_position_of_every_row():
    model, prompts = make_model("qwen2"), even_prompts(5)
    directions = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states = slow_states(model, prompts)
    points = list_hook_points(model)
    found = Projections({point.name: directions for point in points})
    collect(model, prompt_set(prompts, at_once=2), found)
    for point in points:
        rows = [row for batch in found.coefficients[point.name] for row in batch]
        for row, prompt, state in zip(rows, prompts, states, strict=True):
            wanted = torch.tensor([[float((one * direction).sum()) for direction in directions] for one in state[point.name]])
            torch.testing.assert_close(row[-len(prompt) :].float(), wanted, rtol=1e-5, atol=1e-5)


def test_what_collectors_hold_does_not_grow_with_the_number_of_prompts():
    model = make_model("gpt2")

    def held(count: int) -> int:
        prompts = prompt_set(even_prompts(count), at_once=4)
        weights = prompts.weigh("all")
        found = Means([one[..., None] for one in weights]), Covariances(weights)
        collect(model, prompts, *found)
        kept = [value for one in found for store in vars(one).values() if isinstance(store, dict) for value in store.values()]
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept)  # no view of a whole batch
        return sum(value.nbytes for value in kept)

    assert held(4) == held(64) > 0


def test_weights_sum_to_one_and_shares_of_a_prompt_are_equal():
    prompts = prompt_set(even_prompts(7), at_once=3)
    for policy in POLICIES:
        weights = prompts.weigh(policy)
        assert sum(float(one.sum()) for one in weights) == pytest.approx(1)
        for one, batch in zip(weights, prompts.batches, strict=True):
            assert torch.equal(one > 0, batch.positions[policy])
            torch.testing.assert_close(one.sum(-1), torch.full((batch.num_rows,), 1 / 7, dtype=torch.float64))


def test_a_prompt_without_the_position_asked_for_is_named():
    prompts = even_prompts(5)
    prompts[3] = torch.tensor([1, 3, 5])
    message = r"random tokens: prompt 3 has no position of 'even' \(1 of 2 in its batch have none\); leave such prompts out"
    with pytest.raises(ActivationError, match=message):
        prompt_set(prompts).weigh("even")
    with pytest.raises(ActivationError, match="no position policy 'first'; it has last, all, even"):
        prompt_set(prompts).weigh("first")


def test_16_bit_activations_are_summed_in_wider_numbers():
    model = make_model("gpt2", torch.bfloat16)
    prompts = even_prompts(40)
    states = slow_states(model, prompts)
    alone = prompt_set(prompts, at_once=1)
    found = Means([weights[..., None] for weights in alone.weigh("all")])
    collect(model, alone, found)
    for point, value in found.sums.items():
        wanted = slow_mean([slow_mean(list(state[point])) for state in states])
        assert value.dtype == torch.float64
        torch.testing.assert_close(value[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_hidden_units_without_positions_are_collected_alike():
    model = make_classifier()
    images = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(11, 1, dtype=torch.bool)
    batches = [ModelInputs({"images": images[part]}, {POSITION: everywhere[part]}) for part in (slice(0, 6), slice(6, 11))]
    prompts = PromptSet("images", batches)
    weights = prompts.weigh(POSITION)
    means, covariances = Means([one[..., None] for one in weights]), Covariances(weights)
    points = hidden_points({"num_pixels": 6, "hidden_widths": [5, 4]})
    with open_backend("hooks").open(model) as view:
        record(view, batches, points, [means, covariances])
    hidden = images
    for point, layer in zip(points, model.layers, strict=True):
        hidden = torch.nn.functional.gelu(hidden @ layer.weight.T + layer.bias)
        torch.testing.assert_close(means.sums[point.name][0], hidden.mean(0))
        torch.testing.assert_close(means.norms[point.name][0], hidden.norm(dim=1).mean())
        torch.testing.assert_close(covariances.covariance(point), torch.cov(hidden.T, correction=0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_vector_is_recovered_at_its_layer_and_nowhere_before(name, layer):
    """A bias of one MLP's output, as a training could leave it."""
    prompts = prompt_set(even_prompts(8))
    weights = [one[..., None] for one in prompts.weigh("last")]
    planted = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for has_it in (False, True):
        model = make_model(name)
        points = list_hook_points(model)
        (place,) = [point for point in points if point.name == f"blocks.{layer}.hook_mlp_out"]
        with open_backend("hooks").open(model) as view, view.visiting({place: add_vector(planted)} if has_it else {}):
            means = Means(weights)
            record(view, prompts.batches, points, [means])
        found.append(means.sums)
    moved = {point.name: (found[1][point.name] - found[0][point.name])[0] for point in points}
    names = [point.name for point in points]
    first = next(name for name in names if bool(moved[name].any()))
    assert first == f"blocks.{layer}.hook_mlp_out"
    for site in ("mlp_out", "resid_post"):
        assert torch.cosine_similarity(moved[f"blocks.{layer}.hook_{site}"], planted.double(), dim=0) > 0.99
