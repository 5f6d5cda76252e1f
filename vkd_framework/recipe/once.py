"""YAML in which no key is given twice, and no number is read as another.

Plain YAML takes the last of two keys, 010 for 8 and 1:30 for 90, and says nothing.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from vkd_framework.errors import RecipeError

_OCTAL = re.compile(r"[-+]?0[0-7_]+")


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._within: list[str] = []
        """The keys that lead to what is composed, "" for what has none."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._within.append(str(index.value) if isinstance(index, yaml.ScalarNode) else "")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and (problem := self._misread(node)):
            key = ".".join(filter(None, self._within))
            raise RecipeError(f"line {node.start_mark.line + 1}: {key}{': ' if key else ''}{problem}")
        self._within.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where dicts are made: by then `<<` has put the keys of others among the mapping's own.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise RecipeError(f"line {line}: {name!r} is given already, on line {lines[name]}; keep one of them")
            lines[name] = line
        return node

    def _misread(self, node: yaml.ScalarNode) -> str | None:
        """How YAML reads a number that is not written in decimals, and what to write; None for anything else."""
        written = node.value
        if node.tag == "tag:yaml.org,2002:int" and _OCTAL.fullmatch(written):
            octal, decimal = self.construct_yaml_int(node), int(written.replace("_", ""))
            meant = " or ".join(map(str, dict.fromkeys((decimal, octal))))
            return f"YAML reads {written} with its leading 0 as {octal}; write {meant}, or '{written}' for a text"
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in written:
            number = self.construct_object(node)
            return f"YAML reads {written} as {number}, in sixties; write {number}, or '{written}' for a text"
        return None


def read_yaml(text: str) -> Any:
    """The value that `text` stands for.

    Raises RecipeError for a key that is given twice and for a number read as another, else as yaml does.
    """
    return yaml.load(text, _Loader)
