"""Intermediate visual features: read by forward hooks, computed without the language model, the teacher's remembered.

Shapes: `R` feature rows of a layer over the whole batch, `D` channels, `B` samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework.plugins import MLLM
from vkd_framework.types import DistillationLayer, ImageQuestionPair


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
        kept = assigned.real.nonzero().squeeze(1)
        order = kept[torch.argsort(assigned.sample[kept], stable=True)]
        found[layer.name] = PhotoFeatures(rows[order], assigned.sample[order])
    return found


class Teacher:
    """What the starting model's visual modules make of each photo, computed once, before anything is trained.

    Photos are fixed, so remembering their features replaces the frozen copy that would recompute them at every step.
    """

    def __init__(
        self, mllm: MLLM, layers: Iterable[str], pairs: Iterable[ImageQuestionPair], *, batch_size: int = 64
    ) -> None:
        self.layers = tuple(mllm.layer(name) for name in layers)
        self._memory: dict[tuple[str, ...], dict[str, Tensor]] = {}
        photos = list({pair.photo_keys: pair for pair in pairs if pair.photos}.values()) if self.layers else []
        for start in range(0, len(photos), batch_size):
            chunk = photos[start : start + batch_size]
            inputs = mllm.tokenize(chunk, with_answer=False).inputs
            with torch.no_grad(), FeatureTap(mllm.model, self.layers) as tap:
                vision_forward(mllm, inputs)
                found = photo_features(mllm, inputs, tap)
            for b, pair in enumerate(chunk):
                self._memory[pair.photo_keys] = {name: f.rows[f.sample == b].cpu() for name, f in found.items()}

    def rows(self, layer: str, pairs: Iterable[ImageQuestionPair]) -> Tensor:
        """`[R, D]`: the features of the pairs' photos, in the order of `photo_features`; text-only pairs have none."""
        return torch.cat([self._memory[pair.photo_keys][layer] for pair in pairs if pair.photos])

    @property
    def bytes(self) -> int:
        """Memory held by the remembered features."""
        return sum(rows.numel() * rows.element_size() for photo in self._memory.values() for rows in photo.values())
