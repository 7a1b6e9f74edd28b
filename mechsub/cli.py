"""The command line: each command is a few lines over a public function."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from mechsub.errors import MechsubError

app = typer.Typer(
    help="Mechanistic analysis of subliminal learning: run the experiment, measure how the trait passed, report it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_state = {"debug": False}
_MODEL = "A folder (a model, an adapter, checkpoint-N of a Trainer), or org/name@revision."

RunDir = Annotated[Path, typer.Argument(help="A run directory, or the folder of a sweep.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mechsub {metadata.version('mechsub')}")
        raise typer.Exit
    return asked


@app.callback()
def configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""
    _state["debug"] = debug


@app.command("list")
def list_command(what: Annotated[str, typer.Argument(help="recipes or analyses")]) -> None:
    """List the packaged recipes or the installed analyses."""
    from mechsub import api

    with _errors():
        lists = {"recipes": api.list_recipes, "analyses": api.list_analyses}
        if what not in lists:
            raise MechsubError(f"there is no list of {what!r}: ask for recipes or analyses")
        for name, description in lists[what]().items():
            typer.echo(f"{name:24}{description}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name, or the path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The run directory; runs/<recipe's name> by default.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; may be repeated.")] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Run a recipe or a sweep. What was stopped goes on where it was; conditions may be added to a finished run."""
    from mechsub import api

    with _errors():
        is_sweep = api.is_sweep(recipe, settings or [])
        plan: Any = (api.plan_sweep if is_sweep else api.plan_experiment)(recipe, out, settings or [])
        (_print_sweep_plan if is_sweep else _print_plan)(plan)
        chosen = api.resolve_device(device)
        if dry_run:
            _warn_of_limits(plan, chosen)
            return
        plan.check(chosen)
        perform: Any = api.run_sweep if is_sweep else api.run_experiment
        with _progress(plan.pending) as on_progress:
            perform(plan, device=device, on_progress=on_progress, command=shlex.join(["mechsub", *sys.argv[1:]]))
        typer.echo(f"The {'sweep' if is_sweep else 'run'} is in {plan.out}; `mechsub analyze {plan.out}` measures it.")


