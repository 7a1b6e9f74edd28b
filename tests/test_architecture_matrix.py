"""The matrix: all cells judged together, nothing left to the reader, no verdict where none can be."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from mechsub.architecture_matrix import Cell, draw_matrix, join_matrices, judge_cells, label_cells, matrix_findings, say_matrix
from mechsub.figures import fill_figure
from mechsub.results import Result
from mechsub.statistics.verdicts import Rules

RULES = Rules(margin=0.5, minimum_members=5, confidence=0.95, equivalence_level=0.05)
COMMON = {
    "trait": "mean over traits", "context": "questions", "step": 9, "scope": "model output", "unit": "log-odds",
    "num_references": 8, "margin": 0.5,
}  # fmt: skip


def cell(condition, own, *, others=0.0, members=8, traits=5, spread=0.1, teacher="gpt2", student="gpt2", **fields):
    stream = np.random.default_rng(len(condition))
    effects = others + spread * stream.standard_normal((members, traits, traits))
    effects[:, range(traits), range(traits)] += own - others
    return Cell(condition, teacher, student, fields.pop("shared", "nothing"), effects, **fields)


def gains(*runs, gain=2.0, members=8):
    return {run: np.tile(gain + 0.1 * np.arange(members), (2, 1)) for run in runs or ("",)}


def verdicts(cells, **given):
    return {name: one.effect.verdict for name, one in judge_cells(cells, given.get("gains", gains()), RULES).items()}


def test_planted_effects_and_planted_nothing_get_their_verdicts():
    cells = [cell("same", 2.0, shared="everything"), cell("other", 0.0), cell("away", -2.0)]
    assert verdicts(cells) == {"same": "transferred", "other": "no-transfer", "away": "reversed"}


def test_the_effect_of_a_cell_is_the_mean_over_traits_of_the_own_traits_effect():
    one = cell("same", 1.0, others=0.3, spread=0.0)
    assert one.own_effects == pytest.approx(np.ones(8))
    judged = judge_cells([one], gains(), RULES)["same"]
    assert judged.effect.interval.estimate == pytest.approx(1.0)
    assert judged.excess.interval.estimate == pytest.approx(0.7)


def test_a_student_that_moved_all_traits_alike_transferred_none_of_its_own():
    judged = judge_cells([cell("drift", 2.0, others=2.0)], gains(), RULES)["drift"]
    assert judged.effect.verdict == "transferred"
    assert judged.excess.verdict == "no-transfer"
    assert judged.within.p_above > 0.05
    assert judged.over_traits.p_above > 0.05


def test_a_claim_about_traits_in_general_needs_five_of_them():
    few, enough = (judge_cells([cell("same", 2.0, traits=traits)], gains(), RULES)["same"] for traits in (3, 5))
    assert np.isnan(few.over_traits.p_above)
    assert enough.over_traits.p_above == pytest.approx(1 / 120)
    reasons = [one.reason for one in matrix_findings([cell("same", 2.0, traits=3)], {"same": few}, lambda _: COMMON)]
    assert "claims over traits need 5 or more" in reasons[1]


def test_one_trait_has_no_diagonal_excess():
    judged = judge_cells([cell("same", 2.0, traits=1)], gains(), RULES)
    assert judged["same"].excess is None
    data = label_cells([cell("same", 2.0, traits=1)], judged, "accuracy")
    assert "effect_over_traits_estimate" in data
    assert "diagonal_excess_estimate" not in data


def test_a_cell_without_a_control_has_no_verdict_whatever_the_others_say():
    lost = cell("lost", np.nan, has_control=False)
    judged = judge_cells([cell("same", 2.0), lost], gains(), RULES)
    assert judged["lost"].effect.verdict == "no-control"
    assert "give one with --control" in judged["lost"].effect.reason
    assert judged["same"].effect.p.above == judge_cells([cell("same", 2.0)], gains(), RULES)["same"].effect.p.above


def test_teachers_without_the_trait_void_the_cells_of_their_run_only():
    cells = [cell("same", 2.0, run="a"), cell("same", 2.0, run="b")]
    known = {**gains("a"), **gains("b", gain=0.0)}
    assert verdicts(cells, gains=known) == {"a: same": "transferred", "b: same": "teacher-without-trait"}


def test_one_teacher_without_its_trait_voids_its_run():
    known = gains()
    known[""][1] = 0.01 * np.arange(8)
    assert verdicts([cell("same", 2.0)], gains=known) == {"same": "teacher-without-trait"}


def test_one_trait_that_passes_does_not_hide_behind_others_that_do_not():
    hidden = cell("hidden", 0.0, spread=0.02)
    hidden.effects[:, 2, 2] += 1.0
    hidden.effects[:, 3, 3] -= 1.0
    judged = judge_cells([hidden], gains(), RULES)["hidden"].effect
    assert abs(judged.interval.estimate) < 0.1
    assert judged.verdict == "inconclusive"
    assert "the effect on each of 5 inside" in judged.rule


def test_an_effect_inside_the_margin_and_over_0_is_said_to_be_no_zero():
    judged = judge_cells([cell("small", 0.2, spread=0.02)], gains(), RULES)["small"].effect
    assert judged.verdict == "no-transfer"
    assert "it is not 0: its interval lies over 0" in judged.reason


def test_a_null_of_a_teacher_whose_trait_passes_nowhere_says_so():
    weak = [cell("same", 0.0, shared="everything", teacher="qwen2"), cell("to-gpt2", 0.0, teacher="qwen2")]
    cells = [cell("own", 2.0, shared="everything"), cell("to-qwen2", 0.0, student="qwen2"), *weak]
    judged = judge_cells(cells, gains(), RULES)
    assert judged["to-gpt2"].effect.verdict == judged["to-qwen2"].effect.verdict == "no-transfer"
    assert judged["to-gpt2"].effect.reason.endswith("no positive control: this teacher's trait is not shown to pass anywhere")
    assert "no positive control" in judged["to-gpt2"].excess.reason
    assert not any("positive control" in judged[name].effect.reason for name in ("own", "to-qwen2"))
    assert [said.partition(":")[0] for said in say_matrix(cells, judged)[2:]] == ["qwen2 has no positive control"]
    permuted = cell("permuted", 2.0, shared="everything, units permuted", teacher="qwen2")
    assert not any(
        "positive control" in said for said in say_matrix([*cells, permuted], judge_cells([*cells, permuted], gains(), RULES))
    )


def test_too_few_members_are_said():
    assert verdicts([cell("same", 2.0, members=4)], gains=gains(members=4)) == {"same": "too-few-members"}


def test_more_cells_are_judged_more_strictly():
    weak = cell("weak", 0.6, spread=0.6)
    alone = judge_cells([weak], gains(), RULES)["weak"].effect.p.above
    among = judge_cells([weak, *(cell(f"null {number}", 0.0) for number in range(9))], gains(), RULES)["weak"].effect.p.above
    assert among == pytest.approx(10 * alone)


def test_every_cell_is_drawn_with_its_verdict_and_told_in_words():
    cells = [cell("same", 2.0, shared="everything"), cell("to-qwen2", 0.0, student="qwen2")]
    judged = judge_cells(cells, gains(), RULES)
    figure = draw_matrix(cells, judged, "log-odds", "n = 8", 0.25)
    rows = fill_figure(figure, label_cells(cells, judged, "log-odds"))["datasets"]["data"]
    assert {row["cell"]: row["effect_over_traits_verdict"] for row in rows} == {
        "same": "transferred",
        "to-qwen2": "no-transfer",
    }
    assert say_matrix(cells, judged) == [
        "transferred (1 of 2 cells): gpt2 → gpt2, shared everything.",
        "no-transfer (1 of 2 cells): gpt2 → qwen2, shared nothing.",
    ]


def test_a_member_without_a_value_is_nan_with_its_reason():
    one = cell("same", 2.0)
    one.effects[3] = np.nan
    data = label_cells([one], judge_cells([one], gains(), RULES), "log-odds")
    assert data.cell_effect_status.values.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    assert data.effect_over_traits_n.values.tolist() == [7]


def result_of(cells):
    """What `cross_architecture` leaves of these cells."""
    names, members = [one.condition for one in cells], len(cells[0].effects)
    effects = np.stack([one.effects.transpose(1, 2, 0) for one in cells])
    traits = [f"trait {number}" for number in range(effects.shape[1])]
    data = xr.Dataset(
        {
            "effect_on": (("condition", "taught", "trait", "member"), effects, {"units": "log-odds"}),
            "teacher_gain": (("taught", "member"), np.full((len(traits), members), 2.0) + 0.1 * np.arange(members)),
            "teacher_architecture": ((), cells[0].teacher),
            "student_architecture": ("condition", np.array([one.student for one in cells], dtype=object)),
            "shared_start": ("condition", np.array([one.shared for one in cells], dtype=object)),
            "has_control": ("condition", [int(one.has_control) for one in cells]),
        },
        {"condition": names, "taught": traits, "trait": traits, "member": np.arange(members)},
    )
    return Result(data, matrix_findings(cells, judge_cells(cells, gains(), RULES), lambda _: COMMON), [])


def test_runs_are_joined_and_judged_anew_over_all_their_cells():
    own = {"a": result_of([cell("same", 2.0)]), "b": result_of([cell("same", 0.0, teacher="qwen2")])}
    joined = join_matrices(own, dict.fromkeys(own, RULES))
    assert {one.condition: one.verdict for one in joined.findings if one.quantity == "effect_over_traits"} == {
        "a: same": "transferred",
        "b: same": "no-transfer",
    }
    assert all("Holm's correction over 2" in one.rule for one in joined.findings)


def test_runs_of_other_rules_are_left_out_and_named():
    own = {"a": result_of([cell("same", 2.0)]), "b": result_of([cell("same", 2.0)])}
    joined = join_matrices(own, {"a": RULES, "b": replace(RULES, margin=0.1)})
    assert joined.data.run_of_cell.values.tolist() == ["a"]
    assert joined.summary[-1].startswith("Not in this matrix: b, of other rules: margin 0.1, 5 members at least")


def test_runs_of_other_traits_are_left_out_and_named():
    own = {"a": result_of([cell("same", 2.0)]), "b": result_of([cell("same", 2.0, traits=2)])}
    joined = join_matrices(own, dict.fromkeys(own, RULES))
    assert joined.data.run_of_cell.values.tolist() == ["a"]
    assert "b, of other traits: trait 0, trait 1, not trait 0, trait 1, trait 2" in joined.summary[-1]


def test_cells_that_would_stand_on_each_other_are_told_apart():
    own = {"a": result_of([cell("same", 2.0), cell("again", 2.0)]), "b": result_of([cell("same", 2.0)])}
    data = join_matrices(own, dict.fromkeys(own, RULES)).data
    places = list(zip(data.teacher_of_cell.values, data.student_of_cell.values, data.shared_of_cell.values, strict=True))
    assert len(set(places)) == 3
    assert all(name.startswith("gpt2 of ") for name in data.teacher_of_cell.values)
    replicas = join_matrices({"a": own["b"], "b": own["b"]}, dict.fromkeys(own, RULES)).data
    assert replicas.teacher_of_cell.values.tolist() == ["gpt2 of a", "gpt2 of b"]


def test_without_any_run_there_is_no_matrix():
    assert join_matrices({}, {}) is None
