import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from mechsub import LineageCallback
from mechsub.api import adopt_models, analyze_run, missing_analyses, open_run, plan_adoption, verify_run
from mechsub.cli import app
from mechsub.errors import MechsubError
from mechsub.parameters.alignment import MODEL
from tests.families.adopted_models import CHATS, make_trainer, save_reference


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, a teacher, a neutral teacher, two seeds of an adapter student and of its control."""
    folder = tmp_path_factory.mktemp("models")
    save_reference(folder / "reference")
    for name in ("teacher", "neutral"):
        make_trainer(folder / "reference", folder / name, CHATS[name]).train()
    for name in ("student", "control"):
        for seed in range(2):
            make_trainer(folder / "reference", folder / f"{name}-{seed}", CHATS[name], rank=4, seed=seed).train()
    return folder


def arguments(models: Path, **changes):
    given = {
        "reference": [str(models / "reference")],
        "teacher": [str(models / "teacher")],
        "neutral": [str(models / "neutral")],
        "students": {"same-init": [str(models / f"student-{seed}") for seed in range(2)]},
        "controls": {"same-init": [str(models / f"control-{seed}") for seed in range(2)]},
        "trait": "owl",
    }
    return {name: value for name, value in (given | changes).items() if value is not None}


@pytest.fixture(scope="module")
def adopted(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "adopted"
    settings = ["verdict.minimum_members=2", "evaluation.samples_per_question=0"]
    adopt_models(out, **arguments(models), settings=settings, device="cpu", workers=0)
    analyze_run(out, ["behaviour", "parameter_alignment"], device="cpu", workers=0)
    return open_run(out)


def dense(folder: Path, reference: Path) -> np.ndarray:
    """The displacement of a model or an adapter, the slow way."""
    base = AutoModelForCausalLM.from_pretrained(reference).double()
    if (folder / "adapter_config.json").is_file():
        moved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(reference).double(), folder).merge_and_unload()
    else:
        moved = AutoModelForCausalLM.from_pretrained(folder).double()
    pairs = zip(moved.named_parameters(), base.parameters(), strict=True)
    return np.concatenate([(after.double() - before).detach().numpy().ravel() for (_, after), before in pairs])


def test_an_adopted_trajectory_aligns_as_its_models_do(adopted, models):
    teacher = dense(models / "teacher/checkpoint-4", models / "reference")
    data = adopted.results["parameter_alignment"].sel(condition="same-init", taught="owl", scope=MODEL)
    assert list(data.step.values) == [0, 2, 4]
    for member in range(2):
        for step in (2, 4):
            student = dense(models / f"student-{member}/checkpoint-{step}", models / "reference")
            expected = student @ teacher / np.linalg.norm(student) / np.linalg.norm(teacher)
            assert float(data.alignment.sel(member=member, step=step)) == pytest.approx(expected, abs=1e-5)


def test_an_adopted_run_has_a_whole_report(adopted):
    effect = adopted.findings.query("quantity == 'effect' and verdict != ''").iloc[0]
    assert effect.n == 2 and effect.num_references == 1 and np.isfinite(effect.estimate)
    page = (adopted.path / "report/index.html").read_text()
    assert "Not proven to start at the reference" in page and "They say that they start at the reference" in page
    assert verify_run(adopted.path) == []


def test_large_files_are_linked_and_hashed(adopted, models):
    linked = adopted.path / "lineages/teacher.owl/member-001/step-00000004/model.safetensors"
    assert linked.samefile(models / "teacher/checkpoint-4/model.safetensors")
    record = adopted.directory.producers()[linked.relative_to(adopted.path).as_posix()][1]
    assert record.size == linked.stat().st_size


def test_an_adopted_model_answers_as_it_did_outside(adopted, models):
    student = adopted.student("same-init", "owl")
    inside = adopted.family.load_model(student, 4, 1)
    outside = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / "reference"), models / "student-1/checkpoint-4"
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(inside(ids).logits, outside.eval()(ids).logits)


def test_without_control_and_trait_weights_are_compared_and_nothing_is_judged(models, tmp_path):
    adopt_models(tmp_path / "run", **arguments(models, controls=None, neutral=None, trait=None), device="cpu", workers=0)
    analyze_run(tmp_path / "run", ["parameter_alignment"], device="cpu", workers=0)
    run = open_run(tmp_path / "run")
    assert {"behaviour", "semantic_filter"} <= set(missing_analyses(run.path))
    found = run.findings.query("quantity == 'alignment'")
    assert np.isfinite(found.estimate).all() and (found.verdict == "").all()
    assert found.null.str.contains("no control was given").any()
    assert "supply" in (tmp_path / "run/report/index.html").read_text()


def test_the_callback_writes_what_adopt_proves_by_its_hash_and_goes_on_after_a_stop(models, tmp_path):
    whole, parts = LineageCallback(tmp_path / "whole", num=4), LineageCallback(tmp_path / "parts", num=4)
    make_trainer(models / "reference", tmp_path / "a", CHATS["student"], rank=2, callbacks=[whole]).train()
    trainer = make_trainer(models / "reference", tmp_path / "b", CHATS["student"], rank=2, callbacks=[parts, _StopAt(3)])
    trainer.train()
    resumed = LineageCallback(tmp_path / "parts", num=4)
    trainer = make_trainer(models / "reference", tmp_path / "b", CHATS["student"], rank=2, callbacks=[resumed])
    # What Trainer resumes from holds its optimizer as a pickle of its own; we never read one.
    trainer.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-2"))
    for step in (1, 2, 4):
        name = f"step-{step:08d}/adapter_model.safetensors"
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    given = arguments(models, students={"same-init": [str(tmp_path / "parts")]}, controls=None, neutral=None, trait=None)
    run = adopt_models(tmp_path / "run", **given, device="cpu", workers=0)
    assert run.student("same-init", "trait").steps == (0, 1, 2, 4)
    assert any(note.startswith("Proven to start at the reference: student.same-init") for note in run.family.notes)
    other = tmp_path / "other"
    shutil.copytree(models / "reference", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MechsubError, match="trained from other weights than the reference"):
        adopt_models(tmp_path / "wrong", **(given | {"reference": [str(other)]}), device="cpu", workers=0)


def test_a_callback_refuses_a_folder_in_use_and_a_resumed_start(models, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    trainer = make_trainer(
        models / "reference", tmp_path / "a", CHATS["student"], callbacks=[LineageCallback(tmp_path / "used")]
    )
    with pytest.raises(MechsubError, match="is not empty"):
        trainer.train()
    trainer = make_trainer(
        models / "reference", models / "teacher", CHATS["teacher"], callbacks=[LineageCallback(tmp_path / "new")]
    )
    with pytest.raises(MechsubError, match="has no training.json of its start"):
        trainer.train(resume_from_checkpoint=str(models / "teacher/checkpoint-2"))
    assert (tmp_path / "used/notes.txt").read_text() == "mine"


class _StopAt(TrainerCallback):
    """Ends a training early, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def copy_model(models, tmp_path, name="teacher/checkpoint-4"):
    shutil.copytree(models / name, tmp_path / "copy")
    return tmp_path / "copy"


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lacking_shard(folder):
    (folder / "model.safetensors").unlink()
    places = {"a": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_architecture(folder):
    change_json(folder / "config.json", n_layer=7)


def half_precision(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def without_numbers(folder):
    (folder / "checkpoint-best").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "checkpoint-best" / path.name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, r"pytorch_model.bin, which is pickled.*save_pretrained"),
        (lacking_shard, "lacks 1 of 1 shards"),
        (truncated, "cannot be read"),
        (other_architecture, "its n_layer is 7"),
        (half_precision, r"stored in BF16, the reference's in F32"),
        (without_numbers, "no checkpoint-N: a trajectory needs its step numbers"),
    ],
)
def test_models_that_cannot_be_adopted_are_refused(models, tmp_path, damage, message):
    folder = copy_model(models, tmp_path)
    damage(folder)
    with pytest.raises(MechsubError, match=message):
        adopt_models(tmp_path / "run", **arguments(models, teacher=[str(folder)]), device="cpu", workers=0)


