"""docs/writing_an_adapter.md, replayed: its commands in order, what they print, and the code that the reader writes."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

PAGE = Path(__file__).parent.parent / "docs" / "writing_an_adapter.md"
STEP = re.compile(
    r"^<!-- (?P<edit>remove|append): (?:(?P<hook>\w+) in )?(?P<file>\S+) -->$"
    r"|^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        transformers.__version__.startswith("4."),
        reason="the page shows what transformers 5 prints; ends with the support of transformers 4",
    ),
]


class Reader:
    """Somebody who does what the page says, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder / "work", folder / "site"
        self.folder.mkdir()
        # Where pip would make an editable install, the package's folder is on the path and its metadata beside it.
        self.path = [str(self.site)]

    def run(self, command: str) -> str:
        """What a command prints on a pipe, progress left out."""
        words = shlex.split(command)
        if words[0] == "pip":
            return self.install(words[-1])
        python = {"vkd": ["-m", "vkd_framework"]}[words[0]]
        done = subprocess.run(
            [sys.executable, *python, *words[1:]],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*self.path, *sys.path])},
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def install(self, package: str) -> str:
        """As `pip install -e` would, but not into the environment that runs the tests."""
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(self.site)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, f"./{package}"],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        for copy in self.site.glob("*.py"):
            copy.unlink()
        self.path.append(str(self.folder / package))
        return ""

    def remove(self, hook: str, file: str) -> None:
        """Take a hook, decorator included, out of a module."""
        path = self.folder / file
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (function,) = (node for node in ast.parse("".join(lines)).body if getattr(node, "name", "") == hook)
        assert isinstance(function, ast.FunctionDef)
        del lines[function.decorator_list[0].lineno - 1 : function.end_lineno]
        path.write_text("".join(lines), encoding="utf-8")

    def append(self, text: str, file: str) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as module:
            module.write(f"\n\n{text}")


def shown(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that the page shows below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def agrees(page: list[str], printed: list[str]) -> bool:
    """Whether output is what the page shows; `...` stands for any lines, and one number for another."""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(_plain(line)) + r"\n" for line in page)
    return re.fullmatch(pattern, "".join(f"{_plain(line)}\n" for line in printed)) is not None


def _plain(line: str) -> str:
    return " ".join(NUMBER.sub("0", line).split())


def test_the_page_can_be_followed_to_the_letter(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    edit: re.Match[str] | None = None
    commands = 0
    for step in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        if step["edit"] == "remove":
            reader.remove(step["hook"], step["file"])
        elif step["edit"] == "append":
            edit = step
        elif edit is not None:
            reader.append(step["body"], edit["file"])
            edit = None
        elif step["language"] == "console":
            for command, page in shown(step["body"]):
                printed = reader.run(command).splitlines()
                assert agrees(page, printed), f"{command}\nprinted:\n" + "\n".join(printed)
                commands += 1
    assert commands == 8


def test_what_the_page_quotes_from_the_written_package_is_in_it(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.run("vkd new-adapter vipllava --model-type vipllava")
    written = {path.name: path.read_text(encoding="utf-8") for path in reader.folder.rglob("*") if path.is_file()}
    quoted = {step["language"]: step["body"] for step in reversed([*STEP.finditer(PAGE.read_text(encoding="utf-8"))])}
    assert quoted["toml"] in written["pyproject.toml"]
    assert quoted["yaml"].strip() in written["vipllava_celeb.yaml"]
    assert quoted["python"].removesuffix("    ...\n") in written["vkd_adapter_vipllava.py"]


@pytest.mark.parametrize(
    ("page", "printed", "same"),
    [
        (["a 1", "..."], ["a 22,5", "b"], True),
        (["...", "b"], ["a", "b"], True),
        (["a"], ["a", "b"], False),
        (["a 1"], ["b 1"], False),
        ([], ["a"], False),
    ],
)
def test_outputs_are_compared_line_by_line(page: list[str], printed: list[str], same: bool) -> None:
    assert agrees(page, printed) is same