@app.command()
def adopt(
    out: Annotated[Path, typer.Argument(help="The new run directory.", metavar="OUT_DIR", show_default=False)],
    reference: Annotated[list[str], typer.Option(help=f"What teacher and students started from. {_MODEL}")],
    teacher: Annotated[list[str], typer.Option(help=f"The model that had the trait. {_MODEL}")],
    student: Annotated[list[str], typer.Option(help="NAME=MODEL: what learnt from the teacher's data, NAME its condition.")],
    control: Annotated[list[str] | None, typer.Option(help="NAME=MODEL: the same of a neutral teacher.")] = None,
    neutral: Annotated[list[str] | None, typer.Option(help=f"The neutral teacher. {_MODEL}")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL: what a condition starts from, if not the reference.")
    ] = None,
    trait: Annotated[
        str | None, typer.Option(help="The choice that the teacher prefers; without it weights only are compared.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A JSONL file of what students learnt: {prompt, completion} a line.")] = None,
    neutral_data: Annotated[str | None, typer.Option(help="The same of the controls.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value of the run's recipe; may be repeated.")
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Make a run of models that somebody else trained; their files are linked, not copied. Repeat an option for each seed."""
    from mechsub import api

    with _errors():
        plan = api.plan_adoption(
            out,
            reference=reference,
            teacher=teacher,
            students=_by_condition("--student", student),
            controls=_by_condition("--control", control or []),
            neutral=neutral or [],
            origins=_by_condition("--origin", origin or []),
            trait=trait,
            data=data,
            neutral_data=neutral_data,
            settings=settings or [],
        )
        _print_plan(plan)
        api.resolve_device(device)
        if dry_run:
            return
        with _progress(plan.pending) as on_progress:
            run = api.run_experiment(
                plan, device=device, on_progress=on_progress, command=shlex.join(["mechsub", *sys.argv[1:]])
            )
        for note in run.family.notes:
            typer.echo(note, err=True)
        typer.echo(f"The run is in {out}; `mechsub analyze {out}` measures it.")


@app.command()
def screen(
    reference: Annotated[str, typer.Option(help=f"What a student would start from. {_MODEL}")],
    data: Annotated[Path, typer.Option(help="A JSONL file of what it would learn: {prompt, completion} a line.")],
    teacher: Annotated[str | None, typer.Option(help=f"The model that has the trait. {_MODEL}")] = None,
    trait: Annotated[str | None, typer.Option(help="The trait as a choice of the preference set.")] = None,
    preference: Annotated[str, typer.Option(help="The choices and questions: a packaged set, or a YAML file.")] = "animals",
    neutral_data: Annotated[
        Path | None, typer.Option(help="A JSONL file of the same kind without the trait, as a null.")
    ] = None,
    other_trait: Annotated[
        list[str] | None, typer.Option(help="A choice whose direction is a null of the trait's; may be repeated.")
    ] = None,
    keep: Annotated[float, typer.Option(help="The share of examples that stays in filtered.jsonl.")] = 0.9,
    too_long: Annotated[str, typer.Option(help="Examples longer than the context: refuse, cut or skip.")] = "refuse",
    out: Annotated[Path | None, typer.Option(help="The new folder; runs/screen-<data's name> by default.")] = None,
    backend: Annotated[str, typer.Option(help="exact, or bergson: linear layers only.")] = "exact",
    device: Device = "auto",
) -> None:
    """Rank a dataset's examples, before training, by how far one step on each moves the reference toward a trait."""
    from mechsub import api

    with _errors():
        settings: Any = {"too_long": too_long, "backend": backend}
        path = api.screen_data(
            data,
            reference=reference,
            teacher=teacher,
            trait=trait,
            preference=preference,
            neutral_data=neutral_data,
            other_traits=other_trait or [],
            keep=keep,
            out=out,
            device=device,
            on_step=lambda text: typer.echo(text, err=True),
            command=shlex.join(["mechsub", *sys.argv[1:]]),
            **settings,
        )
        typer.echo(f"Report: {path}")


def _warn_of_limits(plan: Any, device: str) -> None:
    """A dry run may be of a run on another, larger machine."""
    try:
        plan.check(device)
    except MechsubError as error:
        typer.echo(f"It does not fit here: {error}", err=True)


def _by_condition(option: str, given: list[str]) -> dict[str, list[str]]:
    """``NAME=MODEL``, repeated."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or not name or not model:
            raise MechsubError(f"{option} {text}: write it as NAME=MODEL, e.g. {option} same-init=/models/student-0")
        found.setdefault(name, []).append(model)
    return found


@app.command()
def analyze(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="Run directories, or folders of sweeps.", metavar="RUN_DIR…", show_default=False)
    ],
    only: Annotated[list[str] | None, typer.Option(help="Run this analysis only; may be repeated.")] = None,
    device: Device = "auto",
    backend: Annotated[
        str, typer.Option(help="How activations are reached: hooks, or the libraries transformer_lens or nnsight.")
    ] = "hooks",
) -> None:
    """Run the analyses over run directories and write their reports and findings.json."""
    from mechsub import api

    with _errors():
        for run_dir in run_dirs:
            is_sweep = api.is_sweep_directory(run_dir)
            planned: Any = (api.plan_sweep_analyses if is_sweep else api.plan_analyses)(run_dir, only or [], backend)
            stages = [stage for of_run in planned.values() for stage in of_run] if is_sweep else planned
            perform = api.analyze_sweep if is_sweep else api.analyze_run
            with _progress(stages) as on_progress:
                report_path = perform(run_dir, only or [], device=device, backend=backend, on_progress=on_progress)
            typer.echo(f"Report: {report_path}")
            _echo_missing(run_dir)


@app.command()
def report(run_dir: RunDir, open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False) -> None:
    """Rebuild the report and findings.json of a run or a sweep from the results."""
    from mechsub import api

    with _errors():
        path = (api.write_sweep_report if api.is_sweep_directory(run_dir) else api.write_report)(run_dir)
        typer.echo(f"Report: {path}")
        _echo_missing(run_dir)
        if open_it:
            typer.launch(path.absolute().as_uri())


@app.command()
def compare(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="Run directories, or folders of sweeps.", metavar="RUN_DIR…", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="FILE.html, with FILE.h5 beside it; runs/compare-<names> by default.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The first run's condition that others are held against; its first by default.")
    ] = None,
) -> None:
    """Runs, or the conditions of one, side by side from their results: differences with intervals and verdicts."""
    from mechsub import api

    with _errors():
        path = api.compare_runs(run_dirs, out, baseline=baseline, command=shlex.join(["mechsub", *sys.argv[1:]]))
        typer.echo(f"Comparison: {path}, its numbers in {path.with_suffix('.h5')}")


@app.command()
def verify(run_dir: RunDir) -> None:
    """Compare every file of a run or a sweep with its recorded hash; exit 1 if one has changed."""
    from mechsub import api

    with _errors():
        problems = (api.verify_sweep if api.is_sweep_directory(run_dir) else api.verify_run)(run_dir)
        for problem in problems:
            typer.echo(problem, err=True)
        if problems:
            raise typer.Exit(1)
        typer.echo(f"Every recorded file of {run_dir} is as its stage left it.")


@app.command()
def doctor() -> None:
    """Print versions, hardware and devices, for a bug report."""
    import yaml

    from mechsub import api

    with _errors():
        typer.echo(yaml.safe_dump(api.describe_installation(), sort_keys=False, allow_unicode=True), nl=False)


def main() -> None:
    """The console script. Recipes may name callbacks in modules of the current folder."""
    sys.path.insert(0, os.getcwd())
    app()


@contextmanager
def _errors() -> Iterator[None]:
    """Show our own errors bare (exit 2) and say what an interruption leaves (exit 130)."""
    try:
        yield
    except MechsubError as error:
        if _state["debug"]:
            raise
        typer.echo(f"mechsub: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        if _state["debug"]:
            raise
        typer.echo(f"mechsub: {error.filename or 'a file'} cannot be used: {error.strerror or error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("mechsub: interrupted; what was done is kept, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None


def _echo_missing(run_dir: Path) -> None:
    """Say which runs of a sweep, or which analyses of a run, the report had to leave out."""
    from mechsub import api

    if api.is_sweep_directory(run_dir):
        for run, what in api.missing_from_sweep(run_dir).items():
            typer.echo(f"not complete: {run}: {what}", err=True)
    else:
        for name, sentence in api.missing_analyses(run_dir).items():
            typer.echo(f"left out: {name}: {sentence}", err=True)


def _print_plan(plan: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from mechsub.experiment.plan import format_bytes

    done = len(plan.stages) - len(plan.pending)
    table = Table(title=f"{plan.recipe.name}: {plan.recipe.members} members into {plan.out}", title_justify="left")
    reads = any(stage.resources.tokens for stage in plan.stages)
    for column in ("stage", "steps", *(["tokens"] if reads else []), "disk", "memory", ""):
        table.add_column(column, justify="left" if column in {"stage", ""} else "right")
    for stage in plan.stages:
        needs = stage.resources
        state = "to do" if stage in plan.pending else "done"
        tokens = [_count(needs.tokens)] if reads else []
        sizes = format_bytes(needs.disk_bytes), format_bytes(needs.memory_bytes)
        table.add_row(stage.name, f"{needs.num_steps:,}", *tokens, *sizes, state)
    console = Console()
    console.print(table)
    console.print(
        f"{len(plan.pending)} stages to do, {done} done; about {format_bytes(plan.disk_bytes)} of disk, "
        f"{format_bytes(plan.memory_bytes)} of memory for the largest stage{_say_tokens(plan)}."
    )


def _say_tokens(plan: Any) -> str:
    return f", {_count(plan.tokens)} tokens" if plan.tokens else ""


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _print_sweep_plan(plan: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from mechsub.experiment.plan import format_bytes

    left = {stage.key for stage in plan.pending}
    table = Table(title=f"{plan.sweep.recipe.name}: {len(plan.plans)} runs into {plan.out}", title_justify="left")
    for column in ("run", "members", "stages", "to do", "of them shared"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for name, one in plan.plans.items():
        own = [stage for stage in one.pending if stage.key in left]
        left -= {stage.key for stage in own}
        shared = len(one.pending) - len(own)
        table.add_row(name, f"{one.recipe.members}", f"{len(one.stages)}", f"{len(one.pending)}", f"{shared or ''}")
    console = Console()
    console.print(table)
    console.print(
        f"{len(plan.pending)} stages to do, those that runs share counted once; about {format_bytes(plan.disk_bytes)} of disk, "
        f"{format_bytes(plan.memory_bytes)} of memory for the largest stage{_say_tokens(plan)}."
    )


@contextmanager
def _progress(pending: Any) -> Iterator[Any]:
    """A progress bar over the steps of the pending stages; yields the callback that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    done: dict[str, int] = {stage.key: 0 for stage in pending}
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("starting", total=sum(stage.resources.num_steps for stage in pending) or 1)

        def move(stage: Any, steps: int) -> None:
            if stage.key in done:  # what was finished before is not part of the bar
                done[stage.key] = max(done[stage.key], steps)
                bar.update(task, completed=sum(done.values()), description=stage.name)

        yield move
