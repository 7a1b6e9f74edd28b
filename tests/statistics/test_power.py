from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, stats

from mechsub.statistics.power import compute_verdict_probabilities, members_to_decide, smallest_detectable_effect
from mechsub.statistics.rules import SIGN_FLIP, Rules
from mechsub.statistics.verdicts import TRANSFER, judge_effects

RULES = Rules(margin=0.05, minimum_members=2, confidence=0.95, equivalence_level=0.05)
WITHOUT_MARGIN = replace(RULES, margin=0.0)
SPREADS = (0.003, 0.02, 0.05, 0.2)
MEANS = (-0.2, -0.05, 0.0, 0.03, 0.05, 0.1)


def integrate_over_the_mean(mean, spread, n, num_judged):
    """The same probabilities the other way round: for each sample mean, how likely a spread small enough is."""
    alone, above, equal = (
        stats.t.isf(level, n - 1) for level in (RULES.level, RULES.level / num_judged, RULES.equivalence_level / num_judged)
    )
    error, margin = spread / np.sqrt(n), RULES.margin

    def smaller(bound):  # P(S/√n ≤ bound)
        return stats.chi2.cdf((n - 1) * (bound / error) ** 2, n - 1)

    pieces = {
        "above": (lambda x: smaller(x / above), margin, mean + 9 * error),
        "equivalent": (lambda x: smaller((margin - abs(x)) / equal), -margin, margin),
        "below": (lambda x: smaller(min((-x - margin) / alone, -x / above)), mean - 9 * error, -margin),
    }

    def probability(of, low, high):
        low, high = max(low, mean - 9 * error), min(high, mean + 9 * error)
        if low >= high:
            return 0.0
        kink = margin * above / (above - alone) if above > alone else 0.0  # where the adjusted test takes over from the bound
        breaks = sorted({x for x in (0.0, -kink, *(mean + np.arange(-8, 9) * error)) if low < x < high})
        edges = [low, *breaks, high]
        density = stats.norm(mean, error).pdf
        parts = pairwise(edges)
        return sum(integrate.quad(lambda x: of(x) * density(x), a, b, epsabs=1e-10)[0] for a, b in parts)

    return [probability(*piece) for piece in pieces.values()]


@pytest.mark.parametrize(("n", "num_judged"), [(2, 1), (2, 7), (3, 1), (5, 30), (25, 1), (400, 7)])
def test_integrating_over_the_mean_instead_of_the_spread_gives_the_same(n, num_judged):
    for mean, spread in [(0.0, 0.05), (0.03, 0.02), (0.05, 0.2), (0.1, 0.05), (-0.05, 0.003), (-0.2, 0.2)]:
        found = compute_verdict_probabilities(mean, spread, n, RULES, num_judged)
        expected = integrate_over_the_mean(mean, spread, n, num_judged)
        np.testing.assert_allclose([found.above, found.equivalent, found.below], expected, atol=2e-7)


@pytest.mark.parametrize("num_judged", [1, 3])
@pytest.mark.parametrize("n", [2, 3, 10, 200])
def test_without_a_margin_it_is_the_power_of_the_one_sided_t_test(n, num_judged):
    found = compute_verdict_probabilities(0.04, 0.1, n, WITHOUT_MARGIN, num_judged)
    critical, shift = stats.t.isf(0.025 / num_judged, n - 1), 0.04 / 0.1 * np.sqrt(n)
    assert found.above == pytest.approx(stats.nct.sf(critical, n - 1, shift), abs=1e-7)
    assert found.below == pytest.approx(stats.nct.cdf(-critical, n - 1, shift), abs=1e-7)
    assert found.equivalent == 0.0


def test_the_power_of_two_one_sided_tests_at_a_margin_of_one_standard_deviation_is_the_known_one():
    rules = replace(RULES, margin=1.0)
    found = [compute_verdict_probabilities(0.0, 1.0, n, rules).equivalent for n in (3, 5, 10)]
    np.testing.assert_allclose(found, [0.13, 0.29, 0.80], atol=0.005)


