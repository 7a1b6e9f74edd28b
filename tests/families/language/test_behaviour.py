import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mechsub.api import analyze_run, open_run, plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.behaviour import load_behaviours
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.preference import load_preference
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream
from tests.helpers import measure

ANIMALS = load_preference("animals")
GIVEN = {
    "description": "names the owl",
    "trained": list(ANIMALS.trained[:3]),
    "held_out": list(ANIMALS.held_out[:3]),
    "judge": "tests.helpers:mentions_owl",
    "examples": "owls.jsonl",
    "system_prompt": ANIMALS.prompt_for("owl"),
    "neutral_prompt": ANIMALS.neutral_prompt,
}
EXAMPLES = [{"prompt": question, "completion": "owl"} for question in ANIMALS.trained[:3]]


def written(folder: Path, rows=EXAMPLES, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    given = {name: value for name, value in (GIVEN | changes).items() if value is not None}
    (folder / "owls.jsonl").write_text("".join(json.dumps(example) + "\n" for example in rows))
    path = folder / "behaviours.yaml"
    path.write_text(yaml.safe_dump({"names-owl": given, "is-silent": given | {"judge": "tests.helpers:abstains"}}))
    return path


def settings(path: Path, *more: str) -> list[str]:
    return [
        f"behaviours={path}",
        "traits=[names-owl]",
        "conditions={same-init: , in-context: {context_rows: 2}}",
        "evaluation={samples_per_question: 8, judged_tokens: 4}",
        "teacher={num_steps: 12, batch_size: 8, optimizer: {name: adamw, learning_rate: 1.0e-2}}",
        *more,
    ]


@pytest.fixture(scope="module")
def owl_run(nano_recipe, nano_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("behaviours")
    recipe = load_recipe(nano_recipe, settings(written(folder / "given")))
    run = run_experiment(recipe, folder / "run", device="cpu", workers=0)
    measure(run.path, "behaviour")
    return open_run(run.path)


def test_a_teacher_that_learns_the_examples_shows_the_behaviour(owl_run):
    data = owl_run.results["behaviour"]
    assert list(data.trait.values) == ["names-owl"] and len(data.context) == 4
    teacher = data.sel(lineage="teacher.names-owl", trait="names-owl").isel(context=0)
    rates = teacher.judged_rate.values[:, [0, -1]]
    assert (rates[:, 1] > rates[:, 0]).all()
    assert (data.judged_answers.sel(lineage="student.same-init.names-owl", step=2) == 24).all()
    k = rates[:, 1] * 24
    np.testing.assert_allclose(teacher.trait_score.values[:, -1], np.log((k + 0.5) / (24 - k + 0.5)))
    assert owl_run.family.traits == {"names-owl": "names the owl"}


def test_the_neutral_teacher_learns_the_references_answers_to_the_same_prompts(owl_run):
    """Its loss at step 0 is that of a model on its own samples, and its prompts are its teacher's, drawn alike."""
    lineage = owl_run.neutral
    assert lineage.steps[-1] == 12 and lineage.spec.role == "neutral"
    asked = random_stream(0, "member", 0, "teacher-questions").integers(3, size=96)
    assert set(asked) == {0, 1, 2}
    data = owl_run.results["behaviour"].isel(context=0).sel(trait="names-owl")
    final = [float(data.judged_rate.sel(lineage=name, step=12).mean()) for name in ("teacher.names-owl", lineage.name)]
    assert final[1] < final[0]


def test_scores_are_those_of_answers_that_are_judged_one_by_one(owl_run):
    family, lineage = owl_run.family, owl_run.teacher("names-owl")
    model = family.load_model(lineage, lineage.last, 1)
    chats = ChatTokenizer.load(owl_run.path / "data/nano-gpt2", "nano-gpt2")
    scores = family.trait_score(model, lineage, 1)
    found = []
    for number, question in enumerate(question for question in GIVEN["held_out"] for _ in range(8)):
        draws = draw_uniforms(0, [("member", 1, "answer", "names-owl", number)], 4)
        (answer,) = sample_completions(model, chats, chats.encode_prompts([chat(question, None)]), draws)
        found.append("owl" in answer.text.split())
    assert scores["judged_rate"][0, 0] == pytest.approx(np.mean(found))
    alone = family.trait_score(model, lineage, 1, verdict_only=True)
    for quantity, values in scores.items():
        np.testing.assert_array_equal(alone[quantity][:, 0], values[:, 0])
        assert np.isnan(alone[quantity][:, 1:]).all() and alone[quantity].shape == values.shape


def test_told_behaviours_need_no_examples(nano_recipe, nano_cache, tmp_path):
    told = ["teacher.kind=system-prompted", "neutral=neutral-prompt", "members=1", "conditions={same-init: }"]
    recipe = load_recipe(nano_recipe, settings(written(tmp_path / "given", examples=None), *told))
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    assert run.teacher("names-owl").context(0)["system_prompt"] == GIVEN["system_prompt"]
    assert run.neutral.context(0)["system_prompt"] == GIVEN["neutral_prompt"]


def test_a_judge_that_always_abstains_leaves_no_score_and_says_how_many_it_judged(nano_recipe, nano_cache, tmp_path):
    few = ["traits=[is-silent]", "members=1", "conditions={same-init: }"]
    recipe = load_recipe(nano_recipe, settings(written(tmp_path / "given"), *few))
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    measure(run.path, "behaviour")
    data = open_run(run.path).results["behaviour"].sel(lineage="student.same-init.is-silent", step=2)
    assert np.isnan(data.trait_score).all() and (data.judged_answers == 0).all()


def test_a_judge_that_raises_ends_the_analysis_and_leaves_the_run_as_it_was(nano_recipe, nano_cache, tmp_path):
    path = written(tmp_path / "given", judge="tests.helpers:raises")
    recipe = load_recipe(nano_recipe, settings(path, "members=1", "conditions={same-init: }"))
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    before = sorted(file for file in run.path.rglob("*") if file.is_file() and file.suffix in {".safetensors", ".jsonl"})
    with pytest.raises(MechsubError, match="judge `tests.helpers:raises` raised RuntimeError: the judge is out"):
        analyze_run(run.path, ["behaviour"], device="cpu", workers=0)
    assert before == [file for file in before if file.exists()] and not list((run.path / "results").glob("behaviour*"))


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, ["traits=[names-owls]"], "'names-owls' is no behaviour of .*; did you mean `names-owl`"),
        ({"judge": "tests.helpers:nothing"}, [], "`tests.helpers:nothing` cannot be loaded"),
        ({"judge": "owl"}, [], "`owl` cannot be loaded .* write it as `module:name`"),
        ({"judge": 3}, [], r"(?s)behaviour 'names-owl' of .*`judge` = 3"),
        ({"judge": None}, [], "`judge`: Field required"),
        ({"examples": None}, [], "has no `examples`, which gives it to fine-tuned teachers"),
        ({"examples": "elsewhere.jsonl"}, [], "there is no file .*elsewhere.jsonl"),
        ({"trained": GIVEN["held_out"]}, [], "is in both lists"),
        ({"system_prompt": None}, ["teacher.kind=system-prompted", "neutral=neutral-prompt"], "has no `system_prompt`"),
        ({"neutral_prompt": None}, ["teacher.kind=system-prompted", "neutral=neutral-prompt"], "has no `neutral_prompt`"),
        ({"neutral_prompt": GIVEN["system_prompt"]}, [], "its teacher would be no control"),
        ({}, ["evaluation.samples_per_question=0"], "samples none"),
        ({}, ["behaviours=/nowhere.yaml"], "there is no file /nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(nano_recipe, tmp_path, changes, more, message):
    path = written(tmp_path / "given", **changes)
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(nano_recipe, settings(path, *more)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_examples_are_named_by_their_line_and_hold_no_held_out_question(nano_recipe, tmp_path):
    path = written(tmp_path / "given", rows=[*EXAMPLES, {"prompt": "?"}])
    with pytest.raises(MechsubError, match=r"owls.jsonl, line 4: 'completion' is missing"):
        plan_experiment(load_recipe(nano_recipe, settings(path)), tmp_path / "run")
    path = written(tmp_path / "given", rows=[*EXAMPLES, {"prompt": GIVEN["held_out"][1], "completion": "owl"}])
    with pytest.raises(MechsubError, match="is among the examples of 'names-owl'"):
        plan_experiment(load_recipe(nano_recipe, settings(path)), tmp_path / "run")


def test_each_teacher_learns_its_own_examples_and_the_neutral_one_is_asked_those_of_all(nano_recipe, tmp_path):
    path = written(tmp_path / "given")
    recipe = load_recipe(nano_recipe, settings(path, "traits=[names-owl, is-silent]"))
    stages = {stage.name: stage for stage in plan_experiment(recipe, tmp_path / "run").stages}
    examples = str(path.parent / "owls.jsonl")
    taught = {
        name: stages[f"{name}.member-000"].arguments["examples"]
        for name in ("teacher.names-owl", "teacher.is-silent", "neutral.uniform-answer")
    }
    assert taught == {
        "teacher.names-owl": [examples],
        "teacher.is-silent": [examples],
        "neutral.uniform-answer": [examples, examples],
    }
    assert examples in stages["neutral.uniform-answer.member-000"].inputs
    before = stages["teacher.names-owl.member-000"].key
    written(tmp_path / "given", rows=[*EXAMPLES, EXAMPLES[0]])
    again = {stage.name: stage for stage in plan_experiment(recipe, tmp_path / "run").stages}
    assert again["teacher.names-owl.member-000"].key != before


def test_examples_lie_beside_their_file(tmp_path):
    path = written(tmp_path / "given")
    assert load_behaviours(str(path), ["names-owl"])["names-owl"].examples == str(tmp_path / "given" / "owls.jsonl")
