import numpy as np
import pytest
import torch
from scipy import special
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from mechsub.activations.probes import (
    RIDGE,
    Cloud,
    fit_probe,
    left_halves,
    mean_of,
    right_halves,
    separation,
    share_of_the_way,
    try_separation,
)
from mechsub.activations.similarity import HalvedMoments, PairedRows

WIDTH = 6


def draw(seed, rows=400, shift=None):
    found = np.random.default_rng(seed).standard_normal((rows, WIDTH)) @ np.diag([3.0, 2.0, 1.0, 1.0, 0.5, 0.2])
    return torch.from_numpy(found) + (0 if shift is None else shift)


def cloud_of(rows):
    return Cloud(rows.mean(0), torch.cov(rows.T, correction=0), len(rows))


def halves_of(rows):
    return cloud_of(rows[::2]), cloud_of(rows[1::2])


def test_a_probe_without_its_ridge_is_the_linear_discriminant(monkeypatch):
    monkeypatch.setattr("mechsub.activations.probes.RIDGE", 1e-14)
    one, other = draw(0, shift=0.5 * torch.ones(WIDTH, dtype=torch.float64)), draw(1)
    rows = torch.cat([one, other]).numpy()
    fitted = LinearDiscriminantAnalysis(solver="lsqr").fit(rows, [1] * 400 + [0] * 400)
    found = fit_probe(cloud_of(one), cloud_of(other)).numpy()
    expected = fitted.coef_[0]
    np.testing.assert_allclose(found / np.linalg.norm(found), expected / np.linalg.norm(expected), rtol=1e-8)


def test_the_ridge_is_a_share_of_the_mean_variance():
    one, other = cloud_of(draw(0, shift=torch.ones(WIDTH, dtype=torch.float64))), cloud_of(draw(1))
    covariance = ((one.covariance + other.covariance) / 2).numpy()
    ridge = RIDGE * np.trace(covariance) / WIDTH
    expected = np.linalg.solve(covariance + ridge * np.eye(WIDTH), (one.mean - other.mean).numpy())
    np.testing.assert_allclose(fit_probe(one, other).numpy(), expected, rtol=1e-10)


def test_separation_tells_how_well_rows_are_told_apart():
    one, other = draw(0, 20_000, 0.4 * torch.ones(WIDTH, dtype=torch.float64)), draw(1, 20_000)
    probe = fit_probe(cloud_of(one), cloud_of(other))
    scores = torch.cat([one @ probe, other @ probe]).numpy()
    seen = roc_auc_score([1] * 20_000 + [0] * 20_000, scores)
    found = separation(probe, cloud_of(one), cloud_of(other))
    assert special.ndtr(found / np.sqrt(2)) == pytest.approx(seen, abs=0.005)
    assert separation(probe, cloud_of(other), cloud_of(one)) == pytest.approx(-found)


def test_nothing_to_tell_apart_gives_no_separation_on_average():
    """On the half that a probe was fitted on it would be over 0."""
    held_out, own = [], []
    for seed in range(200):
        one, other = halves_of(draw(2 * seed, 24)), halves_of(draw(2 * seed + 1, 24))
        probes = [fit_probe(*pair) for pair in zip(one, other, strict=True)]
        held_out.append(try_separation(probes, one, other))
        own.append(np.mean([separation(*parts) for parts in zip(probes, one, other, strict=True)]))
    assert abs(np.mean(held_out)) < 3 * np.std(held_out) / np.sqrt(len(held_out))
    assert np.mean(own) > 0.5


def test_a_planted_share_of_the_way_is_found_and_a_way_across_is_none():
    along = torch.tensor([1.0, 0, 0, 0, 2.0, 0], dtype=torch.float64)
    start, end = draw(0), draw(0, shift=along)
    probes = [fit_probe(*pair) for pair in zip(halves_of(end), halves_of(start), strict=True)]
    for share in (0.0, 0.3, -0.5, 1.0):
        found = share_of_the_way(probes, halves_of(start + share * along), halves_of(start), halves_of(end), halves_of(start))
        assert found == pytest.approx(share, abs=1e-9)
    across = torch.linalg.svd(torch.stack(probes)).Vh[-1] * 5
    found = share_of_the_way(probes, halves_of(start + across), halves_of(start), halves_of(end), halves_of(start))
    assert found == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(share_of_the_way(probes, halves_of(end), halves_of(start), halves_of(start), halves_of(start)))


def test_a_rotation_of_both_changes_nothing():
    one, other = halves_of(draw(0, shift=torch.ones(WIDTH, dtype=torch.float64))), halves_of(draw(1))
    rotation = torch.linalg.qr(draw(2, WIDTH)).Q
    turned = [tuple(cloud.rotate(rotation) for cloud in halves) for halves in (one, other)]
    found, expected = (
        try_separation([fit_probe(*pair) for pair in zip(*sides, strict=True)], *sides) for sides in (turned, (one, other))
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_activations_without_spread_have_no_separation():
    one, other = (cloud_of(torch.full((8, WIDTH), value, dtype=torch.float64)) for value in (0.1, 0.3))
    assert np.isnan(separation(fit_probe(one, other), one, other))


def test_a_model_that_has_not_moved_is_not_told_from_itself():
    one = halves_of(draw(0, 40))
    assert try_separation([fit_probe(cloud, cloud) for cloud in one], one, one) == 0.0


def test_clouds_are_those_of_each_half_of_the_prompts():
    left, right = draw(0, 41), draw(1, 41)
    rows = PairedRows("point", "policy", left, right, torch.arange(41))
    moments = HalvedMoments.about(rows)
    moments.add(rows)
    for found, side in ((left_halves(moments), left), (right_halves(moments), right)):
        for cloud, expected in zip(found, halves_of(side), strict=True):
            torch.testing.assert_close(cloud.mean, expected.mean)
            torch.testing.assert_close(cloud.covariance, expected.covariance)
        torch.testing.assert_close(mean_of(found), side.mean(0))
