from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from vkd_framework.checkpoint import (
    Stages,
    atomic_folder,
    atomic_path,
    load_training,
    read_json,
    save_training,
    write_json,
)


def test_a_file_whose_writing_fails_keeps_its_old_contents(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"old": 1}
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_a_file_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_folder_whose_writing_fails_keeps_its_old_contents(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as temporary:
        (temporary / "weights").write_text("old")
        (temporary / "extra").write_text("old")
    with pytest.raises(OSError), atomic_folder(path) as temporary:
        (temporary / "weights").write_text("half")
        raise OSError
    assert (path / "weights").read_text() == "old"
    with atomic_folder(path) as temporary:
        (temporary / "weights").write_text("new")
    assert {file.name: file.read_text() for file in path.iterdir()} == {"weights": "new"}
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


KILLED = """
import sys, time
from pathlib import Path
from vkd_framework.checkpoint import atomic_folder, atomic_path
with atomic_path(Path(sys.argv[1]) / "file") as file, atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write_text("half")
    (folder / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_process_killed_while_writing_leaves_the_old_files_and_can_be_repeated(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as file, atomic_folder(tmp_path / "folder") as folder:
        file.write_text("old")
        (folder / "weights").write_text("old")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "weights").read_text() == "old"
    with atomic_path(tmp_path / "file") as file, atomic_folder(tmp_path / "folder") as folder:
        file.write_text("new")
        (folder / "weights").write_text("new")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "weights").read_text() == "new"


def stages_in(folder: Path, memory: int = 7) -> Stages:
    return Stages(folder, lambda: memory)


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work() -> dict[str, list[int]]:
        done.append(1)
        return {"result": [1, 2]}

    assert stages_in(tmp_path).run("mask", work) == {"result": [1, 2]}
    assert stages_in(tmp_path).run("mask", work) == {"result": [1, 2]}
    assert len(done) == 1


def test_a_stage_that_failed_is_done_again(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stages_in(tmp_path).run("mask", broken)
    assert stages_in(tmp_path).run("mask", lambda: 3) == 3


def test_stages_give_the_same_value_at_first_and_when_read_again(tmp_path: Path) -> None:
    def work() -> dict[str, tuple[float, ...]]:
        return {"scores": (0.1, 1 / 3)}

    assert stages_in(tmp_path).run("a", work) == stages_in(tmp_path).run("a", work)


def test_cost_is_summed_by_the_beginning_of_the_name_and_survives_the_process(tmp_path: Path) -> None:
    stages = stages_in(tmp_path, memory=5)
    stages.run("teach-vanilla", lambda: time.sleep(0.02))
    stages.run("teach-retain_only", lambda: time.sleep(0.02))
    stages_in(tmp_path, memory=3).run("mask", lambda: None)
    later = stages_in(tmp_path, memory=0)
    assert later.seconds("teach") >= 0.04
    assert later.seconds() == pytest.approx(later.seconds("teach") + later.seconds("mask"))
    assert later.peak_memory() == 5


def test_a_stage_that_goes_on_counts_with_what_it_took_before(tmp_path: Path) -> None:
    first = stages_in(tmp_path)

    def stopped() -> None:
        time.sleep(0.05)
        first.count("unlearn")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run("unlearn", stopped)
    later = stages_in(tmp_path)
    later.run("unlearn", lambda: None)
    assert later.seconds("unlearn") >= 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["unlearn.json"]


def test_a_shared_stage_is_done_once_and_counts_as_long_as_it_took_there(tmp_path: Path) -> None:
    done: list[int] = []

    def work() -> str:
        done.append(1)
        time.sleep(0.02)
        return "measured"

    first, second = stages_in(tmp_path / "a", memory=9), stages_in(tmp_path / "b", memory=3)
    assert first.run("evaluate", work, shared=tmp_path / "cache") == "measured"
    assert second.run("evaluate", work, shared=tmp_path / "cache") == "measured"
    assert len(done) == 1
    assert second.seconds() == first.seconds() >= 0.02
    assert second.peak_memory() == 3, "memory is the process's own"
    shutil.rmtree(tmp_path / "cache")
    assert second.run("evaluate", work, shared=tmp_path / "cache") == "measured"
    assert len(done) == 1, "a run keeps its own copy"


def test_a_shared_stage_that_failed_is_not_kept(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stages_in(tmp_path / "a").run("evaluate", broken, shared=tmp_path / "cache")
    assert stages_in(tmp_path / "b").run("evaluate", lambda: 3, shared=tmp_path / "cache") == 3


def test_training_goes_on_from_a_saved_state_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.ones(3)).square().sum().backward()
            optimizer.step()

    (straight, optimizer), (stopped, first), (resumed, second) = made(), made(), made()
    steps(straight, optimizer, 5)
    steps(stopped, first, 2)
    save_training(tmp_path / "state.pt", 2, dict(stopped.named_parameters()), first, [{"step": 1, "loss": 0.5}])
    assert load_training(tmp_path / "state.pt", dict(resumed.named_parameters()), second) == (
        2,
        [{"step": 1, "loss": 0.5}],
    )
    steps(resumed, second, 3)
    assert torch.equal(resumed.weight, straight.weight)


def test_without_a_saved_state_training_starts_at_the_beginning(tmp_path: Path) -> None:
    assert load_training(tmp_path / "none.pt", {}, torch.optim.SGD([torch.zeros(1)], lr=1)) == (0, [])
