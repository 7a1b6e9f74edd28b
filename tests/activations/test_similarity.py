import numpy as np
import pytest
import torch
from torch import nn

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.hooks import HookBackend
from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.activations.similarity import (
    HalvedMoments,
    ModelSide,
    PairedMoments,
    PairedRows,
    debiased_cka,
    fit_procrustes,
    pair_rows,
    paired_policies,
    procrustes_correlation,
    procrustes_distance,
    try_procrustes,
)
from mechsub.errors import ActivationError


def draw(seed, rows, width):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, width)))


def related(seed, rows, widths=(5, 7), noise=1.0):
    left = draw(seed, rows, widths[0])
    return left, left @ draw(seed + 1, *widths) + noise * draw(seed + 2, rows, widths[1])


def moments_of(left, right, at_once=None):
    moments = PairedMoments.about(left[:3], right[:3])
    for start in range(0, len(left), at_once or len(left)):
        rows = slice(start, start + (at_once or len(left)))
        moments.add(left[rows], right[rows])
    return moments


def cka(left, right, at_once=None):
    return debiased_cka(moments_of(left, right, at_once))


def slow_hsic(left, right):
    """Song et al. 2012, eq. 5, with matrices of size rows × rows."""
    n, ones = len(left), np.ones(len(left))
    kernels = [rows @ rows.T for rows in (left.numpy(), right.numpy())]
    for kernel in kernels:
        np.fill_diagonal(kernel, 0.0)
    one, other = kernels
    total = (ones @ one @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return (np.trace(one @ other) + total - 2 * (ones @ one @ other @ ones) / (n - 2)) / (n * (n - 3))


def random_rotation(seed, width):
    return torch.linalg.qr(draw(seed, width, width)).Q


@pytest.mark.parametrize("rows", [4, 5, 40])
def test_sums_in_feature_space_give_what_matrices_of_rows_by_rows_give(rows):
    left, right = related(0, rows)
    moments = moments_of(left, right, at_once=3)
    for one, other, sides in ((left, right, (0, 1)), (left, left, (0, 0)), (right, left, (1, 0))):
        assert moments.hsic(*sides) == pytest.approx(slow_hsic(one, other), rel=1e-9, abs=1e-11)
    expected = slow_hsic(left, right) / np.sqrt(slow_hsic(left, left) * slow_hsic(right, right))
    assert debiased_cka(moments) == pytest.approx(expected, rel=1e-9)


def test_in_one_dimension_it_nears_the_squared_correlation():
    left, right = related(0, 4000, (1, 1), noise=0.8)
    assert cka(left, right) == pytest.approx(np.corrcoef(left[:, 0], right[:, 0])[0, 1] ** 2, abs=1e-3)


def test_rotation_scale_shift_and_batches_change_nothing():
    left, right = related(0, 60)
    changed = 3.5 * right @ random_rotation(9, 7) + 100 * draw(10, 1, 7)
    assert cka(left, changed, at_once=7) == pytest.approx(cka(left, right), rel=1e-9)


def test_a_far_mean_costs_no_digits():
    left, right = related(0, 60)
    assert cka(left + 1e6, right - 1e6) == pytest.approx(cka(left, right), rel=1e-7)


def test_the_same_rows_have_one_and_independent_ones_nothing_on_average():
    left = draw(0, 12, 30)
    assert cka(left, left @ random_rotation(1, 30)) == pytest.approx(1.0, abs=1e-12)
    found = [cka(draw(2 * seed, 12, 30), draw(2 * seed + 1, 12, 30)) for seed in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_too_few_rows_and_rows_without_spread_have_no_cka():
    left, right = related(0, 3)
    assert np.isnan(cka(left, right))
    left, right = related(0, 8)
    assert np.isnan(cka(left, torch.full_like(right, 0.1)))
    one_apart = torch.zeros(8, 5, dtype=torch.float64)
    one_apart[2] = 1.0
    assert np.isnan(cka(one_apart, right))


def test_sums_of_two_sets_of_rows_are_those_of_all():
    left, right = related(0, 30)
    first = PairedMoments.about(left, right)
    second = first.empty_copy()
    first.add(left[:11], right[:11])
    second.add(left[11:], right[11:])
    whole = first + second
    assert whole.num_rows == 30
    assert debiased_cka(whole) == pytest.approx(cka(left, right), rel=1e-10)
    for found, rows in zip(whole.means, (left, right), strict=True):
        torch.testing.assert_close(found, rows.mean(0))
    for found, rows in zip(whole.covariances, (left, right), strict=True):
        torch.testing.assert_close(found, torch.cov(rows.T, correction=0))
    with pytest.raises(ActivationError, match="about other shifts"):
        first + PairedMoments.about(left + 1, right)


@pytest.mark.parametrize("widths", [(5, 5), (5, 7), (7, 5)])
def test_a_planted_rotation_is_found_on_other_rows(widths):
    narrow, wide = sorted(widths)
    planted = random_rotation(3, wide)[:narrow]
    planted = planted if widths == (narrow, wide) else planted.T
    base = draw(0, 60, narrow)
    left = base if widths[0] == narrow else base @ planted.T  # of the wider one, only what the rotation keeps
    right = left @ planted + 4.0
    rotation = fit_procrustes(moments_of(left[:30], right[:30]))
    torch.testing.assert_close(rotation, planted)
    test = moments_of(left[30:], right[30:])
    assert procrustes_distance(test, rotation) == pytest.approx(0.0, abs=1e-12)


def test_the_distance_is_that_of_the_rows_themselves():
    left, right = related(0, 60, (6, 6))
    rotation = fit_procrustes(moments_of(left[:30], right[:30]))
    x, y = (rows[30:] - rows[30:].mean(0) for rows in (left, right))
    expected = float((x @ rotation - y).square().sum() / y.square().sum())
    assert procrustes_distance(moments_of(left[30:], right[30:]), rotation) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64))


