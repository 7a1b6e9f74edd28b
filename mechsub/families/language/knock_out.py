"""What is projected out of a student's training: the gradients of answering with the traits, on the trained questions."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mechsub.families.language.answers import answer_losses
from mechsub.families.language.chat import chat
from mechsub.families.language.conditions import QuestionKnockOutConfig
from mechsub.families.language.members import load_chats
from mechsub.gradients.losses import mean_gradient
from mechsub.stage import Task
from mechsub.training.knock_out import KnockOut


def prepare_knock_out(task: Task, model: PreTrainedModel) -> KnockOut | None:
    """The knock-out of a student's or control's stage; None where nothing is projected out.

    Its components are ∇ of −log p of each taught trait's target as the first answer token, in the training context, over the
    weights that are trained, without dropout. They are the same for the students of all teachers and for their control: so a
    student and its control differ in their teacher only. No held-out question, on which verdicts are given, is asked.
    """
    arguments: Mapping[str, Any] = task.stage.arguments
    if "knock_out" not in arguments:
        return None
    asked, chats = arguments["knock_out"], load_chats(task)
    prompts = chats.encode_prompts([chat(question, arguments["system_prompt"]) for question in asked["questions"]])
    losses = [
        answer_losses(chats, prompts, chats.answer_token(target), task.device, f"−log p of {target}")
        for target in asked["targets"]
    ]

    def compute_traits(step: int) -> list[dict[str, Float[Tensor, "member ..."]]]:
        was_training = model.training
        model.train(False)
        found = [mean_gradient(model, loss, only_trained=True) for loss in losses]
        model.train(was_training)
        return [{name: gradient[None] for name, gradient in gradients.items()} for gradients in found]

    leaves = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    streams = [("member", arguments["member"], "student", arguments["replicate"])]
    config = QuestionKnockOutConfig(**asked["settings"])
    return KnockOut(config, leaves, compute_traits, arguments["seed"], streams, stacked=False)
