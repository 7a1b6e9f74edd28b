"""Rows of one quantity side by side: every run's conditions and traits, each held against one other row."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mechsub.comparison.differences import PAIRED, WELCH, Difference, judge_differences
from mechsub.comparison.notes import Note, list_some, merge_notes, notes_on_run, notes_on_traits
from mechsub.comparison.quantities import QUANTITIES, Case, Measured, Quantity, mean_over_traits, measure, subtract_null
from mechsub.comparison.runs import ComparedRun, pair_members
from mechsub.findings import ALL_TRAITS, Finding
from mechsub.results import Result
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.rules import Rules
from mechsub.statistics.verdicts import WITHOUT_TRAIT, Judgement

POOLED = ALL_TRAITS
"""Here over the traits that all runs of a panel teach."""


@dataclass(frozen=True)
class Row:
    """One condition and trait of one run."""

    run: ComparedRun
    condition: str
    trait: str
    place: str
    """Where it was measured, of what may differ between rows: the context, the hook point."""
    value: Measured
    over_null: Measured
    """The value less its own null: what is judged, and what differences are of."""
    null: tuple[float, float]
    """The lower and the upper bound of its null; NaN where there is none."""
    rules: Rules
    finding: Finding | None
    """The run's own, with the run's own verdict; none of a mean that the run's analysis did not take."""
    is_void: bool
    """Whether its teachers had no trait to pass on."""

    @property
    def interval(self) -> Interval:
        """The value's own, at its run's confidence."""
        return student_interval(self.value.values, self.rules.confidence)

    @property
    def has_value(self) -> bool:
        """Whether any member has one."""
        return bool(np.isfinite(self.over_null.values).any())

    @property
    def parts(self) -> dict[str, str]:
        """What it is."""
        return {"condition": self.condition, "trait": self.trait, "run": self.run.name}

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        return f"{self.condition} ({self.trait}) of {self.run.name}"


@dataclass(frozen=True)
class Held:
    """A row held against another one."""

    row: Row
    against: Row
    difference: Difference
    interval: Interval
    judgement: Judgement | None
    unjudged: str
    """Why there is no verdict; empty where there is one."""
    how: str
    """Paired or Welch, with n."""

    @property
    def is_of_run(self) -> bool:
        """Whether the two are the same condition in two runs; else they are two conditions."""
        return self.row.condition == self.against.condition


Found = tuple[ComparedRun, Result]
Baseline = tuple[ComparedRun, str]
"""The first run of a panel, and the condition of it that other conditions are held against."""


@dataclass(frozen=True)
class Panel:
    """All rows of one quantity in one unit."""

    quantity: Quantity
    unit: str
    formula: str
    source: str
    rows: Sequence[Row]
    held: Sequence[Held | None]
    """Of every row; None of the baseline, and where there is nothing to hold it against."""
    baseline: Baseline
    families: Sequence[int]
    """How many differences each of Holm's corrections runs over: means over traits, single traits; by the rules in force."""

    @property
    def labels(self) -> list[str]:
        """Condition, trait and run of every row; a trait or run that is the same in all is left out."""
        several = [part for part in ("trait", "run") if len({row.parts[part] for row in self.rows}) > 1]
        return [" · ".join(row.parts[part] for part in ("condition", *several)) for row in self.rows]


def build_panels(runs: Sequence[ComparedRun], baseline: str) -> tuple[list[Panel], list[str]]:
    """A panel of every quantity and unit that gives two rows or more, and what cannot be compared, in sentences.

    ``baseline``: the condition that other conditions are held against. A row of another run than the first is held against the
    first run's of the same condition and trait; every other row against the baseline of its own run, or, where its run has
    none, of the first.
    """
    panels: list[Panel] = []
    notes = [note for run in runs for note in notes_on_run(run)]
    for quantity in QUANTITIES:
        by_unit, missing = _find_results(runs, quantity)
        notes += missing
        for unit, found in by_unit.items():
            (first, result), *_ = found
            conditions = [str(name) for name in result.data.condition.values]
            base = baseline if baseline in conditions else conditions[0]
            rows = list(_build_rows(quantity, found, base))
            taught = {run.name: list_taught(result) for run, result in found}
            notes += notes_on_traits(quantity.name, taught, {row.trait for row in rows})
            if sum(row.has_value for row in rows) < 2:
                notes.append((quantity.name, f"fewer than two rows have a value in {unit}, so that nothing is side by side"))
                continue
            if base != baseline:
                notes.append((quantity.name, f"{first.name} has no {baseline} there; the baseline is its {base}"))
            panel = _hold(quantity, result, rows, (first, base))
            panels.append(panel)
            notes += _describe_missing(panel)
    return panels, merge_notes(notes)


