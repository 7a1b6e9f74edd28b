"""The public functions over a sweep: several runs in one folder."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mechsub.api.runs import Plan, analysis_workers, begin_run, plan_analyses, plan_experiment, resolve_device, verify_run
from mechsub.architecture_matrix import MATRIX_ANALYSIS, join_matrices
from mechsub.changes import check_recipe_unedited
from mechsub.environment import describe_provenance
from mechsub.errors import AnalysisError, RunDirectoryError
from mechsub.executors.local import Progress, run_stages
from mechsub.experiment.plan import check_resources
from mechsub.findings import findings_document
from mechsub.recipe import complete_recipe
from mechsub.reporting.sweep import render_sweep_report
from mechsub.results import Result, find_results, read_result, write_result
from mechsub.run import DEFAULT_BACKEND, Run
from mechsub.rundir import RunDirectory, atomic_write, is_unused, write_json
from mechsub.stage import Stage
from mechsub.sweeps.config import Sweep, load_sweep
from mechsub.sweeps.directory import SweepDirectory, is_sweep_directory
from mechsub.sweeps.table import SweptResults, build_table, name_missing_analyses


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do."""

    sweep: Sweep
    out: Path
    plans: Mapping[str, Plan]
    """By the run's name."""

    @property
    def pending(self) -> list[Stage]:
        """The stages that no run has done yet; one that several runs share stands once."""
        left = {stage.key: stage for plan in self.plans.values() for stage in plan.pending}
        done = {stage.key for plan in self.plans.values() for stage in plan.stages if stage not in plan.pending}
        return [stage for key, stage in left.items() if key not in done]

    @property
    def disk_bytes(self) -> int:
        """What the pending stages write, estimated."""
        return sum(stage.resources.disk_bytes for stage in self.pending)

    @property
    def memory_bytes(self) -> int:
        """What the largest pending stage holds, estimated."""
        return max((stage.resources.memory_bytes for stage in self.pending), default=0)

    @property
    def tokens(self) -> int:
        """What language models of the pending stages read and write, estimated."""
        return sum(stage.resources.tokens for stage in self.pending)

    def check(self, device: str = "cpu") -> None:
        """Refuse what this machine, or its GPU, cannot hold.

        Raises:
            ResourceError: what is needed and what is there.
        """
        check_resources(self.pending, self.out, [plan.recipe for plan in self.plans.values()], device)


def plan_sweep(recipe: str | Path, out: str | Path | None = None, settings: Sequence[str] = ()) -> SweepPlan:
    """The runs that `run_sweep` would make, each with its plan. Writes nothing.

    Raises:
        RecipeError: the recipe, or a run of it, is wrong.
        RunDirectoryError: ``out`` holds something else.
    """
    sweep = load_sweep(recipe, settings)
    folder = Path(out) if out is not None else Path("runs") / sweep.recipe.name
    directory = SweepDirectory(folder)
    if is_sweep_directory(folder):
        SweepDirectory.open(folder).check_same_sweep(sweep)
    elif not is_unused(folder):
        raise RunDirectoryError(f"{folder} is in use and holds no sweep; choose another --out")
    plans = {name: plan_experiment(run.recipe, directory.run_path(name)) for name, run in sweep.runs.items()}
    return SweepPlan(sweep, folder, plans)


def run_sweep(
    recipe: str | Path | SweepPlan,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Run]:
    """Run a sweep into one folder; returns its runs by name. Arguments as in `run_experiment`.

    Stages that runs have in common are computed once. A run that fails does not stop the others.

    Raises:
        MechsubError: see `plan_sweep`; after all others have ended, what failed and in which run.
    """
    plan = recipe if isinstance(recipe, SweepPlan) else plan_sweep(recipe, out, settings)
    chosen = resolve_device(device)
    plan.check(chosen)
    with ExitStack() as locks:
        locks.enter_context(RunDirectory(plan.out).lock("sweep"))
        provenance = describe_provenance(command)
        SweepDirectory(plan.out).write(plan.sweep, provenance)
        for one in plan.plans.values():
            locks.enter_context(RunDirectory(one.out).lock("run"))
            begin_run(one, provenance)
        work = {one.out: one.stages for one in plan.plans.values()}
        run_stages(work, chosen, workers=workers, on_progress=on_progress)
    return open_sweep(plan.out)


def open_sweep(folder: str | Path) -> dict[str, Run]:
    """The runs of a sweep that have begun, by name, for reading.

    Raises:
        RunDirectoryError: the folder holds no sweep.
    """
    directory = SweepDirectory.open(folder)
    return {name: Run(RunDirectory.open(directory.run_path(name))) for name in directory.begun}


def plan_sweep_analyses(
    folder: str | Path, only: Sequence[str] = (), backend: str = DEFAULT_BACKEND
) -> dict[Path, list[Stage]]:
    """The analyses of every run that has something to analyse and is whole, by the run's path.

    Raises:
        AnalysisError: an unknown analysis, or no run has anything yet.
    """
    directory = SweepDirectory.open(folder)
    work: dict[Path, list[Stage]] = {}
    refused: AnalysisError | None = None
    for run in open_sweep(folder).values():
        with suppress(RunDirectoryError):  # the report says what is wrong with it
            if run.conditions:
                try:
                    work[run.path] = plan_analyses(run.path, only, backend)
                except AnalysisError as error:  # what one run cannot feed another one may
                    refused = error
    if not work and refused is not None:
        raise refused
    if not work:
        raise AnalysisError(
            f"no run of {folder} has a condition with both its student and its control yet; "
            f"`mechsub run {directory.recipe_path} --out {folder}` goes on with them"
        )
    return work


