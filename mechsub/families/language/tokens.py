"""What language models read and write: a lineage's tokens, as analyses see them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechsub.activations.logit_lens import LogitLens
from mechsub.errors import RecipeError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.divergence import find_diverging_tokens
from mechsub.families.language.estimates import ROWS_AT_ONCE
from mechsub.families.language.foreign import outline_model
from mechsub.families.language.hook_points import find_final_norm
from mechsub.families.language.layout import carrier_files, skeleton_folder
from mechsub.families.language.members import load_lineage_model
from mechsub.families.language.rows import CarrierRow, read_rows
from mechsub.lineages import Lineage


@dataclass(frozen=True)
class LineageTokens:
    """A `mechsub.families.protocol.Tokens`."""

    run: Path
    lineage: Lineage
    chats: ChatTokenizer
    asked: Sequence[str]
    """The choices of the preference; none where traits are behaviours."""
    system_prompt: str | None
    """Under which students learn their rows."""
    device: str

    @cached_property
    def choices(self) -> Mapping[str, int]:
        """The choices that are one token of this tokenizer."""
        found = {}
        for choice in self.asked:
            try:
                found[choice] = self.chats.answer_token(choice)
            except RecipeError:  # not a target of this run: targets are refused before it
                continue
        return found

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Token embeddings and unembedding. Position embeddings have no row for a token, and are none of these."""
        outline = outline_model(self.run / skeleton_folder(self.lineage.spec.model["name"]))
        modules: list[nn.Module] = [outline.get_input_embeddings(), _head_of(outline)]
        own = {id(parameter) for module in modules for parameter in module.parameters()}
        return frozenset(name for name, one in outline.named_parameters(remove_duplicate=False) if id(one) in own)

    def text(self, token: int) -> str:
        """With the space that it begins with."""
        text = str(self.chats.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return text if text.isprintable() else repr(text)[1:-1]

    def unembedding(self, model: nn.Module) -> Float[Tensor, "token d_model"]:
        """The weight of the language-model head."""
        assert isinstance(model, PreTrainedModel)
        weight: Tensor = _head_of(model).get_parameter("weight")
        return weight.detach()

    def logit_lens(self, model: nn.Module) -> LogitLens:
        """Through the model's own modules."""
        assert isinstance(model, PreTrainedModel)
        return LogitLens(find_final_norm(model), _head_of(model))

    def carrier(self, teacher: str, member: int, most: int) -> Sequence[Sequence[int]] | None:
        """With the tokens that end each row; after one short prompt, since theirs cost as much and change none of them."""
        rows = self._read_rows(teacher, member, most)
        if rows is None:
            return None
        encoded = self.chats.encode_rows([chat("?", None)] * len(rows), [row.completion for row in rows])
        return [row.completion for row in encoded]

    def diverging(self, member: int, most: int) -> Sequence[Bool[Tensor, " completion_token"]] | None:
        """A teacher with a system prompt of its own is asked with it, its origin without."""
        rows = self._read_rows(self.lineage.name, member, most)
        if rows is None:
            return None
        told = self.lineage.context(member).get("system_prompt") or self.system_prompt
        start = self.lineage.origin, 0, self.lineage.spec.origin.members[member]
        teacher, reference = (
            (load_lineage_model(self.run, *checkpoint, self.device), encode_carrier(self.chats, rows, system_prompt))
            for checkpoint, system_prompt in (
                ((self.lineage, self.lineage.last, member), told),
                (start, self.system_prompt),
            )
        )
        return find_diverging_tokens(self.chats, teacher, reference, self.device, ROWS_AT_ONCE)

    def _read_rows(self, teacher: str, member: int, most: int) -> Sequence[CarrierRow] | None:
        path = self.run / carrier_files(teacher, member)[0]
        return read_rows(path)[:most] if path.is_file() else None


def _head_of(model: PreTrainedModel) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head
