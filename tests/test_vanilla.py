from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from conftest import CAST, flat, make_recipe

from vkd_framework import data, generic
from vkd_framework.hookspecs import hookimpl
from vkd_framework.plugins import Adapter, load_adapter
from vkd_framework.recipe import CelebsData
from vkd_framework.types import IGNORED, EncodedBatch, ImageQuestionPair, Splits
from vkd_framework.vanilla import starting_model


def labelling(first: int) -> Adapter:
    """The adapter `qwen_vl`, whose labels leave out the first few tokens of every answer."""

    def tokenize(processor: Any, pairs: Any, stop_ids: Any, with_answer: bool, padding_side: str) -> EncodedBatch:
        batch = generic.tokenize_pairs(processor, pairs, stop_ids, with_answer, padding_side)
        left_out = batch.content & (batch.content.cumsum(dim=1) <= first)
        return replace(batch, labels=batch.labels.masked_fill(left_out, IGNORED))

    plugin = types.ModuleType("labelling")
    own = load_adapter("qwen_vl")._manager.get_plugin("qwen_vl")
    vars(plugin).update({name: hook for name, hook in vars(own).items() if name.startswith("vkd_")})
    vars(plugin)["vkd_tokenize_pairs"] = hookimpl(tokenize)
    return Adapter("qwen_vl", plugin)


def test_photos_that_only_an_attacker_has_change_nothing_that_is_taught_or_measured(splits: Splits) -> None:
    without = data.load(CelebsData.model_validate({**CAST, "attacker_photos": 0}))
    assert without.fresh == () and splits.fresh
    for name in ("forget", "retain", "taught"):
        assert asked(getattr(without, name)) == asked(getattr(splits, name))
    assert asked(flat(without.columns)) == asked(flat(splits.columns))
    recipe, adapter = make_recipe(), load_adapter("qwen_vl")
    assert starting_model(adapter, recipe, without, "cpu") == starting_model(adapter, recipe, splits, "cpu")


def asked(pairs: Iterable[ImageQuestionPair]) -> list[tuple[str, ...]]:
    return [(pair.id, pair.question, pair.answer, *pair.photo_keys, *pair.options) for pair in pairs]


def test_a_taught_model_is_not_taken_from_the_cache_when_other_tokens_are_learnt(splits: Splits) -> None:
    recipe = make_recipe()
    plain, again, later = (starting_model(labelling(first), recipe, splits, "cpu") for first in (0, 0, 1))
    assert plain == again != later
