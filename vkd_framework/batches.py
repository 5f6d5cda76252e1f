"""Which pairs a step sees, as a pure function of the seed and the step: resuming needs nothing but the step number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from vkd_framework.types import ImageQuestionPair

T = TypeVar("T")


class Batches:
    """Endless shuffled passes over `pairs`; `batch(step)` is the same whenever it is asked for."""

    def __init__(self, pairs: Sequence[ImageQuestionPair], size: int, seed: int) -> None:
        self._pairs, self._size, self._seed = pairs, size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> list[ImageQuestionPair]:
        """The pairs of one step, always `size` of them."""
        return [self._at(index) for index in range(step * self._size, (step + 1) * self._size)]

    def _at(self, index: int) -> ImageQuestionPair:
        epoch, place = divmod(index, len(self._pairs))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._pairs), generator=generator)
        return self._pairs[int(self._order[place])]


class MixedBatches:
    """Batches that draw a fixed share from each of several sets."""

    def __init__(self, sets: Mapping[str, Sequence[ImageQuestionPair]], sizes: Mapping[str, int], seed: int) -> None:
        self._parts = [
            Batches(pairs, sizes[name], seed + i)
            for i, (name, pairs) in enumerate(sets.items())
            if pairs and sizes.get(name)
        ]

    def batch(self, step: int) -> list[ImageQuestionPair]:
        """The pairs of one step, set after set."""
        return [pair for part in self._parts for pair in part.batch(step)]


def in_parts(items: Sequence[T], size: int | None) -> list[Sequence[T]]:
    """The items in parts of at most `size`; None leaves them whole."""
    size = size or max(1, len(items))
    return [items[start : start + size] for start in range(0, len(items), size)]


def shared_out(size: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `size`, as near to the shares as can be; what is left goes to the largest rests."""
    exact = {name: size * share / sum(shares.values()) for name, share in shares.items()}
    sizes = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: sizes[name] - exact[name])
    for name in by_rest[: size - sum(sizes.values())]:
        sizes[name] += 1
    return sizes
