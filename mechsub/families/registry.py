"""The families that are installed, by name. A family's settings load without torch; its models do not."""

import importlib
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.config import FamilyConfig
from mechsub.settings import nearest_name

FAMILIES = {name: f"mechsub.families.{name}" for name in ("adopted", "classifier", "language")}


def family_config(name: str) -> type[FamilyConfig]:
    """The settings class of a family.

    Raises:
        RecipeError: no family has that name.
    """
    config: type[FamilyConfig] = _module(name, "config").Config
    return config


def _module(name: str, part: str) -> Any:
    if name not in FAMILIES:
        raise RecipeError(f"`family`: no family is called {name!r}; {nearest_name(name, list(FAMILIES))}")
    return importlib.import_module(f"{FAMILIES[name]}.{part}")


def family_stages(name: str) -> Any:
    """The family's `stages` module: what its stages read and write; see `mechsub.experiment.plan`."""
    return _module(name, "stages")


def load_family(name: str, run: Path, config: FamilyConfig, device: str) -> Any:
    """The family bound to one run directory, its recipe and a device: a `mechsub.families.protocol.Family`."""
    return _module(name, "family").Family(run, config, device)
