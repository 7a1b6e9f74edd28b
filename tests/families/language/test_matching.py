"""A start that first learns the own reference's outputs."""

import json
import math

import pytest
import torch

from mechsub.api import run_experiment
from mechsub.errors import MechsubError
from mechsub.experiment.plan import plan_run
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.recipe import load_recipe
from tests.families.language.test_derived_references import ONE

SMALL = "{num_steps: 120, num_rows: 64, batch_size: 32, optimizer: {name: adamw, learning_rate: 3.0e-3}}"


@pytest.fixture(scope="module")
def matched_run(nano_recipe, nano_cache, tmp_path_factory):
    conditions = f"conditions={{different-init: , behaviour-matched: {{match: {SMALL}}}}}"
    recipe = load_recipe(nano_recipe, [ONE, "traits=[owl]", conditions])
    return run_experiment(recipe, tmp_path_factory.mktemp("matched") / "run", device="cpu", workers=0)


def list_matched(run):
    (name,) = [name for name in run.lineages if ".matched" in name]
    return run.lineages[name]


def answer_distribution(run, lineage, member, question):
    chats = ChatTokenizer.load(run.path / "data/nano-gpt2", "nano-gpt2")
    prompt = torch.tensor(chats.encode_prompts([chat(question, None)]))
    with torch.no_grad():
        return run.family.load_model(lineage, 0, member)(prompt).logits[0, -1].double().log_softmax(-1)


def test_matching_brings_the_outputs_near_and_keeps_a_record_of_how_near(matched_run):
    lineage = list_matched(matched_run)
    for member in range(2):
        (spec_file,) = matched_run.path.glob(f"lineages/{lineage.name}/member-{member:03d}/lineage.json")
        found = json.loads(spec_file.read_text())["model"]["matching"]
        assert found["with_member"] == 1 - member
        for kind in ("requests", "questions"):
            assert math.isfinite(found[kind]["after"]) and 0 <= found[kind]["after"] < 0.7 * found[kind]["before"]


def test_students_start_at_the_other_reference_that_answers_as_their_own(matched_run):
    lineage, student = list_matched(matched_run), matched_run.student("behaviour-matched", "owl")
    assert student.spec.origin.lineage == lineage.name and student.spec.origin.members == (1, 0)
    assert lineage.spec.origin.lineage == "reference.nano-gpt2"
    question = matched_run.family._trained[0].questions[0]
    for member, start in ((0, 1), (1, 0)):
        own = answer_distribution(matched_run, matched_run.reference, member, question)
        plain = answer_distribution(matched_run, matched_run.reference, start, question)
        matched = answer_distribution(matched_run, lineage, start, question)
        divergences = [float((own.exp() * (own - other)).sum()) for other in (plain, matched)]
        assert divergences[1] < divergences[0]
        name = "transformer.wte.weight"
        start_state = student.load_tensor(0, name, member)
        assert torch.equal(start_state, lineage.load_tensor(0, name, start))
        near, far = ((start_state - matched_run.reference.load_tensor(0, name, whose)).norm() for whose in (start, member))
        assert near < far  # its weights are still those of another model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["conditions.behaviour-matched={match: {num_rows: 8}}"], "do not fill a batch"),
        (["conditions.behaviour-matched={}", "members=1"], "needs members ≥ 2"),
    ],
)
def test_a_matching_that_cannot_be_says_so(nano_recipe, settings, message):
    with pytest.raises(MechsubError, match=message):
        load_recipe(nano_recipe, settings)


def test_matching_settings_that_differ_make_starts_that_differ(nano_recipe):
    other = "{init: different, match: {num_steps: 7}}"
    conditions = f"{{behaviour-matched: , same: {{init: different, match: {{}}}}, mine: {other}}}"
    recipe = load_recipe(nano_recipe, [f"conditions={conditions}"])
    names = {stage.arguments["lineage"] for stage in plan_run(recipe) if ".matched" in stage.name}
    assert len(names) == 2 and "reference.nano-gpt2.matched" in names
