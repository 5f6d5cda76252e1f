from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_recipe

from vkd_framework.errors import RecipeError
from vkd_framework.forgetting import about_others
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM
from vkd_framework.teachers import kept_pairs
from vkd_framework.types import Splits

STRANGER = {"forget_output": {"form": "stranger"}, "repel": {"weight": 0}}


def test_each_forget_pair_is_asked_about_a_photo_of_somebody_who_is_kept(splits: Splits) -> None:
    shown = {photo.key for pair in splits.retain if pair.subject not in splits.forget_subjects for photo in pair.photos}
    asked = about_others(splits, 0)
    assert [(pair.id, pair.question, pair.answer) for pair in asked] == [
        (pair.id, pair.question, pair.answer) for pair in splits.forget
    ]
    assert {photo.key for pair in asked for photo in pair.photos} <= shown
    assert [pair.photos for pair in about_others(splits, 0)] == [pair.photos for pair in asked]
    assert [pair.photos for pair in about_others(splits, 1)] != [pair.photos for pair in asked]


def test_the_stranger_form_is_the_distance_to_what_the_starting_model_makes_of_others(
    taught: MLLM, splits: Splits
) -> None:
    mllm = taught.copy()
    pairs = splits.forget[:6]
    others = {pair.id: pair for pair in about_others(splits, 0)}
    loss, _ = Objective(mllm, make_recipe(losses=STRANGER), splits).forget(pairs)

    def cross_entropy(asked: list[object]) -> torch.Tensor:
        batch = mllm.tokenize(asked)  # type: ignore[arg-type]
        return answer_cross_entropy(mllm.model(**batch.inputs).logits, batch.inputs["input_ids"], batch.content)

    with torch.no_grad():
        own, target = cross_entropy(list(pairs)), cross_entropy([others[pair.id] for pair in pairs])
    assert loss.item() == pytest.approx((own - target).abs().mean().item(), rel=1e-3)
    assert loss.item() > 0


def test_without_photos_of_others_the_stranger_form_says_what_to_take(tiny: MLLM, splits: Splits) -> None:
    lonely = replace(splits, retain=tuple(pair for pair in splits.retain if pair.subject in splits.forget_subjects))
    with pytest.raises(RecipeError, match="take form: capped_ascent"):
        Objective(tiny, make_recipe(losses=STRANGER), lonely)


def test_a_photo_of_a_forgotten_person_stands_for_nobody_else_whoever_is_asked_about(splits: Splits) -> None:
    photo = splits.forget[0].photos
    disguised = tuple(replace(pair, photos=photo) for pair in splits.retain[:20] if pair.photos)
    mixed = replace(splits, retain=(*disguised, *splits.retain))
    assert all(mixed.shows_forgotten(pair) for pair in disguised)
    assert not any(pair.photos == photo for pair in about_others(mixed, 0))
    assert not any(pair.photos == photo for pair in kept_pairs(mixed))