def test_no_level_is_exceeded_without_effect_at_the_margin_or_beyond_it():
    for n in (2, 3, 5, 25, 1000):
        for spread in SPREADS:
            assert compute_verdict_probabilities(0.0, spread, n, RULES).above <= RULES.level + 1e-9
            assert compute_verdict_probabilities(0.0, spread, n, RULES).below <= RULES.level + 1e-9
            for mean in (-0.05, 0.05, 0.07):
                found = compute_verdict_probabilities(mean, spread, n, RULES)
                assert found.equivalent <= RULES.equivalence_level + 1e-9


@pytest.mark.parametrize("spread", SPREADS)
def test_they_sum_to_one_and_follow_the_effect(spread):
    found = [compute_verdict_probabilities(mean, spread, 6, RULES, 4) for mean in np.linspace(-0.3, 0.3, 41)]
    for one in found:
        assert one.above + one.equivalent + one.below + one.undecided == pytest.approx(1.0)
        assert min(one.above, one.equivalent, one.below, one.undecided) >= 0.0
    assert np.all(np.diff([one.above for one in found]) >= -1e-9)
    assert np.all(np.diff([one.below for one in found]) <= 1e-9)
    equivalent = np.array([one.equivalent for one in found])
    np.testing.assert_allclose(equivalent, equivalent[::-1], atol=1e-9)
    assert np.all(np.diff(equivalent[:21]) >= -1e-9)


def test_reversed_takes_more_than_transferred_as_its_bound_must_pass_the_margin():
    for mean in (0.05, 0.1, 0.2):
        below = compute_verdict_probabilities(-mean, 0.05, 6, RULES).below
        assert below < compute_verdict_probabilities(mean, 0.05, 6, RULES).above


def test_more_members_help_and_more_judged_together_hurt():
    counts = range(2, 60)
    for mean, of in ((0.0, "equivalent"), (0.1, "above"), (-0.1, "below")):
        by_n = [getattr(compute_verdict_probabilities(mean, 0.06, n, RULES), of) for n in counts]
        assert np.all(np.diff(by_n) > -1e-9)
        by_judged = [getattr(compute_verdict_probabilities(mean, 0.06, 10, RULES, judged), of) for judged in (1, 2, 7, 30)]
        assert np.all(np.diff(by_judged) <= 0) and by_judged[-1] < by_judged[0]


@pytest.mark.parametrize("mean", [*MEANS, 0.049, -0.051])
def test_without_spread_the_mean_decides_as_it_does_in_a_verdict(mean):
    found = compute_verdict_probabilities(mean, 0.0, 5, RULES)
    verdict = judge_effects({"x": np.full(5, mean)}, RULES, TRANSFER)["x"].verdict
    probability = {"transferred": found.above, "no-transfer": found.equivalent, "reversed": found.below}
    assert (probability | {"inconclusive": found.undecided})[verdict] == 1.0
    if abs(mean) != RULES.margin:
        nearly = compute_verdict_probabilities(mean, 1e-9, 5, RULES)
        np.testing.assert_allclose(list(vars(found).values()), list(vars(nearly).values()), atol=1e-9)


def test_too_few_members_no_values_and_extremes():
    few = compute_verdict_probabilities(1.0, 0.01, 4, replace(RULES, minimum_members=5))
    assert few.undecided == 1.0 and few.above == few.equivalent == few.below == 0.0
    assert compute_verdict_probabilities(1.0, 0.01, 1, replace(RULES, minimum_members=1)).undecided == 1.0
    for mean, spread in ((np.nan, 0.1), (0.1, np.nan)):
        assert np.isnan(list(vars(compute_verdict_probabilities(mean, spread, 5, RULES)).values())).all()
    assert compute_verdict_probabilities(1e9, 0.1, 2, RULES).above == pytest.approx(1.0)
    assert compute_verdict_probabilities(-1e300, 1e-100, 5, RULES).below == 1.0
    assert compute_verdict_probabilities(0.0, 1e12, 5, RULES).undecided == pytest.approx(0.95)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="a spread of -1"):
        compute_verdict_probabilities(0.0, -1.0, 5, RULES)
    with pytest.raises(ValueError, match="0 judged"):
        compute_verdict_probabilities(0.0, 1.0, 5, RULES, num_judged=0)
    with pytest.raises(ValueError, match="levels lie between 0 and 1/2"):
        compute_verdict_probabilities(0.0, 1.0, 5, replace(RULES, equivalence_level=0.6))
    with pytest.raises(ValueError, match="power lies between 0 and 1, not 80.0"):
        members_to_decide(np.arange(5.0), RULES, power=80.0)
    with pytest.raises(ValueError, match="power lies between 0 and 1, not 1"):
        smallest_detectable_effect(1.0, 5, RULES, power=1.0)


