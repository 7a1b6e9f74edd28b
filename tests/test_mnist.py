"""The published setting on the real images, where they are at hand: their counts, the plan, a teacher that learns to read."""

from pathlib import Path

import pytest

from mechsub.api import plan_experiment, run_experiment
from mechsub.families.classifier.config import DataConfig
from mechsub.families.classifier.data import describe_data

MNIST = Path(__file__).parent.parent.parent / "shared/data/mnist"
pytestmark = pytest.mark.skipif(not MNIST.is_dir(), reason=f"MNIST's IDX files are not in {MNIST}")


def test_the_plan_is_the_published_one(tmp_path):
    shape = describe_data(DataConfig(name="mnist", path=str(MNIST)))
    assert (shape.num_train, shape.num_test, shape.num_pixels) == (60_000, 10_000, 784)
    plan = plan_experiment("mnist", tmp_path / "run", [f"data.path={MNIST}"])
    steps = {stage.name: stage.arguments["steps"][-1] for stage in plan.stages if "steps" in stage.arguments}
    assert steps["teacher"] == steps["student.same-init"] == 295
    assert plan.recipe.members == 25 and plan.recipe.model.hidden_widths == (256, 256)


def test_one_epoch_teaches_the_teacher_to_read(tmp_path):
    settings = [f"data.path={MNIST}", "members=2", "teacher.epochs=1", "student.epochs=1", "carrier.num_images=2048"]
    run = run_experiment("mnist", tmp_path / "run", [*settings, "conditions={same-init: }"], device="cpu")
    scores = {}
    for name in ("reference", "teacher"):
        lineage = run.lineages[name]
        model = run.family.load_model(lineage, lineage.last, 1)
        scores[name] = float(run.family.trait_score(model, lineage, 1)["trait_score"][0, 0])
    assert scores["reference"] < 0.3 < 0.8 < scores["teacher"]
