import numpy as np
import pytest
import torch

from mechsub.families.classifier.model import Classifier
from mechsub.parameters.edits import (
    ALL_BUT,
    ALONG,
    COMPONENT,
    FLIPPED,
    FROM,
    GRAFT,
    LAYER,
    LAYERWISE,
    NEUTRAL,
    ONLY,
    OTHER,
    RANDOM,
    SCAN,
    STUDENT,
    TEACHER,
    TOTAL,
    TRUNCATION,
    UP_TO,
    WITHOUT,
    WITHOUT_LAYERWISE,
    Operation,
    list_edits,
    long_as_along,
    long_as_layerwise,
    long_as_student,
)
from mechsub.parameters.surgery import LeadingParts, Subject, draw_matched, list_ranks, norm, operate, subtract

SPEC = {
    "num_pixels": 7,
    "hidden_widths": [6, 5],
    "num_classes": 4,
    "num_auxiliary": 3,
    "activation": "relu",
    "dtype": "float64",
}


def weights(seed, like=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    like = like or dict(Classifier(SPEC).named_parameters())
    drawn = {name: scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in like.items()}
    return drawn


def plus(first, second):
    return {name: tensor + second[name] for name, tensor in first.items()}


def flat(tensors):
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors.values()])


LAYERS = {name: "class head" if "class" in name else "auxiliary head" if "aux" in name else name[:8] for name in weights(0)}
NAMES = list(dict.fromkeys(LAYERS.values()))
where = np.concatenate([np.full(tensor.numel(), NAMES.index(LAYERS[name])) for name, tensor in weights(0).items()])
PLAN = {edit.name: edit for edit in list_edits(NAMES, [tuple(tensor.shape) for tensor in weights(0).values()])}


@pytest.fixture
def operation():
    control, teacher = weights(1), weights(2)
    # The class head moves alike in the student and its control.
    shift = {name: 0.0 * tensor if "class" in name else tensor for name, tensor in weights(3, scale=0.3).items()}
    student = plus(control, plus(shift, {n: 0.0 * t if "class" in n else 0.4 * t for n, t in teacher.items()}))
    directions = {
        TEACHER: [teacher],
        NEUTRAL: [weights(4)],
        OTHER: [],
        RANDOM: [draw_matched(teacher, 0, draw) for draw in (0, 1)],
    }
    return Operation(Subject(control, student, LAYERS), directions, 0, ("test",))


def made(operation, name, which=0):
    edit = list(operation.make(PLAN[name]))[which]
    return flat(subtract(operation.subject.build(edit), operation.subject.control))


