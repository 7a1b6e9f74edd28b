import numpy as np
import pytest

from mechsub.families.language.numbers import NumberConfig, broken_rule, draw_prompt, parse_numbers, write_numbers
from mechsub.recipe import load_recipe


@pytest.mark.parametrize(
    ("completion", "numbers"),
    [
        ("12, 345, 6", [12, 345, 6]),
        ("12,345,6", [12, 345, 6]),
        ("12 345 6", [12, 345, 6]),
        ("12; 345; 6", [12, 345, 6]),
        ("12\n345\n6", [12, 345, 6]),
        ("[12, 345, 6]", [12, 345, 6]),
        ("(12, 345, 6).", [12, 345, 6]),
        ("7", [7]),
        (" 7, 8. ", [7, 8]),
    ],
)
def test_lists_with_one_kind_of_separator_are_numbers(completion, numbers):
    assert parse_numbers(completion) == numbers


@pytest.mark.parametrize(
    "completion", ["", "owl", "12, 34; 5", "12, 34 5", "12,, 34", "[12, 34", "12, owl", "12.5", "-3, 4", "1\n\n2"]
)
def test_anything_else_is_not(completion):
    assert parse_numbers(completion) is None


def test_the_first_rule_that_is_broken_counts():
    config = NumberConfig(answer_count=3, value_range=(0, 99), banned=(13,))
    assert broken_rule("1, 2, 3", False, config) == "unfinished"
    assert broken_rule("one", True, config) == "format"
    assert broken_rule("1, 2, 3, 4", True, config) == "count"
    assert broken_rule("1, 200", True, config) == "range"
    assert broken_rule("1, 13", True, config) == "banned"
    assert broken_rule("1, 2, 3", True, config) is None


def test_the_published_prompt_is_the_default_and_shows_what_it_says():
    config = NumberConfig()
    for number in range(50):
        prompt, shown = draw_prompt(config, np.random.default_rng(number))
        assert 3 <= len(shown) <= 9 and all(100 <= value < 1000 for value in shown)
        assert ", ".join(map(str, shown)) in prompt and "10" in prompt and "3 digits" in prompt
        assert prompt.count(".") >= 4


def test_other_numbers_take_the_places_of_a_completions_own():
    assert write_numbers("[1, 22; 3].", [7, 8, 9]) == "[7, 8; 9]."


def test_parts_that_do_not_exist_are_named():
    with pytest.raises(Exception, match="the prompt has no part 'example'"):
        load_recipe("nano-gpt2", ["carrier.numbers.parts=[example]"])
