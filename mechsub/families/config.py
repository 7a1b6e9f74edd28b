"""Recipe fields that every family has: the base of each family's own settings."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from mechsub.settings import Settings, nearest_name
from mechsub.training.config import CheckpointConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Names become names of folders."""

OTHER = "other"
"""A condition's `model` that names the other one of the recipe's two models."""


class BaseConditionConfig(Settings):
    """What a condition has in every family."""

    sham: bool = Field(False, description="also train a second control with draws of its own, for the sham of alignment")

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        raise NotImplementedError

    def shared_start(self) -> str | None:
        """What its students' start shares with their teacher's: ``everything``, ``nothing``, or the parts that it shares.

        None where more than architecture and start sets the condition apart from the matched case: it is then no cell of the
        matrix of architectures.
        """
        return None


class VerdictConfig(Settings):
    """The rules of every verdict, fixed before the run."""

    margin: float = Field(0.05, gt=0, description="effects on the trait score under this do not matter, in its unit")
    alignment_margin: float = Field(0.05, gt=0, description="the same for differences of cosines")
    gradient_margin: float = Field(
        0.005, gt=0, description="the same for cosines of gradients and of single updates, which are small"
    )
    share_margin: float = Field(
        0.05, gt=0, description="the same for differences of shares, of examples or of the way to the teacher"
    )
    accuracy_margin: float = Field(0.05, gt=0, description="the same for a text classifier's accuracy over its null")
    subspace_margin: float = Field(0.05, gt=0, description="the same for differences of subspace overlaps")
    similarity_margin: float = Field(0.02, gt=0, description="the same for differences of CKA, which starts out high")
    subspace_rank: int = Field(4, ge=1, le=64, description="of the singular subspaces whose overlap has the verdict")
    minimum_members: int = Field(5, ge=2, description="with fewer there is no verdict")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the two-sided intervals over members")
    equivalence_level: float = Field(0.05, gt=0, lt=0.5, description="of each of the two one-sided tests of absence")
    diagonal_excess: bool | None = Field(
        None, description="whether to judge own traits against the other ones; unless told, where there are two traits or more"
    )


class FamilyConfig(Settings):
    """The seed, the members and the record of an experiment."""

    neutral: str = Field(description="the controls' teacher")
    conditions: Mapping[Name, BaseConditionConfig] = Field(description="the students, by condition")
    seed: int = Field(0, ge=0, description="every random draw of the run is derived from it by name")
    members: int = Field(20, ge=1, description="independent replicates: own reference, teacher, carrier and order")
    threads: int = Field(1, ge=1, description="torch threads of each process; part of the recipe since sums depend on it")
    checkpoints: CheckpointConfig = Field(CheckpointConfig(), description="which steps are kept")
    callbacks: tuple[str, ...] = Field((), description="your own callbacks, each `module:name`, called at every step")
    verdict: VerdictConfig = Field(VerdictConfig(), description="the rules of the verdicts")

    @property
    def trait_set(self) -> tuple[str, ...]:
        """The traits that have a teacher each; empty in a family that has one trait of its own."""
        return ()

    def has_control(self, condition: str) -> bool:
        """Whether a condition has a control: every one but those of models that were trained elsewhere without one."""
        return True

    @property
    def asks_for_traits(self) -> bool:
        """Whether it is known what the trait is, so that it can be scored."""
        return True

    @property
    def user_functions(self) -> tuple[str, ...]:
        """Functions of the user, each ``module:name``, that analyses call: when their source changes, they are called again."""
        return ()

    @property
    def passes_text(self) -> bool:
        """Whether teachers pass on text."""
        return False

    @property
    def has_tokens(self) -> bool:
        """Whether its models read and write tokens."""
        return False

    def architecture(self, condition: str | None = None) -> str:
        """What the teachers' architecture is called, or a condition's; all are one unless a family knows more."""
        return "the one model"

    def num_references(self, condition: str | None = None) -> int:
        """How many references of their own the members have, in the teachers' model and in that of a condition."""
        return self.members


def name_model(asked: str, own: str, models: Collection[str]) -> str:
    """The name of the model that a condition asks for: as given, or the other one of two (:func:`check_model`)."""
    return next(model for model in models if model != own) if asked == OTHER else asked


def check_model(where: str, asked: str, *, own: str | None, models: Collection[str], starts_elsewhere: bool) -> None:
    """A condition's model is another one of the recipe's, or the teacher's own from another start; else a ValueError."""
    others = [model for model in models if model != own]
    if asked == OTHER and len(others) != 1:
        raise ValueError(f"{where}: `model` is the other one of two, but `models` has {len(others)} others, {others}; name one")
    if asked not in {OTHER, *models}:
        known = nearest_name(asked, list(models)) if models else "`models` is empty: give it one of that name"
        raise ValueError(f"{where}: no model is called {asked!r}; {known}")
    if asked == own and not starts_elsewhere:
        raise ValueError(f"{where}: `model` is the teacher's own, {own!r}; leave it out, name another, or set init: different")


def fill_conditions(
    conditions: Any, model: type[BaseConditionConfig], known: Mapping[str, Mapping[str, Any]], free: frozenset[str]
) -> Any:
    """Conditions as they are written, each known one with its own values under what the recipe says of it.

    ``free``: the fields that a recipe may tune in the known conditions that set them, but not switch off.
    """
    if not isinstance(conditions, Mapping):
        return conditions
    return {name: _fill_condition(str(name), given, model, known, free) for name, given in conditions.items()}


def _with_tuples(values: Any) -> Any:
    """The same with tuples for lists: what a validator gives is checked as Python, and settings hold tuples."""
    if isinstance(values, Mapping):
        return {key: _with_tuples(value) for key, value in values.items()}
    return tuple(map(_with_tuples, values)) if isinstance(values, list) else values


def _fill_condition(
    name: str, given: Any, model: type[BaseConditionConfig], known: Mapping[str, Mapping[str, Any]], free: frozenset[str]
) -> Any:
    if isinstance(given, model) or not isinstance(given, Mapping | None):
        return given
    given = _with_tuples(given or {})
    if name not in known:
        if not given:
            hint = nearest_name(name, list(known))
            raise ValueError(
                f"no condition is called {name!r}; {hint} One of your own says how it differs, e.g. init: different"
            )
        return given
    plain = model().model_dump()
    fixed = {**plain, **known[name]}
    # Settings inside a field: what the known condition says of them is fixed, the others may be tuned.
    nested = {
        key: {**value, **given[key]}
        for key, value in known[name].items()
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping)
    }
    given |= nested
    tuned = {key for key in free & known[name].keys() if given.get(key) != plain[key]} | {"sham"}
    tuned |= {key for key, value in nested.items() if {**value, **known[name][key]} == value}
    changed = [key for key, value in given.items() if key in fixed and key not in tuned and value != fixed[key]]
    if changed:
        raise ValueError(f"{name} means {dict(known[name])}; a condition with another {changed[0]} needs another name")
    return {**known[name], **given}
