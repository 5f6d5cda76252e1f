"""Who is on the frontier: forgetting, keeping and standing up to the attack, looked at together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vkd_framework.bench.estimates import Comparison, Line

FORGET, RETAIN, RECOVERY = "test_vqa.exact_match", "retain_vqa.exact_match", "relearn.advantage_over_retain_only"
WITHOUT_REFERENCE = "relearn.average_gap"
"""What stands for recovery when no model that never knew was attacked; there, more is better."""
AXES = "forget (Test VQA), retain (Retain VQA) and recovery (after the attack)"


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
    """What can be said about all three together, about `method` first, in sentences."""
    reference = all(line.mean(RECOVERY) is not None for line in comparison.lines)
    found = frontier({line.label: point(line, reference=reference) for line in comparison.lines})
    sentences = [*_about(comparison.baseline(method), found)]
    if len(comparison.lines) > 1 and found.best:
        beaten = [f"{label} (by {_listed(by)})" for label, by in found.beaten.items()]
        rest = f"; beaten by another: {', '.join(beaten)}" if beaten else ""
        sentences.append(f"Beaten by no other on {AXES} together: {_listed(found.best)}{rest}.")
    if found.unknown:
        sentences.append(f"Not measured on all three, and left out here: {_listed(found.unknown)}.")
    return sentences


def _about(line: Line | None, found: Frontier) -> list[str]:
    if line is None or line.label in found.unknown or len(found.best) + len(found.beaten) < 2:
        return []
    if by := found.beaten.get(line.label):
        verb = "is" if len(by) == 1 else "are"
        return [f"{_listed(by)} {verb} at least as good as {line.label} on {AXES} together, and better on one of them."]
    return [f"No other method is at least as good as {line.label} on {AXES} together."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
