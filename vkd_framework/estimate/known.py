"""What can be found out about a recipe's pairs and model without its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from vkd_framework.errors import AdapterError
from vkd_framework.estimate import Estimate, Rate, devices, estimate
from vkd_framework.estimate.advice import HEADROOM, advise, wanted_bytes
from vkd_framework.estimate.text import text
from vkd_framework.estimate.tokens import Tokens, assumed, counted
from vkd_framework.estimate.work import sizes
from vkd_framework.plugins import Adapter, Anatomy
from vkd_framework.recipe import CelebsData, Recipe, is_tiny
from vkd_framework.types import Splits
from vkd_framework.vanilla import untaught


def estimate_of(
    recipe: Recipe, adapter: Adapter, anatomy: Anatomy, device: str, splits: Splits, *, process: int = 0
) -> Estimate:
    """What a run on `device` will cost. `anatomy`: of the recipe's model. `process`: as in `estimate`."""
    anatomy, found = looked_at(recipe, adapter, anatomy, splits)
    rate = devices.measured(device, recipe.model.dtype, sizes(anatomy).hidden)
    return estimate(recipe, anatomy, found, rate, process=0 if device.startswith("cuda") else process)


def told(
    recipe: Recipe,
    anatomy: Anatomy,
    found: Tokens,
    device: str,
    changed: Callable[[tuple[str, ...]], Recipe],
    *,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    process: int = 0,
) -> str:
    """The estimate as text, and what to change for a GPU: the named one, of that memory, or the one at hand.

    `changed`: the recipe with further `--set` values.
    """
    limit = None if gpu_memory is None else HEADROOM * wanted_bytes(gpu_memory)
    if gpu is not None:
        limit = limit or HEADROOM * devices.named(gpu, recipe.model.dtype)[1].memory
    elif limit is None and device.startswith("cuda"):
        limit = HEADROOM * devices.memory_at_hand(device)
    held = process if limit is None else 0
    width = sizes(anatomy).hidden

    @cache
    def rate(dtype: str) -> Rate:
        return devices.measured(device, dtype, width) if gpu is None else devices.named(gpu, dtype)[0]

    def again(overrides: tuple[str, ...]) -> Estimate:
        other = changed(overrides)
        return estimate(other, anatomy, found, rate(other.model.dtype), process=held)

    first = again(())
    return text(first, limit=limit, changes=() if limit is None else advise(first, limit, again))


def looked_at(recipe: Recipe, adapter: Adapter, anatomy: Anatomy, splits: Splits | None) -> tuple[Anatomy, Tokens]:
    """The model's anatomy and the tokens of its pairs.

    Pairs are encoded where data and processor are on this machine; elsewhere, and with `splits` None, their tokens are
    assumed. The embedded default is built: its vocabulary depends on the cast.
    """
    if splits is None:
        return anatomy, assumed(anatomy)
    if is_tiny(recipe.model.source) and recipe.teach is not None and isinstance(recipe.data, CelebsData):
        built = untaught(adapter, recipe, splits, "cpu")
        return built, tokens_of(splits, built, built.processor)
    return anatomy, tokens_of(splits, anatomy, local_processor(recipe.model.source))


def tokens_of(splits: Splits, anatomy: Anatomy, processor: Any) -> Tokens:
    """The tokens of the pairs that unlearning sees most of; assumed where there is no processor, or none that can."""
    pairs = [pair for pair in splits.retain if pair.photos] or list(splits.retain)
    photos = len({key for pair in (*splits.forget, *splits.retain) for key in pair.photo_keys})
    if processor is not None:
        with suppress(AdapterError):
            return counted(anatomy, processor, pairs, photos)
    return replace(assumed(anatomy), photos=photos)


def local_processor(source: str) -> Any:
    """The processor of a folder or of a hub id in the hub's cache; None when it is not on this machine."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, local_files_only=True)
    except Exception:  # processors fail in ways of their own, and the estimate goes on without
        return None
