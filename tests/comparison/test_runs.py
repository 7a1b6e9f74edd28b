import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechsub.comparison.runs import identify_replicates, name_runs, pair_members
from mechsub.errors import RunDirectoryError
from mechsub.rundir import RunDirectory
from tests.comparison.made_up import make, make_run, read, record

ONE = {"same-init": {"owl": [0.1, 0.2, 0.3]}}


def test_members_of_runs_with_the_same_references_are_the_same_replicates(tmp_path):
    first, same = make(tmp_path / "first", ONE), make(tmp_path / "same", ONE)
    other = make(tmp_path / "other", ONE, reference="another θ₀")
    assert pair_members(first, same) == [(0, 0), (1, 1), (2, 2)]
    assert pair_members(first, other) == [] and len({*first.replicates}) == 3


def members_of(path, references, teachers):
    """A run with a folder a member."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"schema": 3}))
    for lineage, contents in (("reference.base", references), ("teacher.owl", teachers)):
        for member, content in enumerate(contents):
            folder = path / "lineages" / lineage / f"member-{member:03}"
            folder.mkdir(parents=True)
            (folder / "step-00000000.safetensors").write_text(content)
            (folder / "lineage.json").write_text(json.dumps({"origin": {"lineage": "reference.base"}}))
            names = [file.relative_to(path).as_posix() for file in folder.iterdir()]
            record(path, f"{lineage}.{member}", names)
    return identify_replicates(RunDirectory.open(path), len(references))


def test_members_with_folders_of_their_own_are_told_one_by_one(tmp_path):
    few, more = members_of(tmp_path / "few", "ab", "st"), members_of(tmp_path / "more", "acb", "xyz")
    assert few == (more[0], more[2])


def stacked(path, members):
    """A run whose one file holds all members."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"schema": 3}))
    for lineage in ("reference", "teacher.owl"):
        folder = path / "lineages" / lineage
        folder.mkdir(parents=True)
        values = np.array(members, dtype=np.float32)[:, None] * np.ones(4, dtype=np.float32)
        save_file({"layer.weight": values, "layer.bias": values[:, 0]}, folder / "step-00000000.safetensors")
        (folder / "lineage.json").write_text(json.dumps({"origin": {"lineage": "reference"}}))
        record(path, lineage, [file.relative_to(path).as_posix() for file in folder.iterdir()])
    return identify_replicates(RunDirectory.open(path), len(members))


def test_members_that_share_a_file_are_the_same_beside_more_of_them(tmp_path):
    few, more = stacked(tmp_path / "few", [1, 2]), stacked(tmp_path / "more", [1, 3, 2])
    assert few == (more[0], more[2]) and len({*more}) == 3


def test_one_reference_for_all_is_no_replicate_until_the_teachers_are_the_same_too(tmp_path):
    first = members_of(tmp_path / "first", "aa", "st")
    assert first == members_of(tmp_path / "same", "aa", "st") and len({*first}) == 2
    assert not {*first} & {*members_of(tmp_path / "other", "aa", "xy")}
    assert members_of(tmp_path / "copies", "aa", "ss") == ("", "")


def test_a_run_without_any_record_proves_nothing(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"schema": 3}))
    assert identify_replicates(RunDirectory.open(tmp_path), 2) == ("", "")


def test_names_are_the_shortest_ends_that_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a/digits", tmp_path / "b/digits", tmp_path / "c/runs/other"]
    assert name_runs(paths) == ["a/digits", "b/digits", "c/other"]
    assert name_runs(paths[1:]) == ["digits", "other"]


def test_a_directory_given_twice_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"given twice: .*/run"):
        name_runs([tmp_path / "run", tmp_path / "link"])


def test_a_result_that_the_run_has_outgrown_is_told_apart_from_one_that_was_never_made(tmp_path):
    path = tmp_path / "run"
    make_run(path, ONE)
    (path / "lineages/student").mkdir()
    (path / "lineages/student/lineage.json").write_text("{}")
    record(path, "student", ["lineages/student/lineage.json"])
    from_disk = make(tmp_path / "fresh", ONE)
    assert "behaviour" in from_disk.results and from_disk.lacks["gradient_overlap"] == "not measured"
    assert read(path).lacks["behaviour"] == "measured before the run was changed" and not read(path).results


def test_a_result_that_changed_on_the_disk_is_refused(tmp_path):
    path = tmp_path / "run"
    make_run(path, ONE)
    with (path / "results/behaviour.h5").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RunDirectoryError, match=r"behaviour\.h5 has changed"):
        read(path)
