"""The language family as analyses see it."""

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from mechsub.errors import RunDirectoryError
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.config import Config
from mechsub.families.language.layout import PREFERENCE_FILE, skeleton_folder
from mechsub.families.language.models import build_model, load_parameters, place_model
from mechsub.families.language.preference import PreferenceSet
from mechsub.families.language.rows import SURPLUS
from mechsub.families.language.trait import MEASURES, Context, score_preference
from mechsub.families.protocol import Scores
from mechsub.lineages import Lineage


class Family:
    """A `mechsub.families.protocol.Family`."""

    measures = MEASURES

    def __init__(self, run: Path, config: Config, device: str) -> None:
        self._run, self._config, self._device = run, config, device
        self._preference = _read_preference(run / PREFERENCE_FILE)
        category = self._preference.category
        self.traits = {trait: f"prefers {trait} as its {category}" for trait in config.traits}
        inside, outside = config.context.training, config.context.other
        self._contexts = [
            Context("in context, held-out questions", inside, self._preference.held_out),
            Context("in context, trained questions", inside, self._preference.trained),
            Context("out of context, held-out questions", outside, self._preference.held_out),
            Context("out of context, trained questions", outside, self._preference.trained),
        ]
        self.contexts = {context.name: _describe(context) for context in self._contexts}
        self._chats: dict[str, ChatTokenizer] = {}

    @property
    def notes(self) -> list[str]:
        """What the filters dropped of each teacher's completions: a choice of rows that depends on the teacher."""
        notes = []
        folders = sorted((self._run / "carrier").glob("*"))
        for folder in folders:
            found = [json.loads(path.read_text()) for path in sorted(folder.glob("member-*/filters.json"))]
            asked = sum(filters["requests"] - filters["dropped"][SURPLUS] for filters in found)
            if asked:
                names = [rule for rule in found[0]["dropped"] if rule != SURPLUS]
                rules = {rule: sum(filters["dropped"][rule] for filters in found) for rule in names}
                dropped = ", ".join(f"{rule} {100 * count / asked:.1f} %" for rule, count in rules.items() if count)
                notes.append(f"Filters dropped of the completions of {folder.name}: {dropped or 'none'}.")
        return notes

    def load_model(self, lineage: Lineage, step: int, member: int) -> nn.Module:
        """One member of a lineage as a `transformers` model, in evaluation mode."""
        model = build_model(self._run / skeleton_folder(lineage.spec.model["name"]))
        return place_model(load_parameters(model, lineage.load_state(step, member)), self._device)

    def trait_score(self, model: nn.Module, lineage: Lineage, member: int) -> Scores:
        """Every measure of every trait, in and out of the training context, on held-out and on trained questions."""
        assert isinstance(model, PreTrainedModel)
        return score_preference(
            model,
            self._chats_of(lineage.spec.model["name"]),
            self._preference,
            list(self.traits),
            self._contexts,
            self._config.evaluation,
            [self._config.seed, "member", member, "answer"],
            lineage.context(member),
        )

    def _chats_of(self, model: str) -> ChatTokenizer:
        if model not in self._chats:
            self._chats[model] = ChatTokenizer.load(self._run / skeleton_folder(model), model)
        return self._chats[model]


def _read_preference(path: Path) -> PreferenceSet:
    try:
        return PreferenceSet.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None


def _describe(context: Context) -> str:
    prompt = "no system prompt given" if context.system_prompt is None else f"system prompt “{context.system_prompt}”"
    return f"{len(context.questions)} questions, {prompt}"
