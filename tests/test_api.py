"""The whole way of a run: again, further, killed, changed, damaged."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xarray as xr
from markupsafe import escape

import mechsub
from mechsub.analyses.registry import load_analyses
from mechsub.api import (
    analyze_run,
    missing_analyses,
    open_run,
    plan_analyses,
    plan_experiment,
    run_experiment,
    verify_run,
    write_report,
)
from mechsub.errors import AnalysisError, MechsubError, ResourceError, RunDirectoryError
from mechsub.families.classifier.train import train_students
from mechsub.recipe import load_recipe
from mechsub.rundir import RunDirectory
from mechsub.stage import Task
from tests.helpers import measure, output_hashes


def run(recipe, out, *settings):
    return run_experiment(load_recipe(recipe, settings), out, device="cpu", workers=0)


def results_of(path):
    return {name: data for name, data in open_run(path).results.items()}


def test_the_same_recipe_gives_the_same_bytes(tiny_recipe, tiny_run, tmp_path):
    run(tiny_recipe, tmp_path / "again")
    assert output_hashes(tmp_path / "again") == {
        name: found for name, found in output_hashes(tiny_run.path).items() if not name.startswith("results/")
    }
    measure(tmp_path / "again")
    for name, data in results_of(tmp_path / "again").items():
        xr.testing.assert_identical(data, tiny_run.results[name])


def test_processes_give_the_bytes_that_one_process_gives(tiny_recipe, tiny_run, tmp_path):
    run_experiment(tiny_recipe, tmp_path / "parallel", device="cpu", workers=2)
    assert output_hashes(tmp_path / "parallel").items() <= output_hashes(tiny_run.path).items()


def test_an_added_condition_runs_only_its_own_stages_and_changes_nothing_else(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    measure(out, "behaviour", "parameter_alignment")
    before, times = output_hashes(out, "lineages/"), {path: path.stat().st_mtime_ns for path in out.glob("lineages/*/*")}
    scores = results_of(out)["behaviour"].trait_score
    further = load_recipe(tiny_recipe, ["conditions.far={init: different, noise_std: 0.1}"])
    plan = plan_experiment(further, out)
    assert [stage.name for stage in plan.pending] == ["student.far", "control.far"]
    run_experiment(plan, device="cpu", workers=0)
    assert before.items() <= output_hashes(out, "lineages/").items()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in times.items())
    page = analyze_run(out, ["behaviour"], device="cpu", workers=0).read_text()
    assert "Left out, since the run has changed after they were measured: parameter alignment." in page
    assert set(results_of(out)) == {"behaviour"} and "far" in page
    measure(out, "behaviour", "parameter_alignment")
    results = results_of(out)
    xr.testing.assert_identical(results["behaviour"].trait_score.sel(lineage=scores.lineage), scores)
    assert "far" in results["parameter_alignment"].condition


def test_an_analysis_is_kept_until_a_lineage_changes(tiny_run):
    path = tiny_run.path / "results/behaviour.h5"
    stamp = path.stat().st_mtime_ns
    analyze_run(tiny_run.path, device="cpu", workers=0)
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.epochs=3", "`student.epochs` was 2, is 3"),
        ("seed=5", "`seed` was 0, is 5"),
        ("verdict.margin=0.2", "`verdict.margin` was 0.05, is 0.2"),
        ("conditions.noised-init={noise_std: 0.7}", "`conditions.noised-init.noise_std` was 0.05, is 0.7"),
    ],
)
def test_another_recipe_is_refused_with_both_values(tiny_recipe, tiny_run, setting, message):
    before = (tiny_run.path / "recipe.yaml").read_text()
    with pytest.raises(RunDirectoryError, match="was made by another recipe") as caught:
        run(tiny_recipe, tiny_run.path, setting)
    assert message in str(caught.value) and "another folder" in str(caught.value)
    assert (tiny_run.path / "recipe.yaml").read_text() == before


def test_a_folder_with_other_things_is_refused(tiny_recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="no run.json"):
        run(tiny_recipe, tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file, not a run directory"):
        run(tiny_recipe, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_plan_that_the_disk_cannot_hold_is_refused_before_anything_is_written(tiny_recipe, tmp_path):
    with pytest.raises(ResourceError, match=r"writes about [\d.]+ TB .* free; lower members"):
        run(tiny_recipe, tmp_path / "huge", "members=100000000")
    assert not (tmp_path / "huge").exists()


def test_a_plan_that_the_memory_cannot_hold_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(ResourceError, match=r"needs about [\d.]+ [GT]B of memory"):
        run(tiny_recipe, tmp_path / "wide", "student.batch_size=1000000000")


def test_a_dry_run_writes_nothing(tiny_recipe, tmp_path):
    plan = plan_experiment(tiny_recipe, tmp_path / "out")
    assert len(plan.pending) == len(plan.stages) and plan.disk_bytes > 0
    assert not (tmp_path / "out").exists()


@pytest.fixture
def damaged(tiny_recipe, tmp_path):
    """A finished run whose teacher has one byte flipped."""
    out = tmp_path / "run"
    run(tiny_recipe, out)
    path = sorted(out.glob("lineages/teacher/step-*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)
    return out, path


def test_a_flipped_byte_is_found_by_verify_and_stops_the_analysis(damaged):
    out, path = damaged
    (problem,) = verify_run(out)
    assert path.name in problem and "expected sha256" in problem and "delete it and run" in problem
    with pytest.raises(RunDirectoryError, match="has changed since stage teacher made it"):
        analyze_run(out, device="cpu", workers=0)
    assert not (out / "results").exists() or not list((out / "results").glob("*.h5"))


def test_a_damaged_file_stops_the_analysis_even_when_its_results_are_there(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    measure(out, "behaviour")
    path = out / "lineages/teacher/step-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunDirectoryError, match="step-00000001.safetensors has changed"):
        analyze_run(out, ["behaviour"], device="cpu", workers=0)


def test_a_users_own_analysis_and_callback_run_in_other_processes(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import xarray as xr\n"
        "from mechsub.analyses.registry import analysis\n"
        "from mechsub.results import Result\n\n"
        "@analysis\n"
        "def count_lineages(run):\n"
        '    """How many lineages there are."""\n'
        '    return Result(xr.Dataset({"lineages": len(run.lineages)}), [], [])\n\n'
        "def look(info):\n"
        '    open(f"seen-{info.lineage}", "w").close()\n'
    )
    command = [
        str(Path(sys.executable).parent / "mechsub"),
        "run",
        str(tiny_recipe),
        "--out",
        "run",
        "--set",
        "callbacks=['mine:look']",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen-student.same-init").is_file()
    program = "import mine, mechsub; mechsub.analyze_run('run', only=['count_lineages'], workers=1)"
    program += "; assert int(mechsub.open_run('run').results['count_lineages'].lineages) == 18"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_analysis_that_the_run_cannot_feed_is_left_out_with_what_to_supply(tiny_run):
    planned = [stage.name for stage in plan_analyses(tiny_run.path)]
    missing = missing_analyses(tiny_run.path)
    assert set(planned) == {f"analysis.{name}" for name in mechsub.list_analyses() if name not in missing}
    assert missing.keys() == {"semantic_filter", "steerability_screen", "token_channel"}
    assert missing["semantic_filter"].startswith("There is no text that a teacher")
    assert missing["steerability_screen"].startswith("It compares traits, and this run has one")
    assert missing["token_channel"].startswith("Its models read and write no tokens")
    page = (tiny_run.path / "report/index.html").read_text()
    assert all(str(escape(sentence)) in page for sentence in missing.values())
    with pytest.raises(AnalysisError, match="semantic_filter cannot be run on .*: There is no text that a teacher"):
        analyze_run(tiny_run.path, ["behaviour", "semantic_filter"], device="cpu", workers=0)


def test_a_need_that_nothing_is_called_is_refused(tiny_run):
    with pytest.raises(AnalysisError, match="cannot need 'teachers'; known: traits, hook_points, .*carrier_texts"):
        tiny_run.lacks("teachers")


def test_an_analysis_may_say_what_it_needs_or_nothing():
    known = load_analyses()
    assert (
        known["behaviour"].needs == ("traits",)
        and known["parameter_alignment"].needs == ()
        and known["semantic_filter"].needs == ("carrier_texts",)
    )
    assert known["semantic_filter"].summary.startswith("Whether a text classifier")


def test_a_callback_that_fails_is_named_with_lineage_and_step(tiny_recipe, tmp_path):
    with pytest.raises(MechsubError, match=r"callback `os:fspath` failed on (teacher|neutral.relabelled) at step 0"):
        run(tiny_recipe, tmp_path / "run", "callbacks=['os:fspath']")


def test_a_deleted_file_is_rebuilt_as_it_was(damaged, tiny_recipe, tiny_run):
    out, path = damaged
    path.unlink()
    assert [stage.name for stage in plan_experiment(tiny_recipe, out).pending] == ["teacher"]
    run(out / "recipe.yaml", out)
    assert verify_run(out) == []
    assert output_hashes(out).items() <= output_hashes(tiny_run.path).items()


def test_a_truncated_result_is_named_and_rebuilt(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    measure(out, "behaviour")
    path = out / "results/behaviour.h5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunDirectoryError, match=r"behaviour.h5 has changed.*mechsub analyze"):
        write_report(out)
    measure(out, "behaviour")
    assert verify_run(out) == []


def test_there_is_no_report_without_results_and_no_analysis_without_students(tiny_recipe, tmp_path):
    plan = plan_experiment(tiny_recipe, tmp_path / "run")
    run_experiment(type(plan)(plan.recipe, plan.out, plan.stages, plan.stages[:3]), device="cpu", workers=0)
    with pytest.raises(RunDirectoryError, match="has no results yet"):
        write_report(plan.out)
    with pytest.raises(AnalysisError, match="no condition with both its student and its control"):
        analyze_run(plan.out, device="cpu")


def test_a_partial_run_is_analysed_and_says_what_is_missing(tiny_recipe, tmp_path):
    plan = plan_experiment(tiny_recipe, tmp_path / "run")
    kept = [stage for stage in plan.stages if not stage.name.endswith(("noised-init", "shuffled-carrier"))]
    run_experiment(type(plan)(plan.recipe, plan.out, plan.stages, kept), device="cpu", workers=0)
    page = analyze_run(plan.out, ["behaviour"], device="cpu", workers=0).read_text()
    assert "Not finished, so not judged: noised-init, shuffled-carrier." in page


def test_names_and_devices_that_do_not_exist_are_refused(tiny_run):
    with pytest.raises(AnalysisError, match="did you mean `behaviour`"):
        analyze_run(tiny_run.path, ["behavior"])
    with pytest.raises(MechsubError, match="choose auto, cpu or cuda"):
        analyze_run(tiny_run.path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(MechsubError, match="sees no GPU"):
            analyze_run(tiny_run.path, device="cuda")


def test_a_run_opens_with_its_recipe_lineages_results_and_findings(tiny_run):
    opened = mechsub.open_run(tiny_run.path)
    assert opened.recipe.name == "tiny"
    assert next(iter(opened.lineages)) == "reference"
    analyses = mechsub.list_analyses().keys() - missing_analyses(tiny_run.path).keys()
    assert set(opened.results) == analyses
    assert set(opened.findings.analysis) == analyses
    document = json.loads((tiny_run.path / "findings.json").read_text())
    assert len(document["findings"]) == len(opened.findings)


RESUMABLE = ["checkpoints.resume_seconds=0"]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_resume_state_is_not_resumed_from(tiny_recipe, tmp_path, damage):
    out = tmp_path / "run"
    plan = plan_experiment(tiny_recipe, out, RESUMABLE)
    run_experiment(type(plan)(plan.recipe, out, plan.stages, plan.stages[:7]), device="cpu", workers=0)
    (stage,) = (stage for stage in plan.stages if stage.name == "student.same-init")
    stopped = Task(stage, out, "cpu", lambda done: None)
    with pytest.raises(KeyboardInterrupt):
        _train_until(stopped, step=4)
    (state, *_) = sorted(out.glob("lineages/student.same-init/resume-*.safetensors"))
    content = bytearray(state.read_bytes())
    content[-3] ^= 1
    state.write_bytes(content if damage == "flip" else content[:100])
    run(tiny_recipe, out, *RESUMABLE)
    run(tiny_recipe, tmp_path / "undisturbed", *RESUMABLE)
    assert output_hashes(out) == output_hashes(tmp_path / "undisturbed")


def test_a_resumed_training_leaves_alone_what_it_resumed_from(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    plan = plan_experiment(tiny_recipe, out, RESUMABLE)
    run_experiment(type(plan)(plan.recipe, out, plan.stages, plan.stages[:7]), device="cpu", workers=0)
    (stage,) = (stage for stage in plan.stages if stage.name == "student.same-init")
    named = []
    for step in range(1, stage.arguments["steps"][-1] + 1):
        with pytest.raises(KeyboardInterrupt):
            _train_until(Task(stage, out, "cpu", lambda done: None), step)
        named.append(json.loads((out / "lineages/student.same-init/resume.json").read_text())["resume"])
    assert len(named) >= 3 and all(first != second for first, second in itertools.pairwise(named))


def _train_until(task, step):
    """Train, and stop as a killed process would after one step's checkpoint."""

    def stop(done):
        if done >= step:
            raise KeyboardInterrupt

    task.report_progress = stop
    train_students([task])


