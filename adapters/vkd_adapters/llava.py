"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-OneVision.

model.vision_tower             CLIP or SigLIP; [tiles, class token + patches, D], one tile a picture in LLaVA-1.5
model.multi_modal_projector    projector; beside it, in the tiled ones, the bare parameter model.image_newline
model.language_model           language model, with lm_head beside `model`

LLaVA-NeXT and OneVision cut a picture into tiles, and drop the patches that only pad it to the tiles' grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The three architectures."""
    return ["llava", "llava_next", "llava_onevision"]


@hookimpl
def vkd_refused_model_types() -> Mapping[str, str]:
    """The original repositories' own layouts."""
    mend = "a checkpoint in the layout of LLaVA's own repository; use the converted one, such as"
    return {
        "llava_llama": f"{mend} llava-hf/llava-1.5-7b-hf",
        "llava_qwen": f"{mend} llava-hf/llava-onevision-qwen2-7b-ov-hf",
    }


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes; what a config does not name is its class's default."""
    return generic.read_presets(__file__)


@hookimpl
def vkd_feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """Tile after tile; neither a class token nor what only pads a picture shows part of it."""
    import torch

    number, pictures = _tiles(model, inputs)
    sample = torch.arange(len(number)).repeat_interleave(number)
    real = torch.cat([boxes[..., 2] > 0 for boxes in pictures])
    if model.config.vision_feature_select_strategy == "default" and layer.name != "projector":
        real = torch.nn.functional.pad(real, (1, 0), value=False)
    per_picture = torch.tensor([len(tiles) for tiles in pictures]) * real.shape[1]
    device = inputs["input_ids"].device
    return FeatureRows(sample.repeat_interleave(per_picture).to(device), real.flatten().to(device))


@hookimpl
def vkd_feature_grid(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Line by line in each tile; together the tiles show the picture once more."""
    import torch

    _, pictures = _tiles(model, inputs)
    box = torch.cat(pictures)
    photo = torch.arange(len(pictures)).repeat_interleave(torch.tensor([tiles[..., 0].numel() for tiles in pictures]))
    if len(assigned.sample) > len(photo):  # a class token before the patches of each tile
        box = torch.nn.functional.pad(box, (0, 0, 1, 0))
        photo = torch.nn.functional.pad(photo.view(len(box), -1), (1, 0)).flatten()
    device = assigned.sample.device
    return FeatureGrid(photo.to(device), box.flatten(0, 1).to(device))


def _tiles(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`[B]` pictures of each sample, and of each picture the boxes `[tiles, patches, 4]`, zero for padding."""
    import torch

    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    image_token = (inputs["input_ids"] == generic.image_token_id(model)).cpu()
    number = _pictures(inputs, image_token)
    sample = torch.arange(len(number)).repeat_interleave(number)
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [None] * len(sample)
    if model.config.model_type == "llava_onevision":  # it cuts into tiles only what is shown alone
        sizes = [size if number[b] == 1 else None for size, b in zip(sizes, sample, strict=True)]
    return number, [_shown(model.config, side, size) for size in sizes]


def _pictures(inputs: Mapping[str, Tensor], image_token: Tensor) -> Tensor:
    """`[B]`: how many pictures each sample shows; templates may write them with nothing in between."""
    tokens = image_token.sum(dim=1)
    if "image_sizes" not in inputs:  # every picture has as many tokens
        return tokens * len(inputs["pixel_values"]) // tokens.sum()
    if "batch_num_images" not in inputs:  # the published templates end every picture with a line break
        return (image_token & ~image_token.roll(1, dims=1)).sum(dim=1)
    listed = inputs["batch_num_images"].cpu()  # of samples without a picture, some versions list 0 and some nothing
    return (tokens > 0).long().masked_scatter(tokens > 0, listed[listed > 0])


def _shown(config: Any, side: int, size: Sequence[int] | None) -> Tensor:
    """`[tiles, side * side, 4]`: boxes of the whole picture as one tile, then of its tiles; zero for what pads them."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    whole = generic.grid_boxes(side, side)[None]
    if size is None:
        return whole
    high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    index = torch.arange(high * wide * side**2).view(high, wide, side, side).transpose(1, 2)
    shown = unpad_image(index.reshape(1, high * side, wide * side), size)[0]
    boxes = torch.zeros(index.numel(), 4)
    boxes[shown.flatten()] = generic.grid_boxes(*shown.shape)
    return torch.cat([whole, boxes.view(-1, side**2, 4)])


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """CLIP and a Llama, or SigLIP and a Qwen2; tiles as large as the photos."""
    one, square = model_type == "llava_onevision", {"height": image_size, "width": image_size}
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tiny.tokenizer(texts, list(named.values()), begin="<s>", end="</s>", named=named)
    shapes = [[high * image_size, wide * image_size] for high, wide in ((1, 1), (1, 2), (2, 1), (2, 2))]
    grid: dict[str, Any] = {} if model_type == "llava" else {"image_grid_pinpoints": shapes}
    select: dict[str, Any] = {"vision_feature_select_strategy": "full" if one else "default"}
    settings = {
        "vision_config": {"model_type": f"{'siglip' if one else 'clip'}_vision_model", **tiny.vision_sizes(image_size)},
        "text_config": {"model_type": "qwen2" if one else "llama", **tiny.language_sizes(tokenizer)},
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1 if one else -2,
    }
    if one:
        image, options = {"size": square}, {"num_image_tokens": (image_size // tiny.PATCH) ** 2}
    else:
        image = {"size": {"shortest_edge": image_size}, "crop_size": square}
        options = {"num_additional_image_tokens": 1, "patch_size": tiny.PATCH}
    processor = tiny.processor(model_type, tokenizer, image | grid, options | select, __file__, video={"size": square})
    return tiny.build(model_type, tokenizer, settings | select | grid, processor, seed=seed)
