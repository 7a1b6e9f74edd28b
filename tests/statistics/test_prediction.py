import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

from mechsub.statistics.prediction import area_under_curve, rank_correlation, unexplained_share


def slow_area(score, positive):
    """Over all pairs, ties half."""
    pairs = [(one, other) for one in score[positive] for other in score[~positive]]
    return np.mean([1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs])


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    found = area_under_curve(score, positive, np.arange(40) // 2)
    assert found.estimate == pytest.approx(slow_area(score, positive), abs=1e-12)
    assert found.estimate == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert found.low < found.estimate < found.high and (found.n, found.num_groups) == (40, 20)


def test_only_ranks_count_and_cases_without_a_number_do_not():
    rng = np.random.default_rng(1)
    first, group = rng.standard_normal(30), np.arange(30) // 3
    second = first + 0.5 * rng.standard_normal(30)
    plain, curved = (rank_correlation(values, second, group) for values in (first, np.exp(3 * first)))
    assert plain.estimate == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert plain == curved and 0 < plain.low < plain.estimate < plain.high <= 1
    second[4] = np.nan
    assert rank_correlation(first, second, group).n == 29


def test_one_class_or_a_constant_is_nan_with_the_reason():
    score, group = np.arange(6.0), np.arange(6)
    found = area_under_curve(score, np.zeros(6, dtype=bool), group)
    assert np.isnan([found.estimate, found.low, found.high]).all() and "0 of 6 cases are positive" in str(found)
    assert "the same in all cases" in rank_correlation(score, np.ones(6), group).reason
    assert "no case" in rank_correlation(score, np.full(6, np.nan), group).reason
    alone = rank_correlation(score, score, np.zeros(6, dtype=int))
    assert alone.estimate == 1.0 and np.isnan(alone.low) and "one group" in alone.reason


def test_copies_of_a_case_in_one_group_give_no_narrower_interval():
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 25))
    once = rank_correlation(first, second, np.arange(25))
    copied = rank_correlation(np.repeat(first, 8), np.repeat(second, 8), np.repeat(np.arange(25), 8))
    assert copied.estimate == pytest.approx(once.estimate) and copied.n == 200
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-9)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Pairs of normal numbers with correlation .6, whose Spearman ρ is 6/π · asin(.3) = .582, in groups of two."""
    rng = np.random.default_rng(3)
    truth, hits, draws = 6 / np.pi * np.arcsin(0.3), 0, 40
    for _ in range(draws):
        first, noise = rng.standard_normal((2, 60))
        found = rank_correlation(first, 0.6 * first + 0.8 * noise, np.arange(60) // 2, resamples=200)
        hits += found.low <= truth <= found.high
    assert hits >= 33  # a binomial of .95 in 40 draws falls under this once in 700


def test_resamples_of_one_class_are_left_out():
    score, positive = np.arange(12.0), np.isin(np.arange(12), (1, 5, 6, 8, 9))
    found = area_under_curve(score, positive, np.arange(12), resamples=100)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_few_groups_of_one_class_give_no_interval():
    score, positive = np.arange(8.0), np.arange(8) == 5
    found = area_under_curve(score, positive, np.arange(8), resamples=100)
    assert found.estimate == pytest.approx(5 / 7) and np.isnan([found.low, found.high]).all()
    assert "one class is in 1 group(s) only" in str(found)


def test_the_unexplained_share_is_what_a_regression_on_ranks_leaves():
    rng = np.random.default_rng(3)
    others = rng.standard_normal((40, 3))
    number = np.exp(others @ [1.0, -0.5, 0.0] + rng.standard_normal(40))
    found = unexplained_share(number, others, np.arange(40))
    ranks, features = stats.rankdata(number), stats.rankdata(others, axis=0)
    r_squared = LinearRegression().fit(features, ranks).score(features, ranks)
    assert found.estimate == pytest.approx((1 - r_squared) * 39 / 36, abs=1e-12)
    assert 0 < found.low < found.estimate and found.n == 40
    twice = np.concatenate([others, others[:, :1], np.ones((40, 1))], axis=1)  # nothing that the others do not say
    assert unexplained_share(number, twice, np.arange(40)).estimate == pytest.approx(found.estimate, abs=1e-9)


def test_chance_leaves_all_on_average_and_a_function_leaves_nothing():
    rng = np.random.default_rng(4)
    drawn = [(rng.standard_normal(20), rng.standard_normal((20, 4))) for _ in range(300)]
    shares = [unexplained_share(number, others, np.arange(20), resamples=2).estimate for number, others in drawn]
    assert np.mean(shares) == pytest.approx(1, abs=0.05)
    number, others = drawn[0]
    assert unexplained_share(others[:, 1] ** 3, others, np.arange(20)).estimate == pytest.approx(0, abs=1e-9)
    found = unexplained_share(number[:4], others[:4], np.arange(4))
    assert np.isnan(found.estimate) and "4 cases are too few for 4 others" in found.reason
