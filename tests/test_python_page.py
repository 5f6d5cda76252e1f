"""docs/python.md, replayed on a small recipe: what a reader types, in order."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CAST

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
SMALL = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST,
    "teach": {"steps": 2, "batch_size": 4},
    "reference": "retain_only",
    "layers": ["vision.1", "projector"],
    "unlearn": {"steps": 1, "forget_batch": 2, "retain_batch": 2},
    "evaluate": {"max_new_tokens": 2},
    "relearn": {"shares": [1.0], "steps": [1], "batch_size": 2, "scopes": ["visual"]},
}


@pytest.mark.slow
def test_what_the_page_says_runs_and_only_the_visual_modules_of_its_student_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))
    for written, replayed in (('"qwen2vl_celeb"', '"small.yaml"'), ("range(300)", "range(2)")):
        assert written in code
        code = code.replace(written, replayed)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), names)

    before, after = (dict(names[one].model.named_parameters()) for one in ("teacher", "student"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert moved <= set(names["weights"])
    assert names["columns"]["models"].keys() == {"vanilla", "retain_only", "unlearned"}
    assert names["relearned"]["advantage_over_retain_only"] is not None
    assert names["columns"]["verdict"]["sentence"] in capsys.readouterr().out


PIECES = re.findall(r"`(\w+\.\w+)", PAGE.partition("## The pieces")[2])


@pytest.mark.parametrize("piece", [piece for piece in PIECES if not piece.startswith("mllm.")])
def test_a_piece_is_where_the_page_says(piece: str) -> None:
    module, _, name = piece.partition(".")
    assert hasattr(importlib.import_module(f"vkd_framework.{module}"), name)
