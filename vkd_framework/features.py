"""Intermediate visual features: read by forward hooks, computed without the language model.

Shapes: `R` feature rows of a layer over the whole batch, `D` channels, `B` samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.plugins import MLLM
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows


class FeatureTap:
    """Within its `with` block, holds the output of each layer from the latest forward pass, flattened to `[R, D]`."""

    def __init__(self, model: nn.Module, layers: Sequence[DistillationLayer]) -> None:
        self.features: dict[str, Tensor] = {}
        self.layers = tuple(layers)
        self._places = [(layer.name, model.get_submodule(layer.path)) for layer in layers]
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureTap:
        for name, module in self._places:
            self._handles.append(module.register_forward_hook(self._keep(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self.features[name] = tensor.flatten(0, -2)

        return hook


def vision_forward(mllm: MLLM, inputs: Mapping[str, Tensor]) -> Any:
    """Run encoder and projector alone; a FeatureTap around it sees the same features as in a full forward pass.

    Returns what the language model would be handed, in the form that transformers gives it.
    """
    # Where there is an inner model, it is the one that the forward pass asks, and its signature the complete one.
    inner = getattr(mllm.model, "model", mllm.model)
    owner = inner if hasattr(inner, "get_image_features") else mllm.model
    accepted = inspect.signature(owner.get_image_features).parameters
    named = {name for name, parameter in accepted.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return owner.get_image_features(**{name: value for name, value in inputs.items() if name in named})


@dataclass(frozen=True, eq=False)
class PhotoFeatures:
    """One layer's features of a batch: `rows` `[R, D]`, sample after sample, and each row's `sample` `[R]`."""

    rows: Tensor
    sample: Tensor


def photo_features(mllm: MLLM, inputs: Mapping[str, Tensor], tap: FeatureTap) -> dict[str, PhotoFeatures]:
    """The tapped features of the latest forward pass by layer, without rows that show no part of a photo."""
    found = {}
    for layer in tap.layers:
        rows = tap.features[layer.name]
        assigned = mllm.adapter.feature_rows(mllm.model, inputs, layer, len(rows))
        order = _sample_after_sample(assigned)
        found[layer.name] = PhotoFeatures(rows[order], assigned.sample[order])
    return found


def photo_grid(
    mllm: MLLM,
    inputs: Mapping[str, Tensor],
    tap: FeatureTap,
    layer: DistillationLayer,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Where the rows of `photo_features` lie, in their order. `photos`: each sample's photos' sizes."""
    assigned = mllm.adapter.feature_rows(mllm.model, inputs, layer, len(tap.features[layer.name]))
    grid = mllm.adapter.feature_grid(mllm.model, inputs, layer, assigned, photos)
    order = _sample_after_sample(assigned)
    return FeatureGrid(grid.photo[order], grid.box[order])


def _sample_after_sample(assigned: FeatureRows) -> Tensor:
    """The indices of the real rows, in the order of their samples."""
    kept = assigned.real.nonzero().squeeze(1)
    order: Tensor = kept[torch.argsort(assigned.sample[kept], stable=True)]
    return order
