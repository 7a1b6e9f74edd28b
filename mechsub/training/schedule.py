"""The checkpoint schedule: which steps of a training are kept."""

import numpy as np

from mechsub.training.config import CheckpointConfig


def checkpoint_steps(num_steps: int, config: CheckpointConfig) -> list[int]:
    """The steps whose parameters are kept, ascending: 0 (before any update), 1, and up to ``num_steps``.

    Log spacing puts ``config.num - 1`` of them evenly in log(step); rounding can merge early ones, so there may be fewer.
    """
    spread = np.geomspace if config.spacing == "log" else np.linspace
    kept = np.rint(spread(1, num_steps, config.num - 1)).astype(int)
    return sorted({0, 1, num_steps, *map(int, kept)})
