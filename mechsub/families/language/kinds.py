"""The kind of carrier that a teacher is asked to write, by its settings."""

from pathlib import Path

from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.numbers import NumberCarrier
from mechsub.families.language.own_rows import read_requests
from mechsub.families.language.python_code import CodeCarrier
from mechsub.families.language.reasoning import ChainOfThoughtCarrier
from mechsub.families.language.requests import CarrierKind


def carrier_kind(config: CarrierConfig) -> CarrierKind:
    """The kind that these settings name, with the user's requests where there are any.

    Raises:
        RecipeError: the user's file of requests is not one.
    """
    if config.kind == "numbers":
        return NumberCarrier(config.numbers)
    is_code, banned = config.kind == "code", config.banned or ()
    requests = read_requests(Path(config.prompts), needs_answer=not is_code) if config.prompts else ()
    if is_code:
        return CodeCarrier(config.code, banned, requests)
    return ChainOfThoughtCarrier(config.chain_of_thought, banned, requests)
