"""The loss that falls as a model comes to answer with a target."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.estimates import QUESTIONS_AT_ONCE
from mechsub.gradients.losses import ExampleLosses


def answer_losses(
    chats: ChatTokenizer, prompts: Sequence[Sequence[int]], target: int, device: str, description: str
) -> ExampleLosses:
    """−log p of the target as the first answer token, by question."""

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        batch = chats.pad_prompts([prompts[number] for number in examples]).to(device)
        logits: Tensor = model(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        return -logits.log_softmax(-1)[:, target]

    return ExampleLosses(len(prompts), compute, description, "nats", QUESTIONS_AT_ONCE)
