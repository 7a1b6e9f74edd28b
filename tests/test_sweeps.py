"""A sweep in one folder: shared work, failures that stop nobody, and one table over all runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import mechsub
import mechsub.api
from mechsub.api import analyze_sweep, plan_sweep, run_sweep, verify_sweep, write_sweep_report
from mechsub.cli import app
from mechsub.errors import AnalysisError, MechsubError, RunDirectoryError
from tests.helpers import output_hashes

SWEEP = """
sweep:
  vary: each
  fields:
    student.epochs: [1, 2, 3]
    model.activation: [relu, tanh]
"""
SMALL = "conditions={same-init: , all-logits: }"
ANALYSES = ["behaviour", "parameter_alignment"]


@pytest.fixture(scope="session")
def sweep_recipe(tiny_recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "sweep.yaml"
    path.write_text(tiny_recipe.read_text() + SWEEP)
    return path


@pytest.fixture(scope="session")
def swept(sweep_recipe, tmp_path_factory):
    """A finished and analysed sweep; tests read it and leave it as it is."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    run_sweep(sweep_recipe, out, [SMALL], device="cpu", workers=0)
    analyze_sweep(out, ANALYSES, device="cpu", workers=0)
    return out


def experiment_hashes(run):
    return {name: known for name, known in output_hashes(run).items() if not name.startswith("results/")}


def test_every_run_is_the_run_that_its_recipe_makes_alone(swept, sweep_recipe, tmp_path):
    recipe = plan_sweep(sweep_recipe, tmp_path, [SMALL]).sweep.runs["student.epochs=3"].recipe
    alone = mechsub.run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    assert experiment_hashes(alone.path) == experiment_hashes(swept / "runs/student.epochs=3")
    assert verify_sweep(swept) == []


def test_shared_stages_are_computed_once(sweep_recipe, tmp_path):
    plan = plan_sweep(sweep_recipe, tmp_path / "sweep", [SMALL])
    stages = [stage.key for one in plan.plans.values() for stage in one.stages]
    assert len(plan.pending) == len(set(stages)) < len(stages)
    done = []
    run_sweep(plan, device="cpu", workers=0, on_progress=lambda stage, steps: done.append(stage.key))
    files = [tmp_path / "sweep/runs" / run / "lineages/teacher/lineage.json" for run in ("base", "student.epochs=3")]
    assert os.path.samefile(*files)
    assert not os.path.samefile(files[0], tmp_path / "sweep/runs/model.activation=tanh/lineages/teacher/lineage.json")


def test_the_table_holds_what_the_runs_found(swept):
    with xr.open_datatree(swept / "results/sweep.h5") as tree:
        table = tree.to_dataset().load()
    assert list(table.run.values) == ["base", "student.epochs=1", "student.epochs=3", "model.activation=tanh"]
    assert table.setting_number.sel(field="student.epochs").values.tolist() == [2, 1, 3, 2]
    assert table.setting.sel(field="model.activation").values.tolist() == ["relu", "relu", "relu", "tanh"]
    for run in table.run.values:
        findings = json.loads((swept / "findings.json").read_text())["runs"]
        found = next(one for one in findings if one["run"] == run)["findings"]
        effect = next(one for one in found if (one["quantity"], one["condition"]) == ("effect", "same-init"))
        cell = table.sel(run=run, condition="same-init", quantity="effect")
        assert cell.estimate.item() == effect["estimate"] and str(cell.verdict.values) == effect["verdict"]
        assert cell.n.item() == 3


def test_only_runs_that_differ_in_one_field_share_a_line(swept):
    with xr.open_datatree(swept / "results/sweep.h5") as tree:
        series = tree.to_dataset().series.load()
    epochs, activation = (series.sel(field=field).values.tolist() for field in ("student.epochs", "model.activation"))
    assert epochs == ["model.activation=relu"] * 3 + [""]
    assert activation == ["student.epochs=2", "", "", "student.epochs=2"]


def test_the_report_has_a_figure_for_every_field_and_a_row_for_every_run(swept):
    page = (swept / "report/index.html").read_text()
    for field in ("student-epochs", "model-activation"):
        for quantity in ("trait-score", "alignment"):
            assert f'id="{quantity}-by-{field}"' in page
    for run in ("base", "student.epochs=1", "model.activation=tanh"):
        assert f"runs/{run}<" in page
    assert "undefined" not in page.split("<script>")[0] and "Not complete" not in page


