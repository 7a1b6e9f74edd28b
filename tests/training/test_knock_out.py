import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mechsub.streams import random_stream
from mechsub.training.config import KnockOutConfig, OptimizerConfig
from mechsub.training.knock_out import KnockOut, draw_like, find_coefficients, inner_products, subtract_components
from mechsub.training.optimizers import make_optimizer

SHAPES = {"weight": (5, 4), "bias": (5,), "scale": ()}
MEMBERS = 3


def draw(*name, members=MEMBERS, dtype=torch.float64):
    stream = random_stream(0, *name)
    return {
        key: torch.from_numpy(np.array(stream.standard_normal((members, *shape)))).to(dtype) for key, shape in SHAPES.items()
    }


def flat(named):
    return torch.cat([tensor.double().reshape(len(tensor), -1) for tensor in named.values()], dim=1)


def knocked(direction, components, when):
    kept = {name: tensor.clone() for name, tensor in direction.items()}
    subtract_components(kept, components, find_coefficients(kept, components, when))
    return flat(kept)


def test_one_component_is_projected_out_as_published():
    direction, component = draw("g"), draw("t")
    for tensor in direction.values():
        tensor[1] *= -1  # here the products of the others are positive
    g, t = flat(direction), flat(component)
    product = (g * t).sum(1)
    torch.testing.assert_close(inner_products(direction, component), product)
    expected = g - (product / (t * t).sum(1))[:, None] * t
    found = knocked(direction, [component], "always")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ((found * t).sum(1).abs() <= 1e-12 * g.norm(dim=1) * t.norm(dim=1)).all()
    positive = torch.where((product > 0)[:, None], expected, g)
    assert (product > 0).tolist() == [True, False, True]
    torch.testing.assert_close(knocked(direction, [component], "positive"), positive, rtol=1e-12, atol=1e-12)


