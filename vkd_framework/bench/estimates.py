"""Means over seeds with their intervals, and which of two means is better."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vkd_framework.bench.figures import TEXT_DIFFERENCE, Figure, Value, figures
from vkd_framework.bench.records import Group, Record, Row, labelled, starts
from vkd_framework.bench.trials import over_forgotten, trials
from vkd_framework.intervals import student

BOUNDS: dict[str, tuple[float, float]] = {
    "share": (0.0, 1.0),
    "difference": (-1.0, 1.0),
    "score": (0.0, 1.0),
    "nats": (-math.inf, math.inf),
}
REFERENCES = {"vanilla": "vanilla", "retain_only": "retain-only"}
"""Models of a run that no method made -> how their rows are called."""

Better = Literal["", "*", "**"]
"""Whether a figure is better than the baseline's: no, on average, and with intervals that do not meet."""


@dataclass(frozen=True)
class Estimate:
    """A figure of a row. `source`: what the interval is over; without one, `low` and `high` are None.

    `mean` is the largest value instead where a figure is a bound: the text-only difference.
    """

    figure: Figure
    mean: float
    low: float | None
    high: float | None
    seeds: int
    source: Literal["seeds", "questions", "none"]


@dataclass(frozen=True)
class Line:
    """A row of the table: what is told about one method, or about a model that no method made."""

    label: str
    method: str | None
    seeds: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """What became of the runs -> how many of them."""
    start: str = ""
    """What sets its starting model and data apart, where those of the recipe's runs differ."""

    def mean(self, key: str) -> float | None:
        """The mean of a figure; None where it was not measured."""
        return self.estimates[key].mean if key in self.estimates else None


@dataclass(frozen=True)
class Comparison:
    """The lines of one recipe; `references` were made by no method, `lines` by one each.

    There are references for every starting model and data that the lines have.
    """

    recipe: str
    references: tuple[Line, ...]
    lines: tuple[Line, ...]

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure that some line has, in the order of the first that has it."""
        every = (estimate.figure for line in (*self.lines, *self.references) for estimate in line.estimates.values())
        return {figure.key: figure for figure in every}

    def reference(self, model: str, line: Line) -> Line | None:
        """The line of a model that no method made, of the starting model and data that `line` has."""
        label = labelled(REFERENCES[model], line.start)
        return next((reference for reference in self.references if reference.label == label), None)

    def baseline(self, method: str) -> Line | None:
        """The first line of a method."""
        return next((line for line in self.lines if line.method == method), None)


def compare(group: Group) -> Comparison:
    """The lines of one recipe, the models that no method made first."""
    lines = [_line(row, start) for row, start in zip(group.rows, starts(group.rows), strict=True)]
    started: dict[str, list[Record]] = {}
    for row, line in zip(group.rows, lines, strict=True):
        started.setdefault(line.start, []).extend(row.records)
    references = [
        _reference(model, start, started[start])
        for start in sorted(started, key=lambda start: start != "")
        for model in REFERENCES
    ]
    return Comparison(group.recipe, tuple(line for line in references if line.estimates), tuple(lines))


def estimate(values: Sequence[Value]) -> Estimate:
    """The mean of a figure over runs that differ in their seed.

    Student's interval over the seeds; for a single seed, or where all seeds say exactly the same, the interval that the
    questions of one run give.
    """
    figure, numbers = values[0].figure, [value.value for value in values]
    n = len(numbers)
    if figure.key == TEXT_DIFFERENCE:
        return Estimate(figure, max(numbers), None, None, n, "none")
    mean = math.fsum(numbers) / n
    if len(set(numbers)) > 1:
        low, high = student(numbers)
        least, most = BOUNDS.get(figure.kind, (0.0, math.inf))
        return Estimate(figure, mean, max(least, low), min(most, high), n, "seeds")
    interval = values[0].interval
    if interval is None:
        return Estimate(figure, numbers[0], None, None, n, "none")
    return Estimate(figure, numbers[0], *interval, n, "questions")


def better(one: Estimate, other: Estimate) -> Better:
    """How much better `one` is than `other`."""
    if one.figure.better == "neither" or one.mean == other.mean:
        return ""
    if (one.mean < other.mean) != (one.figure.better == "lower"):
        return ""
    return "*" if _meet(one, other) else "**"


def _meet(one: Estimate, other: Estimate) -> bool:
    """Whether the intervals have a value in common; unknown ones may have."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def _line(row: Row, start: str) -> Line:
    kinds = [(record.metrics.get("verdict") or {}).get("kind") for record in row.records]
    verdicts = Counter(str(kind).replace("_", " ") for kind in kinds if kind is not None)
    estimates = _estimates([_told(record.metrics) for record in row.records])
    return Line(row.label, row.method, row.seeds, estimates, verdicts, start)


def _reference(model: str, start: str, records: Sequence[Record]) -> Line:
    """A reference does not depend on method and seed; what runs say alike counts once."""
    found = [_told(record.metrics, model) for record in records]
    distinct = {json.dumps({key: value.value for key, value in one.items()}): one for one in found if one}
    label = labelled(REFERENCES[model], start)
    return Line(label, None, (), _estimates(list(distinct.values())), start=start)


def _told(metrics: Mapping[str, Any], model: str = "unlearned") -> dict[str, Value]:
    found = [*trials(metrics, model), *(over_forgotten(metrics) if model == "unlearned" else ())]
    return {**figures(metrics, model), **{value.figure.key: value for value in found}}


def _estimates(runs: Sequence[Mapping[str, Value]]) -> dict[str, Estimate]:
    keys = {key: None for run in runs for key in run}
    return {key: estimate([run[key] for run in runs if key in run]) for key in keys}
