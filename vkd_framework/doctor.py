"""The checks of `vkd doctor`: what a bug report needs, and what would stop a run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vkd_framework import __version__
from vkd_framework.errors import VKDError

OLDEST_TRANSFORMERS, FIRST_UNTRIED = (4, 57, 6), (6,)


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and whether a run can work with it."""

    what: str
    found: str
    ok: bool = True


def checks() -> list[Check]:
    """All checks, each on its own: one that fails does not hide the others."""
    makers: dict[str, Callable[[], Check]] = {
        "vkd": lambda: Check("vkd", f"{__version__} in {Path(__file__).parent}"),
        "python": lambda: Check(
            "python", f"{platform.python_version()} ({sys.executable})", sys.version_info >= (3, 11)
        ),
        "torch": _torch,
        "torchvision": _torchvision,
        "transformers": _transformers,
        "adapters": _adapters,
        "recipes": _recipes,
        "cache": _cache,
        "disk": lambda: Check("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"),
        "hub": lambda: Check(
            "hub",
            "offline (HF_HUB_OFFLINE)"
            if os.environ.get("HF_HUB_OFFLINE")
            else "used only for models named by a hub id",
        ),
    }
    results = []
    for what, make in makers.items():
        try:
            results.append(make())
        except Exception as error:  # whatever is broken here is the finding
            results.append(Check(what, f"{type(error).__name__}: {error}", ok=False))
    return results


def _torch() -> Check:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {torch.get_num_threads()} threads"
    return Check("torch", f"{torch.__version__}, {device}")


def _torchvision() -> Check:
    import torchvision

    return Check("torchvision", torchvision.__version__)


def _transformers() -> Check:
    found = metadata.version("transformers")
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    supported = OLDEST_TRANSFORMERS <= numbers < FIRST_UNTRIED
    return Check("transformers", found if supported else f"{found}; supported: >=4.57.6,<6", supported)


def _adapters() -> Check:
    from vkd_framework.plugins import installed_adapters, load_adapter

    names, broken = [], []
    for installed in installed_adapters():
        try:
            load_adapter(installed.name)
            names.append(installed.name)
        except VKDError as error:
            broken.append(str(error))
    found = ", ".join(names) or "none"
    return Check("adapters", "; ".join([found, *broken]), bool(names) and not broken)


def _recipes() -> Check:
    from vkd_framework.recipe import bundled_recipes, load_recipe

    names = list(bundled_recipes())
    for name in names:
        load_recipe(name)
    return Check("recipes", ", ".join(names) or "none found beside the package", bool(names))


def _cache() -> Check:
    from vkd_framework.cache import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    return Check("cache", f"{folder}, {size / 2**20:.0f} MiB of taught models, {free / 2**30:.1f} GiB free")