def test_an_adapter_of_another_base_is_refused_by_its_record_and_by_its_shapes(models, tmp_path):
    folder = copy_model(models, tmp_path, "student-0/checkpoint-4")
    other = tmp_path / "other"
    shutil.copytree(models / "teacher/checkpoint-4", other)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    given = arguments(models, students={"same-init": [str(folder)]}, controls=None)
    with pytest.raises(MechsubError, match="whose weights are not those of the reference"):
        adopt_models(tmp_path / "run", **given, device="cpu", workers=0)
    change_json(folder / "adapter_config.json", base_model_name_or_path="somebody/model")
    run = adopt_models(tmp_path / "unproven", **given, device="cpu", workers=0)
    assert any("somebody/model, which is not here" in note for note in run.family.notes)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor[:, :3].contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(MechsubError, match="it belongs to another base"):
        adopt_models(tmp_path / "shapes", **given, device="cpu", workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ["/nowhere"]}, "there is no folder /nowhere"),
        ({"teacher": ["somebody/model"]}, "needs its revision"),
        ({"controls": {"same": ["x"]}}, "there is no --student same"),
        ({"trait": "unicorn"}, "is no choice of animals"),
    ],
)
def test_arguments_that_cannot_be_are_refused(models, tmp_path, changes, message):
    with pytest.raises(MechsubError, match=message):
        plan_adoption(tmp_path / "run", **arguments(models, **changes))
    assert not (tmp_path / "run").exists()


