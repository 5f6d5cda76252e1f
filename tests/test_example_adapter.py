"""The package in examples/third_party_adapter. That it installs and runs is checked by `.ci/run`."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from pathlib import Path

import pytest

from vkd_framework import hookspecs
from vkd_framework.plugins import Adapter
from vkd_framework.recipe import load_recipe
from vkd_framework.testing import assert_conforms

EXAMPLE = Path(__file__).parent.parent / "examples" / "third_party_adapter"
MODULE = EXAMPLE / "vkd_perception_lm.py"
PUBLIC = {f"vkd_framework.{name}" for name in ("errors", "generic", "hookspecs", "tiny", "types")}


def adapter() -> Adapter:
    spec = importlib.util.spec_from_file_location("vkd_perception_lm", MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Adapter("perception_lm", module)


def test_it_conforms() -> None:
    pytest.importorskip("timm", reason="PerceptionLM's tower is a timm model; ends with `pip install -e .[dev]`")
    assert_conforms(adapter())


def test_it_uses_public_things_only() -> None:
    used: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(MODULE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vkd_framework"):
            for alias in node.names:
                place = f"{node.module}.{alias.name}" if node.module == "vkd_framework" else node.module
                used.setdefault(place, []).append(alias.name)
    assert set(used) <= PUBLIC
    assert not [name for names in used.values() for name in names if name.startswith("_")]


def test_it_implements_no_more_hooks_than_its_readme_explains() -> None:
    hooks = set(adapter().hooks)
    assert hooks <= {name for name in vars(hookspecs) if name.startswith("vkd_")}
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert {hook for hook in hooks if f"`{hook}`" not in readme} == {"vkd_model_types"}
    assert f"{['no', 'one', 'two', 'three', 'four', 'five'][len(hooks)]} hooks" in readme


def test_its_recipe_and_its_entry_point_name_it() -> None:
    assert load_recipe(str(EXAMPLE / "perception_lm_celeb.yaml")).adapter == "perception_lm"
    settings = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["entry-points"] == {"vkd_framework": {"perception_lm": MODULE.stem}}
