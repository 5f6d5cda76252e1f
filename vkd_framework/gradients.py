"""Backward passes that hold less, and what is done with their gradients: used one by one, or by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.errors import DivergedError, RecipeError


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
    with suppress(AttributeError):  # transformers 4 may not have made any
        model.disable_input_require_grads()  # hooks that make frozen embeddings want gradients, and stay for good
    blocks = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False) and not each.training]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        getattr(model, f"{name}_checkpointing_disable")()


def check_finite(values: Mapping[str, float], step: int, stage: str, remedy: str) -> None:
    """Raise DivergedError for the first value that is infinite or not a number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(f"{stage}: at step {step} {name} is {value}, the model has run away; {remedy}")


def adamw(parameters: Iterable[nn.Parameter], *, master_weights: bool = True, **options: Any) -> torch.optim.AdamW:
    """AdamW in one pass over each weight, where the device has such a kernel: a third of the time on a CPU.

    `master_weights`: take the steps in float32 where a weight is of lower precision.
    """
    parameters = list(parameters)
    kind = MasterAdamW if master_weights and any(map(_rough, parameters)) else torch.optim.AdamW
    return kind(parameters, fused=all(p.device.type in ("cpu", "cuda") for p in parameters), **options)


class MasterAdamW(torch.optim.AdamW):
    """AdamW for weights of lower precision, each of which has a float32 master that takes the step.

    bfloat16 has eight bits: a step of less than about 1/300 of a weight changes nothing, however often it is made. The
    master adds such steps up, and the weight is what the master rounds to (Micikevicius et al., arXiv 1710.03740,
    section 3.1). What is in float32 is its own master.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        self._weights = list(parameters)
        self._masters = [nn.Parameter(p.detach().float()) if _rough(p) else p for p in self._weights]
        super().__init__(self._masters, **options)

    @property
    def masters(self) -> list[nn.Parameter]:
        """Those that are not the weights themselves."""
        return [master for _, master in self._pairs()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the weights' gradients."""
        super().zero_grad(set_to_none)
        for weight, _ in self._pairs():
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """The masters' step; the weights follow, and their gradients are used up."""
        for weight, master in self._pairs():
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        super().step()
        for weight, master in self._pairs():
            weight.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """With the masters: what they hold beyond the weights' precision is in no other place."""
        return {**super().state_dict(), "masters": [master.detach() for master in self.masters]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back, the masters too; the weights are put back by whoever saved them."""
        masters = state_dict["masters"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        with torch.no_grad():
            for master, saved in zip(self.masters, masters, strict=True):
                master.copy_(saved)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return ((w, m) for w, m in zip(self._weights, self._masters, strict=True) if w is not m)


def _rough(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
