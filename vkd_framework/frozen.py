"""A frozen language model that takes less of a GPU's memory: in 8 bits, in the computer's memory, on other GPUs too.

Each linear layer keeps its weight as whole numbers with one scale for each output channel (half the bytes of bfloat16),
or outside of the GPU, or on that of one of several processes, and makes or fetches a weight of the usual kind whenever
it is used, in the backward pass too. What the visual modules are taught passes through it; nothing in it can be
trained. Rounding to the nearest level of a channel is weight-only absmax quantisation, as in Dettmers et al., arXiv
2208.07339, section 2, without their treatment of outliers: activations stay as they are. A weight that is fetched is
the weight as it was: nothing else changes.

Shapes: `O` output and `I` input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd_framework import ranks
from vkd_framework.divided import Division
from vkd_framework.plugins import MLLM

LEVELS = 127


class FrozenLinear(nn.Linear):
    """A linear layer whose weight `[O, I]` is held as int8 with a `scale` `[O]` in float32, or as it was, without one.

    `stays`: wherever the layer goes, its weight stays where it is, and visits its input's device. `pin`: it is put
    where a GPU fetches it faster.
    """

    scale: Tensor | None

    def __init__(self, layer: nn.Linear, *, int8: bool = False, stays: bool = False, pin: bool = False) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight, scale = _rounded(layer.weight.detach()) if int8 else (layer.weight.detach(), None)
        if pin:
            weight = weight.pin_memory()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)
        self._stays = stays

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, with the weight that is held."""
        made: Tensor = _Product.apply(input, self.weight, self.scale, self.bias)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """What `to` and its like do to each tensor."""
        held, to_all = self._parameters["weight"], cast(Any, super()._apply)
        if self._stays:
            self._parameters["weight"] = None
        to_all(fn, recurse)
        if self._stays:
            self._parameters["weight"] = held
        return self


class _Product(torch.autograd.Function):
    """`x W^T + b` that keeps the weight for its backward pass as it is held, not as it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, _used(weight, scale, x), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradients[0] @ _used(weight, scale, gradients[0]), None, None, None


def freeze_language_model(mllm: MLLM, device: str, *, int8: bool = False, offload: bool = False) -> None:
    """Hold the linear layers of the language model so, in place, and move the model to `device`.

    Embeddings and the output layer stay as they are; an offloaded weight stays where it is now. Several processes that
    divide the model hold each layer once on every machine.
    """
    pin = offload and device.startswith("cuda")
    division = Division(ranks.neighbours()) if ranks.divide() else None
    for path in list(mllm.language_model_layers()):  # by name: a layer that is replaced is to go at once
        parent, _, name = path.rpartition(".")
        layer = mllm.model.get_submodule(path)
        if type(layer) is nn.Linear:
            frozen = FrozenLinear(layer, int8=int8, stays=offload or division is not None, pin=pin)
            if division is not None:
                weight = division.held_by_one(frozen.weight.detach(), device)
                frozen.weight = nn.Parameter(weight, requires_grad=False)
            setattr(mllm.model.get_submodule(parent), name, frozen)
    mllm.model.to(device)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.float()
    scale = rows.abs().amax(dim=1).div_(LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.round(rows / scale[:, None]).to(torch.int8), scale


def _used(weight: Tensor, scale: Tensor | None, beside: Tensor) -> Tensor:
    there = weight.to(beside.device, non_blocking=True)
    return there if scale is None else there.to(beside.dtype).mul_(scale[:, None])