def analyze_sweep(
    folder: str | Path,
    only: Sequence[str] = (),
    *,
    device: str = "auto",
    backend: str = DEFAULT_BACKEND,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Analyse every run of a sweep, then write its table, report and ``findings.json``; returns the report's path.

    What is not there yet, or is damaged, is left out, and the report names it.

    Raises:
        MechsubError: as `analyze_run`; where an analysis of one run failed, after the report over the others is written.
    """
    work = plan_sweep_analyses(folder, only, backend)
    chosen = resolve_device(device)
    with ExitStack() as locks:
        locks.enter_context(RunDirectory(Path(folder)).lock("analyze"))
        for path in work:
            locks.enter_context(RunDirectory(path).lock("analyze"))
        every = [stage for stages in work.values() for stage in stages]
        try:
            run_stages(work, chosen, workers=analysis_workers(every, workers), on_progress=on_progress)
        except Exception:
            write_sweep_report(folder)
            raise
        return write_sweep_report(folder)


def write_sweep_report(folder: str | Path) -> Path:
    """Rebuild a sweep's table, report and ``findings.json`` from its runs' results; returns the report's path.

    Raises:
        RunDirectoryError: no run has results yet, or one of them is damaged.
    """
    directory = SweepDirectory.open(folder)
    with RunDirectory(directory.path).lock("report"):
        header = directory.header
        begun = open_sweep(folder)
        results = {name: _read_run(begun[name]) if name in begun else SweptResults({}, "not begun") for name in directory.runs}
        results = name_missing_analyses(results)
        if not any(run.findings for run in results.values()):
            raise RunDirectoryError(f"{folder} has no results yet; `mechsub analyze {folder}` makes them")
        table = build_table(header["recipe"]["sweep"]["vary"], directory.runs, results)
        matrix = _join_matrices(begun, results)
        arguments = {"runs": directory.runs}
        write_result(directory.path / "results" / "sweep.h5", "sweep", arguments, metadata.version("mechsub"), table)
        write_json(directory.path / "findings.json", _findings_document(header["name"], directory, results, matrix))
        if matrix is not None:
            write_result(directory.path / "results" / "matrix.h5", "matrix", arguments, metadata.version("mechsub"), matrix)
        path = directory.path / "report" / "index.html"
        missing = {name: run.missing for name, run in results.items()}
        with atomic_write(path) as temporary:
            temporary.write_text(render_sweep_report(header, table, missing, matrix))
    return path


def missing_from_sweep(folder: str | Path) -> dict[str, str]:
    """What the last report found each run to lack, in words; runs that lack nothing are left out."""
    runs = json.loads((Path(folder) / "findings.json").read_text())["runs"]
    return {one["run"]: one["missing"] for one in runs if one["missing"]}


def verify_sweep(folder: str | Path) -> list[str]:
    """`verify_run` for every run of a sweep; returns one line a problem."""
    directory = SweepDirectory.open(folder)
    absent = [name for name in directory.runs if name not in directory.begun]
    remedy = f"`mechsub run {directory.recipe_path} --out {folder}` makes it"
    problems = [f"run {name} of {folder} has not begun, or has been removed; {remedy}" for name in absent]
    return problems + [problem for name in directory.begun for problem in verify_run(directory.run_path(name))]


def _read_run(run: Run) -> SweptResults:
    """A run's results as far as they go and are whole, and what it lacks, in words."""
    try:
        check_recipe_unedited(run.directory, complete_recipe)
        current, outgrown = find_results(run.directory)
        made = [file.relative_to(run.path).as_posix() for file in current.values()]
        read = {name for record in run.directory.records().values() if set(record.outputs) & {*made} for name in record.inputs}
        run.directory.check_files({*made, *read})
        results: dict[str, Result] = {name: read_result(file) for name, file in current.items()}
    except RunDirectoryError as error:
        return SweptResults({}, f"damaged: {error}")
    missing = [f"failed: {failure}" for failure in run.directory.failures()[:1]]
    if run.missing_conditions:
        missing.append(f"not finished: {', '.join(run.missing_conditions)}")
    if outgrown:
        missing.append(f"outgrown since: {', '.join(outgrown)}")
    return SweptResults(results, "; ".join(missing))


def _join_matrices(runs: Mapping[str, Run], results: Mapping[str, SweptResults]) -> Result | None:
    """The runs' cells of the matrix of architectures, judged together; None where there are none."""
    found = {name: swept.results[MATRIX_ANALYSIS] for name, swept in results.items() if MATRIX_ANALYSIS in swept.results}
    return join_matrices(found, {name: runs[name].rules(runs[name].recipe.verdict.margin) for name in found})


def _findings_document(
    name: str, directory: SweepDirectory, results: Mapping[str, SweptResults], matrix: Result | None
) -> dict[str, object]:
    """Every run's findings, with its settings; and those of the matrix over all runs, where there is one."""
    documents = []
    for run, found in results.items():
        document = findings_document(run, [finding for result in found.results.values() for finding in result.findings])
        documents.append({"settings": dict(directory.runs[run]), "missing": found.missing, **document})
    document = {"schema": documents[0]["schema"], "sweep": name, "runs": documents}
    return document if matrix is None else document | {"matrix": findings_document("matrix", matrix.findings)["findings"]}
