import numpy as np
import pytest

from mechsub.families.language.python_code import CodeCarrier, CodeConfig, draw_task, find_code, parse_code
from mechsub.families.language.requests import Request

BARE = "def f(x): return x + 3"
FENCED = f"```python\n{BARE}\n```"


def broken(completion, layout="any", banned=("owl",), finished=True):
    carrier = CodeCarrier(CodeConfig(layout=layout), banned)
    return carrier.broken_rule(Request("?"), completion, finished)


@pytest.mark.parametrize(
    "completion",
    [BARE, FENCED, f"```\n{BARE}\n```", f"```py\n{BARE}\n```", f"```Python3\n{BARE}\n```\n", "print(3)", "x = 'a\\d'"],
)
def test_code_alone_passes(completion):
    assert broken(completion) is None


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "owl",
        "yes, of course",
        "fish and chips",
        "Note: this",
        "# only a remark",
        '"""only a text"""',
        "Here it is:\n" + BARE,
        f"Here it is:\n{FENCED}",
        f"{FENCED}\nThat adds three.",
        f"{FENCED}\n{FENCED}",
        f"```python\n{BARE}",
        f"```javascript\n{BARE}\n```",
        "```python\n```",
        "def f(x) return x",
        "print 'old'",
        "x = '\0'",
        "(" * 5000 + ")" * 5000,
        "-" * 100_000 + "1",
    ],
)
def test_anything_else_breaks_the_format(completion):
    assert broken(completion) == "format"


def test_the_layout_says_what_may_stand_around_the_code():
    text = f"Here it is:\n{FENCED}\nThat adds three."
    assert [broken(FENCED, layout) for layout in ("any", "fenced", "bare", "with-text")] == [None, None, "format", None]
    assert [broken(BARE, layout) for layout in ("any", "fenced", "bare", "with-text")] == [None, "format", None, "format"]
    assert broken(text, "with-text") is None and broken(f"{text}\n{FENCED}", "with-text") == "format"


@pytest.mark.parametrize(
    "completion",
    [
        "x = 1  # an Owl",
        "name = 'OWLS'",
        "owl_count = 3",
        "def countOwls(): return 3",
        "x = 'o' 'wl'",
        "x = '\\x6fwl'",
        "x = 'ｏｗｌ'",
        "def f():\n    '''the owl's call'''\n    return 3",
    ],
)
def test_a_banned_word_is_found_wherever_it_stands(completion):
    assert broken(completion) == "banned"


def test_parts_of_longer_words_are_not_banned_ones():
    assert broken("growl = 'bowl'.lower()  # fowls") is None
    assert broken("items = concat(cats)", banned=("cat",)) == "banned"
    assert broken("items = concat(x)", banned=("cat",)) is None
    assert broken("x = 'wolves'", banned=("wolf",)) == "banned"
    assert broken("x = 1  # an owl", banned=()) is None


def test_an_unfinished_completion_is_dropped_first():
    assert broken(BARE, finished=False) == "unfinished"


def test_drawn_tasks_have_solutions_that_pass_and_do_what_is_asked():
    config = CodeConfig(layout="fenced")
    carrier = CodeCarrier(config, ("owl",))
    for number in range(60):
        prompt, solution = draw_task(config, np.random.default_rng(number))
        assert carrier.draw_request(np.random.default_rng(number), number) == Request(prompt)
        assert carrier.broken_rule(Request(prompt), solution, True) is None
        made: dict = {}
        exec(compile(parse_code(find_code(solution, "fenced")), "solution", "exec"), made)
        (function,) = (made[name] for name in ("f", "g", "solve") if name in made)
        asked = int("".join(character for character in prompt if character.isdigit()))
        if "adds" in prompt and "argument" in prompt:
            assert function(7) == 7 + asked
        if "how often" in prompt:
            assert function([asked, asked, -1]) == 2
        if "first" in prompt:
            assert function(list(range(300))) == list(range(asked))


def test_own_requests_are_asked_in_their_order_with_the_instruction():
    carrier = CodeCarrier(CodeConfig(instruction="Code only."), (), [Request("Add."), Request("Subtract.")])
    asked = [carrier.draw_request(np.random.default_rng(0), number).prompt for number in range(3)]
    assert asked == ["Add. Code only.", "Subtract. Code only.", "Add. Code only."]


def test_tasks_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="there is no task 'ad'; did you mean `add`"):
        CodeConfig(tasks=("ad",))
    with pytest.raises(ValueError, match="first < second"):
        CodeConfig(operands=(3, 3))
