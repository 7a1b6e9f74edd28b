import numpy as np

from mechsub.streams import random_stream, stream_key


def test_a_stream_depends_on_its_whole_name_only():
    first = random_stream(0, "member", 3, "carrier").random(4)
    assert np.array_equal(first, random_stream(0, "member", 3, "carrier").random(4))
    for other in (
        random_stream(1, "member", 3, "carrier"),
        random_stream(0, "member", 4, "carrier"),
        random_stream(0, "member", 3),
    ):
        assert not np.array_equal(first, other.random(4))


def test_keys_are_what_they_were():
    # Published runs are replayed from these: a change would silently change every number.
    assert stream_key(0, "member", 0, "reference") == 107120921386966225214422571368275433520