def test_students_of_a_teacher_that_was_made_anew_otherwise_are_trained_again(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    directory = RunDirectory.open(out)
    record = directory.records()["carrier.teacher"]
    (name,) = record.outputs
    path = out / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)
    (stage,) = (stage for stage in plan_experiment(tiny_recipe, out).stages if stage.name == "carrier.teacher")
    directory.write_record(stage, 0.0, "another")  # as another machine's rounding would have left it
    problems = verify_run(out)
    assert problems and all("has been made anew, with other bytes" in problem for problem in problems)
    pending = {stage.name for stage in plan_experiment(tiny_recipe, out).pending}
    assert "student.same-init" in pending and "control.same-init" not in pending


def test_an_edited_recipe_is_refused_since_the_rules_were_fixed_before_the_run(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    path = out / "recipe.yaml"
    path.write_text(path.read_text().replace("margin: 0.05", "margin: 0.5"))
    with pytest.raises(RunDirectoryError, match=r"edited since the run began: `verdict.margin` was 0.05, is 0.5"):
        analyze_run(out, device="cpu")
    assert any("edited since the run began" in problem for problem in verify_run(out))


def test_a_run_of_a_version_with_fewer_fields_goes_on_with_their_defaults_and_only_with_these(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    run(tiny_recipe, out)
    header = json.loads((out / "run.json").read_text())
    del header["recipe"]["verdict"]["subspace_rank"]
    (out / "run.json").write_text(json.dumps(header))
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace("  subspace_rank: 4\n", ""))
    assert not plan_experiment(tiny_recipe, out).pending
    assert verify_run(out) == []
    (out / "recipe.yaml").write_text(recipe.replace("subspace_rank: 4", "subspace_rank: 8"))
    assert any("`verdict.subspace_rank` was 4, is 8" in problem for problem in verify_run(out))


def test_a_callback_that_does_not_exist_is_refused_before_the_run(tiny_recipe, tmp_path):
    with pytest.raises(MechsubError, match="`nowhere:nothing` cannot be loaded"):
        run(tiny_recipe, tmp_path / "run", "callbacks=['nowhere:nothing']")
    assert not (tmp_path / "run").exists()


KILLS = 2


def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(tiny_recipe, tiny_run, tmp_path):
    out = tmp_path / "killed"
    settings = ["--set", "student.epochs=60", "--set", "student.batch_size=8", "--set", "teacher.epochs=40"]
    settings += ["--set", "checkpoints.resume_seconds=0.5"]
    settings += ["--set", "conditions={same-init: {sham: true}, all-logits: }"]
    command = [sys.executable, "-m", "mechsub", "run", str(tiny_recipe), "--out", str(out), "--device", "cpu", *settings]
    chance = random.Random(0)
    interrupted = 0
    for attempt in range(KILLS):
        before = set(out.glob("lineages/*/*"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        started = time.monotonic()
        while set(out.glob("lineages/*/*")) == before and process.poll() is None and time.monotonic() - started < 60:
            time.sleep(0.02)  # past the imports, where a kill has nothing to disturb
        time.sleep(chance.uniform(0.0, 0.6))
        if process.poll() is None:
            interrupted += 1
            # Half of the kills take the parent only: its workers must notice and free their locks.
            os.kill(process.pid, signal.SIGKILL) if attempt % 2 else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until the last worker has let go of its end of the pipe
    assert interrupted == KILLS
    run(tiny_recipe, out, *settings[1::2])
    assert verify_run(out) == []
    run(tiny_recipe, tmp_path / "undisturbed", *settings[1::2])
    assert output_hashes(out) == output_hashes(tmp_path / "undisturbed")
    assert not [*out.rglob("resume*"), *out.rglob("*.part"), *out.rglob("*.progress")]
