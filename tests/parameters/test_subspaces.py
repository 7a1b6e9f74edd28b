import numpy as np
import pytest
import torch
from scipy import stats

from mechsub.checkpoints import Factors
from mechsub.parameters.subspaces import (
    BELOW,
    NOT_FINITE,
    OK,
    SPANS,
    ZERO,
    compute_overlaps,
    decompose_dense,
    decompose_low_rank,
    effective_rank,
    haar_mean,
    principal_angles,
    sample_haar_overlaps,
    stable_rank,
    top_shares,
)
from mechsub.statistics.verdicts import AGAINST_NULL, Rules, judge_effects

TOP, RANKS = 4, (1, 2, 4)


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def orthonormal(length, width, seed):
    return torch.linalg.qr(gaussian(length, width, seed=seed)).Q


def streams(num, seed=0):
    return [np.random.default_rng([seed, index]) for index in range(num)]


def plant(left, values, right):
    return (left * torch.tensor(values).double()) @ right.mT


def planted_pair(rows, columns, values, cosine):
    """Two matrices of known singular values, each singular vector of one at a known angle to that of the other."""
    bases = [orthonormal(length, 2 * len(values), seed) for seed, length in enumerate((rows, columns))]
    first = [base[:, : len(values)] for base in bases]
    second = [cosine * base[:, : len(values)] + np.sqrt(1 - cosine**2) * base[:, len(values) :] for base in bases]
    return plant(first[0], values, first[1]), plant(second[0], values, second[1])


@pytest.mark.parametrize("shape", [(7, 5), (5, 9), (6, 6)])
def test_every_quantity_is_that_of_a_plain_svd(shape):
    pair = [gaussian(3, *shape, seed=seed) for seed in (1, 2)]
    found = [decompose_dense(matrices, TOP) for matrices in pair]
    overlaps, codes = compute_overlaps(*found, RANKS)
    for member in range(3):
        bases = []
        for matrices, spectrum in zip(pair, found, strict=True):
            left, values, right = np.linalg.svd(matrices[member].numpy(), full_matrices=False)
            bases.append((left, right.T))
            np.testing.assert_allclose(spectrum.values[member], values, rtol=1e-12)
            shares = values**2 / (values**2).sum()
            assert effective_rank(spectrum)[member] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-12)
            assert stable_rank(spectrum)[member] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-12)
            np.testing.assert_allclose(top_shares(spectrum, 5)[member], np.cumsum(shares)[:5], rtol=1e-12)
            assert float(spectrum.tail[member]) == pytest.approx(np.sqrt(shares[TOP:].sum()), rel=1e-9)
            assert float(spectrum.backward_error[member]) < 1e-14
        for side, k in ((side, k) for side in range(2) for k in RANKS):
            cosines = np.linalg.svd(bases[0][side][:, :k].T @ bases[1][side][:, :k], compute_uv=False)
            assert overlaps[member, side, RANKS.index(k)] == pytest.approx((cosines**2).mean(), abs=1e-12)
            np.testing.assert_allclose(np.cos(principal_angles(*found, k)[member, side]), cosines, atol=1e-12)
    assert (codes == OK).all()


def test_factors_give_what_their_product_gives():
    factors = [Factors(gaussian(12, 3, seed=seed), gaussian(3, 9, seed=seed + 10)) for seed in range(2)]
    thin = [decompose_low_rank(one, TOP) for one in factors]
    dense = [decompose_dense((one.rows @ one.columns)[None], TOP) for one in factors]
    for one, other in zip(thin, dense, strict=True):
        assert one.rank == other.rank == 3
        np.testing.assert_allclose(one.values[0, :3], other.values[0, :3], rtol=1e-10)
        assert float(one.square) == pytest.approx(float(other.square), rel=1e-12)
        assert effective_rank(one)[0] == pytest.approx(effective_rank(other)[0], rel=1e-10)
        np.testing.assert_allclose(top_shares(one, 6), top_shares(other, 6), rtol=1e-10)
        assert float(one.backward_error) < 1e-14
    (left, left_codes), (right, right_codes) = compute_overlaps(*thin, RANKS), compute_overlaps(*dense, RANKS)
    np.testing.assert_allclose(left, right, atol=1e-10)
    assert (left_codes == right_codes).all() and (left_codes[..., -1] == BELOW).all()


def test_overlaps_do_not_depend_on_scale_sign_or_how_a_product_is_split():
    factors, other = Factors(gaussian(12, 3), gaussian(3, 9, seed=1)), decompose_dense(gaussian(1, 12, 9, seed=2), TOP)
    mix = gaussian(3, 3, seed=3)
    split = Factors(-5.0 * factors.rows @ mix, torch.linalg.inv(mix) @ factors.columns)
    plain, changed = (compute_overlaps(decompose_low_rank(one, TOP), other, (1, 2))[0] for one in (factors, split))
    np.testing.assert_allclose(plain, changed, atol=1e-10)


