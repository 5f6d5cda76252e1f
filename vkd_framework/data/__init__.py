"""Data sources. Each yields the same `Splits`, so that nothing above this room knows where its pairs come from.

A source is a module with `load(config) -> Splits`. It must yield photos with stable keys, unique pair ids, the two sets
that are trained on (`forget`, `retain`) and at least the columns `forget_vqa`, `test_vqa` and `retain_vqa`; whatever is
measured on unseen photos must stay out of `forget` and `retain`. What is wrong with the data is a `DataError`.
Further columns may stand beside the usual ones. The report takes `test_vqa_generation` for a part of `test_vqa`.
"""

from __future__ import annotations

from vkd_framework.data import celebs, clear, fiubench, jsonl, mllmu_bench
from vkd_framework.recipe import AnyData, CelebsData, ClearData, JsonlData, MllmuBenchData
from vkd_framework.types import Splits


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
