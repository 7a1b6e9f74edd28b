"""The public functions over one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from mechsub.activations.backends import open_backend
from mechsub.analyses.registry import analysis_stage, find_lacks, load_analyses
from mechsub.changes import check_recipe_unedited, check_same_run, without_conditions
from mechsub.environment import describe_hardware, describe_provenance, describe_versions, git_commit
from mechsub.errors import AnalysisError, MechsubError, RunDirectoryError
from mechsub.executors.local import Progress, run_stages
from mechsub.experiment.plan import check_resources, plan_run
from mechsub.findings import findings_document
from mechsub.parameters.stored import GRAM_GROUP, Directions
from mechsub.recipe import Recipe, complete_recipe, dump_recipe, load_recipe
from mechsub.reporting.html import render_report
from mechsub.results import find_result, find_results, read_group, read_result
from mechsub.run import DEFAULT_BACKEND, Run
from mechsub.rundir import SCHEMA_VERSION, RunDirectory, atomic_write, is_unused, write_json
from mechsub.settings import nearest_name
from mechsub.stage import Stage
from mechsub.training.callbacks import load_callbacks


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    recipe: Recipe
    out: Path
    stages: Sequence[Stage]
    pending: Sequence[Stage]
    """The stages that are not done yet."""

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
        check_resources(self.pending, self.out, [self.recipe], device)


def plan_experiment(recipe: str | Path | Recipe, out: str | Path | None = None, settings: Sequence[str] = ()) -> Plan:
    """The stages that `run_experiment` would run, and which of them are left. Writes nothing; `Plan.check` says if it fits.

    Raises:
        RecipeError: the recipe is wrong.
        RunDirectoryError: ``out`` holds a run of another recipe.
        MechsubError: a callback cannot be loaded.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings)
    folder = Path(out) if out is not None else Path("runs") / resolved.name
    stages = plan_run(resolved)
    pending = list(stages)
    if not is_unused(folder):
        directory = RunDirectory.open(folder)
        check_same_run(directory, resolved.model_dump(mode="json"), stages, complete_recipe)
        pending = [stage for stage in stages if not directory.is_done(stage)]
    load_callbacks(resolved.callbacks)
    return Plan(resolved, folder, stages, pending)


def run_experiment(
    recipe: str | Path | Recipe | Plan,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    device: str = "auto",
    workers: int | None = None,
    on_progress: Progress | None = None,
    command: str | None = None,
) -> Run:
    """Run a recipe into a run directory; what is done already is kept, what was killed goes on where it was.

    ``recipe``: a packaged name, a path, a `Recipe` or a `Plan`. ``out``: the run directory, ``runs/<name>`` by default.
    ``settings``: ``key.path=value`` changes. ``workers``: processes; None takes one a core, 0 stays in this process.
    ``command``: what the user typed, for the report.

    Raises:
        MechsubError: see `plan_experiment` and `Plan.check`; a stage that failed, or that another process holds.
    """
    plan = recipe if isinstance(recipe, Plan) else plan_experiment(recipe, out, settings)
    chosen = resolve_device(device)
    plan.check(chosen)
    directory = RunDirectory(plan.out)
    with directory.lock("run"):
        begin_run(plan, describe_provenance(command))
        run_stages({plan.out: plan.pending}, chosen, workers=workers, on_progress=on_progress)
    return open_run(plan.out)


def begin_run(plan: Plan, provenance: Mapping[str, Any]) -> None:
    """Write a run's header, where it has none yet, and its recipe."""
    directory = RunDirectory(plan.out)
    if not directory.header_path.is_file():
        recipe = without_conditions(plan.recipe.model_dump(mode="json"))
        write_json(
            directory.header_path,
            {"schema": SCHEMA_VERSION, "name": plan.recipe.name, "recipe": recipe, **provenance},
        )
    with atomic_write(directory.recipe_path) as temporary:
        temporary.write_text(dump_recipe(plan.recipe))


def open_run(run_dir: str | Path) -> Run:
    """A run directory for reading: its recipe, lineages, results and findings."""
    return Run(RunDirectory.open(run_dir))


def open_directions(run_dir: str | Path) -> Directions:
    """The displacements of a run by their inner products, which `parameter_alignment` has stored; no weights are read.

    Raises:
        RunDirectoryError: the run was not analysed yet, has changed since, or the file is damaged.
    """
    directory = RunDirectory.open(run_dir)
    return Directions(read_group(find_result(directory, "parameter_alignment", "inner products"), GRAM_GROUP))


