"""What several tests do with run directories."""

from pathlib import Path

from mechsub.rundir import RunDirectory, hash_file


def output_hashes(run: Path, prefix: str = "") -> dict[str, str]:
    """The bytes of everything that a run's stages made."""
    records = RunDirectory.open(run).records().values()
    return {name: hash_file(run / name) for record in records for name in record.outputs if name.startswith(prefix)}