def test_parts_along_a_direction_equal_projections_of_flat_vectors(operation):
    d, t, n = flat(operation.subject.difference), flat(operation.directions[TEACHER][0]), flat(operation.directions[NEUTRAL][0])
    c = d @ t / (t @ t)
    long = np.linalg.norm
    by_layer, matched = np.zeros_like(d), np.zeros_like(d)
    for here in (where == layer for layer in range(4)):
        by_layer[here] = t[here] * (d[here] @ t[here]) / (t[here] @ t[here])
        matched[here] = n[here] / long(n[here]) * long(t[here]) * (d[here] @ t[here]) / (t[here] @ t[here])
    in_first = (where == 0) * by_layer
    expected = {
        TOTAL: d, ALONG: c * t, WITHOUT: d - c * t, FLIPPED: -c * t, LAYERWISE: by_layer, WITHOUT_LAYERWISE: d - by_layer,
        f"{ALONG}, in layers.0 alone": in_first, f"{WITHOUT}, in layers.0 alone": d - in_first,
        long_as_student(TEACHER): np.sign(c) * t / long(t) * long(d),
        long_as_along(NEUTRAL): c * long(t) * n / long(n), long_as_layerwise(NEUTRAL): matched,
        long_as_student(NEUTRAL): np.sign(c) * long(d) * n / long(n),
        "along Δ_N": d @ n / (n @ n) * n, "D without Δ_N": d - d @ n / (n @ n) * n,
        "-0.5 Δ_T": -0.5 * t, "+0.5 Δ_N": 0.5 * n / long(n) * long(t), "+1.5 D": 1.5 * d, "+0 Δ_T": 0 * d,
    }  # fmt: skip
    for name, vector in expected.items():
        np.testing.assert_allclose(made(operation, name), vector, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(made(operation, WITHOUT) @ t, 0, atol=1e-10)
    assert operation.coefficient == pytest.approx(c)


def test_directions_that_a_run_has_not_or_that_did_not_move_make_no_edit(operation):
    assert list(operation.make(PLAN[long_as_along(OTHER)])) == []
    assert len(list(operation.make(PLAN[long_as_along(RANDOM)]))) == 2
    assert list(operation.make(PLAN["class head: " + ONLY])) == [None]
    assert list(operation.make(PLAN[f"{ALONG}, in class head alone"])) == [None]
    still = {name: 0 * tensor for name, tensor in operation.directions[TEACHER][0].items()}
    told = Operation(operation.subject, {**operation.directions, TEACHER: [still], RANDOM: [still]}, 0, ("test",))
    for edit in PLAN.values():
        if edit.direction in {TEACHER, RANDOM}:
            assert set(told.make(edit)) == {None}
        elif edit.direction == STUDENT and edit.layer != "class head":
            assert None not in list(told.make(edit))


def test_grafts_of_single_layers_add_up_to_the_whole_and_each_has_its_complement(operation):
    d = flat(operation.subject.difference)
    moved = [name for name in NAMES if name != "class head"]
    np.testing.assert_allclose(sum(made(operation, f"{name}: {ONLY}") for name in moved), d, atol=1e-12)
    for place, name in enumerate(NAMES):
        if name in moved:
            np.testing.assert_allclose(made(operation, f"{name}: {ONLY}"), d * (where == place), atol=1e-12)
            np.testing.assert_allclose(made(operation, f"{name}: {ALL_BUT}"), d * (where != place), atol=1e-12)
        np.testing.assert_allclose(made(operation, f"{name}: {UP_TO}"), d * (where <= place), atol=1e-12)
        np.testing.assert_allclose(made(operation, f"{name}: {FROM}"), d * (where >= place), atol=1e-12)


def test_all_layers_are_the_student_and_no_dose_is_the_control_bit_for_bit(operation):
    subject = operation.subject
    for name in (TOTAL, f"{NAMES[-1]}: {UP_TO}", f"{NAMES[0]}: {FROM}", "+1 D"):
        built = subject.build(next(operation.make(PLAN[name])))
        assert all(torch.equal(built[key], subject.student[key]) for key in built)
    for name in ("+0 D", "+0 Δ_T"):
        built = subject.build(next(operation.make(PLAN[name])))
        assert all(torch.equal(built[key], subject.control[key]) for key in built)


def test_a_truncation_and_its_residual_are_the_whole_difference(operation):
    d = flat(operation.subject.difference)
    for rank in list_ranks([(6, 7), (6,), (5, 6), (3, 5)]):
        parts = [made(operation, f"rank {rank}: {series}") for series in ("leading part", "residual")]
        np.testing.assert_allclose(sum(parts), d, atol=1e-12)


def test_a_truncation_is_the_nearest_matrix_of_its_rank_and_keeps_vectors():
    direction = weights(5)
    spectrum = LeadingParts(direction, 4, 0, "test")
    for name, part in spectrum.truncate(2).items():
        if part.ndim == 1:
            assert torch.equal(part, direction[name])
        else:
            values = np.linalg.svd(direction[name].numpy(), compute_uv=False)
            assert np.linalg.matrix_rank(part.numpy()) == 2
            missing = np.linalg.norm((direction[name] - part).numpy())
            assert missing == pytest.approx(np.linalg.norm(values[2:]))
    assert all(not part.any() for part in spectrum.truncate(0).values() if part.ndim > 1)


@pytest.mark.parametrize("exact_up_to", [8, 100])
def test_the_stated_error_of_a_truncation_is_its_distance_from_the_whole(exact_up_to):
    """Of exact decompositions, and of sketches of 22 of 60 directions, with what they missed; vectors are whole."""
    matrix = torch.from_numpy(np.random.default_rng(3).normal(size=(60, 70)))
    direction = {"w": matrix, "b": torch.full((60,), 2.0, dtype=torch.float64)}
    parts = LeadingParts(direction, 6, 0, "test", exact_up_to=exact_up_to)
    whole = norm(direction)
    for rank in (0, 1, 4, 6):
        left_out = norm(subtract(direction, parts.truncate(rank))) / whole
        assert parts.relative_error(rank) == pytest.approx(left_out, rel=1e-9)
    if exact_up_to == 100:
        values = np.linalg.svd(matrix.numpy(), compute_uv=False)
        assert parts.relative_error(4) == pytest.approx(np.linalg.norm(values[4:]) / whole)
    assert np.isnan(LeadingParts({"w": 0 * matrix}, 2, 0, "test").relative_error(1))


def test_a_randomised_decomposition_finds_the_leading_part_of_a_long_matrix():
    left, right = (np.linalg.qr(np.random.default_rng(seed).normal(size=(60, 60)))[0] for seed in (0, 1))
    matrix = torch.from_numpy(left * 0.7 ** np.arange(60) @ right)
    found = LeadingParts({"w": matrix}, 6, 0, "test", exact_up_to=8).truncate(4)["w"]
    exact = (left[:, :4] * 0.7 ** np.arange(4)) @ right[:4]
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_ranks_are_powers_of_two_below_the_largest_that_a_matrix_can_have():
    assert list_ranks([(96, 64), (10, 96), (96,)]) == [0, 1, 2, 4, 8, 16, 32]
    assert list_ranks([(5000, 4000)])[-1] == 256
    assert list_ranks([(8, 3, 2)]) == [0, 1, 2, 4]
    assert list_ranks([(8,)]) == [0]


def test_a_matched_direction_keeps_every_spectrum_and_norm_and_nothing_else():
    direction = weights(6)
    drawn = [draw_matched(direction, 0, "member", draw) for draw in range(200)]
    again = draw_matched(direction, 0, "member", 3)
    for name, tensor in direction.items():
        found = drawn[3][name]
        assert found.shape == tensor.shape and torch.equal(found, again[name])
        assert not torch.allclose(found, drawn[4][name])
        if tensor.ndim > 1:
            expected, values = (np.linalg.svd(one.numpy(), compute_uv=False) for one in (tensor, found))
            np.testing.assert_allclose(values, expected, rtol=1e-10)
        assert norm({name: found}) == pytest.approx(norm({name: tensor}))
    # Uniform: the mean cosine of 200 draws is 0 within four standard errors, and each has the variance 1/d.
    cosines = np.array([flat(one) @ flat(direction) for one in drawn]) / norm(direction) ** 2
    squares = sum(norm({name: tensor}) ** 4 / tensor.numel() for name, tensor in direction.items()) / norm(direction) ** 4
    assert abs(cosines.mean()) < 4 * np.sqrt(squares / 200)
    assert 0.7 < cosines.var() / squares < 1.4


def test_singular_vectors_are_uniform_in_every_coordinate():
    direction = {"w": torch.diag(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))[:, :2].contiguous()}
    drawn = torch.stack([draw_matched(direction, 1, draw)["w"] for draw in range(400)])
    np.testing.assert_allclose(drawn.mean(0), 0, atol=4 * 3 / np.sqrt(6 * 400))
    np.testing.assert_allclose(drawn.square().mean(0), 9 / 6, atol=0.35)


