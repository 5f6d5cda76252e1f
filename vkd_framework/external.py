"""Teachers from elsewhere: the vision models of timm and open_clip, each with its own preprocessing.

Photos are squeezed into the model's square as a whole instead of cropped, because what they are compared with covers
the whole photo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vkd_framework.errors import ModelError, RecipeError, first_line
from vkd_framework.recipe import EXTERNAL_PACKAGES, TeacherConfig, nearest
from vkd_framework.types import Photo

ELSEWHERE = ("hf-hub:", "local-dir:")
"""What names begin with that both packages look up outside their lists."""


@dataclass(frozen=True, eq=False)
class ExternalModel:
    """A frozen vision model. `prepare`: PIL picture -> `[3, H, W]`; `maps`: `[N, 3, H, W]` -> `[N, E, h, w]`."""

    source: str
    device: torch.device
    prepare: Callable[[Any], Tensor]
    maps: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def see(self, photos: Sequence[Photo]) -> Tensor:
        """`[N, E, h, w]`: the map of the last layer for each photo. Raises ModelError when the model has none."""
        pixels = torch.stack([self.prepare(photo.open()) for photo in photos])
        found = self.maps(pixels.to(self.device))
        if found.ndim != 4 or found.shape[-1] * found.shape[-2] < 2:
            raise ModelError(
                f"teacher.source: {self.source} gives no map of features ({list(found.shape[1:])}); "
                "take a vision transformer or a convolutional network"
            )
        return found.float()

    def centred(self, photos: Sequence[Photo], batch_size: int = 64) -> ExternalModel:
        """The same model with its mean feature over `photos` taken off.

        Most of a feature's length is what all photos share. A linear map meets that with its bias, so that a distance
        relative to the whole length would be small whatever the student sees.
        """
        starts = range(0, len(photos), batch_size)
        sums = [self.see(photos[start : start + batch_size]).double().mean(dim=(2, 3)).sum(dim=0) for start in starts]
        mean = (torch.stack(sums).sum(dim=0) / len(photos)).float()[:, None, None]
        return replace(self, maps=lambda pixels: self.maps(pixels) - mean)


def check(config: TeacherConfig) -> None:
    """Raise RecipeError when the package is missing or knows no such model; reads no weights."""
    package, name, tag = _parts(config)
    if find_spec(package) is None:
        raise RecipeError(
            f"teacher.source: {config.source} needs {EXTERNAL_PACKAGES[package]}, which is not installed; "
            'pip install "vkd-framework[teachers]"'
        )
    if name.startswith(ELSEWHERE):
        return
    if package == "timm":
        import timm

        known = timm.list_models()
        plain, _, variant = name.partition(".")
        if plain not in known:
            raise RecipeError(f"teacher.source: timm has no model {plain!r}{nearest(plain, known)}")
        if variant and f"{plain}.{variant}" not in (tagged := timm.list_pretrained(f"{plain}.*")):
            raise RecipeError(f"teacher.source: timm has no weights {name!r}; there are {_few(tagged)}")
        return
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise RecipeError(f"teacher.source: open_clip has no model {name!r}{nearest(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if config.weights == "random" or tag in tags or (tag and os.path.isfile(tag)):
        return
    problem = f"open_clip has no weights {tag!r} of {name}{nearest(tag, tags)}" if tag else "name the weights"
    raise RecipeError(
        f"teacher.source: {problem}; write open_clip/{name}/TAG, with TAG a file or one of {_few(tags)}, "
        "or set teacher.weights to random"
    )


def load(config: TeacherConfig, device: torch.device, seed: int) -> ExternalModel:
    """Load or draw the weights. Raises RecipeError as `check` does, ModelError when weights cannot be had."""
    check(config)
    package, name, tag = _parts(config)
    make = _from_timm if package == "timm" else _from_open_clip
    with torch.random.fork_rng(), _without_log():
        torch.manual_seed(seed)
        try:
            prepare, maps = make(name, tag, config.weights == "pretrained", device)
        except Exception as error:  # what a download or a checkpoint may raise is nowhere said
            told = first_line(error).rstrip(".")
            raise ModelError(
                f"teacher.source: {config.source} cannot be loaded ({told}); "
                "check the name and the network, or set teacher.weights to random"
            ) from error
    return ExternalModel(config.source or "", device, prepare, maps)


def _parts(config: TeacherConfig) -> tuple[str, str, str]:
    """Package, model, and the tag of the weights where one is written."""
    package, _, rest = (config.source or "").partition("/")
    if package == "timm" or rest.startswith(ELSEWHERE):
        return package, rest, ""
    name, _, tag = rest.partition("/")
    return package, name, tag


def _from_timm(name: str, _tag: str, pretrained: bool, device: torch.device) -> tuple[Any, Callable[[Tensor], Tensor]]:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(name, pretrained=pretrained, num_classes=0).eval().requires_grad_(False).to(device)
    settings = resolve_model_data_config(model) | {"crop_pct": 1.0, "crop_mode": "squash"}

    def maps(pixels: Tensor) -> Tensor:
        found: Tensor = model.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[-1]
        return found

    return create_transform(**settings, is_training=False), maps


def _from_open_clip(
    name: str, tag: str, pretrained: bool, device: torch.device
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    import open_clip

    wanted = {"pretrained": tag or None} if pretrained else {"load_weights": False}
    model, _, prepare = open_clip.create_model_and_transforms(name, image_resize_mode="squash", **wanted)
    visual = model.visual.eval().requires_grad_(False).to(device)

    def maps(pixels: Tensor) -> Tensor:
        found: Tensor = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NCHW", intermediates_only=True
        )["image_intermediates"][-1]
        return found

    return prepare, maps


@contextmanager
def _without_log() -> Iterator[None]:
    """open_clip writes what goes wrong to the root logger, and raises it as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
