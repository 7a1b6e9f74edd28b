import numpy as np
import pytest

from mechsub.checkpoints import TensorInfo
from mechsub.parameters.alignment import MODEL, SHARED_SUPPORT, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.gram import Gram

TABLE = {
    "a.weight": TensorInfo((3, 2), "layer 0", "hidden"),
    "a.bias": TensorInfo((3,), "layer 0", "hidden"),
    "head": TensorInfo((4,), "head layer", "head"),
}
BLOCKS = list_blocks(TABLE)
SIZES = {name: int(np.prod(info.shape)) for name, info in TABLE.items()}


def algebra_of(vectors, anchor="teacher"):
    """An algebra over explicit vectors: label → {tensor: [member, weight]}."""
    labels = list(vectors)
    members = next(iter(vectors[labels[0]].values())).shape[0]
    within = np.zeros((members, len(TABLE), len(labels), len(labels)))
    across = np.zeros((members, len(TABLE), len(labels), 1, members))
    for t, tensor in enumerate(TABLE):
        stack = np.stack([vectors[label][tensor] for label in labels], axis=1)
        within[:, t] = np.einsum("mik,mjk->mij", stack, stack)
        across[:, t, :, 0] = np.einsum("mik,nk->min", stack, vectors[anchor][tensor])
    gram = Gram(tuple(labels), tuple(TABLE), within, across, (anchor,), np.zeros(within.shape[:3]))
    return DirectionAlgebra(gram, Scopes.of(BLOCKS))


def draw(seed, members=3, zero=()):
    rng = np.random.default_rng(seed)
    return {name: (0.0 if name in zero else 1.0) * rng.standard_normal((members, size)) for name, size in SIZES.items()}


def flat(vector, tensors=tuple(TABLE)):
    return np.concatenate([vector[name] for name in tensors], axis=1)


def cosine(left, right):
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def scope(algebra, values, name):
    return values[:, algebra.scopes.names.index(name)]


def test_cosines_equal_those_of_the_vectors_in_every_scope():
    vectors = {"student": draw(0), "teacher": draw(1)}
    algebra = algebra_of(vectors)
    found = algebra.cosine({"student": 1.0}, {"teacher": 1.0})
    assert algebra.scopes.names == (*TABLE, "layer 0", "head layer", MODEL, SHARED_SUPPORT)
    for name, tensors in {**{t: [t] for t in TABLE}, "layer 0": ["a.weight", "a.bias"], MODEL: list(TABLE)}.items():
        expected = cosine(flat(vectors["student"], tensors), flat(vectors["teacher"], tensors))
        np.testing.assert_allclose(scope(algebra, found, name), expected, rtol=1e-12)


def test_differences_need_no_weights():
    vectors = {"student": draw(0), "control": draw(1), "teacher": draw(2), "neutral": draw(3)}
    algebra = algebra_of(vectors)
    found = algebra.cosine({"student": 1.0, "control": -1.0}, {"teacher": 1.0, "neutral": -1.0})
    expected = cosine(flat(vectors["student"]) - flat(vectors["control"]), flat(vectors["teacher"]) - flat(vectors["neutral"]))
    np.testing.assert_allclose(scope(algebra, found, MODEL), expected, rtol=1e-12)


def test_disjoint_supports_have_no_alignment_and_shared_support_is_their_overlap():
    vectors = {"student": draw(0, zero=("head",)), "teacher": draw(1)}
    algebra = algebra_of(vectors)
    found = algebra.cosine({"student": 1.0}, {"teacher": 1.0})
    assert np.isnan(scope(algebra, found, "head")).all()
    shared = ["a.weight", "a.bias"]
    expected = cosine(flat(vectors["student"], shared), flat(vectors["teacher"], shared))
    np.testing.assert_allclose(scope(algebra, found, SHARED_SUPPORT), expected, rtol=1e-12)
    np.testing.assert_allclose(
        scope(algebra, found, MODEL), cosine(flat(vectors["student"]), flat(vectors["teacher"])), rtol=1e-12
    )
    apart = algebra_of({"student": draw(0, zero=("head",)), "teacher": draw(1, zero=("a.weight", "a.bias"))})
    assert np.isnan(apart.cosine({"student": 1.0}, {"teacher": 1.0})).all()


def test_a_direction_that_does_not_move_has_no_cosine_and_norm_zero():
    algebra = algebra_of({"student": draw(0, zero=tuple(TABLE)), "teacher": draw(1)})
    student, teacher = {"student": 1.0}, {"teacher": 1.0}
    assert np.isnan(algebra.cosine(student, teacher)).all()
    assert np.isnan(algebra.cosine({}, teacher)).all()
    support = algebra.support(student, teacher)
    assert (algebra.norm(student, support)[:, :-1] == 0).all()
    assert (algebra.norm(teacher, support)[:, :-1] > 0).all()
    assert np.isnan(algebra.norm(teacher, support)[:, -1]).all()


