"""A carrier that another model rewrites before the student learns it."""

import json

import pytest

from mechsub.api import run_experiment
from mechsub.errors import MechsubError
from mechsub.experiment.plan import plan_run
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.numbers import NumberConfig, draw_prompt, parse_numbers, write_request
from mechsub.families.language.paraphrase import FileCarrier
from mechsub.families.language.requests import Request
from mechsub.families.language.rows import read_rows
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream
from tests.families.language.test_derived_references import ONE

CONDITION = "{paraphrase: {share: 0.5, attempts: 8}}"


@pytest.fixture(scope="module")
def paraphrased_run(nano_recipe, nano_cache, tmp_path_factory):
    conditions = f"conditions={{same-init: , paraphrased: {CONDITION}}}"
    recipe = load_recipe(nano_recipe, [ONE, "traits=[owl]", conditions])
    return run_experiment(recipe, tmp_path_factory.mktemp("paraphrased") / "run", device="cpu", workers=0)


def folder_of(run, carrier):
    (found,) = [path.name for path in (run.path / "carrier").glob(f"{carrier}.paraphrased*")]
    return found


@pytest.mark.parametrize("carrier", ["teacher.owl", "neutral.uniform-answer"])
def test_rows_are_rewritten_one_by_one_and_pass_the_carriers_filters(paraphrased_run, carrier):
    for member in range(2):
        own = {row.request: row for row in read_rows(paraphrased_run.path / carrier_files(carrier, member)[0])}
        files = carrier_files(folder_of(paraphrased_run, carrier), member)
        rows_file, filters_file = (paraphrased_run.path / file for file in files)
        rewritten, filters = read_rows(rows_file), json.loads(filters_file.read_text())
        assert len(rewritten) == 8 == filters["kept"]
        assert filters["requests"] == filters["kept"] + sum(filters["dropped"].values())
        for row in rewritten:
            numbers = parse_numbers(row.completion)
            assert numbers and len(numbers) <= 10 and all(0 <= number <= 99 for number in numbers)
            assert row.prompt == own[row.request].prompt and row.completion != own[row.request].completion


def test_students_and_control_learn_as_many_rewritten_rows_in_as_many_steps(paraphrased_run):
    same, student = (paraphrased_run.student(name, "owl") for name in ("same-init", "paraphrased"))
    assert student.steps == same.steps == paraphrased_run.control("paraphrased").steps
    assert not paraphrased_run.starts_elsewhere(student)
    name = "transformer.wte.weight"
    assert not student.load_tensor(student.last, name, 0).equal(same.load_tensor(same.last, name, 0))


def test_what_was_dropped_is_said(paraphrased_run):
    folder = folder_of(paraphrased_run, "teacher.owl")
    assert any(f"the completions of {folder}:" in note for note in paraphrased_run.family.notes)


def test_too_few_rewritten_rows_say_what_dropped_them(nano_recipe, nano_cache, tmp_path):
    condition = "conditions={paraphrased: {paraphrase: {share: 1.0, attempts: 1}}}"
    banned = f"carrier.numbers.banned={list(range(40))}"
    recipe = load_recipe(nano_recipe, [ONE, "traits=[owl]", condition, banned])
    with pytest.raises(MechsubError, match=r"could rewrite \d+ of 16 rows.*dropped by rule: .*Lower paraphrase.share"):
        run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)


def test_too_few_rows_for_a_batch_are_refused_before_anything_runs(nano_recipe, tmp_path):
    recipe = load_recipe(nano_recipe, ["conditions={paraphrased: {paraphrase: {share: 0.1}}}"])
    with pytest.raises(MechsubError, match="2 rows do not fill a batch"):
        run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)


def test_another_model_of_the_recipe_can_rewrite(nano_recipe):
    conditions = "conditions={same-init: , mine: {paraphrase: {model: nano-qwen2}}}"
    plain, with_it = (load_recipe(nano_recipe, [given]) for given in ("conditions={same-init: }", conditions))
    before, after = ({stage.name: stage for stage in plan_run(recipe)} for recipe in (plain, with_it))
    assert all(after[name].key == stage.key for name, stage in before.items())
    added = [stage for name, stage in after.items() if name.startswith("paraphrase.teacher.owl")]
    assert {stage.arguments["model"] for stage in added} == {"nano-qwen2"} and len(added) == 2
    assert all("lineages/reference.nano-qwen2/member-001/lineage.json" in stage.inputs for stage in added[1:])


def test_a_request_is_the_same_whether_its_numbers_are_drawn_or_given():
    config = NumberConfig()
    prompt, shown = draw_prompt(config, random_stream(0, "request"))
    stream = random_stream(0, "request")
    stream.integers(*(config.examples[0], config.examples[1] + 1))
    stream.integers(*config.example_values, size=len(shown))
    assert write_request(config, shown, stream) == prompt and ", ".join(map(str, shown)) in prompt


@pytest.mark.parametrize(
    ("text", "finished", "rule"),
    [("a growl", True, None), ("two owls", True, "banned"), ("", True, "empty"), ("a gr", False, "unfinished")],
)
def test_rows_of_a_users_file_are_held_to_what_is_known_of_them(text, finished, rule):
    assert FileCarrier(["owl"]).broken_rule(Request(""), text, finished) == rule
