"""Where a run was made: versions, git commit, hardware. Goes into the header of every run."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "huggingface-hub",
    "tokenizers",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "xarray",
    "h5netcdf",
    "h5py",
    "altair",
)


def describe_versions() -> dict[str, str]:
    """The versions of Python, mechsub and the libraries that its numbers depend on."""
    return {"python": platform.python_version(), "mechsub": metadata.version("mechsub")} | {
        name: metadata.version(name) for name in LIBRARIES
    }


def describe_provenance(command: str | None) -> dict[str, Any]:
    """Where something was made, by what the user typed; None where it was made from Python."""
    return {
        "versions": describe_versions(),
        "git_commit": git_commit(),
        "hardware": describe_hardware(),
        "command": command,
    }


def describe_hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor_name(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def available_cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def git_commit() -> str | None:
    """The commit that this copy of mechsub stands at, with ``+`` if it was changed; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        # An installed copy may lie inside somebody else's checkout, whose commit would say nothing.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "."], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
