import numpy as np
import pytest

from mechsub.statistics.diagonal import diagonal_excess, permute_taught


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
