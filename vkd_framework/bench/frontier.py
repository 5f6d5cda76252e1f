"""Where the frontier's points and their labels go: estimates in, SVG coordinates out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vkd_framework.bench.estimates import Comparison, Estimate, Line
from vkd_framework.bench.layout import written
from vkd_framework.bench.verdict import FORGET, RECOVERY, RETAIN, WITHOUT_REFERENCE, has_reference
from vkd_framework.report.charts import Axis, Tick, nice_ticks

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 368, 12, 252
LETTER, ROW = 6.8, 13.0
"""Width of a letter and height of a line of a label, in SVG units, a little more than they take."""
NEAR = 12.0
"""How far a label stands above or below its point before a line has to lead to it."""
OFFSETS = [sign * (9.0 + ROW * step / 2) for step in range(40) for sign in (-1, 1)]
"""Where a label may stand, best first: never on a level with its point, where the interval is."""

NEVER, VANILLA = "never knew", "vanilla"
"""How the levels of the models that no method made are called."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Spot:
    """A method's point with its intervals (equal ends where unknown) and the place of its label."""

    label: str
    style: str
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    label_x: float
    label_y: float
    anchor: str
    led: bool


@dataclass(frozen=True)
class Level:
    """Where a model that no method made lies on one axis: a dashed line with its name."""

    label: str
    at: float


@dataclass(frozen=True)
class Plot:
    """One picture in a box of `WIDTH` by `HEIGHT`."""

    title: str
    description: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    spots: tuple[Spot, ...]
    x_level: Level | None
    y_level: Level | None


def plots(comparison: Comparison, method: str) -> list[Plot]:
    """Retain VQA over Test VQA, and over what the attack brings back; empty where these were not measured."""
    recovery = (
        (RECOVERY, "Advantage over retain-only, points (less is better)")
        if has_reference(comparison)
        else (WITHOUT_REFERENCE, "Gap to vanilla, points (more is better)")
    )
    found = [
        _plot(comparison, method, FORGET, "Forgetting and keeping", "Test VQA, exact match (less is better)"),
        _plot(comparison, method, recovery[0], "Standing up to the attack and keeping", recovery[1]),
    ]
    return [plot for plot in found if plot is not None]


def _plot(comparison: Comparison, method: str, key: str, title: str, x_label: str) -> Plot | None:
    lines = [line for line in comparison.lines if key in line.estimates and RETAIN in line.estimates]
    if not lines:
        return None
    vanilla, never = _level(comparison, lines, "vanilla", RETAIN), _level(comparison, lines, "retain_only", key)
    if key == RECOVERY:
        never = 0.0
    x = _axis([line.estimates[key] for line in lines], never, LEFT, RIGHT)
    y = _axis([line.estimates[RETAIN] for line in lines], vanilla, BOTTOM, TOP)
    x_figure, y_figure = lines[0].estimates[key].figure, lines[0].estimates[RETAIN].figure
    words = (
        f"{line.label}: {written(x_figure, line.estimates[key].mean)}, "
        f"Retain VQA {written(y_figure, line.estimates[RETAIN].mean)}."
        for line in lines
    )
    return Plot(
        title,
        f"Retain VQA over {x_label}. {' '.join(words)}",
        x_label,
        tuple(Tick(x.place(value), f"{100 * value:g}") for value in nice_ticks(x.low, x.high)),
        tuple(Tick(y.place(value), f"{100 * value:g} %") for value in nice_ticks(y.low, y.high)),
        tuple(_spots(lines, key, x, y, method, (never, vanilla))),
        None if never is None else Level(NEVER, x.place(never)),
        None if vanilla is None else Level(VANILLA, y.place(vanilla)),
    )


def _level(comparison: Comparison, lines: Sequence[Line], model: str, key: str) -> float | None:
    """What a model that no method made gives; None where the lines have several that differ."""
    found = {reference.mean(key) for line in lines if (reference := comparison.reference(model, line))}
    return found.pop() if len(found) == 1 else None


def _axis(estimates: Sequence[Estimate], level: float | None, start: float, end: float) -> Axis:
    """From the lowest to the highest end of an interval, the level included, with some air."""
    values = [end for estimate in estimates for end in _ends(estimate)]
    values += [] if level is None else [level]
    low, high = min(values), max(values)
    air = 0.08 * max(high - low, 0.05)
    return Axis(low - air, high + air, start, end)


def _ends(estimate: Estimate) -> tuple[float, float]:
    if estimate.low is None or estimate.high is None:
        return estimate.mean, estimate.mean
    return estimate.low, estimate.high


def _spots(
    lines: Sequence[Line], key: str, x: Axis, y: Axis, method: str, levels: tuple[float | None, float | None]
) -> list[Spot]:
    """Labels beside their points, moved up or down until none covers another label or a point."""
    places = [(x.place(line.estimates[key].mean), y.place(line.estimates[RETAIN].mean)) for line in lines]
    taken = [*_names_of_levels(x, y, levels), *((px - 4, py - 4, px + 4, py + 4) for px, py in places)]
    spots = []
    for line, (px, py) in sorted(zip(lines, places, strict=True), key=lambda item: item[1][1]):
        width = LETTER * len(line.label)
        starts = [start for start in (px + 8, px - 8 - width) if start >= LEFT and start + width <= RIGHT] or [LEFT]
        boxes = [
            (left, py + offset - ROW / 2, left + width, py + offset + ROW / 2) for offset in OFFSETS for left in starts
        ]
        box = next((box for box in boxes if _free(box, taken)), boxes[0])
        taken.append(box)
        middle = box[1] + ROW / 2
        on_the_right = box[0] > px
        spots.append(
            Spot(
                line.label,
                "own" if line.method == method else "method",
                px,
                py,
                _placed(x, line.estimates[key]),
                _placed(y, line.estimates[RETAIN]),
                round(box[0] if on_the_right else box[2], 2),
                round(middle + 4, 2),
                "start" if on_the_right else "end",
                abs(middle - py) > NEAR,
            )
        )
    return spots


def _names_of_levels(x: Axis, y: Axis, levels: tuple[float | None, float | None]) -> list[Box]:
    never, vanilla = levels
    boxes: list[Box] = []
    if never is not None:
        boxes.append((x.place(never), BOTTOM - ROW - 4, x.place(never) + 4 + LETTER * len(NEVER), BOTTOM))
    if vanilla is not None:
        boxes.append((RIGHT - LETTER * len(VANILLA), y.place(vanilla) - ROW - 4, RIGHT, y.place(vanilla)))
    return boxes


def _placed(axis: Axis, estimate: Estimate) -> tuple[float, float]:
    low, high = _ends(estimate)
    return axis.place(low), axis.place(high)


def _free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    if top < 0 or bottom > BOTTOM:
        return False
    return not any(left < x1 and x0 < right and top < y1 and y0 < bottom for x0, y0, x1, y1 in taken)
