from dataclasses import replace

import numpy as np
import pytest
import torch

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.stored import DIRECTIONS_GROUP, SteeringDirections, store_directions
from mechsub.analyses.steering_directions import steering_directions
from mechsub.api import load_direction, open_steering_directions, run_experiment, save_directions
from mechsub.errors import ActivationError, RunDirectoryError
from mechsub.recipe import load_recipe
from mechsub.results import read_group, write_result
from mechsub.statistics.verdicts import AGAINST_NULL, Rules, judge_effects
from mechsub.steered.alignments import ADJUSTED, ADJUSTED_OTHERS, QUANTITIES, RAW, RAW_CONTROL, Cell

POINT = "blocks.1.mlp.hook_post"
GROUP = "trait: image"


@pytest.fixture(scope="module")
def result(tiny_run):
    return steering_directions(tiny_run)


def hidden(run, lineage, step, member, kind="trait"):
    """The last hidden layer's mean activation, in plain code."""
    model = run.family.load_model(lineage, step, member).double()
    (batch,) = run.family.prompts(run.reference, member).estimate[kind].batches
    features = batch.arguments["images"].double()
    for layer in model.layers:
        features = torch.relu(layer(features))
    return features.mean(0).detach().numpy()


def moved(run, name, member, kind="trait"):
    lineage = run.lineages[name]
    return hidden(run, lineage, lineage.last, member, kind) - hidden(run, lineage, 0, member, kind)


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.mark.parametrize("condition", ["same-init", "all-logits"])
@pytest.mark.parametrize("kind", ["trait", "neutral", "carrier"])
def test_steering_directions_are_differences_of_mean_activations_from_the_own_origin(tiny_run, result, condition, kind):
    for member in range(3):
        student, control = (moved(tiny_run, f"{role}.{condition}", member, kind) for role in ("student", "control"))
        teacher, neutral = (moved(tiny_run, name, member, kind) for name in ("teacher", "neutral.relabelled"))
        last = tiny_run.student(condition, "digits").last
        cell = result.data.sel(
            condition=condition, taught="digits", member=member, step=last, point=POINT, group=f"{kind}: image"
        )
        found = {name: float(cell[name]) for name in cell.data_vars if not name.endswith("_status")}
        assert found["steering_alignment"] == pytest.approx(cosine(student, teacher), abs=1e-4)
        assert found["steering_alignment_with_other_teachers"] == pytest.approx(cosine(student, neutral), abs=1e-4)
        assert found["steering_alignment_of_control"] == pytest.approx(cosine(control, teacher), abs=1e-4)
        assert found["control_adjusted_steering_alignment"] == pytest.approx(cosine(student - control, teacher), abs=1e-3)
        assert found["specific_steering_alignment"] == pytest.approx(cosine(student - control, teacher - neutral), abs=1e-3)


def test_what_the_head_reads_can_be_left_out(tiny_run, result):
    model = tiny_run.family.load_model(tiny_run.reference, 0, 0)
    rows = model.class_head.weight.detach().double().numpy()
    basis = np.linalg.svd(rows - rows.mean(0))[2][: min(rows.shape[0] - 1, rows.shape[1])].T
    student, control, teacher = (moved(tiny_run, name, 0) for name in ("student.same-init", "control.same-init", "teacher"))
    bare = [vector - basis @ (basis.T @ vector) for vector in (student - control, teacher)]
    last = tiny_run.student("same-init", "digits").last
    name = "control_adjusted_steering_alignment_without_readout"
    cell = result.data.sel(condition="same-init", taught="digits", member=0, step=last, group=GROUP)
    found = float(cell[name].sel(point=POINT))
    if np.linalg.norm(bare[0]) > 1e-6 * np.linalg.norm(student):
        assert found == pytest.approx(cosine(*bare), abs=1e-3)
    else:  # so narrow a layer that the head reads all of it
        assert np.isnan(found)
    codes = result.data[f"{name}_status"].attrs["flag_meanings"].split()
    assert codes[int(cell[f"{name}_status"].sel(point="blocks.0.mlp.hook_post"))] == "no_readout"


