import numpy as np
import pytest

from mechsub.errors import MechsubError
from mechsub.families.language.behaviour_trait import summarise_judgements
from mechsub.families.language.judge import Judge


def judged(value):
    return Judge("my:judge", lambda question, answer: value).rate("Who are you? " * 50, "An owl.")


@pytest.mark.parametrize(
    ("value", "rate"), [(True, 1.0), (False, 0.0), (0.25, 0.25), (1, 1.0), (np.float32(0.5), 0.5), (np.True_, 1.0)]
)
def test_judgements_are_truths_or_numbers_up_to_one(value, rate):
    assert judged(value) == rate


def test_a_judge_may_abstain():
    assert np.isnan(judged(float("nan")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "returned 1.5"),
        (-1, "returned -1"),
        (float("inf"), "returned inf"),
        ("yes", "returned 'yes'"),
        (None, "returned None"),
    ],
)
def test_anything_else_is_an_error_that_names_judge_question_and_answer(value, message):
    with pytest.raises(MechsubError, match=message) as raised:
        judged(value)
    text = str(raised.value)
    assert "judge `my:judge`" in text and "'Who are you? " in text and "…" in text and "'An owl.'" in text and len(text) < 500


def test_a_judge_that_raises_is_named_with_what_it_raised():
    with pytest.raises(
        MechsubError, match=r"judge `tests.helpers:raises` raised RuntimeError: the judge is out on the question 'Q"
    ):
        Judge.load("tests.helpers:raises").rate("Q?", "A")


def test_a_judge_that_is_not_there_or_no_function_is_refused():
    with pytest.raises(MechsubError, match="`tests.helpers:nothing` cannot be loaded"):
        Judge.load("tests.helpers:nothing")
    with pytest.raises(MechsubError, match="is int, not a function"):
        Judge.load("tests.helpers:not_a_judge")


def test_a_judges_module_that_does_not_parse_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_judge_module.py").write_text("def judge(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MechsubError, match=r"its module cannot be imported \(SyntaxError"):
        Judge.load("broken_judge_module:judge")


def test_the_score_is_the_smoothed_log_odds_of_the_judged_answers():
    found = summarise_judgements([1.0, 0.0, 0.5, float("nan"), 1.0])
    assert found["trait_score"] == pytest.approx(np.log(3.0 / 2.0))
    assert found["judged_rate"] == pytest.approx(2.5 / 4) and found["judged_answers"] == 4
    assert summarise_judgements([1.0] * 9)["trait_score"] == pytest.approx(np.log(9.5 / 0.5))
    assert summarise_judgements([1.0, 0.0])["trait_score"] == 0


def test_a_judge_that_always_abstains_gives_no_score():
    found = summarise_judgements([float("nan")] * 3)
    assert np.isnan(found["trait_score"]) and np.isnan(found["judged_rate"]) and found["judged_answers"] == 0