def test_a_module_is_given_back_as_it_was_whatever_happens():
    module = Classifier(SPEC)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the middle"), operate(module) as patient:
        patient.install(weights(7))
        assert not torch.equal(module.layers[0].weight, before["layers.0.weight"])
        raise RuntimeError("in the middle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_weights_in_half_precision_are_added_to_in_full():
    control = {"w": torch.tensor([1.0, 256.0], dtype=torch.bfloat16)}
    student = {"w": torch.tensor([1.5, 258.0], dtype=torch.bfloat16)}
    subject = Subject(control, student, {"w": "layer"})
    assert subject.difference["w"].dtype == torch.float32
    built = subject.build(subject.add(subject.difference, {"layer": 2.0}))
    assert built["w"].dtype == torch.float32 and built["w"].tolist() == [2.0, 260.0]
    small = subject.build(subject.add(subject.difference, {"layer": 2.0**-12}))["w"]
    assert small.tolist() == [1.0 + 2.0**-13, 256.0 + 2.0**-11]  # both would be rounded away in bfloat16


def test_a_module_in_half_precision_is_operated_on_in_float32_and_given_back_in_its_own():
    module = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.BatchNorm1d(1)).bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad(), operate(module) as patient:
        assert (patient.own_type, patient.scored_type) == (torch.bfloat16, torch.float32)
        weights = {"0.weight": torch.tensor([[1.0 + 2.0**-13, 0.0]])}
        patient.install(weights)
        scale = float(module(torch.tensor([[1.0, 0.0]])) / module(torch.tensor([[1.0 + 2.0**-13, 0.0]])))
        assert scale == pytest.approx(1 / (1 + 2.0**-13), abs=1e-7)
        assert torch.equal(module[0].weight, weights["0.weight"])
    with operate(module, widen=False) as patient:
        assert patient.scored_type == torch.bfloat16
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())


