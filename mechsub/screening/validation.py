"""How well screenings foretold transfer on a run of this project: numbers that ``scripts/screening_table.py`` measured."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from mechsub.statistics.intervals import format_number

_RECORD = resources.files("mechsub.screening") / "validation.json"
_WORDS = {
    "toward_teacher": "the data's cosine toward Δ_T",
    "toward_trait": "the data's cosine toward −∇L_trait",
    "toward_trait_over_neutral": "the same less that of neutral data",
    "log_ratio": "mean log p_T − log p₀, cheaper",
    "displacement_norm": "‖Δ_T‖, cheaper",
}


def describe_validation() -> list[str]:
    """What is known of how well a dataset's total foretells whether a student takes the trait over, sentence by sentence."""
    record = json.loads(_RECORD.read_text())
    over_all = [
        f"{_WORDS[name]} ρ {_bounds(found['rank_correlation'])}, AUROC {_bounds(found['area_of_decided'])}"
        for name, found in record["over_all"].items()
    ]
    within = [f"{_WORDS[name]} {_bounds(found['within_traits'])}" for name, found in record["within_matched"].items() if found]
    return [
        f"How well such totals foretold transfer was measured on one run of this project, {record['run']} "
        f"({', '.join(record['models'])}-style nano models, {record['members']} members, {record['traits']} traits that chose "
        "none of its settings). Nothing is known of other models. Intervals: 95 %, bootstrap, too narrow with so few.",
        f"Over all cells of trait and condition ({', '.join(record['conditions'])}), Spearman's ρ with the effect, and AUROC "
        f"for transferred against no-transfer ({record['transferred']} of {record['decided']} decided cells, .5 is chance): "
        f"{'; '.join(over_all)}.",
        f"Among the students of one trait that start where their teacher did ({', '.join(record['matched'])}), Spearman's ρ "
        f"with the effect over members: {'; '.join(within)}.",
    ]


def _bounds(found: Mapping[str, Any]) -> str:
    if found["estimate"] is None:
        return f"– ({found['reason']})"
    if found["low"] is None:
        return f"{format_number(found['estimate'])} ({found['reason']})"
    return f"{format_number(found['estimate'])} [{format_number(found['low'])}, {format_number(found['high'])}]"
