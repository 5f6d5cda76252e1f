"""What is remembered of many photos: in memory as long as it is little, on disk from there on.

So a cast of a thousand people takes no more memory than one of ten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import IO

import numpy
import torch
from torch import Tensor

from vkd_framework.cache import cache_folder

LIMIT = 2**26
"""Bytes of features that are held in memory."""

Keys = tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Shelf(MutableMapping[Keys, Mapping[str, Tensor]]):
    """Keys of the photos shown together -> layer -> features. Nothing can be taken out or replaced.

    What goes beyond `limit` bytes is written to a file in the user's cache folder that is gone when the shelf is.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._held, self._written = limit, 0, 0
        self._near: dict[Keys, Mapping[str, Tensor]] = {}
        self._far: dict[Keys, dict[str, _Place]] = {}
        self._file: IO[bytes] | None = None

    @property
    def bytes(self) -> int:
        """Memory held by what is not on disk."""
        return self._held

    def __getitem__(self, keys: Keys) -> Mapping[str, Tensor]:
        near = self._near.get(keys)
        return near if near is not None else {layer: self._read(place) for layer, place in self._far[keys].items()}

    def __setitem__(self, keys: Keys, features: Mapping[str, Tensor]) -> None:
        if keys in self:
            return
        size = sum(rows.numel() * rows.element_size() for rows in features.values())
        if self._held + size <= self._limit:
            self._near[keys] = features
            self._held += size
        else:
            self._far[keys] = {layer: self._write(rows) for layer, rows in features.items()}

    def __delitem__(self, keys: Keys) -> None:
        raise TypeError("what is on the shelf stays there")

    def __iter__(self) -> Iterator[Keys]:
        yield from self._near
        yield from self._far

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def __contains__(self, keys: object) -> bool:
        return keys in self._near or keys in self._far

    def _write(self, rows: Tensor) -> _Place:
        if self._file is None:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_folder())
        place = _Place(self._written, rows.shape, rows.dtype)
        self._file.seek(place.offset)
        self._file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self._written += place.bytes
        return place

    def _read(self, place: _Place) -> Tensor:
        assert self._file is not None
        self._file.seek(place.offset)
        found = numpy.frombuffer(bytearray(self._file.read(place.bytes)), dtype=numpy.uint8)
        return torch.from_numpy(found).view(place.dtype).view(place.shape)
