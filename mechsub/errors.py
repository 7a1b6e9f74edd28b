"""The errors that a user can mend; the command line shows them bare and exits with 2."""

from collections.abc import Sequence


class MechsubError(Exception):
    """What is wrong, with the values, and the next step, in the user's words."""


class RecipeError(MechsubError):
    """A recipe that cannot be run as it is written."""


class RunDirectoryError(MechsubError):
    """A run directory, or a file in it, that is not what it should be."""


class StageHeldError(RunDirectoryError):
    """A stage that another process is working on."""


class ResourceError(MechsubError):
    """A plan that this machine's disk or memory cannot hold."""


class TrainingError(MechsubError):
    """Training that left the finite numbers."""


class GenerationError(MechsubError):
    """Completions that are not what was asked for."""


class ActivationError(MechsubError):
    """A layer, site, position, vector or backend that a model's activations do not have."""


class AnalysisError(MechsubError):
    """An analysis that this run cannot feed."""


def join_errors(errors: Sequence[MechsubError]) -> MechsubError:
    """One error that says what all of them say, each thing once; of their kind, where they share it."""
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else MechsubError
    return kind("\n".join(dict.fromkeys(map(str, errors))))
