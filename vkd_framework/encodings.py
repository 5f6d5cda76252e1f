"""Pairs that were encoded before are put together into a batch, instead of asking the processor again.

A training run shows the same few thousand pairs tens of thousands of times, and for a small model's batch a processor
takes as long as a tenth of the forward and backward pass. What comes out is bit for bit what the processor would have
returned: the first batches of every kind are encoded both ways, and where the two differ the processor goes on being
asked. So it is, always, for batches whose photos differ in size or number, which processors may pad to fit each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from vkd_framework.types import EncodedBatch, ImageQuestionPair, Photo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin

    from vkd_framework.shelf import Shelf

K = TypeVar("K", bound=Hashable)
LIMIT = 2**26
"""Bytes that are kept in memory for one processor: an eighth for tokens, the rest for what photos became."""

PHOTOS_LIMIT = LIMIT - LIMIT // 8

DISK_LIMIT = 2**32
"""Bytes of either that are kept on disk beyond that. What has no room there either is encoded anew each time."""

CHECKED = 2
"""Batches of each kind that are encoded both ways before what is kept is trusted."""

Encode = Callable[[Sequence[ImageQuestionPair], bool, str], EncodedBatch]
Tensors = dict[str, "Tensor"]
Row = tuple[Tensors, Tensors]
"""A pair's tokens, and what its photos became."""


@dataclass
class _Kind:
    """What is known about batches of one kind: how text-only pairs show in the photos' tensors, and the padding."""

    padding: dict[str, Any]
    rows_without_photo: bool
    checked: int = 0


