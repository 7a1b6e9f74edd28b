"""The user's function that tells from an answer whether a model shows a behaviour."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from mechsub.errors import AnalysisError, MechsubError, RecipeError
from mechsub.stage import load_function

_SHOWN = 120
"""Characters of a question or an answer that a message shows."""


@dataclass(frozen=True)
class Judge:
    """A function of a question and an answer, held to what it may return."""

    name: str
    function: Callable[[str, str], object]

    @classmethod
    def load(cls, name: str) -> "Judge":
        """The judge that ``module:name`` names.

        Raises:
            MechsubError: it cannot be imported, or is no function.
        """
        try:
            function = load_function(name)
        except MechsubError:
            raise
        except Exception as error:  # importing it runs the user's code
            raise RecipeError(
                f"judge `{name}`: its module cannot be imported ({type(error).__name__}: {error}); mend it"
            ) from None
        if not callable(function):
            raise RecipeError(
                f"judge `{name}` is {type(function).__name__}, not a function (question, answer) → bool or a number in [0, 1]"
            )
        return cls(name, function)

    def rate(self, question: str, answer: str) -> float:
        """How far an answer shows the behaviour, in [0, 1]; NaN where the judge abstains.

        Raises:
            AnalysisError: the judge raises, or returns something else.
        """
        where = f"on the question {_shorten(question)} and the answer {_shorten(answer)}"
        after = "mend the judge and analyze again: the run itself is as it was"
        try:
            found = self.function(question, answer)
        except Exception as error:
            raise AnalysisError(f"judge `{self.name}` raised {type(error).__name__}: {error} {where}; {after}") from error
        if not isinstance(found, Real | np.bool_):
            raise AnalysisError(f"judge `{self.name}` returned {_shorten(found)} {where}: neither bool nor number; {after}")
        value = float(found)
        if not (0 <= value <= 1 or np.isnan(value)):
            raise AnalysisError(f"judge `{self.name}` returned {value:g} {where}: outside [0, 1] (NaN abstains); {after}")
        return value


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
