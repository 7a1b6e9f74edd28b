"""A stage is data: which function makes which files from which files, with which arguments.

The experiment plans stages and the executors run them; neither knows the other.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mechsub.errors import MechsubError

PROCESS_BYTES = 500 << 20
"""What a process holds before it runs any stage: Python, torch and the libraries."""


@dataclass(frozen=True)
class Resources:
    """What a stage needs, for the plan and for the executors."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    num_steps: int = 1
    """Units of the stage's progress: optimizer steps, images, checkpoints."""
    threads: int = 1
    tokens: int = 0
    """Tokens that a language model reads and writes, about."""
    stack: str | None = None
    """Stages with the same function and ``stack`` may be run in one call; their numbers do not depend on it."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    ``inputs`` and ``outputs`` are paths relative to the run directory. Each input carries its digest: ``stage:<key>``
    when a stage of the plan makes it, ``sha256:<hash>`` when it is a file that exists already.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)

    @cached_property
    def key(self) -> str:
        """Hash of the function, its arguments and the digests of its inputs: 16 hexadecimal digits."""
        content = [self.name, self.function, self.arguments, sorted(self.inputs.items())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digest_outputs(stages: Iterable[Stage]) -> dict[str, str]:
    """The files that these stages make, each with the digest under which another stage reads it."""
    return {name: f"stage:{stage.key}" for stage in stages for name in stage.outputs}


@dataclass
class Task:
    """One stage being run: what a stage function is given."""

    stage: Stage
    run: Path
    device: str
    report_progress: Callable[[int], None]
    error: MechsubError | None = None
    """Set by the stage function when this stage failed and the others of the same call went on."""
    scratch: list[Path] = field(default_factory=list)
    """Files (resume state) that are removed once the stage is recorded."""

    def path(self, name: str) -> Path:
        """A file of the run directory."""
        return self.run / name


StageFunction = Callable[[Sequence[Task]], None]


def load_function(name: str) -> Any:
    """The object that ``module:name`` names.

    Raises:
        MechsubError: the module or the name does not exist.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MechsubError(f"`{name}` cannot be loaded ({error}); write it as `module:name`, importable here") from error
