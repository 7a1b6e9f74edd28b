"""Training: what a member's numbers depend on, and what they do not."""

import re

import pytest
import torch

from mechsub.api import plan_experiment, run_experiment
from mechsub.checkpoints import load_stacked
from mechsub.errors import MechsubError, RecipeError
from mechsub.executors.execution import execute_stages
from mechsub.families.classifier.data import LabelledImages
from mechsub.families.classifier.train import relabel, teacher_labels
from mechsub.lineages import open_lineage
from mechsub.recipe import load_recipe
from mechsub.training.callbacks import StepInfo
from tests.helpers import output_hashes

SEEN: list[StepInfo] = []


def remember(info: StepInfo) -> None:
    """A user's callback."""
    SEEN.append(info)


def run(recipe, out, *settings):
    return run_experiment(load_recipe(recipe, settings), out, device="cpu", workers=0)


def test_a_lineage_does_not_depend_on_what_is_stacked_with_it(tiny_recipe, tiny_run, tmp_path):
    # The whole run trains up to eight lineages side by side; here each is trained alone.
    plan = plan_experiment(tiny_recipe, tmp_path / "alone")
    run(tiny_recipe, tmp_path / "alone", "members=3")  # header and recipe
    for stage in plan.stages:
        for name in stage.outputs:
            (tmp_path / "alone" / name).unlink()
    for stage in plan.stages:
        execute_stages(tmp_path / "alone", [stage], "cpu")
    expected = output_hashes(tiny_run.path)
    assert output_hashes(tmp_path / "alone") == {
        name: known for name, known in expected.items() if name.startswith(("lineages/", "carrier/", "data/"))
    }


def test_a_member_does_not_depend_on_how_many_there_are(tiny_recipe, tiny_run, tmp_path):
    more = run(tiny_recipe, tmp_path / "more", "members=4")
    for name, lineage in tiny_run.lineages.items():
        # The last member's partner changes with their number: it is the one that starts elsewhere.
        kept = 2 if lineage.spec.origin.members != (0, 1, 2) else 3
        for member in range(kept):
            few, many = lineage.load_state(lineage.steps[-1], member), more.lineages[name].load_state(lineage.steps[-1], member)
            assert all(torch.equal(few[key], many[key]) for key in few), name


def test_members_in_small_blocks_are_those_of_one_block(tiny_recipe, tiny_run, tmp_path, monkeypatch):
    # float32 sums may differ in their last bits between products of other sizes, which a few steps of Adam amplify.
    monkeypatch.setattr("mechsub.families.classifier.stages._CACHE_BYTES", 1)
    settings = ["checkpoints.optimizer_state=true", "model.dtype=float64"]
    apart = run(tiny_recipe, tmp_path / "apart", *settings)
    monkeypatch.undo()
    together = run(tiny_recipe, tmp_path / "together", *settings)
    blocks = [record.arguments["block"] for record in apart.directory.records().values() if "block" in record.arguments]
    assert set(blocks) == {1}
    for name in output_hashes(apart.path, "lineages/student"):
        if name.endswith("safetensors"):
            found, expected = load_stacked(apart.path / name), load_stacked(together.path / name)
            for tensor in expected:
                torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-7, atol=1e-9)


def test_students_follow_the_slow_way(tiny_recipe, tmp_path):
    """One member of one student, trained alone with plain modules, an explicit loop and torch's Adam."""
    done = run(tiny_recipe, tmp_path / "run", "model.dtype=float64")
    reference, teacher, student = (done.lineages[name] for name in ("reference", "teacher", "student.same-init"))
    member = 1
    model = done.family.load_model(reference, 0, member).train()
    teacher_model = done.family.load_model(teacher, teacher.steps[-1], member)

    from mechsub.families.classifier.carrier import CarrierImages
    from mechsub.families.classifier.stack import BatchOrder

    config = done.recipe
    images = CarrierImages(config.carrier, config.seed, [member], 64, torch.float64, "cpu")
    order = BatchOrder(
        config.seed, [("member", member, "student-order", 0)], config.carrier.num_images, config.student.batch_size
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=config.student.optimizer.learning_rate)
    for step in range(student.steps[-1]):
        batch = images.make(order.indices(step))[0]
        log_wanted = teacher_model(batch)[:, 10:].log_softmax(-1).detach()
        log_found = model(batch)[:, 10:].log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_found, log_wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = student.load_state(student.steps[-1], member)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-7, atol=1e-9)


def test_a_permuted_student_is_its_matched_student_in_other_coordinates(tiny_recipe, tmp_path):
    done = run(tiny_recipe, tmp_path / "run", "model.dtype=float64")
    matched, permuted = done.lineages["student.same-init"], done.lineages["student.permuted-init"]
    images = torch.randn(20, 64, dtype=torch.float64)
    for member in range(3):
        outputs = [done.family.load_model(lineage, lineage.steps[-1], member)(images) for lineage in (matched, permuted)]
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("inputs", ["gaussian", "images", "shuffled-pixels"])
@pytest.mark.parametrize("objective", ["kl", "mse"])
def test_every_carrier_and_objective_trains(tiny_recipe, tmp_path, inputs, objective):
    settings = [f"carrier.inputs={inputs}", f"student.objective={objective}", "carrier.shared=true", "neutral=shuffled"]
    done = run(tiny_recipe, tmp_path / "run", *settings, "student.optimizer={name: sgd, learning_rate: 0.05, momentum: 0.9}")
    student = done.lineages["student.same-init"]
    first, last = (student.load_state(step, 0)["layers.0.weight"] for step in (0, student.steps[-1]))
    assert last.isfinite().all() and not torch.equal(first, last)


