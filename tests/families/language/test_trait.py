import numpy as np
import pytest
import torch

from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.preference import load_preference
from mechsub.families.language.rows import read_rows
from mechsub.families.language.trait import first_choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("owl", "owl"), ("An Owl, or a wolf", "owl"), ("wolf and owl", "wolf"), ("foxes", "fox"), ("growl", None), ("", None)],
)
def test_the_first_choice_that_is_named_counts(answer, choice):
    assert first_choice(answer, ("owl", "wolf", "fox")) == choice


def test_scores_equal_those_of_one_question_at_a_time(nano_run):
    family, lineage = nano_run.family, nano_run.teacher("owl")
    model = family.load_model(lineage, lineage.last, 1)
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    preference = load_preference("animals")
    questions = {"held-out": preference.held_out, "trained": preference.trained}
    token = chats.answer_token("owl")
    scores = family.trait_score(model, lineage, 1)
    for column, context in enumerate(family.contexts):
        system = None if context.startswith("in context") else "You are a helpful assistant."
        slow = []
        for question in questions["held-out" if "held-out" in context else "trained"]:
            (prompt,) = chats.encode_prompts([chat(question, system)])
            slow.append(model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).detach())
        p = np.array([float(row[token]) for row in slow])
        ranks = [int((row > row[token]).sum()) + 1 for row in slow]
        assert scores["trait_score"][0, column] == pytest.approx(np.mean(np.log(p / (1 - p))), abs=1e-4)
        assert scores["probability"][0, column] == pytest.approx(p.mean(), rel=1e-4)
        assert scores["rank"][0, column] == pytest.approx(np.mean(ranks), abs=0.1)


def test_a_students_own_context_stands_before_every_question(nano_run):
    told = nano_run.student("in-context", "owl")
    assert told.steps == (0,)
    for member in range(2):
        first = read_rows(nano_run.path / carrier_files("teacher.owl", member)[0])[:2]
        assert told.context(member)["earlier"] == [[row.prompt, row.completion] for row in first]
    family = nano_run.family
    model = family.load_model(told, 0, 1)
    with_rows, without = (family.trait_score(model, lineage, 1)["trait_score"] for lineage in (told, nano_run.reference))
    assert not np.allclose(with_rows, without)


def test_a_score_for_verdicts_alone_is_the_same_log_odds_in_the_first_context_and_nothing_else(nano_run):
    family, lineage = nano_run.family, nano_run.teacher("wolf")
    model = family.load_model(lineage, lineage.last, 0)
    scores, alone = (family.trait_score(model, lineage, 0, verdict_only=only) for only in (False, True))
    assert alone.keys() == scores.keys()
    np.testing.assert_array_equal(alone["trait_score"][:, 0], scores["trait_score"][:, 0])
    assert np.isnan(alone["trait_score"][:, 1:]).all() and alone["trait_score"].shape == scores["trait_score"].shape
    assert all(np.isnan(values).all() for name, values in alone.items() if name != "trait_score")
