"""Peak memory and time, measured so that they can be believed.

Memory: one fresh process for each figure, in which nothing else ever ran. On a CPU it is the process's highest resident
set above what it held with everything imported and no model built; on a GPU what torch allocated at most.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vkd_framework.machine import peak_resident_memory, resident_memory

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Make glibc give freed blocks back at once: what it keeps is not the method's."""
SLACK = 2**28
"""Bytes on a GPU that may belong to nobody: buffers, and what the libraries work in."""


def in_fresh_process(arguments: Sequence[str]) -> Any:
    """What `cost.py` with these arguments prints as JSON. Raises RuntimeError with its last words when it fails."""
    script = str(Path(__file__).resolve().parent.parent / "cost.py")
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env={**os.environ, **RETURNED}
    )
    if done.returncode:
        raise RuntimeError(f"cost.py {' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """The most memory held since it was made, and how much of that a model takes.

    On a GPU a model may be there `already`, of so many bytes. Raises RuntimeError where there is more than it.
    """

    def __init__(self, device: str, already: int = 0) -> None:
        self._device = device
        gc.collect()
        if device == "cuda":
            held = torch.cuda.memory_allocated() - already
            if held > SLACK:
                raise RuntimeError(f"{held:,} bytes are held on the GPU that do not belong to the model")
            torch.cuda.reset_peak_memory_stats()
        self._base = 0 if device == "cuda" else resident_memory()

    def bytes(self) -> int:
        """The highest so far, above the base."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_resident_memory() - self._base


@dataclass
class Stopwatch:
    """Seconds on the wall and of the processor since it was made, the GPU's work included."""

    device: str

    def __post_init__(self) -> None:
        self._settle()
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """What counts, and the wall's: on a CPU that others may share, the processor's seconds count."""
        self._settle()
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return (wall if self.device == "cuda" else processor), wall

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
