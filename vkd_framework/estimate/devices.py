"""How fast a device computes: public peak rates of GPUs, or a short multiplication on the device at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vkd_framework.errors import RecipeError
from vkd_framework.recipe import nearest

UTILISATION = 0.4
"""Share of a GPU's peak that training reaches; large models on one GPU report 0.3 to 0.5."""
REACHED = 0.3
"""Share of a bare multiplication's rate that a step reaches on a CPU; measured on the embedded default."""
FETCHED = 20e9
"""Bytes a second that come from the computer's memory to a GPU: what 16 lanes of PCIe 4 carry, less a fifth."""
CALIBRATION_SECONDS = 0.1


@dataclass(frozen=True)
class Gpu:
    """Peak rates in operations a second without sparsity, as the vendor states them, and memory in bytes."""

    half: float
    single: float
    memory: int


GPUS = {
    "H200": Gpu(989e12, 67e12, 141 * 10**9),
    "H100": Gpu(989e12, 67e12, 80 * 10**9),
    "A100-80GB": Gpu(312e12, 19.5e12, 80 * 10**9),
    "A100-40GB": Gpu(312e12, 19.5e12, 40 * 10**9),
    "L40S": Gpu(362e12, 91.6e12, 48 * 10**9),
    "A10": Gpu(125e12, 31.2e12, 24 * 10**9),
    "L4": Gpu(121e12, 30.3e12, 24 * 10**9),
    "RTX4090": Gpu(165e12, 82.6e12, 24 * 10**9),
    "RTX3090": Gpu(71e12, 35.6e12, 24 * 10**9),
    "T4": Gpu(65e12, 8.1e12, 16 * 10**9),
}


@dataclass(frozen=True)
class Rate:
    """Operations a second that a step can count on, and where the number is from."""

    flops: float
    how: str


def named(name: str, dtype: str) -> tuple[Rate, Gpu]:
    """The rate of a GPU in the table. Raises RecipeError for another one."""
    gpu = GPUS.get(name)
    if gpu is None:
        sizes = " or ".join(repr(known) for known in GPUS if known.lower().startswith(name.lower()))
        close = f"; did you mean {sizes}?" if sizes else nearest(name, GPUS)
        raise RecipeError(f"--gpu {name}: not in the table{close}; it has {', '.join(GPUS)}")
    peak = gpu.single if dtype == "float32" else gpu.half
    return Rate(UTILISATION * peak, f"{name}: {UTILISATION:.0%} of {peak / 1e12:,.0f} TFLOP/s in {dtype}"), gpu


def measured(device: str, dtype: str, width: int) -> Rate:
    """The rate of the device at hand, from multiplications of matrices as wide as the model."""
    import torch

    side = max(width, 2048 if device.startswith("cuda") else 64)
    a = torch.ones(2048, side, device=device, dtype=getattr(torch, dtype))
    b = torch.ones(side, side, device=device, dtype=a.dtype)
    done, best = 0.0, 0.0
    for _ in range(200):
        start = time.perf_counter()
        (a @ b).sum().item()
        took = time.perf_counter() - start
        done, best = done + took, max(best, 2 * a.numel() * side / took)
        if done > CALIBRATION_SECONDS and best:
            break
    share = UTILISATION if device.startswith("cuda") else REACHED
    return Rate(share * best, f"{device}: {share:.0%} of {best / 1e9:,.0f} GFLOP/s, measured now")


def memory_at_hand(device: str) -> int:
    """Bytes of the GPU at hand."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)
