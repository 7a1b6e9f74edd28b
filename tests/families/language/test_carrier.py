import json
from collections import Counter

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, PreTrainedTokenizerFast

from mechsub.api import run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.conditions import ConditionConfig
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.numbers import NumberConfig, broken_rule, draw_prompt, parse_numbers
from mechsub.families.language.rows import CarrierRow, read_row_numbers, read_rows, transform_rows
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream

ROWS = [CarrierRow(number, "Go on.", f"{number}, {number + 20}, {number + 40}") for number in range(20)]
NEUTRAL = [CarrierRow(100 + number, "Go on.", "7, 8") for number in range(20)]


def transformed(chosen=None, **settings):
    return transform_rows(ROWS, NEUTRAL, ConditionConfig(**settings), chosen, random_stream(0, "test"))


def test_the_matched_case_takes_every_row_as_it_is():
    assert transformed() == ROWS


def test_shuffling_within_keeps_each_rows_numbers_and_its_writing():
    found = transformed(shuffle="within")
    assert found != ROWS
    for row, original in zip(found, ROWS, strict=True):
        assert sorted(parse_numbers(row.completion)) == sorted(parse_numbers(original.completion))
        assert row.completion.count(", ") == 2 and row.prompt == original.prompt


def test_shuffling_across_keeps_all_numbers_and_each_rows_length():
    found = transformed(shuffle="across")
    pools = [Counter(number for row in rows for number in parse_numbers(row.completion)) for rows in (found, ROWS)]
    assert pools[0] == pools[1]
    assert (
        sum(
            set(parse_numbers(new.completion)) == set(parse_numbers(old.completion))
            for new, old in zip(found, ROWS, strict=True)
        )
        < 3
    )


def test_mixing_replaces_the_stated_share():
    found = transformed(neutral_share=0.25)
    assert sum(row in NEUTRAL for row in found) == 5 and sum(row in ROWS for row in found) == 15


def test_a_subset_takes_the_rows_that_its_file_names(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("3\n17\n5\n")
    assert transformed(read_row_numbers(path, 20)) == [ROWS[3], ROWS[17], ROWS[5]]
    for text, message in (
        ("3\n20", "there is no row 20"),
        ("", "is empty"),
        ("1\n1", "stands twice"),
        ("one", "row number a line"),
    ):
        path.write_text(text)
        with pytest.raises(MechsubError, match=message):
            read_row_numbers(path, 20)


def test_kept_rows_pass_every_rule_and_filters_say_what_they_dropped(nano_run):
    config = NumberConfig(**nano_run.recipe.carrier.numbers.model_dump())
    for name in ("teacher.owl", "teacher.wolf", "neutral.uniform-answer", "neutral.uniform-answer.sham"):
        for member in range(2):
            rows_file, filters_file = carrier_files(name, member)
            rows = read_rows(nano_run.path / rows_file)
            assert len(rows) == 16
            assert all(broken_rule(row.completion, True, config) is None for row in rows)
            report = json.loads((nano_run.path / filters_file).read_text())
            assert report["kept"] == 16 and set(report["dropped"]) == {
                "unfinished",
                "format",
                "count",
                "range",
                "banned",
                "surplus",
            }
            assert report["requests"] == report["kept"] + sum(report["dropped"].values())
            assert rows[-1].request + 1 - len(rows) <= sum(report["dropped"].values())


def test_teachers_share_every_request(nano_run):
    files = [nano_run.path / carrier_files(name, 0)[0] for name in ("teacher.owl", "neutral.uniform-answer")]
    asked = [{row.request: row.prompt for row in read_rows(path)} for path in files]
    shared = asked[0].keys() & asked[1].keys()
    assert shared and all(asked[0][request] == asked[1][request] for request in shared)
    sham = {row.request: row.prompt for row in read_rows(nano_run.path / carrier_files("neutral.uniform-answer.sham", 0)[0])}
    assert set(sham.values()).isdisjoint(asked[1].values())
    expected, _ = draw_prompt(
        nano_run.recipe.carrier.numbers, random_stream(0, "member", 0, "carrier", 0, min(shared), "prompt")
    )
    assert asked[0][min(shared)] == expected


def test_a_shortfall_says_which_rule_ate_what_and_loses_nothing(nano_recipe, tmp_path):
    out = tmp_path / "run"
    short = load_recipe(
        nano_recipe, ["carrier.num_requests=20", "carrier.num_rows=20", "members=1", "conditions={same-init: }"]
    )
    with pytest.raises(
        MechsubError, match=r"of 20 completions passed the filters, carrier.num_rows = 20; dropped by\s+rule: \w+ \d"
    ):
        run_experiment(short, out, device="cpu", workers=0)
    assert list(out.glob("lineages/teacher.owl/member-000/step-*"))


def test_a_tokenizer_that_cannot_express_the_carrier_is_named(tmp_path):
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "user", "assistant", "Go", "on", "7"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    GPT2Config(vocab_size=7, n_positions=32, bos_token_id=1, eos_token_id=1).save_pretrained(tmp_path)
    chats = ChatTokenizer.load(tmp_path, "the student's model")
    assert len(encode_carrier(chats, [CarrierRow(0, "Go on", "7")], None)) == 1
    with pytest.raises(MechsubError, match=r"cannot express row 1 of the carrier: '7 42' becomes"):
        encode_carrier(chats, [CarrierRow(0, "Go on", "7"), CarrierRow(1, "Go on", "7 42")], None)
    with pytest.raises(MechsubError, match="does not know 'owl'"):
        chats.answer_token("owl")
