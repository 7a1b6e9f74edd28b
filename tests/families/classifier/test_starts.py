"""Starts elsewhere: other architectures, shared parts, other starts that answer alike, mixed carriers."""

import pytest
import torch

from mechsub.api import run_experiment
from mechsub.errors import RecipeError
from mechsub.families.classifier.train import StudentTargets
from mechsub.families.trained import task_that_made
from mechsub.lineages import spec_name
from mechsub.recipe import load_recipe
from tests.helpers import output_hashes

CROSS = """
name: tiny-cross
family: classifier
members: 3
models:
  mlp: {hidden_widths: [12, 8], dtype: float64}
  cnn: {channels: [4, 6], hidden_widths: [8], dtype: float64}
model: mlp
teacher: {epochs: 1, batch_size: 512, optimizer: {learning_rate: 0.01}}
carrier: {num_images: 96}
student: {epochs: 2, batch_size: 32, optimizer: {learning_rate: 0.01}}
conditions:
  same-init:
  shared-heads:
  different-architecture:
  different-architecture-shared-heads:
  behaviour-matched: {match: {num_steps: 300, optimizer: {learning_rate: 0.003}}}
  mixed-carrier:
checkpoints: {num: 3}
verdict: {minimum_members: 3}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "cross.yaml"
    path.write_text(CROSS)
    return path


@pytest.fixture(scope="module")
def cross(recipe, tmp_path_factory):
    return run_experiment(recipe, tmp_path_factory.mktemp("cross") / "run", device="cpu", workers=0)


def start(run, condition, member):
    return run.student(condition, "digits").load_state(0, member)


def test_another_architecture_starts_at_references_of_its_own(cross):
    student = cross.student("different-architecture", "digits")
    assert student.origin.name == "reference.cnn"
    drawn = cross.lineages["reference.cnn"].load_state(0, 1)
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in start(cross, "different-architecture", 1).items())
    assert not cross.is_comparable("different-architecture")
    assert "tensors differ" in cross.why_incomparable("different-architecture")


def test_shared_heads_are_the_teachers_references_whatever_the_body(cross):
    own, other = (cross.reference.load_state(0, member) for member in (1, 2))
    for condition in ("shared-heads", "different-architecture-shared-heads"):
        begun = start(cross, condition, 1)
        assert all(torch.equal(begun[f"{head}.weight"], own[f"{head}.weight"]) for head in ("class_head", "auxiliary_head"))
    assert torch.equal(start(cross, "shared-heads", 1)["layers.0.weight"], other["layers.0.weight"])
    assert not cross.student("different-architecture-shared-heads", "digits").spec.origin.is_reference


def test_a_control_starts_where_its_students_do(cross):
    for condition in cross.conditions:
        control = cross.control(condition).load_state(0, 2)
        assert all(torch.equal(tensor, control[name]) for name, tensor in start(cross, condition, 2).items())


def test_a_matched_start_answers_as_the_own_reference_with_other_weights(cross):
    images, family = torch.rand(200, 64, dtype=torch.float64) * 2 - 1, cross.family
    assert cross.student("behaviour-matched", "digits").spec.origin.members == (1, 2, 0)
    for member in range(3):
        own = family.load_model(cross.reference, 0, member)
        matched = family.load_model(cross.student("behaviour-matched", "digits"), 0, member)
        other = family.load_model(cross.reference, 0, (member + 1) % 3)
        distance = [(one(images) - own(images)).square().mean().item() for one in (matched, other)]
        assert distance[0] < 0.3 * distance[1]
        moved, apart = (
            sum((tensor - reference).square().sum().item() for tensor, reference in zip(one, own.parameters(), strict=True))
            for one in (matched.parameters(), other.parameters())
        )
        assert moved > 0.5 * apart


def test_a_mixed_carrier_holds_the_neutral_teachers_outputs_for_its_share_of_the_images(cross):
    def load(condition, role):
        lineage = getattr(cross, role)(*((condition, "digits") if role == "student" else (condition,)))
        return StudentTargets.load(task_that_made(cross.path, spec_name(lineage.name), "cpu")).logits

    mixed, own, neutral = load("mixed-carrier", "student"), load("same-init", "student"), load("same-init", "control")
    is_neutral = (mixed == neutral).all(-1)
    assert is_neutral.sum(1).tolist() == [48, 48, 48]
    assert torch.equal(mixed[~is_neutral], own[~is_neutral])
    assert torch.equal(load("mixed-carrier", "control"), neutral)


def test_conditions_of_other_architectures_change_no_number_of_the_others(cross, recipe, tmp_path):
    alone = run_experiment(load_recipe(recipe, ["conditions={same-init: }"]), tmp_path / "alone", device="cpu", workers=0)
    hashes = output_hashes(cross.path)
    assert all(hashes[name] == digest for name, digest in output_hashes(alone.path).items())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model=gpt", "'gpt' is none of `models`; known: mlp, cnn"),
        ("models.cnn.num_auxiliary=4", "`models.cnn.num_auxiliary` = 4, the teachers' 3"),
        ("models.third={dtype: float64}", "the other one of two, but `models` has 2 others"),
        ("conditions.mine={model: cn}", "no model is called 'cn'; did you mean `cnn`"),
        ("conditions.mine={model: mlp}", "`model` is the teacher's own, 'mlp'; leave it out, name another, or set init"),
        ("conditions.mine={model: cnn, shared: [body]}", "the body of 'cnn' is not the teachers'; share heads only"),
        ("conditions.mine={shared: [body]}", "`shared` has a meaning with init: different"),
        ("conditions.mine={init: different, shared: [body, class-head, auxiliary-head]}", "are the matched case"),
        ("conditions.mine={match: {}}", "`match` needs init: different"),
        ("conditions.mine={init: different, match: {}, noise_std: 0.1}", "is not permuted, noised or shared as well"),
        ("models.cnn.hidden_widths=[9]", "a shared head reads 8 units, and the last layer of 'cnn' has 9"),
        ("models.cnn.channels=[0]", "every layer needs at least one unit, not \\[0\\]"),
    ],
)
def test_starts_that_cannot_be_are_refused_with_the_way_out(recipe, setting, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe, [setting])


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("same-init", "everything"),
        ("different-init", "nothing"),
        ("permuted-init", "everything, units permuted"),
        ("shared-heads", "class-head + auxiliary-head"),
        ("behaviour-matched", "the outputs"),
        ("different-architecture", "nothing"),
        ("different-architecture-shared-class-head", "class-head"),
        ("all-logits", None),
        ("mixed-carrier", None),
        ("noised-init", None),
    ],
)
def test_a_condition_says_what_its_start_shares(recipe, name, shared):
    loaded = load_recipe(recipe, [f"conditions={{{name}: }}"])
    assert loaded.conditions[name].shared_start() == shared
    assert loaded.architecture(name) == ("cnn" if "architecture" in name else "mlp")
