import numpy as np
import pytest

from mechsub import pooling
from mechsub.comparison.comparison import compare
from mechsub.comparison.notes import merge_notes
from mechsub.comparison.panels import POOLED, build_panels
from mechsub.errors import MechsubError
from tests.comparison.made_up import behaviour, make

FIRST = {"same-init": {"owl": [0.5, 0.6, 0.7]}, "different-init": {"owl": [0.0, 0.1, -0.1]}}
SECOND = {"same-init": {"owl": [0.1, 0.2, 0.9]}, "different-init": {"owl": [0.0, 0.0, 0.3]}}


def held_by_label(panel):
    return dict(zip(panel.labels, panel.held, strict=True))


def test_conditions_of_one_run_are_paired_with_the_baseline(tmp_path):
    (panel,), _ = build_panels([make(tmp_path / "run", FIRST)], "same-init")
    held = held_by_label(panel)
    assert held["same-init"] is None
    # Members' differences −.5, −.5, −.8.
    interval = held["different-init"].interval
    assert interval.estimate == pytest.approx(-0.6) and held["different-init"].how == "paired, n = 3"
    assert interval.high - interval.estimate == pytest.approx(4.302653 * np.sqrt(0.03 / 3), abs=1e-6)


def test_another_baseline_turns_the_difference_around(tmp_path):
    (panel,), _ = build_panels([make(tmp_path / "run", FIRST)], "different-init")
    assert panel.labels == ["different-init", "same-init"]
    assert held_by_label(panel)["same-init"].interval.estimate == pytest.approx(0.6)


def test_runs_with_other_references_are_independent_groups(tmp_path):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", SECOND, reference="another")]
    (panel,), _ = build_panels(runs, "same-init")
    one = held_by_label(panel)["same-init · b"]
    own, other = np.array([0.1, 0.2, 0.9]), np.array([0.5, 0.6, 0.7])
    assert one.how == "Welch, n = 3 and 3" and one.against.words == "same-init (owl) of a"
    assert one.interval.estimate == pytest.approx(own.mean() - other.mean())
    squares = own.var(ddof=1) / 3, other.var(ddof=1) / 3
    assert one.difference._error()[0] == pytest.approx(np.sqrt(sum(squares)))


def test_every_row_of_another_run_is_held_against_the_same_condition(tmp_path):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", SECOND)]
    (panel,), _ = build_panels(runs, "same-init")
    against = {label: one and one.against.words for label, one in held_by_label(panel).items()}
    assert against == {
        "same-init · a": None,
        "same-init · b": "same-init (owl) of a",
        "different-init · a": "same-init (owl) of a",
        "different-init · b": "different-init (owl) of a",
    }


def test_a_condition_that_the_first_run_lacks_is_held_against_its_own_runs_baseline(tmp_path):
    second = {"same-init": {"owl": [0.2, 0.3, 0.4]}, "shuffled": {"owl": [0.0, 0.1, 0.0]}}
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", second, reference="another")]
    (panel,), _ = build_panels(runs, "same-init")
    one = held_by_label(panel)["shuffled · b"]
    assert one.against.words == "same-init (owl) of b" and one.how == "paired, n = 3"


def test_two_copies_of_one_run_differ_by_exactly_nothing(tmp_path):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", FIRST)]
    (panel,), _ = build_panels(runs, "same-init")
    between = [one for one in panel.held if one is not None and one.is_of_run]
    assert len(between) == 2 and all(one.how == "paired, n = 3" for one in between)
    assert [(one.interval.low, one.interval.estimate, one.interval.high) for one in between] == [(0.0, 0.0, 0.0)] * 2
    assert [one.judgement.verdict for one in between] == ["no-difference"] * 2


def test_without_a_baseline_of_its_own_it_is_held_against_the_first_runs_and_named(tmp_path):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", {"shuffled": {"owl": [0.0, 0.1, 0.0]}})]
    (panel,), notes = build_panels(runs, "same-init")
    assert held_by_label(panel)["shuffled · b"].against.words == "same-init (owl) of a"
    assert "effect: shuffled · b held against same-init (owl) of a, so that both the run and the condition differ" in notes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"margin": 0.1}, "margin 0.1 and 0.05"),
        ({"minimum_members": 4}, "minimum members 4 and 3"),
        ({"confidence": 0.9}, "confidence 0.9 and 0.95"),
        ({"equivalence_level": 0.1}, "equivalence level 0.1 and 0.05"),
    ],
)
def test_runs_with_other_rules_have_estimates_and_no_verdict_between_them(tmp_path, changed, said):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", SECOND, verdict=changed)]
    (panel,), notes = build_panels(runs, "same-init")
    held = held_by_label(panel)
    one = held["same-init · b"]
    assert one.judgement is None and said in one.unjudged and np.isfinite(one.interval.low)
    assert held["different-init · a"].judgement is not None and panel.families == [1]
    assert any(said in note and "same-init · b" in note for note in notes)