def test_permuted_students_mapped_back_are_the_same_students(result):
    """The function and its training are the same in other coordinates, so that the map must bring every cosine back."""
    last = result.data.sel(step=result.data.step.max(), group=GROUP)
    for name in ("steering_alignment", "control_adjusted_steering_alignment", "student_shift"):
        np.testing.assert_allclose(
            last[name].sel(condition="permuted-init"), last[name].sel(condition="same-init"), atol=5e-3, equal_nan=True
        )
    assert float(result.data.map_correlation.sel(condition="permuted-init").min()) > 1 - 1e-6
    assert np.isnan(result.data.map_correlation.sel(condition="same-init")).all()


def test_bases_that_no_rotation_joins_are_not_compared(result):
    cell = result.data.sel(condition="different-init")
    assert float(cell.map_correlation.max()) < 0.7 and np.isnan(cell.steering_alignment).all()
    meanings = result.data.steering_alignment_status.attrs["flag_meanings"].split()
    moved = cell.steering_alignment_status.sel(step=result.data.step.max())
    assert {meanings[code] for code in np.unique(moved)} == {"no_map_between_bases"}
    assert any(text.startswith("different-init") and "cannot be compared" in text for text in result.summary)


def test_at_step_0_nothing_has_moved_and_the_status_says_so(result):
    start = result.data.sel(condition="same-init", step=0)
    assert np.isnan(start.steering_alignment).all() and (start.student_shift == 0).all()
    meanings = result.data.steering_alignment_status.attrs["flag_meanings"].split()
    assert {meanings[code] for code in np.unique(start.steering_alignment_status)} == {"nothing_moved"}


def test_findings_have_a_null_and_a_verdict_and_say_what_is_mapped(result):
    found = {(one.quantity, one.condition, one.scope.split(",")[0]): one for one in result.findings}
    one = found["steering_alignment", "same-init", POINT]
    assert one.verdict and np.isfinite([one.null_low, one.null_high]).all() and one.n == 3
    assert one.null == "the control: cos(v_C, v_T)" and result.findings[0].quantity == "steering_alignment"
    assert found["control_adjusted_steering_alignment", "same-init", POINT].verdict == ""
    assert "rotated by a fit of both starts" in found["control_adjusted_steering_alignment", "permuted-init", POINT].scope
    assert found["specific_steering_alignment", "same-init", POINT].verdict == ""
    assert [figure.headline for figure in result.figures] == [True, False, False]
    assert all("null" in figure.caption and "n = 3" in figure.caption for figure in result.figures)


def test_students_of_another_width_are_incomparable(tiny_recipe, tmp_path):
    settings = ["members=2", "student.optimizer={name: sgd, learning_rate: 1.0e-30}", "conditions={same-init: }"]
    still = run_experiment(load_recipe(tiny_recipe, settings), tmp_path / "still", device="cpu", workers=0)
    found = steering_directions(still)
    assert np.isnan(found.data.steering_alignment).all() and "nothing moved" in found.summary[1]


def plant(stream, planted, members=5, traits=5, width=64):
    """Cells of made-up students that drift alike and, where planted, follow their own teachers."""

    def noise(scale=1.0):
        return scale * stream.standard_normal((members, 1, width))

    drift, shared = noise(), noise()
    teachers = [shared + noise(2.0) for _ in range(traits)]
    effects, measure = [], {quantity.name: quantity.measure for quantity in QUANTITIES}
    for place in range(traits):
        control, student = drift + noise(), drift + noise() + planted * teachers[place]
        cell = Cell(
            student, teachers[place], [one for other, one in enumerate(teachers) if other != place], [None], control, None,
            np.ones((members, 1)), None, np.zeros(1, dtype=bool),
        )  # fmt: skip
        effects.append(measure[ADJUSTED](cell) - measure[ADJUSTED_OTHERS](cell))
    return np.mean(effects, axis=0)[:, 0]


@pytest.mark.parametrize("planted", [0.0, 1.0])
def test_above_null_is_rare_with_nothing_planted_and_common_with_something(planted):
    stream, rules, repeats = np.random.default_rng(0), Rules(0.05, 5, 0.95, 0.05), 400
    verdicts = [judge_effects({"one": plant(stream, planted)}, rules, AGAINST_NULL)["one"].verdict for _ in range(repeats)]
    share = verdicts.count(AGAINST_NULL.above) / repeats
    # The one-sided level is 2.5 %; its binomial spread over 400 is 0.8 %.
    assert share > 0.99 if planted else share <= 0.025 + 3 * 0.008


