"""The entries of `for_methods`: recipe values for one method each, checked whichever method is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ValidationError

from vkd_framework import methods
from vkd_framework.recipe.messages import described, nearest

SETTABLE = (
    *("procedure", "train", "layers", "teacher", "losses", "mask", "prune", "unlearn"),
    "simulated_attack",
)
"""What an entry may set: how is forgotten. Data, teaching, evaluation and attacks are the same for all methods."""


def wrong_entry(raw: Mapping[str, Any], whole: type[BaseModel]) -> str | None:
    """What is wrong with the first entry that is not valid, in words; `whole` is the recipe's class.

    An entry is laid over the recipe of its method and validated there. What is wrong with the rest of that recipe is
    passed over: it is told when the method is run.
    """
    entries = raw.get("for_methods", {})
    if not isinstance(entries, Mapping):
        return "for_methods: write names of methods, and below each its recipe values"
    for method, values in entries.items():
        place = f"for_methods.{method}"
        if method not in methods.METHODS:
            known = ", ".join(methods.METHODS)
            return f"{place}: there is no such method{nearest(str(method), methods.METHODS)}; there are {known}"
        if not isinstance(values, Mapping):
            return f"{place}: write recipe values here, such as {{unlearn: {{steps: 60}}}} (given: {values!r})"
        for key in values:
            if key not in SETTABLE and key in whole.model_fields:
                return f"{place}.{key}: the same for all methods; set it for the recipe, or here {', '.join(SETTABLE)}"
        if problem := _problem(raw, method, values, whole):
            return f"{place}.{problem}"
    return None


def _problem(raw: Mapping[str, Any], method: str, values: Mapping[str, Any], whole: type[BaseModel]) -> str | None:
    candidate = deepcopy(dict(raw))
    if method != candidate.get("method", methods.DEFAULT):
        methods.switch(candidate, method)
    candidate = methods.fill(candidate | {"for_methods": {method: deepcopy(dict(values))}})
    try:
        whole.model_validate(candidate)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if _inside(problem["loc"], values):
                return described(problem, candidate, whole)
    return None


def _inside(location: Sequence[int | str], values: Mapping[str, Any]) -> bool:
    """Whether a place in the recipe was written by an entry, as far as two keys tell."""
    if not location or location[0] not in values:
        return False
    section = values[str(location[0])]
    return len(location) == 1 or not isinstance(section, Mapping) or location[1] in section
