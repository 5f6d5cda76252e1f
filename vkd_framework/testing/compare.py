"""How far two tensors may lie apart, and how a difference is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vkd_framework.testing.outcomes import Wrong

TOLERANCE = 1e-4
"""How far two computations of the same figure may lie apart, relative to the figures' root mean square."""


def relative_gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the root mean square of the second; infinite for other shapes or NaN."""
    if a.shape != b.shape:
        return float("inf")
    gap = float((a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-12))
    return gap if gap == gap else float("inf")


def differs(a: Tensor, b: Tensor) -> Tensor:
    """`[R]` bool: rows that differ by more than rounding."""
    if a.shape != b.shape:
        raise Wrong(f"{_shape(b)} features for a photo of the same size", _shape(a))
    return (a - b).abs().amax(dim=1) > 1e-5 * b.square().mean().sqrt()


def difference(a: Tensor | None, b: Tensor | None) -> str:
    """How two tensors differ: by their largest gap, or by their shapes."""
    if a is None or b is None or a.shape != b.shape:
        return f"{_shape(a)} against {_shape(b)}"
    return f"up to {float((a - b).abs().max()):.2g}"


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(list(tensor.shape))


def few(items: Iterable[Any], count: int = 3) -> str:
    """The first few items, and how many more there are."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more
