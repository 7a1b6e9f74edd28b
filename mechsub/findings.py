"""A finding: an estimate with its scope, interval, null, n and verdict. ``findings.json`` is a list of them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mechsub.statistics.intervals import Interval
from mechsub.statistics.verdicts import Judgement

SCHEMA_VERSION = 1
ALL_TRAITS = "mean over traits"
"""In the place of a trait: of each member the mean over several."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number that the run supports, and what it stands on. Missing numbers are NaN, and `reason` says why."""

    analysis: str
    quantity: str
    condition: str
    trait: str
    context: str
    """In which surroundings it was measured: test images, or a model's prompt."""
    step: int
    scope: str
    """The parameters, layers or positions that the number covers."""
    estimate: float
    low: float
    high: float
    confidence: float
    unit: str
    null: str
    """What the estimate is held against, in words; why there is none where there is none."""
    null_low: float
    null_high: float
    n: int
    """Members behind the estimate."""
    num_references: int
    verdict: str
    """Empty where the quantity has no verdict of its own; `reason` then says why."""
    reason: str
    rule: str
    """What would have counted for each verdict, and what was seen; empty where there is no verdict."""
    margin: float
    formula: str
    source: str

    @property
    def interval(self) -> Interval:
        """The estimate with its bounds."""
        return Interval(self.estimate, self.low, self.high, self.n, self.confidence)


FIELDS = tuple(field.name for field in fields(Finding))


def interval_fields(interval: Interval) -> dict[str, Any]:
    """The fields of a finding that an interval fills."""
    return {
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "confidence": interval.confidence,
        "n": interval.n,
    }


def judgement_fields(judgement: Judgement | None, margin: float, otherwise: str, over: str = "") -> dict[str, Any]:
    """The fields of a finding that a verdict on the difference from its null fills; ``otherwise``: why none is given.

    ``over``: what the difference is taken over, in words, where the rule does not say it.
    """
    if judgement is None:
        return {"verdict": "", "reason": otherwise, "rule": "", "margin": float("nan")}
    return {
        "verdict": judgement.verdict,
        "reason": f"difference from the null {judgement.interval}: {judgement.reason}",
        "rule": f"Of the difference from the null{over}. {judgement.rule}",
        "margin": margin,
    }


def findings_document(run: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """The content of ``findings.json``; NaN becomes null, since JSON has no NaN."""
    return {
        "schema": SCHEMA_VERSION,
        "run": run,
        "findings": [{name: _plain(value) for name, value in asdict(finding).items()} for finding in findings],
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
