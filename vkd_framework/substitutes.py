"""What takes the place of the forgotten people's features: the mean of others, somebody else's, or those of noise.

Shapes: `R` feature rows of a layer, `D` channels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy
import torch
from PIL import Image
from torch import Tensor

from vkd_framework.errors import RecipeError
from vkd_framework.losses import RELATIONAL
from vkd_framework.recipe import Recipe
from vkd_framework.types import ImageQuestionPair, Photo

Memory = Mapping[tuple[str, ...], Mapping[str, Tensor]]
"""Keys of the photos shown together -> layer -> `[R, D]`, on the CPU."""

Look = Callable[[Sequence[str], Iterable[ImageQuestionPair]], Memory]
"""How a teacher sees the photos of some pairs, at some layers of the student."""


def substitutes(
    recipe: Recipe,
    look: Look,
    layers: Sequence[str],
    forget: Sequence[ImageQuestionPair],
    known: Sequence[ImageQuestionPair],
) -> Memory:
    """What stands in for the features of the forgotten: of nobody (`mean`), of somebody else, or of noise."""
    target = recipe.repel_target
    if not layers:
        return {}
    if target == "noise":
        blurred = {pair.photo_keys: _without_motif(pair, recipe.seed) for pair in forget if pair.photos}
        seen = look(layers, blurred.values())
        return {keys: seen[pair.photo_keys] for keys, pair in blurred.items()}
    if not known:
        raise RecipeError(
            f"losses.repel.target: {target} takes features of people who stay, and no retain pair shows any; use noise"
        )
    due, theirs = look(layers, forget), look(layers, known)
    if target == "mean":
        means = {name: _mean(recipe, name, due, theirs) for name in layers}
        return {keys: {n: means[n].expand(len(rows), -1) for n, rows in own.items()} for keys, own in due.items()}
    named = {pair.photo_keys for pair in known if pair.subject is not None} or set(theirs)
    sizes = {keys: _rows(theirs[keys]) for keys in named}
    return {keys: theirs[_stranger(keys, _rows(own), sizes, recipe.seed)] for keys, own in due.items()}


def without_motif(picture: Image.Image, seed: str) -> Image.Image:
    """Noise of the picture's size, with the mean and the spread that its channels have."""
    pixels = numpy.asarray(picture, dtype=numpy.float64)
    draw = numpy.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    drawn = draw.normal(pixels.mean(axis=(0, 1)), pixels.std(axis=(0, 1)), pixels.shape)
    return Image.fromarray(drawn.round().clip(0, 255).astype(numpy.uint8))


def _mean(recipe: Recipe, layer: str, due: Memory, theirs: Memory) -> Tensor:
    """`[R, D]`, place by place where all photos have as many rows, otherwise `[1, D]`, the mean of photos' means."""
    counts = {len(own[layer]) for memory in (theirs, due) for own in memory.values()}
    if len(counts) == 1:
        return _mean_of(own[layer] for own in theirs.values())
    if recipe.losses.repel.distance in RELATIONAL:
        raise RecipeError(
            f"losses.repel.target: mean with distance {recipe.losses.repel.distance} compares patches place by place, "
            f"but photos have {min(counts)} to {max(counts)} rows at {layer}; take relative_squared or cosine, or "
            "target noise"
        )
    return _mean_of(own[layer].mean(dim=0, keepdim=True) for own in theirs.values())


def _mean_of(tensors: Iterable[Tensor]) -> Tensor:
    """Added up one after the other, in float32: what lies on disk stays there."""
    total, count, dtype = torch.zeros(()), 0, torch.float32
    for tensor in tensors:
        total, count, dtype = total.to(tensor.device) + tensor.float(), count + 1, tensor.dtype
    return (total / count).to(dtype)


def _rows(features: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer -> how many rows a photo has there; read once, since what lies on disk is read whole."""
    return {name: len(rows) for name, rows in features.items()}


def _stranger(
    keys: tuple[str, ...], rows: Mapping[str, int], sizes: Mapping[tuple[str, ...], Mapping[str, int]], seed: int
) -> tuple[str, ...]:
    """The photo of somebody else, drawn by the seed among those of the same `sizes`."""
    fitting = sorted(other for other, theirs in sizes.items() if theirs == rows)
    if not fitting:
        raise RecipeError(
            f"losses.repel.target: stranger needs a retained photo with as many feature rows as {keys[0]} "
            f"({next(iter(rows.values()))}), and there is none; take mean or noise"
        )
    return random.Random(f"{seed}/{keys}").choice(fitting)


def _without_motif(pair: ImageQuestionPair, seed: int) -> ImageQuestionPair:
    photos = tuple(
        Photo(f"{photo.key} as noise", without_motif(photo.open(), f"{seed}/{photo.key}")) for photo in pair.photos
    )
    return replace(pair, photos=photos)
