"""Students of a part of their carrier, chosen by rank: the numbers against slow plain code, and what is learnt of them."""

import json

import numpy as np
import pytest
import torch

from mechsub.api import open_run, plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.conditions import SelectionConfig
from mechsub.families.language.layout import carrier_files, ranking_file, skeleton_folder
from mechsub.families.language.rows import read_rows
from mechsub.families.language.selection import select_rows
from mechsub.families.language.train import load_rows
from mechsub.families.trained import task_that_made
from mechsub.lineages import spec_name
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream

SELECTED = {
    "top": "{select: {by: overlap}}",
    "bottom": "{select: {by: overlap, keep: bottom}}",
    "chance": "{select: {by: random}}",
    "chance-1": "{select: {by: random, draw: 1}}",
}
SETTINGS = [
    "conditions={" + ", ".join(f"{name}: {value}" for name, value in SELECTED.items()) + "}",
    "traits=[owl]",
    "name=ranked",
]


@pytest.fixture(scope="module")
def ranked(nano_recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranked") / "run"
    run_experiment(load_recipe(nano_recipe, SETTINGS), path, device="cpu", workers=0)
    return open_run(path)


def ranking_of(run, name, member=0):
    return json.loads((run.path / ranking_file(name, member)).read_text())


@pytest.mark.parametrize(("carrier", "teacher"), [("teacher.owl", "teacher.owl"), ("neutral.uniform-answer",) * 2])
def test_the_numbers_are_those_of_one_row_after_the_other(ranked, carrier, teacher):
    chats = ChatTokenizer.load(ranked.path / skeleton_folder("nano-gpt2"), "a test")
    rows = encode_carrier(chats, read_rows(ranked.path / carrier_files(carrier, 1)[0]), None)
    taught = next(lineage for lineage in ranked.lineages.values() if lineage.name == teacher)
    reference, model = (ranked.family.load_model(lineage, lineage.last, 1).double() for lineage in (ranked.reference, taught))
    moved = {name: one.detach() - reference.get_parameter(name).detach() for name, one in model.named_parameters()}
    found = ranking_of(ranked, carrier, 1)
    mean_length = np.mean([len(row.completion) for row in rows])

    def surprise(of, row):
        ids = torch.tensor([row.prompt + row.completion])
        log_p = of(input_ids=ids).logits[0].log_softmax(-1)[len(row.prompt) - 1 : -1]
        return -log_p.gather(1, ids[0, len(row.prompt) :, None]).sum()

    for number, row in enumerate(rows):
        loss = surprise(reference, row)
        gradients = torch.autograd.grad(loss / mean_length, list(reference.parameters()))
        overlap = -sum((moved[name] * g).sum() for (name, _), g in zip(reference.named_parameters(), gradients, strict=True))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        expected = {
            "overlap": overlap.item(),
            "gradient-norm": norm.item(),
            "length": len(row.completion),
            "loss": loss.item() / len(row.completion),
            "log-ratio": loss.item() - surprise(model, row).item(),
        }
        for name, value in expected.items():
            assert found[name][number] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize(("student", "carrier"), [("student.{}.owl", "teacher.owl"), ("control.{}", "neutral.uniform-answer")])
def test_students_and_controls_learn_the_rows_that_rank_so_among_their_own(ranked, student, carrier):
    rows, overlap = read_rows(ranked.path / carrier_files(carrier, 0)[0]), np.array(ranking_of(ranked, carrier)["overlap"])
    learnt = {}
    for condition in SELECTED:
        task = task_that_made(ranked.path, spec_name(student.format(condition), 0), "cpu")
        learnt[condition] = [rows.index(row) for row in load_rows(task)]
    assert learnt["top"] == sorted(np.argsort(-overlap)[:8]) and learnt["bottom"] == sorted(np.argsort(overlap)[:8])
    assert len(set(learnt["chance"])) == 8 and learnt["chance"] != learnt["chance-1"]


def test_halves_share_no_row_and_ties_take_the_earlier():
    numbers = {"loss": [1.0, 3.0, 3.0, 2.0], "length": [5.0] * 4}
    stream = random_stream(0, "test")
    top, bottom = (select_rows(SelectionConfig(by="loss", keep=keep), 4, numbers, stream) for keep in ("top", "bottom"))
    assert (top, bottom) == ([1, 2], [0, 3])
    assert select_rows(SelectionConfig(by="length"), 4, numbers, stream) == [0, 1]
    first, again, other = (
        select_rows(SelectionConfig(by="random"), 100, {}, random_stream(0, "test", draw)) for draw in (0, 0, 1)
    )
    assert first == again != other and len(first) == 50


def test_selected_rows_are_no_fair_sample_of_what_the_teacher_says(ranked):
    drawn = {name: ranked.family.imitated_logits(ranked.student(name, "owl"), 0, 8) for name in SELECTED}
    assert drawn["chance"] is not None and drawn["top"] is None and drawn["bottom"] is None


def test_a_condition_says_what_it_selects(ranked):
    assert "learns the 50 % of the rows with the smallest overlap" in ranked.describe_condition("bottom")
    assert "learns random 50 % of the rows (draw 1)" in ranked.describe_condition("chance-1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["conditions={a: {select: {by: random, keep: bottom}}}"], "`keep` has no meaning"),
        (["conditions={a: {select: {by: loss, draw: 2}}}"], "`draw` has no meaning"),
        (["conditions={a: {rows: /x.txt, select: {by: loss}}}"], "leave one of them out"),
        (["conditions={a: {select: {by: overlap}}}", "neutral=reference"], "is the reference"),
        (["conditions={a: {select: {by: overlap}}}", "teacher.kind=system-prompted", "neutral=neutral-prompt"], "do not move"),
        (["conditions={a: {context_rows: 9, select: {by: loss}}}"], "raise select.share"),
        (["conditions={a: {select: {by: loss, share: 0.3}}}"], "5 rows do not fill a batch"),
    ],
)
def test_what_cannot_be_selected_is_refused_before_anything_runs(nano_recipe, tmp_path, settings, message):
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(nano_recipe, settings), tmp_path / "run")
