"""What the student's features are compared with: the recipe's teacher, asked about every photo.

Photos are fixed, so their features are computed once, before anything is trained, and remembered.

Shapes: `R` feature rows of a layer, `D` channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vkd_framework import external
from vkd_framework.alignment import LinearMap, laid_over
from vkd_framework.batches import in_parts
from vkd_framework.cache import CACHE_VARIABLE, cache_folder
from vkd_framework.errors import RecipeError, VKDError, on_one_line
from vkd_framework.features import FeatureTap, photo_features, photo_grid, vision_forward
from vkd_framework.losses import RELATIONAL
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import FeatureTerm, Recipe
from vkd_framework.shelf import Shelf
from vkd_framework.substitutes import Look, Memory, substitutes
from vkd_framework.types import ImageQuestionPair, Splits

BATCH = 64
FITTED = 256
"""Most pairs from which a linear map is fitted and a foreign teacher's mean is taken."""


class Teacher:
    """Remembered features, asked for by pair."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def rows(self, layer: str, pairs: Iterable[ImageQuestionPair], device: torch.device | None = None) -> Tensor:
        """`[R, D]`: the features of the pairs' photos, in the order of `photo_features`; text-only pairs have none."""
        shown = [pair.photo_keys for pair in pairs if pair.photos]
        found = {keys: self._memory[keys][layer] for keys in dict.fromkeys(shown)}
        there = {keys: rows.to(device or rows.device, non_blocking=True) for keys, rows in found.items()}
        return torch.cat([there[keys] for keys in shown])

    @property
    def bytes(self) -> int:
        """Memory held by the remembered features; tensors that several layers share count once."""
        if isinstance(self._memory, Shelf):
            return self._memory.bytes
        held = {id(rows): rows for photo in self._memory.values() for rows in photo.values()}
        return sum(rows.numel() * rows.element_size() for rows in held.values())


@dataclass(frozen=True)
class Guides:
    """What the attract and the repel term compare with, and the maps to a foreign teacher's channels by layer."""

    attract: Teacher
    repel: Teacher
    maps: Mapping[str, LinearMap] = field(default_factory=dict)


def guides(mllm: MLLM, recipe: Recipe, splits: Splits, ignorant: Callable[[], MLLM] | None = None) -> Guides:
    """The recipe's teacher, asked about every photo that a term will compare. `mllm` is the student before training.

    `ignorant` loads the model of `teacher.kind: ignorant`. Raises RecipeError when a teacher's features do not fit.
    """
    terms = recipe.losses
    attract, repel = (layers_of(term, recipe) for term in (terms.attract, terms.repel))
    everything = dict.fromkeys((*attract, *repel))
    if not everything:
        return Guides(Teacher({}), Teacher({}))
    look = _look(mllm, recipe, splits, ignorant)
    known = kept_pairs(splits)
    if recipe.repel_target in ("repel", "teacher"):
        seen = look(tuple(everything), [*(splits.retain if attract else ()), *(splits.forget if repel else ())])
        both = Guides(Teacher(seen), Teacher(seen))
    else:
        retained = look(attract, splits.retain if attract else ())
        both = Guides(Teacher(retained), Teacher(substitutes(recipe, look, repel, splits.forget, known)))
    if recipe.teacher.kind != "external":
        return both
    mapped = [
        name
        for name in everything
        if any(term.distance not in RELATIONAL and name in layers_of(term, recipe) for term in terms.feature_terms)
    ]
    return replace(both, maps=_fitted(mllm, look, mapped, known))


def layers_of(term: FeatureTerm, recipe: Recipe) -> tuple[str, ...]:
    """The layers that a term compares; none when it is switched off."""
    return (term.layers or recipe.layers) if term.weight else ()


def kept_pairs(splits: Splits) -> list[ImageQuestionPair]:
    """Retain pairs with photos of nobody who is to be forgotten."""
    return [pair for pair in splits.retain if pair.photos and not splits.shows_forgotten(pair)]


def watched(mllm: MLLM, layers: Sequence[str], pairs: Iterable[ImageQuestionPair], batch_size: int = BATCH) -> Memory:
    """The features that a model's own visual modules make of the pairs' photos."""
    memory: Shelf[tuple[str, ...]] = Shelf()
    for chunk, inputs, tap in _passes(mllm, layers, pairs, batch_size):
        found = photo_features(mllm, inputs, tap)
        for b, pair in enumerate(chunk):
            with _room():
                memory[pair.photo_keys] = {name: f.rows[f.sample == b].cpu() for name, f in found.items()}
    return memory


