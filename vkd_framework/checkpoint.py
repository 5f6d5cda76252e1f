"""Files that are whole or not there: atomic writes, finished stages, and training states to resume from exactly."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock

from vkd_framework import ranks
from vkd_framework.progress import say

if TYPE_CHECKING:
    import torch
    from torch import nn

EVALUATED, RELEARNED = "evaluate.json", "relearn.json"
"""What `vkd evaluate` and `vkd relearn` write about a checkpoint that no run made."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that nobody else takes: on a shared disk, processes of two machines may have the same number."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; of several processes, the first one does."""
    if not ranks.is_main():
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class Stages:
    """Finished stages of a run, one JSON file each: what is finished is not done again."""

    def __init__(self, folder: Path, peak_memory: Callable[[], int]) -> None:
        self._folder, self._peak_memory = folder, peak_memory
        self._began: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any], *, shared: Path | None = None) -> Any:
        """The result of `work`, from its file when the stage was finished before.

        `shared`: a folder in which the result is kept for other runs too, and read when one of them was first. The
        stage then counts with the seconds it took there; memory is always this process's own.
        """
        path = self._folder / f"{name}.json"
        if not ranks.once(path.exists):
            lap, earlier = self._lap(name), 0.0
            if ranks.once(lap.exists):
                earlier = float(ranks.once(lambda: read_json(lap)))
            self._began[name] = time.perf_counter() - earlier
            stage = _timed(work) if shared is None else _shared(shared / f"{name}.json", work)
            stage["seconds"] += earlier
            write_json(path, {**stage, "peak_memory_bytes": max(ranks.gather(self._peak_memory()))})
            lap.unlink(missing_ok=True)
        return ranks.once(lambda: read_json(path))["result"]

    def count(self, name: str) -> None:
        """Keep how long an unfinished stage took so far, where it keeps a state from which it can go on."""
        write_json(self._lap(name), time.perf_counter() - self._began[name])

    def _lap(self, name: str) -> Path:
        return self._folder / f"{name}.seconds"

    def forget(self, name: str) -> None:
        """Have a stage done again, because a file it left is gone."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def seconds(self, prefix: str = "") -> float:
        """How long the finished stages whose names begin with `prefix` took."""
        return sum(float(read_json(path)["seconds"]) for path in self._folder.glob(f"{prefix}*.json"))

    def peak_memory(self) -> int:
        """The most memory the process held by the end of any stage."""
        return max((int(read_json(path)["peak_memory_bytes"]) for path in self._folder.glob("*.json")), default=0)


def _timed(work: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = work()
    return {"seconds": time.perf_counter() - start, "result": result}


def _shared(path: Path, work: Callable[[], Any]) -> dict[str, Any]:
    """What `_timed` says, done by one process and read by the others, which wait for it."""
    with locked(path):
        if ranks.once(path.exists):
            say(f"{path.stem}: measured before, read from {path.parent}")
        else:
            write_json(path, _timed(work))
        stage: dict[str, Any] = ranks.once(lambda: read_json(path))
        return stage


def locked(path: Path) -> AbstractContextManager[Any]:
    """A block that one run at a time enters for this path; of a run's processes, the first one holds the lock."""
    if not ranks.is_main():
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def save_training(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
) -> None:
    """Everything that decides how training goes on after `step` steps; batches and rates are functions of the step."""
    if not ranks.is_main():
        return
    import torch

    state = {
        "step": step,
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "history": history,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_training(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Put a saved state back; returns the steps done and the history. (0, []) when nothing was saved."""
    import torch

    if not ranks.once(path.exists):
        return 0, []
    state = torch.load(path, weights_only=True, map_location="cpu")  # whatever device it was written on
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, same in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = same  # a state of an older version says otherwise
    return int(state["step"]), list(state["history"])
