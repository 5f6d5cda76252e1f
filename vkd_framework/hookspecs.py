"""The whole extension surface: what an adapter may answer about one model family.

An adapter is a module (or an object) whose functions are marked with `hookimpl` and registered under the entry-point
group `vkd_framework`. Only `vkd_model_types` is required. Everything else has an answer in `vkd_framework.generic` that
holds for ordinary transformers models; write down only what differs in your family, and return None to fall back.

Shape letters: `B` samples, `L` text tokens, `R` feature rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

    from vkd_framework.types import (
        DistillationLayer,
        EncodedBatch,
        FeatureGrid,
        FeatureRows,
        ImageQuestionPair,
        VisionModules,
    )

PROJECT = "vkd_framework"
F = TypeVar("F")

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def vkd_model_types() -> Sequence[str]:  # type: ignore[empty-body]
    """The `config.model_type` values this adapter serves, such as `["qwen2_vl"]`. Required."""


@hookspec(firstresult=True)
def vkd_load_model(source: str, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, ProcessorMixin]:  # type: ignore[empty-body]
    """Load model and processor from a hub id or a local folder.

    Must raise `ModelError` when a weight of the model is missing from the checkpoint or left over in it.
    """


@hookspec(firstresult=True)
def vkd_locate_vision_modules(model: PreTrainedModel) -> VisionModules:  # type: ignore[empty-body]
    """Where the vision encoder, the projector and the language model are. The model may be on the meta device."""


@hookspec(firstresult=True)
def vkd_list_distillation_layers(model: PreTrainedModel, modules: VisionModules) -> Sequence[DistillationLayer]:  # type: ignore[empty-body]
    """The layers whose output can be distilled, in order: `vision.0` .. `vision.N-1`, then `projector`.

    `reaches_language_model` is False for layers that run without influencing any answer. The model may be on the meta
    device.
    """


@hookspec(firstresult=True)
def vkd_tokenize_pairs(  # type: ignore[empty-body]
    processor: ProcessorMixin,
    pairs: Sequence[ImageQuestionPair],
    stop_ids: Sequence[int],
    with_answer: bool,
    padding_side: str,
) -> EncodedBatch:
    """Encode pairs with the family's own chat template and processor.

    With `with_answer`, labels cover the answer tokens and the stop token after them, nothing else. Without it the text
    ends where the model's answer begins, and all labels are -100. The same question, answer and photos must always
    become the same: they are encoded once.
    """


@hookspec(firstresult=True)
def vkd_feature_rows(  # type: ignore[empty-body]
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """To which sample each of the `rows` feature rows of `layer` belongs, and which rows show part of a photo.

    Features arrive flattened to `[R, D]`, in the order in which the layer put them out.
    """


@hookspec(firstresult=True)
def vkd_feature_grid(  # type: ignore[empty-body]
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Which part of which photo each row of `layer` shows. Only external teachers need it.

    `assigned` is the answer of `vkd_feature_rows`, `photos` the width and height in pixels of each sample's photos.
    Must raise `AdapterError` where rows show no part of their own, as those of a resampler do.
    """


@hookspec(firstresult=True)
def vkd_stop_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> Sequence[int]:  # type: ignore[empty-body]
    """The ids of the tokens that end an answer, the usual one first."""


@hookspec(firstresult=True)
def vkd_tiny_model(  # type: ignore[empty-body]
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tiny real model of `model_type` with random weights, and its processor, whose tokenizer knows `texts`.

    Made from the family's own config, model and processor classes, for photos of `image_size` pixels squared.
    The embedded default and the conformance kit use it.
    """


@hookspec(firstresult=True)
def vkd_refused_model_types() -> Mapping[str, str]:  # type: ignore[empty-body]
    """`config.model_type` -> why this adapter does not serve it and what to use instead, for near relatives."""


@hookspec(firstresult=True)
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Hub id -> the contents of its config.json, for well-known checkpoints of the family.

    Lets `vkd inspect-layers` and `--dry-run` describe a model without network and without weights.
    """
