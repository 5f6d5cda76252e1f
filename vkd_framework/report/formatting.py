"""Numbers as people read them. Whatever is not a finite number becomes a dash, never a made-up zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

ABSENT = "–"  # noqa: RUF001 - an en dash is meant
NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number (a bool is not one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: object) -> str:
    """A share of 1 in per cent, with one decimal."""
    return f"{100 * value:.1f}{NBSP}%" if is_number(value) else ABSENT


def percent_range(bounds: object) -> str:
    """Two shares of 1 as `1.2 to 3.4 %`."""
    if not (isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(is_number, bounds))):
        return ABSENT
    low, high = bounds
    return f"{100 * low:.1f}{NBSP}to{NBSP}{100 * high:.1f}{NBSP}%"


def points(value: object) -> str:
    """A difference between two shares in percentage points, always signed."""
    return f"{_signed(100 * value)} points" if is_number(value) else ABSENT


def _signed(value: float) -> str:
    # Rounding may leave -0.0; adding 0.0 turns it into 0.0.
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", MINUS)


def decimal(value: object) -> str:
    """A share of 1 with three decimals."""
    return f"{value:.3f}" if is_number(value) else ABSENT


def significant(value: object) -> str:
    """A number of any size with three significant digits."""
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{value + 0.0:.3g}".replace("-", MINUS) if is_number(value) else ABSENT


def count(value: object) -> str:
    """A whole number with thousands separated."""
    return f"{round(value):,}" if is_number(value) else ABSENT


def duration(seconds: object) -> str:
    """Seconds as `0.4 s`, `42 s`, `3 min 20 s` or `2 h 5 min`."""
    if not is_number(seconds):
        return ABSENT
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(number_of_bytes: object) -> str:
    """Bytes in binary units."""
    if not is_number(number_of_bytes):
        return ABSENT
    value = float(number_of_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def share_of(part: object, whole: object) -> str:
    """A count with its share of a whole, `1,234 (5.6 %)`; just the count when the whole is unknown."""
    if is_number(part) and is_number(whole) and whole > 0:
        return f"{count(part)} ({percent(part / whole)})"
    return count(part)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted key and text."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, ", ".join(map(str, value)) or ABSENT))
        else:
            rows.append((name, ABSENT if value is None else str(value)))
    return rows
