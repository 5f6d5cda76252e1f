"""The run directory: which one a run writes, and which recipe and data one was made with."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from vkd_framework import ranks
from vkd_framework.checkpoint import Stages
from vkd_framework.data import content_digest
from vkd_framework.errors import DataError, ModelError, RecipeError
from vkd_framework.progress import say
from vkd_framework.recipe import Recipe
from vkd_framework.types import Splits

LOADED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""What the files end with that a model and its processor are loaded from."""


def run_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """Where the run is written. With `resume`, an existing run of the same resolved recipe."""
    if not resume:
        folder = out or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
            raise RecipeError(f"{folder}: exists already; add --resume to go on with it, or choose another --out")
        return folder
    candidates = [out] if out else sorted(Path("runs").glob(f"{recipe.name}-*"), reverse=True)
    for folder in candidates:
        if recipe_of(folder) == recipe.digest():
            return folder
    if out and out.exists() and any(out.iterdir()):
        raise RecipeError(
            f"{out}: holds no run of this recipe with these settings; resume with the same --set, or give another --out"
        )
    if out:
        say(f"{out}: nothing to go on with; a new run begins there")
        return out
    raise RecipeError(
        f"runs/{recipe.name}-*: no run of this recipe with these settings to resume; leave --resume out, or give --out"
    )


def make(folder: Path, *, named: bool) -> Path:
    """Make the run folder. One that was not asked for by name gets a number where another run was faster.

    Raises RecipeError where it cannot be made.
    """
    for number in count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            free.mkdir(parents=True, exist_ok=named)
        except OSError as error:
            if isinstance(error, FileExistsError) and not named:
                continue
            raise RecipeError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
        return free
    raise AssertionError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block no other run writes into the folder. Raises RecipeError while one does."""
    path = folder / "checkpoints" / "run.lock"
    lock = FileLock(path, timeout=0)
    if ranks.is_main():
        path.parent.mkdir(exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise RecipeError(
                f"{folder}: another vkd run is writing into it; wait until it ends, or choose another --out"
            ) from error
    try:
        yield
    finally:
        lock.release()


def recipe_of(folder: Path) -> str | None:
    """The digest of the recipe that a run folder was made with; None where none can be read that says everything.

    One of an older version leaves out keys that it did not have. Filled in by today's methods, it would pass for a
    recipe that was never run.
    """
    try:
        said = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        recipe = Recipe.model_validate(said)
    except (OSError, yaml.YAMLError, ValidationError, UnicodeDecodeError):
        return None
    return recipe.digest() if yaml.safe_load(recipe.to_yaml()) == said else None


def check_data(folder: Path, stages: Stages, splits: Splits) -> None:
    """Raise DataError when the run in `folder` began with other data, whose results would be mixed with these.

    The first to ask decides: a run of an older version did not keep what it began with.
    """
    now = content_digest(splits)
    if stages.run("data", lambda: now) != now:
        raise DataError(f"{folder}: the data changed since this began; put them back, or start anew in another --out")


def check_models(folder: Path, stages: Stages, sources: Mapping[str, str], stage: str = "models") -> None:
    """Raise ModelError when what is in `folder` began with another model in one of `sources`: key -> folder or hub id.

    Files in a folder are known by name, size and time; of a hub id only the id. `stage` keeps what it began with.
    """
    now = {key: [source, _files(source)] for key, source in sources.items()}
    began = stages.run(stage, lambda: now)
    if changed := [key for key in now if began.get(key) != now[key]]:
        raise ModelError(
            f"{folder}: began with another {changed[0]} than {sources[changed[0]]} is now; put its files back, or "
            "start anew in another --out"
        )


def _files(source: str) -> list[list[Any]]:
    files = sorted(Path(source).iterdir()) if os.path.isdir(source) else []
    read = [file for file in files if file.suffix in LOADED and file.is_file()]
    return [[file.name, (about := file.stat()).st_size, about.st_mtime_ns] for file in read]
