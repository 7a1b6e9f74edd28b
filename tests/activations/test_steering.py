"""What steering does undoes, repeats and leaves alone."""

import pytest
import torch

from mechsub.activations.backends import open_backend
from mechsub.activations.steering import (
    add_vector,
    keep_components,
    orthonormal_rows,
    project_out,
    push_along,
    replace_components,
)
from mechsub.errors import ActivationError
from mechsub.families.language.hook_points import list_hook_points
from tests.activations.tiny_models import WIDTH, make_model, make_prompts, pad

DIRECTIONS = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DEPENDENT = torch.cat([DIRECTIONS, DIRECTIONS[:1] - 2 * DIRECTIONS[1:2], torch.zeros(1, WIDTH)])


@pytest.fixture
def model():
    return make_model("gpt2", torch.float64)


def logits(model, *contexts) -> torch.Tensor:
    """Of a model with visits, the first context being opened first."""
    batch = pad(make_prompts())
    with torch.no_grad(), open_backend("hooks").open(model) as view:
        if not contexts:
            return view.model(**batch.arguments).logits
        with view.visiting(contexts[0]):
            if len(contexts) == 1:
                return view.model(**batch.arguments).logits
            with view.visiting(contexts[1]):
                return view.model(**batch.arguments).logits


def test_adding_a_vector_and_then_its_negative_restores(model):
    for point in list_hook_points(model):
        there, back = {point: add_vector(DIRECTIONS[0])}, {point: add_vector(-DIRECTIONS[0])}
        torch.testing.assert_close(logits(model, there, back), logits(model), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(logits(model, there), logits(model), rtol=1e-3)


def test_projecting_out_twice_is_projecting_out_once(model):
    for point in list_hook_points(model):
        once, twice = {point: project_out(DIRECTIONS)}, {point: project_out(DIRECTIONS)}
        torch.testing.assert_close(logits(model, once, twice), logits(model, once), rtol=1e-9, atol=1e-9)


def test_after_projecting_out_nothing_is_left_on_any_of_the_directions():
    activations = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for directions in (DIRECTIONS, DEPENDENT, 1e-6 * DIRECTIONS):
        left = project_out(directions)(activations)
        assert (left @ DIRECTIONS.T).abs().max() < 1e-12
        removed = activations - left
        torch.testing.assert_close((left * removed).sum(-1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(left, project_out(DIRECTIONS)(activations))


def test_replacing_components_by_own_components_changes_nothing(model):
    for point in list_hook_points(model):
        kept: list[torch.Tensor] = []
        plain = logits(model, {point: keep_components(DEPENDENT, kept)})
        assert torch.equal(plain, logits(model))
        assert kept[0].shape == (4, 9, 3)
        own = logits(model, {point: replace_components(DEPENDENT, kept)})
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-9)


def test_replacing_components_gives_those_of_the_other_and_keeps_the_rest():
    own, other = (torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(2))
    kept: list[torch.Tensor] = []
    assert keep_components(DIRECTIONS, kept)(other) is None
    changed = replace_components(DIRECTIONS, kept)(own)
    torch.testing.assert_close(changed @ DIRECTIONS.T, other @ DIRECTIONS.T)
    torch.testing.assert_close(project_out(DIRECTIONS)(changed), project_out(DIRECTIONS)(own))


def test_components_of_other_batches_are_refused():
    replace = replace_components(DIRECTIONS, [torch.zeros(2, 4, 3)])
    with pytest.raises(
        ActivationError, match=r"saw a batch of \[2, 4\] positions; this one has \[2, 5\]: run both on the same"
    ):
        replace(torch.zeros(2, 5, WIDTH))
    with pytest.raises(ActivationError, match=r"saw fewer batches; this one has \[2, 5\]"):
        replace(torch.zeros(2, 5, WIDTH))


def test_a_basis_holds_as_many_rows_as_the_directions_span():
    assert orthonormal_rows(torch.zeros(2, WIDTH)).shape == (0, WIDTH)
    basis = orthonormal_rows(DEPENDENT)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(DEPENDENT @ basis.T @ basis, DEPENDENT)
    activations = torch.randn(2, WIDTH)
    assert torch.equal(project_out(torch.zeros(2, WIDTH))(activations), activations)


def test_steering_keeps_the_models_own_type():
    activations = torch.randn(2, 5, WIDTH).bfloat16()
    kept: list[torch.Tensor] = []
    keep_components(DIRECTIONS, kept)(activations)
    for visit in (add_vector(DIRECTIONS[0]), project_out(DIRECTIONS), replace_components(DIRECTIONS, kept)):
        assert visit(activations).dtype == torch.bfloat16


def test_a_vector_of_another_width_is_refused_with_both_widths(model):
    narrow = torch.ones(12)
    visits = (
        add_vector(narrow),
        project_out(narrow[None]),
        keep_components(narrow[None], []),
        replace_components(narrow[None], [torch.zeros(2, 5, 1)]),
        push_along(narrow, [torch.zeros(2, 5, 1)]),
    )
    for visit in visits:
        with pytest.raises(ActivationError, match="has 12 numbers, activations here have 16"):
            visit(torch.zeros(2, 5, WIDTH))
    point = list_hook_points(model)[0]
    with pytest.raises(ActivationError, match="it belongs to another model, or to another site"):
        logits(model, {point: add_vector(torch.ones(1))})


def test_a_push_along_another_direction_is_as_long_and_has_the_sign_of_what_is_replaced():
    activations, other = (torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(2))
    for sign, scale in ((1, 1.0), (-1, 3.0)):
        kept: list[torch.Tensor] = []
        keep_components(sign * scale * DIRECTIONS[:1], kept)(other)
        pushes: list[torch.Tensor] = []
        replace_components(sign * scale * DIRECTIONS[:1], kept, pushes)(activations)
        pushed = push_along(DIRECTIONS[1], pushes)(activations)
        unit, along = (sign * DIRECTIONS[0] / DIRECTIONS[0].norm(), DIRECTIONS[1] / DIRECTIONS[1].norm())
        torch.testing.assert_close(pushed, activations + ((other - activations) @ unit)[..., None] * along)
