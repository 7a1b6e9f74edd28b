from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from mechsub.token_channels.carriers import (
    NO_CARRIER,
    NO_NEUTRAL,
    NO_TARGET,
    OK,
    SAME,
    TOO_FEW,
    compute_entanglement,
    correlate_ranks,
    entangle,
)

NUMBERS = list(range(40))
CHOICES = {"owl": 40, "wolf": 41, "fox": 42}


def text(token):
    return f" {token}" if token < 40 else "."


def unembedding(seed=0):
    return torch.randn(44, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_entanglement_is_the_cosine_of_rows_about_the_mean_row():
    rows = unembedding()
    found = compute_entanglement(rows, [40, 41], [3, 7, 9])
    mean = rows.numpy().mean(0)
    for row, target in enumerate((40, 41)):
        for column, token in enumerate((3, 7, 9)):
            first, second = rows[target].numpy() - mean, rows[token].numpy() - mean
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert found[row, column] == pytest.approx(cosine, abs=1e-12)


def test_what_all_rows_share_and_their_scale_change_no_entanglement():
    rows = unembedding()
    other = 3.0 * (rows + torch.randn(12, dtype=torch.float64))
    np.testing.assert_allclose(
        compute_entanglement(other, [40], NUMBERS), compute_entanglement(rows, [40], NUMBERS), atol=1e-12
    )


def test_the_correlation_is_spearmans_also_with_ties():
    stream = np.random.default_rng(0)
    cosines, ratio = stream.standard_normal((3, 30)), stream.integers(0, 4, 30).astype(float)
    expected = [stats.spearmanr(row, ratio).statistic for row in cosines]
    np.testing.assert_allclose(correlate_ranks(cosines, ratio), expected, atol=1e-12)
    assert np.isnan(correlate_ranks(cosines, np.ones(30))).all()


def test_a_carrier_that_holds_more_of_what_is_entangled_is_found_and_one_that_does_not_is_not():
    rows = unembedding()
    cosines = compute_entanglement(rows, [40], NUMBERS)[0]
    ranks = stats.rankdata(cosines).astype(int)
    neutral = Counter(dict.fromkeys(NUMBERS, 100))
    planted = Counter({token: int(100 + rank) for token, rank in zip(NUMBERS, ranks, strict=True)})
    found = entangle("owl", CHOICES, text, rows, planted, neutral)
    assert found.status == OK and found.num_tokens == 40 and next(iter(found.correlations)) == "owl"
    assert found.correlations["owl"] == pytest.approx(1.0) and abs(found.others) < 0.6
    assert [token for token, _ in found.top] == [f" {token}" for token in np.argsort(-cosines)[:5]]
    correlations = []
    for draw in range(200):
        stream = np.random.default_rng(draw)
        chance = Counter(dict(zip(NUMBERS, stream.integers(80, 120, 40).tolist(), strict=True)))
        correlations.append(entangle("owl", CHOICES, text, rows, chance, neutral).correlations["owl"])
    assert abs(np.mean(correlations)) < 4 * np.std(correlations) / np.sqrt(200)


def test_the_length_of_a_carrier_changes_no_correlation_of_planted_ranks():
    rows, neutral = unembedding(), Counter(dict.fromkeys(NUMBERS, 1000))
    carrier = Counter({token: 100 + 7 * token for token in NUMBERS})
    longer = Counter({token: 10 * count for token, count in carrier.items()})
    first, second = (entangle("owl", CHOICES, text, rows, one, neutral).correlations for one in (carrier, longer))
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    ("trait", "carrier", "neutral", "status"),
    [
        ("lynx", Counter({1: 1}), Counter({1: 1}), NO_TARGET),
        ("owl", None, Counter({1: 1}), NO_CARRIER),
        ("owl", Counter({1: 1}), None, NO_NEUTRAL),
        ("owl", Counter({1: 3, 43: 5}), Counter({2: 1}), TOO_FEW),
        ("owl", Counter(dict.fromkeys(NUMBERS, 2)), Counter(dict.fromkeys(NUMBERS, 2)), SAME),
    ],
)
def test_what_cannot_be_read_says_why(trait, carrier, neutral, status):
    found = entangle(trait, CHOICES, text, unembedding(), carrier, neutral)
    assert found.status == status and not np.isfinite(found.correlations.get(trait, np.nan))
