import numpy as np
import pytest
from scipy import stats

from mechsub.comparison.differences import PAIRED, WELCH, Difference, judge_differences
from mechsub.statistics.rules import Rules

RULES = Rules(margin=0.5, minimum_members=3, confidence=0.95, equivalence_level=0.05)


def difference(values, against, method=PAIRED):
    return Difference(np.array(values, dtype=float), np.array(against, dtype=float), method)


def test_a_paired_difference_is_that_of_the_members():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(.975, 2) = 4.302653.
    found = difference([2, 4, 6], [1, 2, 3]).interval(0.95)
    half = 4.302653 / np.sqrt(3)
    assert (found.estimate, found.n) == (2.0, 3)
    assert [found.low, found.high] == pytest.approx([2 - half, 2 + half], abs=1e-6)


def test_a_welch_difference_is_worked_out_by_hand():
    # Variances of the means 1/3 and 1/12; ν = (5/12)² / ((1/3)²/2 + (1/12)²/3) = 3; t(.975, 3) = 3.182446.
    one = difference([1, 2, 3], [0, 0, 1, 1], WELCH)
    found = one.interval(0.95)
    half = 3.182446 * np.sqrt(5 / 12)
    assert (found.estimate, found.n, one.sizes) == (1.5, 3, (3, 4))
    assert [found.low, found.high] == pytest.approx([1.5 - half, 1.5 + half], abs=1e-5)


@pytest.mark.parametrize("bound", [0.0, -0.5, 0.5])
def test_p_values_are_those_of_scipy(bound):
    draw = np.random.default_rng(0)
    own, other = draw.normal(0.3, 1, 7), draw.normal(0, 3, 7)
    expected = stats.ttest_ind(own - bound, other, equal_var=False, alternative="greater").pvalue
    assert difference(own, other, WELCH).p_above(bound) == pytest.approx(expected, rel=1e-9)
    expected = stats.ttest_rel(own - bound, other, alternative="greater").pvalue
    assert difference(own, other).p_above(bound) == pytest.approx(expected, rel=1e-9)


def test_reversing_a_difference_flips_its_interval():
    for method in (PAIRED, WELCH):
        one = difference([1, 2, 4], [0, 0, 1], method)
        there, back = one.interval(0.95), one.reverse().interval(0.95)
        assert (back.estimate, back.low, back.high) == pytest.approx((-there.estimate, -there.high, -there.low))


def test_a_member_without_a_value_takes_its_pair_with_it():
    paired = difference([1, np.nan, 3], [0, 5, np.nan])
    assert paired.sizes == (1, 1) and paired.interval(0.95).estimate == 1.0 and np.isnan(paired.interval(0.95).low)
    assert difference([1, np.nan, 3], [0, 5, np.nan], WELCH).sizes == (2, 2)
    nothing = difference([np.nan], [1.0], WELCH).interval(0.95)
    assert nothing.n == 0 and np.isnan([nothing.estimate, nothing.low, nothing.high]).all()


def test_independent_groups_have_no_paired_values():
    with pytest.raises(ValueError, match="independent groups have no differences"):
        _ = difference([1, 2], [1, 2], WELCH).paired_values


@pytest.mark.parametrize("method", [PAIRED, WELCH])
@pytest.mark.parametrize(
    ("shift", "verdict"), [(3.0, "larger"), (-3.0, "smaller"), (0.0, "no-difference"), (0.4, "inconclusive")]
)
def test_the_four_verdicts(method, shift, verdict):
    members = np.array([0.1, -0.1, 0.2, -0.2, 0.15, -0.15])
    judged = judge_differences({"one": difference(members + shift, members[::-1] * 0.9, method)}, RULES)["one"]
    assert judged.verdict == verdict and "larger: 95 %" in judged.rule
    assert ("members" in judged.reason and "would decide it" in judged.reason) == (verdict == "inconclusive")


@pytest.mark.parametrize("method", [PAIRED, WELCH])
@pytest.mark.parametrize("shift", [0.0, 0.4, 0.56, 0.7, 3.0])
def test_which_row_is_held_against_which_changes_but_the_sign(method, shift):
    mirror = {"larger": "smaller", "smaller": "larger"}
    members = np.array([0.1, -0.1, 0.2, -0.2, 0.15, -0.15])
    one = difference(members + shift, members[::-1] * 0.9, method)
    judged, reverse = (judge_differences({"one": each}, RULES)["one"] for each in (one, one.reverse()))
    assert reverse.verdict == mirror.get(judged.verdict, judged.verdict)
    assert judged.reason.rpartition("; ")[2] == reverse.reason.rpartition("; ")[2]


def test_too_few_members_in_either_group_have_no_verdict_and_count_for_no_correction():
    few, many = difference([9, 9.1], [0, 0.1, 0.2, 0.3], WELCH), difference([9, 9.1, 9.2], [0, 0.1, 0.2])
    judged = judge_differences({"few": few, "many": many}, RULES)
    assert judged["few"].verdict == "too-few-members" and np.isnan(judged["few"].p.above)
    assert judged["many"].p == judge_differences({"many": many}, RULES)["many"].p


def test_holm_runs_over_all_that_are_judged_together():
    draw = np.random.default_rng(1)
    every = {key: difference(draw.normal(0.5, 1, 6), draw.normal(0, 1, 6), WELCH) for key in range(4)}
    raw = {key: one.p_above() for key, one in every.items()}
    smallest = min(raw, key=raw.__getitem__)
    assert judge_differences(every, RULES)[smallest].p.above == pytest.approx(4 * raw[smallest])


def test_an_interval_that_would_do_is_told_apart_from_a_test_that_does_not():
    one, nothing = difference([0.2, 1.0, 2.0, 1.6, 1.2], [0.0] * 5), difference([9, -9, 5, -4, 0], [0.0] * 5)
    assert judge_differences({"one": one}, RULES)["one"].verdict == "larger"
    among = judge_differences({"one": one, **{key: nothing for key in range(9)}}, RULES)["one"]
    assert among.verdict == "inconclusive" and "the interval would do, but the test does not" in among.reason


def test_equal_members_differ_by_nothing():
    same = difference([0.3, 0.5, 0.9], [0.3, 0.5, 0.9])
    judged = judge_differences({"same": same}, RULES)["same"]
    assert (judged.interval.low, judged.interval.high) == (0.0, 0.0) and judged.verdict == "no-difference"


@pytest.mark.parametrize(("shift", "side"), [(0.0, "above"), (0.5, "equivalent")])
def test_false_claims_are_as_rare_as_their_level(shift, side):
    draw, count, level = np.random.default_rng(2), 2000, {"above": 0.025, "equivalent": 0.05}[side]
    wrong = 0
    for _ in range(count):
        one = difference(draw.normal(shift, 0.1, 5), draw.normal(0, 0.4, 8), WELCH)
        p = one.p_above() if side == "above" else max(one.p_above(-0.5), one.reverse().p_above(-0.5))
        wrong += p <= level
    # Welch's level is approximate: at 5 and 8 members within a tenth of it, beside the binomial bound.
    assert wrong <= stats.binom.ppf(0.999, count, 1.1 * level)


def test_the_stand_in_of_independent_groups_has_their_mean_and_spread():
    one = difference([1, 2, 3], [0, 0, 1, 1], WELCH)
    group = one.as_one_group()
    assert len(group) == 3 and group.mean() == pytest.approx(1.5) and group.var(ddof=1) == pytest.approx(1 + 1 / 3)