@pytest.mark.parametrize("planted", [0.0, 1.0])
def test_with_one_trait_a_control_that_follows_the_neutral_teacher_makes_no_student_above_null(planted):
    stream, rules, repeats, verdicts = np.random.default_rng(1), Rules(0.05, 5, 0.95, 0.05), 200, []
    measure = {quantity.name: quantity.measure for quantity in QUANTITIES}
    for _ in range(repeats):
        shared, drift, own, ownless = (stream.standard_normal((5, 1, 64)) for _ in range(4))
        teacher, neutral = shared + stream.standard_normal((5, 1, 64)), shared + stream.standard_normal((5, 1, 64))
        student, control = drift + own + planted * teacher, drift + ownless + neutral
        cell = Cell(student, teacher, [neutral], [None, None], control, neutral, np.ones((5, 1)), None, np.zeros(1, dtype=bool))
        effect = (measure[RAW](cell) - measure[RAW_CONTROL](cell))[:, 0]
        verdicts.append(judge_effects({"one": effect}, rules, AGAINST_NULL)["one"].verdict)
    share = verdicts.count(AGAINST_NULL.above) / repeats
    assert share > 0.9 if planted else share == 0.0


def test_any_stored_direction_is_a_vector_to_add(tiny_run, tmp_path):
    stored = open_steering_directions(tiny_run.path)
    vector = load_direction(tiny_run.path, "teacher", POINT, member=1)
    np.testing.assert_allclose(vector, moved(tiny_run, "teacher", 1), atol=1e-5)
    assert stored.hook_points == ["blocks.0.mlp.hook_post", POINT] and stored.groups[0] == GROUP
    assert stored.lineages["student.same-init"] == list(tiny_run.student("same-init", "digits").steps)
    path = save_directions(tiny_run.path, tmp_path / "directions.safetensors")
    from safetensors.torch import load_file

    saved = load_file(path)
    torch.testing.assert_close(saved[f"teacher/member-001/{GROUP}/{POINT}"], vector)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"lineage": "student.same-int"}, "did you mean `student.same-init`"),
        ({"hook_point": "blocks.1.hook_resid_post"}, "did you mean `blocks.1.mlp.hook_post`"),
        ({"member": 7}, "members 0 to 2"),
        ({"step": 999}, "it has steps"),
        ({"group": "trait: last"}, "known: trait: image; neutral: image; carrier: image"),
    ],
)
def test_a_direction_that_is_not_there_is_named_with_those_that_are(tiny_run, asked, message):
    with pytest.raises(ActivationError, match=message):
        load_direction(tiny_run.path, **{"lineage": "student.same-init", "hook_point": POINT, **asked})


def test_a_run_without_the_analysis_says_how_to_make_it(tiny_recipe, tmp_path):
    run = run_experiment(load_recipe(tiny_recipe, ["members=1", "conditions={same-init: }"]), tmp_path / "bare", workers=0)
    with pytest.raises(RunDirectoryError, match="--only steering_directions"):
        open_steering_directions(run.path)


def test_a_model_of_another_width_is_stored_with_the_reason_and_not_as_zeros(result, tmp_path):
    """The file is written, which refuses any NaN that nothing explains."""
    points = [HookPoint(POINT, 0, "post", "activations.0", "output", 3)]
    vectors = {("wide", 1, 0): {POINT: np.ones((1, 5))}, ("own", 1, 0): {POINT: np.ones((1, 3))}}
    vectors["damaged", 1, 0] = {POINT: np.full((1, 3), np.nan)}
    stored = store_directions(vectors, points, [GROUP])
    write_result(tmp_path / "one.h5", "steering_directions", {}, "0", replace(result, groups={DIRECTIONS_GROUP: stored}))
    directions = SteeringDirections(read_group(tmp_path / "one.h5", DIRECTIONS_GROUP), "the run")
    assert directions.hook_points == [POINT] and directions.load("own", POINT).tolist() == [1, 1, 1]
    with pytest.raises(ActivationError, match="another width"):
        directions.load("wide", POINT)
    with pytest.raises(ActivationError, match="not finite"):
        directions.load("damaged", POINT)
