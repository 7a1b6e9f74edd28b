"""A run directory: the only place where the experiment and the analyses meet.

Every write goes to a temporary name, is flushed and then renamed, so that a killed process leaves whole files only.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mechsub.errors import RunDirectoryError, StageHeldError
from mechsub.stage import Stage

SCHEMA_VERSION = 3
"""1 had no copy of the data in the run; 2 did not say a lineage's role."""
_HASH_CHUNK = 1 << 20
_MEASURED = ("lineages/", "data/", "carrier/")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success flush it to the disk and rename it to ``path``.

    The name is always the same, so that what a killed process left is written over: locks keep out a second writer.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> None:
    """Give a file that exists a second name in a run: nothing large is copied, and nothing of the file is changed.

    A hard link where both lie on one disk, else a symbolic one, with which the run needs the other place to stay.
    """
    temporary = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        real = source.resolve()
        try:
            os.link(real, temporary)
        except OSError:
            temporary.symlink_to(real)
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(target, error) from error


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON; NaN is refused, since JSON has no word for it."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_unused(folder: Path) -> bool:
    """Whether a new run may go here: nothing is in it but what a run leaves that was killed before it wrote its header."""
    if not folder.exists():
        return True
    left_over = {".lock", ".holder", ".part"}
    return folder.is_dir() and all(path.suffix in left_over for path in folder.rglob("*") if not path.is_dir())


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when its stage ended."""

    size: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """What ``stages/<key>.json`` holds."""

    name: str
    key: str
    function: str
    arguments: Mapping[str, Any]
    inputs: Mapping[str, FileRecord]
    outputs: Mapping[str, FileRecord]
    seconds: float
    mechsub: str


class RunDirectory:
    """The files of one run, by their names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Open a run directory that exists.

        Raises:
            RunDirectoryError: not a run directory, or one of another schema.
        """
        directory = cls(Path(path))
        if directory.path.is_file():
            raise RunDirectoryError(f"{path} is a file, not a run directory; choose another path")
        if not directory.path.is_dir():
            raise RunDirectoryError(f"{path} does not exist; `mechsub run RECIPE --out {path}` makes it")
        if not directory.header_path.is_file():
            holds = (
                "it holds a sweep, whose runs are in its folder runs/"
                if (directory.path / "sweep.json").is_file()
                else "it has no run.json"
            )
            raise RunDirectoryError(f"{path} is not a run directory: {holds}; {_suggest_folder(directory.path)}")
        schema = directory.header.get("schema")
        if schema != SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{path} has schema version {schema!r}, this mechsub reads {SCHEMA_VERSION}; "
                f"use the version that made it: mechsub {directory.header.get('versions', {}).get('mechsub', 'unknown')}"
            )
        return directory

    @property
    def header_path(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def recipe_path(self) -> Path:
        """``recipe.yaml``."""
        return self.path / "recipe.yaml"

    @property
    def header(self) -> dict[str, Any]:
        """The immutable header: schema, the recipe but for its conditions, versions, git commit, hardware."""
        return _read_json(
            self.header_path,
            "put back a copy of it, weights and results are as they were; without one run the recipe again elsewhere",
        )

    def records(self) -> dict[str, StageRecord]:
        """Every finished stage, by its name."""
        found: dict[str, StageRecord] = {}
        for path in sorted((self.path / "stages").glob("*.json")):
            record = _parse_record(path)
            found[record.name] = record
        return found

    def record_path(self, key: str) -> Path:
        """``stages/<key>.json``."""
        return self.path / "stages" / f"{key}.json"

    def progress_path(self, key: str) -> Path:
        """Where a running stage says how far it is."""
        return self.path / "stages" / f"{key}.progress"

    def failure_path(self, key: str) -> Path:
        """Where a stage that failed says why."""
        return self.path / "stages" / f"{key}.failed"

    def failures(self) -> list[str]:
        """Why stages failed that are still not done."""
        return [path.read_text() for path in sorted((self.path / "stages").glob("*.failed"))]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage has ended, its outputs are there, whole, and its inputs are still those that it read."""
        path = self.record_path(stage.key)
        if not path.is_file():
            return False
        record = _parse_record(path)
        whole = all(_size(self.path / name) == known.size for name, known in record.outputs.items())
        return whole and not self.outdated_inputs(record)

    def outdated_inputs(self, record: StageRecord) -> list[str]:
        """The inputs of a stage that have been made anew since, with other bytes."""
        made = self.producers()
        return [name for name, known in record.inputs.items() if name in made and made[name][1] != known]

    def check_file(self, name: str, known: FileRecord, stage: str) -> None:
        """Compare a file with what its stage recorded.

        Raises:
            RunDirectoryError: naming the file, the expected and the found hash, and how to rebuild it.
        """
        path = self.path / name
        rebuild = f"to rebuild it, delete it and run `mechsub run {self.recipe_path} --out {self.path}` again"
        if stage.startswith("analysis."):
            rebuild = f"to rebuild it, delete it and run `mechsub analyze {self.path}` again"
        source = self._source_of(known)
        if source is not None:
            rebuild = f"it is linked to {source}: put that file back as it was, or take what it is now into another folder"
        size = _size(path)
        if size is None:
            raise RunDirectoryError(f"{path} is missing (made by stage {stage}, {known.size} bytes); {rebuild}")
        found = hash_file(path)
        if found != known.sha256:
            raise RunDirectoryError(
                f"{path} has changed since stage {stage} made it: expected sha256 {known.sha256[:16]}… "
                f"({known.size} bytes), found {found[:16]}… ({size} bytes); {rebuild}"
            )

    def _source_of(self, known: FileRecord) -> str | None:
        """The file outside of the run that a linked one is."""
        inputs = {name: file for record in self.records().values() for name, file in record.inputs.items()}
        return next((name for name, file in inputs.items() if Path(name).is_absolute() and file == known), None)

    def check_files(self, names: Iterable[str]) -> None:
        """`check_file` for each of these files that a stage has recorded."""
        made = self.producers()
        for name in sorted({*names} & made.keys()):
            maker, known = made[name]
            self.check_file(name, known, maker)

    def write_record(self, stage: Stage, seconds: float, version: str) -> None:
        """Write down that a stage has ended. The record is the last file that a stage writes."""
        produced = self.producers()
        record = {
            "name": stage.name,
            "key": stage.key,
            "function": stage.function,
            "arguments": stage.arguments,
            "inputs": {name: vars(produced[name][1] if name in produced else self._describe(name)) for name in stage.inputs},
            "outputs": {name: vars(self._describe(name)) for name in stage.outputs},
            "seconds": round(seconds, 3),
            "mechsub": version,
        }
        replaced = self.records().get(stage.name)
        write_json(self.record_path(stage.key), record)
        self._drop_replaced(replaced, stage)

    def _drop_replaced(self, replaced: StageRecord | None, stage: Stage) -> None:
        """Two records of one stage would both speak for its files."""
        if replaced is not None and replaced.key != stage.key:
            self.record_path(replaced.key).unlink(missing_ok=True)

    def adopt(self, stage: Stage, other: "RunDirectory") -> None:
        """Take over a finished stage of another run: the same key is the same work. Files are linked where the disk can.

        Raises:
            RunDirectoryError: a file of the other run is not what its stage left.
        """
        record = _parse_record(other.record_path(stage.key))
        for name, known in record.outputs.items():
            other.check_file(name, known, record.name)
        replaced = self.records().get(stage.name)
        for name in record.outputs:
            with atomic_write(self.path / name) as temporary:
                temporary.unlink(missing_ok=True)
                try:
                    os.link(other.path / name, temporary)
                except OSError:
                    shutil.copyfile(other.path / name, temporary)
        with atomic_write(self.record_path(stage.key)) as temporary:
            shutil.copyfile(other.record_path(stage.key), temporary)
        self._drop_replaced(replaced, stage)

    def producers(self) -> dict[str, tuple[str, FileRecord]]:
        """For every recorded file, the stage that made it and what it was."""
        return {name: (record.name, known) for record in self.records().values() for name, known in record.outputs.items()}

    def measured_files(self) -> dict[str, FileRecord]:
        """What analyses read: the lineages, the data on which they are scored, and what teachers passed on."""
        made = self.producers()
        return {name: known for name, (_, known) in made.items() if name.startswith(_MEASURED)}

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold one lock of this directory; the system frees it when its process ends, however it ends.

        Raises:
            StageHeldError: another process holds it; the message says which.
        """
        path = self.path / "stages" / f"{name}.lock"
        holder = path.with_suffix(".holder")
        lock = FileLock(path, timeout=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            who = holder.read_text() if holder.is_file() else "another process"
            raise StageHeldError(f"{name} in {self.path} is being worked on by {who}; wait for it, or stop it") from None
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def _describe(self, name: str) -> FileRecord:
        path = self.path / name
        return FileRecord(size=path.stat().st_size, sha256=hash_file(path))


def _parse_record(path: Path) -> StageRecord:
    status = path.stat()
    return _parse_record_of(path, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=10_000)
def _parse_record_of(path: Path, modified: int, inode: int) -> StageRecord:
    """The record as it was at that moment: an executor asks for all of them several times a second."""
    content = _read_json(path, "a stage's record can be deleted: the stage runs again")
    try:
        for group in ("inputs", "outputs"):
            content[group] = {name: FileRecord(**known) for name, known in content[group].items()}
        return StageRecord(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise RunDirectoryError(f"{path} is not a stage's record ({error}); delete it and run again") from None


def _suggest_folder(path: Path) -> str:
    """Which folder was perhaps meant."""
    inside = sorted(one.parent.name for one in path.glob("*/run.json"))
    if inside:
        return f"runs in it: {', '.join(inside[:5])}{' and others' if len(inside) > 5 else ''}"
    above = next((one for one in path.resolve().parents if (one / "run.json").is_file()), None)
    return f"the one that it is part of is {above}" if above else "a new run goes into a new or an empty folder"


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); {advice}") from None
    return content


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    """A full disk or a missing permission, in the user's words."""
    why = error.strerror or str(error)
    return RunDirectoryError(f"{path} cannot be written: {why}; free the disk or choose another --out, then run again")
