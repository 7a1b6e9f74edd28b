"""The public function over several runs: their results side by side."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import h5py
import yaml

from mechsub.changes import check_recipe_unedited
from mechsub.comparison.comparison import ANALYSES, Comparison, combine, compare
from mechsub.comparison.runs import ComparedRun, name_runs, read_run
from mechsub.comparison.sections import ANALYSIS
from mechsub.errors import MechsubError, RunDirectoryError
from mechsub.recipe import complete_recipe
from mechsub.reporting.comparison import MARK, render_comparison
from mechsub.results import write_result
from mechsub.rundir import RunDirectory, atomic_write
from mechsub.sweeps.directory import SweepDirectory, is_sweep_directory

_SUFFIXES = (".html", ".h5")
_MOST_NAMED = 3


def compare_runs(
    run_dirs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    baseline: str | None = None,
    command: str | None = None,
) -> Path:
    """Runs side by side, or the conditions of one, from their results alone; returns the page's path.

    Effect, specific alignment, gradient overlap and steering cosine of every condition and trait, each over its own null, and
    their differences with intervals and verdicts: paired over members that are the same replicates, else Welch's. Written to
    ``out`` as .html with an .h5 of the same name beside it; ``runs/compare-<names>`` by default.

    ``run_dirs``: runs or sweeps, whose runs are then taken; rows are held against the first. ``baseline``: the condition of
    the first run that other conditions are held against, its first by default. ``command``: what the user typed.

    Raises:
        MechsubError: a folder holds no run, a run is given twice, or there is nothing to compare.
        RunDirectoryError: a result is damaged, or ``out`` is another kind of file, which is kept.
    """
    given = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    if not given:
        raise MechsubError("there is nothing to compare: give one run directory or more, or the folder of a sweep")
    paths = [path for one in given for path in _expand(Path(one))]
    notes = [note for one in given for note in _name_absent(Path(one))]
    names = name_runs(paths)
    directories = [RunDirectory.open(path) for path in paths]
    page = _find_out(names, out)
    table = page.with_suffix(".h5")
    _check_ours(page, table)
    comparison = compare([_read(name, one) for name, one in zip(names, directories, strict=True)], baseline, notes)
    _write(comparison, page, table, command)
    return page


def _expand(path: Path) -> list[Path]:
    """The runs of a sweep that have begun; of a run itself."""
    if not is_sweep_directory(path):
        return [path]
    directory = SweepDirectory.open(path)
    if not directory.begun:
        raise RunDirectoryError(
            f"no run of the sweep {path} has begun; `mechsub run {directory.recipe_path} --out {path}` goes on"
        )
    return [directory.run_path(name) for name in directory.begun]


def _name_absent(path: Path) -> list[str]:
    """The runs of a sweep that have not begun."""
    if not is_sweep_directory(path):
        return []
    directory = SweepDirectory.open(path)
    absent = [name for name in directory.runs if name not in directory.begun]
    remedy = f"`mechsub run {directory.recipe_path} --out {path}` makes them"
    return [f"{path}: not begun: {', '.join(absent)}; {remedy}"] if absent else []


def _read(name: str, directory: RunDirectory) -> ComparedRun:
    check_recipe_unedited(directory, complete_recipe)
    return read_run(name, directory, complete_recipe(yaml.safe_load(directory.recipe_path.read_text())), ANALYSES)


def _find_out(names: Sequence[str], out: str | Path | None) -> Path:
    """The page's path; FILE, FILE.html and FILE.h5 mean the same."""
    if out is None:
        short = [name.replace("/", "-") for name in names]
        more = [f"{len(short) - _MOST_NAMED + 1}-more"] if len(short) > _MOST_NAMED else []
        return Path("runs") / f"compare-{'-and-'.join([*short[: _MOST_NAMED - len(more)], *more])}.html"
    path = Path(out)
    if path.is_dir():
        raise MechsubError(f"--out {path} is a folder; give the name of a page in it, {path / 'compare.html'}")
    return path.with_suffix(".html") if path.suffix in _SUFFIXES else path.with_name(f"{path.name}.html")


def _check_ours(page: Path, table: Path) -> None:
    """Refuse to write over what is no comparison."""
    for path, is_ours in ((page, _is_our_page), (table, _is_our_table)):
        if path.is_dir() or (path.exists() and not is_ours(path)):
            raise RunDirectoryError(f"{path} is there and is no comparison of mechsub's; it is kept: choose another --out")


def _is_our_page(path: Path) -> bool:
    return MARK in path.read_text(errors="replace")


def _is_our_table(path: Path) -> bool:
    try:
        with h5py.File(path) as file:
            return bool(file.attrs.get("analysis") == ANALYSIS)
    except OSError:
        return False


def _write(comparison: Comparison, page: Path, table: Path, command: str | None) -> None:
    """Both files, each whole or not at all; the page is drawn before anything is written."""
    content = render_comparison(comparison, table.name, command)
    arguments = {"runs": [run.name for run in comparison.runs], "baseline": comparison.baseline}
    write_result(table, ANALYSIS, arguments, metadata.version("mechsub"), combine(comparison))
    with atomic_write(page) as temporary:
        temporary.write_text(content)
