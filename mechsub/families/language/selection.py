"""The rows of a carrier that a condition takes by their rank."""

from collections.abc import Mapping, Sequence

import numpy as np

from mechsub.families.language.conditions import SelectionConfig


def select_rows(
    selection: SelectionConfig, num_rows: int, ranking: Mapping[str, Sequence[float]], stream: np.random.Generator
) -> list[int]:
    """The numbers of the rows that are learnt, in the carrier's order; of equal ones the earlier are taken.

    ``ranking``: a number for each row, by name. ``stream``: what draws random rows; the same for a student and its control.
    """
    count = selection.count(num_rows)
    if selection.by == "random":
        order = stream.permutation(num_rows)
    else:
        numbers = np.array(ranking[selection.by])
        order = np.argsort(-numbers if selection.keep == "top" else numbers, kind="stable")
    return sorted(order[:count].tolist())
