"""Two statistics that compare samples of figures. Pure functions on plain lists; no dependency is worth two of them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

TERMS = 100


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a figure of `members` is higher than one of `others`; ties count half. 0.5: no difference.

    The area under the ROC curve, as the Mann-Whitney statistic.
    """
    ranked = sorted(others)
    below = sum((bisect_left(ranked, value) + bisect_right(ranked, value)) / 2 for value in members)
    return below / (len(members) * len(others))


def kolmogorov_smirnov(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The two-sample statistic, the largest distance of the empirical distributions, and its two-sided p-value.

    The p-value is the asymptotic one with Stephens' correction for small samples (Numerical Recipes, section 14.3). It
    takes the values of a sample to be independent of each other.
    """
    first, second = sorted(a), sorted(b)
    statistic = max(
        abs(bisect_right(first, value) / len(first) - bisect_right(second, value) / len(second))
        for value in (*first, *second)
    )
    size = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    return statistic, kolmogorov((size + 0.12 + 0.11 / size) * statistic)


def kolmogorov(scaled: float) -> float:
    """The chance that Kolmogorov's distribution exceeds `scaled`."""
    if scaled < 0.2:  # the series needs more and more terms there, and is 1 to ten digits
        return 1.0
    total = sum((1 if k % 2 else -1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, TERMS + 1))
    return min(1.0, max(0.0, 2 * total))
