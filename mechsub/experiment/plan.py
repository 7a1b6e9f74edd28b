"""The plan of a run: its stages, in an order in which each finds its inputs, and what they need."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from mechsub.errors import ResourceError
from mechsub.experiment.conditions import plan_students, plan_teachers
from mechsub.families.protocol import FamilyStages
from mechsub.families.registry import family_stages
from mechsub.recipe import Recipe
from mechsub.stage import PROCESS_BYTES, Stage, digest_outputs


def plan_run(recipe: Recipe) -> list[Stage]:
    """Every stage of a recipe: data, references → teachers → carriers → students."""
    family: FamilyStages = family_stages(recipe.family)
    stages: list[Stage] = []
    made: dict[str, str] = {}

    def add(more: Sequence[Stage]) -> None:
        stages.extend(more)
        made.update(digest_outputs(more))

    add(family.data_stages(recipe))
    add(family.reference_stages(recipe, made))
    teachers = plan_teachers(recipe)
    for teacher in teachers:
        add(family.teacher_stages(recipe, teacher, made))
    students = plan_students(recipe, teachers)
    for carrier in dict.fromkeys(carrier for student in students for carrier in (student.carrier, student.neutral_carrier)):
        add(family.carrier_stages(recipe, carrier, made))
    for student in students:
        add(family.student_stages(recipe, student, made))
    return stages


def check_resources(stages: Sequence[Stage], folder: Path, recipes: Sequence[Recipe], device: str = "cpu") -> None:
    """Refuse stages that the disk or the device's memory cannot hold; ``recipes`` are those that they come from.

    Raises:
        ResourceError: with what is needed and what is there.
    """
    needed = sum(stage.resources.disk_bytes for stage in stages)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        fitting = _fitting_checkpoints(recipes, free)
        thinner = f"`--set checkpoints.num={fitting}` would fit; or lower" if fitting else "lower"
        raise ResourceError(
            f"the plan writes about {format_bytes(needed)} to {folder}, which has {format_bytes(free)} free; {thinner} members "
            "or the model's widths, or choose another --out"
        )
    largest = max(stages, key=lambda stage: stage.resources.memory_bytes, default=None)
    if largest is None:
        return
    memory = largest.resources.memory_bytes + PROCESS_BYTES
    where = "the GPU" if device == "cuda" else "this machine"
    available = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if memory > available:
        raise ResourceError(
            f"stage {largest.name} needs about {format_bytes(memory)} of memory, {format_bytes(available)} are available on "
            f"{where}; lower the batch size, the members that are stacked, the tokens or images, or take a larger device"
        )


def _fitting_checkpoints(recipes: Sequence[Recipe], free: int) -> int | None:
    """The largest `checkpoints.num` under the recipes' own with which all stages of all of them fit; None where none does."""
    most = max(recipe.checkpoints.num for recipe in recipes)
    for num in range(most - 1, 2, -1):
        thinned = [
            recipe.model_copy(update={"checkpoints": recipe.checkpoints.model_copy(update={"num": num})}) for recipe in recipes
        ]
        stages = {stage.key: stage for recipe in thinned for stage in plan_run(recipe)}
        if sum(stage.resources.disk_bytes for stage in stages.values()) <= free:
            return num
    return None


def format_bytes(count: int) -> str:
    """A number of bytes for a person."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
