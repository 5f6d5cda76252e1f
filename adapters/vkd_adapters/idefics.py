"""Idefics2, Idefics3 and SmolVLM.

model.vision_model    SigLIP; Idefics2: [pictures, patches, D], padded to the largest; the others: [tiles, patches, D]
model.connector       projector; Idefics2: a resampler to a fixed number of tokens; the others: pixel shuffle
model.text_model      language model, with lm_head beside `model`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vkd_framework import generic, tiny
from vkd_framework.errors import AdapterError
from vkd_framework.hookspecs import hookimpl
from vkd_framework.types import DistillationLayer, FeatureGrid, FeatureRows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, ProcessorMixin

STOP, FAKE = "<end_of_utterance>", "<fake_token_around_image>"
NAMED = {
    **{"image_token": "<image>", "global_image_token": "<global-img>", "end_of_utterance_token": STOP},
    **{"fake_image_token": FAKE, "image_boundary_token": FAKE},
}
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@hookimpl
def vkd_model_types() -> Sequence[str]:
    """The three architectures."""
    return ["idefics3", "idefics2", "smolvlm"]


@hookimpl
def vkd_model_presets() -> Mapping[str, Mapping[str, Any]]:
    """Published sizes; what a config does not name is its class's default."""
    return generic.read_presets(__file__)


@hookimpl
def vkd_feature_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layer: DistillationLayer, rows: int
) -> FeatureRows:
    """Idefics2 pads pictures to the largest of the batch; patches that are not wholly picture are not real."""
    assigned = generic.feature_rows(model, inputs, layer, rows)
    if model.config.model_type != "idefics2" or layer.name == "projector":
        return assigned
    return replace(assigned, real=_patch_mask(model, inputs).flatten())


@hookimpl
def vkd_feature_grid(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: DistillationLayer,
    assigned: FeatureRows,
    photos: Sequence[Sequence[tuple[int, int]]],
) -> FeatureGrid:
    """Idefics2's patches fill each picture line by line, its resampler's tokens lie nowhere; the others have tiles."""
    import torch

    vision = model.config.vision_config
    if model.config.model_type != "idefics2":
        scale = model.config.scale_factor if layer.name == "projector" else 1
        tile = (vision.image_size // vision.patch_size // scale) ** 2
        return generic.feature_grid(model, inputs, layer, assigned, photos, tile=tile)
    if layer.name == "projector":
        raise AdapterError(
            "the projector of Idefics2 is a resampler, whose tokens show no part of the photo; name blocks for an "
            "external teacher, such as vision.0"
        )
    photo, box = torch.zeros_like(assigned.sample), torch.zeros(len(assigned.sample), 4, device=assigned.sample.device)
    mask = _patch_mask(model, inputs)
    for i, shown in enumerate(mask):
        own = (torch.arange(len(photo), device=photo.device) // shown.numel() == i) & assigned.real
        photo[own] = i
        box[own] = generic.grid_boxes(int(shown.any(dim=1).sum()), int(shown.any(dim=0).sum())).to(box)
    return FeatureGrid(photo, box)


def _patch_mask(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """`[pictures, rows, columns]` bool: the patches that are wholly picture."""
    patch = model.config.vision_config.patch_size
    picture = inputs["pixel_values"].flatten(0, 1).flatten(1).any(dim=1)  # what only fills up the batch is all zero
    mask = inputs["pixel_attention_mask"].flatten(0, 1)[picture].bool()
    return mask.unfold(1, patch, patch).unfold(2, patch, patch).all(dim=(-1, -2))


@hookimpl
def vkd_tiny_model(
    model_type: str, texts: Sequence[str], image_size: int, seed: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """SigLIP and a Llama or Mistral; nine visual tokens a picture or tile of 48 pixels squared."""
    second, tokens = model_type == "idefics2", (image_size // tiny.PATCH // 2) ** 2
    tokenizer = tiny.tokenizer(texts, [*dict.fromkeys(NAMED.values()), *TILES], begin="<s>", end="</s>", named=NAMED)
    resampler = {
        **{"hidden_size": tiny.WIDTH, "num_key_value_heads": tiny.HEADS // 2, "resampler_n_latents": tokens},
        **{"resampler_depth": 2, "resampler_n_heads": tiny.HEADS, "resampler_head_dim": tiny.WIDTH // tiny.HEADS},
    }
    steep = {"initializer_range": 0.08}  # its linear projector learns slowly; from 0.05 it takes half as long again
    settings = {
        **steep,
        "vision_config": tiny.vision_sizes(image_size) | steep,
        "text_config": tiny.language_sizes(tokenizer, STOP) | steep | {"model_type": "mistral" if second else "llama"},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        **({"perceiver_config": resampler} if second else {"scale_factor": 2}),
    }
    tile: dict[str, Any] = {"longest_edge": image_size}
    if second:
        image = {"size": {"shortest_edge": image_size // 2, **tile}}
    else:
        image = {"size": {"longest_edge": 2 * image_size}, "max_image_size": tile}
    processor = tiny.processor(model_type, tokenizer, image, {"image_seq_len": tokens}, __file__)
    return tiny.build(model_type, tokenizer, settings, processor, seed=seed, stop=STOP)
