"""What is shown of a comparison, in which order and in which words; terminal, Markdown and HTML share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vkd_framework.bench.estimates import BOUNDS, Comparison, Estimate, Line, better
from vkd_framework.bench.figures import TEXT_DIFFERENCE, Figure
from vkd_framework.bench.trials import EXCESS, START
from vkd_framework.bench.verdict import has_reference
from vkd_framework.report.formatting import ABSENT, MINUS, NBSP, count, duration, significant, size
from vkd_framework.report.table import COLUMNS

COST_KEYS = ("unlearn_seconds", "total_seconds", "peak_memory_bytes", "trainable_parameters", "active_parameters")


@dataclass(frozen=True)
class Section:
    """Figures that are shown together, with a heading for each."""

    title: str
    caption: str
    columns: tuple[tuple[str, str], ...]


def sections(comparison: Comparison) -> list[Section]:
    """The tables of one recipe; figures that nobody has, and tables without any, are left out."""
    known = comparison.figures
    tried = [key for key in known if key.startswith(START)]
    measured = ["test_vqa", *(column.key for column in COLUMNS)]
    others = [key.partition(".")[0] for key in known if key.endswith(".exact_match")]
    columns = dict.fromkeys((*measured, *others))
    answers = [f"{column}.exact_match" for column in columns]
    answers.insert(1, "test_vqa.choice_accuracy")
    found = [
        Section(
            "Answers",
            "Exact match of greedy answers, and choice accuracy (guessing among four: 25 %).",
            _shown(answers, known),
        ),
        Section(
            "After the relearning attack",
            "Exact match on Test VQA after so many attack steps, mean over the attacker's shares and seeds. Recovery "
            "is what came back, on average over all steps.",
            _shown([key for key in known if key.startswith(("relearn.average_rec", "attacked."))], known),
        ),
        Section(
            "Advantage over a model that never knew",
            "Exact match on Test VQA minus that of the retain-only model after the same attack. Above 0: hidden, not "
            "erased.",
            _shown([key for key in known if key.startswith(("relearn.advantage", "advantage."))], known),
        ),
        Section(
            "Other attacks",
            "Exact match on Test VQA under other attacks, beside what breaks by itself. What a model that never knew "
            "answers was not left behind.",
            _shown([key for key in tried if key.endswith("exact_match")], known),
        ),
        Section(
            "Traces",
            "Forgotten people should look like people nobody knew. AUC: how well their training photos are told from "
            "strangers', .5 is not at all; read it beside the retain-only row. KS: the distance of the answers' "
            "distribution from retain-only's. Nats above 0: answered worse than by who never knew. Probes: photos of "
            "the forgotten that the features give to the right person; one who never knew tells faces apart as well.",
            _shown([*(key for key in tried if not key.endswith("exact_match")), EXCESS], known),
        ),
        Section(
            "Text and cost",
            "The largest difference of any text-only logit to the vanilla model, over all seeds; time and memory of "
            "the machine that made the runs. Peak memory is that of the whole run, attack included.",
            _shown([TEXT_DIFFERENCE, *(f"cost.{key}" for key in COST_KEYS)], known),
        ),
    ]
    return [section for section in found if section.columns]


def cell(line: Line, key: str, baseline: Line | None) -> str:
    """A figure of a line as text: mean, interval, and the mark of one that is better than the baseline's."""
    if key not in line.estimates:
        return ABSENT
    estimate = line.estimates[key]
    text = f"{written(estimate.figure, estimate.mean)}{interval(estimate)}"
    mark = mark_of(line, key, baseline)
    return f"{text}{NBSP}{mark}" if mark else text


def mark_of(line: Line, key: str, baseline: Line | None) -> str:
    """`*` or `**` where a method is better than the baseline; nothing for the baseline and for references."""
    if baseline is None or line is baseline or line.method is None or key not in line.estimates:
        return ""
    return better(line.estimates[key], baseline.estimates[key]) if key in baseline.estimates else ""


def written(figure: Figure, value: float) -> str:
    """A value in the words of its kind."""
    writers: dict[str, Callable[[float], str]] = {
        "share": lambda share: f"{100 * share:.1f}{NBSP}%",
        "difference": lambda share: signed(100 * share),
        "score": lambda score: f"{score:.2f}",
        "nats": lambda nats: signed(nats, 2),
        "seconds": duration,
        "bytes": size,
        "count": count,
        "number": significant,
    }
    return writers[figure.kind](value)


def interval(estimate: Estimate) -> str:
    """` (low to high)`, or nothing where there is none worth telling."""
    low, high = estimate.low, estimate.high
    if low is None or high is None or estimate.figure.kind not in BOUNDS:
        return ""
    if estimate.figure.kind == "share":
        return f" ({100 * low:.1f}{NBSP}to{NBSP}{100 * high:.1f})"
    return f" ({written(estimate.figure, low)}{NBSP}to{NBSP}{written(estimate.figure, high)})"


def signed(value: float, places: int = 1) -> str:
    """With so many decimals and always a sign."""
    return f"{round(value, places) + 0.0:+.{places}f}".replace("-", MINUS)


def caption(comparisons: Sequence[Comparison], method: str) -> str:
    """What the numbers are: over what the means and intervals go, and what the marks say."""
    lines = [line for comparison in comparisons for line in comparison.lines]
    sources = {estimate.source for line in lines for estimate in line.estimates.values()}
    parts = ["Each figure is the mean over the seeds of its row."]
    if "seeds" in sources:
        parts.append("Intervals: Student's 95 % interval over the seeds;")
        parts.append("where there is one seed, or all seeds say exactly the same, Wilson's over the questions.")
    else:
        parts.append("Intervals: Wilson's 95 % interval over the questions of one run, not over seeds.")
    if any(comparison.baseline(method) for comparison in comparisons):
        parts.append(f"Better than {method} on average: *; and the intervals do not meet: **.")
    parts.append("On Test VQA, Forget VQA and after the attack less counts as better.")
    if any(has_reference(comparison) for comparison in comparisons):
        parts.append(
            "In the sentences on all three together, answering less than a model that never knew is no gain: "
            "whoever does counts as level with it."
        )
    return " ".join(parts)


def _shown(keys: Sequence[str], known: dict[str, Figure]) -> tuple[tuple[str, str], ...]:
    return tuple((key, _heading(known[key])) for key in keys if key in known)


def _heading(figure: Figure) -> str:
    """The figure's label without what the title of its table says already."""
    text = figure.label.removesuffix(", exact match")
    for start in ("After attack, ", "Advantage over retain-only, "):
        text = text.removeprefix(start)
    return "On average" if figure.key == "relearn.advantage_over_retain_only" else text[0].upper() + text[1:]
