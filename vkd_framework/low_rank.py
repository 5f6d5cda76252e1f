"""Something of low rank added to frozen linear layers: `y = W x + B A x`, with few numbers to tune.

As in LoRA (Hu et al., arXiv 2106.09685), where both are tuned; or A is drawn once and B alone tuned (LoRA-FA, Zhang et
al., arXiv 2308.03303): B begins at 0, so A has hardly a gradient at first. The scale is ours: A's entries have variance
1 / R instead of 1 / I, so that an Adam step on B moves an entry of B A by as much as a step on W would move one of W.

Shapes: `O` output and `I` input channels, `R` the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.errors import RecipeError


class LowRank:
    """What is added to each layer: name -> `up`, B `[O, R]`, to be tuned, and `down`, A `[R, I]`.

    Raises RecipeError where there is no layer.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], rank: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        if not layers:
            raise RecipeError(
                "the language model has no linear layer that something of low rank could be added to; set "
                "simulated_attack.rank to null, and take low_rank out of relearn.scopes"
            )
        self._layers = layers
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        draw = torch.Generator().manual_seed(seed)
        self.up: dict[str, nn.Parameter] = {}
        self.down: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            drawn = (torch.randn(rank, layer.in_features, generator=draw) / rank**0.5).to(**like)
            self.down[name] = nn.Parameter(drawn, requires_grad=False)
            self.up[name] = nn.Parameter(torch.zeros(layer.out_features, rank, **like))

    def both(self) -> dict[str, nn.Parameter]:
        """Both matrices of each layer, to be tuned as in LoRA."""
        for down in self.down.values():
            down.requires_grad_()
        named = {"up": self.up, "down": self.down}
        return {f"{layer}.{name}": matrix for name, matrices in named.items() for layer, matrix in matrices.items()}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within the block, the layers give `W x + B A x`."""

        def adds(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            return lambda _layer, given, made: made + given[0] @ self.down[name].T @ self.up[name].T

        handles = [layer.register_forward_hook(adds(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def difference(self) -> dict[str, Tensor]:
        """Name of each layer's weight -> `B A` `[O, I]`."""
        return {f"{name}.weight": up.detach() @ self.down[name] for name, up in self.up.items()}
