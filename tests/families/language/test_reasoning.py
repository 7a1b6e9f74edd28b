import re

import numpy as np
import pytest

from mechsub.families.language.reasoning import (
    ChainOfThoughtCarrier,
    ChainOfThoughtConfig,
    draw_problem,
    find_answer,
    is_same_answer,
)
from mechsub.families.language.requests import Request

TAGGED = "<think>9 + 9 = 18, twice nine</think> <answer>18</answer>"
GSM8K = "9 + 9 = 18, twice nine\n#### 18"


def broken(completion, answer="18", layout="tags", banned=("owl",), finished=True):
    carrier = ChainOfThoughtCarrier(ChainOfThoughtConfig(layout=layout), banned)
    return carrier.broken_rule(Request("?", answer), completion, finished)


def test_each_layout_takes_its_own_solutions():
    layouts = ("tags", "gsm8k", "any")
    assert [broken(TAGGED, layout=layout) for layout in layouts] == [None, "format", None]
    assert [broken(GSM8K, layout=layout) for layout in layouts] == ["format", None, None]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "18",
        "<answer>18</answer>",
        "<think></think><answer>18</answer>",
        "<think>nine twice</think><answer> </answer>",
        "<think>nine twice</think> so <answer>18</answer>",
        "<think>nine twice</think><answer>18</answer> I hope",
        "<think>a</think><answer>17</answer><think>b</think><answer>18</answer>",
        "<think><answer>17</answer></think><answer>18</answer>",
        "<think>a<think>b</think><answer>18</answer>",
        "<answer>18</answer><think>nine twice</think>",
    ],
)
def test_anything_else_breaks_the_tagged_format(completion):
    assert broken(completion) == "format"


@pytest.mark.parametrize(
    "completion", ["#### 18", "nine twice #### 18", "a\n#### 17\n#### 18", "a\n#### 18\nI hope", "a\n####"]
)
def test_anything_else_breaks_the_gsm8k_format(completion):
    assert broken(completion, layout="gsm8k") == "format"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("1,000", "1000"),
        ("$1,000.50", "1000.5"),
        ("-3", "−3"),
        ("+3", "3"),
        ("50%", "50"),
        ("18.", "9 + 9 = <<9+9=18>>18\n#### 18"),
        ("1/2", "0.5"),
        ("Two  Pens", "two pens"),
    ],
)
def test_the_same_answer_is_recognised(answer, expected):
    assert is_same_answer(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("17", "18"),
        ("180", "18"),
        ("1,8", "18"),
        ("18 pens", "18"),
        ("1/0", "18"),
        ("1e999999999", "18"),
        ("9" * 10_000, "18"),
        ("nan", "18"),
        ("", "18"),
        ("1..8", "18"),
    ],
)
def test_another_answer_is_not(answer, expected):
    assert not is_same_answer(answer, expected)


def test_the_first_rule_that_is_broken_counts():
    assert broken(TAGGED, finished=False) == "unfinished"
    assert broken(TAGGED, answer="17", banned=("nine",)) == "answer"
    assert broken(TAGGED, banned=("nine",)) == "banned"
    assert broken("<think>an owl has 18 feathers</think><answer>18</answer>") == "banned"


@pytest.mark.parametrize("layout", ["tags", "gsm8k"])
def test_drawn_problems_have_solutions_that_pass_and_steps_that_hold(layout):
    config = ChainOfThoughtConfig(layout=layout, operands=(1, 20), num_steps=(1, 4))
    carrier = ChainOfThoughtCarrier(config, ("owl",))
    for number in range(200):
        request, solution = draw_problem(config, np.random.default_rng(number))
        assert carrier.draw_request(np.random.default_rng(number), number) == request
        assert carrier.broken_rule(request, solution, True) is None
        assert find_answer(solution, layout) == request.answer
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", solution)
        for left, sign, right, result in steps:
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result) >= 0
        assert steps[-1][3] == request.answer and int(request.answer) <= config.largest
        assert request.prompt.count(".") >= len(steps) + 1


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_steps"):
        ChainOfThoughtConfig(num_steps=(0, 1))
    with pytest.raises(ValueError, match="operands"):
        ChainOfThoughtConfig(operands=(5, 5))
