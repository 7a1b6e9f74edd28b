"""The public function that ranks a dataset before anybody trains on it."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mechsub.api.runs import resolve_device
from mechsub.environment import describe_provenance
from mechsub.errors import MechsubError, RunDirectoryError
from mechsub.families.adopted.pair import ModelFiles, adopt_pair
from mechsub.families.language.examples_file import FileExamples, TooLong, read_examples_file
from mechsub.families.language.folders import digest_file, read_json
from mechsub.families.language.preference import load_preference
from mechsub.findings import findings_document
from mechsub.gradients import bergson_adapter
from mechsub.reporting.screen import render_screen_report
from mechsub.results import Result, write_result
from mechsub.rundir import atomic_write, hash_file, is_unused, write_json
from mechsub.screening.measure import Backend, Measured, measure
from mechsub.screening.report import ANALYSIS, describe
from mechsub.screening.trait import ask_for

SCREEN_FILE = "screen.json"
_RANKING, _RESULT, _FINDINGS, _FILTERED, _REPORT = (
    "ranking.jsonl", "screen.h5", "findings.json", "filtered.jsonl", "report/index.html"
)  # fmt: skip
_FILES = (_RANKING, _RESULT, _FINDINGS, _FILTERED, _REPORT)
_SCHEMA_VERSION = 1
_LEADING = 10
_SHOWN_CHARACTERS = 160
_DATA, _NEUTRAL_DATA = "--data", "--neutral-data"


def screen_data(
    data: str | Path,
    *,
    reference: str,
    teacher: str | None = None,
    trait: str | None = None,
    preference: str = "animals",
    neutral_data: str | Path | None = None,
    other_traits: Sequence[str] = (),
    keep: float = 0.9,
    too_long: str = "refuse",
    out: str | Path | None = None,
    device: str = "auto",
    backend: str = "exact",
    on_step: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Path:
    """Rank a dataset's examples by how far one small step on each moves the reference toward a trait.

    The score of example i is ⟨−∇ℓ_i, d⟩ at the reference, exact, in loss × direction / weight: positive is toward the trait. d
    is the displacement of ``teacher``, which then ranks, and −∇ of the loss of ``trait``, a choice of the set ``preference``;
    one of the two is needed. ``data`` and ``neutral_data``: JSONL files of ``{prompt, completion}``. ``other_traits``: choices
    whose directions are a null of the trait's; the set's first ten by default. ``too_long``: what becomes of examples that are
    longer than the context: ``refuse``, ``cut`` or ``skip``. ``backend``: ``exact`` takes overlaps in all parameters,
    ``bergson`` in those that this library covers, see `mechsub.gradients.bergson_adapter`.

    Writes into ``out``, ``runs/screen-<name of data>`` by default: ``ranking.jsonl``, ``screen.h5``, ``findings.json``, the
    report, and ``filtered.jsonl``: the lines of ``data`` without the share 1 − ``keep`` that scores highest, nor those that
    could not be scored. A finished screening with the same arguments and files is kept as it is. Returns the
    report's path.

    Source: Pruthi et al., arXiv:2002.08484, for a step's first-order effect; Cloud et al., arXiv:2507.14805.

    Raises:
        MechsubError: an argument, a file or a model that cannot be used, or a folder that holds something else.
    """
    _check_arguments(teacher, trait, other_traits, keep, too_long)
    _check_backend(backend)
    chosen = resolve_device(device)
    models = ModelFiles.find(reference, teacher)
    paths = _absolute_files(data, neutral_data)
    arguments = {
        "reference": reference,
        "teacher": teacher,
        "trait": trait,
        "preference": load_preference(preference).model_dump(mode="json") if trait else None,
        "data": str(paths[_DATA]),
        "neutral_data": str(paths[_NEUTRAL_DATA]) if _NEUTRAL_DATA in paths else None,
        "other_traits": list(other_traits),
        "keep": keep,
        "too_long": too_long,
        "backend": backend,
    }
    inputs = models.digests | {str(path): digest_file(path) for path in paths.values()}
    folder = Path(out) if out is not None else Path("runs") / f"screen-{paths[_DATA].stem}"
    if _is_finished(folder, arguments, inputs):
        return folder / _REPORT

    say = on_step or (lambda _: None)
    with tempfile.TemporaryDirectory() as scratch:
        pair = adopt_pair(Path(scratch), models, chosen)
        examples = {option: read_examples_file(path, option, pair.chats, TooLong(too_long)) for option, path in paths.items()}
        neutral = examples.get(_NEUTRAL_DATA)
        asked = None
        if trait is not None:
            asked = ask_for(trait, other_traits, load_preference(preference), preference, pair.chats)
        measured = measure(pair, examples[_DATA], neutral, asked, Backend(backend), say)
        notes = [] if pair.teacher is None else [pair.origin_note]
    result = describe(measured, examples[_DATA], neutral, notes, trait or "")
    screening = _Screening(folder, paths[_DATA], arguments, inputs, examples[_DATA], measured, result)
    screening.write(keep, describe_provenance(command))
    return folder / _REPORT


def _check_arguments(teacher: str | None, trait: str | None, other_traits: Sequence[str], keep: float, too_long: str) -> None:
    if teacher is None and trait is None:
        raise MechsubError(
            "neither --teacher nor --trait was given: name the model that has the trait, or the trait as a choice of a "
            "preference set, e.g. --trait owl"
        )
    if other_traits and trait is None:
        raise MechsubError(
            f"--other-trait {other_traits[0]} without --trait: directions of other traits are a null of a trait's direction; "
            "name that one with --trait too"
        )
    if not 0 < keep <= 1:
        raise MechsubError(f"--keep {keep}: it is the share of examples that stay, over 0 and at most 1; 0.9 is the default")
    if too_long not in [choice.value for choice in TooLong]:
        raise MechsubError(f"--too-long {too_long}: choose {', '.join(TooLong)}")


def _check_backend(backend: str) -> None:
    if backend not in [choice.value for choice in Backend]:
        raise MechsubError(f"--backend {backend}: choose {', '.join(Backend)}")
    if backend == Backend.BERGSON and not bergson_adapter.is_installed():
        raise MechsubError(f"--backend bergson: bergson is not installed here; {bergson_adapter.INSTALL}, or --backend exact")


def _absolute_files(data: str | Path, neutral_data: str | Path | None) -> dict[str, Path]:
    found = {}
    for option, name in ((_DATA, data), (_NEUTRAL_DATA, neutral_data)):
        if name is not None:
            found[option] = Path(name).expanduser().absolute()
            if not found[option].is_file():
                raise MechsubError(f"{option}: there is no file {name}; give a JSONL file, one example a line")
    return found


def _is_finished(folder: Path, arguments: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether the same screening lies there whole.

    Raises:
        RunDirectoryError: the folder holds something else.
    """
    if is_unused(folder):
        return False
    path = folder / SCREEN_FILE
    if not path.is_file():
        raise RunDirectoryError(f"{folder} is not empty and holds no finished screening; give a new folder with --out")
    record = read_json(path, str(folder))
    known = {**record.get("arguments", {}), **record.get("inputs", {})}
    asked = {**arguments, **inputs}
    differing = [name for name in {**known, **asked} if known.get(name) != asked.get(name)]
    if differing:
        name = differing[0]
        raise RunDirectoryError(
            f"{folder} holds a screening with {name} = {known.get(name)!r}, asked for is {asked.get(name)!r}; give another "
            "folder with --out"
        )
    changed = [name for name in _FILES if not _holds(folder / name, record.get("outputs", {}).get(name))]
    if changed:
        raise RunDirectoryError(f"{folder / changed[0]} has changed since the screening; give a new folder with --out")
    return True


