"""cross_architecture: what it measures on a tiny run, and one matrix of several runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mechsub.analyses.cross_architecture import cross_architecture
from mechsub.api import analyze_sweep, compare_runs, open_run, open_sweep, run_sweep
from mechsub.checkpoints import load_stacked, write_tensors
from mechsub.findings import FIELDS
from mechsub.results import read_result

CROSS = """
name: tiny-cross
family: classifier
members: 3
models:
  mlp: {hidden_widths: [12, 8], dtype: float64}
  cnn: {channels: [4, 6], hidden_widths: [8], dtype: float64}
model: mlp
teacher: {epochs: 2, batch_size: 128, optimizer: {learning_rate: 0.01}}
carrier: {num_images: 96}
student: {epochs: 2, batch_size: 32, optimizer: {learning_rate: 0.01}}
conditions:
  same-init:
  to-cnn: {model: cnn, init: different}
  to-mlp-heads: {model: mlp, init: different, shared: [class-head, auxiliary-head]}
  permuted-init:
  shuffled-carrier:
checkpoints: {num: 3}
verdict: {minimum_members: 3}
sweep: {fields: {model: [mlp, cnn]}}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross")
    (folder / "cross.yaml").write_text(CROSS)
    run_sweep(folder / "cross.yaml", folder / "sweep", device="cpu", workers=0)
    analyze_sweep(folder / "sweep", ["cross_architecture", "behaviour"], device="cpu", workers=0)
    return folder / "sweep"


@pytest.fixture(scope="module")
def runs(sweep):
    return open_sweep(sweep)


def test_the_effects_are_those_of_the_behaviour_analysis(runs):
    for run in runs.values():
        own, known = run.results["cross_architecture"], run.results["behaviour"]
        for condition in own.condition.values:
            expected = known.effect.sel(condition=condition).isel(context=0, taught=0).values
            np.testing.assert_allclose(own.effect_on.sel(condition=condition).values[0, 0], expected)


def test_only_conditions_that_differ_in_start_or_architecture_are_cells(runs):
    assert runs["model=mlp"].results["cross_architecture"].condition.values.tolist() == [
        "same-init",
        "to-cnn",
        "to-mlp-heads",
        "permuted-init",
    ]


def test_what_is_incomparable_says_why(runs):
    data = runs["model=mlp"].results["cross_architecture"]
    assert "tensors differ" in data.why_incomparable.sel(condition="to-cnn").item()
    assert data.why_incomparable.sel(condition="to-mlp-heads").item() == ""


def test_output_kl_is_that_of_the_two_models_answers(runs):
    run = runs["model=mlp"]
    data, member = run.results["cross_architecture"], 1
    images, _ = run.family.probe_inputs(run.reference)
    teacher, student = (run.teacher("digits"), run.student("to-cnn", "digits"))
    with torch.no_grad():
        logits = [run.family.load_model(one, one.last, member)(images)[:, :10].log_softmax(-1) for one in (teacher, student)]
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    found = data.output_kl.sel(condition="to-cnn", member=member, probe="classes of held-out images").item()
    assert found == pytest.approx(expected, rel=1e-9)


def test_starts_that_are_the_teachers_own_function_answer_as_it_does(runs):
    data = runs["model=mlp"].results["cross_architecture"]
    for condition in ("same-init", "permuted-init"):
        assert np.abs(data.start_kl.sel(condition=condition).values).max() < 1e-12
    assert data.start_kl.sel(condition="to-cnn", probe="classes of held-out images").values.min() > 1e-3


def test_a_permuted_student_is_as_like_its_teacher_as_the_matched_one(runs):
    data = runs["model=mlp"].results["cross_architecture"]
    for name in ("output_kl", "cka"):
        np.testing.assert_allclose(
            data[name].sel(condition="permuted-init").values, data[name].sel(condition="same-init").values, atol=1e-6
        )


def test_models_of_other_depths_are_compared_at_the_same_share_of_the_way(runs):
    data = runs["model=mlp"].results["cross_architecture"]
    assert np.isfinite(data.cka.sel(condition="to-cnn")).all()
    assert data.depth.values.tolist() == ["first", "middle", "last"]


def test_every_verdict_says_what_would_have_counted(runs):
    judged = [one for one in read_result(runs["model=cnn"].path / "results/cross_architecture.h5").findings if one.verdict]
    assert len(judged) == 4
    assert all(one.rule and one.reason and one.n == 3 for one in judged)


def test_a_sweeps_matrix_holds_the_cells_of_all_runs_and_opens_its_page(sweep):
    matrix = read_result(sweep / "results" / "matrix.h5")
    assert sorted(set(matrix.data.teacher_of_cell.values)) == ["cnn", "mlp"]
    assert len(matrix.data.cell) == 8
    assert all(
        "Holm's correction over 8" in one.rule for one in matrix.findings if one.verdict not in {"teacher-without-trait"}
    )
    page = (sweep / "report" / "index.html").read_text()
    assert page.index("What was found") < page.index("Which architecture passes its trait") < page.index("Every run")
    assert set(FIELDS) <= set(vars(matrix.findings[0]))


def test_a_run_whose_students_all_start_as_their_teachers_lacks_what_it_needs(tiny_run):
    run = open_run(tiny_run.path)
    assert run.lacks("starts") is None
    only = run.recipe.model_copy(update={"conditions": {"same-init": run.recipe.conditions["same-init"]}})
    object.__setattr__(run, "recipe", only)
    assert "mechsub run digits-cross" in run.lacks("starts")


def test_a_damaged_model_costs_its_own_cell(runs, tmp_path):
    copied = shutil.copytree(runs["model=mlp"].path, tmp_path / "run")
    run = open_run(copied)
    student = run.student("to-cnn", "digits")
    path = student.checkpoint(student.last)
    tensors = {name: tensor.clone() for name, tensor in load_stacked(path).items()}
    tensors["class_head.weight"][1] = float("nan")
    write_tensors(Path(path), tensors, {})
    result = cross_architecture(open_run(copied))
    data = result.data
    assert np.isnan(data.effect_on.sel(condition="to-cnn")).values[0, 0].tolist() == [False, True, False]
    assert np.isfinite(data.effect_on.sel(condition="same-init")).all()
    assert {one.condition: one.verdict for one in result.findings if one.verdict}["to-cnn"] == "too-few-members"


def test_a_comparison_of_runs_that_have_nothing_else_shows_their_matrix(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "sweep")
    for record in tmp_path.glob("sweep/runs/*/stages/*.json"):
        if json.loads(record.read_text())["name"] == "analysis.behaviour":
            record.unlink()
    for result in tmp_path.glob("sweep/runs/*/results/behaviour.h5"):
        result.unlink()
    page = compare_runs(tmp_path / "sweep", tmp_path / "out")
    assert read_result(page.with_suffix(".h5")).data.section.values.tolist() == ["matrix"]
    assert "behaviour, parameter_alignment" in page.read_text()
