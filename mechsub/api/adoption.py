"""The public function that makes a run of models which somebody else trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechsub.api.runs import Plan, plan_experiment, run_experiment
from mechsub.errors import RecipeError
from mechsub.recipe import apply_setting, parse_recipe
from mechsub.run import Run


def plan_adoption(
    out: str | Path,
    *,
    reference: Sequence[str],
    teacher: Sequence[str],
    students: Mapping[str, Sequence[str]],
    controls: Mapping[str, Sequence[str]] | None = None,
    neutral: Sequence[str] = (),
    origins: Mapping[str, Sequence[str]] | None = None,
    trait: str | None = None,
    data: str | None = None,
    neutral_data: str | None = None,
    settings: Sequence[str] = (),
) -> Plan:
    """The run that `adopt_models` would make of models which somebody else trained. Writes nothing.

    Every argument but ``out`` and ``trait`` names models: folders, or ``org/name@revision`` on the hub; several are members
    (seeds), in the same order everywhere; one is shared by all. ``controls`` and ``origins`` are by condition, as ``students``
    are. ``data`` and ``neutral_data``: JSONL files of what students and controls learnt. ``settings``: ``key.path=value``
    changes of the run's recipe, e.g. ``context.training=You are helpful.``

    Raises:
        RecipeError: a model is not there or not readable, or the numbers of members differ.
    """
    controls, origins = controls or {}, origins or {}
    for role, given in (("--control", controls), ("--origin", origins)):
        unknown = [name for name in given if name not in students]
        if unknown:
            raise RecipeError(f"{role} {unknown[0]}=…: there is no --student {unknown[0]}=…; known: {', '.join(students)}")
    conditions = {
        name: {
            "students": _absolute(models),
            "controls": _absolute(controls.get(name, ())),
            "origin": _absolute(origins.get(name, ())),
        }
        for name, models in students.items()
    }
    all_models = [reference, teacher, neutral, *students.values(), *controls.values(), *origins.values()]
    recipe: dict[str, Any] = {
        "name": Path(out).name,
        "description": _describe(reference, teacher, neutral),
        "family": "adopted",
        "members": max(map(len, all_models)),
        "reference": _absolute(reference),
        "teacher": _absolute(teacher),
        "neutral": "given" if neutral else "none",
        "neutral_teacher": _absolute(neutral),
        "trait": trait,
        "data": _absolute_file(data),
        "neutral_data": _absolute_file(neutral_data),
        "conditions": conditions,
    }
    for setting in settings:
        apply_setting(recipe, setting)
    return plan_experiment(parse_recipe(recipe, "the adopted run"), out)


def adopt_models(
    out: str | Path,
    *,
    reference: Sequence[str],
    teacher: Sequence[str],
    students: Mapping[str, Sequence[str]],
    device: str = "auto",
    workers: int | None = None,
    **given: Any,
) -> Run:
    """Make a run of models that somebody else trained; see `plan_adoption` for the arguments. Files are linked, not copied."""
    plan = plan_adoption(out, reference=reference, teacher=teacher, students=students, **given)
    return run_experiment(plan, device=device, workers=workers)


def _describe(reference: Sequence[str], teacher: Sequence[str], neutral: Sequence[str]) -> str:
    """What the first screen of the report says of models that nobody here trained."""
    shared = [
        role
        for role, models in (("reference", reference), ("teacher", teacher), ("neutral teacher", neutral))
        if len(models) == 1
    ]
    return (
        "Models that were trained elsewhere; what started where, and what a control differs in, is the user's claim unless it "
        "is proven below." + (f" One {' and one '.join(shared)} for all members: no claim is about others." if shared else "")
    )


def _absolute_file(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _absolute(models: Sequence[str]) -> list[str]:
    """Folders by their whole path, so that the run replays from anywhere; names on the hub as they are."""
    return [str(Path(name).expanduser().absolute()) if Path(name).expanduser().is_dir() else name for name in models]
