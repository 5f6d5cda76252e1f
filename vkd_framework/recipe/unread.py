"""Settings that were given although the kind, form or weight beside them reads none of them: they would change nothing.

Which goes with which stands in the types of the sections, as `ReadWith` and as what `Section` says of a `weight`.
The body of a recipe says how to tune for every method, so that its own does not tune makes no mistake of that.
`layers` is not among them: a recipe's layers are looked up in its model for every method, so that a recipe for another
model has to give them, whoever reads them then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from vkd_framework.recipe.sections import TUNING, ReadWith, Section
from vkd_framework.recipe.whole import Recipe

Given = Sequence[tuple[str, Mapping[str, Any]]]
"""Where settings are from, and the settings as sections."""


def unread(recipe: Recipe, body: Given, levels: Sequence[Given]) -> dict[str, str]:
    """Where a setting is from -> why it changes nothing. Given were a recipe's body, and over it the `levels` in order.

    What a later level makes unread is no mistake of an earlier one, and neither is a default that is spelt out.
    """
    found: dict[str, str] = {}
    levels = [body, *levels]
    for key, decider, values in _rules(type(recipe)):
        actual = _value(recipe, decider)
        several = actual if isinstance(actual, tuple) else (actual,)
        if not {*several}.isdisjoint(values) or (not values and actual):
            continue
        deciding = max(
            (at for at, level in enumerate(levels) if any(_has(tree, decider) for _, tree in level)),
            default=int((decider, values) == (TUNING.key, TUNING.values)),
        )
        for where, tree in (one for level in levels[deciding:] for one in level):
            if _has(tree, key) and _value(recipe, key) != _default(recipe, key):
                wanted = f"{decider}: {' or '.join(values)}" if values else f"{decider} above 0"
                is_now = "null" if actual is None else " and ".join(map(str, several))
                found.setdefault(
                    where, f"{key} goes with {wanted}, and it is {is_now} here; set that, or leave {key} out"
                )
    return found


Condition = tuple[str, tuple[str, ...]]
"""The key that decides whether a setting is read, and its values with which it is; `()` is any but 0 and null."""


def _rules(
    section: type[Section], within: str = "", of_all: Sequence[Condition] = ()
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Key and condition, of each setting that has one; a setting has those `of_all` its section too."""
    for name, field in section.model_fields.items():
        key, conditions = within + name, list(of_all)
        for mark in field.metadata:
            if isinstance(mark, ReadWith):
                conditions.append((within * (mark.key in section.model_fields) + mark.key, mark.values))
        if "weight" in section.model_fields and name != "weight":
            conditions.append((f"{within}weight", ()))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _rules(field.annotation, f"{key}.", conditions)
        else:
            yield from ((key, *condition) for condition in conditions)


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
