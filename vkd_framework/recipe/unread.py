"""Settings that were given although the kind, form or weight beside them reads none of them: they would change nothing.

`layers` is not among them: a recipe's layers are looked up in its model for every method, so that a recipe for another
model has to give them, whoever reads them then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from vkd_framework.recipe.whole import Recipe

READ: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("mask.density", "mask.granularity", "mask.scope"), "mask.kind", ("ratio", "salun", "random")),
    (("mask.threshold", "mask.preserve"), "mask.kind", ("ratio",)),
    (("losses.forget_output.cap",), "losses.forget_output.form", ("capped_ascent",)),
    (("losses.forget_output.beta", "losses.forget_output.reference"), "losses.forget_output.form", ("npo",)),
    (("losses.forget_output.refusals",), "losses.forget_output.form", ("refusal",)),
    (("losses.repel.target", "losses.repel.cap"), "losses.repel.weight", ()),
    (("prune.share", "prune.pairs"), "procedure", ("prune",)),
    (("teacher.weights",), "teacher.kind", ("external",)),
)
"""Keys, the key that decides whether they are read, and its values with which they are; `()` is a weight above 0."""

Given = Sequence[tuple[str, Mapping[str, Any]]]
"""Where settings are from, and the settings as sections."""


def unread(recipe: Recipe, levels: Sequence[Given]) -> dict[str, str]:
    """Where a setting is from -> why it changes nothing. `levels` are what was given, the later over the earlier.

    What a later level makes unread is no mistake of an earlier one, and neither is a default that is spelt out.
    """
    found: dict[str, str] = {}
    for keys, decider, values in READ:
        actual = _value(recipe, decider)
        if actual in values or (not values and actual > 0):
            continue
        deciding = max(
            (at for at, level in enumerate(levels) if any(_has(tree, decider) for _, tree in level)), default=0
        )
        for key in keys:
            for where, tree in (one for level in levels[deciding:] for one in level):
                if _has(tree, key) and _value(recipe, key) != _default(recipe, key):
                    wanted = f"{decider}: {' or '.join(values)}" if values else f"a {decider} above 0"
                    found.setdefault(
                        where, f"{key} goes with {wanted}, and it is {actual} here; set that, or leave {key} out"
                    )
    return found


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
