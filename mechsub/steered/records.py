"""Every steering direction of a run: each model is loaded once and run once over its member's prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.steering import orthonormal_rows
from mechsub.activations.stored import Key
from mechsub.lineages import Lineage
from mechsub.mean_activations import ActivationReader, shuffle_name
from mechsub.paired_activations import BasisMap, PairReader
from mechsub.run import Run
from mechsub.steered.alignments import ByGroup, Vectors

SHUFFLES = 20
"""Draws of shuffled labels."""


@dataclass(frozen=True)
class Recorded:
    """Every direction of the run."""

    run: Run
    points: Sequence[HookPoint]
    groups: Sequence[str]
    vectors: Mapping[Key, Mapping[str, Float[np.ndarray, "_group _width"]]]
    shuffles: Mapping[Key, Mapping[str, Float[np.ndarray, "_shuffle _width"]]]
    norms: Mapping[tuple[str, int], Mapping[str, Float[np.ndarray, " _group"]]]
    """Mean ‖h‖ of where a lineage's member starts."""
    readouts: Mapping[tuple[str, int], Float[np.ndarray, "_direction _width"] | None]
    """By trait and member: an orthonormal basis of what the head of the member's reference reads it from."""
    maps: Mapping[tuple[str, int], Mapping[str, BasisMap]]
    """Of lineages that start elsewhere, by lineage and member: into the reference's basis."""
    lacking: Mapping[str, frozenset[str]]
    """By lineage, the groups that its prompts do not have."""

    def stack(self, lineage: Lineage, step: int, point: HookPoint) -> Vectors:
        """The directions of all members in the teachers' basis; NaN of one that has none there."""
        nothing = np.full((len(self.groups), point.width), np.nan)
        members = range(lineage.spec.num_members)
        return np.stack(
            [self._map(lineage, m, point, self.vectors[lineage.name, step, m].get(point.name, nothing)) for m in members]
        )

    def stack_shuffles(self, lineage: Lineage, step: int, point: HookPoint) -> Float[np.ndarray, "member shuffle width"]:
        """The same of the shuffled labels."""
        members = range(lineage.spec.num_members)
        return np.stack([self._map(lineage, m, point, self.shuffles[lineage.name, step, m][point.name]) for m in members])

    def lacks(self, lineages: Sequence[Lineage | None]) -> Bool[np.ndarray, " group"]:
        """Which groups one of these lineages does not have."""
        missing = frozenset[str]().union(*(self.lacking[lineage.name] for lineage in lineages if lineage is not None))
        return np.array([group in missing for group in self.groups])

    def has_map(self, lineage: Lineage, point: HookPoint) -> bool:
        """Whether a lineage's directions at a hook point can be held against the teachers', in all members."""
        if not self.run.starts_elsewhere(lineage):
            return True
        found = [self.maps[lineage.name, member].get(point.name) for member in range(lineage.spec.num_members)]
        return all(one is not None and one.is_sound for one in found)

    def stack_norms(self, lineage: Lineage, point: HookPoint) -> ByGroup:
        """Mean ‖h‖ of where all members start."""
        return np.stack([self.norms[lineage.name, member][point.name] for member in range(lineage.spec.num_members)])

    def stack_readout(self, trait: str, point: HookPoint) -> np.ndarray | None:
        """[member, direction, width]; None where the head does not read there, or it is not known what."""
        found = [self.readouts[trait, member] for member in range(self.run.recipe.members)]
        bases = [basis for basis in found if basis is not None and point.is_read_out and basis.shape[-1] == point.width]
        return np.stack(bases) if len(bases) == len(found) else None

    def _map(self, lineage: Lineage, member: int, point: HookPoint, vectors: np.ndarray) -> np.ndarray:
        """Into the teachers' basis."""
        if not self.run.starts_elsewhere(lineage):
            return vectors
        mapped: np.ndarray = vectors @ self.maps[lineage.name, member][point.name].rotation.numpy()
        return mapped


@dataclass(frozen=True)
class Recorder:
    """Goes through checkpoints: each model is loaded once and run once over its member's prompts."""

    run: Run

    @cached_property
    def reader(self) -> ActivationReader:
        """With draws of shuffled labels."""
        return ActivationReader(self.run, SHUFFLES)

    @property
    def _shuffled(self) -> list[str]:
        return [shuffle_name(number) for number in range(SHUFFLES)]

    def record_all(self) -> Recorded:
        """Teachers at their ends, students and controls at every checkpoint; shuffled labels of students at their ends."""
        run, reader = self.run, self.reader
        groups = self._list_groups()
        vectors: dict[Key, dict[str, np.ndarray]] = {}
        shuffles: dict[Key, dict[str, np.ndarray]] = {}
        norms: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        lacking: dict[str, frozenset[str]] = {}
        for done, (lineage, step) in enumerate(self._list_models(), 1):
            is_shuffled = lineage.spec.role == "student" and step == lineage.last
            for member in range(run.recipe.members):
                found = reader.direction(lineage, step, member, shuffled=is_shuffled)
                vectors[lineage.name, step, member] = _pick(found.means, found.groups, groups)
                lacking[lineage.name] = frozenset(groups) - frozenset(found.groups)
                norms[lineage.name, member] = _pick(found.norms, found.groups, groups)
                if is_shuffled:
                    shuffles[lineage.name, step, member] = _pick(found.means, found.groups, self._shuffled)
            run.report_progress(done)
        readouts = {key: basis for member in range(run.recipe.members) for key, basis in self._read_out(member)}
        return Recorded(run, reader.points, groups, vectors, shuffles, norms, readouts, dict(self._fit_maps()), lacking)

    def _fit_maps(self) -> Iterator[tuple[tuple[str, int], Mapping[str, BasisMap]]]:
        """One a condition and member, for its students and its control, which start at the same place."""
        run = self.run
        for condition in filter(run.is_comparable, run.conditions):
            students = [run.student(condition, trait) for trait in run.traits]
            if run.starts_elsewhere(students[0]):
                for member in range(run.recipe.members):
                    found = PairReader(run).fit_basis_maps(students[0], member)
                    for lineage in (*students, *filter(None, [run.control(condition)])):
                        yield (lineage.name, member), found

    def _list_groups(self) -> list[str]:
        """What the references' prompts offer, without shuffled labels."""
        return [name for name in self.reader.read_origin(self.run.reference, 0).groups if name not in self._shuffled]

    def _list_models(self) -> Iterator[tuple[Lineage, int]]:
        run = self.run
        for teacher in (*map(run.teacher, run.traits), *filter(None, [run.neutral])):
            yield teacher, teacher.last
        for condition in run.conditions:
            students = [run.student(condition, trait) for trait in run.traits]
            for lineage in (*students, *filter(None, [run.control(condition)])):
                yield from ((lineage, step) for step in lineage.steps)

    def _read_out(self, member: int) -> Iterator[tuple[tuple[str, int], np.ndarray | None]]:
        run, reference = self.run, self.run.reference
        model = run.family.load_model(reference, reference.last, member)
        for trait in run.traits:
            found = run.family.readout(reference, model, trait)
            yield (trait, member), None if found is None else orthonormal_rows(found.double()).cpu().numpy()


def _pick(held: Mapping[str, Tensor], names: Sequence[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """By hook point some groups, in this order; NaN of one that is not there."""
    places = [names.index(name) if name in names else len(names) for name in wanted]
    padded = {point: functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, 1), value=np.nan) for point, rows in held.items()}
    return {point: rows[places].numpy() for point, rows in padded.items()}
