"""Data sources. Each yields the same `Splits`, so that nothing above this room knows where its pairs come from.

A source is a module with `load(config) -> Splits`. It must yield photos with stable keys, unique pair ids, the two sets
that are trained on (`forget`, `retain`) and at least the columns `forget_vqa`, `test_vqa` and `retain_vqa`; whatever is
measured on unseen photos must stay out of `forget` and `retain`. What is wrong with the data is a `DataError`.
Further columns may stand beside the usual ones. The report takes `test_vqa_generation` for a part of `test_vqa`.
"""

from __future__ import annotations

from vkd_framework.data import celebs, clear, fiubench, jsonl, mllmu_bench, published
from vkd_framework.data.counts import told
from vkd_framework.recipe import AnyData, CelebsData, ClearData, JsonlData, MllmuBenchData, digest
from vkd_framework.types import ImageQuestionPair, Splits

__all__ = ["content_digest", "is_here", "load", "told"]


def is_here(config: AnyData) -> bool:
    """Whether the data can be loaded, or are found broken, without asking the hub."""
    return isinstance(config, CelebsData | JsonlData) or not published.on_hub(config.source)


def load(config: AnyData) -> Splits:
    """The data that `config` names."""
    if isinstance(config, CelebsData):
        return celebs.load(config)
    if isinstance(config, JsonlData):
        return jsonl.load(config)
    if isinstance(config, MllmuBenchData):
        return mllmu_bench.load(config)
    if isinstance(config, ClearData):
        return clear.load(config)
    return fiubench.load(config)


def content_digest(splits: Splits) -> str:
    """A hash of what is trained on, measured and attacked with, down to the pixels of the photos."""

    def said(pair: ImageQuestionPair) -> list[object]:
        shown = [(photo.key, photo.pixels) for photo in pair.photos]
        return [pair.id, pair.question, pair.answer, pair.subject, pair.kind, pair.options, pair.keywords, shown]

    sets = {
        "forget": splits.forget,
        "retain": splits.retain,
        "taught": splits.taught,
        "text": splits.text,
        "fresh": splits.fresh,
        **{f"column {name}": pairs for name, pairs in splits.columns.items()},
    }
    return digest(
        [
            {name: [said(pair) for pair in pairs] for name, pairs in sets.items()},
            [photo.pixels for photo in splits.strangers],
            splits.forget_subjects,
        ]
    )
