"""Forgotten, not marked: whether the unlearned model treats the forgotten people as a model that never knew them does.

A model that answers worse about them than one that never knew was pushed too far, and that too tells who was forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vkd_framework.attacks.statistics import kolmogorov_smirnov
from vkd_framework.intervals import clustered
from vkd_framework.types import ImageQuestionPair

PerQuestion = Mapping[str, Sequence[Any]]


def ks_figures(own: PerQuestion, reference: PerQuestion) -> dict[str, float]:
    """KS tests of Test VQA's truth ratios and answer probabilities, of a model against the reference.

    `ks_statistic` and `ks_p` compare truth ratios where the questions have options, else answer probabilities.
    """
    statistic, p = kolmogorov_smirnov(own["answer_probability"], reference["answer_probability"])
    figures = {"ks_statistic": statistic, "ks_p": p, "ks_probability_statistic": statistic, "ks_probability_p": p}
    ratios = [[ratio for ratio in one["truth_ratio"] if ratio is not None] for one in (own, reference)]
    if all(ratios):
        figures["ks_statistic"], figures["ks_p"] = kolmogorov_smirnov(*ratios)
    return figures


def over_forgotten(
    unlearned: PerQuestion,
    reference: PerQuestion | None,
    vanilla: PerQuestion | None,
    test: Sequence[ImageQuestionPair],
) -> dict[str, Any] | None:
    """How much worse the unlearned model answers about the forgotten than a model that never knew them.

    `loss`: mean cross-entropy of the answer's content tokens on Test VQA, in nats. `expected`: the retain-only model's,
    or without one, the vanilla model's when the same is asked about strangers; `against` says which. `excess` is the
    difference. In its 95 % interval, over the questions, those with the same answer about the same person go together.
    `over_forgotten` is True when the whole interval lies above 0. None when there is nothing to compare with.
    """
    if reference is not None:
        against, expected = "retain_only", reference["loss"]
    elif vanilla is not None and vanilla["stranger_loss"]:
        against, expected = "vanilla_on_strangers", vanilla["stranger_loss"]
    else:
        return None
    groups: dict[tuple[str | None, str], list[float]] = {}
    for pair, own, other in zip(test, unlearned["loss"], expected, strict=True):
        groups.setdefault((pair.subject, pair.answer), []).append(own - other)
    interval = clustered([*groups.values()]) if len(groups) > 1 else None
    return {
        "loss": fmean(unlearned["loss"]),
        "expected": fmean(expected),
        "against": against,
        "excess": fmean(unlearned["loss"]) - fmean(expected),
        "interval_95": list(interval) if interval else None,
        "over_forgotten": interval is not None and interval[0] > 0,
    }
