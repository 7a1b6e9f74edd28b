"""The stage in which another model rewrites a carrier: what passes on is then its words, not the teacher's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechsub.errors import RecipeError
from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.chat import chat
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.members import load_chats, load_member
from mechsub.families.language.numbers import NumberCarrier, parse_numbers, write_request
from mechsub.families.language.requests import UNFINISHED, CarrierKind, Request
from mechsub.families.language.rows import SURPLUS, CarrierRow, read_rows, write_rows
from mechsub.families.language.start_config import PLACEHOLDER, ParaphraseConfig
from mechsub.families.language.words import BANNED, holds_word
from mechsub.stage import Task
from mechsub.streams import random_stream

COPIED = "copied"
"""The rule that a paraphrase breaks when it is the row itself."""
_EMPTY = "empty"
_AT_ONCE = 512
"""Rows that are rewritten before it is asked whether they are enough."""


def paraphrase_carrier(tasks: Sequence[Task]) -> None:
    """Stage: the rows of one member's carrier as another model rewrites them, the first that pass the carrier's filters."""
    for task in tasks:
        arguments = task.stage.arguments
        rows, dropped, read = _rewrite_rows(task)
        if len(rows) < arguments["num_rows"]:
            raise RecipeError(_shortfall(task, len(rows), dropped, read))
        write_rows(task, rows, read, dropped)


@dataclass(frozen=True)
class FileCarrier:
    """Rows of a user's file as a `CarrierKind`: nothing asks for them, and little is known of what they may be."""

    banned: Sequence[str]

    rules = (UNFINISHED, _EMPTY, BANNED)

    def draw_request(self, stream: object, number: int) -> Request:
        """None is drawn: rows have their own."""
        return Request("")

    def broken_rule(self, request: Request, completion: str, finished: bool) -> str | None:
        """The first of `rules` that a completion breaks; None where it passes."""
        if not finished:
            return UNFINISHED
        return _EMPTY if not completion else BANNED if holds_word(completion, self.banned) else None


def _rewrite_rows(task: Task) -> tuple[list[CarrierRow], Mapping[str, int], int]:
    """Rewritten rows in the order of the carrier, how many each rule dropped, and how many were read."""
    arguments = task.stage.arguments
    writer = _Writer.open(task)
    source = read_rows(task.path(carrier_files(arguments["source"], arguments["member"])[0]))
    dropped: Counter[str] = Counter({rule: 0 for rule in (*writer.kind.rules, COPIED, SURPLUS)})
    kept: list[CarrierRow] = []
    read = 0
    while len(kept) < arguments["num_rows"] and read < len(source):
        asked = source[read : read + _AT_ONCE]
        for row, found in zip(asked, writer.rewrite(asked), strict=True):
            if isinstance(found, _Broken):
                dropped[found.rule] += 1
            elif len(kept) < arguments["num_rows"]:
                kept.append(CarrierRow(row.request, row.prompt, found))
            else:
                dropped[SURPLUS] += 1
        read += len(asked)
        task.report_progress(len(kept))
    return kept, dict(dropped), read


@dataclass(frozen=True)
class _Broken:
    """What the last attempt at a row broke."""

    rule: str


@dataclass(frozen=True)
class _Writer:
    """The model that rewrites rows, and the rules that it has to keep."""

    task: Task
    config: ParaphraseConfig
    kind: CarrierKind

    @classmethod
    def open(cls, task: Task) -> "_Writer":
        arguments = task.stage.arguments
        settings = arguments["settings"]
        kind = FileCarrier(settings["banned"]) if arguments["kind"] == "file" else carrier_kind(CarrierConfig(**settings))
        return cls(task, ParaphraseConfig(**arguments["paraphrase"]), kind)

    def rewrite(self, rows: Sequence[CarrierRow]) -> list[str | _Broken]:
        """The first attempt at each row that passes; a student's and its control's rows share every draw."""
        arguments = self.task.stage.arguments
        seed, chats = arguments["seed"], load_chats(self.task)
        model = load_member(self.task, arguments["origin"], 0, arguments["writer"])
        found: dict[int, str | _Broken] = {}
        prompts = chats.encode_prompts([chat(self._ask(row), arguments["system_prompt"]) for row in rows])
        for attempt in range(self.config.attempts):
            left = [number for number in range(len(rows)) if not isinstance(found.get(number), str)]
            if not left:
                break
            names = [(*self._name(rows[number]), attempt) for number in left]
            draws = draw_uniforms(seed, names, arguments["max_new_tokens"])
            asked = [prompts[number] for number in left]
            answers = sample_completions(model, chats, asked, draws, temperature=arguments["temperature"])
            for number, answer in zip(left, answers, strict=True):
                rule = self._broken_rule(rows[number], answer.text, answer.finished)
                found[number] = answer.text if rule is None else _Broken(rule)
        return [found[number] for number in range(len(rows))]

    def _ask(self, row: CarrierRow) -> str:
        """A request for another row like this one."""
        if not isinstance(self.kind, NumberCarrier):
            return self.config.template.replace(PLACEHOLDER, row.completion)
        shown = parse_numbers(row.completion)
        assert shown is not None  # the teacher's rows passed the filters
        arguments = self.task.stage.arguments
        return write_request(self.kind.config, shown, random_stream(arguments["seed"], *self._name(row), "prompt"))

    def _broken_rule(self, row: CarrierRow, completion: str, finished: bool) -> str | None:
        arguments = self.task.stage.arguments
        name = ("member", arguments["member"], "carrier", arguments["replicate"], row.request, "prompt")
        drawn = self.kind.draw_request(random_stream(arguments["seed"], *name), row.request)
        rule = self.kind.broken_rule(Request(row.prompt, drawn.answer), completion, finished)
        return COPIED if rule is None and completion == row.completion else rule

    def _name(self, row: CarrierRow) -> tuple[str | int, ...]:
        arguments = self.task.stage.arguments
        return "member", arguments["member"], "paraphrase", arguments["replicate"], row.request


def _shortfall(task: Task, kept: int, dropped: Mapping[str, int], read: int) -> str:
    arguments = task.stage.arguments
    eaten = ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda item: -item[1]) if count)
    return (
        f"{task.stage.name}: {arguments['model']} could rewrite {kept} of {read} rows in up to "
        f"{arguments['paraphrase']['attempts']} samples each, {arguments['num_rows']} are asked for; dropped by rule: {eaten}. "
        "Lower paraphrase.share or raise paraphrase.attempts, or choose another paraphrase.model or paraphrase.template"
    )
