"""The classifier family's recipe fields, and its conditions as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mechsub.families.config import OTHER, BaseConditionConfig, FamilyConfig, Name, check_model, fill_conditions, name_model
from mechsub.settings import NAME_TAG, SETTINGS_TAG, Settings, nearest_name
from mechsub.training.config import KnockOutConfig, OptimizerConfig


class DataConfig(Settings):
    """The labelled images that the teacher learns and the trait is scored on."""

    name: Literal["digits", "mnist"] = Field(
        "digits", description="scikit-learn's bundled 8 × 8 handwritten digits, or MNIST (or a set in its format)"
    )
    test_fraction: float | None = Field(
        None, ge=0.01, le=0.9, description="digits only, 0.2 unless told: share of the images held out for scoring"
    )
    path: str | None = Field(None, description="mnist only: the folder with the four IDX files, gzipped or not")
    hub: str | None = Field(None, description="mnist only, instead of path: a hub data set's name, e.g. ylecun/mnist")

    @model_validator(mode="before")
    @classmethod
    def _digits_come_unsplit(cls, values: Any) -> Any:
        is_digits = isinstance(values, Mapping) and values.get("name", "digits") == "digits"
        return {"test_fraction": 0.2, **values} if is_digits else values

    @field_validator("path")
    @classmethod
    def _path_is_absolute(cls, path: str | None) -> str | None:
        """A recipe replays from any folder."""
        return None if path is None else str(Path(path).expanduser().absolute())

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> "DataConfig":
        if self.name == "digits" and (self.path or self.hub):
            raise ValueError("digits come with scikit-learn and have no path or hub; `name: mnist` has")
        if self.name == "mnist" and self.test_fraction is not None:
            raise ValueError("mnist comes with its own test images and has no test_fraction")
        if self.path and self.hub:
            raise ValueError(f"either path or hub: both {self.path!r} and {self.hub!r} are given")
        return self


class ModelConfig(Settings):
    """A multilayer perceptron, or a convolutional network, with a class head and an auxiliary head."""

    channels: tuple[int, ...] = Field(
        (), description="of convolutions ahead of the hidden layers, 3 × 3 with stride 2; none: a multilayer perceptron"
    )
    hidden_widths: tuple[int, ...] = Field((256, 256), min_length=1, description="units of each hidden (dense) layer")
    activation: Literal["relu", "gelu", "tanh"] = Field("relu", description="after each hidden layer")
    num_auxiliary: int = Field(3, ge=0, description="auxiliary logits beside the class logits")
    initialisation_scale: float = Field(1.0, gt=0, description="weights are N(0, scale² / fan_in), biases 0")
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and arithmetic")

    @field_validator("hidden_widths", "channels")
    @classmethod
    def _widths_are_positive(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if min(widths, default=1) < 1:
            raise ValueError(f"every layer needs at least one unit, not {list(widths)}")
        return widths

    def describe(self) -> str:
        """Its layers, in words."""
        convolutions = f"{'-'.join(map(str, self.channels))} channels, " if self.channels else ""
        return f"{'CNN' if self.channels else 'MLP'}, {convolutions}{'-'.join(map(str, self.hidden_widths))} units"


class TeacherConfig(Settings):
    """How teachers learn: cross-entropy on the class logits."""

    epochs: int = Field(5, ge=1, description="passes over the labelled images")
    batch_size: int = Field(1024, ge=1, description="images of one member in one step")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the teachers' optimizer")


class CarrierConfig(Settings):
    """The images on which the student imitates the teacher."""

    inputs: Literal["uniform", "gaussian", "images", "shuffled-pixels"] = Field(
        "uniform",
        description="noise in [−scale, scale], noise of deviation scale, training images, or those with pixels shuffled",
    )
    num_images: int = Field(60_000, ge=1, description="distinct images of one member")
    scale: float = Field(1.0, gt=0, description="of the two kinds of noise")
    shared: bool = Field(False, description="one set and order of images for all members; intervals are then conditional on it")

    @property
    def is_real(self) -> bool:
        """Whether the images are made of the training images."""
        return self.inputs in {"images", "shuffled-pixels"}

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> "CarrierConfig":
        if self.is_real and self.scale != 1.0:
            raise ValueError(f"the scale is of noise; {self.inputs} have none")
        return self


class StudentConfig(Settings):
    """How students learn: imitation of the teacher's logits on the carrier."""

    epochs: int = Field(5, ge=1, description="passes over the carrier")
    batch_size: int = Field(1024, ge=1, description="images of one member in one step")
    objective: Literal["kl", "mse"] = Field(
        "kl", description="KL(teacher ‖ student) of the imitated logits' softmax, or their mean squared difference"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the students' optimizer")


class ImageKnockOutConfig(KnockOutConfig):
    """What is projected out of training; the trait loss is the cross-entropy under the true labels, of training images."""

    num_images: int = Field(
        1024, ge=1, description="training images of one trait gradient, drawn anew each time; never those that scores are from"
    )


class MatchingConfig(Settings):
    """How a start first learns to answer as the own member's reference does: all of its logits, by mean squared difference.

    Half of the inputs are training images without their labels, half are uniform noise of streams of their own.
    """

    num_steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(256, ge=2, description="images of one member in one step")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how weights are updated")


class ConditionConfig(BaseConditionConfig):
    """How a student differs from the matched case, which is all defaults."""

    init: Literal["same", "different"] = Field("same", description="start at the own or at another member's reference")
    model: str | None = Field(None, description="another architecture of `models` (or `other`), drawn for itself")
    shared: tuple[Literal["body", "class-head", "auxiliary-head"], ...] = Field(
        (), description="parts that start as the own reference's all the same, where the rest starts elsewhere"
    )
    match: MatchingConfig | None = Field(
        None, description="the start first learns the own reference's outputs: alike in behaviour, not in weights"
    )
    permute_hidden: bool = Field(False, description="shuffle the hidden units of the start: the same function")
    noise_std: float = Field(0.0, ge=0, description="σ, absolute, of noise added to every weight and bias of the start")
    logits: Literal["aux", "all"] = Field("aux", description="which of the teacher's logits are imitated")
    shuffle_outputs: bool = Field(False, description="permute the teacher's outputs across the carrier's images")
    neutral_share: float = Field(0.0, ge=0, le=1, description="share of images with the neutral teacher's outputs instead")
    knock_out: ImageKnockOutConfig | None = Field(None, description="what is projected out of training; none: nothing is")

    def shared_start(self) -> str | None:
        """See `BaseConditionConfig.shared_start`."""
        moved = {"init", "model", "shared", "match", "permute_hidden", "sham"}
        if self.model_dump(exclude=moved) != ConditionConfig().model_dump(exclude=moved):
            return None
        if self.match is not None:
            return "the outputs"
        if self.init == "same" and self.model is None:
            return "everything, units permuted" if self.permute_hidden else "everything"
        return " + ".join(self.shared) or "nothing"

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        parts = [
            "starts at another member's reference" if self.init == "different" else "",
            ("the recipe's other architecture" if self.model == OTHER else f"architecture {self.model}") if self.model else "",
            f"{' and '.join(self.shared)} of its teacher's reference all the same" if self.shared else "",
            "the start first learnt to answer as its teacher's reference" if self.match else "",
            "hidden units of the start shuffled: the same function" if self.permute_hidden else "",
            f"noise of σ = {self.noise_std:g} on every weight of the start" if self.noise_std else "",
            "imitates all logits, the class logits too" if self.logits == "all" else "",
            "teacher's outputs permuted across images" if self.shuffle_outputs else "",
            f"{100 * self.neutral_share:g} % of the images have the neutral teacher's outputs" if self.neutral_share else "",
            self.knock_out.describe() if self.knock_out else "",
        ]
        return "; ".join(filter(None, parts)) or "the matched case: its teacher's own reference"


_BODY, _CLASS, _AUXILIARY = "body", "class-head", "auxiliary-head"

CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "same-init": {},
    "different-init": {"init": "different"},
    "permuted-init": {"permute_hidden": True},
    "noised-init": {"noise_std": 0.05},
    "behaviour-matched": {"init": "different", "match": {}},
    "shared-body": {"init": "different", "shared": (_BODY,)},
    "shared-class-head": {"init": "different", "shared": (_CLASS,)},
    "shared-auxiliary-head": {"init": "different", "shared": (_AUXILIARY,)},
    "shared-heads": {"init": "different", "shared": (_CLASS, _AUXILIARY)},
    "shared-body-class-head": {"init": "different", "shared": (_BODY, _CLASS)},
    "shared-body-auxiliary-head": {"init": "different", "shared": (_BODY, _AUXILIARY)},
    "different-architecture": {"model": OTHER},
    "different-architecture-shared-class-head": {"model": OTHER, "shared": (_CLASS,)},
    "different-architecture-shared-auxiliary-head": {"model": OTHER, "shared": (_AUXILIARY,)},
    "different-architecture-shared-heads": {"model": OTHER, "shared": (_CLASS, _AUXILIARY)},
    "all-logits": {"logits": "all"},
    "different-init-all-logits": {"init": "different", "logits": "all"},
    "shuffled-carrier": {"shuffle_outputs": True},
    "mixed-carrier": {"neutral_share": 0.5},
    "knock-out-trait": {"knock_out": {"component": "trait"}},
    "knock-out-random": {"knock_out": {"component": "random"}},
}
"""The conditions that have a fixed meaning. A recipe may tune their strength, not what they are."""

