import numpy as np
import pytest
import xarray as xr
import yaml

from mechsub.comparison.comparison import ANALYSES
from mechsub.comparison.panels import build_panels
from mechsub.comparison.quantities import QUANTITIES
from mechsub.comparison.runs import read_run
from mechsub.results import Result, label_variable
from mechsub.statistics.intervals import student_interval
from mechsub.steered import alignments
from tests.comparison.made_up import make
from tests.test_findings import finding

CONDITIONS = {"same-init": {"owl": [0.0] * 3}}
TAUGHT = {"a": ["owl", "wolf"], "b": ["owl", "wolf", "cat"]}


def steering(traits):
    """Cosines of .5 with the own teacher and .3 with others at the last hook point, which the findings name."""
    dims = ("condition", "taught", "member", "step", "point", "group")
    values = np.zeros((1, len(traits), 3, 2, 2, 1))
    values[..., 1, 1, :] = 1.0
    variables = {
        name: label_variable(values * size, dims, description=name, unit="cosine")
        for name, size in ((alignments.ADJUSTED, 0.5), (alignments.ADJUSTED_OTHERS, 0.3))
    }
    variables["last_step"] = label_variable([[7] * len(traits)], ["condition", "taught"], description="last", unit="steps")
    coords = {"condition": ["same-init"], "taught": traits, "member": range(3), "step": [0, 7], "point": ["first", "last"]}
    findings = [finding(quantity=alignments.ADJUSTED, trait=trait, scope="last, trait") for trait in traits]
    return Result(xr.Dataset(variables, {**coords, "group": ["trait"]}), findings, [])


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


def test_the_null_of_several_traits_is_of_the_other_teachers_that_there_are(tmp_path):
    runs = [
        make(tmp_path / name, CONDITIONS, results={"steering_directions": steering(traits)}) for name, traits in TAUGHT.items()
    ]
    (panel,), _ = build_panels(runs, "same-init")
    rows = dict(zip(panel.labels, panel.rows, strict=True))
    np.testing.assert_allclose(rows["same-init · owl · a"].over_null.values, [0.2, 0.2, 0.2])
    held = dict(zip(panel.labels, panel.held, strict=True))
    assert "against the teachers of cat, wolf" in held["same-init · owl · b"].unjudged
    assert rows["same-init · owl · a"].place == "last, trait, against the teachers of wolf"
