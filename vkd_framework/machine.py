"""The machine that a run is made on: what a reader needs to know about it, and the memory that the process takes."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import vkd_framework
from vkd_framework import ranks

STATUS = Path("/proc/self/status")
"""Where Linux tells what a process holds (`VmRSS`) and the most it has held (`VmHWM`), in KiB."""


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to know about where the run was made."""
    return {
        "vkd_framework": vkd_framework.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "processes": ranks.size(),
    }


def peak_memory() -> int:
    """The most memory in bytes that the process has held so far: on the GPU when there is one in use, else resident."""
    held = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
    return max(held, default=0) or peak_resident_memory()


def peak_resident_memory() -> int:
    """The most resident memory in bytes; `getrusage` alone also counts what held the process that started this one."""
    if (told := _told("VmHWM")) is not None:
        return told
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes that the process holds now; where the system does not tell, the most it has held."""
    told = _told("VmRSS")
    return peak_resident_memory() if told is None else told


def _told(name: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):
        return None
