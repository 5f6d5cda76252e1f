"""From a file or a name to a recipe: find, read, anchor paths, apply `--set`, validate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vkd_framework.errors import RecipeError, on_one_line
from vkd_framework.recipe.for_methods import wrong_entry
from vkd_framework.recipe.messages import SCHEMA, nearest, one_line
from vkd_framework.recipe.once import read_yaml
from vkd_framework.recipe.overrides import Override, overridden, parsed
from vkd_framework.recipe.unread import unread
from vkd_framework.recipe.whole import Recipe


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package: inside the wheel, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        files = sorted(folder.glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def find_recipe(reference: str) -> Path:
    """The file behind a path or the name of a bundled recipe. Raises RecipeError when there is none."""
    path = Path(reference)
    if os.path.isfile(path):  # False for a name that is too long, where Path.is_file raises
        return path
    bundled = bundled_recipes()
    if path.stem in bundled and path.suffix in ("", ".yaml", ".yml"):
        return bundled[path.stem]
    raise RecipeError(
        f"{reference}: no such recipe file{nearest(path.stem, bundled)}; "
        "`vkd recipes list` shows the ones that come with vkd"
    )


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe. Raises RecipeError with one line that names the place and the mend."""
    recipe, without_effect = _loaded(reference, overrides)
    for where, reason in without_effect.items():
        raise RecipeError(f"{where}: {reason}; {SCHEMA}")
    return recipe


def overrides_without_effect(reference: str, overrides: Sequence[str]) -> dict[str, str]:
    """Those of the overrides that the recipe they make does not read, and why. Raises RecipeError as `load_recipe`."""
    reasons = _loaded(reference, overrides)[1]
    return {override: reasons[where] for override in overrides if (where := f"--set {override}") in reasons}


def _loaded(reference: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe, and which of its settings it does not read: where they are from, and why."""
    path = find_recipe(reference)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {on_one_line(error)}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        holds = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this file holds {holds}; {SCHEMA}")
    given = [parsed(override) for override in overrides]
    kind = _kind_of_data(raw, given)
    _anchor_paths(raw, path.resolve().parent)
    given = [override.changed(lambda tree: _anchor_paths(tree, Path.cwd(), kind)) for override in given]
    for override in given:
        if override.path[0] == "for_methods":
            override.apply(raw)
    if problem := wrong_entry(raw, Recipe):
        raise RecipeError(f"{path}: {problem}; {SCHEMA}")
    whole = overridden(raw, [override for override in given if override.path[0] != "for_methods"])
    try:
        recipe = Recipe.model_validate(whole)
    except ValidationError as error:
        raise RecipeError(f"{path}: {one_line(error, whole, Recipe)}") from None
    entry = (raw.get("for_methods") or {}).get(recipe.method, {})
    # A run's recipe.yaml spells out everything, also what nothing reads.
    resolved = raw.keys() >= Recipe.model_fields.keys() - {"for_methods"}
    body = [] if resolved else [(str(path), raw)]
    over = [(f"{path}: for_methods.{recipe.method}", entry)]
    return recipe, unread(recipe, body, [over, [(f"--set {override.text}", override.tree) for override in given]])


def _kind_of_data(raw: dict[str, Any], overrides: Sequence[Override]) -> Any:
    """`data.kind` as the overrides leave it."""
    sections = [tree.get("data") for tree in (raw, *(override.tree for override in overrides))]
    return next((data["kind"] for data in reversed(sections) if isinstance(data, dict) and "kind" in data), "jsonl")


def _anchor_paths(raw: dict[str, Any], folder: Path, kind: Any = "jsonl") -> None:
    """Relative paths written in a recipe are relative to the recipe; those given by --set, to the working folder.

    `kind` is that of a data section that does not name its own.
    """
    data = raw.get("data")
    if isinstance(data, dict) and data.get("kind", kind) == "jsonl":
        for key in ("rows", "images", "forget"):
            if isinstance(data.get(key), str):
                data[key] = str(folder / data[key])
    entries = raw.get("for_methods")
    entries = list(entries.values()) if isinstance(entries, dict) else []
    theirs = [entry.get("teacher") for entry in entries if isinstance(entry, dict)]
    for section in (data, raw.get("model"), raw.get("teacher"), *theirs):
        if isinstance(section, dict) and str(section.get("source", "")).startswith(("./", "../")):
            section["source"] = str((folder / section["source"]).resolve())