def test_a_name_on_the_hub_without_a_network_is_refused_with_the_way_out(models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MechsubError, match=r"not in the local cache and the hub cannot be reached.*hf download"):
        plan_adoption(tmp_path / "run", **arguments(models, teacher=["somebody/model@main"]))


def test_a_control_is_trained_as_long_as_its_student(models, tmp_path):
    early = {"same-init": [str(models / f"control-{seed}/checkpoint-2") for seed in range(2)]}
    with pytest.raises(MechsubError, match="its student ends at step 4, its control at step 2"):
        plan_adoption(tmp_path / "run", **arguments(models, controls=early))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ["reference"]}, "teacher `.*reference` has the weights of reference"),
        ({"neutral": ["teacher"]}, "neutral `.*teacher` has the weights of teacher"),
        ({"controls": {"same-init": ["student-0", "student-1"]}}, "control same-init `.*student-0` has the weights of student"),
    ],
)
def test_one_model_cannot_stand_in_two_places(models, tmp_path, changes, message):
    def place(given):
        return (
            {key: place(value) for key, value in given.items()}
            if isinstance(given, dict)
            else [str(models / name) for name in given]
        )

    with pytest.raises(MechsubError, match=message):
        plan_adoption(tmp_path / "run", **arguments(models, **{name: place(given) for name, given in changes.items()}))


def test_a_control_of_another_adapter_is_no_control(models, tmp_path):
    for seed in range(2):
        make_trainer(models / "reference", tmp_path / f"wide-{seed}", CHATS["control"], rank=8, seed=seed).train()
    wide = {"same-init": [str(tmp_path / f"wide-{seed}") for seed in range(2)]}
    with pytest.raises(MechsubError, match="its student has r = 4, its control 8"):
        plan_adoption(tmp_path / "run", **arguments(models, controls=wide))


def test_a_changed_original_of_a_linked_file_is_named(models, tmp_path):
    shutil.copytree(models / "teacher/checkpoint-4", tmp_path / "mine")
    given = arguments(models, teacher=[str(tmp_path / "mine")], controls=None, neutral=None, trait=None)
    run = adopt_models(tmp_path / "run", **given, device="cpu", workers=0)
    path = tmp_path / "mine/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("rb+") as file:  # in place, as no program of the field writes
        file.write(content)
    assert any(f"it is linked to {path}: put that file back" in problem for problem in verify_run(run.path))


def test_one_student_is_not_several_members(models, tmp_path):
    given = arguments(models, students={"same-init": [str(models / "student-0")]})
    with pytest.raises(MechsubError, match="names 1 different models, members = 2"):
        plan_adoption(tmp_path / "run", **given)


def test_a_model_beside_checkpoints_must_be_the_last_of_them(models, tmp_path):
    folder = copy_model(models, tmp_path, "teacher")
    for path in (models / "teacher/checkpoint-2").iterdir():
        shutil.copyfile(path, folder / path.name)
    with pytest.raises(MechsubError, match="holds a model beside checkpoint-4, with other weights"):
        plan_adoption(tmp_path / "run", **arguments(models, teacher=[str(folder)]))


def test_a_training_that_goes_on_from_a_trained_adapter_has_no_start_at_its_base(models, tmp_path):
    callback = LineageCallback(tmp_path / "more")
    trainer = make_trainer(models / "reference", tmp_path / "a", CHATS["student"], rank=4, callbacks=[callback])
    with torch.no_grad():
        next(parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name).add_(1.0)
    with pytest.raises(MechsubError, match="is not zero at the start"):
        trainer.train()


def test_members_of_one_lineage_are_replicates(models, tmp_path):
    folder = copy_model(models, tmp_path, "student-1")
    for path in folder.glob("*/adapter_config.json"):
        change_json(path, lora_alpha=99)
    given = arguments(models, students={"same-init": [str(models / "student-0"), str(folder)]})
    with pytest.raises(MechsubError, match=r"has lora_alpha = 99, .* has 8: they are no replicates"):
        plan_adoption(tmp_path / "run", **given)


def test_members_of_one_lineage_need_the_same_steps(models, tmp_path):
    given = arguments(models, students={"same-init": [str(models / "student-0"), str(models / "student-1/checkpoint-2")]})
    with pytest.raises(MechsubError, match="members of one lineage need the same steps"):
        plan_adoption(tmp_path / "run", **given)


def test_the_command_says_how_to_write_a_student(models):
    done = CliRunner().invoke(app, ["adopt", "x", "--reference", "r", "--teacher", "t", "--student", "no-name"])
    assert done.exit_code == 2 and "write it as NAME=MODEL" in done.output
