"""Who is on the frontier: forgetting, keeping and standing up to the attack, looked at together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vkd_framework.bench.estimates import Comparison, Line, better

FORGET, RETAIN, RECOVERY = "test_vqa.exact_match", "retain_vqa.exact_match", "relearn.advantage_over_retain_only"
WITHOUT_REFERENCE = "relearn.average_gap"
"""What stands for recovery when no model that never knew was attacked; there, more is better."""
AXES = "forget (Test VQA), retain (Retain VQA) and recovery (after the attack)"
BEATS = "at least as good on all three and better on one"


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


def frontier(points: Mapping[str, Sequence[float] | None]) -> Frontier:
    """Which of the labelled points are dominated by which others; larger is better, None is not measured."""
    known = {label: point for label, point in points.items() if point is not None}
    beaten = {
        label: tuple(other for other in known if dominates(known[other], point)) for label, point in known.items()
    }
    return Frontier(
        tuple(label for label in known if not beaten[label]),
        {label: by for label, by in beaten.items() if by},
        tuple(label for label in points if label not in known),
    )


def point(line: Line, *, reference: bool) -> tuple[float, float, float] | None:
    """Forgetting, keeping, standing up to the attack, each so that larger is better; None when one is missing."""
    forget, retain = line.mean(FORGET), line.mean(RETAIN)
    recovery = line.mean(RECOVERY if reference else WITHOUT_REFERENCE)
    if forget is None or retain is None or recovery is None:
        return None
    return -forget, retain, -recovery if reference else recovery


def verdict(comparison: Comparison, method: str) -> list[str]:
    """What can be said about all three together, about `method` first, in sentences. The means are compared."""
    reference = has_reference(comparison)
    found = frontier({line.label: point(line, reference=reference) for line in comparison.lines})
    sentences = []
    if len(found.best) + len(found.beaten) > 1:
        sentences = _about(comparison, method, found)
        beaten = [f"{label} (by {_listed([b for b in by if b in found.best])})" for label, by in found.beaten.items()]
        rest = f"; beaten: {', '.join(beaten)}" if beaten else ""
        sentences.append(f"Beaten by no other: {_listed(found.best)}{rest}.")
    if judged := [f"{line.label}: {_counted(line)}" for line in comparison.lines if line.verdicts]:
        sentences.append(f"Verdicts, with the number of runs: {'; '.join(judged)}.")
    if found.unknown:
        sentences.append(f"Not measured on all three, and not compared: {_listed(found.unknown)}.")
    return sentences


def has_reference(comparison: Comparison) -> bool:
    """Whether every line was attacked beside a model that never knew."""
    return all(RECOVERY in line.estimates for line in comparison.lines)


def _about(comparison: Comparison, method: str, found: Frontier) -> list[str]:
    line = comparison.baseline(method)
    if line is None or line.label in found.unknown:
        return []
    by = found.beaten.get(line.label)
    if not by:
        return [f"No other method beats {line.label} on {AXES} together ({BEATS})."]
    clear = [other.label for other in comparison.lines if other.label in by and _clearly(other, line, comparison)]
    noise = "" if clear else "; all of it within the intervals"
    verb = "beats" if len(by) == 1 else "beat"
    return [f"{_listed(by)} {verb} {line.label} on {AXES} together ({BEATS}{noise})."]


def _clearly(one: Line, other: Line, comparison: Comparison) -> bool:
    """Whether an interval of `one` lies wholly on the better side of that of `other`, on one of the three."""
    axes = (FORGET, RETAIN, RECOVERY if has_reference(comparison) else WITHOUT_REFERENCE)
    return any(better(one.estimates[key], other.estimates[key]) == "**" for key in axes)


def _counted(line: Line) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in line.verdicts.items())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
