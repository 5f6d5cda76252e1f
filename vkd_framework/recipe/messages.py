"""What is wrong with a recipe, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vkd_framework.recipe.attacks import ATTACK_KINDS
from vkd_framework.recipe.data import DATA_KINDS, CelebsData

SCHEMA = "`vkd recipes schema` lists every key"


def nearest(given: str, allowed: Mapping[str, Any] | Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no allowed name is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: ValidationError, raw: Mapping[str, Any], whole: type[BaseModel]) -> str:
    """The first problem in words, with the number of further ones; `whole` is the class that `raw` did not fit."""
    problems = error.errors(include_url=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{described(problems[0], raw, whole)}{more}; {SCHEMA}"


def described(problem: ErrorDetails, raw: Mapping[str, Any], whole: type[BaseModel]) -> str:
    """Where a problem is, what it is and what was given."""
    kinds = ATTACK_KINDS if problem["loc"][:1] == ("attacks",) else DATA_KINDS
    location = [str(part) for part in problem["loc"] if part not in kinds]
    place = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(location[-1], _allowed_keys(location[:-1], raw, whole))}"
    if problem["type"] == "missing":
        return f"{place}: missing, but required"
    if problem["type"] == "union_tag_not_found":
        *others, last = map(repr, kinds)
        return f"{place}: kind is missing; it is {', '.join(others)} or {last}"
    given = problem.get("input")
    plain = isinstance(given, str | int | float | bool | list | tuple) or given is None
    text = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {text[0].lower()}{text[1:]}{f' (given: {given!r})' if plain else ''}"


def _allowed_keys(location: Sequence[str], raw: Mapping[str, Any], section: type[BaseModel]) -> list[str]:
    """The keys of what stands at `location` below `section`."""
    if location and location[0] == "data":
        kind = raw.get("data", {}).get("kind")
        return list(DATA_KINDS.get(kind, CelebsData).model_fields)
    if location and location[0] == "attacks":
        return list(ATTACK_KINDS[raw["attacks"][int(location[1])]["kind"]].model_fields)
    for name in location:
        if name.isdigit():
            continue
        candidates = [*_models_in(section.model_fields[name].annotation)] if name in section.model_fields else []
        if not candidates:
            return []
        section = candidates[0]
    return list(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