def test_no_other_rotation_comes_nearer_to_the_rows_that_it_was_fitted_on():
    left, right = related(0, 60, (4, 4))
    moments = moments_of(left, right)
    best = procrustes_distance(moments, fit_procrustes(moments))
    assert all(best < procrustes_distance(moments, random_rotation(seed, 4)) for seed in range(50))


def test_unrelated_rows_are_as_far_as_both_together():
    left, right = 2.0 * draw(0, 4000, 5), draw(1, 4000, 5)
    rotation = fit_procrustes(moments_of(left[:2000], right[:2000]))
    assert procrustes_distance(moments_of(left[2000:], right[2000:]), rotation) == pytest.approx(1 + 4.0, rel=0.1)


def test_a_rotation_that_anything_would_fit_is_refused():
    left, right = related(0, 7)
    with pytest.raises(ActivationError, match="7 rows cannot fix a rotation of width 7; fit it on more"):
        fit_procrustes(moments_of(left, right))
    assert np.isnan(procrustes_distance(moments_of(left, torch.zeros_like(right)), torch.zeros(5, 7, dtype=torch.float64)))


def test_rows_that_are_no_pairs_are_refused():
    left, right = related(0, 8)
    moments = PairedMoments.about(left, right)
    with pytest.raises(ActivationError, match=r"rows of \[8, 5\] and \[7, 7\] are no pairs of width 5 and 7"):
        moments.add(left, right[:7])
    with pytest.raises(ActivationError, match="are no pairs"):
        moments.add(right, left)


class Tokens(nn.Module):
    """[row, position] ids to [row, position, width]."""

    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.first = nn.Linear(width, width)

    def forward(self, ids):
        return self.first(self.embed(ids))


def points_of(width, *names):
    return [HookPoint(name, 0, name, name, "output", width) for name in names]