def test_a_turn_of_both_spaces_changes_no_overlap_and_no_rank():
    first, second = gaussian(1, 8, 6), gaussian(1, 8, 6, seed=1)
    left, right = orthonormal(8, 8, 2), orthonormal(6, 6, 3)
    plain = [decompose_dense(one, TOP) for one in (first, second)]
    turned = [decompose_dense(left @ one @ right, TOP) for one in (first, second)]
    np.testing.assert_allclose(compute_overlaps(*plain, RANKS)[0], compute_overlaps(*turned, RANKS)[0], atol=1e-10)
    assert effective_rank(plain[0]) == pytest.approx(effective_rank(turned[0]), rel=1e-10)


@pytest.mark.parametrize("exact_up_to", [1024, 8], ids=["exact", "sketched"])
@pytest.mark.parametrize("cosine", [1.0, 0.8, 0.3, 0.0])
def test_a_planted_rank_and_a_planted_overlap_are_recovered_within_the_stated_error(exact_up_to, cosine):
    values = (8.0, 6.0, 5.0, 4.0)
    noise = 1e-3
    pair = planted_pair(60, 40, values, cosine)
    noisy = [one[None] + noise * gaussian(1, 60, 40, seed=seed + 5) for seed, one in enumerate(pair)]
    found = [decompose_dense(one, TOP, exact_up_to=exact_up_to, streams=streams(1, seed)) for seed, one in enumerate(noisy)]
    for spectrum in found:
        np.testing.assert_allclose(spectrum.values[0, :4], values, atol=0.02)  # Weyl: within the norm of the noise
        share = noise * np.sqrt(60 * 40 / np.square(values).sum())
        assert float(spectrum.tail) == pytest.approx(share, rel=0.1)
        assert float(spectrum.backward_error) < 1e-6
    overlaps, _ = compute_overlaps(*found, RANKS)
    # Each subspace turns by at most noise · (√m + √n) / gap (Wedin): .014 for the gap of 1 between neighbours.
    np.testing.assert_allclose(overlaps, cosine**2, atol=4 * 0.014)
    np.testing.assert_allclose(overlaps[..., -1], cosine**2, atol=4 * 0.014 / 4)
    np.testing.assert_allclose(np.cos(principal_angles(*found, 4)), cosine, atol=0.015)


def test_the_exact_rank_of_a_planted_matrix_is_found_and_effective_rank_counts_equal_directions():
    for rank in (1, 2, 5):
        matrix = plant(orthonormal(20, rank, 1), [3.0] * rank, orthonormal(14, rank, 2))[None]
        spectrum = decompose_dense(matrix.float(), TOP)  # float32: its rounding is of full rank
        assert int(spectrum.rank) == rank
        assert effective_rank(spectrum)[0] == pytest.approx(rank, rel=1e-5)
        assert stable_rank(spectrum)[0] == pytest.approx(rank, rel=1e-5)


def test_a_sketch_states_its_error_and_it_is_the_true_one():
    left, right = orthonormal(120, 120, 1), orthonormal(90, 90, 2)
    values = 0.93 ** np.arange(90)  # no gap: hard for a sketch
    matrix = plant(left[:, :90], list(values), right)
    spectrum = decompose_dense(matrix[None], TOP, exact_up_to=8, streams=streams(1))
    top, known = spectrum.left[0], spectrum.values[0]
    projected = top @ (top.mT @ matrix)
    assert float(spectrum.tail) == pytest.approx(float((matrix - projected).norm() / matrix.norm()), rel=1e-9)
    assert (known <= torch.tensor(values[:TOP]) + 1e-12).all()  # a sketch never overstates
    changed = matrix - (matrix @ spectrum.right[0] - top * known) @ spectrum.right[0].mT
    assert float((changed - matrix).norm() / matrix.norm()) == pytest.approx(
        float(spectrum.backward_error), rel=1e-6, abs=1e-14
    )
    np.testing.assert_allclose(changed @ spectrum.right[0], top * known, atol=1e-10)  # exactly singular pairs of that matrix
    np.testing.assert_allclose(changed.mT @ top, spectrum.right[0] * known, atol=1e-10)
    assert not spectrum.is_whole and np.isnan(effective_rank(spectrum)[0])
    assert np.isnan(top_shares(spectrum, 6)[0]).tolist() == [False] * 4 + [True] * 2
    assert stable_rank(spectrum)[0] == pytest.approx((values**2).sum(), rel=1e-4)


