"""Where a run's starting model comes from: a hub id or a folder as it is, or taught and kept in the user's cache.

A taught model is cached under a hash of everything it depends on (people down to their pixels, the model's first
weights, how some pairs are encoded and labelled, the teaching and its code), so that a second run starts at once and a
changed recipe, adapter or version never finds a stale model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from vkd_framework import ranks
from vkd_framework.cache import cache_folder, hash_of_sources
from vkd_framework.checkpoint import atomic_folder, locked, read_json, write_json
from vkd_framework.errors import RecipeError, first_line
from vkd_framework.frozen import freeze_language_model
from vkd_framework.plugins import MLLM, Adapter
from vkd_framework.progress import say
from vkd_framework.recipe import CelebsData, ModelConfig, Recipe, digest, is_tiny
from vkd_framework.teach import teach
from vkd_framework.types import ImageQuestionPair, Splits

ENCODED = 16
"""About how many pairs stand for how all of them are encoded and labelled."""

TEACHING = "teaching.json"
"""The file beside a taught model that says how long it took, and which weights came out."""

TAUGHT_BY = [hash_of_sources(f"{module}.py") for module in ("teach", "batches", "gradients", "losses")]
"""What teaching is made of besides data, weights and encoding: what other code taught is not taken for our own."""


def starting_model(
    adapter: Adapter, recipe: Recipe, splits: Splits, device: str, *, knows_forgotten: bool = True
) -> str:
    """The source to load: the recipe's own, or the folder of a model taught the cast.

    Without `knows_forgotten`, the retain-only reference: taught the same way, but never on a photo of the forgotten.
    """
    if recipe.teach is None:
        return recipe.model.source
    groups = splits.teach if knows_forgotten else splits.teach_retain
    pairs = _all(groups)
    first = untaught(adapter, recipe, splits, device)
    encoded = first.tokenize(pairs[:: max(1, len(pairs) // ENCODED)])
    key = digest(
        [
            TAUGHT_BY,
            adapter.name,
            torch.__version__,
            transformers.__version__,
            recipe.teach.model_dump(),
            fingerprint(first.model.state_dict()),
            fingerprint({**encoded.inputs, "labels": encoded.labels}),
            content_hash(pairs),
        ]
    )
    folder = cache_folder() / "taught" / key
    with locked(folder):
        if not ranks.once(folder.exists):
            what = "teach the vanilla model" if knows_forgotten else "teach the retain-only reference"
            say(f"{what}: {recipe.teach.steps} steps on {len(pairs):,} pairs, once; then kept in {folder}")
            begin = time.perf_counter()
            teach(first, groups, recipe.teach, what=what, resume=Path(f"{folder}.partial.pt"))
            seconds = time.perf_counter() - begin
            ranks.once(lambda: _keep(first, folder, seconds))
    return str(folder)


def teaching_seconds(source: str) -> float | None:
    """How long the model in the cache folder `source` was taught, after the last interruption; None if not recorded."""
    try:
        return float(read_json(Path(source) / TEACHING)["seconds"])
    except OSError:
        return None


def taught_weights(source: str) -> str | None:
    """The fingerprint of the weights of the model in the cache folder `source`; None if not recorded.

    The folder's name stands for what it was taught from. Another processor, a GPU, or another number of threads makes
    other weights of that.
    """
    try:
        return str(read_json(Path(source) / TEACHING)["weights"])
    except (OSError, KeyError):
        return None


def device_of(recipe: Recipe) -> str:
    """The device of the recipe, `auto` resolved; of several processes on a machine, each takes a GPU of its own.

    Raises RecipeError for a GPU that torch does not see.
    """
    wanted = recipe.model.device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"model.device: {wanted} was asked for, but torch sees no GPU; use auto or cpu")
    index, seen = None if wanted == "auto" else torch.device(wanted).index, torch.cuda.device_count()
    if index is not None and index >= seen:
        raise RecipeError(
            f"model.device: {wanted} was asked for, but torch sees {seen} GPU{'s' * (seen > 1)}; use auto, or cuda:0 "
            f"to cuda:{seen - 1}"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if ranks.size() == 1 or device == "cpu":
        return device
    if device != "cuda" or ranks.local() >= torch.cuda.device_count():
        raise RecipeError(
            f"model.device: {device} cannot be shared by {ranks.size()} processes, each needs a GPU of its own and "
            f"torch sees {torch.cuda.device_count()}; use auto, and launch no more processes than GPUs"
        )
    return f"cuda:{ranks.local()}"


def load(adapter: Adapter, config: ModelConfig, source: str, device: str) -> MLLM:
    """The model of `source`, frozen, and held and asked as the recipe wants it."""
    frozen = config.frozen_language_model or ranks.divide()
    mllm = adapter.load(source, getattr(torch, config.dtype), "cpu" if frozen else device)
    if frozen:
        freeze_language_model(mllm, device, int8=config.quantize == "int8", offload=config.offload)
    mllm.model.requires_grad_(False)
    if config.attention is not None:
        attend(mllm, config.attention)
    return mllm


def attend(mllm: MLLM, how: str) -> None:
    """Have the model compute attention in the given way. Raises RecipeError where that cannot be."""
    try:
        mllm.model.set_attn_implementation(how)
    except (ImportError, ValueError) as error:
        raise RecipeError(
            f"model.attention: {how} cannot be had ({first_line(error)}); take sdpa or eager, or null"
        ) from error


def save(mllm: MLLM, folder: Path) -> None:
    """What `AutoModelForImageTextToText` and `AutoProcessor` load."""
    mllm.model.save_pretrained(folder)
    mllm.processor.save_pretrained(folder)


def fingerprint(tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> str:
    """SHA-256 over names and bytes of tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def content_hash(pairs: Sequence[ImageQuestionPair]) -> str:
    """SHA-256 over what pairs say and show."""
    sha = hashlib.sha256()
    seen: set[str] = set()
    for pair in pairs:
        sha.update(repr((pair.question, pair.answer, pair.kind, pair.photo_keys)).encode())
        for photo in pair.photos:
            if photo.key not in seen:
                seen.add(photo.key)
                sha.update(photo.open().tobytes())
    return sha.hexdigest()


def _keep(taught: MLLM, folder: Path, seconds: float) -> None:
    with atomic_folder(folder) as temporary:
        save(taught, temporary)
        write_json(temporary / TEACHING, {"seconds": seconds, "weights": fingerprint(taught.model.state_dict())})


def _all(groups: Mapping[str, Sequence[ImageQuestionPair]]) -> list[ImageQuestionPair]:
    return [pair for pairs in groups.values() for pair in pairs]


def untaught(adapter: Adapter, recipe: Recipe, splits: Splits, device: str) -> MLLM:
    """The model that is taught, before it is: the recipe's own, or the embedded default with random weights."""
    dtype = getattr(torch, recipe.model.dtype)
    if not is_tiny(recipe.model.source):
        return adapter.load(recipe.model.source, dtype, device)
    assert isinstance(recipe.data, CelebsData)
    assert recipe.teach is not None
    measured = _all(splits.columns)
    texts = sorted(
        {text for pair in (*_all(splits.teach), *measured) for text in (pair.question, pair.answer, *pair.options)}
    )
    tiny = adapter.tiny_model(
        texts, recipe.data.image_size, recipe.teach.seed, recipe.model.source.partition(":")[2] or None
    )
    tiny.model.to(device=device, dtype=dtype)
    return tiny
