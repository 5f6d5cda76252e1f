from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import CAST
from filelock import FileLock

from vkd_framework import cli, methods
from vkd_framework.bench import loop
from vkd_framework.bench.cells import Cell, plan
from vkd_framework.cache import CACHE_VARIABLE, cache_folder
from vkd_framework.checkpoint import read_json
from vkd_framework.errors import RecipeError
from vkd_framework.methods import Method
from vkd_framework.plugins import load_adapter
from vkd_framework.recipe import load_recipe
from vkd_framework.run.measurements import Measurements
from vkd_framework.types import Splits

pytestmark = pytest.mark.slow

RECIPE = {
    "name": "small",
    "adapter": "qwen_vl",
    "data": CAST | {"people": 5, "forget": 1, "train_photos": 2, "test_photos": 1, "extras": 0},
    "teach": {"steps": 10, "batch_size": 4},
    "reference": "retain_only",
    "layers": ["projector"],
    "unlearn": {"steps": 2, "warmup": 0, "forget_batch": 2, "retain_batch": 2},
    "evaluate": {"max_new_tokens": 3},
    "relearn": {"shares": [1.0], "steps": [1], "scopes": ["visual"], "batch_size": 2, "photos": ["known"]},
    "attacks": [{"kind": "noise"}],
}
CELLS = [f"small-{method}-{seed}" for seed in (0, 1) for method in ("vkd", "vkd_paper")]


@dataclass(frozen=True)
class Bench:
    """A bench that went through."""

    recipe: str
    out: Path
    base: Path
    done: Result

    def again(self, out: Path, *more: str) -> Result:
        return vkd(*words(self.recipe, out), *more)

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.out, target)
        return target

    def cells(self, out: Path) -> list[Cell]:
        return plan([self.recipe], ["vkd", "vkd_paper"], [0, 1], ["mask.pairs=4"], out, print)


def words(recipe: str, out: Path) -> list[str]:
    choice = ["--methods", "vkd,vkd_paper", "--seeds", "0,1", "--set", "mask.pairs=4"]
    return ["bench", recipe, *choice, "--out", str(out)]


def vkd(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    base = tmp_path_factory.mktemp("bench")
    path = base / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(base / "cache"))
        yield Bench(str(path), base / "out", base, vkd(*words(str(path), base / "out")))


def stages(out: Path, cell: str) -> dict[str, float]:
    return {path.stem: read_json(path)["seconds"] for path in (out / cell / "checkpoints").glob("*.json")}


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.is_file() and path.suffix != ".lock"}


def test_every_cell_is_an_ordinary_run_and_all_are_in_one_table(bench: Bench) -> None:
    assert bench.done.exit_code == 0, bench.done.output
    assert sorted(path.name for path in bench.out.iterdir() if path.name.startswith("small")) == sorted(CELLS)
    for cell in CELLS:
        recipe = load_recipe(str(bench.out / cell / "recipe.yaml"))
        assert cell == f"{recipe.name}-{recipe.method}-{recipe.seed}"
        assert recipe.mask.pairs == 4
        assert (bench.out / cell / "report.html").exists()
    for row in ("vanilla", "retain-only", "vkd  ", "vkd_paper"):
        assert re.search(rf"^{row}", bench.done.stdout, flags=re.MULTILINE)
    assert "beats" in bench.done.stdout


def test_the_folder_holds_the_comparison_in_every_format(bench: Bench, tmp_path: Path) -> None:
    found = json.loads((bench.out / "cells.json").read_text())
    assert [(one["recipe"], one["method"], one["seed"]) for one in found] == [
        (recipe, method, int(seed)) for recipe, method, seed in (cell.split("-") for cell in CELLS)
    ]
    for one, cell in zip(found, CELLS, strict=True):
        metrics = read_json(bench.out / cell / "metrics.json")
        keys = ("recipe", "method", "seed", "models", "relearn", "cost", "train")
        keys += ("attacks", "over_forgotten", "proofs", "verdict")
        settings = one.pop("settings")
        assert settings["mask.pairs"] == "4"
        assert one == {key: metrics[key] for key in keys if key in metrics}
    command = re.findall(r"^```\n(vkd bench .*)\n```$", (bench.out / "table.md").read_text(), flags=re.MULTILINE)
    assert shlex.split(command[0]) == ["vkd", *words(bench.recipe, bench.out)[:-2]], (
        "the command without the place of its files"
    )
    for name in ("table.csv", "table.html"):
        assert (bench.out / name).stat().st_size > 1000
    target = tmp_path / "compared.csv"
    assert vkd("compare", str(bench.out), "--csv", str(target)).exit_code == 0
    assert target.read_text() == (bench.out / "table.csv").read_text()


