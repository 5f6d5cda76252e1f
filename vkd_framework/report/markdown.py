"""The report as Markdown: the same content as the HTML, with tables in place of pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vkd_framework.report import charts, findings, trials
from vkd_framework.report.attack import AttackLine, gather_attacks, measured_steps
from vkd_framework.report.formatting import flatten
from vkd_framework.report.gallery import Person, build_gallery
from vkd_framework.report.people import HEADER
from vkd_framework.report.table import MEASURES, MODEL_MEANINGS, MODELS, column_rows, measured_models, taught_sentence
from vkd_framework.types import AttackCurve, Sample

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def render_markdown(
    metrics: Mapping[str, Any],
    curves: Sequence[AttackCurve],
    samples: Sequence[Sample],
    *,
    environment: Mapping[str, Any],
    recipe_text: str,
    history: Sequence[Mapping[str, Any]] = (),
    people: Sequence[Sequence[str]] = (),
) -> str:
    """The whole report as Markdown; the arguments are those of `render_html`."""
    sections = [
        f"# Unlearning report: {escape(metrics.get('recipe', ''))}",
        *verdict_section(metrics),
        table(("Run", "Value"), findings.identity(metrics)),
        "## Summary",
        *map(escape, findings.summary(metrics)),
        *_answers(samples),
        "## Columns",
        *column_section(metrics),
        *(["### Each forgotten person", table(HEADER, people)] if people else []),
        *attack_section(metrics, curves),
        *trial_section(metrics),
        *_training(history),
        "## Proofs",
        proof_table(metrics),
        "## Cost",
        table(("What", "Taken"), findings.cost_rows(metrics)),
        "## Environment",
        table(("Name", "Value"), flatten(environment)),
        "## Recipe",
        fenced(recipe_text, "yaml"),
        "## On the method and on this evidence",
        findings.method_note(metrics),
        findings.EVIDENCE_NOTE,
    ]
    return "\n\n".join(sections) + "\n"


def escape(value: object) -> str:
    """Text that renders as itself anywhere on a line, a table's cell included."""
    one_line = " ".join(str(value).split())
    return _SPECIAL.sub(r"\\\1", html.escape(one_line, quote=False))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are escaped here."""
    lines = [header, ["---"] * len(header)]
    body = [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *body])


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def verdict_section(metrics: Mapping[str, Any]) -> list[str]:
    """The verdict's sentences, the deciding one in bold."""
    sentences = [escape(sentence) for sentence in findings.verdict_sentences(metrics)]
    return [f"**{sentence}**" for sentence in sentences[:1]] + sentences[1:]


def column_section(metrics: Mapping[str, Any]) -> list[str]:
    """The table of columns with its reading aids."""
    header = ("Column", "Model", "Exact match", "95 % interval", "Choice accuracy")
    rows = [
        (
            row.column.label,
            figures.label,
            figures.exact_match,
            figures.interval,
            figures.choice_accuracy,
            figures.rouge_l,
            figures.answer_probability,
            figures.n,
        )
        for row in column_rows(metrics)
        for figures in row.figures
    ]
    models = [f"- **{MODELS[model]}**: {MODEL_MEANINGS[model]}" for model in measured_models(metrics)]
    columns = [f"- **{escape(row.column.label)}**: {escape(row.column.meaning)}" for row in column_rows(metrics)]
    measures = [f"- **{name}**: {meaning}" for name, meaning in MEASURES]
    taught = taught_sentence(metrics)
    return [
        table((*header, "ROUGE-L", "Answer probability", "n"), rows),
        *([escape(taught)] if taught else []),
        "\n".join([*models, *columns, *measures]),
    ]


def attack_section(metrics: Mapping[str, Any], curves: Sequence[AttackCurve]) -> list[str]:
    """The relearning attack: what it is, its averages, its curves as a table."""
    figures = [(figure.name, figure.value, figure.meaning) for figure in findings.attack_figures(metrics)]
    attacks = gather_attacks(curves)
    steps = measured_steps(attacks)
    rows = [
        (attack.label, line.label, *(_attack_cell(line, step) for step in steps))
        for attack in attacks
        for line in attack.lines
    ]
    ahead = [
        (attack.label, *(attack.advantage_at(step) for step in steps if step)) for attack in attacks if attack.compared
    ]
    return [
        "## Relearning attack",
        findings.attack_explanation(metrics),
        *([table(("Figure", "Value", "Meaning"), figures)] if figures else []),
        *(
            [
                "Exact match on Test VQA after each number of attack steps: mean over the seeds, with their range.",
                table(("Attack", "Model", *(f"step {step}" for step in steps)), rows),
            ]
            if attacks
            else ["There are no attack curves in this run."]
        ),
        *(
            [
                "Advantage over retain-only after each number of attack steps.",
                table(("Attack", *(f"step {step}" for step in steps if step)), ahead),
            ]
            if ahead
            else []
        ),
    ]


def trial_section(metrics: Mapping[str, Any]) -> list[str]:
    """The attacks beside relearning as a table; nothing when none was tried."""
    rows = trials.trial_rows(metrics)
    if not rows:
        return []
    models = trials.trial_models(rows)
    header = ("Attack", *(MODELS[model] for model in models), "What it is")
    body = [(row.label, *(row.value(model) for model in models), row.meaning) for row in rows]
    marked = trials.over_forgotten_sentence(metrics)
    return ["## Other attacks", trials.EXPLANATION, table(header, body), *([marked] if marked else [])]


def proof_table(metrics: Mapping[str, Any]) -> str:
    """The proofs with their verdicts."""
    rows = [
        (f"{proof.title}. {proof.statement} {proof.reason}", proof.value, proof.status)
        for proof in findings.proof_rows(metrics)
    ]
    return table(("Statement", "Value", "Result"), rows)


def _attack_cell(line: AttackLine, step: int) -> str:
    spread = line.range_at(step)
    return f"{line.mean_at(step)} ({spread})" if spread else line.mean_at(step)


def _answers(samples: Sequence[Sample]) -> list[str]:
    gallery = build_gallery(samples)
    sections = ["## Answers before and after"]
    if not gallery.forgotten:
        sections.append("No answers were kept for the report.")
    else:
        sections += [
            "A selection, to look at; the measurement is the table of columns.",
            "### Forgotten people",
            "Who they are is meant to be gone, so wrong answers are intended here. What anybody can see on a photo "
            "(Forget visible VQA) and text-only answers (Forget QA) are meant to stay right.",
            _answer_table(gallery.forgotten),
        ]
    if gallery.left_out:
        sections.append(f"{gallery.left_out} more forgotten people are not shown.")
    if gallery.others:
        sections += [
            "### For comparison: everybody else",
            "These answers are meant to stay as they were.",
            _answer_table(gallery.others),
        ]
    return sections


def _answer_table(people: Sequence[Person]) -> str:
    rows = [
        (
            person.name,
            answer.column,
            answer.sample.pair.question,
            answer.sample.pair.answer,
            f"{answer.before} ({answer.before_verdict})",
            f"{answer.after} ({answer.after_verdict})",
        )
        for person in people
        for answer in person.answers
    ]
    return table(("Person", "Column", "Question", "Expected", "Before", "After"), rows)


def _training(history: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = charts.history_table(history)
    if not rows:
        return []
    header = tuple(map(escape, rows[0]))
    return ["## Training history", "The loss terms of unlearning at selected steps.", table(header, rows[1:])]
