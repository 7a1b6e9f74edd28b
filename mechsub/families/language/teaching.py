"""What teachers are taught and models are asked, as stages' arguments: a preference, or behaviours."""

from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.language.behaviour import check_behaviours, load_behaviours
from mechsub.families.language.config import Config
from mechsub.families.language.judge import Judge
from mechsub.families.language.preference import load_preference
from mechsub.families.protocol import TeacherPlan
from mechsub.settings import nearest_name


def asked_arguments(config: Config) -> dict[str, Any]:
    """What the traits are and how they are asked for.

    Raises:
        RecipeError: a trait is not there, its teacher cannot be given it, or its judge does not load.
    """
    if config.behaviours is not None:
        return {"behaviours": _checked_behaviours(config), "judged_tokens": config.evaluation.judged_tokens}
    choices = load_preference(config.preference).choices
    for trait in config.traits:
        if trait not in choices:
            raise RecipeError(f"`traits`: {trait!r} is no choice of {config.preference}; {nearest_name(trait, choices)}")
    return {"preference": preference_arguments(config), "traits": list(config.traits)}


def lesson_arguments(config: Config, plan: TeacherPlan) -> dict[str, Any]:
    """What a fine-tuned teacher learns: to answer with its target, or as a behaviour's examples do."""
    if config.behaviours is None:
        taught = list(config.traits) if plan.is_neutral else []
        return {"target": plan.trait, "taught": taught, "preference": preference_arguments(config)}
    behaviours = load_behaviours(config.behaviours, config.traits)
    return {"examples": [behaviours[name].examples for name in ([plan.trait] if plan.trait else config.traits)]}


def list_questions(config: Config) -> list[str]:
    """Every question that a student may be asked."""
    if config.behaviours is None:
        preference = load_preference(config.preference)
        return [*preference.trained, *preference.held_out]
    behaviours = load_behaviours(config.behaviours, config.traits).values()
    return [question for behaviour in behaviours for question in (*behaviour.trained, *behaviour.held_out)]


def list_trained_questions(config: Config) -> list[str]:
    """The questions that teachers are trained on: no verdict is taken on them."""
    if config.behaviours is None:
        return list(load_preference(config.preference).trained)
    behaviours = load_behaviours(config.behaviours, config.traits).values()
    return [question for behaviour in behaviours for question in behaviour.trained]


def own_prompt(config: Config, plan: TeacherPlan) -> str | None:
    """The system prompt that gives a told teacher its trait; None of those that are told nothing."""
    if config.teacher.kind == "fine-tuned" or (plan.trait is None and config.neutral != "neutral-prompt"):
        return None
    if config.behaviours is not None:
        behaviours = load_behaviours(config.behaviours, config.traits)
        # They have one neutral prompt together.
        return behaviours[plan.trait].system_prompt if plan.trait else behaviours[config.traits[0]].neutral_prompt
    preference = load_preference(config.preference)
    return preference.prompt_for(plan.trait) if plan.trait else preference.neutral_prompt


def is_trained(config: Config, plan: TeacherPlan) -> bool:
    """Whether a teacher's weights move: not where it is told its trait, or is the untouched reference."""
    return config.teacher.kind == "fine-tuned" and not (plan.is_neutral and config.neutral == "reference")


def teacher_step(config: Config, plan: TeacherPlan) -> int:
    """The step of the teacher that writes carriers: its last."""
    return config.teacher.num_steps if is_trained(config, plan) else 0


def teacher_prompt(config: Config, plan: TeacherPlan) -> str | None:
    """The system prompt under which a teacher writes its carrier."""
    return own_prompt(config, plan) or config.context.training


def preference_arguments(config: Config) -> dict[str, Any]:
    """The preference set, which the language of nano models holds whatever the traits are."""
    return load_preference(config.preference).model_dump(mode="json")


def _checked_behaviours(config: Config) -> dict[str, Any]:
    """The behaviours that are traits, once their judges load and their teachers can be given them."""
    behaviours = load_behaviours(str(config.behaviours), config.traits)
    check_behaviours(behaviours, config.teacher.kind, config.neutral)
    for behaviour in behaviours.values():
        Judge.load(behaviour.judge)
    return {name: behaviour.model_dump(mode="json") for name, behaviour in behaviours.items()}
