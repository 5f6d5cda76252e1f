"""The user's cache folder: taught models and inspected layers, safe to delete at any time."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "VKD_CACHE"


def cache_folder() -> Path:
    """Where things that can be made again are kept; the environment variable `VKD_CACHE` moves it."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("vkd-framework"))
