"""What a comparison knows of a run: its recipe, the results that it reads, and which replicates its members are."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mechsub.errors import RunDirectoryError
from mechsub.results import Result, find_results, read_result
from mechsub.rundir import RunDirectory
from mechsub.statistics.rules import Rules

_TEACHER = re.compile(r"teacher(\.|$)")
_MEMBER = re.compile(r"member-(\d+)")
_SPEC = "lineage.json"


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    """Its folder's name, with as many of the parents' as make it the only one of this name."""
    path: Path
    header: Mapping[str, Any]
    recipe: Mapping[str, Any]
    results: Mapping[str, Result]
    lacks: Mapping[str, str]
    """By analysis why there is no result of it."""
    replicates: Sequence[str]
    """What each member is, as a hash of the models that it starts from; see `identify_replicates`."""

    @property
    def num_members(self) -> int:
        """The recipe's members."""
        return int(self.recipe["members"])

    def rules(self, margin: str) -> Rules:
        """The rules of its verdicts, with the margin that stands under this name in its recipe."""
        verdict = self.recipe["verdict"]
        return Rules(verdict[margin], verdict["minimum_members"], verdict["confidence"], verdict["equivalence_level"])


def read_run(name: str, directory: RunDirectory, recipe: Mapping[str, Any], analyses: Iterable[str]) -> ComparedRun:
    """What a run has of these analyses; each file is compared with its recorded hash first.

    Raises:
        RunDirectoryError: a result, or a record, has changed or cannot be read.
    """
    current, outgrown = find_results(directory)
    wanted = {analysis: current[analysis] for analysis in dict.fromkeys(analyses) if analysis in current}
    directory.check_files(path.relative_to(directory.path).as_posix() for path in wanted.values())
    outdated = {True: "measured before the run was changed", False: "not measured"}
    lacks = {analysis: outdated[analysis in outgrown] for analysis in analyses if analysis not in wanted}
    results = {analysis: read_result(path) for analysis, path in wanted.items()}
    replicates = identify_replicates(directory, int(recipe["members"]))
    return ComparedRun(name, directory.path, directory.header, recipe, results, lacks, replicates)


def identify_replicates(directory: RunDirectory, num_members: int) -> tuple[str, ...]:
    """What each member is: a hash of its reference; empty where nothing tells members apart.

    Members of two runs with the same hash started from the same reference, bit for bit. Where members share one reference,
    as a large pretrained model, they are told apart by their teachers, whose hashes are then added: the same teacher of the
    same reference is the same replicate, the same reference alone is not.
    """
    made = {name: known.sha256 for name, (_, known) in directory.producers().items() if name.startswith("lineages/")}
    teachers = sorted({name.split("/")[1] for name in made if _TEACHER.match(name.split("/")[1])})
    reference = _find_origin(directory, made, teachers)
    found = _hash_members(directory.path, made, [reference] if reference else [], num_members)
    if len({*found}) < len(found):
        found = _hash_members(directory.path, made, [str(reference), *teachers], num_members)
    return tuple(found) if len({*found}) == len(found) else ("",) * num_members


def pair_members(first: ComparedRun, second: ComparedRun) -> list[tuple[int, int]]:
    """The members of two runs that are the same replicate, as (place in the first, place in the second)."""
    places = {replicate: place for place, replicate in enumerate(second.replicates) if replicate}
    return [(place, places[replicate]) for place, replicate in enumerate(first.replicates) if replicate in places]


def name_runs(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a sweep's ``runs`` folder is left out.

    Raises:
        RunDirectoryError: a directory is given twice.
    """
    resolved = [path.resolve() for path in paths]
    twice = sorted({str(path) for place, path in enumerate(resolved) if path in resolved[:place]})
    if twice:
        raise RunDirectoryError(
            f"given twice: {', '.join(twice)}; a run cannot be held against itself, give each run or sweep once"
        )
    parts = [[part for part in path.parts if part != "runs"] or [path.name] for path in resolved]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(part[-depth:]) for part in parts}) < len(parts):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    return names if len({*names}) == len(names) else [str(path) for path in resolved]


def _find_origin(directory: RunDirectory, made: Mapping[str, str], teachers: Sequence[str]) -> str | None:
    """The lineage that the teachers start from."""
    specs = [name for name in made if Path(name).name == _SPEC and name.split("/")[1] in teachers[:1]]
    try:
        origin = json.loads((directory.path / specs[0]).read_text())["origin"]["lineage"]
    except (IndexError, OSError, ValueError, KeyError, TypeError) as error:
        if specs:
            raise RunDirectoryError(
                f"{directory.path / specs[0]} cannot be read ({error!r}); `mechsub verify {directory.path}` says what else has "
                "changed"
            ) from None
        return None
    return str(origin)


def _hash_members(path: Path, made: Mapping[str, str], lineages: Sequence[str], num_members: int) -> list[str]:
    """One hash a member over the files of these lineages; where a file holds all members, of the member's part of it."""
    known: list[list[str]] = [[] for _ in range(num_members)]
    for name, sha256 in sorted(made.items()):
        _, lineage, *rest = name.split("/")
        if lineage not in lineages or rest[-1] == _SPEC:
            continue
        member = _MEMBER.fullmatch(rest[0])
        if member is None:
            for hashes, part in zip(known, _hash_parts(path / name, sha256, num_members), strict=True):
                hashes.append(part)
        elif int(member[1]) < num_members:
            known[int(member[1])].append(sha256)
    return [hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16] if hashes else "" for hashes in known]


def _hash_parts(file: Path, sha256: str, num_members: int) -> list[str]:
    """Of every member's slice of all tensors as they lie on the disk, so that it is the same beside more members or fewer.

    Where the weights are gone or are no stack of members: the file's own hash with the member's place, which finds it only in
    runs of as many members.
    """
    try:
        tensors = sorted(load_file(file).items())
    except (OSError, SafetensorError):
        tensors = []
    if not tensors or any(tensor.ndim == 0 or len(tensor) != num_members for _, tensor in tensors):
        return [f"{sha256} member {place}" for place in range(num_members)]
    parts = [hashlib.sha256() for _ in range(num_members)]
    for name, tensor in tensors:
        for part, values in zip(parts, tensor, strict=True):
            part.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return [part.hexdigest() for part in parts]
