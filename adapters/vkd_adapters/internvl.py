"""InternVL 2.5 and later, as transformers itself knows them (the `-hf` checkpoints).

model.vision_tower             InternViT; [tiles, class token + patches, D], a picture is one tile or several
model.multi_modal_projector    projector; 2 x 2 patches -> one visual token
model.language_model           language model, with lm_head beside `model`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The native architecture."""
    return ["internvl"]


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes."""
    presets: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return presets


@hookimpl
def vkd_feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """In the blocks, the first row of each tile is the class token."""
    assigned = generic.feature_rows(model, inputs, layer, rows)
    if layer.name == "projector":
        return assigned
    vision = model.config.vision_config
    high, wide = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    real = assigned.real.clone()
    real[:: 1 + high * wide] = False
    return replace(assigned, real=real)


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternViT and a Qwen2; a square photo is one tile."""
    special = [*NAMED.values(), "<video>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tiny.tokenizer(texts, special, end="<|endoftext|>", named={**NAMED, "video_token": "<video>"})
    square = {"height": image_size, "width": image_size}
    settings = {
        "vision_config": {"model_type": "internvl_vision", **tiny.vision_sizes(image_size)},
        "text_config": {"model_type": "qwen2", **tiny.language_sizes(tokenizer, "<|im_end|>")},
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "downsample_ratio": 0.5,
    }
    options = {"image_seq_length": (image_size // tiny.PATCH // 2) ** 2, "chat_template": CHAT_TEMPLATE}
    image = {"size": square, "crop_to_patches": True}
    kind = "GotOcr2ImageProcessor"
    processor = tiny.processor(model_type, tokenizer, image, options, video={"size": square}, image_class=kind)
    return tiny.build(model_type, settings, tokenizer, seed, stop="<|im_end|>"), processor
