"""What could not be compared, and why, in sentences; what is true of several quantities is said once."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from mechsub.comparison.runs import ComparedRun

_MOST_NAMED = 4

Note = tuple[str, str]
"""What it is about, a run or a quantity, and what is to be said of it."""


def merge_notes(notes: Sequence[Note]) -> list[str]:
    """One sentence for each thing that is said, with all that it is said of."""
    about: dict[str, list[str]] = {}
    for subject, text in notes:
        subjects = about.setdefault(text, [])
        if subject not in subjects:
            subjects.append(subject)
    return [f"{', '.join(subjects)}: {text}" for text, subjects in about.items()]


def list_some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return ", ".join([*names[:_MOST_NAMED], *more])


def notes_on_run(run: ComparedRun) -> Iterator[Note]:
    """What a run was not measured on, and what measures it."""
    for why in dict.fromkeys(run.lacks.values()):
        analyses = [analysis for analysis, reason in run.lacks.items() if reason == why]
        named = " ".join(f"--only {analysis}" for analysis in analyses)
        remedy = f"`mechsub analyze {run.path} {named}` measures what the run allows"
        yield run.name, f"{', '.join(analyses)} {why}; {remedy}"


def notes_on_traits(quantity: str, taught: Mapping[str, Sequence[str]], drawn: Collection[str]) -> Iterator[Note]:
    """Traits that not all runs teach; ``taught``: each run's, ``drawn``: those that have rows."""
    every = list(dict.fromkeys(trait for traits in taught.values() for trait in traits))
    holders = {trait: [run for run, traits in taught.items() if trait in traits] for trait in every}
    groups: dict[tuple[str, bool], list[str]] = {}
    for trait, runs in holders.items():
        if len(runs) < len(taught):
            groups.setdefault((", ".join(runs), trait in drawn), []).append(trait)
    for (listed, is_drawn), traits in groups.items():
        plural = "s" if len(traits) > 1 else ""
        rows = "drawn" if is_drawn else "left out"
        yield quantity, f"the trait{plural} {', '.join(traits)} taught in {listed} only; the rows are {rows}"
    if len(taught) > 1 and all(len(runs) < 2 for runs in holders.values()):
        yield quantity, "no two runs teach the same trait, so that there is no difference between runs"