def plan_analyses(run_dir: str | Path, only: Sequence[str] = (), backend: str = DEFAULT_BACKEND) -> list[Stage]:
    """The stages of the analyses named in ``only``, or of all that the run can feed; ``backend`` reaches activations.

    Raises:
        AnalysisError: an unknown name, one that this run cannot feed, or a run without any condition that is complete.
        ActivationError: there is no such backend, or its library is not installed.
    """
    open_backend(backend)
    check_recipe_unedited(RunDirectory.open(run_dir), complete_recipe)
    known = load_analyses()
    for name in only:
        if name not in known:
            raise AnalysisError(f"no analysis is called {name!r}; {nearest_name(name, list(known))}")
    run = replace(open_run(run_dir), backend=backend)
    if not run.conditions:
        raise AnalysisError(
            f"{run_dir} has no condition with both its student and its control yet; "
            f"`mechsub run {run.directory.recipe_path} --out {run_dir}` goes on with it"
        )
    lacks = find_lacks({name: known[name] for name in only or known}, run)
    if only and lacks:
        raise AnalysisError("\n".join(f"{name} cannot be run on {run_dir}: {sentence}" for name, sentence in lacks.items()))
    return [analysis_stage(known[name], run) for name in (only or known) if name not in lacks]


def missing_analyses(run_dir: str | Path) -> dict[str, str]:
    """The analyses that a run cannot feed: name → what to supply."""
    return find_lacks(load_analyses(), open_run(run_dir))


def analyze_run(
    run_dir: str | Path,
    only: Sequence[str] = (),
    *,
    device: str = "auto",
    backend: str = DEFAULT_BACKEND,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Run the analyses over a run directory, then write its report and ``findings.json``; returns the report's path.

    Every file that is read is compared with its recorded hash first. Analyses whose inputs have not changed are kept.

    Raises:
        MechsubError: a file has changed or is missing, there is nothing to analyse, or an analysis failed.
    """
    directory = RunDirectory.open(run_dir)
    chosen = resolve_device(device)
    stages = plan_analyses(run_dir, only, backend)
    with directory.lock("analyze"):
        # What a kept analysis has read is checked here, since a report over damaged files would not say so.
        directory.check_files(name for stage in stages if directory.is_done(stage) for name in stage.inputs)
        run_stages({directory.path: stages}, chosen, workers=analysis_workers(stages, workers), on_progress=on_progress)
        return write_report(run_dir)


def analysis_workers(stages: Sequence[Stage], workers: int | None) -> int | None:
    """How many processes may run these analyses: none but this one where it alone knows one of them."""
    return 0 if any(stage.arguments["module"] == "__main__" for stage in stages) else workers


def write_report(run_dir: str | Path) -> Path:
    """Rebuild ``report/index.html`` and ``findings.json`` from the results; returns the report's path.

    Raises:
        RunDirectoryError: there are no results yet, or one of them is damaged.
    """
    directory = RunDirectory.open(run_dir)
    with directory.lock("report"):
        return _write_report(directory)


def verify_run(run_dir: str | Path) -> list[str]:
    """Compare every recorded file with its hash, and the recipe with the run's header; returns one line a problem."""
    directory = RunDirectory.open(run_dir)
    problems = [] if directory.records() else [f"{directory.path} has no record of any finished stage in stages/"]
    try:
        check_recipe_unedited(directory, complete_recipe)
    except RunDirectoryError as error:
        problems.append(str(error))
    for record in directory.records().values():
        problems += [
            f"{name} has been made anew, with other bytes, since stage {record.name} read it; "
            f"`mechsub run {directory.recipe_path} --out {directory.path}` runs that stage again"
            for name in directory.outdated_inputs(record)
        ]
        for name, known in record.outputs.items():
            try:
                directory.check_file(name, known, record.name)
            except RunDirectoryError as error:
                problems.append(str(error))
    return problems


def list_analyses() -> dict[str, str]:
    """The installed analyses: name → what it answers."""
    return {name: known.summary for name, known in load_analyses().items()}


def describe_installation() -> dict[str, Any]:
    """Versions, hardware and devices of this installation."""
    return {
        "versions": describe_versions(),
        "git_commit": git_commit(),
        "hardware": describe_hardware(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _write_report(directory: RunDirectory) -> Path:
    check_recipe_unedited(directory, complete_recipe)
    current, outgrown = find_results(directory)
    if not current:
        why = "only results that it has outgrown" if outgrown else "no results yet"
        raise RunDirectoryError(f"{directory.path} has {why}; `mechsub analyze {directory.path}` makes them")
    directory.check_files(path.relative_to(directory.path).as_posix() for path in current.values())
    results = {name: read_result(path) for name, path in current.items()}
    recipe = yaml.safe_load(directory.recipe_path.read_text())
    left_out = find_lacks({name: known for name, known in load_analyses().items() if name not in results}, Run(directory))
    findings = [finding for result in results.values() for finding in result.findings]
    write_json(directory.path / "findings.json", findings_document(recipe["name"], findings))
    path = directory.path / "report" / "index.html"
    with atomic_write(path) as temporary:
        temporary.write_text(render_report(directory.header, recipe, results, outgrown, left_out))
    return path


def resolve_device(device: str) -> str:
    """The torch device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        MechsubError: there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise MechsubError("--device cuda: torch sees no GPU here; use --device cpu, or see `mechsub doctor`")
    if device not in {"cpu", "cuda"}:
        raise MechsubError(f"--device {device}: choose auto, cpu or cuda")
    return device
