"""Who is on the frontier: forgetting, keeping and standing up to the attack, looked at together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vkd_framework.bench.estimates import Comparison, Line, better

FORGET, RETAIN, RECOVERY = "test_vqa.exact_match", "retain_vqa.exact_match", "relearn.advantage_over_retain_only"
WITHOUT_REFERENCE = "relearn.average_gap"
"""What stands for recovery when no model that never knew was attacked; there, more is better."""
ANEW = "retain_only"
"""The method that unlearns nothing: what the others are to come near, so it does not compete with them."""
AXES = "forget (Test VQA), retain (Retain VQA) and recovery (after the attack)"
BEATS = "at least as good on all three and better on one"


Points = Mapping[str, tuple[float, float, float] | None]
"""Label of a line -> its point; None where not all three are measured."""


@dataclass(frozen=True)
class Frontier:
    """`best`: labels that no other beats; `beaten`: label -> those that beat it; `unknown`: not all is measured."""

    best: tuple[str, ...]
    beaten: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...] = ()


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is at least as good everywhere and better somewhere; larger is better."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def frontier(points: Mapping[str, Sequence[float] | None], starts: Mapping[str, str] | None = None) -> Frontier:
    """Which of the labelled points are dominated by which others; larger is better, None is not measured.

    `starts`: label -> starting model and data. What began from others is another task, and not compared.
    """
    known = {label: point for label, point in points.items() if point is not None}
    start = dict.fromkeys(known, "") | dict(starts or {})
    beaten = {
        label: tuple(other for other in known if start[other] == start[label] and dominates(known[other], point))
        for label, point in known.items()
    }
    return Frontier(
        tuple(label for label in known if not beaten[label]),
        {label: by for label, by in beaten.items() if by},
        tuple(label for label in points if label not in known),
    )


def point(line: Line, never: Line | None) -> tuple[float, float, float] | None:
    """Forgetting, keeping, standing up to the attack, each so that larger is better; None when one is missing.

    `never`: the model that never knew, of the same starting model and data. Forgetting is held against it, and
    answering less than it does, before the attack or after, is no gain: else a model that only says wrong things of the
    forgotten would count as having forgotten better than never to have known.
    """
    forget, retain = line.mean(FORGET), line.mean(RETAIN)
    recovery = line.mean(RECOVERY if never else WITHOUT_REFERENCE)
    if forget is None or retain is None or recovery is None:
        return None
    if never is None:
        return -forget, retain, recovery
    return -max(forget - (never.mean(FORGET) or 0.0), 0.0), retain, -max(recovery, 0.0)


def verdict(comparison: Comparison, method: str) -> list[str]:
    """What can be said about all three together, about `method` first, in sentences. The means are compared."""
    points = _points(comparison)
    competing = [line for line in comparison.lines if line.method != ANEW]
    found = frontier(
        {line.label: points[line.label] for line in competing}, {one.label: one.start for one in competing}
    )
    sentences = []
    if len(found.best) + len(found.beaten) > 1:
        sentences = _about(comparison, method, found, points)
        beaten = [f"{label} (by {_listed([b for b in by if b in found.best])})" for label, by in found.beaten.items()]
        rest = f"; beaten: {', '.join(beaten)}" if beaten else ""
        sentences.append(f"Beaten by no other: {_listed(found.best)}{rest}.")
    sentences += _about_anew(comparison, points)
    if judged := [f"{line.label}: {_counted(line)}" for line in comparison.lines if line.verdicts]:
        sentences.append(f"Verdicts, with the number of runs: {'; '.join(judged)}.")
    if found.unknown:
        sentences.append(f"Not measured on all three, and not compared: {_listed(found.unknown)}.")
    return sentences


def has_reference(comparison: Comparison) -> bool:
    """Whether every line was attacked beside a model that never knew."""
    return all(RECOVERY in line.estimates for line in comparison.lines)


def _points(comparison: Comparison) -> Points:
    """The point of every line, all by the same axes."""
    nevers = [comparison.reference("retain_only", line) for line in comparison.lines]
    known = has_reference(comparison) and all(nevers)
    return {
        line.label: point(line, never if known else None) for line, never in zip(comparison.lines, nevers, strict=True)
    }


def _about(comparison: Comparison, method: str, found: Frontier, points: Points) -> list[str]:
    line = comparison.baseline(method)
    if line is None or line.label in found.unknown:
        return []
    by = found.beaten.get(line.label)
    if not by:
        return [f"No other method beats {line.label} on {AXES} together ({BEATS})."]
    clear = any(_clearly(other, line, comparison, points) for other in comparison.lines if other.label in by)
    noise = "" if clear else "; all of it within the intervals"
    verb = "beats" if len(by) == 1 else "beat"
    return [f"{_listed(by)} {verb} {line.label} on {AXES} together ({BEATS}{noise})."]


def _about_anew(comparison: Comparison, points: Points) -> list[str]:
    """Whom teaching anew beats: what unlearning falls short of."""
    sentences = []
    for anew in comparison.lines:
        own = points[anew.label]
        if anew.method != ANEW or own is None:
            continue
        beaten = [
            line
            for line in comparison.lines
            if line.start == anew.start and (theirs := points[line.label]) and dominates(own, theirs)
        ]
        names = [
            line.label if _clearly(anew, line, comparison, points) else f"{line.label} (within the intervals)"
            for line in beaten
        ]
        found = f"it beats {_listed(names)}" if names else "it beats none of them"
        sentences.append(f"{anew.label} is taught anew without the forgotten and does not compete: {found}.")
    return sentences


def _clearly(one: Line, other: Line, comparison: Comparison, points: Points) -> bool:
    """Whether `one` is better than `other` on one of the three and an interval of it lies wholly on the better side."""
    axes = (FORGET, RETAIN, RECOVERY if has_reference(comparison) else WITHOUT_REFERENCE)
    ahead = zip(axes, points[one.label] or (), points[other.label] or (), strict=True)
    return any(a > b and better(one.estimates[key], other.estimates[key]) == "**" for key, a, b in ahead)


def _counted(line: Line) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in line.verdicts.items())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
