"""What is remembered of many photos or pairs: in memory as long as it is little, on disk from there on.

So a cast of a thousand people takes no more memory than one of ten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from io import FileIO
from typing import TypeVar

import torch
from torch import Tensor

from vkd_framework.cache import cache_folder

LIMIT = 2**26
"""Bytes that are held in memory."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _OnDisk(Mapping[str, Tensor]):
    """Tensors that are read one by one, when they are asked for."""

    places: Mapping[str, _Place]
    read: Callable[[_Place], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Shelf(MutableMapping[K, Mapping[str, Tensor]]):
    """Such as the keys of photos shown together -> layer -> features. Nothing can be taken out or replaced.

    What goes beyond `limit` bytes is written to a file in the user's cache folder that is gone when the shelf is.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._held, self._written = limit, 0, 0
        self._near: dict[K, Mapping[str, Tensor]] = {}
        self._far: dict[K, dict[str, _Place]] = {}
        self._file: FileIO | None = None
        self._pinned = torch.cuda.is_available()

    @property
    def bytes(self) -> int:
        """Memory held by what is not on disk."""
        return self._held

    @property
    def bytes_on_disk(self) -> int:
        """What went beyond the limit."""
        return self._written

    def __getitem__(self, key: K) -> Mapping[str, Tensor]:
        near = self._near.get(key)
        return near if near is not None else _OnDisk(self._far[key], self._read)

    def __setitem__(self, key: K, tensors: Mapping[str, Tensor]) -> None:
        if key in self:
            return
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held + size <= self._limit:
            self._near[key] = tensors
            self._held += size
        else:
            self._far[key] = {name: self._write(tensor) for name, tensor in tensors.items()}

    def __delitem__(self, key: K) -> None:
        raise TypeError("what is on the shelf stays there")

    def __iter__(self) -> Iterator[K]:
        yield from self._near
        yield from self._far

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def __contains__(self, key: object) -> bool:
        return key in self._near or key in self._far

    def _write(self, tensor: Tensor) -> _Place:
        if self._file is None:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_folder(), buffering=0)
        place = _Place(self._written, tensor.shape, tensor.dtype)
        self._file.seek(place.offset)
        unwritten = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        while len(unwritten):
            unwritten = unwritten[self._file.write(unwritten) :]
        self._written += place.bytes
        return place

    def _read(self, place: _Place) -> Tensor:
        """On a machine with a GPU in pinned memory, from which a copy to the device need not be waited for."""
        assert self._file is not None
        found = torch.empty(place.bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._file.seek(place.offset)
        unread = found.numpy().data
        while len(unread):
            count = self._file.readinto(unread)
            if not count:
                raise OSError("a file of remembered tensors in the cache folder is shorter than it was")
            unread = unread[count:]
        return found.view(place.dtype).view(place.shape)
