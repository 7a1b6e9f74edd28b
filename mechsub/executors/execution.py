"""Running stages in this process: locks, input checks, the call, the record. Every executor ends here."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import torch

from mechsub.errors import join_errors
from mechsub.rundir import RunDirectory
from mechsub.stage import Stage, StageFunction, Task, load_function

_REPORT_SECONDS = 0.2


def execute_stages(run: Path, stages: Sequence[Stage], device: str) -> None:
    """Run stages of one function in one call, and record each that succeeds.

    Raises:
        MechsubError: a stage is held by another process, an input has changed, or a stage failed; where several stages
            shared the call, those that succeeded are recorded first.
    """
    directory = RunDirectory.open(run)
    torch.set_num_threads(max(stage.resources.threads for stage in stages))
    with ExitStack() as locks:
        for stage in stages:
            locks.enter_context(directory.lock(stage.name))
        stages = [stage for stage in stages if not directory.is_done(stage)]
        if not stages:
            return  # another process finished them while we waited to start
        directory.check_files(name for stage in stages for name in stage.inputs)
        tasks = [Task(stage, run, device, _progress_writer(directory.progress_path(stage.key))) for stage in stages]
        function: StageFunction = load_function(stages[0].function)
        started = time.monotonic()
        try:
            function(tasks)
        finally:
            for stage in stages:
                directory.progress_path(stage.key).unlink(missing_ok=True)
        for task in tasks:
            failure = directory.failure_path(task.stage.key)
            if task.error is not None:
                failure.write_text(str(task.error))
            else:
                failure.unlink(missing_ok=True)
                directory.write_record(task.stage, time.monotonic() - started, metadata.version("mechsub"))
                for path in task.scratch:
                    path.unlink(missing_ok=True)
    errors = [task.error for task in tasks if task.error is not None]
    if errors:
        raise join_errors(errors)


def read_progress(directory: RunDirectory, stage: Stage) -> int:
    """How many of its steps a running stage has done."""
    try:
        return int(directory.progress_path(stage.key).read_text())
    except (OSError, ValueError):
        return 0  # not begun, just ended, or being written this instant


def _progress_writer(path: Path) -> Callable[[int], None]:
    written = 0.0

    def report(done: int) -> None:
        nonlocal written
        if time.monotonic() - written > _REPORT_SECONDS:
            path.write_text(str(done))
            written = time.monotonic()

    return report
