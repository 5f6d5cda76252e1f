"""YAML in which no key is given twice: plain YAML takes the last of them and says nothing."""

from __future__ import annotations

from typing import Any

import yaml

from vkd_framework.errors import RecipeError


class _Loader(yaml.SafeLoader):
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


def read_yaml(text: str) -> Any:
    """The value that `text` stands for. Raises RecipeError for a key that is given twice, else as yaml does."""
    return yaml.load(text, _Loader)