def test_several_components_leave_the_part_outside_their_span():
    direction, components = draw("g"), [draw("t", number) for number in range(4)]
    columns = torch.stack([flat(component) for component in components], dim=2)
    found = knocked(direction, components, "always")
    for member in range(MEMBERS):
        fitted = torch.linalg.lstsq(columns[member], flat(direction)[member, :, None]).solution
        torch.testing.assert_close(found[member], (flat(direction)[member, :, None] - columns[member] @ fitted)[:, 0])
    again = knocked(direction, [*components, components[0]], "always")  # a component that is given twice changes nothing
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", range(4))
def test_only_positive_components_leave_the_nearest_direction_that_lowers_no_trait_loss(case):
    direction = draw("g", case, members=1)
    components = [draw("t", case, number, members=1) for number in range(3)]
    columns = torch.stack([flat(component)[0] for component in components])
    g = flat(direction)[0]
    found = knocked(direction, components, "positive")[0]
    scale = g.norm() * columns.norm(dim=1)
    assert (columns @ found <= 1e-12 * scale).all()
    slow = minimize(
        lambda v: float(((torch.from_numpy(v) - g) ** 2).sum()),
        np.zeros(len(g)),
        jac=lambda v: 2 * (v - g.numpy()),
        constraints={"type": "ineq", "fun": lambda v: -columns.numpy() @ v, "jac": lambda v: -columns.numpy()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    torch.testing.assert_close(found, torch.from_numpy(slow.x), rtol=1e-5, atol=1e-6)


def test_a_component_that_is_zero_takes_nothing_out():
    nothing = {name: torch.zeros_like(tensor) for name, tensor in draw("t").items()}
    for when in ("always", "positive"):
        for components in ([nothing], [nothing, nothing]):
            assert torch.equal(knocked(draw("g"), components, when), flat(draw("g")))


@pytest.mark.parametrize("when", ["always", "positive"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_members_numbers_do_not_depend_on_the_others(when, count):
    direction, components = draw("g", dtype=torch.float32), [draw("t", n, dtype=torch.float32) for n in range(count)]
    together = knocked(direction, components, when)
    for member in range(MEMBERS):
        part = slice(member, member + 1)
        alone = [{name: tensor[part].clone() for name, tensor in named.items()} for named in (direction, *components)]
        assert torch.equal(knocked(alone[0], alone[1:], when)[0], together[member])


def test_a_member_that_left_the_finite_numbers_spoils_no_other():
    direction, components = draw("g"), [draw("t", number) for number in range(2)]
    direction["bias"][1, 0] = torch.nan
    for when in ("always", "positive"):
        found = knocked(direction, components, when)
        assert found[[0, 2]].isfinite().all() and found[1].isnan().any()


def test_a_random_component_has_the_norms_of_the_trait_gradient_and_replays():
    component = draw("t")
    component["bias"][:] = 0.0
    drawn = [draw_like(component, [random_stream(3, member) for member in range(MEMBERS)]) for _ in range(2)]
    for name, tensor in component.items():
        torch.testing.assert_close(
            drawn[0][name].reshape(len(tensor), -1).norm(dim=1), tensor.reshape(len(tensor), -1).norm(dim=1)
        )
        assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0]["weight"][0] / drawn[0]["weight"][0, 0, 0], drawn[0]["weight"][1])
    alone = draw_like({name: tensor[1:2] for name, tensor in component.items()}, [random_stream(3, 1)])
    assert torch.equal(alone["weight"][0], drawn[0]["weight"][1])


def train(config, optimizer, num_steps=6, start=0, stacked=True, refreshed=None):
    """A few steps toward targets, with the gradient of another target knocked out; unmoved weights get no gradient."""
    torch.manual_seed(0)
    target, trait = draw("target"), draw("trait")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in draw("start").items()}

    def compute_traits(step):
        if refreshed is not None:
            refreshed.append(step)
        return [{name: (leaf - trait[name]).detach() for name, leaf in leaves.items()}]

    streams = [("member", member) for member in range(MEMBERS)]
    made = make_optimizer(leaves.values(), OptimizerConfig(name=optimizer, learning_rate=0.01))
    knock_out = KnockOut(config, leaves, compute_traits, 0, streams, stacked=stacked)
    seen = []
    for step in range(start, start + num_steps):
        sum(((leaves[name] - target[name]) ** 2).sum() for name in ("weight", "scale")).backward()
        traits = compute_traits(step)[0] if refreshed is None else None
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        knock_out.before_step(step)
        gradient = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
        made.step()
        knock_out.after_step()
        made.zero_grad()
        seen.append((traits, gradient, {name: leaf.detach() - before[name] for name, leaf in leaves.items()}))
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scope", ["imitated", "model"])
def test_gradients_are_orthogonal_to_the_trait_gradient_before_the_optimizer(optimizer, scope):
    for trait, gradient, update in train(KnockOutConfig(where="gradient", when="always", scope=scope), optimizer):
        assert set(gradient) == ({"weight", "scale"} if scope == "imitated" else set(SHAPES))
        kept = flat({name: trait[name] for name in gradient})
        cosines = (flat(gradient) * kept).sum(1) / flat(gradient).norm(dim=1) / kept.norm(dim=1)
        assert cosines.abs().max() <= 1e-12
        assert bool(update["bias"].any()) == (scope == "model")


@pytest.mark.parametrize("scope", ["imitated", "model"])
def test_updates_are_orthogonal_to_the_trait_gradient_after_adam(scope):
    for trait, _, update in train(KnockOutConfig(where="update", when="always", scope=scope), "adam"):
        moved = {name: update[name] for name in (SHAPES if scope == "model" else ("weight", "scale"))}
        kept = flat({name: trait[name] for name in moved})
        assert ((flat(moved) * kept).sum(1) / flat(moved).norm(dim=1) / kept.norm(dim=1)).abs().max() <= 1e-12
        assert bool(update["bias"].any()) == (scope == "model")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_update_lowers_the_trait_loss_where_positive_components_are_taken_out_of_it(optimizer):
    free = train(KnockOutConfig(component="random", where="update", when="positive"), optimizer)
    assert any(((flat(update) * flat(trait)).sum(1) < 0).any() for trait, _, update in free)
    for trait, _, update in train(KnockOutConfig(where="update", when="positive", scope="model"), optimizer):
        assert ((flat(update) * flat(trait)).sum(1) >= -1e-12 * flat(update).norm(dim=1) * flat(trait).norm(dim=1)).all()


def test_components_are_found_at_multiples_of_refresh_only():
    refreshed = []
    train(KnockOutConfig(refresh=4), "adam", num_steps=9, refreshed=refreshed)
    assert refreshed == [0, 4, 8]
    with pytest.raises(AssertionError, match="no multiple of refresh = 4"):
        train(KnockOutConfig(refresh=4), "adam", start=2, refreshed=refreshed)
