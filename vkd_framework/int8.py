"""A frozen language model in 8 bits, so that a large model fits a small GPU: half the bytes of bfloat16.

Each linear layer keeps its weight as whole numbers with one scale for each output channel, and makes a weight of the
usual kind of it whenever it is used, in the backward pass too. What the visual modules are taught passes through it;
nothing in it can be trained. Rounding to the nearest level of a channel is weight-only absmax quantisation, as in
Dettmers et al., arXiv 2208.07339, section 2, without their treatment of outliers: activations stay as they are.

Shapes: `O` output and `I` input channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd_framework.plugins import MLLM

LEVELS = 127


class Int8Linear(nn.Linear):
    """A linear layer whose weight `[O, I]` is held as int8, with a scale `[O]` in float32."""

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        rows = layer.weight.detach().float()
        scale = rows.abs().amax(dim=1).div_(LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
        whole = torch.round(rows / scale[:, None]).to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, with the rounded weight."""
        made: Tensor = _Product.apply(input, self.weight, self.scale)
        return made if self.bias is None else made + self.bias


class _Product(torch.autograd.Function):
    """`x W^T` that keeps the int8 weight for its backward pass, not the one made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, _made(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradients[0] @ _made(weight, scale, gradients[0].dtype), None, None


def hold_language_model_in_int8(mllm: MLLM) -> None:
    """Round the linear layers of the language model, in place; embeddings and the output layer stay as they are."""
    for path, layer in mllm.language_model_layers().items():
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(mllm.model.get_submodule(parent), name, Int8Linear(layer))


def _made(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale[:, None])
