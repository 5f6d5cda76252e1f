"""InternVL 2.5 and later, as transformers itself knows them (the `-hf` checkpoints).

model.vision_tower             InternViT; [tiles, class token + patches, D], a picture is one tile or several
model.multi_modal_projector    projector; 2 x 2 patches -> one visual token
model.language_model           language model, with lm_head beside `model`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The native architecture."""
    return ["internvl"]


@hookimpl
def vkd_refused_model_types() -> Mapping[str, str]:
    """The remote-code life of the same weights."""
    return {
        "internvl_chat": "InternVLChatModel is remote code that transformers 5 cannot load; use the native checkpoint "
        "with the same weights, such as OpenGVLab/InternVL3-8B-hf (the name ends in -hf)"
    }


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes; what a config does not name is its class's default."""
    return generic.read_presets(__file__)


@hookimpl
def vkd_feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """In the blocks, the first row of each tile is the class token."""
    assigned = generic.feature_rows(model, inputs, layer, rows)
    if layer.name == "projector":
        return assigned
    real = assigned.real.clone()
    real[:: 1 + _patches(model, layer)] = False
    return replace(assigned, real=real)


@hookimpl
def vkd_feature_grid(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """One tile is the whole photo; several show its parts, and one more the whole."""
    return generic.feature_grid(model, inputs, layer, assigned, photos, tile=_patches(model, layer))


def _patches(model: PreTrainedModel, layer: DistillationLayer) -> int:
    """How many real rows a tile has."""
    vision = model.config.vision_config
    high, wide = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    return int(high * wide * (model.config.downsample_ratio**2 if layer.name == "projector" else 1))


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternViT and a Qwen2; a square photo is one tile."""
    special = [*NAMED.values(), "<video>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tiny.tokenizer(texts, special, end="<|endoftext|>", named={**NAMED, "video_token": "<video>"})
    settings = {
        "vision_config": {"model_type": "internvl_vision", **tiny.vision_sizes(image_size)},
        "text_config": {"model_type": "qwen2", **tiny.language_sizes(tokenizer, "<|im_end|>")},
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "downsample_ratio": 0.5,
    }
    video = {"size": {"height": image_size, "width": image_size}}
    image, options = {**video, "crop_to_patches": True}, {"image_seq_length": (image_size // tiny.PATCH // 2) ** 2}
    kind = "GotOcr2ImageProcessor"
    processor = tiny.processor(model_type, tokenizer, image, options, __file__, video=video, image_class=kind)
    return tiny.build(model_type, tokenizer, settings, processor, seed=seed, stop="<|im_end|>")