def test_a_planted_component_is_recovered_as_projection_and_absent_without_it():
    teacher, noise = draw(1), draw(2)
    planted = {name: 0.25 * teacher[name] + 1e-9 * noise[name] for name in TABLE}
    algebra = algebra_of({"student": planted, "noise": noise, "teacher": teacher})
    found = scope(algebra, algebra.projection_coefficient({"student": 1.0}, {"teacher": 1.0}), MODEL)
    np.testing.assert_allclose(found, 0.25, rtol=1e-6)
    inner = (flat(noise) * flat(teacher)).sum(1) / (flat(teacher) ** 2).sum(1)
    found = scope(algebra, algebra.projection_coefficient({"noise": 1.0}, {"teacher": 1.0}), MODEL)
    np.testing.assert_allclose(found, inner, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3, 2.0])
def test_removing_the_radial_component_undoes_weight_decay(decay):
    origin, student, teacher = draw(0), draw(1), draw(2)
    vectors = {
        "origin": origin,
        "student": {name: student[name] - decay * origin[name] for name in TABLE},
        "teacher": {name: teacher[name] - decay * origin[name] for name in TABLE},
    }
    algebra = algebra_of(vectors)
    at = {name: {name: 1.0} for name in vectors}
    found = algebra.cosine_without_radial(at["student"], at["origin"], at["teacher"], at["origin"])
    unit = flat(origin) / np.linalg.norm(flat(origin), axis=1, keepdims=True)

    def perpendicular(vector):
        return flat(vector) - (flat(vector) * unit).sum(1, keepdims=True) * unit

    np.testing.assert_allclose(scope(algebra, found, MODEL), cosine(perpendicular(student), perpendicular(teacher)), rtol=1e-9)


def test_an_init_mate_is_another_members_teacher():
    vectors = {"student": draw(0), "teacher": draw(1)}
    algebra = algebra_of(vectors)
    partners = [1, 2, 0]
    found = algebra.cosine_with_anchor({"student": 1.0}, "teacher", partners)
    expected = cosine(flat(vectors["student"]), flat(vectors["teacher"])[partners])
    np.testing.assert_allclose(scope(algebra, found, MODEL), expected, rtol=1e-12)


def test_random_directions_scatter_as_the_reference_line_says():
    algebra = algebra_of({"student": draw(0, members=400), "teacher": draw(1, members=400)})
    found = scope(algebra, algebra.cosine({"student": 1.0}, {"teacher": 1.0}), MODEL)
    line = algebra.scopes.random_cosine_sd()[algebra.scopes.names.index(MODEL)]
    assert line == pytest.approx(1 / np.sqrt(sum(SIZES.values())))
    assert found.std() == pytest.approx(line, rel=0.1)
    assert np.isnan(algebra.scopes.random_cosine_sd()[-1])


def test_a_module_kind_is_a_scope_of_its_own_where_no_layer_or_tensor_is_the_same():
    kinds = {"h.0.q": ("block 0", "q"), "h.0.v": ("block 0", "v"), "h.1.q": ("block 1", "q"), "wte": ("embedding", "embedding")}
    table = {name: TensorInfo((2, 2), layer, kind) for name, (layer, kind) in kinds.items()}
    scopes = Scopes.of(list_blocks(table))
    of_kind = [name for name, kind in zip(scopes.names, scopes.kinds, strict=True) if kind == "module kind"]
    assert of_kind == ["every q"]  # v and embedding are one tensor each
    np.testing.assert_array_equal(scopes.members[scopes.names.index("every q")], [1, 0, 1, 0])


def test_a_number_that_is_not_finite_spoils_its_own_scopes_and_says_so():
    student = draw(0)
    student["a.bias"][1, 2] = np.nan
    algebra = algebra_of({"student": student, "teacher": draw(1)})
    healthy = algebra_of({"student": draw(0), "teacher": draw(1)})
    pair = {"student": 1.0}, {"teacher": 1.0}
    found, expected = algebra.cosine(*pair), healthy.cosine(*pair)
    spoilt = np.isin(algebra.scopes.names, ["a.bias", "layer 0", MODEL, SHARED_SUPPORT])
    assert np.isnan(found[1, spoilt]).all()
    np.testing.assert_array_equal(found[1, ~spoilt], expected[1, ~spoilt])
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    reasons = algebra.explain(found, *pair)
    assert (reasons[1, spoilt] == Missing.NOT_FINITE).all() and (reasons[1, ~spoilt] == Missing.OK).all()
