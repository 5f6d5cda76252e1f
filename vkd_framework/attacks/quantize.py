"""Weight rounding: what was hidden in small changes of weights comes back when weights are rounded.

Source: Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454, which rounds the
language model. Here every weight matrix of the whole model is rounded to the nearest of its channel's levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vkd_framework.attacks.target import Target
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import QuantizeAttack


def attack(config: QuantizeAttack, target: Target) -> dict[str, Any]:
    """Exact match of Test VQA with rounded weights, and of Retain VQA: what the rounding itself breaks."""
    rounded = quantize(target.mllm, config.bits)
    return {
        "exact_match": target.exact_match(rounded, target.test),
        "retain_exact_match": target.exact_match(rounded, target.splits.columns["retain_vqa"]),
    }


def quantize(mllm: MLLM, bits: int) -> MLLM:
    """A copy with every weight matrix rounded; biases, norms and other vectors stay as they are."""
    copied = mllm.copy()
    with torch.no_grad():
        for parameter in copied.model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(round_to_nearest(parameter, bits))
    return copied


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """`[D, ...]` -> the same shape: each output channel `D` on its own symmetric grid of `2^bits - 1` levels.

    The grid's step is the channel's largest magnitude over `2^(bits - 1) - 1`; ties go to the even level.
    """
    rows = weight.detach().float().flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = torch.round(rows / step.clamp(min=torch.finfo(torch.float32).tiny))
    rounded: Tensor = (levels * step).view(weight.shape).to(weight.dtype)
    return rounded
