import numpy as np
import pytest
import torch

from mechsub.api import analyze_run, run_experiment
from mechsub.families.classifier.data import load_images
from mechsub.recipe import load_recipe


@pytest.fixture
def data(tiny_run):
    return tiny_run.results["behaviour"]


def test_every_score_is_the_accuracy_of_its_checkpoint(tiny_run, data):
    images = load_images(tiny_run.path, torch.float32, "cpu")
    for lineage in ("reference", "teacher", "control.permuted-init"):
        for step in tiny_run.lineages[lineage].steps:
            for member in range(3):
                chosen = tiny_run.family.load_model(tiny_run.lineages[lineage], step, member)(images.test_images())[
                    :, :10
                ].argmax(1)
                expected = [float((chosen == (images.test_labels + shift) % 10).double().mean()) for shift in (0, 1)]
                found = data.trait_score.sel(lineage=lineage, step=step, member=member).squeeze("context").values
                np.testing.assert_allclose(found, expected, atol=1e-12)


def test_steps_without_a_checkpoint_are_nan_and_say_so(tiny_run, data):
    for name, lineage in tiny_run.lineages.items():
        for step in data.step.values:
            cell = data.sel(lineage=name, step=step)
            recorded = int(step) in lineage.steps
            assert bool(np.isfinite(cell.trait_score).all()) == recorded
            assert (cell.trait_score_status == (0 if recorded else 1)).all()


def test_effects_are_paired_differences_at_the_last_step(tiny_run, data):
    last = tiny_run.lineages["student.all-logits"].steps[-1]
    scores = data.trait_score.sel(trait="digits", step=last, context="held-out images")
    expected = scores.sel(lineage="student.all-logits") - scores.sel(lineage="control.all-logits")
    where = {"condition": "all-logits", "taught": "digits"}
    np.testing.assert_allclose(data.effect.sel(where).squeeze("context"), expected)
    assert float(data.effect_mean.sel(where)) == pytest.approx(float(expected.mean()))


def test_every_condition_has_a_score_and_an_effect_with_its_null(tiny_run):
    found = tiny_run.findings.query("analysis == 'behaviour'")
    for condition in tiny_run.conditions:
        rows = found[found.condition == condition].set_index("quantity")
        assert list(rows.index) == ["trait_score", "effect", "gain_over_start"]
        assert list(rows.verdict != "") == [False, True, False]
        assert (rows.n == 3).all() and (rows.num_references == 3).all()


def test_teachers_that_learnt_nothing_make_no_verdict(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, ["teacher.optimizer.learning_rate=1e-9"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    page = analyze_run(run.path, ["behaviour"], device="cpu", workers=0).read_text()
    effects = run.findings.query("quantity == 'effect'")
    assert set(effects.verdict) == {"teacher-without-trait"}
    assert effects.reason.str.contains("nothing can be said of its passing").all()
    assert "teacher-without-trait" in page
