from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import CAST

from vkd_framework import relearn
from vkd_framework.bench.records import find
from vkd_framework.cache import CACHE_VARIABLE
from vkd_framework.cli import main
from vkd_framework.plugins import MLLM
from vkd_framework.report import relearn_table
from vkd_framework.types import Splits

pytestmark = pytest.mark.slow

RECIPE = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST,
    "teach": {"steps": 2, "batch_size": 4},
    "reference": "retain_only",
    "layers": ["projector"],
    "evaluate": {"max_new_tokens": 2},
    "attacks": [{"kind": "module_restore"}, {"kind": "membership"}, {"kind": "quantize"}],
    "relearn": {"shares": [1.0], "steps": [1, 2], "batch_size": 2, "scopes": ["visual"]},
}


ATTACKS = "attacks=[{kind: quantize}, {kind: module_restore}]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = tmp_path_factory.mktemp("assess")
    path = base / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(base / "cache"))
        yield str(path)


@pytest.fixture(scope="module")
def stranger(taught: MLLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that no run made, as somebody else would have saved it."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    taught.model.save_pretrained(folder)
    taught.processor.save_pretrained(folder)
    return str(folder)


def vkd(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def told(*arguments: str) -> dict[str, Any]:
    done = vkd(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_checkpoint_that_no_run_made_is_measured_as_in_a_run(
    recipe: str, stranger: str, splits: Splits, tmp_path: Path
) -> None:
    found = told("evaluate", stranger, "--recipe", recipe, "--out", str(tmp_path / "out"))
    assert set(found["models"]) == {"vanilla", "unlearned", "retain_only"}
    assert all(set(columns) == set(splits.columns) for columns in found["models"].values())
    kinds = [result["kind"] for result in found["attacks"] if result["model"] == "unlearned"]
    assert kinds == ["module_restore", "membership", "quantize"]
    assert found["over_forgotten"]["against"] == "retain_only"
    assert found["verdict"]["kind"] and "`vkd relearn` tries it" in found["verdict"]["reasons"][-1]
    kept = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert kept == {"model": stranger, **found}
    assert (tmp_path / "out" / "recipe.yaml").exists()


def test_alone_no_other_model_is_taught_or_measured(
    recipe: str, stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    done = vkd("evaluate", str(Path(stranger).parent), "--recipe", recipe, "--alone", "--set", ATTACKS)
    assert done.exit_code == 0, done.stderr
    assert "Test VQA" in done.stdout and "Weights rounded to 4 bits" in done.stdout
    assert "Vanilla" not in done.stdout and "Retain-only" not in done.stdout
    assert "orgotten:" not in done.stdout  # the verdict has nothing to go by
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not (tmp_path / "cache").exists()


def test_alone_an_attack_has_nothing_to_be_compared_with(recipe: str, stranger: str) -> None:
    only = ("--alone", "--set", "relearn.photos=[others]", "--set", "relearn.steps=[1]")
    curves = told("relearn", stranger, "--recipe", recipe, *only)
    assert curves["average_gap"] is None and curves["advantage_over_retain_only"] is None
    assert {curve["model"] for curve in curves["curves"]} == {"unlearned"}
    assert "Advantage over retain-only: no reference" in relearn_table(curves)


def test_what_was_measured_ends_with_what_it_says(recipe: str, stranger: str) -> None:
    done = vkd("evaluate", stranger, "--recipe", recipe)
    assert "\n\nNot forgotten: " in done.stdout
    done = vkd("relearn", stranger, "--recipe", recipe)
    assert "idden" in done.stdout.split("\n\n")[-1]


def test_a_checkpoint_is_attacked_as_in_a_run_and_the_reference_with_it(recipe: str, stranger: str) -> None:
    found = told("relearn", stranger, "--recipe", recipe)
    assert {(curve["model"], curve["pool"]) for curve in found["curves"]} == {
        (model, pool) for model in ("unlearned", "retain_only") for pool in ("known", "new", "others")
    }
    assert isinstance(found["average_gap"], float) and isinstance(found["advantage_over_retain_only"], float)
    low, high = found["advantage_interval_95"]
    assert low <= found["advantage_over_retain_only"] <= high
    lines = relearn_table(found).splitlines()
    assert "visual, the forget set, 100 %" in lines[1] and "Unlearned" in lines[1]
    assert "Retain-only" in lines[2] and "Advantage" in lines[3]
    assert "visual, new photos of the forgotten, 100 %" in lines[4]
    assert max(map(len, lines)) <= 100


WRONG: dict[str, tuple[list[str], str]] = {
    "no such model": (["evaluate", "nowhere"], "nowhere"),
    "a preset without weights": (["relearn", "Qwen/Qwen2-VL-7B-Instruct"], "cannot be loaded"),
    "a tiny model": (["evaluate", "tiny"], "give a folder or a hub id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_cannot_be_had_is_one_line_before_anything_is_taught(
    recipe: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    arguments, fragment = WRONG[case]
    done = vkd(*arguments, "--recipe", recipe)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1 and fragment in done.stderr
    assert not (tmp_path / "cache" / "taught").exists()


def test_a_model_of_another_family_is_refused(recipe: str, stranger: str) -> None:
    done = vkd("evaluate", stranger, "--recipe", "llava_celeb")
    assert done.exit_code == 2
    assert "'qwen2_vl'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_answers_and_attack_go_into_one_folder_and_are_compared_like_a_run(
    recipe: str, stranger: str, tmp_path: Path
) -> None:
    out = tmp_path / "theirs"
    found = told("relearn", stranger, "--recipe", recipe, "--out", str(out))
    for other in (("--set", "seed=1"), ("--alone",)):
        done = vkd("evaluate", stranger, "--recipe", recipe, "--out", str(out), *other)
        assert done.exit_code == 2 and "of the same model by the same recipe" in done.stderr
    evaluated = told("evaluate", stranger, "--recipe", recipe, "--out", str(out))
    assert vkd("evaluate", stranger, "--recipe", recipe, "--out", str(out)).exit_code == 2
    (record,) = find([out])
    assert record.method == "theirs" and record.metrics["models"] == evaluated["models"]
    assert record.metrics["relearn"]["curves"] == found["curves"]
    assert vkd("compare", str(out)).exit_code == 0


def test_an_attack_that_was_stopped_goes_on_in_its_folder(
    recipe: str, stranger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    whole = relearn.relearn

    def stopped_at_the_second(*args: Any, **options: Any) -> Any:
        made.append(options["what"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(relearn, "relearn", stopped_at_the_second)
    command = ("relearn", stranger, "--recipe", recipe, "--out", str(tmp_path / "out"))
    done = vkd(*command)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        1,
        "error: stopped; with --out, the same command goes on",
    )
    other = vkd(*command, "--set", "seed=1")
    assert other.exit_code == 2 and "where this command was stopped" in other.stderr
    assert told(*command)["curves"]
    assert made[0] not in made[1:] and made[1] == made[2]


def test_figures_of_a_checkpoint_that_changed_are_not_mixed(recipe: str, stranger: str, tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", str(tmp_path / "out")
    shutil.copytree(stranger, theirs)
    told("relearn", str(theirs), "--recipe", recipe, "--out", out)
    os.utime(theirs / "config.json", (0, 0))
    done = vkd("evaluate", str(theirs), "--recipe", recipe, "--out", out)
    assert done.exit_code == 2 and "began with another model than" in done.stderr


def test_figures_are_not_mixed_with_those_of_another_starting_model(recipe: str, stranger: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", str(tmp_path / "out")
    shutil.copytree(stranger, base)
    from_it = ("--recipe", recipe, "--set", f"model.source={base}", "--set", "teach=null", "--set", "reference=none")
    told("relearn", stranger, *from_it, "--alone", "--out", out)
    told("relearn", stranger, *from_it, "--out", str(tmp_path / "compared"))
    os.utime(base / "config.json", (0, 0))
    done = vkd("evaluate", stranger, *from_it, "--out", str(tmp_path / "compared"))
    assert done.exit_code == 2 and "began with another model.source than" in done.stderr
    told("evaluate", stranger, *from_it, "--alone", "--out", out)


def test_a_folder_that_holds_something_is_not_written_into(recipe: str, stranger: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = vkd("relearn", stranger, "--recipe", recipe, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
