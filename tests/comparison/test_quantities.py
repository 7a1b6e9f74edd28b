import numpy as np
import pytest
import yaml

from mechsub.comparison.comparison import ANALYSES
from mechsub.comparison.panels import build_panels
from mechsub.comparison.quantities import QUANTITIES
from mechsub.comparison.runs import read_run
from mechsub.statistics.intervals import student_interval
from mechsub.steered import alignments


@pytest.fixture(scope="module")
def panels(tiny_run):
    recipe = yaml.safe_load(tiny_run.directory.recipe_path.read_text())
    found, _ = build_panels([read_run("tiny", tiny_run.directory, recipe, ANALYSES)], "same-init")
    return {panel.quantity.name: panel for panel in found}


def test_every_row_is_the_finding_of_its_analysis(panels):
    assert list(panels) == ["effect", "specific_alignment", "gradient_overlap", "steering_cosine"]
    for panel in panels.values():
        rows = [row for row in panel.rows if row.finding is not None]
        assert len(rows) >= 5
        for row in rows:
            found = row.finding
            expected = [found.estimate, found.low, found.high, found.null_low, found.null_high]
            given = [row.interval.estimate, row.interval.low, row.interval.high, *row.null]
            np.testing.assert_allclose(given, expected, rtol=1e-9, err_msg=f"{panel.quantity.name}: {row.words}")
            assert row.interval.n == found.n


def test_what_differences_are_of_is_what_the_analysis_judges(panels):
    for panel in panels.values():
        judged = [row for row in panel.rows if row.finding is not None and row.finding.rule and not row.is_void]
        assert judged or panel.quantity.name == "effect"
        for row in judged:
            seen = f"Seen: {student_interval(row.over_null.values, row.rules.confidence)}, n = {row.interval.n}"
            assert seen in row.finding.rule, (panel.quantity.name, row.words)


def test_the_margins_are_those_of_the_findings(panels):
    for panel in panels.values():
        margins = {row.finding.margin for row in panel.rows if row.finding is not None and row.finding.rule}
        assert margins == {panel.rows[0].rules.margin}


def test_steering_reads_what_the_analysis_calls_its_judged_quantities():
    found = {quantity.needs_traits: quantity for quantity in QUANTITIES if quantity.analysis == "steering_directions"}
    assert (found[False].variable, found[False].null) == (alignments.RAW, alignments.RAW_CONTROL)
    assert (found[True].variable, found[True].null) == (alignments.ADJUSTED, alignments.ADJUSTED_OTHERS)
