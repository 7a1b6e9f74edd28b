"""A screening's report: what one step on each example would do, which examples lead, and what is not known of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mechsub.reporting.charts import draw_figure
from mechsub.reporting.page import render_page
from mechsub.results import Result


def render_screen_report(
    header: Mapping[str, Any], arguments: Mapping[str, Any], result: Result, examples: Sequence[Mapping[str, Any]], kept: str
) -> str:
    """The whole page. ``examples``: the leading ones, each with its ``line``, ``rank``, ``overlap`` and texts.

    ``kept``: what the filtered file holds, in words.
    """
    return render_page(
        "screen.html",
        header,
        arguments,
        result=result,
        figures=[draw_figure(figure, result) for figure in result.figures],
        findings=result.findings,
        examples=examples,
        kept=kept,
    )
