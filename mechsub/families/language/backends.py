"""What answers requests: `transformers` with our own draws, or vLLM. Both take the same requests, named by their streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from transformers import PreTrainedModel

from mechsub.checkpoints import weight_files
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.config import GenerationConfig
from mechsub.families.language.generation import Completion, draw_uniforms, sample_completions
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.vllm_backend import open_vllm
from mechsub.lineages import Lineage
from mechsub.stage import Task


@runtime_checkable
class Sampler(Protocol):
    """Answers requests of one model."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[str | int]], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """One completion for each prompt, drawn from the stream of its name."""


@dataclass(frozen=True)
class TransformersSampler:
    """A model in this process; a completion does not depend on its batch."""

    model: PreTrainedModel
    chats: ChatTokenizer
    seed: int

    def __call__(
        self, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[str | int]], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """One completion for each prompt, drawn from the stream of its name."""
        draws = draw_uniforms(self.seed, names, max_new_tokens)
        return sample_completions(self.model, self.chats, prompts, draws, temperature=temperature)


def open_sampler(task: Task, model: PreTrainedModel, chats: ChatTokenizer) -> Sampler:
    """What answers for the stage's teacher, as its ``generation`` settings say; ``model`` has the teacher's weights.

    Raises:
        GenerationError: vLLM does not answer a known prompt as ``model`` does.
    """
    arguments = task.stage.arguments
    settings, seed = GenerationConfig(**arguments["generation"]), arguments["seed"]
    if settings.backend == "transformers":
        return TransformersSampler(model, chats, seed)
    lineage, step = Lineage(task.run, arguments["teacher"], arguments["member"]), arguments["teacher_step"]
    is_adapter = lineage.spec.is_adapter and step > 0
    start = lineage.parts(0 if is_adapter else step, next(iter(lineage.spec.tensors)))[0]
    weights = weight_files(start.lineage.checkpoint(start.step))
    adapter = lineage.checkpoint(step) if is_adapter else None
    return open_vllm(task.path(skeleton_folder(arguments["model"])), weights, model, chats, settings, seed, adapter)
