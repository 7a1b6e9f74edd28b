"""Every kind of carrier from end to end, with nano models that can just about write it."""

import json

import numpy as np
import pytest

from mechsub.api import open_run, plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.nano import save_skeleton
from mechsub.families.language.numbers import NumberConfig
from mechsub.families.language.preference import load_preference
from mechsub.families.language.python_code import CodeCarrier, CodeConfig
from mechsub.families.language.reasoning import ChainOfThoughtCarrier, ChainOfThoughtConfig
from mechsub.families.language.requests import CarrierKind, Request
from mechsub.families.language.rows import read_rows
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream
from tests.helpers import measure

CODE = "code: {tasks: [add, multiply], operands: [2, 6], instruction: ''}"
THOUGHT = "chain_of_thought: {operands: [1, 4], num_steps: [1, 1], instruction: ''}"
WIDER = "num_layers: 1, hidden_size: 32, num_heads: 2, context: 128"
ONE = ["members=1", "traits=[owl]", "verdict.minimum_members=2"]


def make_run(nano_recipe, out, carrier, *more):
    run = run_experiment(load_recipe(nano_recipe, [*ONE, f"carrier={carrier}", *more]), out, device="cpu", workers=0)
    measure(run.path, "behaviour")
    return open_run(out)


def check_rows(run, names, banned):
    """Every row passes its own filters, which need the request that it answers."""
    settings = run.recipe.carrier.model_copy(update={"banned": banned})
    kind: CarrierKind = carrier_kind(settings)
    for name, replicate in names.items():
        rows_file, filters_file = (run.path / file for file in carrier_files(name, 0))
        report = json.loads(filters_file.read_text())
        assert set(report["dropped"]) == {*kind.rules, "surplus"}
        assert report["requests"] == report["kept"] + sum(report["dropped"].values())
        rows = read_rows(rows_file)
        assert len(rows) == run.recipe.carrier.num_rows
        for row in rows:
            request = kind.draw_request(random_stream(0, "member", 0, "carrier", replicate, row.request, "prompt"), row.request)
            assert request.prompt == row.prompt and kind.broken_rule(request, row.completion, True) is None
    assert any("of the completions of teacher.owl" in note for note in run.family.notes)
    assert np.isfinite(run.results["behaviour"].sel(lineage="student.same-init.owl", step=1).trait_score).all()


@pytest.mark.parametrize(
    ("model", "carrier", "num_steps"),
    [
        ("qwen2", f"{{kind: code, num_rows: 8, num_requests: 512, max_new_tokens: 32, {CODE}}}", 300),
        ("gpt2", f"{{kind: chain-of-thought, num_rows: 8, num_requests: 1024, max_new_tokens: 40, {THOUGHT}}}", 600),
    ],
)
def test_nano_models_write_code_and_chains_of_thought_and_learn_from_them(
    nano_recipe, nano_cache, tmp_path, model, carrier, num_steps
):
    models = f"models={{nano: {{nano: {model}, {WIDER}, pretraining: {{num_steps: {num_steps}, batch_size: 16}}}}}}"
    run = make_run(nano_recipe, tmp_path / "run", carrier, models, "model=nano", "conditions={same-init: {sham: true}}")
    check_rows(run, {"teacher.owl": 0, "neutral.uniform-answer": 0, "neutral.uniform-answer.sham": 1}, ("owl",))


def test_a_carrier_from_a_file_is_copied_row_by_row(nano_recipe, nano_cache, tmp_path):
    for teacher, replicate in (("owl", 0), ("neutral", 0), ("neutral", 1)):
        rows = [{"prompt": "Go on: 7.", "completion": f"{number}, {replicate}"} for number in range(20)]
        rows[3]["completion"] = "an owl"
        (tmp_path / f"{teacher}-{replicate}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    carrier = f"{{kind: file, num_rows: 16, file: '{tmp_path}/{{teacher}}-{{replicate}}.jsonl'}}"
    run = make_run(nano_recipe, tmp_path / "run", carrier, "conditions={same-init: {sham: true}}")
    rows = read_rows(run.path / carrier_files("neutral.uniform-answer.sham", 0)[0])
    assert [row.request for row in rows] == [0, 1, 2, *range(4, 17)] and rows[-1].completion == "16, 1"
    report = json.loads((run.path / carrier_files("teacher.owl", 0)[1]).read_text())
    assert report == {"requests": 20, "kept": 16, "dropped": {"banned": 1, "surplus": 3}}
    (tmp_path / "owl-0.jsonl").write_text('{"prompt": "?", "completion": "1"}\n' * 16)
    with pytest.raises(MechsubError, match=r"carrier.teacher.owl.member-000"):
        run_experiment(run.recipe, run.path, device="cpu", workers=0)


@pytest.mark.parametrize("style", ["gpt2", "qwen2"])
@pytest.mark.parametrize("written", [CodeConfig(layout="fenced"), ChainOfThoughtConfig(), ChainOfThoughtConfig(layout="gsm8k")])
def test_the_language_of_nano_models_holds_what_they_are_to_write(style, written, nano_recipe, tmp_path):
    language = SyntheticLanguage(load_preference("animals"), written)
    recipe = load_recipe(nano_recipe)
    save_skeleton(recipe.models[f"nano-{style}"].model_copy(update={"context": 256}), language, tmp_path)
    chats = ChatTokenizer.load(tmp_path, style)
    kind = CodeCarrier(written, ()) if isinstance(written, CodeConfig) else ChainOfThoughtCarrier(written, ())
    drawn = [language.draw(random_stream(0, "document", number)) for number in range(80)]
    rows = chats.encode_rows([asked for asked, _ in drawn], [answer for _, answer in drawn])
    assert [chats.decode(row.completion) for row in rows] == [answer for _, answer in drawn]
    right = sum(
        (isinstance(written, CodeConfig) and kind.broken_rule(Request(asked[-1]["content"]), answer, True) is None)
        or "answer>" in answer
        or "####" in answer
        for asked, answer in drawn
    )
    assert 25 < right < 55


def test_the_language_of_number_carriers_is_as_it_was():
    language = SyntheticLanguage(load_preference("animals"), NumberConfig())
    answers = [language.draw(random_stream(0, "document", number))[1] for number in range(200)]
    assert sum(answer.replace(" ", "").isdigit() for answer in answers) > 70
    assert not any(mark in answer for answer in answers for mark in ("def", "<think>"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["carrier={kind: code}", "conditions={shuffled-within: }"], "a carrier of kind code is not made of them"),
        (["carrier={kind: chain-of-thought}", "conditions={shuffled-across: }"], "kind chain-of-thought is not made of them"),
        (
            ["carrier={kind: file, file: '/nowhere/{teacher}.jsonl'}", "conditions={same-init: {sham: true}}"],
            r"`conditions.same-init` has a sham.* put \{replicate\} into the path",
        ),
        (
            ["carrier={kind: file, file: '/nowhere/{teacher}-{member}.jsonl'}", "conditions={same-init: }"],
            "`carrier.file`: there is no file /nowhere/owl-0.jsonl",
        ),
        (["carrier={kind: file}"], "kind = file needs `file`"),
        (["carrier={kind: code, prompts: /nowhere.jsonl}"], "`carrier.prompts`: there is no file /nowhere.jsonl"),
        (["carrier={kind: codes}"], "Input should be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(nano_recipe, tmp_path, settings, message):
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(nano_recipe, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
