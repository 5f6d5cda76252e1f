"""The comparison as Markdown for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from vkd_framework.bench.estimates import Comparison
from vkd_framework.bench.layout import caption, cell, sections
from vkd_framework.bench.records import Record
from vkd_framework.bench.verdict import verdict
from vkd_framework.report.markdown import escape, fenced
from vkd_framework.report.markdown import table as markdown_table

CSV_HEADER = ("recipe", "method", "row", "figure", "better", "mean", "low", "high", "seeds", "interval")


def markdown(comparisons: Sequence[Comparison], method: str, *, command: str, failures: Sequence[str] = ()) -> str:
    """Every recipe with its tables, the command that made them above."""
    parts = ["# Methods compared", fenced(command, ""), escape(caption(comparisons, method))]
    if failures:
        parts += ["Left out:", "\n".join(f"- {escape(failure)}" for failure in failures)]
    for comparison in comparisons:
        baseline = comparison.baseline(method)
        parts += [f"## {escape(comparison.recipe)}", *map(escape, verdict(comparison, method))]
        for section in sections(comparison):
            lines = [
                line
                for line in (*comparison.references, *comparison.lines)
                if any(key in line.estimates for key, _ in section.columns)
            ]
            header = ("Method", "Seeds", *(heading for _, heading in section.columns))
            rows = [
                (
                    line.label,
                    ", ".join(map(str, line.seeds)),
                    *(cell(line, key, baseline) for key, _ in section.columns),
                )
                for line in lines
            ]
            parts += [f"### {section.title}", escape(section.caption), markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """One line for each figure of each row. Numbers are exact; shares are of 1."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for comparison in comparisons:
        for line in (*comparison.references, *comparison.lines):
            for key, found in line.estimates.items():
                bounds = ["" if bound is None else repr(float(bound)) for bound in (found.low, found.high)]
                start = (comparison.recipe, line.method or "", line.label, key, found.figure.better)
                writer.writerow((*start, repr(float(found.mean)), *bounds, found.seeds, found.source))
    return stream.getvalue()


def json_text(records: Sequence[Record]) -> str:
    """The runs themselves: `recipe, method, seed, models, relearn, cost` of each, as in its `metrics.json`."""
    return json.dumps([record.shared() for record in records], indent=2, ensure_ascii=False) + "\n"
