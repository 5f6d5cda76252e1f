"""Where the report's lines go: numbers in, SVG coordinates out. The template draws them, so all text gets escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vkd_framework.report.attack import Attack, AttackLine
from vkd_framework.report.formatting import is_number, percent, significant

WIDTH, HEIGHT = 260, 180
LEFT, RIGHT, TOP, BOTTOM = 44, 250, 10, 144
POINTS_DRAWN = 160
TERMS_DRAWN = 12
STEPS_LISTED = 12

BOOKKEEPING = frozenset(
    {"step", "phase", "epoch", "lr", "learning_rate", "seconds", "time", "memory", "peak_memory_bytes"}
)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A polyline, with the places of its markers and the outline of its shaded band (either may be empty)."""

    style: str
    points: str
    markers: tuple[tuple[float, float], ...] = ()
    band: str = ""


@dataclass(frozen=True)
class Chart:
    """One small line chart in a box of `WIDTH` by `HEIGHT`."""

    title: str
    description: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    baseline: float | None = None
    dividers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Axis:
    """A linear map from `low..high` to `start..end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where `value` lies, in SVG units."""
        span = (self.high - self.low) or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 2)


def attack_chart(attack: Attack, vanilla: object) -> Chart:
    """Exact match on Test VQA over attack steps, a line per model; `vanilla` is the dashed line's height."""
    last = max((step for line in attack.lines for step in line.steps), default=0)
    x, y = Axis(0, max(1, last), LEFT, RIGHT), Axis(0, 1, BOTTOM, TOP)
    return Chart(
        attack.label,
        " ".join(_in_words(line) for line in attack.lines if line.steps),
        tuple(Tick(x.place(value), f"{value:g}") for value in nice_ticks(0, max(1, last), whole=True)),
        tuple(Tick(y.place(value), f"{100 * value:.0f} %") for value in (0, 0.25, 0.5, 0.75, 1)),
        tuple(_attack_line(line, x, y) for line in attack.lines if line.steps),
        y.place(vanilla) if is_number(vanilla) else None,
    )


def history_terms(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of `history` that hold a loss term: numbers, apart from counters and clocks."""
    keys = {key: None for row in history for key, value in row.items() if is_number(value)}
    return [key for key in keys if key not in BOOKKEEPING][:TERMS_DRAWN]


def history_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart per loss term over the training steps, each on its own scale."""
    rows = [row for row in history if is_number(row.get("step"))]
    return [_history_chart(term, rows) for term in history_terms(rows)]


def history_table(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Evenly spaced steps with their loss terms as text, the first and the last among them; a header row first."""
    rows = [row for row in history if is_number(row.get("step"))]
    terms = history_terms(rows)
    if not terms:
        return []
    stride = max(1, len(rows) - 1) / max(1, min(STEPS_LISTED, len(rows)) - 1)
    chosen = sorted({min(len(rows) - 1, round(index * stride)) for index in range(min(STEPS_LISTED, len(rows)))})
    body = [(f"{rows[i]['step']:g}", *(significant(rows[i].get(term)) for term in terms)) for i in chosen]
    return [("step", *terms), *body]


def nice_ticks(low: float, high: float, *, about: int = 4, whole: bool = False) -> list[float]:
    """Round numbers between `low` and `high`, about `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    if whole:
        step = max(1, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _attack_line(line: AttackLine, x: Axis, y: Axis) -> Line:
    middle = [(x.place(step), y.place(value)) for step, value in zip(line.steps, line.mean, strict=True)]
    upper = [(x.place(step), y.place(value)) for step, value in zip(line.steps, line.highest, strict=True)]
    lower = [(x.place(step), y.place(value)) for step, value in zip(line.steps, line.lowest, strict=True)]
    style = line.model if line.model in ("unlearned", "retain_only") else "other"
    return Line(style, _points(middle), tuple(middle), _points([*upper, *reversed(lower)]) if line.seeds > 1 else "")


def _in_words(line: AttackLine) -> str:
    first, last = (f"{percent(line.mean[end])} at step {line.steps[end]}" for end in (0, -1))
    return f"{line.label}: {first}, {last}."


def _history_chart(term: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    measured = [(float(row["step"]), float(row[term])) for row in rows if is_number(row.get(term))]
    thinned = _thin(measured)
    values = [value for _, value in thinned]
    low, high = min(0.0, *values), max(0.0, *values)
    x = Axis(measured[0][0], measured[-1][0], LEFT, RIGHT)
    y = Axis(low, high if high > low else low + 1, BOTTOM, TOP)
    return Chart(
        term,
        f"{significant(measured[0][1])} at step {measured[0][0]:g}, {significant(measured[-1][1])} at step "
        f"{measured[-1][0]:g}; lowest {significant(min(v for _, v in measured))}, "
        f"highest {significant(max(v for _, v in measured))}.",
        tuple(Tick(x.place(value), f"{value:g}") for value in nice_ticks(x.low, x.high, whole=True)),
        tuple(Tick(y.place(value), f"{value:g}") for value in nice_ticks(y.low, y.high, about=3)),
        (Line("term", _points([(x.place(step), y.place(value)) for step, value in thinned])),),
        dividers=tuple(x.place(step) for step in _phase_starts(rows) if x.low <= step <= x.high),
    )


def _thin(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(series) / POINTS_DRAWN)
    groups = [series[start : start + size] for start in range(0, len(series), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _phase_starts(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(now["step"]) for before, now in pairwise(rows) if now.get("phase") != before.get("phase")]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
