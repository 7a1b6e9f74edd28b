import json

import pytest

from mechsub.errors import RunDirectoryError, StageHeldError
from mechsub.rundir import SCHEMA_VERSION, RunDirectory, atomic_write, write_json
from mechsub.stage import Stage


@pytest.fixture
def directory(tmp_path):
    write_json(tmp_path / "run.json", {"schema": SCHEMA_VERSION, "versions": {"mechsub": "0"}})
    return RunDirectory.open(tmp_path)


def finished(directory, arguments=None):
    stage = Stage("make", "module:function", arguments or {}, {}, ("data/a.txt",))
    with atomic_write(directory.path / "data/a.txt") as temporary:
        temporary.write_text("abc")
    directory.write_record(stage, 0.1, "0")
    return stage


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"value": float("nan")})


def test_a_stage_is_done_only_with_its_record_and_whole_outputs(directory):
    stage = finished(directory)
    assert directory.is_done(stage)
    assert not directory.is_done(Stage("make", "module:function", {"other": 1}, {}, ("data/a.txt",)))
    (directory.path / "data/a.txt").write_text("ab")
    assert not directory.is_done(stage)


def test_a_changed_file_is_named_with_both_hashes_and_the_way_back(directory):
    finished(directory)
    maker, known = directory.producers()["data/a.txt"]
    directory.check_file("data/a.txt", known, maker)
    (directory.path / "data/a.txt").write_text("abd")
    with pytest.raises(
        RunDirectoryError, match=r"(?s)data/a.txt has changed.*expected sha256 ba7816bf.*found .*delete it and run"
    ):
        directory.check_file("data/a.txt", known, maker)
    (directory.path / "data/a.txt").unlink()
    with pytest.raises(RunDirectoryError, match="is missing"):
        directory.check_file("data/a.txt", known, maker)


def test_a_new_key_takes_the_place_of_the_old_record(directory):
    finished(directory)
    changed = finished(directory, {"other": 1})
    assert [record.key for record in directory.records().values()] == [changed.key]


def test_the_second_process_is_told_who_holds_a_lock(directory):
    with directory.lock("make"), pytest.raises(StageHeldError, match=r"make .* is being worked on by process \d+"):
        RunDirectory(directory.path).lock("make").__enter__()
    with directory.lock("make"):
        pass


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="does not exist"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="no run.json"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99, "versions": {"mechsub": "9.9"}}))
    with pytest.raises(RunDirectoryError, match=r"schema version 99.*mechsub 9.9"):
        RunDirectory.open(tmp_path)


def test_what_cannot_be_written_says_so_and_how_to_go_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"file/x.json cannot be written: .*; free the disk or choose another --out"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(RunDirectoryError, match="cannot be written"), RunDirectory(tmp_path / "file").lock("run"):
        pass