def test_a_run_that_fails_stops_no_other_and_is_named(tiny_recipe, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        tiny_recipe.read_text() + "\nsweep: {vary: each, fields: {student.optimizer.learning_rate: [1.0e+30, 0.02]}}\n"
    )
    with pytest.raises(MechsubError, match=r"runs/student.optimizer.learning_rate=1e.30: .*not finite at step"):
        run_sweep(path, tmp_path / "sweep", [SMALL], device="cpu", workers=0)
    page = analyze_sweep(tmp_path / "sweep", ["behaviour"], device="cpu", workers=0).read_text()
    assert "Not complete" in page and "not finished: same-init, all-logits" in page
    assert "failed: " in page and "not finite at step" in page
    missing = mechsub.api.missing_from_sweep(tmp_path / "sweep")
    assert list(missing) == ["student.optimizer.learning_rate=1e+30"]
    with xr.open_datatree(tmp_path / "sweep/results/sweep.h5") as tree:
        table = tree.to_dataset().load()
    assert np.isnan(table.estimate.sel(run="student.optimizer.learning_rate=1e+30")).all()
    assert (table.estimate_status.sel(run="student.optimizer.learning_rate=1e+30") == 1).all()
    effects = table.sel(condition="same-init", quantity="effect")
    assert np.isfinite(effects.estimate.sel(run=["base", "student.optimizer.learning_rate=0.02"])).all()


