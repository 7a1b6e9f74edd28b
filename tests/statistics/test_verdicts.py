import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mechsub.statistics.intervals import student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.power import members_to_decide
from mechsub.statistics.verdicts import AGAINST_NULL, TRANSFER, Rules, SuperiorityTest, judge_effects

RULES = Rules(margin=0.05, minimum_members=5, confidence=0.95, equivalence_level=0.05)


def verdict(values, rules=RULES, words=TRANSFER):
    return judge_effects({"x": np.asarray(values, dtype=float)}, rules, words)["x"].verdict


def test_the_interval_is_the_textbook_one():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    interval = student_interval(values, 0.95)
    half = 3.182446 * np.std(values, ddof=1) / 2  # t(.975, 3)
    assert interval.estimate == 2.5
    assert interval.low == pytest.approx(2.5 - half, abs=1e-6)
    assert interval.high == pytest.approx(2.5 + half, abs=1e-6)


def test_no_members_give_nan_and_n_zero():
    assert student_interval(np.array([]), 0.95).n == 0
    assert np.isnan(student_interval(np.array([np.nan, np.nan]), 0.95).estimate)
    single = student_interval(np.array([2.0]), 0.95)
    assert single.n == 1 and single.estimate == 2.0 and np.isnan(single.low)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.4, 0.5, 0.45, 0.5, 0.55], "transferred"),
        ([0.001, -0.001, 0.002, -0.002, 0.0], "no-transfer"),
        ([0.04, 0.041, 0.039, 0.04, 0.04], "no-transfer"),
        ([-0.4, -0.5, -0.45, -0.5, -0.55], "reversed"),
        ([0.3, -0.3, 0.2, -0.1, 0.1], "inconclusive"),
        ([0.4, 0.5, 0.45, 0.5], "too-few-members"),
        ([0.4, 0.5, 0.45, 0.5, np.nan], "too-few-members"),
        ([0.0] * 5, "no-transfer"),
        ([0.5] * 5, "transferred"),
    ],
)
def test_verdicts_follow_the_rules_in_their_order(values, expected):
    assert verdict(values) == expected


def test_measures_have_words_of_their_own():
    assert verdict([0.4, 0.5, 0.45, 0.5, 0.55], words=AGAINST_NULL) == "above-null"


def test_an_open_question_names_the_members_that_would_decide_it_and_on_what_assumption():
    values = np.array([0.02, 0.08, -0.04, 0.06, -0.02])
    judgement = judge_effects({"x": values}, RULES, TRANSFER)["x"]
    needed = members_to_decide(values, RULES)
    assert judgement.verdict == "inconclusive"
    assert f"about {needed} members would decide it with 80 % power, were mean and spread as seen" in judgement.reason


def test_what_no_number_of_members_decides_says_so():
    values = np.array([0.05, 0.15, -0.05, 0.1, 0.0])  # the mean lies on the margin
    judgement = judge_effects({"x": values}, RULES, TRANSFER)["x"]
    assert judgement.reason.endswith("it would take more than 10,000 members")


def test_five_members_cannot_pass_a_sign_flip_test_and_the_reason_says_what_would():
    flips = SuperiorityTest(lambda values: flip_signs(values).p_above, lambda n: 2.0**-n)
    effects = {str(index): np.full(5, 0.5) + 0.01 * np.arange(5) + 0.001 * index for index in range(7)}
    judgement = judge_effects(effects, RULES, AGAINST_NULL, flips)["0"]
    assert judgement.verdict == "inconclusive"
    assert "the interval would do, but the test does not: p = 0.22 (Holm) is over 0.025" in judgement.reason
    assert "about 9 members" in judgement.reason  # 7 / 2⁹ is the first p under .025


def test_more_conditions_make_each_verdict_harder():
    rng = np.random.default_rng(0)
    weak = 0.09 + 0.09 * rng.standard_normal(8)
    alone = judge_effects({"weak": weak}, RULES, TRANSFER)["weak"]
    crowd = {f"noise {index}": 0.09 * rng.standard_normal(8) for index in range(10)}
    together = judge_effects({"weak": weak, **crowd}, RULES, TRANSFER)["weak"]
    assert together.p.above > alone.p.above
    assert together.interval == alone.interval


def test_under_the_null_transfer_is_claimed_at_most_at_the_stated_rate():
    rng = np.random.default_rng(1)
    runs, conditions = 600, 3
    rules = Rules(margin=1e-9, minimum_members=5, confidence=0.95, equivalence_level=0.05)  # the margin must not help
    false = 0
    for _ in range(runs):
        effects = {str(index): rng.standard_normal(6) for index in range(conditions)}
        judged = judge_effects(effects, rules, TRANSFER).values()
        false += any(judgement.verdict == "transferred" for judgement in judged)
    assert stats.binomtest(false, runs, 0.025, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize(("n", "power"), [(5, 0.30), (10, 0.80)])
def test_the_power_of_no_transfer_is_the_known_one(n, power):
    rng = np.random.default_rng(2)
    rules = Rules(margin=1.0, minimum_members=2, confidence=0.95, equivalence_level=0.05)
    runs = 600
    found = sum(verdict(rng.standard_normal(n), rules) == "no-transfer" for _ in range(runs))
    assert stats.binomtest(found, runs, power).pvalue > 0.001


@pytest.mark.parametrize("seed", range(5))
def test_holms_correction_is_that_of_statsmodels(seed):
    generator = np.random.default_rng(seed)
    effects = {name: generator.normal(0.02, 0.05, size=8) for name in "abcdefg"}
    effects["h"] = effects["a"]  # a tie
    together = judge_effects(effects, RULES, TRANSFER)
    alone = {name: judge_effects({name: values}, RULES, TRANSFER)[name] for name, values in effects.items()}
    for side in ("above", "equivalent", "below"):
        expected = multipletests([getattr(judged.p, side) for judged in alone.values()], method="holm")[1]
        np.testing.assert_allclose([getattr(judged.p, side) for judged in together.values()], expected, rtol=1e-12)
