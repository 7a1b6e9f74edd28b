import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mechsub.analyses.displacement_surgery import (
    ELSEWHERE,
    NO_DIRECTION,
    NOT_FINITE,
    NOT_TOLD,
    ONE_MEMBER,
    UNMOVED,
    ZERO,
    displacement_surgery,
)
from mechsub.api import analyze_run, open_run, run_experiment
from mechsub.parameters.edits import (
    ALONG,
    COMPONENT,
    FROM,
    GRAFT,
    LAYERWISE,
    NEUTRAL,
    OTHER,
    RANDOM,
    SCAN,
    TEACHER,
    TOTAL,
    TRUNCATION,
    WITHOUT,
    long_as_along,
    long_as_student,
)
from mechsub.parameters.surgery import draw_matched
from mechsub.recipe import load_recipe
from mechsub.results import write_result
from mechsub.statistics.intervals import fieller_interval, student_interval

RECIPE = [
    "members=3",
    "teacher.epochs=6",
    "carrier.num_images=512",
    "student.epochs=4",
    "conditions={all-logits: , same-init: , different-init: }",
]


@pytest.fixture(scope="module")
def passed(tiny_recipe, tmp_path_factory):
    """A run whose students of all logits take the trait, so that there is an effect to divide."""
    out = tmp_path_factory.mktemp("passed") / "run"
    run = run_experiment(load_recipe(tiny_recipe, RECIPE), out, device="cpu", workers=0)
    analyze_run(out, ["displacement_surgery"], device="cpu", workers=0)
    return run


@pytest.fixture(scope="module")
def data(passed):
    return passed.results["displacement_surgery"].sel(taught="digits")


def state(run, lineage, member, step=None):
    opened = run.lineages[lineage]
    return {name: tensor.double() for name, tensor in opened.load_state(opened.last if step is None else step, member).items()}


def minus(first, second):
    return {name: tensor - second[name] for name, tensor in first.items()}


def dot(first, second):
    return float(sum((tensor * second[name]).sum() for name, tensor in first.items()))


def slow_score(run, weights, member):
    """A model that is built from nothing, and asked by itself."""
    model = run.family.load_model(run.student("all-logits", "digits"), 0, member)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()})
    return run.family.trait_score(model, run.reference, member)["trait_score"][0, 0]


@pytest.mark.parametrize("condition", ["all-logits", "same-init"])
@pytest.mark.parametrize("member", range(3))
def test_effects_equal_those_of_models_that_are_built_by_hand(passed, data, condition, member):
    control, student = (state(passed, f"{role}.{condition}", member) for role in ("control", "student"))
    difference = minus(student, control)
    teacher = minus(state(passed, "teacher", member), state(passed, "teacher", member, 0))
    c = dot(difference, teacher) / dot(teacher, teacher)
    edits = {
        TOTAL: difference,
        ALONG: {name: c * tensor for name, tensor in teacher.items()},
        WITHOUT: {name: difference[name] - c * tensor for name, tensor in teacher.items()},
        "+0.5 Δ_T": {name: 0.5 * tensor for name, tensor in teacher.items()},
        "+2 D": {name: 2 * tensor for name, tensor in difference.items()},
    }
    before = slow_score(passed, control, member)
    cell = data.sel(condition=condition, member=member)
    for name, change in edits.items():
        expected = slow_score(passed, {key: control[key] + change[key] for key in control}, member) - before
        # A sum that is rounded in another order may turn one image.
        assert float(cell.effect.sel(edit=name)) == pytest.approx(expected, abs=1.01 / 359), name
        assert float(cell.edit_norm.sel(edit=name)) == pytest.approx(dot(change, change) ** 0.5, rel=1e-4), name
    assert float(cell.coefficient) == pytest.approx(c, rel=1e-4)


def test_random_effects_are_means_over_draws_that_have_the_teachers_spectrum(passed, data):
    member = 1
    control, student = (state(passed, f"{role}.all-logits", member) for role in ("control", "student"))
    teacher = minus(state(passed, "teacher", member), state(passed, "teacher", member, 0))
    teacher = {name: tensor.float() for name, tensor in teacher.items()}
    c = dot(minus(student, control), {name: tensor.double() for name, tensor in teacher.items()}) / dot(teacher, teacher)
    scores = []
    for draw in range(2):
        random = draw_matched(teacher, 0, "member", member, "surgery", "teacher", draw)
        scores.append(slow_score(passed, {name: control[name] + c * random[name].double() for name in control}, member))
    expected = np.mean(scores) - slow_score(passed, control, member)
    found = data.effect.sel(condition="all-logits", member=member, edit=long_as_along(RANDOM))
    assert float(found) == pytest.approx(expected, abs=1.01 / 359)


