"""Weight rounding: what was hidden in small changes of weights comes back when weights are rounded.

Source: Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454, which rounds the
language model. Here every weight matrix of the whole model is rounded to the nearest of its channel's levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vkd_framework.attacks.target import Target
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import QuantizeAttack


def attack(config: QuantizeAttack, target: Target) -> dict[str, Any]:
    """Exact match of Test VQA with rounded weights, and of Retain VQA: what the rounding itself breaks."""
    with rounded(target.mllm, config.bits):
        return {
            "exact_match": target.exact_match(target.mllm, target.test),
            "retain_exact_match": target.exact_match(target.mllm, target.splits.columns["retain_vqa"]),
        }


@contextmanager
def rounded(mllm: MLLM, bits: int) -> Iterator[None]:
    """Within the block, every weight matrix is rounded; biases, norms and other vectors stay as they are.

    Not in a copy, which would take a GPU twice the model: the weights wait in the computer's memory.
    """
    matrices = [parameter for parameter in mllm.model.parameters() if parameter.ndim > 1]
    weights = [matrix.detach().to("cpu", copy=True) for matrix in matrices]
    try:
        _write(matrices, (round_to_nearest(matrix, bits) for matrix in matrices))
        yield
    finally:
        _write(matrices, weights)


@torch.no_grad()
def _write(matrices: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for matrix, value in zip(matrices, values, strict=True):
        matrix.copy_(value)


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """`[D, ...]` -> the same shape: each output channel `D` on its own symmetric grid of `2^bits - 1` levels.

    The grid's step is the channel's largest magnitude over `2^(bits - 1) - 1`; ties go to the even level.
    """
    rows = weight.detach().to(torch.float32, copy=True).flatten(1)
    step = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    rows.div_(step.clamp(min=torch.finfo(torch.float32).tiny)).round_().mul_(step)
    return rows.view(weight.shape).to(weight.dtype)
