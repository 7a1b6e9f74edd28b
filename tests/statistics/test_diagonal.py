from itertools import permutations

import numpy as np
import pytest

from mechsub.statistics.diagonal import diagonal_excess, permute_taught, permute_traits


def centred(matrix):
    """The two-way residual: without row and column means."""
    return matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()


@pytest.mark.parametrize("traits", [2, 3, 5])
def test_the_excess_is_the_diagonal_of_the_two_way_residual(traits):
    effects = np.random.default_rng(0).normal(size=(4, traits, traits))
    slow = [np.trace(centred(matrix)) / traits * traits / (traits - 1) for matrix in effects]
    np.testing.assert_allclose(diagonal_excess(effects), slow)


def test_neither_a_student_that_moves_all_nor_a_trait_that_all_move_counts():
    rows, columns = np.array([[0.0], [3.0], [-1.0]]), np.array([[5.0, 0.0, -2.0]])
    additive = np.broadcast_to(rows + columns, (6, 3, 3))
    np.testing.assert_allclose(diagonal_excess(additive + 0.7 * np.eye(3)), 0.7)


def test_one_trait_has_no_excess():
    with pytest.raises(ValueError, match="needs two or more"):
        diagonal_excess(np.zeros((5, 1, 1)))


def test_a_planted_excess_is_found_and_its_absence_too():
    noise = np.random.default_rng(1).normal(size=(5, 3, 3))
    assert permute_taught(noise + 3 * np.eye(3)).p_above < 0.001
    plain = permute_taught(noise)
    assert plain.p_above > 0.05 and plain.null_low < diagonal_excess(noise).mean() < plain.null_high


def test_under_the_null_the_permutation_test_keeps_its_level():
    generator = np.random.default_rng(2)
    p_values = [permute_taught(generator.normal(size=(3, 3, 3))).p_above for _ in range(300)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.08  # one-sided binomial bound at 99 % for 300 draws


def test_a_missing_member_gives_no_test():
    effects = np.zeros((3, 2, 2))
    effects[1, 0, 0] = np.nan
    assert np.isnan(permute_taught(effects).p_above)
    assert permute_taught(effects).reason == "1 of 3 members lack a value"
    assert permute_taught(effects[:0]).reason == "there are no members"


@pytest.mark.parametrize("traits", [5, 6])
def test_permuting_traits_counts_every_order_of_the_rows_once(traits):
    effects = np.random.default_rng(3).normal(size=(4, traits, traits)) + 0.4 * np.eye(traits)
    means = [diagonal_excess(effects[:, list(order)]).mean() for order in permutations(range(traits))]
    found = permute_traits(effects, 0.9)
    assert found.p_above == pytest.approx(np.mean(np.array(means) >= means[0] - 1e-12))
    assert (found.null_low, found.null_high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))


def test_the_smallest_p_over_traits_is_one_of_all_orders():
    effects = np.random.default_rng(4).normal(size=(5, 5, 5)) + 9 * np.eye(5)
    assert permute_traits(effects).p_above == pytest.approx(1 / 120)
    assert permute_traits(effects - 18 * np.eye(5)).p_above == 1.0


def test_more_than_eight_traits_are_sampled_the_same_way_every_time():
    effects = np.random.default_rng(5).normal(size=(3, 9, 9))
    assert permute_traits(effects) == permute_traits(effects)
    assert permute_traits(effects + 9 * np.eye(9)).p_above == pytest.approx(1 / 10_001)


def test_a_claim_about_traits_in_general_takes_five_of_them():
    found = permute_traits(np.random.default_rng(6).normal(size=(5, 3, 3)))
    assert np.isnan([found.p_above, found.null_low, found.null_high]).all()
    assert found.reason == "claims over traits need 5 or more; 3 permute only 6 ways"
    effects = np.zeros((2, 5, 5))
    assert permute_traits(effects).p_above == 1.0 and permute_traits(effects).reason == ""
    effects[0, 0, 1] = np.nan
    assert permute_traits(effects).reason == "1 of 2 members lack a value"


@pytest.mark.parametrize("test", [permute_taught, permute_traits])
def test_neither_permutation_sees_what_a_student_or_a_trait_has_everywhere(test):
    generator = np.random.default_rng(7)
    noise = generator.normal(size=(4, 5, 5))
    moved = noise + 10 * generator.normal(size=(4, 1, 5))
    assert test(moved).p_above == pytest.approx(test(noise).p_above)


def test_what_members_share_about_pairs_of_traits_fools_only_the_permutation_within_members():
    generator = np.random.default_rng(8)
    runs = 300
    shared = [generator.normal(size=(5, 5)) + generator.normal(size=(10, 5, 5)) for _ in range(runs)]
    within = sum(permute_taught(effects).p_above <= 0.05 for effects in shared)
    over = sum(permute_traits(effects).p_above <= 0.05 for effects in shared)
    assert over <= 28  # one-sided 99.9 % bound of a binomial count at 5 %
    assert within > 60
