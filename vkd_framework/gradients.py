"""Gradients that are used one by one: a backward pass need not hold those of all weights at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


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