def test_a_damaged_shared_file_is_made_anew_where_it_is_wanted(tiny_recipe, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(tiny_recipe.read_text() + "\nsweep: {fields: {student.epochs: [1, 2]}}\n")
    runs = run_sweep(path, tmp_path / "sweep", ["conditions={same-init: }"], device="cpu", workers=0)
    first, second = (run.path / "carrier/teacher/logits.safetensors" for run in runs.values())
    whole = first.read_bytes()
    with first.open("r+b") as file:  # in place: the runs share the file
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    assert len(verify_sweep(tmp_path / "sweep")) == 2
    second.unlink()
    run_sweep(path, tmp_path / "sweep", ["conditions={same-init: }"], device="cpu", workers=0)
    assert second.read_bytes() == whole and len(verify_sweep(tmp_path / "sweep")) == 1


def test_what_is_damaged_or_gone_is_left_out_and_named(tiny_recipe, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(tiny_recipe.read_text() + "\nsweep: {fields: {student.epochs: [1, 2, 3, 4, 5]}}\n")
    out = tmp_path / "sweep"
    runs = run_sweep(path, out, ["conditions={same-init: }"], device="cpu", workers=0)
    analyze_sweep(out, ANALYSES, device="cpu", workers=0)
    shutil.rmtree(runs["student.epochs=1"].path)
    (runs["student.epochs=2"].path / "results/behaviour.h5").write_bytes(b"broken")
    recipe = runs["student.epochs=3"].directory.recipe_path
    recipe.write_text(recipe.read_text().replace("margin: 0.05", "margin: 0.5"))
    records = runs["student.epochs=4"].directory.records()
    runs["student.epochs=4"].directory.record_path(records["analysis.parameter_alignment"].key).unlink()
    page = write_sweep_report(out).read_text()
    for words in (
        "<code>student.epochs=1</code>: not begun",
        "<code>student.epochs=2</code>: damaged: ",
        "<code>student.epochs=3</code>: damaged: ",
        "<code>student.epochs=4</code>: not analysed: parameter_alignment",
    ):
        assert words in page
    assert "<code>student.epochs=5</code>" not in page and "verdicts in 2 of 5 runs" in page
    assert any("student.epochs=1 of" in problem for problem in verify_sweep(out))


def test_a_sweep_killed_before_its_first_header_goes_on(sweep_recipe, tmp_path):
    for folder in ("stages", "runs/base/stages"):
        (tmp_path / "sweep" / folder).mkdir(parents=True)
        (tmp_path / "sweep" / folder / "run.lock").touch()
    assert len(plan_sweep(sweep_recipe, tmp_path / "sweep", [SMALL]).plans) == 4


def test_a_zip_says_that_its_fields_change_together(tiny_recipe, tmp_path):
    path = tmp_path / "sweep.yaml"
    fields = "{student.epochs: [1, 2], neutral: [relabelled, shuffled]}"
    path.write_text(tiny_recipe.read_text() + f"\nsweep: {{vary: zip, fields: {fields}}}\n")
    run_sweep(path, tmp_path / "sweep", ["conditions={same-init: }"], device="cpu", workers=0)
    page = analyze_sweep(tmp_path / "sweep", ["behaviour"], device="cpu", workers=0).read_text()
    assert "Lines join runs in which all fields change together" in page and "no effect can be put down to one" in page
    assert "neutral.relabelled or its control, the same student of neutral.shuffled" in page


def test_a_sweep_may_grow_and_lose_nothing(swept, sweep_recipe, tmp_path):
    grown = [SMALL, "sweep.fields.student.epochs=[1, 2, 3, 4]"]
    pending = {name for name, one in plan_sweep(sweep_recipe, swept, grown).plans.items() if one.pending}
    assert pending == {"student.epochs=4"}
    with pytest.raises(RunDirectoryError, match="holds runs that this sweep lacks: student.epochs=3"):
        plan_sweep(sweep_recipe, swept, [SMALL, "sweep.fields.student.epochs=[1, 2]"])
    with pytest.raises(RunDirectoryError, match="made by another recipe: `members` was 3, is 4"):
        plan_sweep(sweep_recipe, swept, [SMALL, "members=4"])


def test_a_folder_in_use_and_a_sweep_without_results_say_what_to_do(sweep_recipe, tiny_run, tmp_path):
    with pytest.raises(RunDirectoryError, match="is in use and holds no sweep"):
        plan_sweep(sweep_recipe, tiny_run.path)
    run_sweep(plan_sweep(sweep_recipe, tmp_path / "sweep", [SMALL]), device="cpu", workers=0)
    with pytest.raises(RunDirectoryError, match="has no results yet; `mechsub analyze"):
        write_sweep_report(tmp_path / "sweep")
    for header in (tmp_path / "sweep/runs").glob("*/run.json"):
        header.unlink()
    with pytest.raises(AnalysisError, match="no run of .* has a condition with both"):
        analyze_sweep(tmp_path / "sweep")


def test_a_killed_sweep_goes_on(sweep_recipe, swept, tmp_path):
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "mechsub", "run", str(sweep_recipe), "--out", str(out), "--device", "cpu", "--set", SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    started = time.monotonic()
    while len([*out.glob("runs/*/stages/*.json")]) < 5 and process.poll() is None and time.monotonic() - started < 60:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()  # until the last worker has let go of its end of the pipe
    run_sweep(sweep_recipe, out, [SMALL], device="cpu", workers=0)
    for path in (swept / "runs").iterdir():
        assert experiment_hashes(out / "runs" / path.name) == experiment_hashes(path)


def test_the_commands_take_a_sweeps_folder(swept, sweep_recipe):
    runner = CliRunner()
    for command in (["verify"], ["report"], ["analyze", "--only", "behaviour"]):
        done = runner.invoke(app, [*command, str(swept)])
        assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["run", str(sweep_recipe), "--out", str(swept), "--set", SMALL, "--dry-run"])
    assert done.exit_code == 0 and "0 stages to do" in done.output
    done = runner.invoke(app, ["run", str(sweep_recipe), "--set", "sweep.fields.seed=[x]", "--dry-run"])
    assert done.exit_code == 2 and "run seed=x of the sweep is not valid" in done.output


def test_shared_files_are_copied_where_the_disk_refuses_links(tiny_recipe, tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "sweep.yaml"
    path.write_text(tiny_recipe.read_text() + "\nsweep: {fields: {student.epochs: [1, 2]}}\n")
    runs = run_sweep(path, tmp_path / "sweep", ["conditions={same-init: }"], device="cpu", workers=0)
    assert list(runs) == ["student.epochs=1", "student.epochs=2"] == list(mechsub.open_sweep(tmp_path / "sweep"))
    assert verify_sweep(tmp_path / "sweep") == []
    first, second = (run.path / "lineages/teacher/lineage.json" for run in runs.values())
    assert first.read_bytes() == second.read_bytes() and not os.path.samefile(first, second)
