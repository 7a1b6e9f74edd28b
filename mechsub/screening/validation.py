"""How well screenings foretold transfer on runs of this project: numbers that ``scripts/screening_table.py`` measured."""

import json
from importlib import resources
from typing import Any

from mechsub.statistics.intervals import format_number

_RECORD = resources.files("mechsub.screening") / "validation.json"
_ALL = "all conditions"
_WORDS = {
    "toward_teacher_over_neutral": "the data's cosine toward Δ_T less that of neutral data",
    "toward_trait_over_neutral": "the same toward −∇L_trait",
    "log_ratio": "the baseline log p_T − log p₀",
}


def describe_validation() -> str:
    """What is known of how well a dataset's total foretells whether a student takes the trait over."""
    record = json.loads(_RECORD.read_text())
    conditions = list(dict.fromkeys(name.split(", ", 1)[1] for name in record["auroc"]))
    told = "; ".join(
        f"{condition}: " + ", ".join(f"{words} {_say(record, name, condition)}" for name, words in _WORDS.items())
        for condition in sorted(conditions, key=lambda condition: condition != _ALL)
    )
    return (
        f"How well such totals foretold transfer on this project's own run {record['run']}, {record['traits']} traits that "
        f"chose none of its settings, {record['members']} members: AUROC for the verdict transferred, over cells of condition "
        f"and trait, .5 is chance, with 95 % intervals. {told}. These are nano models; nothing is known of others."
    )


def _say(record: dict[str, Any], name: str, condition: str) -> str:
    found = record["auroc"][f"{name}, {condition}"]
    counts = f"{found['transferred']} of {found['cells']} transferred"
    if found["estimate"] is None:
        return f"– ({found['reason']})"
    bounds = f"[{format_number(found['low'])}, {format_number(found['high'])}]" if found["low"] is not None else found["reason"]
    return f"{format_number(found['estimate'])} ({bounds}; {counts})"
