"""The comparison on a terminal: the columns that tell most, in at most 120 characters."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import count

from vkd_framework.bench.estimates import Comparison, Line
from vkd_framework.bench.figures import TEXT_DIFFERENCE
from vkd_framework.bench.layout import interval, mark_of, written
from vkd_framework.bench.verdict import FORGET, RECOVERY, RETAIN, verdict
from vkd_framework.report.formatting import ABSENT, NBSP

WIDTH = 120
LONGEST_NAME = 40
COLUMNS = (
    (FORGET, "Test VQA", True),
    (RETAIN, "Retain VQA", True),
    ("realworld_vqa.exact_match", "Real", False),
    ("forget_visible_vqa.exact_match", "Visible", False),
    (RECOVERY, "Advantage", True),
    ("relearn.average_recovery", "Recovery", False),
    (TEXT_DIFFERENCE, "Text", False),
    ("cost.unlearn_seconds", "Unlearn", False),
)
"""Figure, heading, whether its interval is shown. Recovery stands in where there is no advantage."""


def table(comparisons: Sequence[Comparison], method: str) -> str:
    """Every recipe with its lines, and what can be said about forgetting, keeping and recovery together."""
    return "\n\n".join(_recipe(comparison, method) for comparison in comparisons)


def _recipe(comparison: Comparison, method: str) -> str:
    baseline = comparison.baseline(method)
    lines = [*comparison.references, *comparison.lines]
    keys = comparison.figures
    unneeded = "relearn.average_recovery" if RECOVERY in keys else RECOVERY
    shown = [column for column in COLUMNS if column[0] in keys and column[0] != unneeded]
    rows = [["seeds", *(heading for _, heading, _ in shown)]]
    for line in lines:
        cells = [_cell(line, key, baseline, spread=spread) for key, _, spread in shown]
        rows.append([_seeds(line), *cells])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    labels = [line.label for line in lines]
    room = max(8, min(LONGEST_NAME, WIDTH - sum(widths) - len(widths)))
    marks = _marks(labels, room)
    names = ["per cent", *(_cut(label, room - len(mark)) + mark for label, mark in zip(labels, marks, strict=True))]
    longest = max(map(len, names))
    body = [
        " ".join([name.ljust(longest), *(text.rjust(width) for text, width in zip(row, widths, strict=True))])
        for name, row in zip(names, rows, strict=True)
    ]
    numbered = [f"{mark.strip()} {label}" for mark, label in zip(marks, labels, strict=True) if mark]
    sentences = [textwrap.fill(sentence, WIDTH) for sentence in (*numbered, *verdict(comparison, method))]
    return "\n".join([comparison.recipe, *(line.rstrip() for line in body), *sentences])


def _marks(labels: Sequence[str], width: int) -> list[str]:
    """A number for each label that cannot be told from another one when cut; else nothing."""
    cut = [_cut(label, width) for label in labels]
    times, numbers = Counter(cut), count(1)
    return [f" [{next(numbers)}]" if times[name] > 1 else "" for name in cut]


def _cut(label: str, width: int) -> str:
    """A label in at most `width` characters: what is too much goes from its middle, since its end has the value."""
    if len(label) <= width:
        return label
    end = width // 2
    return f"{label[: width - 1 - end]}…{label[len(label) - end :]}"


def _seeds(line: Line) -> str:
    return str(len(line.seeds)) if line.seeds else ""


def _cell(line: Line, key: str, baseline: Line | None, *, spread: bool) -> str:
    """As short as can be. Marks hang over to the right, so that the digits stand under each other."""
    if key not in line.estimates:
        return f"{ABSENT}  "
    found = line.estimates[key]
    if found.figure.kind == "seconds":
        text = f"{found.mean:,.0f} s"
    else:
        text = written(found.figure, found.mean).removesuffix(f"{NBSP}%")
    bounds = interval(found).replace("(", "").replace(")", "") if spread else ""
    bounds = bounds.replace(f"{NBSP}to{NBSP}", "-" if found.figure.kind == "share" else "…")
    return f"{text}{bounds}{mark_of(line, key, baseline):<2}"
