"""The local executor: stages over processes of this machine, or one after the other in this process.

What is ready is read from the run directories, so that a killed run goes on where it was.
"""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch
from loky import ProcessPoolExecutor

from mechsub.environment import available_cores
from mechsub.errors import MechsubError, RunDirectoryError, join_errors
from mechsub.executors.execution import execute_stages, read_progress
from mechsub.rundir import RunDirectory
from mechsub.stage import PROCESS_BYTES, Stage

# loky gives a worker that has grown a fresh process between two calls, and tells the user of it, who need not care.
warnings.filterwarnings("ignore", message="A worker was restarted", module="loky")

_POLL_SECONDS = 0.25
_CALL_BYTES = 1 << 30
"""What the stages of one call may take together: stacking more of them saves little more."""
_MEMORY_SHARE = 0.7
"""Of the memory that is free at the start: what the stages of all processes together may take."""

Progress = Callable[[Stage, int], None]
"""Called with a stage and how many of its steps are done; all of them when it has ended."""

Job = tuple[RunDirectory, Stage]


def run_stages(
    work: Mapping[Path, Sequence[Stage]],
    device: str,
    *,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Run all stages of one or more run directories that are not done yet, each after those that make its inputs.

    A stage that several runs have is run in one of them and taken over by the others. ``workers``: processes; None gives one
    for each core that the stages' threads leave; 0 runs everything in this process. A failed stage stops nothing but what
    needs it (a failed callback also what trains beside it); what failed is raised at the end.

    Raises:
        MechsubError: a stage failed, or a worker process was killed.
    """
    board = _Board(work, on_progress or (lambda stage, done: None))
    if not board.pending:
        return
    stages = [stage for _, stage in board.pending]
    limit = int(_free_memory(device) * _MEMORY_SHARE)
    if workers is None:
        workers = _choose_workers(stages, device, limit)
    if workers == 0:
        _run_here(board, device, limit)
    else:
        _run_in_processes(board, device, workers, limit)
    for surprise in board.surprises:
        raise surprise
    if board.errors:
        raise join_errors(board.errors)


class _Board:
    """Which stages of which runs are done, wait, or have failed; read from the disk whenever one has ended."""

    def __init__(self, work: Mapping[Path, Sequence[Stage]], report: Progress) -> None:
        self.pending: list[Job] = [(RunDirectory.open(path), stage) for path, stages in work.items() for stage in stages]
        self.errors: list[MechsubError] = []
        self.surprises: list[Exception] = []
        """What no user can mend; raised as it is, once all else has ended."""
        self._failed: set[str] = set()
        """Keys: a stage that failed in one run is not tried again in another."""
        self._has_several = len(work) > 1
        self._makers: dict[str, RunDirectory] = {}
        self._report = report
        self.refresh()

    def refresh(self) -> None:
        """Strike out what is done, and take over what another run has done."""
        self.pending = [job for job in self.pending if not self._is_done(job)]
        # A stage comes after those that it reads, so that one pass takes over a whole chain.
        for directory, stage in list(self.pending):
            maker = self._makers.get(stage.key)
            if maker is not None and not self._missing(directory).intersection(stage.inputs):
                try:
                    directory.adopt(stage, maker)
                except RunDirectoryError:  # damaged there: it is made anew
                    del self._makers[stage.key]
                    continue
                self.pending.remove((directory, stage))
                self._makers[stage.key] = directory

    def ready(self, running: Collection[str] = ()) -> list[Job]:
        """What can be run now: one job a key; ``running`` holds the keys of those that are."""
        missing = {directory.path: self._missing(directory) for directory, _ in self.pending}
        found: dict[str, Job] = {}
        for directory, stage in self.pending:
            if stage.key not in self._failed and stage.key not in running and missing[directory.path].isdisjoint(stage.inputs):
                found.setdefault(stage.key, (directory, stage))
        return list(found.values())

    def report(self, stage: Stage, done: int) -> None:
        """Tell how far a running stage is."""
        self._report(stage, done)

    def end(self, directory: RunDirectory, group: Sequence[Stage], error: BaseException | None) -> None:
        """A call has ended: strike out what it finished, and remember why the rest failed."""
        self.refresh()
        left = {stage.key for where, stage in self.pending if where.path == directory.path}
        self._failed |= {stage.key for stage in group if stage.key in left}
        if isinstance(error, MechsubError):
            self.errors.append(type(error)(f"{directory.path}: {error}") if self._has_several else error)
        elif isinstance(error, Exception):
            self.surprises.append(error)
        elif error is not None:
            raise error

    def _is_done(self, job: Job) -> bool:
        directory, stage = job
        if not directory.is_done(stage):
            return False
        self._makers.setdefault(stage.key, directory)
        self._report(stage, stage.resources.num_steps)
        return True

    def _missing(self, directory: RunDirectory) -> set[str]:
        return {name for where, stage in self.pending if where.path == directory.path for name in stage.outputs}


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


def _group_jobs(jobs: Sequence[Job], num_groups: int, memory_bytes: int) -> list[tuple[RunDirectory, list[Stage]]]:
    """Calls, each of stages of one run."""
    by_run: dict[Path, tuple[RunDirectory, list[Stage]]] = {}
    for directory, stage in jobs:
        by_run.setdefault(directory.path, (directory, []))[1].append(stage)
    return [
        (directory, group)
        for directory, stages in by_run.values()
        for group in group_stages(stages, num_groups, min(memory_bytes, _CALL_BYTES))
    ]


def _run_here(board: _Board, device: str, limit: int) -> None:
    while ready := board.ready():
        directory, group = _group_jobs(ready, 1, limit)[0]
        error: Exception | None = None
        try:
            execute_stages(directory.path, group, device)
        except Exception as caught:
            error = caught
        board.end(directory, group, error)


def _run_in_processes(board: _Board, device: str, workers: int, limit: int) -> None:
    running: dict[Future[None], tuple[RunDirectory, list[Stage]]] = {}
    broken = False
    pool = ProcessPoolExecutor(max_workers=workers, initializer=_watch_parent, initargs=(os.getpid(),))
    try:
        while True:
            busy = {stage.key for _, group in running.values() for stage in group}
            idle = 0 if broken else workers - len(running)
            if idle > 0:
                for directory, group in _group_jobs(board.ready(busy), workers, limit // workers - PROCESS_BYTES)[:idle]:
                    running[pool.submit(execute_stages, directory.path, group, device)] = directory, group
            if not running:
                break
            finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                broken = broken or isinstance(future.exception(), BrokenProcessPool)
                directory, group = running.pop(future)
                board.end(directory, group, _error_of(future, group))
            for directory, group in running.values():
                for stage in group:
                    board.report(stage, read_progress(directory, stage))
    finally:
        # Also the way out of Ctrl-C: a killed worker loses nothing that the next run does not resume.
        pool.shutdown(wait=True, kill_workers=True)


def _error_of(future: "Future[None]", group: Sequence[Stage]) -> BaseException | None:
    """Why a call failed."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        names = ", ".join(stage.name for stage in group)
        return MechsubError(f"a worker process died (killed, or out of memory) while it ran {names}; run again to resume")
    return error


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