def test_shared_traits_are_compared_and_the_others_named(tmp_path):
    first = make(tmp_path / "a", {"same-init": {"owl": [1.0, 2.0, 3.0], "cat": [0.0, 1.0, 0.0]}})
    second = make(tmp_path / "b", {"same-init": {"owl": [1.0, 2.0, 4.0], "dog": [0.0, 1.0, 0.0]}})
    (panel,), notes = build_panels([first, second], "same-init")
    assert panel.labels == ["same-init · a", "same-init · b"]
    assert [note for note in notes if "the trait" in note] == [
        "effect: the trait cat taught in a only; the rows are left out",
        "effect: the trait dog taught in b only; the rows are left out",
    ]


def test_runs_without_a_common_trait_are_drawn_and_not_held_against_each_other(tmp_path):
    first = make(tmp_path / "a", {"same-init": {"owl": [1.0, 2.0, 3.0]}})
    second = make(tmp_path / "b", {"same-init": {"dog": [0.0, 1.0, 0.0]}})
    (panel,), notes = build_panels([first, second], "same-init")
    assert panel.labels == ["same-init · owl · a", "same-init · dog · b"] and list(panel.held) == [None, None]
    assert any("no two runs teach the same trait" in note for note in notes)


def test_several_traits_have_their_mean_over_traits_within_members(tmp_path):
    effects = {
        "same-init": {"owl": [1.0, 2.0, 3.0], "cat": [0.0, 1.0, np.nan]},
        "other": {"owl": [0.0, 0.0, 0.0], "cat": [0.0, 0.0, 0.0]},
    }
    (panel,), _ = build_panels([make(tmp_path / "run", effects)], "same-init")
    pooled = panel.rows[panel.labels.index(f"same-init · {POOLED}")]
    np.testing.assert_array_equal(pooled.value.values, [0.5, 1.5, np.nan])
    assert pooled.value.why == ("", "", "judge abstained") and pooled.interval.n == 2
    assert panel.families == [1, 2] and POOLED == pooling.ALL_TRAITS


def test_other_units_have_panels_of_their_own(tmp_path):
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", FIRST, unit="log-odds")]
    panels, notes = build_panels(runs, "same-init")
    assert [panel.unit for panel in panels] == ["accuracy", "log-odds"]
    assert any("effect: other units: a in accuracy; b in log-odds" in note for note in notes)
    assert all(not one.is_of_run for panel in panels for one in panel.held if one)
    names = [section.name for section in compare(runs).sections]
    assert names == ["effect_in_accuracy", "effect_in_log_odds"]


def test_teachers_without_a_trait_leave_the_difference_without_a_verdict(tmp_path):
    run = make(tmp_path / "run", FIRST, verdicts={"different-init": "teacher-without-trait"})
    (panel,), _ = build_panels([run], "same-init")
    one = panel.held[1]
    assert one.judgement is None and "teachers of run have no trait to pass on" in one.unjudged


def test_a_condition_without_any_value_is_named_with_its_reason_and_is_never_zero(tmp_path):
    effects = {**FIRST, "silent": {"owl": [np.nan] * 3}}
    (panel,), notes = build_panels([make(tmp_path / "run", effects)], "same-init")
    silent = held_by_label(panel)["silent"]
    assert np.isnan(silent.interval.estimate) and silent.judgement is None and silent.row.interval.n == 0
    assert "effect: no value (judge abstained) of silent" in notes


def test_what_one_run_lacks_is_named_and_the_rest_is_compared(tmp_path):
    full = make(tmp_path / "full", FIRST)
    bare = make(tmp_path / "bare", FIRST, results={})
    (panel,), notes = build_panels([full, bare], "same-init")
    assert panel.labels == ["same-init", "different-init"]
    assert any(note.startswith("bare: behaviour, ") and "not measured; `mechsub analyze" in note for note in notes)


def test_fewer_than_two_rows_are_no_comparison(tmp_path):
    with pytest.raises(MechsubError, match="nothing to compare in run; two rows"):
        compare([make(tmp_path / "run", {"same-init": FIRST["same-init"]})])


def test_an_unknown_baseline_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(
        MechsubError, match="--baseline none: run, the first run, has no such condition; it has same-init, diff"
    ):
        compare([make(tmp_path / "run", FIRST)], "none")


def test_a_result_without_the_quantity_is_named(tmp_path):
    empty = behaviour(FIRST)
    empty = type(empty)(empty.data.drop_vars("effect"), empty.findings, [])
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", FIRST, results={"behaviour": empty})]
    _, notes = build_panels(runs, "same-init")
    assert any(note.startswith("b: behaviour holds no effect; `mechsub analyze") for note in notes)


def test_rows_that_are_judged_by_other_rules_have_a_correction_of_their_own(tmp_path):
    dog = {name: {"dog": values["owl"]} for name, values in SECOND.items()}
    runs = [make(tmp_path / "a", FIRST), make(tmp_path / "b", dog, verdict={"margin": 0.1})]
    (panel,), _ = build_panels(runs, "same-init")
    assert panel.families == [1, 1] and "0.1" in held_by_label(panel)["different-init · dog · b"].judgement.rule


def test_what_is_true_of_several_quantities_is_said_once():
    assert merge_notes([("effect", "x"), ("alignment", "x"), ("effect", "x"), ("run", "y")]) == [
        "effect, alignment: x",
        "run: y",
    ]
