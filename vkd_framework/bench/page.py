"""The comparison as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vkd_framework import report
from vkd_framework.bench import frontier
from vkd_framework.bench.estimates import Comparison, Line
from vkd_framework.bench.layout import Section, caption, interval, mark_of, sections, written
from vkd_framework.bench.verdict import verdict


@dataclass(frozen=True)
class Shown:
    """A figure of a line: its mean, its interval and its mark as text, all empty where it was not measured."""

    mean: str = ""
    interval: str = ""
    mark: str = ""


def render(comparisons: Sequence[Comparison], method: str, *, command: str, failures: Sequence[str] = ()) -> str:
    """The whole comparison as self-contained HTML; `method` is the one that the others are marked against."""
    folders = [Path(__file__).parent, Path(str(report.__file__)).parent]
    jinja = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("bench.html.j2").render(
        comparisons=[
            (
                comparison,
                verdict(comparison, method),
                frontier.plots(comparison, method),
                [_table(comparison, section, method) for section in sections(comparison)],
            )
            for comparison in comparisons
        ],
        caption=caption(comparisons, method),
        command=command,
        failures=failures,
        box=frontier,
    )


def _table(comparison: Comparison, section: Section, method: str) -> tuple[Section, list[tuple[Line, list[Shown]]]]:
    baseline = comparison.baseline(method)
    rows = [
        (line, [_shown(line, key, baseline) for key, _ in section.columns])
        for line in (*comparison.references, *comparison.lines)
        if any(key in line.estimates for key, _ in section.columns)
    ]
    return section, rows


def _shown(line: Line, key: str, baseline: Line | None) -> Shown:
    if key not in line.estimates:
        return Shown()
    estimate = line.estimates[key]
    bounds = interval(estimate).strip().removeprefix("(").removesuffix(")")
    return Shown(written(estimate.figure, estimate.mean), bounds, mark_of(line, key, baseline))
