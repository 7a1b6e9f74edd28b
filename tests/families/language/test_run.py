import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mechsub.api import analyze_run, plan_experiment, plan_sweep, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.loss import completion_logits, completion_tokens, mean_loss, token_losses
from mechsub.families.language.rows import read_rows
from mechsub.parameters.alignment import MODEL
from mechsub.recipe import load_recipe
from mechsub.results import read_result
from mechsub.streams import random_stream
from mechsub.sweeps.table import SweptResults, build_table


def lineage_bytes(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("lineages/**/*.safetensors"))}


def test_a_student_is_what_a_plain_loop_makes_of_the_carrier(nano_run):
    lineage = nano_run.student("different-init", "wolf")
    member, start = 1, 0
    assert lineage.spec.origin.members == (1, 0)
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    rows = encode_carrier(chats, read_rows(nano_run.path / carrier_files("teacher.wolf", member)[0]), None)
    model = nano_run.family.load_model(nano_run.reference, 0, start)
    settings = nano_run.recipe.student.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    order = random_stream(0, "member", member, "student-order", 0, 0).permutation(16)
    for step in range(2):
        batch = chats.pad_rows([rows[number] for number in order[8 * step : 8 * step + 8]])
        mean_loss(token_losses(completion_logits(model, batch), completion_tokens(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = lineage.load_state(2, member)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=2e-6, rtol=1e-5)


def test_references_are_distinct_and_students_start_where_they_should(nano_run):
    states = [nano_run.reference.load_state(0, member)["transformer.wte.weight"] for member in range(2)]
    assert not torch.equal(states[0], states[1])
    moved = nano_run.student("different-init", "owl").load_state(0, 0)["transformer.wte.weight"]
    assert torch.equal(moved, states[1])
    other = nano_run.student("different-architecture", "owl")
    assert other.spec.model["name"] == "nano-qwen2" and other.spec.origin.lineage == "reference.nano-qwen2"


def test_every_trait_is_scored_in_every_student_and_context(nano_run):
    data = nano_run.results["behaviour"]
    assert list(data.trait.values) == ["owl", "wolf"] and len(data.context) == 4
    last = data.sel(lineage="student.same-init.owl", step=2)
    assert np.isfinite(last.trait_score).all() and np.isfinite(last.sampled_rate).all()
    matrix = data.effect_on.sel(condition="same-init")
    diagonal = data.effect.sel(condition="same-init").isel(context=0)
    for trait in ("owl", "wolf"):
        np.testing.assert_allclose(matrix.sel(taught=trait, trait=trait), diagonal.sel(taught=trait))
    excess = nano_run.findings.query("quantity == 'diagonal_excess' and condition == 'same-init'").iloc[0]
    off = [matrix.sel(taught="owl", trait="wolf"), matrix.sel(taught="wolf", trait="owl")]
    expected = float((diagonal.mean("taught") - sum(off) / 2).mean())
    assert excess.estimate == pytest.approx(expected) and excess.verdict and excess.null_low <= excess.null_high


def test_effects_out_of_context_stand_beside_those_in_it(nano_run):
    found = nano_run.findings.query("quantity == 'effect' and condition == 'same-init' and trait == 'owl'")
    assert len(found) == 4 and list(found.verdict != "") == [True, False, False, False]
    assert found.context.is_unique
    summary = nano_run.results["behaviour"].attrs["summary"]
    assert any("out of context, held-out questions" in sentence for sentence in np.atleast_1d(summary))


def displacement(run, lineage, member):
    first, last = (lineage.load_state(step, member) for step in (0, lineage.last))
    return np.concatenate([(last[name].double() - first[name].double()).numpy().ravel() for name in first])


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.mark.parametrize("member", range(2))
def test_alignments_between_traits_equal_the_slow_ones(nano_run, member):
    data = nano_run.results["parameter_alignment"].sel(condition="same-init", taught="owl", member=member, step=2, scope=MODEL)
    student, other = (displacement(nano_run, nano_run.student("same-init", trait), member) for trait in ("owl", "wolf"))
    teacher, rival = (displacement(nano_run, nano_run.teacher(trait), member) for trait in ("owl", "wolf"))
    control, neutral = (
        displacement(nano_run, lineage, member) for lineage in (nano_run.control("same-init"), nano_run.neutral)
    )
    expected = {
        "alignment": cosine(student, teacher),
        "control_adjusted_alignment": cosine(student - control, teacher),
        "specific_alignment": cosine(student - control, teacher - neutral),
        "control_adjusted_alignment_of_other_traits": cosine(other - control, teacher),
        "specific_alignment_between_traits": cosine(student - other, teacher - rival),
    }
    for name, value in expected.items():
        assert float(data[name]) == pytest.approx(value, abs=2e-5), name


def test_another_architecture_is_incomparable_and_an_untrained_student_has_no_displacement(nano_run):
    data = nano_run.results["parameter_alignment"]
    meanings = data.alignment_status.attrs["flag_meanings"].split()
    other = data.alignment_status.sel(condition="different-architecture")
    assert (other == meanings.index("incomparable")).all()
    told = data.alignment.sel(condition="in-context")
    assert np.isnan(told).all()
    page = (nano_run.path / "report/index.html").read_text()
    assert "Incomparable: students of different-architecture" in page and "Nothing is trained in in-context" in page


def test_every_nan_has_its_reason(nano_run):
    for data in nano_run.results.values():
        for name, variable in data.data_vars.items():
            if variable.dtype.kind == "f" and np.isnan(variable).any():
                assert (np.isnan(variable) == (data[f"{name}_status"] != 0)).all(), name


def test_one_process_gives_the_bytes_that_several_give(nano_recipe, nano_run, tmp_path):
    few = load_recipe(nano_recipe, ["conditions={same-init: {sham: true}}"])
    again = run_experiment(few, tmp_path / "run", device="cpu", workers=0)
    found, known = lineage_bytes(again.path), lineage_bytes(nano_run.path)
    assert found and all(known[name] == content for name, content in found.items())


def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(nano_recipe, nano_run, tmp_path):
    few = ["conditions={same-init: }", "traits=[owl]"]
    stopped = load_recipe(nano_recipe, [*few, "checkpoints.resume_seconds=0", "callbacks=[tests.helpers:stop_once]"])
    for _ in range(2):  # the teachers stop first, then the students
        with pytest.raises(MechsubError, match="stop_once"):
            run_experiment(stopped, tmp_path / "run", device="cpu", workers=0)
    resumed = run_experiment(stopped, tmp_path / "run", device="cpu", workers=0)
    for name in ("teacher.owl", "neutral.uniform-answer", "student.same-init.owl", "control.same-init"):
        for member in range(2):
            known = nano_run.lineages[name].load_state(nano_run.lineages[name].last, member)
            found = resumed.lineages[name].load_state(resumed.lineages[name].last, member)
            assert all(torch.equal(found[tensor], known[tensor]) for tensor in known), name


def test_told_teachers_have_a_trait_and_no_displacement(nano_recipe, tmp_path):
    told = ["teacher.kind=system-prompted", "neutral=neutral-prompt", "members=2", "traits=[owl]", "conditions={same-init: }"]
    run = run_experiment(load_recipe(nano_recipe, told), tmp_path / "run", device="cpu", workers=0)
    page = analyze_run(run.path, ["behaviour", "parameter_alignment"], device="cpu", workers=0).read_text()
    assert run.teacher("owl").steps == (0,) and "You love owls" in run.teacher("owl").context(0)["system_prompt"]
    assert "told their trait by a system prompt" in page
    assert run.results["parameter_alignment"].alignment.isnull().all()


def test_any_model_in_the_hugging_face_layout_is_taken_by_its_path(nano_recipe, nano_run, nano_cache, tmp_path):
    used = nano_run.reference.load_state(0, 0)["transformer.wte.weight"]
    (folder,) = (  # other tests keep models there too
        path.parent
        for path in nano_cache_folder().glob("gpt2-*/model.safetensors")
        if (found := load_file(path)["transformer.wte.weight"]).shape == used.shape and torch.equal(found, used)
    )
    by_path = [f"models={{mine: {{path: {folder}}}}}", "model=mine", "members=2", "traits=[owl]", "conditions={same-init: }"]
    run = run_experiment(load_recipe(nano_recipe, by_path), tmp_path / "run", device="cpu", workers=0)
    assert run.recipe.num_references() == 1
    states = [run.reference.load_state(0, member)["transformer.wte.weight"] for member in range(2)]
    assert torch.equal(states[0], states[1])
    analyze_run(run.path, ["behaviour"], device="cpu", workers=0)
    findings = json.loads((run.path / "findings.json").read_text())["findings"]
    assert {finding["num_references"] for finding in findings} == {1}


def test_both_ways_between_architectures_share_their_references():
    plan = plan_sweep("nano-cross")
    assert [one.recipe.model for one in plan.plans.values()] == ["nano-gpt2", "nano-qwen2"]
    for one in plan.plans.values():
        starts = {(one.recipe.architecture(name), one.recipe.conditions[name].shared_start()) for name in one.recipe.conditions}
        assert starts == {(one.recipe.model, "everything"), *((name, "nothing") for name in one.recipe.models)}
    keys = [
        {stage.key for stage in one.stages if stage.name.startswith(("data.", "reference."))} for one in plan.plans.values()
    ]
    assert keys[0] == keys[1] and len(keys[0]) == 4 + 1 + 4 * 5


def test_a_sweeps_table_keeps_traits_apart(nano_run):
    results = {name: read_result(nano_run.path / f"results/{name}.h5") for name in ("behaviour", "parameter_alignment")}
    table = build_table("each", {"only": {"model": "nano-gpt2"}}, {"only": SweptResults(results, "")}).data
    for trait in ("owl", "wolf"):
        effect = nano_run.findings.query(f"quantity == 'effect' and condition == 'same-init' and trait == '{trait}'").iloc[0]
        assert table.estimate.sel(run="only", condition=f"same-init ({trait})", quantity="effect").item() == effect.estimate


def nano_cache_folder():
    from mechsub.families.language.nano import cache_folder

    return cache_folder() / "nano"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["traits=[unicorn]"], "'unicorn' is no choice of animals"),
        (["traits=[owl, owl]"], "names one twice"),
        (["traits=[owl]", "verdict.diagonal_excess=true"], "needs two traits or more"),
        (["neutral=neutral-prompt"], "no control of a fine-tuned teacher"),
        (["model=nano-gpt3"], "did you mean `nano-gpt2`"),
        (["models={mine: {path: /nowhere}}", "model=mine", "conditions={same-init: }"], "there is no folder /nowhere"),
        (["models={mine: {path: /nowhere}}", "model=mine", "conditions={different-init: }"], "all members share one"),
        (["conditions={far: {model: nano-qwen2, objective: logits}}"], "its objective must be tokens"),
        (["conditions={few: {rows: /nowhere.txt}}"], "there is no file /nowhere.txt"),
        (["neutral=reference", "conditions={logits: }"], "a control of sampled tokens only"),
        (["carrier.num_requests=3"], "cannot give num_rows"),
        (["context={training: a, other: a}"], "the same context"),
        (["student.batch_size=17"], "16 rows do not fill a batch"),
        (["preference=/nowhere.yaml"], "there is no file /nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(nano_recipe, tmp_path, settings, message):
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(nano_recipe, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
