"""Data sources. Each yields the same `Splits`, so that nothing above this room knows where its pairs come from.

A source is a module with `load(config) -> Splits`. It must yield photos with stable keys, unique pair ids, the two sets
that are trained on (`forget`, `retain`) and at least the columns `forget_vqa`, `test_vqa` and `retain_vqa`; whatever is
measured on unseen photos must stay out of `forget` and `retain`. What is wrong with the data is a `DataError`.
"""

from __future__ import annotations

from vkd_framework.data import celebs, jsonl
from vkd_framework.recipe import CelebsData, JsonlData
from vkd_framework.types import Splits


def load(config: CelebsData | JsonlData) -> Splits:
    """The data that `config` names."""
    if isinstance(config, CelebsData):
        return celebs.load(config)
    return jsonl.load(config)
