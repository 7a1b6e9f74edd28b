"""Knock-out in the classifier: the same numbers as a plain loop, whoever is trained beside it, also after a stop."""

import json

import pytest
import torch
from torch.nn import functional

from mechsub.api import plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.classifier.carrier import CarrierImages
from mechsub.families.classifier.data import load_images
from mechsub.families.classifier.stack import BatchOrder
from mechsub.recipe import load_recipe
from mechsub.run import Run
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo
from tests.helpers import output_hashes

CONDITIONS = {
    "same-init": "",
    "knock-out-trait": "{knock_out: {when: always, num_images: 50}}",
    "knock-out-random": "{knock_out: {num_images: 50}}",
    "of-updates": "{knock_out: {where: update, refresh: 4, num_images: 50}}",
    "everywhere": "{knock_out: {scope: model, num_images: 50}, sham: true}",
}
MEMBER = 1
_stopped: set[str] = set()


def stop_once(info: StepInfo) -> None:
    """A callback that ends the students' first training, all side by side, after a refresh and before its end."""
    if info.step == 5 and info.lineage.startswith("student") and not _stopped:
        _stopped.add(info.lineage)
        raise RuntimeError("stopped")


def conditions(*names: str) -> str:
    return "conditions={" + ", ".join(f"{name}: {CONDITIONS[name]}" for name in names) + "}"


def run(recipe, out, *settings) -> Run:
    return run_experiment(load_recipe(recipe, ["model.dtype=float64", *settings]), out, device="cpu", workers=0)


@pytest.fixture(scope="module")
def knocked_run(tiny_recipe, tmp_path_factory):
    return run(tiny_recipe, tmp_path_factory.mktemp("knocked") / "run", conditions(*CONDITIONS))


def flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("role", ["student", "control"])
@pytest.mark.parametrize("condition", ["knock-out-trait", "of-updates", "everywhere"])
def test_students_and_controls_follow_the_slow_way(knocked_run, role, condition):
    """One member alone: plain modules, all weights in one vector, the published projection, torch's Adam."""
    teacher = knocked_run.teacher("digits") if role == "student" else knocked_run.neutral
    wanted_model = knocked_run.family.load_model(teacher, teacher.last, MEMBER)
    model, config = knocked_run.family.load_model(knocked_run.reference, 0, MEMBER), knocked_run.recipe
    carrier = CarrierImages(config.carrier, config.seed, [MEMBER], 64, torch.float64, "cpu")
    order = BatchOrder(config.seed, [("member", MEMBER, "student-order", 0)], 96, 32)
    labelled = load_images(knocked_run.path, torch.float64, "cpu")
    moved = [p for name, p in model.named_parameters() if condition == "everywhere" or "class_head" not in name]
    optimizer = torch.optim.Adam(moved, lr=config.student.optimizer.learning_rate)
    for step in range(6):
        if step % (4 if condition == "of-updates" else 1) == 0:
            chosen = random_stream(0, "member", MEMBER, "knock-out-images", 0, step).choice(1438, 50, replace=False)
            scores = model(labelled.train_images(torch.from_numpy(chosen)))[:, :10]
            loss = functional.cross_entropy(scores, labelled.train_labels[chosen])
            found = torch.autograd.grad(loss, moved, allow_unused=True)
            trait = flatten([torch.zeros_like(p) if g is None else g for p, g in zip(moved, found, strict=True)])
        images = carrier.make(order.indices(step))[0]
        wanted = wanted_model(images)[:, 10:].log_softmax(-1).detach()
        model.zero_grad()
        functional.kl_div(model(images)[:, 10:].log_softmax(-1), wanted, log_target=True, reduction="batchmean").backward()
        before = flatten(moved).detach()
        if condition != "of-updates":
            gradient = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in moved])
            if condition == "knock-out-trait" or gradient @ trait > 0:
                gradient = gradient - (gradient @ trait) / (trait @ trait) * trait
            for parameter, part in zip(moved, gradient.split([p.numel() for p in moved]), strict=True):
                parameter.grad = part.view_as(parameter)
        optimizer.step()
        update = flatten(moved).detach() - before
        if condition == "of-updates" and -update @ trait > 0:
            update = update - (update @ trait) / (trait @ trait) * trait
            torch.nn.utils.vector_to_parameters(before + update, moved)
    lineage = knocked_run.lineages[f"{role}.{condition}"]
    trained = lineage.load_state(6, MEMBER)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-7, atol=1e-9)


