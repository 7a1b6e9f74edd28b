"""A run directory opened for reading: its recipe, lineages, results and findings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import pandas as pd
import xarray as xr
from torch import nn

from mechsub.errors import AnalysisError
from mechsub.families.protocol import Family
from mechsub.families.registry import load_family
from mechsub.findings import Finding
from mechsub.lineages import SPEC_FILE, Lineage, open_lineage
from mechsub.recipe import Recipe, load_recipe
from mechsub.results import Result, find_results, read_result
from mechsub.rundir import RunDirectory
from mechsub.statistics.verdicts import Rules

DEFAULT_BACKEND = "hooks"
_ROLES = ("reference", "teacher", "neutral", "student", "control", "sham")


@dataclass(frozen=True)
class Run:
    """What a run holds so far. Nothing is read before it is asked for."""

    directory: RunDirectory
    device: str = "cpu"
    report_progress: Callable[[int], None] = field(default=lambda done: None, repr=False)
    """Analyses call it with the number of checkpoints they have been through."""
    backend: str = DEFAULT_BACKEND
    """How activations are reached; see `mechsub.activations.backends`."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.directory.recipe_path)

    @cached_property
    def family(self) -> Family:
        """The run's family, bound to its recipe."""
        family: Family = load_family(self.recipe.family, self.path, self.recipe, self.device)
        return family

    @cached_property
    def lineages(self) -> dict[str, Lineage]:
        """Every finished lineage, by its name; one with a folder a member is finished when all members are."""
        found: dict[str, set[str]] = {}
        for record in self.directory.records().values():
            for output in record.outputs:
                path = PurePosixPath(output)
                if path.name == SPEC_FILE:
                    _, name, *member = path.parent.parts
                    found.setdefault(name, set()).update(member)
        names = [name for name, members in found.items() if not members or len(members) == self.recipe.members]
        lineages = [open_lineage(self.path, name) for name in names]
        return {lineage.name: lineage for lineage in sorted(lineages, key=self._place)}

    @property
    def num_checkpoints(self) -> int:
        """Of all lineages together."""
        return sum(len(lineage.steps) for lineage in self.lineages.values())

    @property
    def traits(self) -> list[str]:
        """The traits that have teachers."""
        return list(self.recipe.trait_set) or [next(iter(self.family.traits))]

    @property
    def conditions(self) -> list[str]:
        """The conditions whose students and control are all there, in the recipe's order."""
        students = len(self.recipe.trait_set) or 1
        return [
            name
            for name in self.recipe.conditions
            if len(self._find("student", name)) == students
            and (self._find("control", name) or not self.recipe.has_control(name))
        ]

    @property
    def missing_conditions(self) -> list[str]:
        """The recipe's conditions that lack a student or their control so far."""
        return [name for name in self.recipe.conditions if name not in self.conditions]

    def describe_condition(self, name: str) -> str:
        """How a condition differs from the matched case, in words."""
        return self.recipe.conditions[name].describe()

    def teacher(self, trait: str) -> Lineage:
        """The teacher of a trait."""
        return next(lineage for lineage in self._find("teacher") if lineage.spec.trait in {trait, None})

    @property
    def neutral(self) -> Lineage | None:
        """The neutral teacher; None in an adopted run that was given none."""
        return next(iter(self._find("neutral")), None)

    @property
    def neutral_name(self) -> str:
        """What figures and findings call it."""
        return "a neutral teacher" if self.neutral is None else self.neutral.name

    @property
    def reference(self) -> Lineage:
        """The teachers' references."""
        return self.reference_of(self.teacher(self.traits[0]))

    def reference_of(self, lineage: Lineage) -> Lineage:
        """The references that a lineage starts from."""
        return self.lineages[lineage.spec.origin.lineage]

    def student(self, condition: str, trait: str) -> Lineage:
        """The student of a trait's teacher."""
        return next(lineage for lineage in self._find("student", condition) if lineage.spec.trait in {trait, None})

    def control(self, condition: str) -> Lineage | None:
        """The control of a condition, whatever the trait; None in an adopted run that was given none."""
        return next(iter(self._find("control", condition)), None)

    def sham(self, condition: str) -> Lineage | None:
        """The second control of a condition, where there is one."""
        return next(iter(self._find("sham", condition)), None)

    def is_comparable(self, condition: str) -> bool:
        """Whether a condition's students have the teachers' parameters; see `why_incomparable`."""
        return not self.why_incomparable(condition)

    def why_incomparable(self, condition: str) -> str:
        """How a condition's students differ from the teachers in architecture, or in a tensor; empty where they do not."""
        start = self.reference_of(self.student(condition, self.traits[0]))
        if start.name == self.reference.name:
            return ""
        activations = [lineage.spec.model.get("activation") for lineage in (self.reference, start)]
        if activations[0] != activations[1]:
            return f"the activation is {activations[1]}, the teachers' {activations[0]}"
        own, other = _shapes(self.reference), _shapes(start)
        different = [name for name in dict.fromkeys([*own, *other]) if own.get(name) != other.get(name)]
        if not different:
            return ""
        name, count = different[0], len(different)
        return f"{count} tensors differ, e.g. {name}: {other.get(name, 'none')} against the teachers' {own.get(name, 'none')}"

    def starts_elsewhere(self, lineage: Lineage) -> bool:
        """Whether a lineage starts at other weights than its member's teacher did."""
        return not lineage.spec.origin.is_reference or lineage.spec.origin.lineage != self.reference.name

    def load_for_reading(self, lineage: Lineage, step: int, member: int) -> nn.Module:
        """One member of a lineage for `backend`: adapters stand inside the weights where a library takes modules apart."""
        return self.family.load_model(lineage, step, member, merged=self.backend != DEFAULT_BACKEND)

    def paired_step(self, control: Lineage, student: Lineage, step: int) -> int | None:
        """The step of a control beside one of a student: the last beside the last, else the same one, where steps are known."""
        if step == student.last:
            return control.last
        known = all(lineage.spec.model.get("steps_are_known", True) for lineage in (control, student))
        return step if known and step in control.steps and step != control.last else None

    def has_one_model(self, lineage: Lineage) -> bool:
        """Whether all members of a lineage are one model, so that what is measured of it alone is one number, not n."""
        if lineage.spec.role == "reference":
            return self.recipe.num_references() == 1
        return bool(lineage.spec.model.get("is_shared", False))

    def rules(self, margin: float) -> Rules:
        """The recipe's rules of verdicts, with a margin in the unit of what is judged."""
        verdict = self.recipe.verdict
        return Rules(margin, verdict.minimum_members, verdict.confidence, verdict.equivalence_level)

    def lacks(self, need: str) -> str | None:
        """None where the run has what an analysis needs, else one sentence that says what to supply.

        Raises:
            AnalysisError: nothing is called so.
        """
        if need not in _NEEDS:
            raise AnalysisError(f"an analysis cannot need {need!r}; known: {', '.join(_NEEDS)}")
        has, sentence = _NEEDS[need]
        return None if has(self) else sentence

    def _find(self, role: str, condition: str | None = None) -> list[Lineage]:
        specs = [(lineage, lineage.spec) for lineage in self.lineages.values()]
        return [lineage for lineage, spec in specs if spec.role == role and spec.condition == condition]

    def _place(self, lineage: Lineage) -> tuple[int, int, int]:
        """Where a lineage stands among the others: by role, then as the recipe lists conditions and traits."""
        conditions, traits = [None, *self.recipe.conditions], [None, *self.recipe.trait_set]
        spec = lineage.spec
        return _ROLES.index(spec.role), conditions.index(spec.condition), traits.index(spec.trait)

    @cached_property
    def results(self) -> dict[str, xr.Dataset]:
        """The labelled arrays of every analysis, by its name."""
        return {name: result.data for name, result in self._results.items()}

    @cached_property
    def findings(self) -> pd.DataFrame:
        """One row per finding, of all analyses."""
        found: list[Finding] = [finding for result in self._results.values() for finding in result.findings]
        return pd.DataFrame([vars(finding) for finding in found])

    @cached_property
    def _results(self) -> dict[str, Result]:
        current, _ = find_results(self.directory)
        return {name: read_result(path) for name, path in current.items()}


