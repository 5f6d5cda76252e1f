"""The columns of `metrics.json` in words, and their figures: HTML, Markdown, model card and terminal share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vkd_framework.report.formatting import ABSENT, NBSP, count, decimal, is_number, percent, percent_range


@dataclass(frozen=True)
class Column:
    """A set of questions that every model was asked."""

    key: str
    label: str
    meaning: str


UNSEEN = "{unseen}"
"""Stands for what `never_seen` says."""

COLUMNS = (
    Column("forget_vqa", "Forget VQA", "The forgotten people, on the photos that unlearning used."),
    Column("test_vqa", "Test VQA", f"The forgotten people, on {UNSEEN} that unlearning never saw."),
    Column("retain_vqa", "Retain VQA", f"Everybody else, on {UNSEEN} that unlearning never saw."),
    Column("forget_qa", "Forget QA", "The forgotten people, asked in text without a photo."),
    Column("retain_qa", "Retain QA", "Everybody else, asked in text without a photo."),
    Column(
        "realworld_vqa",
        "Real-world VQA",
        "What should stay beside that: what anybody can see on photos of strangers or of those who "
        "are kept, or who celebrities are, as the data has it.",
    ),
    Column("forget_visible_vqa", "Forget visible VQA", "What anybody can see, on photos of the forgotten people."),
)

TERMINAL_WIDTH = 100

MODELS = {"vanilla": "Vanilla", "unlearned": "Unlearned", "retain_only": "Retain-only"}
"""The compared models, in the order in which they are shown."""

MODEL_MEANINGS = {
    "vanilla": "the model before unlearning",
    "unlearned": "the model after unlearning",
    "retain_only": "a model trained the same way that never saw the forgotten people",
}

MEASURES = (
    (
        "Exact match",
        "share of greedy answers that equal the expected one, or mention its keywords where it has some, with its 95 % "
        "interval",
    ),
    ("Choice accuracy", "share of choices that are right; among four options, guessing scores 25 %"),
    ("ROUGE-L", "overlap of the greedy answer with the expected one, 0 to 1"),
    ("Answer probability", "probability the model gives to the expected answer, 0 to 1"),
    ("n", "number of questions"),
)


@dataclass(frozen=True)
class Figures:
    """One model's figures in one column."""

    model: str
    cell: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The model's name for people."""
        return model_label(self.model)

    @property
    def exact_match(self) -> str:
        """In per cent."""
        return percent(self.cell.get("exact_match"))

    @property
    def interval(self) -> str:
        """The 95 % interval of the exact match, in per cent."""
        return percent_range(self.cell.get("interval_95"))

    @property
    def choice_accuracy(self) -> str:
        """In per cent; a dash when the column's questions have no options."""
        return percent(self.cell.get("choice_accuracy"))

    @property
    def rouge_l(self) -> str:
        """Between 0 and 1."""
        return decimal(self.cell.get("rouge_l"))

    @property
    def answer_probability(self) -> str:
        """Between 0 and 1."""
        return decimal(self.cell.get("answer_probability"))

    @property
    def n(self) -> str:
        """The number of questions."""
        return count(self.cell.get("n"))

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Lower bound, exact match and upper bound in per cent, to be drawn; None when one is missing."""
        values = (*(self.cell.get("interval_95") or ()), self.cell.get("exact_match"))
        if len(values) != 3 or not all(map(is_number, values)):
            return None
        low, high, middle = (min(100.0, max(0.0, 100 * value)) for value in values)
        return low, middle, high


@dataclass(frozen=True)
class Row:
    """One column with the figures of every model that was measured on it."""

    column: Column
    figures: tuple[Figures, ...]


def model_label(model: str) -> str:
    """A model's name for people."""
    return MODELS.get(model, model)


def cell_of(metrics: Mapping[str, Any], model: str, column: str) -> Mapping[str, Any]:
    """One cell of `metrics.json`; empty when the model or the column was not measured."""
    return (metrics.get("models", {}).get(model) or {}).get(column) or {}


