"""95 % intervals: of a share of questions, and of a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
"""The 97.5 % quantile of the normal distribution."""

_STUDENT = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom; beyond, the expansion below is exact enough."""


def wilson(hits: float, n: int, z: float = Z) -> tuple[float, float]:
    """The Wilson 95 % interval of a proportion; stays inside [0, 1] and is honest at 0 and at n."""
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % interval of the mean of all values, where those of a group go together; at least two groups.

    From the cluster-robust standard error (Liang and Zeger, Biometrika 1986) with the factor G / (G - 1) for G groups,
    and Student's t with G - 1 degrees of freedom.
    """
    n = sum(map(len, groups))
    mean = math.fsum(value for group in groups for value in group) / n
    squares = math.fsum(math.fsum(value - mean for value in group) ** 2 for group in groups)
    half = student_quantile(len(groups) - 1) * math.sqrt(squares * len(groups) / (len(groups) - 1)) / n
    return mean - half, mean + half


def student(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of at least two values."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(n - 1) * spread / math.sqrt(n)
    return mean - half, mean + half


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; within 0.001 (Cornish-Fisher, Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
