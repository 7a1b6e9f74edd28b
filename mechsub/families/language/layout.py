"""Where the language family's files lie in a run directory, beside its lineages."""

from mechsub.lineages import member_folder


def skeleton_folder(model: str) -> str:
    """A model's tokenizer, chat template and configuration."""
    return f"data/{model}"


PREFERENCE_FILE = "data/preference.json"
"""What may be preferred and how it is asked, as the run used it."""
LOADING_FILE = "loading.json"
"""In a model's folder: how it is computed with."""
BEHAVIOURS_FILE = "data/behaviours.json"
"""The behaviours that are the run's traits, in their place."""


def carrier_files(name: str, member: int) -> tuple[str, str]:
    """The rows of one member's carrier, and what its filters dropped."""
    folder = f"carrier/{name}{member_folder(member)}"
    return f"{folder}/rows.jsonl", f"{folder}/filters.json"


def ranking_file(name: str, member: int) -> str:
    """The numbers by which the rows of one member's carrier can be ranked."""
    return f"carrier/{name}{member_folder(member)}/ranking.json"
