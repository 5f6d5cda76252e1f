"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

model.visual.blocks.{i}                vision encoder; rows packed over the batch, [patches, D], no batch dimension
model.visual.merger                    projector, nested in the encoder; 2 x 2 patches -> one visual token
model.visual.deepstack_merger_list     Qwen3-VL: further projectors, from inner blocks into the first language layers
model.language_model                   language model, with lm_head beside `model`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import VisionModules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The three architectures."""
    return ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes; what is not named is the config class's default."""
    presets: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return presets


@hookimpl
def vkd_locate_vision_modules(model: PreTrainedModel) -> VisionModules:
    """The mergers lie inside the encoder."""
    return generic.locate_vision_modules(model, nested_projector=("merger", "deepstack_merger_list"))


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A patch of 8 pixels; a photo of 48 is nine visual tokens."""
    special = ["<|im_start|>", "<|im_end|>", *TOKENS.values()]
    tokenizer = tiny.tokenizer(texts, special, end="<|endoftext|>", kind="Qwen2TokenizerFast")
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    vision = tiny.vision_sizes(image_size)
    wide, deep = vision["hidden_size"], vision["num_hidden_layers"]
    settings = {
        "text_config": {**tiny.language_sizes(tokenizer, "<|im_end|>"), "rope_scaling": rope, "rope_theta": 10_000.0, "head_dim": tiny.WIDTH // tiny.HEADS},
        "vision_config": {
            **{key: vision[key] for key in ("intermediate_size", "patch_size", "initializer_range")},
            "depth": deep, "num_heads": tiny.HEADS, "spatial_merge_size": 2, "temporal_patch_size": 2,
            **({"embed_dim": wide, "hidden_size": tiny.WIDTH, "mlp_ratio": 3} if model_type == "qwen2_vl" else
               {"hidden_size": wide, "out_hidden_size": tiny.WIDTH}),
            **({"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64} if model_type == "qwen3_vl" else {}),
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()},
    }  # fmt: skip
    image = {
        "patch_size": tiny.PATCH, "merge_size": 2, "temporal_patch_size": 2,
        "min_pixels": (2 * tiny.PATCH) ** 2, "max_pixels": image_size**2,
    }  # fmt: skip
    processor = tiny.processor(model_type, tokenizer, image, chat_template=CHAT_TEMPLATE)
    return tiny.build(model_type, settings, tokenizer, seed, stop="<|im_end|>"), processor
