"""`mechsub compare`: the command, its refusals, its page and its file."""

import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import mechsub
from mechsub.cli import app
from mechsub.results import read_group, read_result
from tests.comparison.made_up import make_run

EFFECTS = {"same-init": {"owl": [0.5, 0.6, 0.7]}, "different-init": {"owl": [0.0, 0.1, -0.1]}}
OTHER = {"same-init": {"owl": [0.1, 0.2, 0.9], "cat": [0.0, 0.1, 0.0]}}


def compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def refused(*arguments):
    """What it says, without a traceback."""
    result = compare(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs that differ in traits, margin and references, and their comparison."""
    folder = tmp_path_factory.mktemp("compared")
    make_run(folder / "first", EFFECTS)
    make_run(folder / "second", OTHER, reference="another", verdict={"margin": 0.1})
    result = compare(folder / "first", folder / "second", "--out", folder / "out.html")
    assert result.exit_code == 0, result.output
    return folder


def test_the_page_opens_with_what_was_compared_and_says_what_could_not_be(compared):
    page = (compared / "out.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", page, flags=re.S))
    assert "first and second: side by side" in text and "Every run is held against first" in text
    assert "the trait cat taught in second only" in text
    assert "first and second have other rules" in text or "second and first have other rules: margin 0.1 and 0.05" in text
    assert "gradient_overlap" in text and "not measured; `mechsub analyze" in text
    assert "verdict.margin" in text and "<svg" in page and "http-equiv" not in page
    assert text.index("What could not be compared") < text.index("Did the trait pass?")


def test_the_file_holds_every_number_and_comes_back_as_it_was(compared):
    result, effect = read_result(compared / "out.h5"), read_group(compared / "out.h5", "effect")
    assert result.data.attrs["analysis"] == "comparison" and list(result.data.run.values) == ["first", "second"]
    row = effect.sel(row="same-init · second")
    np.testing.assert_array_equal(row.value.values, [0.1, 0.2, 0.9])
    assert float(row.difference) == pytest.approx(0.4 - 0.6) and str(row.method.values) == "Welch"
    assert str(row.verdict.values) == "" and "other rules" in str(row.reason.values)
    assert str(effect.sel(row="different-init · first").method.values) == "paired"
    missing = effect.difference.sel(row="same-init · first")
    assert np.isnan(missing) and int(effect.difference_status.sel(row="same-init · first")) != 0
    assert {finding.quantity for finding in result.findings} == {"difference_in_effect"}


def test_the_same_comparison_gives_the_same_numbers_over_its_own_files(compared):
    before = (compared / "out.h5").read_bytes()
    again = compare(compared / "first", compared / "second", "--out", compared / "out")
    assert again.exit_code == 0 and (compared / "out.h5").read_bytes() == before


def test_two_copies_of_one_run_show_no_difference_anywhere(tmp_path):
    make_run(tmp_path / "run", EFFECTS)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    path = mechsub.compare_runs([tmp_path / "run", tmp_path / "copy"], tmp_path / "new/folder/out.h5")
    effect = read_group(path.with_suffix(".h5"), "effect")
    copies = effect.sel(row=effect.run == "copy")
    assert path == tmp_path / "new/folder/out.html" and set(copies.method.values) == {"paired"}
    assert (copies.difference == 0).all() and (copies.difference_low == 0).all() and (copies.difference_high == 0).all()


def test_a_single_run_compares_its_conditions_from_another_baseline(tmp_path, monkeypatch):
    make_run(tmp_path / "one", EFFECTS)
    monkeypatch.chdir(tmp_path)
    result = compare("one", "--baseline", "different-init")
    assert result.exit_code == 0 and "Comparison: runs/compare-one.html" in result.output
    effect = read_group(tmp_path / "runs/compare-one.h5", "effect")
    assert float(effect.difference.sel(row="same-init")) == pytest.approx(0.6)


def test_a_sweeps_folder_stands_for_its_runs(tmp_path):
    runs = {"base": {}, "epochs=2": {}, "not-begun": {}}
    for name in ("base", "epochs=2"):
        make_run(tmp_path / "sweep/runs" / name, EFFECTS)
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"schema": 1, "runs": runs}))
    path = mechsub.compare_runs(tmp_path / "sweep", tmp_path / "out")
    assert list(read_result(path.with_suffix(".h5")).data.run.values) == ["base", "epochs=2"]
    assert "not-begun" in path.read_text()
    assert "given twice" in refused(tmp_path / "sweep", tmp_path / "sweep/runs/base", "--out", tmp_path / "other")


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(tmp_path):
    make_run(tmp_path / "run", EFFECTS)
    make_run(tmp_path / "single", {"same-init": {"owl": [0.5, 0.6, 0.7]}})
    make_run(tmp_path / "bare", EFFECTS, results={})
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    out = ("--out", tmp_path / "out.html")
    assert "is not a run directory: it has no run.json" in refused(tmp_path / "folder", *out)
    assert "does not exist" in refused(tmp_path / "none", *out)
    assert "given twice" in refused(tmp_path / "run", tmp_path / "folder/../run", *out)
    assert "two rows of one quantity are the least" in refused(tmp_path / "single", *out)
    assert "mechsub analyze" in refused(tmp_path / "bare", *out)
    assert "it has same-init, different-init" in refused(tmp_path / "run", "--baseline", "nothing", *out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("taken", ["out.html", "out.h5"])
def test_a_file_that_is_no_comparison_is_kept(tmp_path, taken):
    make_run(tmp_path / "run", EFFECTS)
    (tmp_path / taken).write_text("mine")
    assert f"{taken} is there and is no comparison" in refused(tmp_path / "run", "--out", tmp_path / "out").replace("\n", "")
    assert (tmp_path / taken).read_text() == "mine" and len([*tmp_path.glob("out*")]) == 1


def test_a_damaged_result_is_refused_and_the_earlier_comparison_kept(tmp_path):
    make_run(tmp_path / "run", EFFECTS)
    path = mechsub.compare_runs(tmp_path / "run", tmp_path / "out")
    before = path.read_text(), path.with_suffix(".h5").read_bytes()
    result = tmp_path / "run/results/behaviour.h5"
    result.write_bytes(result.read_bytes()[:-10])
    assert "behaviour.h5 has changed since stage" in refused(tmp_path / "run", "--out", tmp_path / "out")
    assert (path.read_text(), path.with_suffix(".h5").read_bytes()) == before


def test_long_names_and_many_rows_are_cut_in_the_figure_and_told(tmp_path):
    many = {f"a-condition-with-a-rather-long-name-{number}": {"owl": [number / 100, 0.1, 0.2]} for number in range(40)}
    make_run(tmp_path / "run", many)
    page = mechsub.compare_runs(tmp_path / "run", tmp_path / "out").read_text()
    assert "4 more rows are in the file only" in page and "a-condition-with-a-rather-long-name-35</text>" in page
    assert read_group(tmp_path / "out.h5", "effect").sizes["row"] == 40
