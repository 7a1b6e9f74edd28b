"""How a finished lineage was made: its stage again, from the run's own records, so that its lesson can be asked for."""

from functools import lru_cache
from pathlib import Path

from mechsub.errors import RunDirectoryError
from mechsub.rundir import RunDirectory, StageRecord
from mechsub.stage import Stage, Task


def task_that_made(run: Path, output: str, device: str) -> Task:
    """The stage that made a file, as its function was given it.

    Raises:
        RunDirectoryError: no finished stage of the run made it.
    """
    folder = run / "stages"
    record = _makers(run, folder.stat().st_mtime_ns).get(output)
    if record is None:
        raise RunDirectoryError(f"no finished stage of {run} made {output}; `mechsub verify` names what is missing")
    inputs = {name: f"sha256:{known.sha256}" for name, known in record.inputs.items()}
    stage = Stage(record.name, record.function, record.arguments, inputs, tuple(record.outputs))
    return Task(stage, run, device, lambda done: None)


@lru_cache(maxsize=8)
def _makers(run: Path, modified: int) -> dict[str, StageRecord]:
    """Which stage made which file; read once for each state of the run."""
    return {name: record for record in RunDirectory(run).records().values() for name in record.outputs}