def test_only_knock_outs_over_all_weights_move_a_head_that_is_not_imitated(knocked_run):
    for condition in CONDITIONS:
        student = knocked_run.student(condition, "digits")
        first, last = (student.load_state(step, MEMBER)["class_head.weight"] for step in (0, 6))
        assert torch.equal(first, last) == (condition != "everywhere")


def test_lineages_do_not_depend_on_what_is_trained_beside_them(knocked_run, tiny_recipe, tmp_path):
    for name in CONDITIONS:
        few = run(tiny_recipe, tmp_path / name, conditions(name))
        found, known = output_hashes(few.path, "lineages/"), output_hashes(knocked_run.path, "lineages/")
        assert found.items() <= known.items()


def test_members_do_not_depend_on_their_number_nor_on_blocks(knocked_run, tiny_recipe, tmp_path, monkeypatch):
    more = run(tiny_recipe, tmp_path / "more", conditions(*CONDITIONS), "members=4")
    monkeypatch.setattr("mechsub.families.classifier.stages._CACHE_BYTES", 1)
    apart = run(tiny_recipe, tmp_path / "apart", conditions(*CONDITIONS))
    for name, lineage in knocked_run.lineages.items():
        for member in range(3):
            found, many, alone = (each.lineages[name].load_state(lineage.last, member) for each in (knocked_run, more, apart))
            for tensor, value in found.items():
                assert torch.equal(many[tensor], value), name
                torch.testing.assert_close(alone[tensor], value, rtol=1e-7, atol=1e-9)


def test_a_training_that_was_stopped_between_refreshes_goes_on_to_the_same_numbers(knocked_run, tiny_recipe, tmp_path):
    settings = [conditions(*CONDITIONS), "checkpoints.resume_seconds=0", f"callbacks=['{__name__}:stop_once']"]
    with pytest.raises(MechsubError, match="stop_once"):
        run(tiny_recipe, tmp_path / "run", *settings)
    assert json.loads((tmp_path / "run/lineages/student.of-updates/resume.json").read_text())["step"] == 4
    resumed = run(tiny_recipe, tmp_path / "run", *settings)
    for name, lineage in knocked_run.lineages.items():
        for member in range(3):
            found, known = (each.lineages[name].load_state(lineage.last, member) for each in (resumed, knocked_run))
            assert all(torch.equal(found[tensor], known[tensor]) for tensor in known), name


def test_a_known_condition_keeps_its_component_and_may_be_tuned(tiny_recipe):
    tuned = load_recipe(tiny_recipe, ["conditions={knock-out-random: {knock_out: {where: update}}}"])
    assert tuned.conditions["knock-out-random"].knock_out.component == "random"
    assert tuned.conditions["knock-out-random"].knock_out.where == "update"
    words = [load_recipe(tiny_recipe, [conditions(name)]).conditions[name].describe() for name in CONDITIONS]
    assert words[1:] == [
        "the trait gradient projected out of the imitation gradient, in every step",
        "a random direction of the trait gradient's size projected out of the imitation gradient, only in steps along it",
        "the trait gradient projected out of the optimizer's update, only in steps that would lower the trait loss, "
        "computed every 4 steps",
        "the trait gradient projected out of the imitation gradient, only in steps that would lower the trait loss, "
        "over all weights, imitated or not",
    ]


def test_plans_know_that_a_knock_out_needs_more_memory(tiny_recipe, tmp_path):
    plan = plan_experiment(load_recipe(tiny_recipe, [conditions("same-init", "knock-out-trait")]), tmp_path / "run")
    memory = {stage.name: stage.resources.memory_bytes for stage in plan.stages}
    assert memory["student.knock-out-trait"] > memory["student.same-init"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{knock-out-trait: {knock_out: {component: random}}}", "knock-out-trait means .* needs another name"),
        ("{knock-out-trait: {knock_out: }}", "needs another name"),
        ("{mine: {knock_out: {num_images: 5000}}}", "num_images` = 5000, but there are 1438 training images"),
        ("{mine: {knock_out: {component: liminal}}}", "liminal"),
        ("{mine: {knock_out: {often: 3}}}", "unknown key `conditions.mine.knock_out.often`"),
    ],
)
def test_a_knock_out_that_cannot_be_is_refused(tiny_recipe, tmp_path, setting, message):
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(tiny_recipe, [f"conditions={setting}"]), tmp_path / "run")