class Encodings:
    """What one processor makes of pairs. `encode(pairs, with_answer, padding_side)` asks it.

    Tokens are known by the question, the answer and the sizes of the photos; what photos became, by the photos, as
    objects. What else a pair says must not matter to `encode`, nor what a photo shows to the tokens: whenever a photo
    that is new comes with a question that is known, or the other way round, the two are compared.
    """

    def __init__(self, encode: Encode, limit: int = LIMIT, disk_limit: int = DISK_LIMIT) -> None:
        from vkd_framework.shelf import Shelf

        self._encode, self._disk_limit = encode, disk_limit
        self._tokens: Shelf[Hashable] = Shelf(limit // 8)
        self._photos: Shelf[tuple[Photo, ...]] = Shelf(limit - limit // 8)
        self._kinds: dict[Hashable, _Kind | None] = {}

    @property
    def bytes(self) -> int:
        """Memory held by what is not on disk."""
        return self._tokens.bytes + self._photos.bytes

    def batch(self, pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
        """What `encode` returns for the same arguments."""
        try:
            shown = frozenset(tuple(photo.size for photo in pair.photos) for pair in pairs)
        except OSError:  # told where the photo is read
            return self._encode(pairs, with_answer, padding_side)
        name = (shown, with_answer, padding_side)
        kind = self._kinds.get(name)
        unlike = len(shown - {()}) > 1
        if unlike or (name in self._kinds and kind is None) or (kind is None and len(pairs) == 1):
            return self._encode(pairs, with_answer, padding_side)
        rows = self._rows(pairs, with_answer)
        if rows is not None and kind is not None and kind.checked >= CHECKED:
            joined = _join(rows, kind, padding_side)
            if joined is not None:
                return joined
        batch = self._encode(pairs, with_answer, padding_side)
        self._kinds[name] = None if rows is None else _learnt(batch, rows, kind, padding_side)
        return batch

    def _rows(self, pairs: Sequence[ImageQuestionPair], with_answer: bool) -> list[Row] | None:
        """For each pair its tokens, and what its photos became; None where they cannot be told apart."""
        keys: list[Hashable] = [
            (pair.question, pair.answer if with_answer else None, tuple(photo.size for photo in pair.photos))
            for pair in pairs
        ]
        tokens = {key: dict(self._tokens[key]) for key in set(keys) if key in self._tokens}  # from disk: read once
        photos = {shown: dict(self._photos[shown]) for shown in {p.photos for p in pairs} if shown in self._photos}
        photos[()] = {}
        missing: dict[bool, list[tuple[Hashable, ImageQuestionPair]]] = {}
        covered: set[Hashable] = {*tokens, *photos}  # by what is known, and by the pairs that are asked about
        for key, pair in zip(keys, pairs, strict=True):
            if key not in covered or pair.photos not in covered:
                missing.setdefault(bool(pair.photos), []).append((key, pair))
                covered |= {key, pair.photos}
        for group in missing.values():
            group.reverse()  # another order, so that a batch checked can tell whose row is whose
            parts = _split(self._encode([pair for _, pair in group], with_answer, "right"))
            if parts is None:
                return None
            for (key, pair), (own_tokens, own_photos) in zip(group, parts, strict=True):
                if not (_agree(tokens, key, own_tokens) and _agree(photos, pair.photos, own_photos)):
                    return None
                self._keep(self._tokens, key, own_tokens)
                if not any(isinstance(photo.source, Image.Image) for photo in pair.photos):  # a key would hold it
                    self._keep(self._photos, pair.photos, own_photos)
        return [(tokens[key], photos[pair.photos]) for key, pair in zip(keys, pairs, strict=True)]

    def _keep(self, shelf: Shelf[K], key: K, tensors: Tensors) -> None:
        if shelf.bytes_on_disk < self._disk_limit:
            try:
                shelf[key] = tensors
            except OSError:  # a full disk: nothing is lost but time
                self._disk_limit = 0


def fingerprint(processor: ProcessorMixin) -> str | None:
    """Tells processors apart by what they do; None where that cannot be read off."""
    try:
        tokenizer: dict[str, Any] = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        images = {key: value for key, value in processor.image_processor.to_dict().items() if key != "_processor_class"}
        own = [processor.to_dict(), images, processor.tokenizer.special_tokens_map]  # the class: left by saving
        kinds = [type(part).__name__ for part in (processor, processor.tokenizer, processor.image_processor)]
        tokenizer |= {"padding": None, "truncation": None}  # the state that its last call left
        return json.dumps([kinds, own, processor.chat_template, tokenizer], sort_keys=True, default=str)
    except (AttributeError, TypeError, ValueError):
        return None


def _agree(known: dict[K, Tensors], key: K, part: Tensors) -> bool:
    """Whether a part is what it was in another pair; one that is new becomes known."""
    return _same(known.setdefault(key, part), part)


def _split(batch: EncodedBatch) -> list[Row] | None:
    """Each pair's own tokens, without padding, and its share of what the photos became.

    Of pairs with equally many photos of one size, so that every pair has equally many rows of every tensor.
    """
    import torch

    tensors = {**batch.inputs, "labels": batch.labels, "content": batch.content}
    if "attention_mask" not in tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        return None
    count = len(batch.labels)
    texts = {name for name, value in tensors.items() if value.shape == batch.labels.shape}
    if any(tensors[name].ndim == 0 or len(tensors[name]) % count for name in tensors.keys() - texts):
        return None
    real = tensors["attention_mask"].bool()
    with torch.inference_mode(False):  # what evaluation encodes, training may take later
        return [
            (
                {name: value[b][real[b]].clone() for name, value in tensors.items() if name in texts},
                {
                    name: value[b * len(value) // count : (b + 1) * len(value) // count].clone()
                    for name, value in tensors.items()
                    if name not in texts
                },
            )
            for b in range(count)
        ]


def _join(rows: Sequence[Row], kind: _Kind, padding_side: str) -> EncodedBatch | None:
    """The batch of the given pairs; None where it takes padding that is not known, or shapes do not fit."""
    import torch

    lengths = torch.tensor([len(tokens["labels"]) for tokens, _ in rows])
    longest = int(lengths.max())
    place = torch.arange(longest)
    real = place < lengths[:, None] if padding_side == "right" else place >= longest - lengths[:, None]
    names = rows[0][0].keys()
    if any(tokens.keys() != names for tokens, _ in rows) or (not bool(real.all()) and names - kind.padding.keys()):
        return None
    joined = {}
    for name in names:
        flat = torch.cat([tokens[name] for tokens, _ in rows])
        joined[name] = torch.full(real.shape, kind.padding.get(name, 0), dtype=flat.dtype).masked_scatter(real, flat)
    for name, example in {name: value for _, photos in rows for name, value in photos.items()}.items():
        none = [torch.zeros_like(example)] if kind.rows_without_photo else []
        parts = [part for _, photos in rows for part in ([photos[name]] if name in photos else none)]
        if any(part.shape[1:] != example.shape[1:] for part in parts):
            return None
        joined[name] = torch.cat(parts)
    labels, content = joined.pop("labels"), joined.pop("content")
    return EncodedBatch(joined, labels, content)


def _learnt(batch: EncodedBatch, rows: Sequence[Row], kind: _Kind | None, padding_side: str) -> _Kind | None:
    """What is known after one more batch that was encoded both ways; None when the two differ."""
    whole = {**batch.inputs, "labels": batch.labels, "content": batch.content}
    padded = whole["attention_mask"] == 0
    padding = dict(kind.padding) if kind else {}
    if bool(padded.any()):
        padding |= {name: whole[name][padded][0].item() for name in rows[0][0]}
    for rows_without_photo in (False, True) if kind is None else (kind.rows_without_photo,):
        learnt = _Kind(padding, rows_without_photo, (kind.checked if kind else 0) + (len(rows) > 1))
        joined = _join(rows, learnt, padding_side)
        if joined and _same(whole, {**joined.inputs, "labels": joined.labels, "content": joined.content}):
            return learnt
    return None


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    import torch

    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )
