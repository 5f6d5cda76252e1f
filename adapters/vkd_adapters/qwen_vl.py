"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

model.visual.blocks.{i}                vision encoder; rows packed over the batch, [patches, D], no batch dimension
model.visual.merger                    projector, nested in the encoder; 2 x 2 patches -> one visual token
model.visual.deepstack_merger_list     Qwen3-VL: further projectors, from inner blocks into the first language layers
model.language_model                   language model, with lm_head beside `model`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows, VisionModules

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

TOKENS = {
    **{"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    **{"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
}


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The three architectures."""
    return ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes; what a config does not name is its class's default."""
    return generic.read_presets(__file__)


@hookimpl
def vkd_locate_vision_modules(model: PreTrainedModel) -> VisionModules:
    """The mergers lie inside the encoder."""
    return generic.locate_vision_modules(model, nested_projector=("merger", "deepstack_merger_list"))


@hookimpl
def vkd_feature_grid(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Visual tokens line by line, in Qwen2.5-VL window by window; in the blocks, each one's patches together."""
    import torch

    vision, boxes = model.config.vision_config, []
    merge = int(vision.spatial_merge_size)
    inner = 1 if layer.name == "projector" else merge
    window = getattr(vision, "window_size", None)
    for _, high, wide in inputs["image_grid_thw"].tolist():
        y, x = (
            axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (high // merge, wide // merge)), indexing="ij")
        )
        if window is not None:
            side = window // merge // vision.patch_size
            order = torch.argsort((y // side * wide + x // side) * len(y), stable=True)
            y, x = y[order], x[order]
        dy, dx = (axis.flatten() for axis in torch.meshgrid(torch.arange(inner), torch.arange(inner), indexing="ij"))
        upper = (y[:, None] * inner + dy).flatten() * merge / inner / high
        left = (x[:, None] * inner + dx).flatten() * merge / inner / wide
        step = merge / inner
        boxes.append(torch.stack([left, upper, left + step / wide, upper + step / high], dim=1))
    photo = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(box) for box in boxes]))
    return FeatureGrid(photo.to(assigned.sample.device), torch.cat(boxes).to(assigned.sample.device))


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Patches of 8 pixels; a photo of 48 pixels squared is nine visual tokens."""
    special = ["<|im_start|>", "<|im_end|>", *TOKENS.values()]
    tokenizer = tiny.tokenizer(texts, special, end="<|endoftext|>", kind="Qwen2TokenizerFast")
    sizes = tiny.vision_sizes(image_size)
    width, vision = sizes.pop("hidden_size"), {**sizes, "depth": tiny.BLOCKS, "num_heads": tiny.HEADS}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": width, "hidden_size": tiny.WIDTH, "mlp_ratio": 3}
    else:
        vision |= {"hidden_size": width, "out_hidden_size": tiny.WIDTH}
    if model_type == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    language = tiny.language_sizes(tokenizer, "<|im_end|>") | {"head_dim": tiny.WIDTH // tiny.HEADS}
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}
    settings = {
        "vision_config": {**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "text_config": {**language, "rope_theta": 10_000.0, "rope_scaling": rope},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()},
    }
    image = {"patch_size": tiny.PATCH, "merge_size": 2, "temporal_patch_size": 2}
    image |= {"min_pixels": (2 * tiny.PATCH) ** 2, "max_pixels": image_size**2}
    processor = tiny.processor(model_type, tokenizer, image, {}, __file__)
    return tiny.build(model_type, tokenizer, settings, processor, seed=seed, stop="<|im_end|>")
