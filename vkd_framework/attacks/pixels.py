"""Changed photos, noisy or cropped: whether forgetting holds only for photos as they were taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from vkd_framework.attacks.target import Target
from vkd_framework.recipe import CropAttack, NoiseAttack
from vkd_framework.types import ImageQuestionPair, Photo


def attack(config: NoiseAttack | CropAttack, target: Target) -> dict[str, Any]:
    """Exact match of Test VQA on changed photos."""

    def change(photo: Photo) -> Photo:
        if isinstance(config, CropAttack):
            return cropped(photo, config.keep)
        return noisy(photo, config.spread, target.seed)

    return {"exact_match": target.exact_match(target.mllm, with_photos(target.test, change))}


def with_photos(pairs: tuple[ImageQuestionPair, ...], change: Callable[[Photo], Photo]) -> list[ImageQuestionPair]:
    """The pairs with every photo changed, each photo once."""
    changed: dict[str, Photo] = {}
    for pair in pairs:
        for photo in pair.photos:
            if photo.key not in changed:
                changed[photo.key] = change(photo)
    return [replace(pair, photos=tuple(changed[photo.key] for photo in pair.photos)) for pair in pairs]


def noisy(photo: Photo, spread: float, seed: int) -> Photo:
    """Gaussian noise on every channel of every pixel, cut off at black and white; `spread` as a share of the range."""
    picture = photo.open()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed}/{photo.key}".encode()).hexdigest()[:8], 16))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    shaken = pixels + 255 * spread * torch.randn(pixels.shape, generator=generator)
    data = shaken.round().clamp(0, 255).to(torch.uint8).numpy().tobytes()
    return Photo(f"{photo.key}/noise-{spread:g}", Image.frombytes("RGB", picture.size, data))


def cropped(photo: Photo, keep: float) -> Photo:
    """The middle of the photo, `keep` of its height and width, enlarged to the old size."""
    picture = photo.open()
    width, height = picture.size
    left, top = (round(side * (1 - keep) / 2) for side in (width, height))
    middle = picture.crop((left, top, width - left, height - top))
    return Photo(f"{photo.key}/crop-{keep:g}", middle.resize((width, height), Image.Resampling.BICUBIC))