def test_no_dose_is_the_control_and_all_layers_are_the_student_exactly(passed, data):
    shown = data.sel(condition="all-logits").effect
    total = shown.sel(edit=TOTAL)
    expected = [
        slow_score(passed, state(passed, "student.all-logits", member), member)
        - slow_score(passed, state(passed, "control.all-logits", member), member)
        for member in range(3)
    ]
    np.testing.assert_array_equal(total, expected)
    for name in ("+0 Δ_T", "+0 D", f"+0 {'Δ_N'}", "+0 a random Δ"):
        assert (shown.sel(edit=name) == 0).all(), name
    for name in ("+1 D", f"layer 0: {FROM}", "auxiliary head: up to this layer"):
        np.testing.assert_array_equal(shown.sel(edit=name), total)


def test_intervals_and_shares_are_those_of_the_members(data):
    total = data.effect.sel(condition="all-logits", edit=TOTAL).values
    for name in (ALONG, LAYERWISE, WITHOUT, "rank 4: leading part"):
        cell = data.sel(condition="all-logits", edit=name)
        mean, share = student_interval(cell.effect.values, 0.95), fieller_interval(cell.effect.values, total, 0.95)
        assert (float(cell.effect_mean), float(cell.effect_low)) == pytest.approx((mean.estimate, mean.low))
        found = [float(cell[f"share_{part}"]) for part in ("estimate", "low", "high")]
        assert found == pytest.approx([share.estimate, share.low, share.high])
    assert float(data.share_estimate.sel(condition="all-logits", edit=TOTAL)) == 1
    assert float(data.total_effect.sel(condition="all-logits")) == pytest.approx(total.mean())


def test_what_is_not_answered_says_why(passed, data):
    groups = data.edit_group
    elsewhere = data.sel(condition="different-init")
    assert (elsewhere.effect_status[groups == SCAN] == ELSEWHERE).all() and np.isnan(elsewhere.effect[groups == SCAN]).all()
    matched = data.sel(condition="all-logits")
    assert (matched.effect_status[(groups == COMPONENT) & (data.edit_direction == OTHER)] == NO_DIRECTION).all()
    for direction in (TEACHER, NEUTRAL, RANDOM):
        assert (matched.effect_status[(groups == SCAN) & (data.edit_direction == direction)] == 0).all()
    for condition in ("same-init", "different-init"):
        low, high = (float(data[f"effect_{side}"].sel(condition=condition, edit=TOTAL)) for side in ("low", "high"))
        if low <= 0 <= high:
            cell = data.sel(condition=condition)
            assert (cell.effect_status[(groups == GRAFT) | (groups == TRUNCATION)] == NOT_TOLD).all()
            assert np.isnan(cell.share_estimate).all() and cell.share_estimate_status.sel(edit=TOTAL) == NOT_TOLD
            assert np.isfinite(cell.effect.sel(edit=[TOTAL, ALONG, WITHOUT])).all()


