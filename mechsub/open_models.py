"""A run's models, open: each with its hook points and its member's prompts, behind the backend of the run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from mechsub.activations.backends import ModelView, open_backend
from mechsub.activations.hook_points import HookPoint, main_stream
from mechsub.families.protocol import Prompts
from mechsub.lineages import Lineage
from mechsub.run import Run


@dataclass(frozen=True)
class OpenModel:
    """One member of a lineage at one step, ready to be run on its prompts."""

    lineage: Lineage
    model: nn.Module
    view: ModelView
    points: Sequence[HookPoint]
    prompts: Prompts


def list_reference_points(run: Run, stream_only: bool) -> Sequence[HookPoint]:
    """The references' hook points, in the order of the forward pass; ``stream_only``: see `main_stream`."""
    model = run.load_for_reading(run.reference, run.reference.last, 0)
    points = run.family.hook_points(run.reference, model)
    return main_stream(points) if stream_only else points


@contextmanager
def open_model(
    run: Run, lineage: Lineage, step: int, member: int, *, asked: Lineage | None = None, stream_only: bool = False
) -> Iterator[OpenModel]:
    """A model of a run; when it closes, it is as it was.

    ``asked``: the lineage whose prompts it is run on, where these are not its own. ``stream_only``: see `main_stream`.
    """
    model = run.load_for_reading(lineage, step, member)
    points = run.family.hook_points(lineage, model)
    with open_backend(run.backend).open(model) as view:
        yield OpenModel(
            lineage,
            model,
            view,
            main_stream(points) if stream_only else points,
            run.family.prompts(asked or lineage, member),
        )
