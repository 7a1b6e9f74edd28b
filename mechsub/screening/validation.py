"""How well screenings foretold transfer on runs of this project: numbers that ``scripts/screening_table.py`` measured."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from mechsub.statistics.intervals import format_number

_RECORD = resources.files("mechsub.screening") / "validation.json"
_WORDS = {
    "toward_teacher": "the data's cosine toward Δ_T",
    "toward_trait_over_neutral": "its cosine toward −∇L_trait less that of neutral data",
    "log_ratio": "the baseline, mean log p_T − log p₀",
}


def describe_validation() -> list[str]:
    """What is known of how well a dataset's total foretells whether a student takes the trait over, sentence by sentence."""
    record = json.loads(_RECORD.read_text())
    conditions = list(dict.fromkeys(name.split(", ", 1)[1] for name in record["foretold"]))
    return [
        f"How well such totals foretold transfer was measured on this project's own run {record['run']}: nano models, "
        f"{record['traits']} traits that chose none of its settings, {record['members']} members; nothing is known of other "
        "models, nor of how well single examples rank. Below: Spearman's ρ with the effect over cells of condition and trait, "
        "and AUROC for transferred against no-transfer, undecided cells left out, .5 is chance; 95 % intervals.",
        *(_describe_condition(record["foretold"], condition) for condition in conditions),
    ]


def _describe_condition(foretold: Mapping[str, Any], condition: str) -> str:
    parts = []
    for name, words in _WORDS.items():
        found = foretold[f"{name}, {condition}"]
        area = found["area_of_decided"]
        decided = "" if area["estimate"] is None else f", AUROC {_bounds(area)}"
        parts.append(f"{words} ρ {_bounds(found['rank_correlation'])}{decided}")
    counts = f"{area['transferred']} transferred of {area['cells']} that were decided"
    return f"{condition}, {found['rank_correlation']['cells']} cells ({counts}): {'; '.join(parts)}."


def _bounds(found: Mapping[str, Any]) -> str:
    if found["estimate"] is None:
        return f"– ({found['reason']})"
    if found["low"] is None:
        return f"{format_number(found['estimate'])} ({found['reason']})"
    return f"{format_number(found['estimate'])} [{format_number(found['low'])}, {format_number(found['high'])}]"
