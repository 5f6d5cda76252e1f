"""Settings that were given although the kind, form or weight beside them reads none of them: they would change nothing.

Which goes with which stands in the types of the sections, as `ReadWith` and as what `Section` says of a `weight`.
`layers` is not among them: a recipe's layers are looked up in its model for every method, so that a recipe for another
model has to give them, whoever reads them then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from vkd_framework.recipe.sections import ReadWith, Section
from vkd_framework.recipe.whole import Recipe

Given = Sequence[tuple[str, Mapping[str, Any]]]
"""Where settings are from, and the settings as sections."""


def unread(recipe: Recipe, levels: Sequence[Given]) -> dict[str, str]:
    """Where a setting is from -> why it changes nothing. `levels` are what was given, the later over the earlier.

    What a later level makes unread is no mistake of an earlier one, and neither is a default that is spelt out.
    """
    found: dict[str, str] = {}
    for key, decider, values in _rules(type(recipe)):
        actual = _value(recipe, decider)
        if actual in values or (not values and actual):
            continue
        deciding = max(
            (at for at, level in enumerate(levels) if any(_has(tree, decider) for _, tree in level)), default=0
        )
        for where, tree in (one for level in levels[deciding:] for one in level):
            if _has(tree, key) and _value(recipe, key) != _default(recipe, key):
                wanted = f"{decider}: {' or '.join(values)}" if values else f"{decider} above 0"
                is_now = "null" if actual is None else actual
                found.setdefault(
                    where, f"{key} goes with {wanted}, and it is {is_now} here; set that, or leave {key} out"
                )
    return found


def _rules(section: type[Section], within: str = "") -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Key, the key that decides whether it is read, and its values with which it is; `()` is any but 0 and null."""
    for name, field in section.model_fields.items():
        key = within + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _rules(field.annotation, f"{key}.")
        for mark in field.metadata:
            if isinstance(mark, ReadWith):
                yield key, within * (mark.key in section.model_fields) + mark.key, mark.values
        if "weight" in section.model_fields and name != "weight":
            yield key, f"{within}weight", ()


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _value(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


def _default(recipe: Recipe, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return type(_value(recipe, section)).model_fields[name].default
