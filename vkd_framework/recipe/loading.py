"""From a file or a name to a recipe: find, read, anchor paths, apply `--set`, validate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vkd_framework import methods
from vkd_framework.errors import RecipeError
from vkd_framework.recipe.messages import nearest, one_line
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
    if path.is_file():
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
    path = find_recipe(reference)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this file holds {type(raw).__name__}")
    _anchor_paths(raw, path.resolve().parent)
    raw = methods.fill(raw)
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}: {one_line(error, raw, Recipe)}") from None


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Relative paths written in a recipe are relative to the recipe; those given by --set, to the working folder."""
    data, model, teacher = raw.get("data"), raw.get("model"), raw.get("teacher")
    if isinstance(data, dict):
        for key in ("rows", "images", "forget"):
            if isinstance(data.get(key), str):
                data[key] = str(folder / data[key])
    for section in (data, model, teacher):
        if isinstance(section, dict) and str(section.get("source", "")).startswith(("./", "../")):
            section["source"] = str((folder / section["source"]).resolve())


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write it as key=value, for example --set losses.repel.weight=0")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML; quote it, or write a list as [a, b]"
        ) from None
    *parents, last = key.strip().split(".")
    place: Any = raw
    for name in parents:
        place = place.setdefault(name, {}) if isinstance(place, dict) else _item(place, name, override)
        if place is None:
            raise RecipeError(f"--set {override}: {name!r} is switched off in the recipe; set the whole of it instead")
    if place is raw and last == "method" and value != raw.get("method", methods.DEFAULT):
        methods.switch(raw, value)
        raw.update(methods.fill(raw))
    elif isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list):
        _item(place, last, override)
        place[int(last)] = value
    else:
        raise RecipeError(f"--set {override}: {'.'.join(parents)!r} is a plain value and has no {last!r}")


def _item(place: Any, name: str, override: str) -> Any:
    if not isinstance(place, list):
        raise RecipeError(f"--set {override}: there is nothing below a plain value to set {name!r} in")
    if not name.isdigit() or int(name) >= len(place):
        raise RecipeError(f"--set {override}: {name!r} is not an index of a list of {len(place)}")
    return place[int(name)]