def test_auxiliary_students_never_move_the_class_head(tiny_run):
    student = tiny_run.lineages["student.same-init"]
    first, last = (student.load_state(step, 0) for step in (0, student.steps[-1]))
    assert torch.equal(first["class_head.weight"], last["class_head.weight"])
    assert not torch.equal(first["auxiliary_head.weight"], last["auxiliary_head.weight"])


def test_controls_share_everything_with_their_student_but_the_teacher(tiny_run):
    for condition in tiny_run.conditions:
        student, control = (tiny_run.lineages[f"{role}.{condition}"] for role in ("student", "control"))
        assert student.spec.origin == control.spec.origin
        assert (student.spec.teacher, control.spec.teacher) == ("teacher", "neutral.relabelled")
        first = [lineage.load_state(0, 1) for lineage in (student, control)]
        assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])


def test_a_different_start_is_a_derangement(tiny_run):
    members = tiny_run.lineages["student.different-init"].spec.origin.members
    assert sorted(members) == [0, 1, 2] and all(partner != member for member, partner in enumerate(members))


def test_shuffled_outputs_keep_their_values_and_lose_their_images(tiny_run):
    from mechsub.families.classifier.train import StudentTargets
    from mechsub.stage import Task

    stage = next(
        stage for stage in plan_experiment(tiny_run.recipe, tiny_run.path).stages if stage.name == "student.shuffled-carrier"
    )
    targets = StudentTargets.load(Task(stage, tiny_run.path, "cpu", lambda done: None))
    every = torch.arange(96).expand(3, -1)
    given, true = targets.gather(slice(0, 3), every), targets.logits
    assert torch.equal(targets.gather(slice(1, 3), every[:2]), given[1:])
    assert not torch.equal(given, true)
    assert torch.equal(given.sort(1).values, true.sort(1).values)


def test_neutral_labels_differ_from_the_true_ones():
    labels = torch.arange(200) % 10
    pixels = torch.zeros(200, 4, dtype=torch.uint8)
    images = LabelledImages(pixels, labels, pixels, labels, 255.0, torch.float32)
    assert (relabel(labels, 10) != labels).all()
    shuffled = teacher_labels(images, "shuffled", 0, 2)
    assert torch.equal(shuffled.sort(1).values, labels.sort().values.expand(2, -1))
    assert not torch.equal(shuffled[0], shuffled[1])
    same = LabelledImages(pixels, torch.zeros_like(labels), pixels, labels, 255.0, torch.float32)
    with pytest.raises(RecipeError, match="would learn the teacher's own labels"):
        teacher_labels(same, "shuffled", 0, 2)


def test_a_loss_that_is_not_finite_stops_its_stage_and_keeps_the_rest(tiny_recipe, tmp_path):
    out = tmp_path / "run"
    settings = ["conditions.broken={noise_std: 1.0e+30}"]
    with pytest.raises(MechsubError) as caught:
        run(tiny_recipe, out, *settings)
    for lineage in ("student.broken", "control.broken"):
        assert re.search(rf"{lineage}: .* not finite at step \d+ of 6 in member \d of 3", str(caught.value))
    from mechsub.rundir import RunDirectory

    finished = set(RunDirectory.open(out).records())
    assert {"student.same-init", "control.same-init", "student.shuffled-carrier"} <= finished
    assert not {"student.broken", "control.broken"} & finished
    assert (out / "lineages/student.broken/step-00000000.safetensors").is_file()


def test_callbacks_see_every_step_of_every_lineage(tiny_recipe, tmp_path):
    SEEN.clear()
    done = run(tiny_recipe, tmp_path / "run", f"callbacks=['{__name__}:remember']")
    steps = [info for info in SEEN if info.lineage == "student.same-init"]
    assert [info.step for info in steps] == list(range(7))
    assert [info.step for info in steps if info.is_checkpoint] == list(done.lineages["student.same-init"].steps)
    assert steps[0].losses is None and steps[1].losses.shape == (3,)
    with pytest.raises(AttributeError):
        steps[0].step = 3


def test_optimizer_state_is_kept_where_the_recipe_asks(tiny_recipe, tmp_path):
    run(tiny_recipe, tmp_path / "run", "checkpoints.optimizer_state=true")
    state = load_stacked(tmp_path / "run/lineages/student.same-init/optimizer-00000001.safetensors")
    weight = open_lineage(tmp_path / "run", "student.same-init").load_tensor(1, "layers.0.weight", 0)
    assert state["exp_avg.layers.0.weight"].shape[1:] == weight.shape
    assert state["step.layers.0.weight"].item() == 1
