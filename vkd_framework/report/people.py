"""The forgotten people one by one: a mean over all of them hides somebody who is still known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vkd_framework.answers import is_right
from vkd_framework.data.counts import of_forgotten
from vkd_framework.report.formatting import count, percent
from vkd_framework.types import Splits

HEADER = ("Person", "Pairs trained on", "Questions of Test VQA", "Exact match before", "Exact match after")


def people_rows(splits: Splits, columns: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of texts for each forgotten person, as `HEADER` says. `columns`: model -> column -> its answers."""
    right: dict[tuple[str, str | None], list[bool]] = defaultdict(list)
    for model in ("vanilla", "unlearned"):
        answers = columns[model]["test_vqa"]["answers"]
        for pair, given in zip(splits.columns["test_vqa"], answers, strict=True):
            right[model, pair.subject].append(is_right(pair, given))

    def exact_match(model: str, name: str) -> str:
        found = right[model, name]
        return percent(sum(found) / len(found) if found else None)

    return [
        (name, count(trained), count(measured), exact_match("vanilla", name), exact_match("unlearned", name))
        for name, (trained, measured) in of_forgotten(splits).items()
    ]