def test_what_does_not_depend_on_the_method_is_measured_once(bench: Bench) -> None:
    first, *others = (stages(bench.out, cell) for cell in CELLS)
    shared = {name for name in first if re.search("(evaluate|attacks|relearn)-(vanilla|retain_only)", name)}
    assert len(shared) == 5
    for other in others:
        assert {name for name in first if first[name] == other[name]} == shared, "cost is what the measurement took"
    kept = {path.stem for path in (bench.base / "cache" / "measured").glob("*/*.json")}
    assert kept == shared


def test_what_was_measured_is_read_only_for_the_same_weights_data_and_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def place(*overrides: str, folder: str = "taught/0123", weights: str = "some") -> Path | None:
        recipe = load_recipe("qwen2vl_celeb", overrides)
        found = Measurements(recipe, load_adapter("qwen_vl"), Splits((), (), {}, (), ()), tmp_path)
        source = cache_folder() / folder
        source.mkdir(parents=True, exist_ok=True)
        (source / "teaching.json").write_text(json.dumps({"seconds": 1, "weights": weights}))
        return found.shared_place(str(source))

    settings = ("method=vkd_paper", "seed=7", "unlearn.steps=1", "layers=[projector]", "losses.repel.weight=0")
    first = place()
    assert first is not None and first == place(*settings) == place(folder="taught/4567")
    for other in ("evaluate.max_new_tokens=4", "relearn.learning_rate=1e-3", "data.people=33", "model.dtype=bfloat16"):
        assert place(other) != first
    assert place(weights="taught on another processor") != first
    assert place(folder="elsewhere/0123") is None
    assert (
        Measurements(
            load_recipe("qwen2vl_celeb"), load_adapter("qwen_vl"), Splits((), (), {}, (), ()), tmp_path
        ).shared_place(str(tmp_path / "taught" / "of an older version"))
        is None
    )


def test_finished_cells_are_only_read(bench: Bench) -> None:
    before = written(bench.out)
    done = bench.again(bench.out)
    assert (done.exit_code, done.stdout) == (0, bench.done.stdout)
    assert "4 runs, 4 of them done" in done.stderr
    assert written(bench.out) == before


def test_a_killed_cell_goes_on_after_its_last_finished_stage(bench: Bench, tmp_path: Path) -> None:
    cell = bench.cells(tmp_path / "out")[1]  # vkd_paper has a mask, a stage in the middle
    outcomes: list[tuple[str, str]] = []
    worker = threading.Thread(target=lambda: outcomes.append(loop._in_a_process(cell)))
    worker.start()
    marker = cell.folder / "checkpoints" / "mask.json"
    while worker.is_alive() and not marker.exists():
        time.sleep(0.005)
    (child,) = multiprocessing.active_children()
    assert cell.status()[0] == "running"
    os.kill(child.pid or 0, signal.SIGKILL)
    worker.join()
    assert outcomes[0][0] == "failed" and "killed by signal 9" in outcomes[0][1]
    assert cell.status() == ("failed", outcomes[0][1])
    before = stages(tmp_path / "out", cell.name)
    assert "mask" in before and not cell.finished()
    loop.work([cell])
    assert cell.status() == ("done", "")
    after = stages(tmp_path / "out", cell.name)
    assert {name: after[name] for name in before} == before
    metrics, expected = (read_json(out / cell.name / "metrics.json") for out in (tmp_path / "out", bench.out))
    assert {**metrics, "cost": {}} == {**expected, "cost": {}}


def test_a_cell_that_fails_does_not_stop_the_others_and_is_told_in_one_line(bench: Bench, tmp_path: Path) -> None:
    out = bench.copy(tmp_path / "out")
    for cell in CELLS[:2]:
        (out / cell / "metrics.json").unlink()
    (out / CELLS[0] / "recipe.yaml").write_text("name: another\n")
    done = bench.again(out)
    assert done.exit_code == 1
    assert f"left out: {CELLS[0]}: " in done.stdout and "holds no run of this recipe" in done.stdout
    assert (out / CELLS[1] / "metrics.json").exists()
    assert [(one["method"], one["seed"]) for one in json.loads((out / "cells.json").read_text())] == [
        ("vkd_paper", 0),
        ("vkd", 1),
        ("vkd_paper", 1),
    ]
    listed = bench.again(out, "--list")
    assert listed.exit_code == 0
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [
        [CELLS[0], "failed:"],
        *([cell, "done"] for cell in CELLS[1:]),
    ]


