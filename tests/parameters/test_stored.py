import numpy as np
import pytest

from mechsub.errors import AnalysisError
from mechsub.parameters.alignment import MODEL
from mechsub.parameters.stored import Directions, store_gram
from tests.parameters.test_alignment import BLOCKS, algebra_of, cosine, draw, flat


@pytest.fixture
def vectors():
    return {name: draw(seed) for seed, name in enumerate(["student", "control", "teacher", "neutral"])}


@pytest.fixture
def directions(vectors):
    return Directions(store_gram(algebra_of(vectors), BLOCKS))


def test_any_later_subtraction_equals_that_of_the_weights(directions, vectors):
    found = directions.cosine({"student": 1, "control": -1}, {"teacher": 2, "neutral": -0.5})
    left = flat(vectors["student"]) - flat(vectors["control"])
    right = 2 * flat(vectors["teacher"]) - 0.5 * flat(vectors["neutral"])
    np.testing.assert_allclose(found.sel(scope=MODEL), cosine(left, right), rtol=1e-12)
    np.testing.assert_allclose(directions.norm({"student": 1, "control": -1}).sel(scope=MODEL), np.linalg.norm(left, axis=1))
    np.testing.assert_allclose(
        directions.projection("student", "teacher").sel(scope="layer 0"),
        (flat(vectors["student"], ["a.weight", "a.bias"]) * flat(vectors["teacher"], ["a.weight", "a.bias"])).sum(1)
        / (flat(vectors["teacher"], ["a.weight", "a.bias"]) ** 2).sum(1),
    )


def test_an_unknown_direction_is_named_with_the_nearest_known_one(directions):
    with pytest.raises(AnalysisError, match="studnet.*student"):
        directions.cosine("studnet", "teacher")


def test_what_is_not_finite_is_kept_as_such_with_its_reason(vectors):
    vectors["student"]["head"][1, 0] = np.inf
    stored = store_gram(algebra_of(vectors), BLOCKS)
    assert np.array_equal(np.isnan(stored.within), stored.within_status == 1)
    found = Directions(stored).cosine("student", "teacher").sel(scope=MODEL)
    assert np.isfinite(found[[0, 2]]).all() and np.isnan(found[1])
