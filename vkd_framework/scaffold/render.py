"""A package's files from their templates."""

from __future__ import annotations

import importlib.metadata
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vkd_framework.scaffold.shrink import END, PICTURE, Draft

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Findings:
    """What a trial found out about an architecture beyond its sizes."""

    modules: tuple[str, tuple[str, ...]] | None = None
    """Encoder and language model, where the generic plugin does not find them."""
    nested: tuple[str, ...] = ()
    """Modules of the projector that lie inside the encoder."""
    unread: int = 0
    """How many blocks at the end no answer depends on, where the generic plugin does not say so."""
    class_token: int = 0
    """Rows of a photo in a block, where the first of them is a class token."""
    tiles: bool = False
    """Whether a long photo becomes tiles, and the whole photo as one more."""
    zeros: tuple[str, ...] = ()
    """Weights that the family leaves at zero, for checkpoints to fill."""
    parts: tuple[tuple[str, str], ...] = ()
    """Module path -> what it is, for the docstring."""
    layers: tuple[str, ...] = ("vision.1", "projector")
    """For the recipe: the last blocks that the language model reads, and the projector."""


def environment() -> Environment:
    """Delimiters that chat templates do not use, because the rendered module holds one."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_adapter(draft: Draft, found: Findings, missing: str | None = None) -> str:
    """The adapter module; with `missing`, its tiny model raises that sentence."""
    needs_layers = bool(found.unread)
    functions = [
        *(["feature_grid"] if found.tiles else []),
        *(["feature_rows"] if found.class_token else []),
        *(["list_distillation_layers"] if needs_layers else []),
        *(["locate_vision_modules"] if found.nested else []),
    ]
    names = [
        *(["DistillationLayer"] if needs_layers or found.class_token or found.tiles else []),
        *(["FeatureGrid"] if found.tiles else []),
        *(["FeatureRows"] if found.class_token or found.tiles else []),
        *(["VisionModules"] if needs_layers or found.nested or found.modules else []),
    ]
    return (
        environment()
        .get_template("adapter.py.j2")
        .render(
            draft=draft,
            missing=missing,
            end=END,
            picture=PICTURE,
            nested=found.nested,
            modules=found.modules,
            unread=found.unread,
            rows=found.class_token,
            tiles=found.tiles,
            zeros=found.zeros,
            parts=found.parts,
            longest=max((len(path) for path, _ in found.parts), default=0),
            generic=functions,
            types=names,
            imports=sorted({draft.processor_class, *(cls for cls, _ in draft.parts.values())}),
            literal=literal,
            quoted=quoted,
            lines_of=lines_of,
            tuple_of=tuple_of,
        )
    )


def render_package(name: str, module: str, draft: Draft, found: Findings, missing: str | None) -> dict[str, str]:
    """Path -> contents of everything beside the adapter module."""
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"tests/test_{name}.py": "test_adapter.py.j2",
        f"{name}_celeb.yaml": "recipe.yaml.j2",
    }
    values = {
        "name": name,
        "module": module,
        "distribution": f"vkd-adapter-{name.replace('_', '-')}",
        "transformers_version": importlib.metadata.version("transformers"),
        "vkd_version": importlib.metadata.version("vkd-framework"),
        "draft": draft,
        "layers": found.layers,
        "missing": missing,
    }
    return {path: environment().get_template(template).render(values) for path, template in files.items()}


def literal(value: Any, indent: int) -> str:
    """Python source for a value, as ruff would format it: one line when it fits, else one item a line."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        items = [f"{literal(key, indent)}: {literal(item, indent + 4)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, (list, tuple)):
        items = [literal(item, indent + 4) for item in value]
        opening, closing = "[", "]"
    else:
        return repr(value)
    line = f"{opening}{', '.join(items)}{closing}"
    if len(line) + indent < 95 and "\n" not in line:
        return line
    space = " " * (indent + 4)
    return f"{opening}\n" + "".join(f"{space}{item},\n" for item in items) + " " * indent + closing


def quoted(text: str) -> str:
    """A Python string in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def lines_of(text: str, indent: int) -> str:
    """A Python string in as many lines as it takes, each indented like the first."""
    lines = textwrap.wrap(text, 110 - indent, drop_whitespace=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(map(quoted, lines))


def tuple_of(names: Sequence[str]) -> str:
    """A Python tuple of strings."""
    return "(" + ", ".join(quoted(name) for name in names) + ("," if len(names) == 1 else "") + ")"