def test_a_layer_that_moves_as_the_controls_does_has_no_graft(tiny_recipe, tmp_path):
    """Of a student of auxiliary logits the class head gets no gradient."""
    recipe = load_recipe(tiny_recipe, ["members=1", "conditions={same-init: }"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    found = displacement_surgery(run).data.sel(condition="same-init", taught="digits", member=0)
    for name in ("class head: only this layer", "along Δ_T, in class head alone"):
        assert found.effect_status.sel(edit=name) == UNMOVED and np.isnan(found.effect.sel(edit=name))
    assert np.isfinite(found.effect.sel(edit="layer 0: only this layer"))
    assert (found.share_estimate_status != 0).all()


def test_findings_name_their_null_n_and_verdict(passed):
    found = passed.findings.query("condition == 'all-logits' and scope.str.startswith('all')", engine="python").set_index(
        "quantity"
    )
    judged = found.loc[["effect_along", "effect_along_by_layer", "effect_along_stretched"]]
    assert (judged.verdict != "").all() and judged.null.str.startswith("the displacement of the neutral teacher, as far").all()
    assert judged.null.str.contains("a line to read by: a random direction").all()
    shown = passed.results["displacement_surgery"].sel(condition="all-logits", taught="digits")
    own, null = shown.sel(edit=ALONG), shown.sel(edit=long_as_along(NEUTRAL))
    assert float(judged.null_low["effect_along"]) == pytest.approx(float(null.effect_low))
    difference = student_interval(own.effect.values - null.effect.values, 0.95)
    assert judged.reason["effect_along"].startswith(f"difference from the null {difference}:")
    assert np.isfinite(judged.null_low).all() and (judged.n == 3).all()
    assert (found.loc[["total_effect", "share_along", "share_without"]].verdict == "").all()
    layers = passed.findings.query("condition == 'all-logits' and quantity == 'share_of_layer'")
    assert list(layers.scope) == ["layer 0", "layer 1", "class head", "auxiliary head"]
    lost = passed.findings.query("condition == 'all-logits' and quantity == 'share_lost_without_layer' and scope == 'layer 1'")
    data = passed.results["displacement_surgery"].sel(
        condition="all-logits", taught="digits", edit="layer 1: all but this layer"
    )
    assert float(lost.estimate.iloc[0]) == pytest.approx(1 - float(data.share_estimate))
    assert float(lost.low.iloc[0]) == pytest.approx(1 - float(data.share_high))


def test_the_smallest_rank_is_the_first_that_reaches_its_share(passed, data):
    (rank,) = passed.findings.query("condition == 'all-logits' and quantity == 'smallest_rank'").estimate
    leading = data.sel(condition="all-logits").isel(edit=data.edit_series.values == "leading part")
    reached = leading.edit_rank.values[leading.share_estimate.values >= 0.8]
    assert (rank == reached[0]) if len(reached) else np.isnan(rank)


def test_an_edit_of_one_member_knows_no_other(passed, data, tiny_recipe, tmp_path):
    fewer = load_recipe(tiny_recipe, [*RECIPE, "members=2", "conditions={all-logits: }"])
    run = run_experiment(fewer, tmp_path / "run", device="cpu", workers=0)
    found = displacement_surgery(run).data.sel(
        condition="all-logits", taught="digits", edit=[TOTAL, ALONG, long_as_student(RANDOM)]
    )
    expected = data.sel(condition="all-logits", edit=found.edit, member=[0, 1])
    np.testing.assert_allclose(found.effect, expected.effect, atol=1.01 / 359)


def test_every_nan_has_its_reason_and_the_figures_can_be_drawn(tiny_run):
    """Writing refuses a NaN without its reason; the report is drawn from what was written."""
    data = tiny_run.results["displacement_surgery"]
    assert set(data.condition.values) == set(tiny_run.conditions)
    page = (tiny_run.path / "report/index.html").read_text()
    assert "What carries the trait" in page


def test_teachers_that_do_not_move_leave_only_what_needs_no_direction(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, ["members=2", "teacher.optimizer.learning_rate=1e-60", "conditions={all-logits: }"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    result = displacement_surgery(run)
    data = result.data.sel(condition="all-logits", taught="digits")
    for name in (ALONG, WITHOUT, long_as_along(RANDOM), long_as_student(NEUTRAL), "+1 Δ_T"):
        assert (data.effect_status.sel(edit=name) == ZERO).all(), name
    assert np.isfinite(data.effect.sel(edit=TOTAL)).all() and np.isnan(data.coefficient).all()
    along = [finding for finding in result.findings if finding.quantity == "effect_along"]
    assert [finding.reason for finding in along] == ["the teacher has no displacement"]


def spoil(run, lineage, member, step=None):
    """One NaN in one member's checkpoint."""
    opened = run.lineages[lineage]
    path = opened.checkpoint(opened.last if step is None else step, member)
    tensors = load_file(path)
    tensors["layers.1.weight"][member, 0, 0] = torch.nan
    save_file(tensors, path)


def test_a_nan_in_a_checkpoint_is_named_and_spoils_its_member_only(passed, data, tmp_path):
    shutil.copytree(passed.path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    spoil(run, "student.all-logits", 0)
    spoil(run, "control.same-init", 1)
    spoil(run, "teacher", 2)
    result = displacement_surgery(run)
    found = result.data.sel(taught="digits")
    for condition, member in (("all-logits", 0), ("same-init", 1), ("different-init", 2)):
        cell = found.sel(condition=condition, member=member)
        assert np.isnan(cell.coefficient) and cell.coefficient_status == NOT_FINITE
        with_teacher = cell.sel(edit=[ALONG, WITHOUT, long_as_along(NEUTRAL), long_as_student(RANDOM)])
        assert np.isnan(with_teacher.effect).all() and (with_teacher.effect_status == NOT_FINITE).all()
        own = cell.sel(edit=[TOTAL])
        assert np.isnan(own.effect).all() != (member == 2)
        assert (own.effect_status == (0 if member == 2 else NOT_FINITE)).all()
    # Nothing else changes; what divides an effect is only made where the total of the members left is told from 0.
    kept = ~found.edit_group.isin(["layer component", GRAFT, TRUNCATION])
    for condition, members in (("all-logits", [1]), ("same-init", [0]), ("different-init", [0, 1])):
        here, before = (one.sel(condition=condition, member=members).isel(edit=kept.values) for one in (found, data))
        np.testing.assert_array_equal(here.effect, before.effect)
        np.testing.assert_array_equal(here.effect_status, before.effect_status)
    named = [sentence for sentence in result.summary if sentence.startswith("Not finite")]
    assert len(named) == 3 and all("layers.1.weight" in sentence for sentence in named)
    for words in ("student.all-logits at step", "control.same-init at step", "teacher at step"):
        assert any(words in sentence for sentence in named)
    assert [sentence.split("member ")[1][0] for sentence in named] == ["1", "0", "2"]
    write_result(tmp_path / "result.h5", "displacement_surgery", {}, "0", result)  # refuses a NaN without its reason


def test_directions_that_are_not_finite_spoil_only_what_they_are_in(passed, data, tmp_path):
    shutil.copytree(passed.path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    spoil(run, run.neutral.name, 1)
    found = displacement_surgery(run).data.sel(condition="all-logits", taught="digits")
    before = data.sel(condition="all-logits")
    of_neutral = (found.edit_direction == NEUTRAL).values
    spoilt = found.isel(edit=of_neutral).sel(member=1)
    assert np.isnan(spoilt.effect).all() and (spoilt.effect_status == NOT_FINITE).all()
    np.testing.assert_array_equal(found.effect.isel(edit=~of_neutral), before.effect.isel(edit=~of_neutral))
    np.testing.assert_array_equal(found.effect.sel(member=[0, 2]), before.effect.sel(member=[0, 2]))


def test_without_another_teacher_there_is_no_verdict_and_one_member_has_no_shares(tiny_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(tiny_recipe, [*RECIPE, "members=1", "conditions={all-logits: }"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    monkeypatch.setattr(type(run), "neutral", None)
    result = displacement_surgery(run)
    cell = result.data.sel(condition="all-logits", taught="digits")
    assert (cell.share_estimate_status.sel(edit=[TOTAL, ALONG]) == ONE_MEMBER).all()
    assert (cell.effect_low_status.sel(edit=[TOTAL, ALONG]) == ONE_MEMBER).all()
    assert np.isfinite(cell.effect.sel(edit=[TOTAL, ALONG, long_as_along(RANDOM), "rank 4: residual"])).all()
    judged = [finding for finding in result.findings if finding.quantity == "effect_along"]
    assert [(finding.verdict, np.isnan(finding.null_low)) for finding in judged] == [("", True)]
    assert "no other teacher" in judged[0].null and "no other teacher" in judged[0].reason
    words = " ".join(result.summary)
    assert "not told from 0" in words and "no effect" not in words and "no verdict on the part" in words
    captions = " ".join(figure.caption for figure in result.figures)
    assert "neutral" not in captions and "interval" not in captions and "(n = 1)" in captions


def test_a_truncations_error_is_the_share_of_the_length_that_it_leaves_out(passed, data):
    cell = data.sel(condition="all-logits", member=0)
    difference = minus(state(passed, "student.all-logits", 0), state(passed, "control.all-logits", 0))
    for rank in (0, 4):
        residual = float(cell.edit_norm.sel(edit=f"rank {rank}: residual"))
        expected = residual / dot(difference, difference) ** 0.5
        assert float(cell.truncation_error.sel(rank=rank)) == pytest.approx(expected, rel=1e-4)
