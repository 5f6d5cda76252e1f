"""How many tokens a pair is made of: counted on pairs that a processor encoded, or assumed from the model's config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vkd_framework.generic import image_token_id
from vkd_framework.plugins import Anatomy
from vkd_framework.types import EncodedBatch, ImageQuestionPair

if TYPE_CHECKING:
    from torch import Tensor

PHOTO_SIDE = 448
"""Pixels along the side of a photo that nothing is known of."""

TEXT_TOKENS, ANSWER_TOKENS = 64, 8
SAMPLE = 64
"""Most pairs that are encoded to count their tokens."""


@dataclass(frozen=True)
class Tokens:
    """What one pair with its photos costs a model, on average over a batch, padding included.

    `patches`: tokens of the encoder. `tile`: those of them that see each other. `image`: tokens of the language model
    that stand for the photos, out of `text`, all of its tokens. `answer`: tokens that are predicted. `pixels`: numbers
    that the photos are handed over in. `photos`: different photos in all, 0 where that is not known.
    """

    patches: float
    tile: float
    image: float
    text: float
    answer: float
    pixels: float
    photos: int = 0
    how: str = "as encoded"

    def __str__(self) -> str:
        tokens = f"{self.text:,.0f} tokens, {self.image:,.0f} of them the photo's"
        return f"{self.patches:,.0f} patches, {tokens} ({self.how})"


def counted(anatomy: Anatomy, processor: Any, pairs: Sequence[ImageQuestionPair], photos: int = 0) -> Tokens:
    """The tokens of `pairs`, some of them, as `processor` encodes them in one batch."""
    some = pairs[:: max(1, -(-len(pairs) // SAMPLE))]
    stop_ids = anatomy.adapter.stop_token_ids(anatomy.model, processor)
    batch = anatomy.adapter.tokenize_pairs(processor, some, stop_ids, True, "right")
    return of_batch(anatomy, batch, photos)


def of_batch(anatomy: Anatomy, batch: EncodedBatch, photos: int = 0) -> Tokens:
    """The tokens of a batch that is encoded already."""
    count, length = batch.labels.shape
    embedding = patch_embedding(anatomy)
    per_patch, side = embedding[0].numel(), embedding.shape[-1]
    # pictures are `[..., C, H, W]`, or patches already: `[T, numbers of a patch]`
    pictures = [value for value in batch.inputs.values() if value.is_floating_point() and value.ndim >= 2]
    patches = sum(value.numel() for value in pictures) / per_patch / count
    tile = patches
    for value in pictures:
        if value.ndim >= 4:
            tile = min(tile, value.shape[-1] // side * (value.shape[-2] // side))
    image = int((batch.inputs["input_ids"] == image_token_id(anatomy.model)).sum()) / count
    answer = int(batch.answer.sum()) / count
    return Tokens(patches, tile, image, length, answer, patches * per_patch, photos)


def assumed(anatomy: Anatomy) -> Tokens:
    """The tokens of a photo that fills one tile, or is of `PHOTO_SIDE`, and of a short question with its answer."""
    patch = patch_embedding(anatomy)
    config = getattr(anatomy.model.get_submodule(anatomy.modules.encoder), "config", None)
    side = getattr(config, "image_size", None)
    side = max(side) if isinstance(side, list | tuple) else side
    side = side if isinstance(side, int) else PHOTO_SIDE
    across = math.ceil(side / patch.shape[-1])
    patches = across**2
    image = patches / merged(anatomy)
    pixels = patches * patch[0].numel()
    how = f"assumed: one photo of {side} x {side} in one tile, a short question"
    return Tokens(patches, patches, image, image + TEXT_TOKENS, ANSWER_TOKENS, pixels, how=how)


def patch_embedding(anatomy: Anatomy) -> Tensor:
    """`[width, ...]`: what makes tokens of patches, a convolution or, where there is none, the first linear map."""
    from torch import nn

    modules = list(anatomy.model.get_submodule(anatomy.modules.encoder).modules())
    convolutions = [module.weight for module in modules if isinstance(module, nn.Conv2d | nn.Conv3d)]
    return (convolutions or [module.weight for module in modules if isinstance(module, nn.Linear)])[0]


def merged(anatomy: Anatomy) -> int:
    """How many patches become one token of the language model: by how much wider the projector's input is."""
    from torch import nn

    width = next((layer.width for layer in anatomy.layers if layer.width), None)
    names = {name.removesuffix(".weight") for name in anatomy.parts["projector"]}
    inputs = [
        module.in_features
        for name, module in anatomy.model.named_modules()
        if name in names and isinstance(module, nn.Linear)
    ]
    return max(1, inputs[0] // width) if inputs and width else 1
