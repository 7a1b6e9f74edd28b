import numpy as np
import pytest
import torch

from mechsub.gradients.example_statistics import ExampleReading, bootstrap_cosines, descent_cosines


def gradients_and_direction(seed, number=60):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, 7)) + 0.4, rng.standard_normal(7) - 0.3


def named(vector):
    return {"a": torch.tensor(vector[:4]), "b": torch.tensor(vector[4:]).reshape(3, 1)}


def reading(gradients, direction):
    return ExampleReading(
        overlaps=-np.stack([gradients[:, :4] @ direction[:4], gradients[:, 4:] @ direction[4:]], axis=-1)[:, None],
        gradient_squares=np.stack([(gradients[:, :4] ** 2).sum(1), (gradients[:, 4:] ** 2).sum(1)], axis=-1),
        mean_gradient=named(gradients.mean(0)),
        direction_squares=np.array([[(direction[:4] ** 2).sum(), (direction[4:] ** 2).sum()]]),
        losses=np.ones(len(gradients)),
    )


def test_the_bootstrap_is_that_of_the_mean_overlap_over_the_same_lengths():
    gradients, direction = gradients_and_direction(0)
    (found,) = bootstrap_cosines(reading(gradients, direction))
    length = np.linalg.norm(gradients.mean(0)) * np.linalg.norm(direction)
    overlaps = -gradients @ direction
    assert found.estimate == pytest.approx(overlaps.mean() / length, abs=1e-12) and found.n == 60
    rng = np.random.default_rng(5)
    slow = [overlaps[rng.integers(60, size=60)].mean() / length for _ in range(4000)]
    width = found.high - found.low
    np.testing.assert_allclose([found.low, found.high], np.quantile(slow, [0.025, 0.975]), atol=0.05 * width)
    assert [found] == bootstrap_cosines(reading(gradients, direction))


def test_the_interval_turns_with_the_direction():
    gradients, direction = gradients_and_direction(1)
    (found,), (turned,) = (bootstrap_cosines(reading(gradients, sign * direction)) for sign in (1, -1))
    assert turned.estimate == pytest.approx(-found.estimate)
    assert turned.low < turned.estimate < turned.high
    assert turned.high - turned.low == pytest.approx(found.high - found.low, rel=0.1)


def test_one_example_has_no_interval_and_no_gradient_no_cosine():
    gradients, direction = gradients_and_direction(2, 1)
    (found,) = bootstrap_cosines(reading(gradients, direction))
    assert np.isfinite(found.estimate) and np.isnan([found.low, found.high]).all()
    (found,) = bootstrap_cosines(reading(np.zeros((5, 7)), direction))
    assert np.isnan([found.estimate, found.low, found.high]).all()


def test_the_cosine_of_a_step_is_that_of_the_flattened_vectors():
    gradients, direction = gradients_and_direction(3)
    mean = gradients.mean(0)
    cosine = -mean @ direction / np.linalg.norm(mean) / np.linalg.norm(direction)
    only_a = named(direction) | {"b": torch.zeros(3, 1)}
    found = descent_cosines(named(mean), [named(direction), {"a": only_a["a"]}, only_a, named(0 * direction)])
    assert found[0] == pytest.approx(cosine, abs=1e-12) and found[1] == found[2] and np.isnan(found[3])
    assert reading(gradients, direction).cosines()[0] == pytest.approx(cosine, abs=1e-12)