def never_seen(metrics: Mapping[str, Any], column: str) -> str:
    """What was new in a column to the model that had unlearned: photos, phrasings, both, or only the two together.

    A run of a version that did not tell has new photos, and maybe old phrasings.
    """
    found = (metrics.get("unseen") or {}).get(column, ("photos",))
    return " and ".join(found) or "pairs of photo and question"


def measured_models(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """The known models that `metrics` has figures for."""
    return tuple(model for model in MODELS if metrics.get("models", {}).get(model))


def column_of(key: str) -> Column:
    """The column of that key in words. `test_vqa_generation` is shown as a part of `test_vqa`, others by their key."""
    for column in COLUMNS:
        if key == column.key:
            return column
    for column in COLUMNS:
        if key.startswith(f"{column.key}_"):
            part = _in_words(key.removeprefix(f"{column.key}_"))
            return Column(key, f"{column.label}: {part}", f"A part of the data beside {column.label}: {part}.")
    words = _in_words(key)
    return Column(key, words[:1].upper() + words[1:], "A part of the data.")


def _in_words(key: str) -> str:
    return " ".join(word.upper() if word in ("vqa", "qa") else word for word in key.split("_"))


def column_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Every measured column: the known ones in their order, each with its parts after it, then all others."""
    models = measured_models(metrics)
    keys = list(dict.fromkeys(key for model in models for key in metrics["models"][model]))
    known = [key for column in COLUMNS for key in (column.key, *(k for k in keys if k.startswith(f"{column.key}_")))]
    rows = []
    for column in map(column_of, dict.fromkeys((*known, *keys))):
        cells = [(model, cell_of(metrics, model, column.key)) for model in models]
        figures = tuple(Figures(model, cell) for model, cell in cells if cell)
        if figures:
            meaning = column.meaning.replace(UNSEEN, never_seen(metrics, column.key))
            rows.append(Row(replace(column, meaning=meaning), figures))
    return rows


def taught_sentence(metrics: Mapping[str, Any]) -> str | None:
    """What the vanilla model knew of the whole cast, when the run taught it; else None."""
    cell = (metrics.get("taught") or {}).get("test_vqa_all_people")
    if not cell:
        return None
    figures = Figures("vanilla", cell)
    return (
        f"Vanilla knows everybody: asked about all people on unseen photos, it answers {figures.exact_match} exactly "
        f"right (95{NBSP}% interval {figures.interval}, choice accuracy {figures.choice_accuracy}, "
        f"n{NBSP}={NBSP}{figures.n})."
    )


def terminal_table(metrics: Mapping[str, Any]) -> str:
    """The columns and models as plain text, at most 100 characters wide, in per cent.

    ROUGE-L, by which free answers are read, is left out where three models leave no room for it.
    """
    models, rows = measured_models(metrics), column_rows(metrics)
    rouge = len(models) < 3
    heading = f"   {'exact':>5} {'95 %':>11} {'choice':>6}" + (f" {'rouge':>6}" if rouge else "")
    width = min(max([18, *(len(row.column.label) for row in rows)]), TERMINAL_WIDTH - len(heading) * len(models))
    lines = [
        f"{'per cent':{width}}" + "".join(f"{MODELS[model]:>{len(heading)}}" for model in models),
        f"{'':{width}}" + heading * len(models),
    ]
    for row in rows:
        cells = {figures.model: figures.cell for figures in row.figures}
        shown = "".join(_terminal_cell(cells.get(model, {}), rouge=rouge) for model in models)
        lines.append(f"{row.column.label[:width]:{width}}{shown}")
    return "\n".join(line.rstrip() for line in lines)


def _terminal_cell(cell: Mapping[str, Any], *, rouge: bool) -> str:
    low, high = (_bare(bound) for bound in cell.get("interval_95") or (None, None))
    text = f"   {_bare(cell.get('exact_match')):>5} {f'{low}-{high}':>11} {_bare(cell.get('choice_accuracy')):>6}"
    return f"{text} {_bare(cell.get('rouge_l')):>6}" if rouge else text


def _bare(value: object) -> str:
    return percent(value).removesuffix("%").strip().replace(ABSENT, ".")