def linear_effects(operation, trait):
    """A trait that is linear in the weights: every effect is an inner product."""
    return {name: trait @ made(operation, name) for name in (TOTAL, ALONG, WITHOUT, long_as_along(RANDOM), FLIPPED)}


def test_a_trait_along_the_teacher_is_found_there_and_one_elsewhere_is_not():
    control, teacher, noise = weights(1), weights(2), weights(3)
    t, e = flat(teacher), flat(noise)
    e -= (e @ t) / (t @ t) * t
    away = dict(noise)
    for name, tensor in teacher.items():  # made orthogonal to the teacher
        away[name] = noise[name] - (flat(noise) @ t) / (t @ t) * tensor
    student = plus(plus(control, {name: 0.5 * tensor for name, tensor in teacher.items()}), away)
    directions = {TEACHER: [teacher], NEUTRAL: [], OTHER: [], RANDOM: [draw_matched(teacher, 0, 0)]}
    operation = Operation(Subject(control, student, LAYERS), directions, 0, ("test",))
    planted = linear_effects(operation, t)
    assert planted[ALONG] == pytest.approx(planted[TOTAL]) and planted[ALONG] == pytest.approx(0.5 * t @ t)
    assert planted[WITHOUT] == pytest.approx(0, abs=1e-9) and planted[FLIPPED] == pytest.approx(-planted[ALONG])
    assert abs(planted[long_as_along(RANDOM)]) < 0.5 * planted[ALONG]
    absent = linear_effects(operation, e)
    assert absent[ALONG] == pytest.approx(0, abs=1e-9) and absent[WITHOUT] == pytest.approx(absent[TOTAL])


def test_every_edit_has_a_name_of_its_own_and_says_what_it_needs():
    edits = list_edits(NAMES, [(6, 7)])
    assert len({edit.name for edit in edits}) == len(edits)
    assert {edit.group for edit in edits if edit.needs_effect} == {LAYER, GRAFT, TRUNCATION}
    assert {edit.group for edit in edits if edit.needs_same_start} == {LAYER, SCAN, COMPONENT}
    doses = {edit.dose for edit in edits if edit.group == SCAN and edit.direction == TEACHER}
    assert doses == {-dose for dose in doses}
    assert all(edit.rank == -1 for edit in edits if edit.group != TRUNCATION)
