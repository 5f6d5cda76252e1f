"""What is wrong with a recipe, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml
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
    first, *others = dict.fromkeys(described(problem, raw, whole) for problem in problems)
    more = f" (and {len(others)} more)" if others else ""
    return f"{first}{more}; {SCHEMA}"


def described(problem: ErrorDetails, raw: Mapping[str, Any], whole: type[BaseModel]) -> str:
    """Where a problem is, what it is and what was given."""
    kinds = ATTACK_KINDS if problem["loc"][:1] == ("attacks",) else DATA_KINDS
    location = _location(problem)
    place = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(location[-1], _allowed_keys(location[:-1], raw, whole))}"
    if problem["type"] == "missing":
        return f"{place}: missing, but required"
    *others, last = map(repr, kinds)
    if problem["type"] == "union_tag_not_found":
        return f"{place}: kind is missing; it is {', '.join(others)} or {last}"
    if problem["type"] == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        return f"{place}.kind: should be {', '.join(others)} or {last}{nearest(tag, kinds)} (given: {tag!r})"
    given = problem.get("input")
    text = problem["msg"].removeprefix("Value error, ")
    if _of_several(problem):
        given = raw["data"][location[1]]
        text = f"should be {DATA_KINDS[raw['data']['kind']].model_fields[location[1]].description}"
        text += _as_a_list(location, given, raw, whole)
    elif problem["type"] == "tuple_type":
        text = f"should be a list{_as_a_list(location, given, raw, whole)}"
    elif problem["type"] == "model_type":
        text = f"should be a section of keys and values, such as {_allowed_keys(location, raw, whole)[0]}"
    elif problem["type"] == "string_pattern_mismatch":
        text = f"should be {_description(location, whole)}"
    elif problem["type"] == "literal_error" and isinstance(given, str):
        text += nearest(given, re.findall("'([^']+)'", problem["ctx"]["expected"]))
    plain = isinstance(given, str | int | float | bool | list | tuple) or given is None
    return f"{place}: {text[0].lower()}{text[1:]}{f' (given: {given!r})' if plain else ''}"


def _location(problem: ErrorDetails) -> list[str]:
    """The keys that lead to a problem, without the names that pydantic gives to the members of a union."""
    kinds = ATTACK_KINDS if problem["loc"][:1] == ("attacks",) else DATA_KINDS
    location = [str(part) for part in problem["loc"] if part not in kinds]
    return location[:2] if location[:1] == ["data"] else location


def _of_several(problem: ErrorDetails) -> bool:
    """Whether it is what one type has to say of several that a value may have: data sections alone have such keys."""
    return problem["loc"][:1] == ("data",) and len(problem["loc"]) > 3


def _as_a_list(location: Sequence[str], given: Any, raw: Mapping[str, Any], whole: type[BaseModel]) -> str:
    """How a value is written as a list with that value in it, where such a list is what is wanted."""
    candidate = deepcopy(dict(raw))
    place: Any = candidate
    for name in location[:-1]:
        place = place[int(name) if isinstance(place, list) else name]
    place[location[-1]] = [given]
    try:
        whole.model_validate(candidate)
    except ValidationError as error:
        if any(_location(problem)[: len(location)] == location for problem in error.errors(include_url=False)):
            return ""
    written = yaml.safe_dump([given], default_flow_style=True, allow_unicode=True, width=float("inf")).strip()
    return f"; write {written}, with --set '{'.'.join(location)}={written}'"


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


def _description(location: Sequence[str], section: type[BaseModel]) -> str | None:
    """What the schema says of the key at `location` below `section`."""
    *parents, last = location
    for name in parents:
        [section, *_] = _models_in(section.model_fields[name].annotation)
    return section.model_fields[last].description


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
