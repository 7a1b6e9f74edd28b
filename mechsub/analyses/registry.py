"""How an analysis becomes known: a decorator in its file. Files of this folder and entry points are found by themselves."""

import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import overload

import mechsub.analyses
from mechsub.results import Result, write_result
from mechsub.run import DEFAULT_BACKEND, Run
from mechsub.rundir import RunDirectory, hash_file
from mechsub.stage import Resources, Stage, Task, load_function

ENTRY_POINTS = "mechsub.analyses"
Function = Callable[[Run], Result]


@dataclass(frozen=True)
class Analysis:
    """A registered analysis."""

    name: str
    function: Function
    summary: str
    """The first line of its docstring."""
    needs: tuple[str, ...] = ()
    """What a run must have for it; see `Run.lacks`."""
    reads_activations: bool = False
    """Whether it reaches into models through `Run.backend`."""


_KNOWN: dict[str, Analysis] = {}


@overload
def analysis(function: Function, /) -> Function: ...
@overload
def analysis(*, needs: Sequence[str] = (), reads_activations: bool = False) -> Callable[[Function], Function]: ...
def analysis(
    function: Function | None = None, /, *, needs: Sequence[str] = (), reads_activations: bool = False
) -> Function | Callable[[Function], Function]:
    """Register a function ``(run) -> Result`` under its name; its docstring's first line says what it answers.

    ``needs``: what a run must have, by the names that `Run.lacks` knows; a run without it is analysed without this analysis.
    ``reads_activations``: it takes `Run.backend` to do so, and is run again when another backend is asked for.
    """

    def register(function: Function) -> Function:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        _KNOWN[function.__name__] = Analysis(function.__name__, function, summary, tuple(needs), reads_activations)
        return function

    return register if function is None else register(function)


def load_analyses() -> dict[str, Analysis]:
    """Every analysis: the files of this folder, then installed packages' entry points."""
    for module in pkgutil.iter_modules(mechsub.analyses.__path__):
        importlib.import_module(f"{mechsub.analyses.__name__}.{module.name}")
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        entry.load()
    return dict(sorted(_KNOWN.items()))


def find_lacks(known: Mapping[str, Analysis], run: Run) -> dict[str, str]:
    """The analyses that a run cannot feed, each with a sentence that says what to supply."""
    lacks = {name: " ".join(filter(None, map(run.lacks, one.needs))) for name, one in known.items()}
    return {name: sentences for name, sentences in lacks.items() if sentences}


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
        "user_functions": {name: _source_digest(name) for name in run.recipe.user_functions},
    }
    if known.reads_activations:
        arguments["backend"] = run.backend
    return Stage(
        name=f"analysis.{known.name}",
        function="mechsub.analyses.registry:run_analyses",
        arguments=arguments,
        inputs=recorded,
        outputs=(result_file(known.name),),
        resources=Resources(num_steps=run.num_checkpoints, threads=run.recipe.threads),
    )


def _source_digest(function: str) -> str | None:
    """Of the file that holds a user's function; None where it has none."""
    path = inspect.getsourcefile(inspect.unwrap(load_function(function)))
    return None if path is None else hash_file(Path(path))


def _code_digest(known: Analysis) -> str:
    """A hash of our sources and of the analysis's own file: changed code measures again."""
    package = Path(mechsub.analyses.__path__[0]).parent
    sources = {*package.rglob("*.py"), Path(inspect.getfile(inspect.unwrap(known.function)))}
    digest = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_analyses(tasks: Sequence[Task]) -> None:
    """Stage: analyses, each into its own result file."""
    known = load_analyses()
    for task in tasks:
        arguments = task.stage.arguments
        run = Run(RunDirectory.open(task.run), task.device, task.report_progress, arguments.get("backend", DEFAULT_BACKEND))
        name = arguments["analysis"]
        # A user's own analysis may be known only to the process that planned it: here its module is imported first.
        function = known[name].function if name in known else load_function(f"{arguments['module']}:{name}")
        result = function(run)
        path = task.path(result_file(name))
        write_result(path, name, arguments, arguments["mechsub"], result)
