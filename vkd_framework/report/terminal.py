"""Attacks and the verdict as plain text, at most 100 characters wide: what `vkd` prints."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from vkd_framework.report.attack import POOLS
from vkd_framework.report.findings import attack_figures, verdict_sentences
from vkd_framework.report.formatting import NBSP, is_number, percent
from vkd_framework.report.table import MODELS, TERMINAL_WIDTH
from vkd_framework.report.trials import over_forgotten_sentence, trial_models, trial_rows

FIGURE = 16


def trials_table(metrics: Mapping[str, Any]) -> str:
    """A line for each attack beside relearning with a figure for each model; empty when none was tried."""
    rows = trial_rows(metrics)
    models = trial_models(rows)
    width = TERMINAL_WIDTH - FIGURE * len(models)
    lines = [f"{'other attacks':{width}}" + "".join(f"{MODELS[model]:>{FIGURE}}" for model in models)]
    for row in rows:
        shown = "".join(f"{re.split(r' [(]|, ', _plain(row.value(model)))[0]:>{FIGURE}}" for model in models)
        lines.append(f"{_plain(row.label)[:width]:{width}}{shown}")
    marked = textwrap.fill(over_forgotten_sentence(metrics), TERMINAL_WIDTH)
    return "\n".join([*lines, *([marked] if marked else [])]) if rows else marked


def verdict_text(metrics: Mapping[str, Any]) -> str:
    """The verdict, a paragraph for each sentence."""
    return "\n".join(map(paragraph, verdict_sentences(metrics)))


def paragraph(text: str) -> str:
    """A sentence in lines that fit."""
    return textwrap.fill(_plain(text), TERMINAL_WIDTH)


def relearn_table(block: Mapping[str, Any]) -> str:
    """The `relearn` block of `metrics.json`: exact match after each number of steps, mean over seeds; the averages."""
    table: Sequence[Mapping[str, Any]] = block["advantage_by_step"]
    steps = table[0]["steps"]
    before = {curve["model"]: curve["exact_match"][0] for curve in block["curves"]}
    lines = [f"{'Test VQA after steps of attack, per cent':62}" + "".join(f"{step:>8}" for step in (0, *steps))]
    for row in table:
        what = f"{row['scope']}, {POOLS.get(row['pool'], row['pool'])}, {100 * row['share']:g} %"
        for model in ("unlearned", "retain_only"):
            if row[model] is not None:
                lines.append(_line(f"{what:48}{MODELS[model]}", [before[model], *row[model]]))
                what = ""
        if row["advantage"] is not None:
            lines.append(_line(f"{'':48}Advantage", [None, *row["advantage"]], signed=True))
    figures = [f"{figure.name}: {_plain(figure.value)}" for figure in attack_figures({"relearn": block})]
    return "\n".join([*lines, "", *figures])


def _line(start: str, values: Sequence[float | None], *, signed: bool = False) -> str:
    shown = [_signed(value) if signed else _plain(percent(value)).removesuffix(" %") for value in values]
    return (f"{start:62}" + "".join(f"{text:>8}" for text in shown)).rstrip()


def _signed(value: float | None) -> str:
    return f"{100 * value:+.1f}" if is_number(value) else ""


def _plain(text: str) -> str:
    return text.replace(NBSP, " ")