def prompt_set(lengths, seed=0, at_once=2):
    """Prompts padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, len(lengths), at_once):
        some = lengths[start : start + at_once]
        there = torch.arange(max(some))[None] >= max(some) - torch.tensor(some)[:, None]
        last = torch.zeros_like(there)
        last[:, -1] = True
        ids = torch.randint(11, there.shape, generator=generator)
        batches.append(ModelInputs({"ids": ids}, {"last": last, "all": there}))
    return PromptSet("prompts", batches)


def test_two_models_in_lockstep_give_the_rows_of_the_same_positions():
    prompts, models = prompt_set([3, 1, 2]), [Tokens(0, 4), Tokens(1, 6)]
    with HookBackend().open(models[0]) as left, HookBackend().open(models[1]) as right:
        sides = [
            ModelSide(left, prompts, points_of(4, "embed", "first")),
            ModelSide(right, prompts, points_of(6, "first", "elsewhere")),
        ]
        found = list(pair_rows(*sides))
    assert {rows.point for rows in found} == {"first"}
    for model, side in zip(models, ("left", "right"), strict=True):
        outputs = [model(**batch.arguments).detach() for batch in prompts.batches]
        for policy in ("last", "all"):
            whole = [output[batch.positions[policy]] for output, batch in zip(outputs, prompts.batches, strict=True)]
            rows = torch.cat([getattr(one, side) for one in found if one.policy == policy])
            torch.testing.assert_close(rows, torch.cat(whole).double())
    assert torch.cat([one.prompts for one in found if one.policy == "all"]).tolist() == [0, 0, 0, 1, 2, 2]
    assert not models[0].first._forward_hooks


def test_models_with_other_tokens_are_paired_at_the_end_of_their_prompts():
    same, other = prompt_set([3, 1, 2]), prompt_set([3, 2, 2])
    assert paired_policies(same, same) == ["last", "all"]
    assert paired_policies(same, other) == ["last"]
    assert paired_policies(same, prompt_set([3, 1, 2], seed=1)) == ["last"]
    assert paired_policies(same, prompt_set([3, 1])) == []
    with HookBackend().open(Tokens(0, 4)) as view:
        sides = [ModelSide(view, prompts, points_of(4, "first")) for prompts in (same, prompt_set([3, 1]))]
        assert list(pair_rows(*sides)) == []


def test_what_is_fitted_on_even_prompts_is_tried_on_odd_ones():
    left, right = related(0, 60, (6, 6))
    prompts = torch.arange(60) // 2
    rows = PairedRows("point", "policy", left, right, prompts)
    halves = HalvedMoments.about(rows)
    for part in (slice(0, 25), slice(25, 60)):
        halves.add(PairedRows("point", "policy", left[part], right[part], prompts[part]))
    even, odd = (moments_of(left[prompts % 2 == half], right[prompts % 2 == half]) for half in (0, 1))
    assert try_procrustes(halves) == pytest.approx(procrustes_distance(odd, fit_procrustes(even)), rel=1e-9)
    assert debiased_cka(halves.whole) == pytest.approx(cka(left, right), rel=1e-9)
    few = HalvedMoments.about(rows)
    few.add(PairedRows("point", "policy", left[:12], right[:12], prompts[:12]))
    assert np.isnan(try_procrustes(few))


def test_the_correlation_of_mapped_rows_leaves_the_scale_out():
    left, right = related(0, 60, (6, 6))
    x, y = (rows[30:] - rows[30:].mean(0) for rows in (left, right))
    rotation = fit_procrustes(moments_of(left[:30], right[:30]))
    expected = float((x @ rotation * y).sum() / (x.norm() * y.norm()))
    for scale in (1.0, 20.0):
        test = moments_of(scale * left[30:], right[30:])
        assert procrustes_correlation(test, rotation) == pytest.approx(expected, rel=1e-10)
    assert np.isnan(procrustes_correlation(moments_of(left, torch.zeros_like(right)), rotation))