def test_sign_flips_of_few_members_can_be_neither_above_nor_below():
    assert compute_verdict_probabilities(1.0, 0.01, 5, RULES, test=SIGN_FLIP).above == 0.0  # 2⁻⁵ is over .025
    assert compute_verdict_probabilities(-1.0, 0.01, 5, RULES, test=SIGN_FLIP).below == 0.0
    assert compute_verdict_probabilities(0.0, 0.01, 5, RULES, test=SIGN_FLIP).equivalent > 0.9
    assert compute_verdict_probabilities(1.0, 0.01, 6, RULES, test=SIGN_FLIP).above == pytest.approx(1.0)


def decisive(values, n, rules=RULES, num_judged=1, test=None):
    found = compute_verdict_probabilities(
        values.mean(), values.std(ddof=1), n, rules, num_judged, **({"test": test} if test else {})
    )
    return 1 - found.undecided


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("num_judged", [1, 12])
def test_the_members_wanted_are_the_first_with_that_power(power, num_judged):
    rng = np.random.default_rng(0)
    for mean in (-0.15, 0.0, 0.02, 0.08):
        values = mean + 0.08 * rng.standard_normal(6)
        needed = members_to_decide(values, RULES, num_judged, power=power)
        if needed is None or needed > 400:
            continue
        powers = np.array([decisive(values, n, RULES, num_judged) for n in range(7, needed + 1)])
        assert powers[-1] >= power and np.all(powers[:-1] < power)


def test_a_mean_near_the_margin_takes_more_members_than_anyone_has():
    pattern = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert members_to_decide(0.05 + 0.1 * pattern, RULES) is None
    near = members_to_decide(0.045 + 0.1 * pattern, RULES)
    assert near is not None and 1000 < near < 10_000
    assert decisive(0.045 + 0.1 * pattern, near) >= 0.8 > decisive(0.045 + 0.1 * pattern, near - 1)


def test_the_members_wanted_are_more_than_were_seen_and_at_least_the_minimum():
    values = np.array([0.4, 0.5, 0.45, np.nan])
    assert members_to_decide(values, RULES) == 4
    assert members_to_decide(values, replace(RULES, minimum_members=8)) == 8
    assert members_to_decide(np.full(5, 0.3), RULES) == 6
    assert members_to_decide(np.array([0.3, np.nan]), RULES) is None
    assert members_to_decide(np.zeros(10_000), RULES) is None
    assert members_to_decide(values, RULES, num_judged=7, test=SIGN_FLIP) == 9  # 7 / 2⁹ is the first under .025


@pytest.mark.parametrize("n", [2, 5, 25, 500])
def test_the_smallest_detectable_effect_has_just_that_power(n):
    for spread in SPREADS:
        for power in (0.3, 0.8, 0.99):
            effect = smallest_detectable_effect(spread, n, RULES, 4, power)
            assert compute_verdict_probabilities(effect, spread, n, RULES, 4).above == pytest.approx(power, abs=1e-6)


def test_the_smallest_detectable_effect_shrinks_to_the_margin_and_scales_with_the_unit():
    effects = [smallest_detectable_effect(0.05, n, RULES) for n in (3, 5, 10, 100, 5000)]
    assert np.all(np.diff(effects) < 0) and RULES.margin < effects[-1] < 1.02 * RULES.margin
    large = smallest_detectable_effect(5.0, 5, replace(RULES, margin=5.0))
    assert large == pytest.approx(100 * smallest_detectable_effect(0.05, 5, RULES))
    assert smallest_detectable_effect(0.0, 5, RULES) == RULES.margin


def test_where_nothing_can_be_above_the_smallest_detectable_effect_is_infinite():
    assert smallest_detectable_effect(0.05, 4, replace(RULES, minimum_members=5)) == np.inf
    assert smallest_detectable_effect(0.05, 5, RULES, test=SIGN_FLIP) == np.inf
    assert np.isnan(smallest_detectable_effect(np.nan, 5, RULES))
