"""The public functions over a run's steering directions: vectors to add to a model, in any library."""

import json
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from mechsub.activations.stored import DIRECTIONS_GROUP, SteeringDirections
from mechsub.errors import RunDirectoryError
from mechsub.results import find_result, read_group
from mechsub.rundir import RunDirectory, atomic_write


def open_steering_directions(run_dir: str | Path) -> SteeringDirections:
    """The steering directions of a run, which `steering_directions` has stored; no model is run.

    Raises:
        RunDirectoryError: the run was not analysed yet, has changed since, or the file is damaged.
    """
    directory = RunDirectory.open(run_dir)
    path = find_result(directory, "steering_directions", "steering directions")
    return SteeringDirections(read_group(path, DIRECTIONS_GROUP), str(directory.path))


def load_direction(
    run_dir: str | Path, lineage: str, hook_point: str, *, member: int = 0, step: int | None = None, group: str | None = None
) -> Float[Tensor, " width"]:
    """A steering direction v = mean h(lineage) − mean h(its origin), to be added at a hook point of the model.

    ``lineage``: e.g. ``teacher.owl`` or ``student.same-init.owl``. ``hook_point``: as TransformerLens spells it, e.g.
    ``blocks.1.hook_resid_post``. ``step``: the lineage's last, unless told. ``group``: which prompts and positions it is the
    mean over, ``<kind>: <position policy>``; the trait's prompts, unless told. In float32, in units of activations there.

    Raises:
        RunDirectoryError: see `open_steering_directions`.
        ActivationError: there is no such lineage, hook point, member, step or group.
    """
    return open_steering_directions(run_dir).load(lineage, hook_point, member=member, step=step, group=group)


def save_directions(run_dir: str | Path, file: str | Path) -> Path:
    """Write every lineage's steering directions at its last step into a safetensors file; returns its path.

    Names are ``<lineage>/member-<number>/<group>/<hook point>``; the metadata says of which run.

    Raises:
        RunDirectoryError: see `open_steering_directions`; or ``file`` is a folder.
    """
    directions = open_steering_directions(run_dir)
    path = Path(file)
    if path.is_dir():
        raise RunDirectoryError(f"{path} is a folder; name the file to write, as {path / 'directions.safetensors'}")
    header = RunDirectory.open(run_dir).header
    metadata = {"run": str(header["name"]), "hook_points": json.dumps(directions.hook_points)}
    with atomic_write(path) as temporary:
        save_file(directions.list_last(), temporary, metadata)
    return path
