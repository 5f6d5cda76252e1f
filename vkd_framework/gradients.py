"""Backward passes that hold less, and what is done with their gradients: used one by one, or by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.errors import RecipeError


@contextmanager
def as_gradients_come(leaves: Mapping[str, Tensor], use: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the block, a backward pass hands each leaf's gradient to `use` and forgets it: never are all held."""

    def hand_over(name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            g, leaf.grad = leaf.grad, None
            if g is not None:
                use(name, g)

        return hook

    register: Any = Tensor.register_post_accumulate_grad_hook  # without types in torch
    handles = [register(leaf, hand_over(name)) for name, leaf in leaves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed(model: Any, wanted: bool = True) -> Iterator[None]:
    """Within the block, the model's blocks keep only their inputs; a backward pass computes the rest again.

    A model of transformers does so only where it trains, and here it stays as it is in use, without dropout: so the
    blocks alone are told that they train. Raises RecipeError for a model that cannot.
    """
    if not wanted:
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"model.gradient_checkpointing: {type(model).__name__} cannot do it; set it to false, or make "
            "unlearn.retain_batch smaller"
        )
    # transformers 5 calls it activation checkpointing, 4 gradient checkpointing
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    blocks = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False) and not each.training]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        getattr(model, f"{name}_checkpointing_disable")()


def adamw(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.AdamW:
    """AdamW in one pass over each weight, where the device has such a kernel: a third of the time on a CPU."""
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, fused=all(p.device.type in ("cpu", "cuda") for p in parameters), **options)