def test_sketched_noise_overlaps_no_more_than_chance_because_no_sketch_is_shared():
    num, rows, columns = 150, 40, 60
    pair = [gaussian(num, rows, columns, seed=seed) for seed in (1, 2)]
    found = [decompose_dense(one, TOP, exact_up_to=8, streams=streams(num, seed)) for seed, one in enumerate(pair)]
    overlaps = compute_overlaps(*found, (TOP,))[0][..., 0]
    for side, length in enumerate((rows, columns)):
        assert stats.ttest_1samp(overlaps[:, side], haar_mean(TOP, length)).pvalue > 0.001
    with pytest.raises(ValueError, match="need a random stream each"):
        decompose_dense(pair[0], TOP, exact_up_to=8, streams=streams(1))


def test_no_overlap_is_given_where_a_direction_would_be_noise():
    two, other = plant(orthonormal(9, 2, 1), [2.0, 1.0], orthonormal(7, 2, 2)), gaussian(9, 7, seed=3)
    matrices = torch.stack([two, torch.zeros(9, 7), other, other * torch.nan])
    first, second = decompose_dense(matrices, TOP), decompose_dense(other.expand(4, -1, -1), TOP)
    values, codes = compute_overlaps(first, second, RANKS)
    assert (codes[0] == [OK, OK, BELOW]).all()
    assert (codes[1] == ZERO).all() and (codes[2] == OK).all() and (codes[3] == NOT_FINITE).all()
    assert (np.isnan(values) == (codes != OK)).all()
    np.testing.assert_allclose(values[2], 1.0)
    assert np.isnan(principal_angles(first, second, 4)[[0, 1, 3]]).all()
    for measure in (effective_rank(first), stable_rank(first)):
        assert np.isnan(measure).tolist() == [False, True, False, True]


def test_a_side_that_the_subspace_fills_has_no_overlap():
    first, second = (decompose_dense(gaussian(1, 4, 9, seed=seed), TOP) for seed in range(2))
    values, codes = compute_overlaps(first, second, RANKS)
    assert codes[0].tolist() == [[OK, OK, SPANS], [OK, OK, OK]]
    assert np.isnan(values[0, 0, 2]) and values[0, 1, 2] < 1


def test_what_rounding_could_have_made_is_no_direction():
    matrix = plant(orthonormal(9, 3, 1), [2.0, 1.0, 0.01], orthonormal(7, 3, 2))[None]
    assert int(decompose_dense(matrix, TOP).rank) == 3
    assert int(decompose_dense(matrix, TOP, noise=torch.tensor([0.05])).rank) == 2


@pytest.mark.parametrize(("k", "dimension"), [(1, 2), (2, 3), (2, 7), (4, 6), (4, 96), (8, 784)])
def test_sampled_haar_overlaps_are_those_of_random_subspaces_and_have_the_analytic_mean(k, dimension):
    num = 2000
    sampled = sample_haar_overlaps(k, dimension, num, np.random.default_rng(0))
    bases = torch.linalg.qr(gaussian(300, dimension, k, seed=1)).Q
    slow = (bases[:, :k].square().sum((1, 2)) / k).numpy()
    assert stats.ks_2samp(sampled, slow).pvalue > 0.001
    assert stats.ttest_1samp(sampled, haar_mean(k, dimension)).pvalue > 0.001
    assert sampled.min() >= 0 and sampled.max() <= 1


EXPERIMENTS, SHAPE = 1000, (16, 12)


def simulate(members, seed):
    """The verdict's effect, overlap of student and teacher minus that of control and teacher, on noise [experiment, member]."""
    student, control, teacher = (
        decompose_dense(gaussian(EXPERIMENTS * members, *SHAPE, seed=[seed, who]), TOP) for who in range(3)
    )
    own, others = (compute_overlaps(one, teacher, (TOP,))[0].mean((1, 2)) for one in (student, control))
    return (own - others).reshape(EXPERIMENTS, members)


def share(effects, margin, verdict):
    rules = Rules(margin=margin, minimum_members=5, confidence=0.95, equivalence_level=0.05)
    return np.mean([judge_effects({"": one}, rules, AGAINST_NULL)[""].verdict == verdict for one in effects])


def test_on_pure_noise_above_null_is_claimed_at_most_at_the_stated_rate():
    false = round(EXPERIMENTS * share(simulate(5, 0), 1e-9, "above-null"))  # the margin must not help
    assert stats.binomtest(false, EXPERIMENTS, 0.025, alternative="greater").pvalue > 0.001


def test_on_pure_noise_the_power_of_equivalence_grows_with_the_members():
    """At the margin of .05, for one 16 × 12 matrix: .10 with 5 members, .36 with 10, .83 with 20; more matrices vary less."""
    power = {members: share(simulate(members, members)[:250], 0.05, "equivalent-to-null") for members in (5, 10, 20)}
    assert power[5] < power[10] < power[20]
    for members, known in ((5, 0.10), (10, 0.36), (20, 0.83)):
        assert stats.binomtest(round(250 * power[members]), 250, known).pvalue > 0.001
