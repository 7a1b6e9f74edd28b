"""How an analysis becomes known: a decorator in its file. Files of this folder and entry points are found by themselves."""

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import mechsub.analyses
from mechsub.results import Result, write_result
from mechsub.run import Run
from mechsub.rundir import RunDirectory
from mechsub.stage import Resources, Stage, Task, load_function

ENTRY_POINTS = "mechsub.analyses"


@dataclass(frozen=True)
class Analysis:
    """A registered analysis."""

    name: str
    function: Callable[[Run], Result]
    summary: str
    """The first line of its docstring."""


_KNOWN: dict[str, Analysis] = {}


def analysis(function: Callable[[Run], Result]) -> Callable[[Run], Result]:
    """Register a function ``(run) -> Result`` under its name; its docstring's first line says what it answers."""
    summary = (function.__doc__ or "").strip().split("\n")[0]
    _KNOWN[function.__name__] = Analysis(function.__name__, function, summary)
    return function


def load_analyses() -> dict[str, Analysis]:
    """Every analysis: the files of this folder, then installed packages' entry points."""
    for module in pkgutil.iter_modules(mechsub.analyses.__path__):
        importlib.import_module(f"{mechsub.analyses.__name__}.{module.name}")
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(_KNOWN.items()))


def result_file(name: str) -> str:
    """Where an analysis writes, in its run directory."""
    return f"results/{name}.h5"


def analysis_stage(known: Analysis, run: Run) -> Stage:
    """An analysis of a run as a stage: it reads every finished lineage, and is run again when one of them changes."""
    recorded = {name: f"sha256:{file.sha256}" for name, file in run.directory.measured_files().items()}
    arguments = {
        "analysis": known.name,
        "module": known.function.__module__,
        "verdict": run.recipe.verdict.model_dump(mode="json"),
        "conditions": run.conditions,
        "mechsub": metadata.version("mechsub"),
        "code": _code_digest(known),
    }
    return Stage(
        name=f"analysis.{known.name}",
        function="mechsub.analyses.registry:run_analyses",
        arguments=arguments,
        inputs=recorded,
        outputs=(result_file(known.name),),
        resources=Resources(num_steps=run.num_checkpoints, threads=run.recipe.threads),
    )


def _code_digest(known: Analysis) -> str:
    """A hash of our sources and of the analysis's own file: changed code measures again."""
    package = Path(mechsub.analyses.__path__[0]).parent
    sources = {*package.rglob("*.py"), Path(inspect.getfile(known.function))}
    digest = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_analyses(tasks: Sequence[Task]) -> None:
    """Stage: analyses, each into its own result file."""
    known = load_analyses()
    for task in tasks:
        arguments = task.stage.arguments
        run = Run(RunDirectory.open(task.run), task.device, task.report_progress)
        name = arguments["analysis"]
        # A user's own analysis may be known only to the process that planned it: here its module is imported first.
        function = known[name].function if name in known else load_function(f"{arguments['module']}:{name}")
        result = function(run)
        path = task.path(result_file(name))
        write_result(path, name, arguments, arguments["mechsub"], result)
