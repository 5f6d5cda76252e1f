"""The relearning attack's curves, gathered over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vkd_framework.report.formatting import NBSP, count, is_number, percent, percent_range, points
from vkd_framework.report.table import MODELS, model_label
from vkd_framework.types import AttackCurve

SCOPES = {
    "visual": "Visual modules tuned",
    "low_rank": "Visual modules tuned, the language model by low rank",
    "full": "Every weight tuned",
}

POOLS = {"known": "the forget set", "new": "new photos of the forgotten", "others": "other people only"}
"""What the attackers had, the strongest knowledge first."""


@dataclass(frozen=True)
class AttackLine:
    """One model under one attack: mean, lowest and highest exact match over the seeds after each number of steps."""

    model: str
    seeds: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    @property
    def label(self) -> str:
        """The model's name for people."""
        return model_label(self.model)

    def mean_at(self, step: int) -> str:
        """The mean over the seeds at `step`; empty where nothing was measured."""
        return percent(self.mean[self.steps.index(step)]) if step in self.steps else ""

    def range_at(self, step: int) -> str:
        """The range over the seeds at `step`; empty where nothing was measured and for a single seed."""
        if step not in self.steps or self.seeds == 1:
            return ""
        index = self.steps.index(step)
        return percent_range((self.lowest[index], self.highest[index]))


@dataclass(frozen=True)
class Attack:
    """What the attacker tuned and had, with a line for each attacked model."""

    scope: str
    pool: str
    share: float
    pairs: int
    lines: tuple[AttackLine, ...]

    @property
    def tuned(self) -> str:
        """What the attacker tuned."""
        return SCOPES.get(self.scope, self.scope)

    @property
    def known(self) -> str:
        """What the attacker had."""
        pairs = f"{count(self.pairs)}{NBSP}{'pair' if self.pairs == 1 else 'pairs'}"
        if self.pool == "known":
            return f"{100 * self.share:g}{NBSP}% of the forget set ({pairs})"
        return f"{POOLS.get(self.pool, self.pool)} ({pairs})"

    def advantage_at(self, step: int) -> str:
        """Unlearned minus retain-only at `step`; empty where one of them was not measured, and before the attack."""
        by_model = {line.model: line for line in self.lines}
        own, reference = by_model.get("unlearned"), by_model.get("retain_only")
        if own is None or reference is None or not step or step not in own.steps or step not in reference.steps:
            return ""
        return points(own.mean[own.steps.index(step)] - reference.mean[reference.steps.index(step)])

    @property
    def compared(self) -> bool:
        """Whether there is an advantage at any step."""
        return any(self.advantage_at(step) for line in self.lines for step in line.steps)

    @property
    def label(self) -> str:
        """The attack in words."""
        return f"{self.tuned}, {self.known}"


def gather_attacks(curves: Sequence[AttackCurve]) -> list[Attack]:
    """The curves as one attack per scope, pool and share, averaged over seeds; of a scope, known pairs come first."""
    groups: dict[tuple[str, str, float], list[AttackCurve]] = {}
    for curve in curves:
        groups.setdefault((curve.scope, curve.pool, curve.share), []).append(curve)
    scopes, pools = list(SCOPES), list(POOLS)
    attacks = []
    for scope, pool, share in sorted(groups, key=lambda key: (scopes.index(key[0]), pools.index(key[1]), key[2])):
        group = groups[scope, pool, share]
        models = sorted({curve.model for curve in group}, key=_model_order)
        lines = tuple(_line(model, [curve for curve in group if curve.model == model]) for model in models)
        attacks.append(Attack(scope, pool, share, group[0].pairs, lines))
    return attacks


def measured_steps(attacks: Sequence[Attack]) -> list[int]:
    """Every number of steps after which any attack was scored."""
    return sorted({step for attack in attacks for line in attack.lines for step in line.steps})


def _model_order(model: str) -> tuple[int, str]:
    order = ["unlearned", "retain_only", *MODELS]
    return (order.index(model) if model in order else len(order), model)


def _line(model: str, curves: Sequence[AttackCurve]) -> AttackLine:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve.steps, curve.exact_match, strict=True):
            if is_number(value):
                values.setdefault(step, []).append(value)
    steps = tuple(sorted(values))
    return AttackLine(
        model,
        len(curves),
        steps,
        tuple(sum(values[step]) / len(values[step]) for step in steps),
        tuple(min(values[step]) for step in steps),
        tuple(max(values[step]) for step in steps),
    )
