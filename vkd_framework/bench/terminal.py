"""The comparison on a terminal: the columns that tell most, in at most 120 characters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from vkd_framework.bench.estimates import Comparison, Line
from vkd_framework.bench.figures import TEXT_DIFFERENCE
from vkd_framework.bench.layout import interval, mark_of, written
from vkd_framework.bench.verdict import FORGET, RECOVERY, RETAIN, verdict
from vkd_framework.report.formatting import ABSENT, NBSP

WIDTH = 120
LONGEST_NAME = 24
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
    rows = [["per cent", "seeds", *(heading for _, heading, _ in shown)]]
    for line in lines:
        cells = [_cell(line, key, baseline, spread=spread) for key, _, spread in shown]
        rows.append([line.label, _seeds(line), *cells])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    widths[0] = max(8, min(widths[0], LONGEST_NAME, WIDTH - sum(widths[1:]) - (len(widths) - 1)))
    body = [
        " ".join(
            [
                row[0][: widths[0]].ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    sentences = [textwrap.fill(sentence, WIDTH) for sentence in verdict(comparison, method)]
    return "\n".join([comparison.recipe, *(line.rstrip() for line in body), *sentences])


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
