"""Named random streams: every draw is a function of the recipe's seed and a name, so no draw depends on another.

Adding a condition or a member leaves every other stream as it was.
"""

import hashlib

import numpy as np


def stream_key(seed: int, *name: str | int) -> int:
    """The 128-bit key of one named stream, e.g. ``stream_key(0, "member", 3, "initialisation")``."""
    text = "/".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def random_stream(seed: int, *name: str | int) -> np.random.Generator:
    """A generator (Philox 4x64) for one named stream.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *name)))
