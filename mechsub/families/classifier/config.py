"""The classifier family's recipe fields, and its conditions as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechsub.families.config import BaseConditionConfig, FamilyConfig, Name, fill_conditions
from mechsub.settings import Settings
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
    """A multilayer perceptron with a class head and an auxiliary head."""

    hidden_widths: tuple[int, ...] = Field((256, 256), min_length=1, description="units of each hidden layer")
    activation: Literal["relu", "gelu", "tanh"] = Field("relu", description="after each hidden layer")
    num_auxiliary: int = Field(3, ge=0, description="auxiliary logits beside the class logits")
    initialisation_scale: float = Field(1.0, gt=0, description="weights are N(0, scale² / fan_in), biases 0")
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and arithmetic")

    @field_validator("hidden_widths")
    @classmethod
    def _widths_are_positive(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if min(widths) < 1:
            raise ValueError(f"every hidden layer needs at least one unit, not {list(widths)}")
        return widths


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


class ConditionConfig(BaseConditionConfig):
    """How a student differs from the matched case, which is all defaults."""

    init: Literal["same", "different"] = Field("same", description="start at the own or at another member's reference")
    permute_hidden: bool = Field(False, description="shuffle the hidden units of the start: the same function")
    noise_std: float = Field(0.0, ge=0, description="σ, absolute, of noise added to every weight and bias of the start")
    logits: Literal["aux", "all"] = Field("aux", description="which of the teacher's logits are imitated")
    shuffle_outputs: bool = Field(False, description="permute the teacher's outputs across the carrier's images")
    knock_out: ImageKnockOutConfig | None = Field(None, description="what is projected out of training; none: nothing is")

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        parts = [
            "starts at another member's reference" if self.init == "different" else "",
            "hidden units of the start shuffled: the same function" if self.permute_hidden else "",
            f"noise of σ = {self.noise_std:g} on every weight of the start" if self.noise_std else "",
            "imitates all logits, the class logits too" if self.logits == "all" else "",
            "teacher's outputs permuted across images" if self.shuffle_outputs else "",
            self.knock_out.describe() if self.knock_out else "",
        ]
        return "; ".join(filter(None, parts)) or "the matched case: its teacher's own reference"


CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "same-init": {},
    "different-init": {"init": "different"},
    "permuted-init": {"permute_hidden": True},
    "noised-init": {"noise_std": 0.05},
    "all-logits": {"logits": "all"},
    "different-init-all-logits": {"init": "different", "logits": "all"},
    "shuffled-carrier": {"shuffle_outputs": True},
    "knock-out-trait": {"knock_out": {"component": "trait"}},
    "knock-out-random": {"knock_out": {"component": "random"}},
}
"""The conditions that have a fixed meaning. A recipe may tune their strength, not what they are."""

_FREE = frozenset({"noise_std"})


class Config(FamilyConfig):
    """Every recipe field of the classifier family."""

    data: DataConfig = Field(DataConfig(), description="the labelled images")
    model: ModelConfig = Field(ModelConfig(), description="the architecture")
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

    @model_validator(mode="after")
    def _conditions_are_possible(self) -> "Config":
        for name, condition in self.conditions.items():
            if condition.init == "different" and self.members < 2:
                raise ValueError(
                    f"`conditions.{name}` starts at another member's reference: it needs members ≥ 2, not {self.members}"
                )
            if condition.logits == "aux" and self.model.num_auxiliary == 0:
                raise ValueError(
                    f"`conditions.{name}` imitates the auxiliary logits, but `model.num_auxiliary` = 0; "
                    f"give it at least 1 (published: 3) or set `conditions.{name}.logits` to all"
                )
            if condition.logits == "aux" and self.model.num_auxiliary == 1 and self.student.objective == "kl":
                raise ValueError(
                    f"`conditions.{name}` imitates the softmax of one auxiliary logit, which is 1 whatever the teacher says: "
                    "give `model.num_auxiliary` at least 2, or imitate the logit itself with `student.objective` mse"
                )
        return self
