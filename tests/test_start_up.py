"""What a command imports before it does anything: start-up takes as long as that, whatever the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELP = """
import sys
import click
from vkd_framework.cli import main

def commands(group, path):
    for name, command in group.commands.items():
        yield [*path, name]
        if isinstance(command, click.Group):
            yield from commands(command, [*path, name])

asked = [[], *commands(main, [])]
assert len(asked) > 12, asked
for path in asked:
    main([*path, "--help"], standalone_mode=False)
    heavy = {"torch", "transformers", "pydantic", "numpy", "PIL", "yaml", "pluggy"} & set(sys.modules)
    assert not heavy, (path, heavy)
"""


def test_no_help_text_imports_more_than_the_command_line_itself() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--version"], {"pydantic", "numpy", "torch", "transformers"}),
        (["recipes", "list"], {"numpy", "torch", "transformers"}),
        (["recipes", "schema"], {"numpy", "torch", "transformers"}),
        (["recipes", "validate", "qwen2vl_celeb"], {"numpy", "torch", "transformers"}),
        (["adapters"], {"numpy", "torch", "transformers"}),
        (["methods"], {"pydantic", "numpy", "torch", "transformers"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_light_command_imports_nothing_heavy(command: list[str], heavy: set[str]) -> None:
    asked = f"import sys; from vkd_framework.cli import main; main({command!r}, standalone_mode=False)"
    check = f"found = {heavy!r} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", f"{asked}; {check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
