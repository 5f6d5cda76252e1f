from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vkd_framework

PACKAGE = Path(vkd_framework.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

FLOORS = (
    ("__init__", "errors", "types", "answers", "cache", "hookspecs", "methods", "intervals"),
    ("checkpoint", "progress", "ranks", "divided", "tiny", "recipe", "generic", "shelf", "encodings", "plugins"),
    (
        "data",
        "batches",
        "features",
        "frozen",
        "low_rank",
        "alignment",
        "external",
        "substitutes",
        "teachers",
        "losses",
        "output",
        "gradients",
        "saliency",
        "pruning",
    ),
    (
        *("teach", "forgetting", "objective", "simulated_attack", "unlearn", "evaluate", "relearn", "attacks"),
        *("retain_floor", "vanilla", "proofs", "probe"),
    ),
    ("report", "verdict", "layers_table", "doctor", "scaffold", "estimate", "machine"),
    ("run",),
    ("assess", "bench"),
    ("cli", "__main__"),
)
"""The rooms of each floor, from the ground up. A room imports its own floor and those below."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

ONLY_FOR = {"testing": {"cli"}}
"""Rooms on top of the tower, and the only ones that may import them."""

FAMILIES = (
    r"qwen|llava|internvl|idefics|smolvlm|perception_lm|paligemma|gemma|mllama|pixtral|aya_vision|glm4|got_ocr"
    r"|vision_tower|visual\.|merger|image_pad|multi_modal_projector"
)
"""What belongs into an adapter."""

EXCEPTIONS = {
    ("generic", "vision_tower"): "the names that most families give their encoder",
    ("data.jsonl", "<|image_pad|>"): "every family's image tokens are kept out of questions",
}


def imports_of(path: Path) -> Iterator[str]:
    """What a file imports anywhere, type-checking blocks included; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    """The room that an imported dotted name leads to."""
    rest = module.removeprefix("vkd_framework").lstrip(".").split(".")[0]
    return rest if rest in {name.split(".")[0] for name in MODULES} else "__init__"


def test_every_room_has_a_floor() -> None:
    rooms = {name.split(".")[0] for name in MODULES} - set(ONLY_FOR)
    assert rooms == set(FLOOR)


def test_the_contributors_page_shows_the_floors_as_they_are() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {
        int(floor): tuple(re.findall(r"`(\w+)`", rooms))
        for floor, rooms in re.findall(r"^\| (\d) \| (.*) \|$", page, re.M)
    }
    assert shown == dict(enumerate(FLOORS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    room = module.split(".")[0]
    own = [name for name in imports_of(MODULES[module]) if name.split(".")[0] == "vkd_framework"]
    rooms = {room_of(name) for name in own} - {room}
    assert not {name for name in rooms if name in ONLY_FOR and room not in ONLY_FOR[name]}
    if room not in ONLY_FOR:
        upward = {name for name in rooms - set(ONLY_FOR) if FLOOR[name] > FLOOR[room]}
        assert not upward, f"{module} must not know {', '.join(sorted(upward))}"


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    needs = {room: set[str]() for room in {*FLOOR, *ONLY_FOR}}
    for module, path in MODULES.items():
        room = module.split(".")[0]
        if room in needs:
            names = [name for name in imports_of(path) if name.split(".")[0] == "vkd_framework"]
            needs[room] |= {room_of(name) for name in names} - {room, "__init__"}
    while free := [room for room, needed in needs.items() if not needed]:
        for room in free:
            del needs[room]
        needs = {room: needed - set(free) for room, needed in needs.items()}
    assert not needs


@pytest.mark.parametrize("module", MODULES)
def test_the_framework_never_imports_the_adapters(module: str) -> None:
    assert not [name for name in imports_of(MODULES[module]) if name.split(".")[0] == "vkd_adapters"]
    assert "import vkd_adapters" not in MODULES[module].read_text(encoding="utf-8")


def code_of(path: Path) -> Iterator[str]:
    """Every name and text constant of a file; docstrings, which may give examples, are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


@pytest.mark.parametrize("module", MODULES)
def test_no_family_is_known_to_the_framework(module: str) -> None:
    known = {text for text in code_of(MODULES[module]) if re.search(FAMILIES, text.lower())}
    assert {text for text in known if (module, text) not in EXCEPTIONS} == set()


def test_no_exception_is_left_over() -> None:
    assert [key for key in EXCEPTIONS if key[1] not in set(code_of(MODULES[key[0]]))] == []


@pytest.mark.parametrize(
    "command",
    [
        "import vkd_framework.cli",
        "from vkd_framework.plugins import load_adapter; load_adapter('qwen_vl').presets",
        "from vkd_framework.recipe import load_recipe; load_recipe('qwen2vl_celeb')",
        "from vkd_framework.layers_table import all_presets; all_presets()",
        "from vkd_framework.cli import main; main(['methods'], standalone_mode=False)",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(command: str) -> None:
    check = "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {command}; {check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
