import numpy as np
import pytest

from mechsub.api import open_directions, run_experiment
from mechsub.cases import last_displacement
from mechsub.errors import RunDirectoryError
from mechsub.parameters.alignment import MODEL


@pytest.fixture(scope="module")
def data(tiny_run):
    return tiny_run.results["parameter_alignment"]


def test_a_teacher_ends_at_its_own_displacement_and_grows_towards_it(tiny_run, data):
    own = data.teacher_alignment.sel(scope=MODEL)
    assert list(own.teacher.values) == [*tiny_run.traits, "neutral"]
    np.testing.assert_allclose(own.isel(teacher_step=-1), 1.0, atol=1e-12)
    norms = data.teacher_path_norm.sel(scope=MODEL)
    assert (norms.isel(teacher_step=-1) > norms.isel(teacher_step=0)).all()


def test_at_the_teachers_last_step_the_trajectory_is_the_alignment(data):
    last = data.trajectory_alignment.isel(teacher_step=-1).transpose("condition", "taught", "member", "step")
    np.testing.assert_allclose(last, data.alignment.sel(scope=MODEL), atol=1e-12)


def test_students_against_each_other_are_symmetric_and_agree_with_the_stored_inner_products(tiny_run, data):
    table = data.alignment_between_students.sel(scope=MODEL)
    np.testing.assert_allclose(table, table.transpose("other_student", "student", "member"), atol=1e-12)
    for student in table.student.values:
        np.testing.assert_allclose(table.sel(student=student, other_student=student), 1.0, atol=1e-12)
    labels = [last_displacement(tiny_run.student(name, tiny_run.traits[0])) for name in ("same-init", "noised-init")]
    stored = open_directions(tiny_run.path).cosine(*labels).sel(scope=MODEL)
    np.testing.assert_allclose(table.sel(student="same-init", other_student="noised-init"), stored, atol=1e-12)


def test_without_stored_inner_products_the_next_step_is_said(tiny_recipe, tmp_path):
    run = run_experiment(tiny_recipe, tmp_path / "run", ["conditions={same-init: }", "members=2"], device="cpu", workers=0)
    with pytest.raises(RunDirectoryError, match="mechsub analyze .* --only parameter_alignment"):
        open_directions(run.path)
