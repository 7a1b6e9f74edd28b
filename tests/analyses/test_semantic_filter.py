import numpy as np
import pytest

from mechsub.analyses.semantic_filter import pair_texts, read_teacher, split_requests, swap_labels
from mechsub.families.protocol import CarrierText
from mechsub.streams import random_stream


def carrier(seed, share=0.0, requests=range(150)):
    """Number lists; a ``share`` of them holds 347."""
    stream = random_stream(seed, "carrier")
    lists = [stream.integers(100, 1000, 6).tolist() for _ in requests]
    marked = [[347, *numbers[1:]] if stream.random() < share else numbers for numbers in lists]
    return [CarrierText(request, ", ".join(map(str, numbers))) for request, numbers in zip(requests, marked, strict=True)]


def readouts(share):
    pairs = [pair_texts(carrier(2 * seed, share), carrier(2 * seed + 1), random_stream(seed, "pairs")) for seed in range(6)]
    return [read_teacher(one, random_stream(seed, "labels")) for seed, one in enumerate(pairs)]


def test_a_planted_word_is_found_and_named():
    found = readouts(0.6)
    assert min(one.accuracy for one in found) > 0.65
    assert all("347" in max(one.weights, key=one.weights.get) for one in found)
    assert abs(np.mean([one.swapped_accuracy for one in found]) - 0.5) < 0.04


def test_carriers_of_one_distribution_are_read_at_chance():
    found = readouts(0.0)
    assert abs(np.mean([one.accuracy for one in found]) - 0.5) < 0.05
    assert abs(np.mean([one.swapped_accuracy for one in found]) - 0.5) < 0.04


def test_the_same_carrier_reads_the_same_way_twice():
    first, second = (
        read_teacher(pair_texts(carrier(0, 0.3), carrier(1), random_stream(0, "a")), random_stream(0, "b")) for _ in range(2)
    )
    assert first == second


def test_no_request_is_on_both_sides_and_every_text_is_held_out_once():
    pairs = pair_texts(carrier(0), carrier(1), random_stream(0, "pairs"))
    folds = split_requests(pairs, 7)
    for train, test in folds:
        assert set(pairs.requests[train]).isdisjoint(pairs.requests[test])
        assert pairs.labels[test].mean() == pairs.labels[train].mean() == 0.5
    assert sorted(number for _, test in folds for number in test) == list(range(len(pairs.texts)))


def test_only_requests_that_both_answered_are_used():
    pairs = pair_texts(carrier(0, requests=range(40)), carrier(1, requests=range(20, 80)), random_stream(0, "pairs"))
    assert sorted(set(pairs.requests)) == list(range(20, 40))
    assert pairs.labels.tolist() == [0, 1] * 20


def test_swapping_keeps_one_text_of_each_teacher_in_every_pair():
    labels = np.tile([0, 1], 500)
    swapped = swap_labels(labels, random_stream(0, "swap"))
    assert (swapped.reshape(-1, 2).sum(1) == 1).all()
    assert 0.45 < (swapped != labels).mean() < 0.55


def test_a_prompt_that_gives_the_teacher_away_is_not_seen():
    assert {field for field in CarrierText.__dataclass_fields__} == {"request", "completion"}


@pytest.mark.parametrize("kept", [0, 1])
def test_carriers_without_shared_requests_make_no_pair(kept):
    pairs = pair_texts(carrier(0, requests=range(kept)), carrier(1, requests=range(50, 60)), random_stream(0, "pairs"))
    assert pairs.texts == [] and len(pairs.labels) == len(pairs.requests) == 0
