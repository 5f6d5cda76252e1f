"""How many pairs there are, of each split and of each forgotten person: what to look at before a run is begun."""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter

from vkd_framework.data.jsonl import listed
from vkd_framework.types import Splits

_WIDTH, _INDENT = 100, 9
ALIKE = 0.85
"""From which share of letters in common on a name counts as nearly another."""


def of_forgotten(splits: Splits) -> dict[str, tuple[int, int]]:
    """Forgotten person -> the pairs about them that are trained on, and those of `test_vqa`."""
    trained, measured = (
        Counter(pair.subject for pair in pairs) for pairs in (splits.forget, splits.columns.get("test_vqa", ()))
    )
    return {name: (trained[name], measured[name]) for name in splits.forget_subjects}


def nearly_forgotten(splits: Splits) -> list[tuple[str, str]]:
    """People who are kept although their name is nearly that of a forgotten one, each with that name."""
    kept = [name for name in splits.subjects if name not in splits.forget_subjects]
    return [
        (name, forgotten)
        for forgotten in splits.forget_subjects
        for name in difflib.get_close_matches(forgotten, kept, n=3, cutoff=ALIKE)
    ]


def told(splits: Splits) -> str:
    """The counts as text, at most twenty people among them, and whose name may be misspelt."""
    people = [
        f"{name}: {trained:,} pairs to train on, {measured:,} to measure"
        for name, (trained, measured) in of_forgotten(splits).items()
    ]
    measured = ", ".join(f"{len(pairs):,} {column}" for column, pairs in splits.columns.items())
    facts = [
        ("pairs", f"{len(splits.forget):,} forget and {len(splits.retain):,} retain to train on; measured: {measured}"),
        ("forgets", f"{len(people):,} of {len(splits.subjects):,} people"),
        *(("", line) for line in listed(people)),
        *(
            ("kept", f"{name!r}, nearly {forgotten!r}: if that is the same person, write both alike")
            for name, forgotten in nearly_forgotten(splits)
        ),
    ]
    return "\n".join(
        textwrap.fill(fact, _WIDTH, initial_indent=f"{name:{_INDENT}}", subsequent_indent=" " * _INDENT)
        for name, fact in facts
    )
