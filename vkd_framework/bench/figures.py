"""The figures of one run by name, and which way each of them is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vkd_framework.answers import REWORDED, WRONG
from vkd_framework.intervals import wilson
from vkd_framework.report.attack import SCOPES
from vkd_framework.report.formatting import is_number
from vkd_framework.report.table import column_of

Kind = Literal["share", "difference", "score", "nats", "number", "seconds", "bytes", "count"]
"""`share` is a share of 1, `difference` one between two shares, `score` a number from 0 to 1 that is no share, `nats` a
difference in nats; the others are what they say.
"""

MEASURES = {
    "exact_match": "exact match",
    "choice_accuracy": "choice accuracy",
    "rouge_l": "ROUGE-L",
    "answer_probability": "answer probability",
}
IDENTITY = ("test_vqa", "forget_vqa")
"""Columns, with their parts, that ask who the forgotten people are: the only ones in which less is better."""

AVERAGES = {
    "average_recovery": ("Average recovery", "lower"),
    "average_gap": ("Average gap to vanilla", "higher"),
    "advantage_over_retain_only": ("Advantage over retain-only", "lower"),
    "recovery_from_others": ("Recovery from other people's photos", "lower"),
}
COSTS: dict[str, tuple[str, Kind]] = {
    "teach_seconds": ("Teaching", "seconds"),
    "mask_seconds": ("Mask", "seconds"),
    "unlearn_seconds": ("Unlearning", "seconds"),
    "evaluate_seconds": ("Evaluation", "seconds"),
    "relearn_seconds": ("Attack", "seconds"),
    "total_seconds": ("Total", "seconds"),
    "peak_memory_bytes": ("Peak memory", "bytes"),
    "trainable_parameters": ("Trainable parameters", "count"),
    "active_parameters": ("Active parameters", "count"),
    "total_parameters": ("Parameters", "count"),
    "mask_bytes": ("Mask on disk", "bytes"),
}
SCOPE_WORDS = {
    "visual": "visual modules",
    "low_rank": "visual modules and low rank",
    "full": "every weight",
}
POOL_WORDS = {"known": "", "new": ", new photos", "others": ", other people's photos"}
TEXT_DIFFERENCE = "proofs.text_only_max_logit_difference"


Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Figure:
    """A figure that every run has: its name for programs and for people, and which way it is better."""

    key: str
    label: str
    kind: Kind
    better: Better


@dataclass(frozen=True)
class Value:
    """What one run says; `interval` is the 95 % interval that its questions alone give, where that is known."""

    figure: Figure
    value: float
    interval: tuple[float, float] | None = None


def figures(metrics: Mapping[str, Any], model: str = "unlearned") -> dict[str, Value]:
    """Every figure of `metrics.json` that concerns `model`, by key, in the order in which they are told."""
    found = [*_columns(metrics, model), *_attacks(metrics, model)]
    if model == "unlearned":
        found += [*_averages(metrics), *_advantages(metrics), *_proofs(metrics), *_costs(metrics)]
    return {value.figure.key: value for value in found}


def attack_key(what: Literal["attacked", "advantage"], scope: str, pool: str, step: int) -> str:
    """The key of a point of the attack."""
    return f"{what}.{scope}.{pool}.{step}"


def _columns(metrics: Mapping[str, Any], model: str) -> list[Value]:
    found = []
    for column, cell in (metrics.get("models", {}).get(model) or {}).items():
        label = column_of(column).label
        identity = any(column == name or column.startswith(f"{name}_") for name in IDENTITY)
        for measure, name in MEASURES.items():
            wrong = column.endswith(WRONG)
            if not is_number(cell.get(measure)) or (wrong and measure != "answer_probability"):
                continue
            bounds = cell.get("interval_95") if measure == "exact_match" else None
            reworded = column.endswith(REWORDED)
            better: Better = "neither" if wrong or reworded else "lower" if identity else "higher"
            figure = Figure(f"{column}.{measure}", f"{label}, {name}", "share", better)
            found.append(Value(figure, cell[measure], (bounds[0], bounds[1]) if bounds else None))
    return found


def _averages(metrics: Mapping[str, Any]) -> list[Value]:
    block = metrics.get("relearn") or {}
    return [
        Value(Figure(f"relearn.{key}", label, "difference", "lower" if better == "lower" else "higher"), block[key])
        for key, (label, better) in AVERAGES.items()
        if is_number(block.get(key))
    ]


def _points(metrics: Mapping[str, Any], model: str) -> dict[tuple[str, str, int], dict[tuple[float, int], float]]:
    """(scope, pool, step) -> (share, seed) -> exact match, without the step before the attack."""
    points: dict[tuple[str, str, int], dict[tuple[float, int], float]] = {}
    for curve in (metrics.get("relearn") or {}).get("curves", ()):
        if curve["model"] == model:
            for step, score in zip(curve["steps"], curve["exact_match"], strict=True):
                if step:
                    place = (curve["scope"], curve.get("pool", "known"), step)
                    points.setdefault(place, {})[curve["share"], curve["seed"]] = score
    scopes, pools = list(SCOPES), list(POOL_WORDS)
    return dict(sorted(points.items(), key=lambda item: (*_order(item[0], scopes, pools), item[0][2])))


def _order(place: tuple[str, str, int], scopes: list[str], pools: list[str]) -> tuple[int, int, str]:
    scope, pool, _ = place
    return (
        pools.index(pool) if pool in pools else len(pools),
        scopes.index(scope) if scope in scopes else len(scopes),
        f"{pool} {scope}",
    )


def _in_words(scope: str, pool: str, step: int) -> str:
    return f"{SCOPE_WORDS.get(scope, scope)}{POOL_WORDS.get(pool, f', {pool}')}, step {step}"


def _attacks(metrics: Mapping[str, Any], model: str) -> list[Value]:
    """Exact match on Test VQA after the attack, the mean over the attacker's shares and seeds."""
    asked = (metrics.get("models", {}).get(model) or {}).get("test_vqa", {}).get("n")
    found = []
    for (scope, pool, step), scores in _points(metrics, model).items():
        mean = sum(scores.values()) / len(scores)
        figure = Figure(
            attack_key("attacked", scope, pool, step), f"After attack, {_in_words(scope, pool, step)}", "share", "lower"
        )
        found.append(Value(figure, mean, wilson(mean * asked, asked) if asked else None))
    return found