def _shapes(lineage: Lineage) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in lineage.spec.tensors.items()}


def _has_carrier_texts(run: Run) -> bool:
    if not run.recipe.passes_text:  # a family that has no text is not opened, which may read all its data
        return False
    teachers = [*map(run.teacher, run.traits), run.neutral]
    return all(teacher is not None and run.family.carrier_texts(teacher.name, 0) is not None for teacher in teachers)


_NEEDS: Mapping[str, tuple[Callable[[Run], bool], str]] = {
    "traits": (
        lambda run: run.recipe.asks_for_traits,
        "No trait is asked for in this run; supply one: `mechsub adopt … --trait CHOICE`, with `--set preference=FILE` for "
        "choices and questions of your own.",
    ),
    "hook_points": (
        lambda run: run.backend == "transformer_lens" or run.family.knows_hook_points(run.reference),
        "Where the blocks of these models are is not known to this backend; `mechsub analyze … --backend transformer_lens` "
        "knows the most architectures (`pip install 'mechsub[backends]'`).",
    ),
    "starts": (
        lambda run: any(run.recipe.conditions[name].shared_start() not in {None, "everything"} for name in run.conditions),
        "No condition is known to differ in its start or architecture alone; take a recipe with such ones, as "
        "`mechsub run digits-cross`.",
    ),
    "several_traits": (
        lambda run: run.recipe.asks_for_traits and len(run.traits) > 1,
        "It compares traits, and this run has one; take a recipe with several, as `mechsub run nano-traits`.",
    ),
    "tokens": (
        lambda run: run.recipe.has_tokens,
        "Its models read and write no tokens; take a run of the language family.",
    ),
    "carrier_texts": (
        _has_carrier_texts,
        "There is no text that a teacher and the neutral teacher wrote in this run; supply it: `mechsub adopt … --neutral "
        "MODEL --data FILE --neutral-data FILE`, or take a run of the language family.",
    ),
}
"""What an analysis can need: whether a run has it, and what to say where it has not."""