def resampled(
    foreign: external.ExternalModel,
    mllm: MLLM,
    layers: Sequence[str],
    pairs: Iterable[ImageQuestionPair],
    batch_size: int = BATCH,
) -> Memory:
    """The features of a foreign model, laid over the rows that `mllm` has at each layer."""
    memory: Shelf[tuple[str, ...]] = Shelf()
    for chunk, inputs, tap in _passes(mllm, layers, pairs, batch_size):
        maps = foreign.see([photo for pair in chunk for photo in pair.photos])
        sizes = [[photo.open().size for photo in pair.photos] for pair in chunk]
        laid: list[tuple[Tensor, Tensor]] = []
        found: list[dict[str, Tensor]] = [{} for _ in chunk]
        for layer in tap.layers:
            grid = photo_grid(mllm, inputs, tap, layer, sizes)
            rows = next((rows for box, rows in laid if torch.equal(box, grid.box)), None)
            if rows is None:
                rows = laid_over(maps, grid).cpu()
                laid.append((grid.box, rows))
            sample = photo_features(mllm, inputs, tap)[layer.name].sample.cpu()
            for b, own in enumerate(found):
                own[layer.name] = rows[sample == b]
        for pair, own in zip(chunk, found, strict=True):
            with _room():
                memory[pair.photo_keys] = own
    return memory


@contextmanager
def _room() -> Iterator[None]:
    """Tell in one line that the features did not fit on the disk."""
    try:
        yield
    except OSError as error:
        raise VKDError(
            f"{cache_folder()}: the teacher's features of all photos could not be kept ({on_one_line(error)}); make "
            f"room there, or let {CACHE_VARIABLE} name a folder on a larger disk, and go on with --resume"
        ) from error


def _look(mllm: MLLM, recipe: Recipe, splits: Splits, ignorant: Callable[[], MLLM] | None) -> Look:
    kind = recipe.teacher.kind
    if kind == "external":
        foreign = external.load(recipe.teacher, mllm.device, recipe.seed)
        if known := _some(kept_pairs(splits)):
            foreign = foreign.centred([photo for pair in known for photo in pair.photos])
        return lambda layers, pairs: resampled(foreign, mllm, layers, pairs)
    if kind == "self":
        return lambda layers, pairs: watched(mllm, layers, pairs)
    assert ignorant is not None
    other = ignorant()
    other.model.requires_grad_(False)

    def look(layers: Sequence[str], pairs: Iterable[ImageQuestionPair]) -> Memory:
        photos = [pair for pair in pairs if pair.photos]
        _check_alike(mllm, other, layers, photos[:1], recipe.teacher.source or "")
        return watched(other, layers, photos)

    return look


def _check_alike(
    mllm: MLLM, other: MLLM, layers: Sequence[str], pairs: Sequence[ImageQuestionPair], source: str
) -> None:
    for name in layers:
        other.layer(name, f"teacher.source: {source}")
    ours, theirs = watched(mllm, layers, pairs), watched(other, layers, pairs)
    for keys, own in ours.items():
        for name, rows in own.items():
            if rows.shape != theirs[keys][name].shape:
                raise RecipeError(
                    f"teacher.source: {source} has features of {_size(theirs[keys][name])} at {name} where the student "
                    f"has {_size(rows)}; name a model of the same architecture and size"
                )


def _passes(
    mllm: MLLM, layers: Sequence[str], pairs: Iterable[ImageQuestionPair], batch_size: int
) -> Iterator[tuple[Sequence[ImageQuestionPair], Mapping[str, Tensor], FeatureTap]]:
    """Batches of the pairs with different photos, and the features they gave."""
    places = tuple(mllm.layer(name) for name in layers)
    photos = list({pair.photo_keys: pair for pair in pairs if pair.photos}.values()) if places else []
    for chunk in in_parts(photos, batch_size):
        inputs = mllm.tokenize(chunk, with_answer=False).inputs
        with torch.no_grad(), FeatureTap(mllm.model, places) as tap:
            vision_forward(mllm, inputs)
            yield chunk, inputs, tap


def _fitted(mllm: MLLM, look: Look, layers: Sequence[str], known: Sequence[ImageQuestionPair]) -> dict[str, LinearMap]:
    """A map for each of the layers, fitted on some photos of people who stay."""
    if not layers:
        return {}
    if not known:
        raise RecipeError(
            "teacher.kind: external learns its maps from photos of people who stay, and no retain pair shows any; "
            f"take a distance without a map ({' or '.join(RELATIONAL)})"
        )
    some = _some(known)
    ours, theirs = watched(mllm, layers, some), look(layers, some)
    maps = {}
    for name in layers:
        maps[name] = LinearMap.fitted(
            (own[name].to(mllm.device), theirs[keys][name].to(mllm.device)) for keys, own in ours.items()
        )
    return maps


def _some(known: Sequence[ImageQuestionPair]) -> list[ImageQuestionPair]:
    """Pairs with different photos, spread over all of them."""
    photos = list({pair.photo_keys: pair for pair in known}.values())
    return photos[:: max(1, -(-len(photos) // FITTED))]


def _size(rows: Tensor) -> str:
    return f"{rows.shape[0]} rows and {rows.shape[1]} channels"