def _advantages(metrics: Mapping[str, Any]) -> list[Value]:
    """The unlearned model's exact match minus that of the retain-only model, after the same attack."""
    reference = _points(metrics, "retain_only")
    found = []
    for (scope, pool, step), scores in _points(metrics, "unlearned").items():
        others = reference.get((scope, pool, step), {})
        ahead = [score - others[attacker] for attacker, score in scores.items() if attacker in others]
        if ahead:
            figure = Figure(
                attack_key("advantage", scope, pool, step),
                f"Advantage over retain-only, {_in_words(scope, pool, step)}",
                "difference",
                "lower",
            )
            found.append(Value(figure, sum(ahead) / len(ahead)))
    return found


def _proofs(metrics: Mapping[str, Any]) -> list[Value]:
    difference = (metrics.get("proofs") or {}).get(TEXT_DIFFERENCE.partition(".")[2])
    figure = Figure(TEXT_DIFFERENCE, "Text-only logits, largest difference", "number", "lower")
    return [Value(figure, difference)] if is_number(difference) else []


def _costs(metrics: Mapping[str, Any]) -> list[Value]:
    cost = metrics.get("cost") or {}
    return [
        Value(Figure(f"cost.{key}", label, kind, "neither" if key == "total_parameters" else "lower"), cost[key])
        for key, (label, kind) in COSTS.items()
        if is_number(cost.get(key))
    ]