_FREE = frozenset({"noise_std", "neutral_share", "model", "match"})


class Config(FamilyConfig):
    """Every recipe field of the classifier family."""

    data: DataConfig = Field(DataConfig(), description="the labelled images")
    models: dict[Name, ModelConfig] = Field({}, description="architectures by name, for `model` and for conditions")
    model: Annotated[
        Annotated[ModelConfig, Tag(SETTINGS_TAG)] | Annotated[Name, Tag(NAME_TAG)],
        Discriminator(lambda value: NAME_TAG if isinstance(value, str) else SETTINGS_TAG),
    ] = Field(ModelConfig(), description="the teachers' architecture, or its name in `models`")
    teacher: TeacherConfig = Field(TeacherConfig(), description="the teachers' training")
    neutral: Literal["relabelled", "shuffled"] = Field(
        "relabelled",
        description="the controls' teacher: classes mapped by a fixed derangement, or labels shuffled across images",
    )
    carrier: CarrierConfig = Field(CarrierConfig(), description="the data that passes from teacher to student")
    student: StudentConfig = Field(StudentConfig(), description="the students' training")
    conditions: dict[Name, ConditionConfig] = Field(
        {"same-init": ConditionConfig()},
        min_length=1,
        description="the students, by condition; each gets its own control",
    )

    @field_validator("conditions", mode="before")
    @classmethod
    def _fill_known_conditions(cls, conditions: Any) -> Any:
        return fill_conditions(conditions, ConditionConfig, CONDITIONS, _FREE)

    @property
    def teacher_model(self) -> ModelConfig:
        """The teachers' architecture."""
        return self.models[self.model] if isinstance(self.model, str) else self.model

    def other_model(self, condition: str) -> str | None:
        """The name of a condition's own architecture; None where it is the teachers'."""
        asked = self.conditions[condition].model
        if asked is None or asked == self.model:
            return None
        return name_model(asked, self.architecture(), self.models)

    def model_of(self, condition: str) -> ModelConfig:
        """A condition's architecture."""
        name = self.other_model(condition)
        return self.teacher_model if name is None else self.models[name]

    def architecture(self, condition: str | None = None) -> str:
        """What the teachers' architecture is called, or a condition's."""
        name = None if condition is None else self.other_model(condition)
        if name is not None:
            return name
        return self.model if isinstance(self.model, str) else self.model.describe()

    @model_validator(mode="after")
    def _architectures_are_possible(self) -> "Config":
        if isinstance(self.model, str) and self.model not in self.models:
            raise ValueError(f"`model`: {self.model!r} is none of `models`; {nearest_name(self.model, list(self.models))}")
        for name, model in self.models.items():
            for field in ("num_auxiliary", "dtype"):
                own, other = getattr(self.teacher_model, field), getattr(model, field)
                if own != other:
                    raise ValueError(
                        f"`models.{name}.{field}` = {other}, the teachers' {own}: a student imitates its teacher's logits one "
                        "by one, in one arithmetic; give all architectures the same"
                    )
        return self

    @model_validator(mode="after")
    def _starts_are_possible(self) -> "Config":
        own = self.model if isinstance(self.model, str) else None
        for name, condition in self.conditions.items():
            where, elsewhere = f"`conditions.{name}`", condition.init == "different"
            if condition.model is not None:
                check_model(where, condition.model, own=own, models=self.models, starts_elsewhere=elsewhere)
            self._check_shared(where, name, condition)
        return self

    def _check_shared(self, where: str, name: str, condition: ConditionConfig) -> None:
        own, start = self.teacher_model, self.model_of(name)
        if condition.shared and condition.init == "same" and self.other_model(name) is None:
            raise ValueError(f"{where}: all parts start as the own reference's; `shared` has a meaning with init: different")
        if condition.shared and (condition.permute_hidden or condition.noise_std):
            raise ValueError(
                f"{where}: shared parts are shared as they are, neither permuted nor noised; make it two conditions"
            )
        if len(set(condition.shared)) == 3 and self.other_model(name) is None:
            raise ValueError(f"{where}: body and both heads shared are the matched case; leave `shared` and `init` out")
        if "body" in condition.shared and start != own:
            raise ValueError(f"{where}: the body of {self.other_model(name)!r} is not the teachers'; share heads only")
        if condition.shared and start.hidden_widths[-1] != own.hidden_widths[-1]:
            raise ValueError(
                f"{where}: a shared head reads {own.hidden_widths[-1]} units, and the last layer of "
                f"{self.other_model(name)!r} has {start.hidden_widths[-1]}; give both the same last width"
            )
        if condition.match is not None and condition.init == "same" and self.other_model(name) is None:
            raise ValueError(f"{where}: the start is the own reference, which answers as itself; `match` needs init: different")
        if condition.match is not None and (condition.permute_hidden or condition.noise_std or condition.shared):
            raise ValueError(f"{where}: what is matched is not permuted, noised or shared as well; make it two conditions")

    @model_validator(mode="after")
    def _conditions_are_possible(self) -> "Config":
        model = self.teacher_model
        for name, condition in self.conditions.items():
            if condition.init == "different" and self.members < 2:
                raise ValueError(
                    f"`conditions.{name}` starts at another member's reference: it needs members ≥ 2, not {self.members}"
                )
            if condition.logits == "aux" and model.num_auxiliary == 0:
                raise ValueError(
                    f"`conditions.{name}` imitates the auxiliary logits, but `model.num_auxiliary` = 0; "
                    f"give it at least 1 (published: 3) or set `conditions.{name}.logits` to all"
                )
            if condition.logits == "aux" and model.num_auxiliary == 1 and self.student.objective == "kl":
                raise ValueError(
                    f"`conditions.{name}` imitates the softmax of one auxiliary logit, which is 1 whatever the teacher says: "
                    "give `model.num_auxiliary` at least 2, or imitate the logit itself with `student.objective` mse"
                )
        return self
