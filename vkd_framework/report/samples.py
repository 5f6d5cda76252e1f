"""Which answers the report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vkd_framework.types import Sample, Splits

SHOWN = {"test_vqa": 5, "forget_visible_vqa": 1, "retain_vqa": 3}
"""Column -> how many answers of each person the report shows."""
RETAINED_SUBJECTS = 3


def pick_samples(splits: Splits, columns: Mapping[str, Any]) -> list[Sample]:
    """A handful of answers before and after: for every forgotten person, and for a few of the others."""
    shown: Counter[tuple[str, str | None]] = Counter()
    retained: set[str | None] = set()
    samples = []
    for column, most in SHOWN.items():
        answers = zip(
            columns["vanilla"].get(column, {}).get("answers", ()),
            columns["unlearned"].get(column, {}).get("answers", ()),
            strict=True,
        )
        for pair, (before, after) in zip(splits.columns.get(column, ()), answers, strict=True):
            if column == "retain_vqa":
                if pair.subject not in retained and len(retained) >= RETAINED_SUBJECTS:
                    continue
                retained.add(pair.subject)
            if shown[column, pair.subject] < most:
                shown[column, pair.subject] += 1
                samples.append(Sample(column, pair, before, after))
    return samples
