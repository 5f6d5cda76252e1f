"""The user's cache folder: taught models, what was measured on them, inspected layers; safe to delete at any time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "VKD_CACHE"


def cache_folder() -> Path:
    """Where things that can be made again are kept; the environment variable `VKD_CACHE` moves it."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("vkd-framework"))


def hash_of_sources(pattern: str = "**/*.py") -> str:
    """SHA-256 over names and contents of this package's files."""
    sha = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.glob(pattern)):
        sha.update(f"{path.relative_to(package).as_posix()}\n".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


CODE = hash_of_sources()
"""Hash of this package's code as it was when the process began: what other code measured is not taken for our own."""