def test_a_run_whose_proof_failed_is_a_failed_cell(bench: Bench, tmp_path: Path) -> None:
    out = bench.copy(tmp_path / "out")
    path = out / CELLS[3] / "metrics.json"
    path.write_text(path.read_text().replace('"reload_identical": true', '"reload_identical": false'))
    done = bench.again(out)
    assert done.exit_code == 1
    assert f"left out: {CELLS[3]}: proof failed: The saved model is the measured model" in done.stdout
    assert len(json.loads((out / "cells.json").read_text())) == 3


def test_a_cell_that_another_process_holds_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    out = bench.copy(tmp_path / "out")
    cells = bench.cells(out)
    for cell in cells[:2]:
        (cell.folder / "metrics.json").unlink()
    with FileLock(cells[0].lock):
        assert "running" in bench.again(out, "--list").stdout.splitlines()[0]
        done = bench.again(out)
    assert done.exit_code == 0
    assert f"left out: {CELLS[0]}: running" in done.stdout
    assert not (cells[0].folder / "metrics.json").exists() and cells[1].finished()


def test_a_list_of_what_was_not_begun_writes_nothing(bench: Bench, tmp_path: Path) -> None:
    done = bench.again(tmp_path / "out", "--list")
    assert [line.split() for line in done.stdout.splitlines()] == [[cell, "to", "do"] for cell in CELLS]
    assert list(tmp_path.iterdir()) == []


def test_without_methods_all_that_the_recipe_can_be_run_with_are_taken(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = Method("needs what no recipe has", "", {"mask": {"kind": "salun", "threshold": 1.0}})
    monkeypatch.setitem(methods.METHODS, "picky", picky)
    said: list[str] = []
    found = plan([bench.recipe], None, [3], [], tmp_path, said.append)
    assert [cell.method for cell in found] == [name for name in methods.METHODS if name != "picky"]
    assert {cell.seed for cell in found} == {3}
    assert len(said) == 1 and said[0].startswith("method picky is left out: ")
    with pytest.raises(RecipeError, match="threshold"):
        plan([bench.recipe], ["picky"], [3], [], tmp_path, said.append)


def test_a_setting_that_one_of_the_methods_reads_changes_that_one_alone(tmp_path: Path) -> None:
    said: list[str] = []
    chosen = ["vkd", "npo", "vkd"]
    found = plan(
        ["qwen2vl_celeb"], chosen, [0], ["losses.forget_output.beta=1", "unlearn.steps=3"], tmp_path, said.append
    )
    assert {cell.method: cell.overrides[2:] for cell in found} == {
        "vkd": ("unlearn.steps=3",),
        "npo": ("losses.forget_output.beta=1", "unlearn.steps=3"),
    }
    assert said == ["method vkd does not read --set losses.forget_output.beta=1, and does without it"]
    with pytest.raises(RecipeError, match=r"^--set prune\.share=0\.1: prune\.share goes with procedure: prune"):
        plan(["qwen2vl_celeb"], chosen, [0], ["prune.share=0.1"], tmp_path, said.append)
    every = plan(["qwen2vl_celeb"], None, [0], ["prune.share=0.1"], tmp_path, said.append)
    assert len(every) == len(methods.METHODS)


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such recipe": (["smal"], ("smal: no such recipe file",)),
    "no such method": (["qwen2vl_celeb", "--methods", "vkd,vkd_papr"], ("--methods vkd_papr", "'vkd_paper'")),
    "a broken setting": (["qwen2vl_celeb", "--set", "unlearn.step=1"], ("unlearn.step", "'steps'")),
    "no such layer": (["qwen2vl_celeb", "--set", "layers=[vision.9]"], ("layers: 'vision.9'",)),
    "seeds that are none": (["qwen2vl_celeb", "--seeds", "0,a"], ("'0,a'", "0,1,2")),
    "a seed by --set": (["qwen2vl_celeb", "--set", "seed=1"], ("--set seed=1", "--seeds")),
    "a method by --set": (["qwen2vl_celeb", "--set", "method=vkd"], ("--set method=vkd", "--methods")),
    "a recipe twice": (["qwen2vl_celeb", "qwen2vl_celeb.yaml"], ("both recipes are called 'qwen2vl_celeb'",)),
}


def test_an_out_folder_that_cannot_be_made_is_one_line(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = bench.again(tmp_path / "file" / "out")
    assert done.exit_code == 2, done.exception
    assert len(done.stderr.strip().splitlines()) == 1 and "choose another --out" in done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_before_anything_runs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, fragments = WRONG[case]
    monkeypatch.chdir(tmp_path)
    done = vkd("bench", *arguments)
    assert done.exit_code == 2, done.exception
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    assert list(tmp_path.iterdir()) == []
