"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-OneVision.

model.vision_tower             CLIP or SigLIP; [tiles, class token + patches, D], one tile a picture in LLaVA-1.5
model.multi_modal_projector    projector; beside it, in the tiled ones, the bare parameter model.image_newline
model.language_model           language model, with lm_head beside `model`

LLaVA-NeXT and OneVision cut a picture into tiles, and drop the patches that only pad it to the tiles' grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The three architectures."""
    return ["llava", "llava_next", "llava_onevision"]


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """The published 7B sizes."""
    presets: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return presets


@hookimpl
def vkd_feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """Tile after tile; neither a class token nor what only pads a picture shows part of it."""
    import torch

    config, vision = model.config, model.config.vision_config
    side = vision.image_size // vision.patch_size
    image_tokens = (inputs["input_ids"] == generic.image_token_id(model)).cpu()
    if "image_sizes" in inputs:
        pictures = (image_tokens & ~image_tokens.roll(1, dims=1)).sum(dim=1)
        sizes = inputs["image_sizes"].tolist()
    else:
        pictures = image_tokens.sum(dim=1) // side**2
        sizes = [None] * int(pictures.sum())
    sample = torch.arange(len(pictures)).repeat_interleave(pictures)
    if config.model_type == "llava_onevision":  # it cuts into tiles only what is shown alone
        sizes = [size if pictures[b] == 1 else None for size, b in zip(sizes, sample, strict=True)]
    tiles = [torch.ones(1, side**2, dtype=torch.bool) if size is None else _kept(config, side, size) for size in sizes]
    real = torch.cat(tiles)
    if config.vision_feature_select_strategy == "default" and layer.name != "projector":
        real = torch.nn.functional.pad(real, (1, 0), value=False)
    rows_of = real.shape[1] * torch.tensor([len(picture) for picture in tiles])
    device = inputs["input_ids"].device
    return FeatureRows(sample.repeat_interleave(rows_of).to(device), real.flatten().to(device))


def _kept(config: Any, side: int, size: Sequence[int]) -> Tensor:
    """`[tiles, side * side]`: the whole picture as one tile, then the patches of its tiles that are not padding."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    index = torch.arange(high * wide * side**2).view(high, wide, side, side).transpose(1, 2)
    kept = torch.zeros(high * wide * side**2, dtype=torch.bool)
    kept[unpad_image(index.reshape(1, high * side, wide * side), size).flatten()] = True
    return torch.cat([torch.ones(1, side**2, dtype=torch.bool), kept.view(-1, side**2)])


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """CLIP and a Llama, or SigLIP and a Qwen2; tiles as large as the photos."""
    one, patches = model_type == "llava_onevision", (image_size // tiny.PATCH) ** 2
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tiny.tokenizer(texts, list(named.values()), begin="<s>", end="</s>", named=named)
    shapes = [[high * image_size, wide * image_size] for high, wide in ((1, 1), (1, 2), (2, 1), (2, 2))]
    grid: dict[str, Any] = {} if model_type == "llava" else {"image_grid_pinpoints": shapes}
    select = {"vision_feature_select_strategy": "full" if one else "default"}
    square = {"height": image_size, "width": image_size}
    settings = {
        "vision_config": {"model_type": f"{'siglip' if one else 'clip'}_vision_model", **tiny.vision_sizes(image_size)},
        "text_config": {"model_type": "qwen2" if one else "llama", **tiny.language_sizes(tokenizer)},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1 if one else -2,
        **select,
        **grid,
    }
    if one:
        image: dict[str, Any] = {"size": square}
        options: dict[str, Any] = {"num_image_tokens": patches}
    else:
        image = {"size": {"shortest_edge": image_size}, "crop_size": square}
        options = {"num_additional_image_tokens": 1, "patch_size": tiny.PATCH}
    options |= {"chat_template": CHAT_TEMPLATE, **select}
    processor = tiny.processor(model_type, tokenizer, image | grid, options, video={"size": square})
    return tiny.build(model_type, settings, tokenizer, seed), processor
