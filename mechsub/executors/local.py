"""The local executor: stages over processes of this machine, or one after the other in this process.

What is ready is read from the run directory each time, so that a killed run goes on where it was.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch
from loky import ProcessPoolExecutor

from mechsub.environment import available_cores
from mechsub.errors import MechsubError, join_errors
from mechsub.executors.execution import execute_stages, read_progress
from mechsub.rundir import RunDirectory
from mechsub.stage import PROCESS_BYTES, Stage

_POLL_SECONDS = 0.25
_MEMORY_SHARE = 0.7
"""Of the memory that is free at the start: what the stages of all processes together may take."""

Progress = Callable[[Stage, int], None]
"""Called with a stage and how many of its steps are done; all of them when it has ended."""


def run_stages(
    stages: Sequence[Stage],
    run: Path,
    device: str,
    *,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Run all stages that are not done yet, each after those that make its inputs.

    ``workers``: processes; None gives one for each core that the stages' threads leave; 0 runs everything in this
    process. A failed stage stops nothing but what needs it; what failed is raised at the end.

    Raises:
        MechsubError: a stage failed, or a worker process was killed.
    """
    directory = RunDirectory.open(run)
    report = on_progress or (lambda stage, done: None)
    pending = []
    for stage in stages:
        if directory.is_done(stage):
            report(stage, stage.resources.num_steps)
        else:
            pending.append(stage)
    if not pending:
        return
    limit = int(_free_memory(device) * _MEMORY_SHARE)
    if workers is None:
        workers = _choose_workers(pending, device, limit)
    if workers == 0:
        _run_here(pending, directory, device, limit, report)
    else:
        _run_in_processes(pending, directory, device, workers, limit, report)


def _free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _choose_workers(stages: Sequence[Stage], device: str, memory_bytes: int) -> int:
    """One process a core that the stages' threads leave, as far as memory goes; one for a GPU, which one batch fills."""
    if device == "cuda":
        return 1
    largest = max(stage.resources.memory_bytes for stage in stages) + PROCESS_BYTES
    threads = max(stage.resources.threads for stage in stages)
    return max(1, min(available_cores() // threads, memory_bytes // largest, len(stages)))


def group_stages(ready: Sequence[Stage], num_groups: int, memory_bytes: int) -> list[list[Stage]]:
    """Divide stages into calls: those that may be stacked together share one, as long as it fits ``memory_bytes``.

    Stackable stages are dealt over at most ``num_groups`` calls, so that all processes have work.
    """
    stacks: dict[tuple[str, str], list[Stage]] = {}
    for stage in ready:
        stacks.setdefault((stage.function, stage.resources.stack or stage.key), []).append(stage)
    groups: list[list[Stage]] = []
    for stack in stacks.values():
        most = -(-len(stack) // num_groups)
        group: list[Stage] = []
        for stage in stack:
            used = sum(member.resources.memory_bytes for member in group)
            if group and (len(group) == most or used + stage.resources.memory_bytes > memory_bytes):
                groups.append(group)
                group = []
            group.append(stage)
        groups.append(group)
    return groups


def _ready_stages(stages: Sequence[Stage], directory: RunDirectory, excluded: set[str]) -> list[Stage]:
    """Stages that are not done and whose inputs are; ``excluded`` holds the keys of those running or failed."""
    pending = [stage for stage in stages if not directory.is_done(stage)]
    missing = {name for stage in pending for name in stage.outputs}
    return [stage for stage in pending if stage.key not in excluded and missing.isdisjoint(stage.inputs)]


def _run_here(stages: Sequence[Stage], directory: RunDirectory, device: str, limit: int, report: Progress) -> None:
    errors: list[MechsubError] = []
    failed: set[str] = set()
    while ready := _ready_stages(stages, directory, failed):
        for group in group_stages(ready, 1, limit):
            try:
                execute_stages(directory.path, group, device)
            except MechsubError as error:
                errors.append(error)
            for stage in group:
                if directory.is_done(stage):
                    report(stage, stage.resources.num_steps)
                else:
                    failed.add(stage.key)
    if errors:
        raise join_errors(errors)


def _run_in_processes(
    stages: Sequence[Stage], directory: RunDirectory, device: str, workers: int, limit: int, report: Progress
) -> None:
    errors: list[MechsubError] = []
    failed: set[str] = set()
    running: dict[Future[None], list[Stage]] = {}
    broken = False
    pool = ProcessPoolExecutor(max_workers=workers, initializer=_watch_parent, initargs=(os.getpid(),))
    try:
        while True:
            busy = {stage.key for group in running.values() for stage in group}
            ready = [] if broken else _ready_stages(stages, directory, busy | failed)
            for group in group_stages(ready, workers, limit // workers - PROCESS_BYTES):
                running[pool.submit(execute_stages, directory.path, group, device)] = group
            if not running:
                break
            finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                broken = broken or isinstance(future.exception(), BrokenProcessPool)
                errors += _collect(future, running.pop(future), directory, failed, report)
            for stage in (stage for group in running.values() for stage in group):
                report(stage, read_progress(directory, stage))
    finally:
        # Also the way out of Ctrl-C: a killed worker loses nothing that the next run does not resume.
        pool.shutdown(wait=True, kill_workers=True)
    if errors:
        raise join_errors(errors)


def _collect(
    future: "Future[None]", group: Sequence[Stage], directory: RunDirectory, failed: set[str], report: Progress
) -> list[MechsubError]:
    """What a finished call leaves: progress for the stages that are done, the error of those that are not."""
    for stage in group:
        if directory.is_done(stage):
            report(stage, stage.resources.num_steps)
        else:
            failed.add(stage.key)
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        names = ", ".join(stage.name for stage in group)
        return [MechsubError(f"a worker process died (killed, or out of memory) while it ran {names}; run again to resume")]
    if isinstance(error, MechsubError):
        return [error]
    if error is not None:
        raise error
    return []


def _watch_parent(parent: int) -> None:
    """End this worker when the process that started it is gone, so that nobody holds its stages' locks.

    Ctrl-C reaches every process of a terminal: only the parent acts on it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