def _find_results(runs: Sequence[ComparedRun], quantity: Quantity) -> tuple[dict[str, list[Found]], list[Note]]:
    """The results that hold a quantity, by its unit, and what is to be said of the others."""
    by_unit: dict[str, list[Found]] = {}
    notes: list[Note] = []
    for run in runs:
        result = run.results.get(quantity.analysis)
        if result is None or not quantity.is_of(result):
            continue
        if quantity.variable in result.data:
            by_unit.setdefault(_unit(quantity, result), []).append((run, result))
        else:
            again = f"`mechsub analyze {run.path} --only {quantity.analysis}` measures it again"
            notes.append((run.name, f"{quantity.analysis} holds no {quantity.variable}; {again}"))
    if len(by_unit) > 1:
        named = "; ".join(f"{', '.join(run.name for run, _ in found)} in {unit}" for unit, found in by_unit.items())
        notes.append((quantity.name, f"other units: {named}; each has rows of its own and no difference from the others"))
    return by_unit, notes


def _unit(quantity: Quantity, result: Result) -> str:
    return str(result.data[quantity.variable].attrs.get("units", "no unit"))


def list_taught(result: Result) -> list[str]:
    """The traits that have teachers."""
    return [str(trait) for trait in result.data.taught.values]


def _build_rows(quantity: Quantity, found: Sequence[Found], baseline: str) -> Iterator[Row]:
    """Rows of the shared traits, of all where none is shared; the mean over those that all share first."""
    kept = _shared_traits(found)
    by_all = [trait for trait in kept if all(trait in list_taught(result) for _, result in found)]
    conditions = dict.fromkeys(str(name) for _, result in found for name in result.data.condition.values)
    ordered = sorted(conditions, key=lambda name: name != baseline)  # a stable sort: the others stay as they are
    for trait in [*([POOLED] if len(by_all) > 1 else []), *kept]:
        for condition in ordered:
            for run, result in found:
                traits = by_all if trait == POOLED else [trait]
                if condition in result.data.condition.values and {*traits} <= {*list_taught(result)}:
                    yield _build_row(quantity, run, result, condition, traits, trait)


def _shared_traits(found: Sequence[Found]) -> list[str]:
    every = [trait for _, result in found for trait in list_taught(result)]
    wanted = 2 if len(found) > 1 else 1
    return [trait for trait in dict.fromkeys(every) if every.count(trait) >= wanted] or list(dict.fromkeys(every))


def _build_row(quantity: Quantity, run: ComparedRun, result: Result, condition: str, traits: Sequence[str], trait: str) -> Row:
    cases: list[Case] = [(condition, one) for one in traits]
    places = [quantity.locate(quantity, result, case) for case in cases]
    value = mean_over_traits([measure(result.data, quantity.variable, place) for place in places])
    rules = run.rules(quantity.margin)
    if quantity.null:
        null = mean_over_traits([measure(result.data, quantity.null, place) for place in places])
        over_null, against = subtract_null(value, null), student_interval(null.values, rules.confidence)
        bounds = against.low, against.high
    else:
        over_null, bounds = value, (0.0, 0.0)
        if quantity.swaps:
            swapped = flip_signs(value.values, rules.confidence)
            bounds = swapped.null_low, swapped.null_high
    own = [quantity.find(result, case) for case in cases]
    whole = {*traits} == {*list_taught(result)}
    return Row(
        run=run,
        condition=condition,
        trait=trait,
        place=", ".join(dict.fromkeys(place.words for place in places)),
        value=value,
        over_null=over_null,
        null=bounds if np.isfinite(value.values).any() else (np.nan, np.nan),
        rules=rules,
        finding=own[0] if trait != POOLED else quantity.find(result, (condition, POOLED)) if whole else None,
        is_void=any(finding is not None and finding.verdict == WITHOUT_TRAIT for finding in own),
    )


