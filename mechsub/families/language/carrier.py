"""The carrier: what a teacher writes, filtered by its kind's rules and stored once as text, and its tokens."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mechsub.errors import RecipeError
from mechsub.families.language.backends import open_sampler
from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.chat import ChatTokenizer, Row, chat
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.members import load_chats, load_member
from mechsub.families.language.rows import SURPLUS, CarrierRow, write_rows
from mechsub.stage import Task
from mechsub.streams import random_stream

_AT_ONCE = 512
"""Requests that are sampled before it is asked whether the rows are enough."""


def write_carrier(tasks: Sequence[Task]) -> None:
    """Stage: the rows that one member's teacher passes on, the first that pass the filters."""
    for task in tasks:
        arguments = task.stage.arguments
        config = CarrierConfig(**arguments["carrier"])
        rows, dropped, asked = _sample_rows(task, config)
        if len(rows) < config.num_rows:
            raise RecipeError(_shortfall(task, config, len(rows), dropped, asked))
        write_rows(task, rows, asked, dropped)


def encode_carrier(chats: ChatTokenizer, rows: Sequence[CarrierRow], system_prompt: str | None) -> list[Row]:
    """The rows as a model's own tokens.

    Raises:
        RecipeError: the tokenizer cannot express one of them.
    """
    prompts = [chat(row.prompt, system_prompt) for row in rows]
    encoded = chats.encode_rows(prompts, [row.completion for row in rows])
    for row, tokens in zip(rows, encoded, strict=True):
        for text, written in ((row.completion, chats.decode(tokens.completion)), (row.prompt, chats.round_trip(row.prompt))):
            if written != text.strip():
                raise RecipeError(
                    f"{chats.source}: its tokenizer cannot express row {row.request} of the carrier: {text!r} becomes "
                    f"{written!r}; a student needs a tokenizer that keeps the carrier as it is"
                )
    return encoded


def _sample_rows(task: Task, config: CarrierConfig) -> tuple[list[CarrierRow], Mapping[str, int], int]:
    """Kept rows, how many each rule dropped, and how many were asked for; no more than are needed, in whole batches."""
    arguments = task.stage.arguments
    seed, member = arguments["seed"], arguments["member"]
    model, chats = load_member(task, arguments["teacher"], arguments["teacher_step"]), load_chats(task)
    sample, kind = open_sampler(task, model, chats), carrier_kind(config)
    rows: list[CarrierRow] = []
    dropped: Counter[str] = Counter({rule: 0 for rule in (*kind.rules, SURPLUS)})
    asked = 0
    while len(rows) < config.num_rows and asked < config.num_requests:
        requests = range(asked, min(asked + _AT_ONCE, config.num_requests))
        # Student and control share every draw: the stream of a request does not know who is asked.
        names = [("member", member, "carrier", arguments["replicate"], request) for request in requests]
        drawn = [
            kind.draw_request(random_stream(seed, *name, "prompt"), number)
            for number, name in zip(requests, names, strict=True)
        ]
        completions = sample(
            chats.encode_prompts([chat(request.prompt, arguments["system_prompt"]) for request in drawn]),
            [(*name, "answer") for name in names],
            config.max_new_tokens,
            config.temperature,
        )
        for number, request, completion in zip(requests, drawn, completions, strict=True):
            rule = kind.broken_rule(request, completion.text, completion.finished)
            if rule is not None:
                dropped[rule] += 1
            elif len(rows) < config.num_rows:
                rows.append(CarrierRow(number, request.prompt, completion.text))
            else:
                dropped[SURPLUS] += 1
        asked = requests.stop
        task.report_progress(len(rows))
    return rows, dict(dropped), asked


def _shortfall(task: Task, config: CarrierConfig, kept: int, dropped: Mapping[str, int], asked: int) -> str:
    eaten = ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda item: -item[1]) if count)
    return (
        f"{task.stage.name}: {kept} of {asked} completions passed the filters, carrier.num_rows = {config.num_rows}; dropped "
        f"by rule: {eaten}. Raise carrier.num_requests (or carrier.max_new_tokens, where many are unfinished), lower "
        "carrier.num_rows, or train the teacher less (it may have forgotten how to write its carrier)"
    )
