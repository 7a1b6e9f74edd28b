"""A sweep's report: dose–response of every swept field, and every run in one table."""

from collections.abc import Mapping
from typing import Any

import xarray as xr

from mechsub.architecture_matrix import NO_POSITIVE_CONTROL
from mechsub.reporting.charts import draw_figure
from mechsub.reporting.opening import build_opening
from mechsub.reporting.page import render_page
from mechsub.results import Result

_SHOWN = ("effect", "alignment", "specific_alignment")


def render_sweep_report(
    header: Mapping[str, Any], table: Result, missing: Mapping[str, str], matrix: Result | None = None
) -> str:
    """The whole page. ``missing``: what each run lacks, in words; empty where it lacks nothing.

    ``matrix``: the matrix of architectures over all runs, where they have one: it then opens the page.
    """
    data, missing = table.data, {run: what for run, what in missing.items() if what}
    rows = [_row(data, run, header["runs"]) for run in map(str, data.run.values)]
    doubts = [said for said in matrix.summary if NO_POSITIVE_CONTROL in said] if matrix else []
    lacking = (
        f"Not complete: {len(missing)} of {len(rows)} runs lack results (below); where these are cells, verdicts will change."
    )
    return render_page(
        "sweep.html",
        header,
        header["recipe"],
        table=table,
        fields=list(map(str, data.field.values)),
        conditions=list(map(str, data.condition.values)),
        figures=[draw_figure(figure, table) for figure in table.figures],
        rows=rows,
        has_numbers=any(cells for row in rows for cells in row["conditions"].values()),
        matrix=matrix,
        opening=build_opening(header["recipe"], matrix.findings, [f"Not complete: {lacking}"] if missing else [], doubts)
        if matrix
        else None,
        matrix_figures=[draw_figure(figure, matrix) for figure in matrix.figures] if matrix else [],
        missing=missing,
    )


def _row(data: xr.Dataset, run: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One run: what sets it apart, and its numbers by condition."""
    base = settings.get("base", {})
    setting = data.setting.sel(run=run)
    texts = {str(field): str(setting.sel(field=field).values) for field in data.field.values}
    differing = {field: text for field, text in texts.items() if not base or settings[run][field] != base[field]}
    shown = [quantity for quantity in _SHOWN if quantity in data.quantity.values]
    conditions = {str(name): [_cell(data, run, str(name), quantity) for quantity in shown] for name in data.condition.values}
    return {
        "run": run,
        "settings": differing,
        "conditions": {name: [cell for cell in cells if cell["n"]] for name, cells in conditions.items()},
    }


def _cell(data: xr.Dataset, run: str, condition: str, quantity: str) -> dict[str, Any]:
    cell = data.sel(run=run, condition=condition, quantity=quantity)
    numbers = {name: float(cell[name].values) for name in ("estimate", "low", "high")}
    return {
        "quantity": quantity,
        "verdict": str(cell.verdict.values),
        "rule": str(cell.rule.values),
        "n": int(cell.n.values),
        **numbers,
    }