def _hold(quantity: Quantity, result: Result, rows: Sequence[Row], baseline: Baseline) -> Panel:
    """Every row held against its counterpart, and judged: means over traits by themselves, single traits by themselves."""
    held = [_hold_row(row, _find_counterpart(row, rows, baseline)) for row in rows]
    families: dict[tuple[bool, Rules], dict[int, Held]] = {}
    for place, one in enumerate(held):
        if one is not None and not one.unjudged:
            families.setdefault((one.row.trait != POOLED, one.against.rules), {})[place] = one
    for (_, rules), judged in families.items():
        for place, judgement in judge_differences({key: one.difference for key, one in judged.items()}, rules).items():
            held[place] = replace(judged[place], judgement=judgement)
    attributes = result.data[quantity.variable].attrs
    formula, source = (str(attributes.get(name, "")) for name in ("formula", "source"))
    counts = [len(judged) for judged in families.values()]
    return Panel(quantity, _unit(quantity, result), formula, source, rows, held, baseline, counts)


def _find_counterpart(row: Row, rows: Sequence[Row], baseline: Baseline) -> Row | None:
    """The first run's row of the same condition, else the baseline of its own run, else of the first; of the same trait."""
    first, condition = baseline
    known = {(one.run.name, one.condition): one for one in rows if one.trait == row.trait}
    if row.run is not first and (first.name, row.condition) in known:
        return known[first.name, row.condition]
    found = known.get((row.run.name, condition), known.get((first.name, condition)))
    return None if found is row else found


def _hold_row(row: Row, against: Row | None) -> Held | None:
    if against is None:
        return None
    values, others = row.over_null.values, against.over_null.values
    if row.run is against.run:
        difference = Difference(values, others, PAIRED)
    elif pairs := pair_members(row.run, against.run):
        own, other = zip(*pairs, strict=True)
        difference = Difference(values[list(own)], others[list(other)], PAIRED)
    else:
        difference = Difference(values, others, WELCH)
    how = f"paired, n = {difference.n}" if difference.method == PAIRED else "Welch, n = {} and {}".format(*difference.sizes)
    interval = difference.interval(against.rules.confidence)
    return Held(row, against, difference, interval, None, _why_unjudged(row, against, difference), how)


def _why_unjudged(row: Row, against: Row, difference: Difference) -> str:
    """Why a difference has no verdict; empty where it can have one."""
    if difference.n == 0:
        return f"{(against if row.has_value else row).words}: no member has a value"
    own, other = asdict(row.rules), asdict(against.rules)
    differing = [f"{name.replace('_', ' ')} {own[name]:g} and {other[name]:g}" for name in own if own[name] != other[name]]
    if differing:
        return f"{row.run.name} and {against.run.name} have other rules: {', '.join(differing)}"
    if row.place != against.place:
        return f"it was measured at {row.place}, what it is held against at {against.place}"
    void = next((one for one in (row, against) if one.is_void), None)
    return f"teachers of {void.run.name} have no trait to pass on" if void else ""


def _describe_missing(panel: Panel) -> list[Note]:
    """Rows without a value, differences without a verdict, and those in which both the run and the condition differ."""
    said: dict[str, list[str]] = {}
    for label, row, one in zip(panel.labels, panel.rows, panel.held, strict=True):
        if not row.has_value:
            reasons = ", ".join(dict.fromkeys(filter(None, row.over_null.why)))
            said.setdefault(f"no value ({reasons}) of {{}}", []).append(label)
        elif one is not None and one.unjudged:
            said.setdefault(f"a difference without a verdict of {{}}: {one.unjudged}", []).append(label)
        if one is not None and one.row.run is not one.against.run and not one.is_of_run:
            words = f"{{}} held against {one.against.words}, so that both the run and the condition differ"
            said.setdefault(words, []).append(label)
    return [(panel.quantity.name, text.format(list_some(labels))) for text, labels in said.items()]
