import numpy as np
import torch

from mechsub.gradients.products import cosine_error, inner_products
from mechsub.parameters.blocks import Block


def test_inner_products_are_those_of_plain_vectors_block_by_block():
    torch.manual_seed(0)
    vectors = [{"w": torch.randn(4, 6), "b": torch.randn(3)} for _ in range(3)]
    blocks = [
        Block("w [q]", "w", "l", "q", (4, 2), 1, 0),
        Block("w [k]", "w", "l", "k", (4, 4), 1, 2),
        Block("b", "b", "l", "b", (3,)),
    ]
    found = inner_products([vectors[0], None, *vectors[1:]], blocks)
    assert np.isnan(found[:, 1]).all() and np.isnan(found[:, :, 1]).all()
    cuts = [lambda v: v["w"][:, :2], lambda v: v["w"][:, 2:], lambda v: v["b"]]
    for number, cut in enumerate(cuts):
        for row, first in zip((0, 2, 3), vectors, strict=True):
            for column, second in zip((0, 2, 3), vectors, strict=True):
                exact = (cut(first).double() * cut(second).double()).sum()
                np.testing.assert_allclose(found[number, row, column], exact, rtol=1e-12)


def test_the_standard_error_of_a_cosine_is_the_spread_of_cosines_over_samples():
    random = np.random.default_rng(0)
    direction, mean, size, samples = random.normal(size=30), random.normal(size=30), 400, 4000
    mean += 0.3 * direction

    def draw():
        return mean + 3 * random.normal(size=(size, 30))

    def cosine(examples):
        average = examples.mean(0)
        return average @ direction / np.linalg.norm(average) / np.linalg.norm(direction)

    spread = np.std([cosine(draw()) for _ in range(samples)])
    examples = draw()
    average = examples.mean(0)
    parts = (examples @ direction, examples @ average, direction @ direction, average @ average, average @ direction)
    found = cosine_error(*(np.asarray(part)[..., None] for part in parts), size)
    np.testing.assert_allclose(found, spread, rtol=0.1)
    some = cosine_error(*(np.asarray(part[:100] if np.ndim(part) else part)[..., None] for part in parts), size)
    np.testing.assert_allclose(some, found, rtol=0.2)
    assert np.isnan(cosine_error(*(np.asarray(part)[..., None] * 0 for part in parts), size)).all()
