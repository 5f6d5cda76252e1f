"""What `--set` changes, and how it goes together with the method's values and `for_methods`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import yaml

from vkd_framework import methods
from vkd_framework.errors import RecipeError
from vkd_framework.recipe.once import read_yaml


@dataclass(frozen=True)
class Override:
    """One `--set`: the text as it was given, the path of its key, its value."""

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def tree(self) -> Any:
        """The value within the sections that lead to it."""
        return reduce(lambda below, name: {name: below}, reversed(self.path), self.value)

    def apply(self, raw: dict[str, Any]) -> None:
        """Set the value in `raw`. Raises RecipeError where the path leads nowhere."""
        *parents, last = self.path
        place: Any = raw
        for name, below in zip(parents, self.path[1:], strict=True):
            if isinstance(place, dict) and name not in place and below.isdigit():
                raise RecipeError(
                    f"--set {self.text}: the recipe has no list {name!r} yet; set the whole of it instead"
                )
            place = place.setdefault(name, {}) if isinstance(place, dict) else self._item(place, name)
            if place is None:
                raise RecipeError(
                    f"--set {self.text}: {name!r} is switched off in the recipe; set the whole of it instead"
                )
        if isinstance(place, dict):
            place[last] = self.value
        elif isinstance(place, list):
            self._item(place, last)
            place[int(last)] = self.value
        else:
            raise RecipeError(f"--set {self.text}: {'.'.join(parents)!r} is a plain value and has no {last!r}")

    def changed(self, change: Callable[[dict[str, Any]], None]) -> Override:
        """The override with the value that `change` makes of it in its `tree`."""
        tree = deepcopy(self.tree)
        change(tree)
        return replace(self, value=reduce(lambda place, name: place[name], self.path, tree))

    def _item(self, place: Any, name: str) -> Any:
        if not isinstance(place, list):
            raise RecipeError(f"--set {self.text}: there is nothing below a plain value to set {name!r} in")
        if not name.isdigit() or int(name) >= len(place):
            raise RecipeError(f"--set {self.text}: {name!r} is not an index of a list of {len(place)}")
        return place[int(name)]


def parsed(text: str) -> Override:
    """`a.b=c` as a path and a YAML value. Raises RecipeError when it is not written so."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: write it as key=value, for example --set losses.repel.weight=0")
    try:
        return Override(text, tuple(key.strip().split(".")), read_yaml(value))
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"--set {text}: the value is not valid YAML; quote it, or write a list as [a, b]") from None
    except RecipeError as error:
        raise RecipeError(f"--set {text}: {error}") from None


def overridden(raw: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """`raw` with the last method that is set, filled in by it and by `for_methods`, and the overrides over that.

    Setting another method takes back what belongs to a method, in `raw` and in the overrides before it. Nothing else
    changes in `raw`.
    """
    method, switched = raw.get("method", methods.DEFAULT), 0
    for position, override in enumerate(overrides):
        if override.path == ("method",) and override.value != method:
            method, switched = override.value, position
    if method != raw.get("method", methods.DEFAULT):
        methods.switch(raw, method)
    filled = deepcopy(methods.fill(raw))
    kept = [left for override in overrides[:switched] for left in _without_the_methods_own(override)]
    for override in (*kept, *overrides[switched:]):
        if override.path != ("method",):
            override.apply(filled)
    return filled


def _without_the_methods_own(override: Override) -> list[Override]:
    """The override without what belongs to a method; nothing when all of it does."""
    tree = deepcopy(override.tree)
    methods.take_out(tree)
    for name in override.path:
        if not isinstance(tree, dict) or name not in tree:
            return []
        tree = tree[name]
    return [Override(override.text, override.path, tree)]
