"""The trait as a behaviour: how often a judge finds it in sampled answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from mechsub.families.language.behaviour import Behaviour
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.config import EvaluationConfig
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.judge import Judge
from mechsub.families.language.trait import Context, encode_questions
from mechsub.families.protocol import Measure, Scores

MEASURES = {
    "trait_score": Measure(
        "log((k + ½)/(n − k + ½)), k: the sum of the judgements of n judged answers (Jeffreys' prior)", "log-odds", None
    ),
    "judged_rate": Measure("k/n, mean judgement of the answers that the judge judged", "rate", (0.0, 1.0)),
    "judged_answers": Measure("n, sampled answers that the judge did not abstain from", "answers", None),
}


def score_behaviours(
    model: PreTrainedModel,
    chats: ChatTokenizer,
    behaviours: Mapping[str, Behaviour],
    contexts: Mapping[str, Sequence[Context]],
    evaluation: EvaluationConfig,
    stream: Sequence[str | int],
    said: Mapping[str, Any],
    verdict_only: bool = False,
) -> Scores:
    """Every measure of every behaviour, by its name, in every one of its contexts; see `score_behaviour`.

    ``verdict_only``: in the first context only; in the others NaN.
    """
    found = []
    for name, behaviour in behaviours.items():
        asked = contexts[name][:1] if verdict_only else contexts[name]
        scores = score_behaviour(model, chats, Judge.load(behaviour.judge), asked, evaluation, [*stream, name], said)
        unasked = len(contexts[name]) - len(asked)
        found.append({measure: np.append(values, np.full(unasked, np.nan)) for measure, values in scores.items()})
    return {measure: np.stack([scores[measure] for scores in found]) for measure in MEASURES}


def score_behaviour(
    model: PreTrainedModel,
    chats: ChatTokenizer,
    judge: Judge,
    contexts: Sequence[Context],
    evaluation: EvaluationConfig,
    stream: Sequence[str | int],
    said: Mapping[str, Any],
) -> dict[str, Float[np.ndarray, " context"]]:
    """Every measure of one behaviour in every context, from sampled answers to each of its questions.

    ``stream`` names the draws of the answers: the same for all models of a member, so that their differences are paired.
    ``said``: see `score_preference`. NaN where the judge abstains from every answer, and where a system prompt of the context
    cannot stand beside the model's own.

    Raises:
        AnalysisError: the judge raises, or returns something that is no judgement.
    """
    scores = {name: np.full(len(contexts), np.nan) for name in MEASURES}
    seed, *name = stream
    for column, context in enumerate(contexts):
        prompts = encode_questions(chats, context, contexts[0], said)
        if prompts is None:
            continue
        places = [number for number in range(len(prompts)) for _ in range(evaluation.samples_per_question)]
        draws = draw_uniforms(int(seed), [(*name, number) for number in range(len(places))], evaluation.judged_tokens)
        answers = sample_completions(model, chats, [prompts[place] for place in places], draws)
        judgements = [judge.rate(context.questions[place], answer.text) for place, answer in zip(places, answers, strict=True)]
        for measure, value in summarise_judgements(judgements).items():
            scores[measure][column] = value
    return scores


def summarise_judgements(judgements: Sequence[float]) -> dict[str, float]:
    """The measures of some judgements, each in [0, 1]; NaN abstains and is not counted.

    Source: the log-odds with half a case added to each side, Haldane 1956 and Anscombe 1956; it is finite at k = 0 and k = n.
    """
    counted = [judgement for judgement in judgements if not np.isnan(judgement)]
    n, k = len(counted), float(sum(counted))
    if n == 0:
        return {"trait_score": np.nan, "judged_rate": np.nan, "judged_answers": 0.0}
    return {"trait_score": float(np.log((k + 0.5) / (n - k + 0.5))), "judged_rate": k / n, "judged_answers": float(n)}
