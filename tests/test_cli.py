"""The commands as a person types them: exit codes, messages without tracebacks, nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from mechsub.api import run_experiment, verify_run
from mechsub.cli import app
from mechsub.rundir import RunDirectory


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_command():
    found = invoke("--help")
    assert found.exit_code == 0
    assert all(name in found.output for name in ("run", "analyze", "report", "verify", "list", "doctor"))


def test_lists_name_what_is_installed():
    assert "digits" in invoke("list", "recipes").output
    assert "parameter_alignment" in invoke("list", "analyses").output
    assert invoke("list", "flavours").exit_code == 2


def test_a_dry_run_prints_the_plan(tiny_recipe, tmp_path):
    found = invoke("run", tiny_recipe, "--out", tmp_path / "out", "--dry-run")
    assert found.exit_code == 0
    assert "student.same-init" in found.output and "22 stages to do" in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digts"], "did you mean `digits`"),
        (["run", "digits", "--set", "student.epoch=3"], "did you mean `epochs`"),
        (["run", "digits", "--set", "members=0"], "`members` = 0"),
        (["analyze", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["verify", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_exits_with_2_and_a_bare_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert found.output.startswith("mechsub: ") and message in found.output
    assert "Traceback" not in found.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    found = invoke("--debug", "analyze", "nowhere")
    assert found.exception is not None and "does not exist" in str(found.exception)


def test_verify_exits_with_1_when_a_file_has_changed(tiny_run, tiny_recipe, tmp_path):
    assert invoke("verify", tiny_run.path).exit_code == 0
    run_experiment(tiny_recipe, tmp_path / "run", device="cpu", workers=0)
    (tmp_path / "run/lineages/reference/lineage.json").write_text("{}")
    found = invoke("verify", tmp_path / "run")
    assert found.exit_code == 1 and "lineage.json has changed" in found.output


def test_analyze_names_the_report(tiny_run):
    found = invoke("analyze", tiny_run.path)
    assert found.exit_code == 0
    assert str(tiny_run.path / "report/index.html") in found.output.replace("\n", "")
    assert "left out: semantic_filter: There is no text" in found.output


def test_a_stage_in_other_hands_is_named(tiny_recipe, tiny_run):
    with RunDirectory(tiny_run.path).lock("run"):
        found = invoke("run", tiny_recipe, "--out", tiny_run.path)
    assert found.exit_code == 2 and "is being worked on by process" in found.output


def test_doctor_tells_versions_and_hardware():
    found = invoke("doctor")
    assert found.exit_code == 0 and "torch:" in found.output and "cores:" in found.output


def test_ctrl_c_exits_with_130_and_the_run_goes_on_later(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mechsub", "run", str(tiny_recipe), "--out", str(out), "--set", "student.epochs=150"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job is born deaf to it
    )
    while not list(out.glob("lineages/*/*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; what was done is kept" in said and "Traceback" not in said
    run_experiment(tiny_recipe, out, ["student.epochs=150"], device="cpu", workers=0)
    assert verify_run(out) == []