def _holds(path: Path, digest: str | None) -> bool:
    return path.is_file() and hash_file(path) == digest


@dataclass(frozen=True)
class _Screening:
    """A screening that is done, and where it is written."""

    folder: Path
    source: Path
    arguments: Mapping[str, Any]
    inputs: Mapping[str, str]
    data: FileExamples
    measured: Measured
    result: Result

    def write(self, keep: float, provenance: Mapping[str, Any]) -> None:
        """Every file; the record last, which says that all are there."""
        num_kept = max(1, round(keep * len(self.data.rows)))
        with atomic_write(self.folder / _RANKING) as temporary:
            temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in self._entries()), encoding="utf-8")
        write_result(self.folder / _RESULT, ANALYSIS, self.arguments, metadata.version("mechsub"), self.result)
        write_json(self.folder / _FINDINGS, findings_document(self.folder.name, self.result.findings))
        with atomic_write(self.folder / _FILTERED) as temporary:
            temporary.write_bytes(self._filter(num_kept))
        with atomic_write(self.folder / _REPORT) as temporary:
            temporary.write_text(self._render(num_kept, provenance), encoding="utf-8")
        outputs = {name: hash_file(self.folder / name) for name in _FILES}
        record = {
            "schema": _SCHEMA_VERSION,
            "arguments": self.arguments,
            "inputs": self.inputs,
            "outputs": outputs,
            **provenance,
        }
        write_json(self.folder / SCREEN_FILE, record)

    def _entries(self) -> Iterator[dict[str, Any]]:
        """One line of the ranking an example, the first rank first."""
        ranks = self.measured.ranks
        for number in ranks.argsort():
            yield {
                "line": self.data.lines[number],
                "rank": int(ranks[number]),
                **{f"overlap_{name}": float(self.measured.reading.totals[number, place])
                   for place, name in enumerate(self.measured.toward)},
                **{name: float(values[number]) for name, values in self.measured.baselines.items()},
                "length": len(self.data.rows[number].completion),
            }  # fmt: skip

    def _filter(self, num_kept: int) -> bytes:
        """The lines of the data file, byte for byte, without those that lead the ranking."""
        # Lines end here where they end for whoever read the file as text.
        lines = self.source.read_bytes().splitlines(keepends=True)
        num_dropped = len(self.data.rows) - num_kept
        kept = [line for line, rank in zip(self.data.lines, self.measured.ranks, strict=True) if rank > num_dropped]
        return b"".join(lines[line - 1] for line in kept)

    def _render(self, num_kept: int, provenance: Mapping[str, Any]) -> str:
        leading = [
            {
                **entry,
                "overlap": entry[f"overlap_{self.measured.toward[0]}"],
                "prompt": _shorten(self.data.texts[self.data.lines.index(entry["line"])][0]),
                "completion": _shorten(self.data.texts[self.data.lines.index(entry["line"])][1]),
            }
            for entry, _ in zip(self._entries(), range(_LEADING), strict=False)
        ]
        scored, found = len(self.data.rows), self.data.num_found
        unscored = f" {found - scored} that could not be scored are not in it." if found > scored else ""
        kept = (
            f"filtered.jsonl holds the {num_kept} lines that are left without the {scored - num_kept} that score highest "
            f"(keep = {self.arguments['keep']}).{unscored}"
        )
        arguments = {"name": self.folder.name, **self.arguments, "inputs": dict(self.inputs)}
        return render_screen_report(provenance, arguments, self.result, leading, kept)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
