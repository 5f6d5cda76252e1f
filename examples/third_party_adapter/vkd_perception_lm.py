"""PerceptionLM: a timm vision transformer in front of a Llama.

model.vision_tower.timm_model.blocks.{i}   vision encoder; [tiles, 1 + patches, D], the class token first if any
model.multi_modal_projector                projector; drops the class token, pools 2 x 2 patches into one visual token
model.language_model                       language model, with lm_head beside `model`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vkd_framework import tiny
from vkd_framework.generic import feature_grid, feature_rows, tokenize_pairs
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, EncodedBatch, FeatureGrid, FeatureRows, ImageQuestionPair

IMAGE, VIDEO, TURN_END = "<|image|>", "<|video|>", "<|eot_id|>"
POOLING = 2
"""Patches along the side of what becomes one visual token."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """PerceptionLM; a transformers that does not know it cannot load its checkpoints either."""
    return ["perception_lm"]


@hookimpl
def vkd_tokenize_pairs(
    processor: Any, pairs: Sequence[ImageQuestionPair], stop_ids: Sequence[int], with_answer: bool, padding_side: str
) -> EncodedBatch:
    """The processor cannot stack photos with different numbers of tiles; the model takes all tiles in one row."""
    return tokenize_pairs(TilesInOneRow(processor), pairs, stop_ids, with_answer, padding_side)  # type: ignore[arg-type]


class TilesInOneRow:
    """A processor whose `pixel_values` are `[1, tiles of the batch, 3, height, width]`."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, return_tensors: str, **arguments: Any) -> dict[str, Any]:
        """What the processor returns, as tensors."""
        import torch

        encoded = dict(self._processor(**arguments))
        tiles = encoded.pop("pixel_values", None)
        inputs = {name: torch.tensor(value) for name, value in encoded.items()}
        return inputs if tiles is None else inputs | {"pixel_values": torch.cat(list(tiles))[None]}


@hookimpl
def vkd_feature_rows(model: Any, inputs: Mapping[str, Any], layer: DistillationLayer, rows: int) -> FeatureRows | None:
    """In the blocks, the first row of every tile is the class token, which shows no part of the photo."""
    if layer.name == "projector" or not model.config.vision_use_cls_token:
        return None
    import torch

    sample = feature_rows(model, inputs, layer, rows).sample
    rows_per_tile = rows // inputs["pixel_values"].shape[1]
    return FeatureRows(sample, real=torch.arange(rows, device=sample.device) % rows_per_tile != 0)


@hookimpl
def vkd_feature_grid(
    model: Any,
    inputs: Mapping[str, Any],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Tiles line by line, as the generic answer has them, but the whole photo comes first instead of last."""
    tile = int(assigned.real.sum()) // inputs["pixel_values"].shape[1]
    grid = feature_grid(model, inputs, layer, assigned, photos, tile=tile)
    for b in range(len(photos)):
        own = (assigned.sample == b) & assigned.real
        grid.box[own] = grid.box[own].roll(tile, dims=0)
    return grid


@hookimpl
def vkd_tiny_model(model_type: str, texts: Sequence[str], image_size: int, seed: int) -> tuple[Any, Any]:
    """About 800,000 parameters: three timm blocks of 96 channels, three language layers of 128."""
    named = {"image_token": IMAGE, "video_token": VIDEO}
    tokenizer = tiny.tokenizer(texts, list(named.values()), end=TURN_END, named=named)
    tile = -(-image_size // (tiny.PATCH * POOLING)) * tiny.PATCH * POOLING
    settings = {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "do_pooling": False,
            "initializer_range": tiny.INITIALIZER_RANGE,
            "model_args": {
                "embed_dim": tiny.VISION_WIDTH,
                "depth": tiny.BLOCKS,
                "num_heads": tiny.HEADS,
                "mlp_ratio": 3,
                "global_pool": "",
                "patch_size": tiny.PATCH,
                "img_size": [tile, tile],
                "ref_feat_shape": [tile // tiny.PATCH, tile // tiny.PATCH],
            },
        },
        "text_config": {"model_type": "llama", **tiny.language_sizes(tokenizer), "max_position_embeddings": 2048},
        "projector_pooling_ratio": POOLING,
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO),
    }
    return tiny.build(model_type, tokenizer, settings, tiny_processor(tokenizer, tile), seed=seed)


def tiny_processor(tokenizer: Any, tile: int) -> Any:
    """The family's processor for photos of one tile and a thumbnail, or up to four tiles for long ones."""
    from transformers import PerceptionLMImageProcessorFast, PerceptionLMProcessor, PerceptionLMVideoProcessor

    return PerceptionLMProcessor(
        video_processor=PerceptionLMVideoProcessor(size={"height": tile, "width": tile}),
        image_processor=PerceptionLMImageProcessorFast(vision_input_type="thumb+tile", tile_size=tile, max_num_tiles=4),
        tokenizer=tokenizer,
        patch_size=tiny.PATCH,
        pooling_ratio=POOLING,
        chat_template=CHAT_TEMPLATE,
    )
