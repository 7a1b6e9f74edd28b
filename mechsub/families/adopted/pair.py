"""A reference and a teacher outside of any run: checked and linked as `mechsub adopt` does it, in a folder of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mechsub.checkpoints import load_tensor, tensor_types
from mechsub.errors import RecipeError
from mechsub.families.adopted.adoption import adopt_lineage, adopt_reference, copy_skeleton
from mechsub.families.adopted.sources import Source, find_source, locate_folder
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.config import LoadingConfig
from mechsub.families.language.folders import check_folder, digest_file, find_weights
from mechsub.families.language.layout import LOADING_FILE, skeleton_folder
from mechsub.families.language.members import load_merged_model
from mechsub.lineages import Lineage, checkpoint_folder, spec_name
from mechsub.parameters.directions import displacement, load_tensors
from mechsub.stage import Stage, Task

_MODEL = _REFERENCE = "reference"
_TEACHER = "teacher"
_MODULE = "mechsub.families.adopted.adoption"


@dataclass(frozen=True)
class ModelFiles:
    """A reference and a teacher as files of somebody else."""

    reference: str
    """As the user gave it."""
    folder: Path
    """The reference's."""
    teacher: Source | None

    @classmethod
    def find(cls, reference: str, teacher: str | None) -> "ModelFiles":
        """Find both.

        Raises:
            RecipeError: a model is not there, lacks a file, or its weights hold numbers that are not finite.
        """
        folder = locate_folder(reference)
        check_folder("reference", folder)
        find_weights(reference, folder)
        _refuse_not_finite(reference, folder)
        source = None if teacher is None else find_source(teacher)
        if source is not None:
            _refuse_not_finite(source.name, source.folders[max(source.folders)])
        return cls(reference, folder, source)

    @property
    def digests(self) -> dict[str, str]:
        """Every file that decides what is computed, with its hash."""
        files = [self.folder / name for name in check_folder("reference", self.folder)]
        files += find_weights(self.reference, self.folder)
        if self.teacher is not None:
            files += self.teacher.files[max(self.teacher.files)]
        return {str(path): digest_file(path) for path in files}


@dataclass(frozen=True)
class Pair:
    """A reference, and a teacher that is said to have started there."""

    folder: Path
    reference: Lineage
    teacher: Lineage | None
    chats: ChatTokenizer
    device: str

    @property
    def origin_note(self) -> str:
        """What speaks for the reference being where the teacher started."""
        assert self.teacher is not None
        model = self.teacher.spec.model
        proven = {"hash": "is proven", "recorded base": "is said by its files", "none": "is not proven"}[model["proof"]]
        return f"The teacher {proven} to start at the reference: {model['evidence']}."

    def load_reference(self) -> PreTrainedModel:
        """The reference in float32, in evaluation mode."""
        return load_merged_model(self.folder, self.reference, 0, 0, self.device)

    def load_teacher(self) -> PreTrainedModel:
        """The teacher in float32, what an adapter adds inside the weights, in evaluation mode."""
        assert self.teacher is not None
        return load_merged_model(self.folder, self.teacher, self.teacher.last, 0, self.device)

    def load_displacement(self, parameters: Sequence[str]) -> Mapping[str, Tensor]:
        """Δ_T = θ_T − θ₀ by parameter; an adapter's from its factors.

        Raises:
            RecipeError: it is 0 in every parameter.
        """
        assert self.teacher is not None
        found = load_tensors(displacement(self.teacher, self.teacher.last), parameters, 0)
        if not any(tensor.any() for tensor in found.values()):
            raise RecipeError(
                f"`{self.teacher.spec.model['source']}` has the reference's weights, Δ_T = 0: nothing can point along it. A "
                "teacher that was told its trait by a prompt has no displacement; name the trait with --trait instead of the "
                "teacher, or give the model that was trained"
            )
        return found


def adopt_pair(run: Path, files: ModelFiles, device: str) -> Pair:
    """Check a teacher against its reference and link both into a folder.

    Raises:
        RecipeError: the teacher has other parameters or another origin than the reference, or a file cannot be used.
    """
    names = check_folder("reference", files.folder)
    target = skeleton_folder(_MODEL)
    skeleton = {"model": _MODEL, "loading": LoadingConfig().model_dump(mode="json"), "asks": True}
    inputs = {str(files.folder / name): digest_file(files.folder / name) for name in names}
    outputs = tuple(f"{target}/{name}" for name in (*names, LOADING_FILE))
    copy_skeleton([_task(run, device, "copy_skeleton", skeleton, inputs, outputs)])

    own = {"lineage": _REFERENCE, "member": 0, "model": _MODEL, "source": files.reference, "folder": str(files.folder)}
    weights = find_weights(files.reference, files.folder)
    outputs = tuple(f"{checkpoint_folder(_REFERENCE, 0, 0)}/{path.name}" for path in weights)
    adopt_reference([_task(run, device, "adopt_reference", own, {}, (*outputs, spec_name(_REFERENCE, 0)))])

    if files.teacher is not None:
        steps = list(files.teacher.folders)
        teacher = {"lineage": _TEACHER, "role": _TEACHER, "condition": None, "trait": None, "teacher": None, "member": 0,
                   "model": _MODEL, "origin": _REFERENCE, "reference": files.reference, "source": files.teacher.name,
                   "is_shared": False, "steps": [0, *steps]}  # fmt: skip
        adopt_lineage([_task(run, device, "adopt_lineage", teacher, {}, (spec_name(_TEACHER, 0),))])
    return Pair(
        folder=run,
        reference=Lineage(run, _REFERENCE, 0),
        teacher=None if files.teacher is None else Lineage(run, _TEACHER, 0),
        chats=ChatTokenizer.load(run / target, files.reference),
        device=device,
    )


def _task(
    run: Path, device: str, function: str, arguments: Mapping[str, Any], inputs: Mapping[str, str], outputs: tuple[str, ...]
) -> Task:
    return Task(Stage(function, f"{_MODULE}:{function}", arguments, inputs, outputs), run, device, lambda _: None)


def _refuse_not_finite(name: str, folder: Path) -> None:
    broken = [tensor for tensor in tensor_types(folder) if not load_tensor(folder, tensor).isfinite().all()]
    if broken:
        raise RecipeError(
            f"`{name}`: {len(broken)} of its tensors hold NaN or infinity, e.g. {broken[0]}: its training diverged, or the "
            "file is damaged; give an earlier checkpoint"
        )
