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
from vkd_framework.types import ImageQuestionPair, Photo, Splits

STRANGER = {"forget_output": {"form": "stranger", "strangers": 1}, "repel": {"weight": 0}}


def alone(groups: list[list[ImageQuestionPair]]) -> list[ImageQuestionPair]:
    """The one pair of each group."""
    assert all(len(group) == 1 for group in groups)
    return [pair for group in groups for pair in group]


def test_each_forget_pair_is_asked_about_a_photo_of_somebody_who_is_kept(splits: Splits) -> None:
    shown = {photo.key for pair in splits.retain if pair.subject not in splits.forget_subjects for photo in pair.photos}
    asked = alone(about_others(splits, 0))
    assert [(pair.id, pair.question, pair.answer) for pair in asked] == [
        (pair.id, pair.question, pair.answer) for pair in splits.forget
    ]
    assert {photo.key for pair in asked for photo in pair.photos} <= shown
    assert [pair.photos for pair in alone(about_others(splits, 0))] == [pair.photos for pair in asked]
    assert [pair.photos for pair in alone(about_others(splits, 1))] != [pair.photos for pair in asked]


def test_the_stranger_form_is_the_distance_to_what_the_starting_model_makes_of_others(
    taught: MLLM, splits: Splits
) -> None:
    mllm = taught.copy()
    pairs = splits.forget[:6]
    others = {pair.id: pair for pair in alone(about_others(splits, 0))}
    loss, _ = Objective(mllm, make_recipe(losses=STRANGER), splits).forget(pairs)

    def cross_entropy(asked: list[object]) -> torch.Tensor:
        batch = mllm.tokenize(asked)  # type: ignore[arg-type]
        return answer_cross_entropy(mllm.model(**batch.inputs).logits, batch.inputs["input_ids"], batch.content)

    with torch.no_grad():
        own, target = cross_entropy(list(pairs)), cross_entropy([others[pair.id] for pair in pairs])
    assert loss.item() == pytest.approx((own - target).abs().mean().item(), rel=1e-3)
    assert loss.item() > 0


def test_of_several_strangers_the_level_is_that_of_their_mean_probability(taught: MLLM, splits: Splits) -> None:
    mllm, pairs = taught.copy(), splits.forget[:4]
    few = replace(splits, forget=pairs)
    recipe = make_recipe(losses={**STRANGER, "forget_output": {"form": "stranger", "strangers": 5}})
    groups = about_others(few, 0, 5)
    assert [len({pair.photo_keys for pair in group}) > 1 for group in groups] == [True] * 4

    def likelihoods(asked: list[ImageQuestionPair]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = mllm.tokenize(asked)
        logits = mllm.model(**batch.inputs).logits[:, :-1].log_softmax(dim=-1)
        nats = logits.gather(-1, batch.inputs["input_ids"][:, 1:, None]).squeeze(-1) * batch.content[:, 1:]
        return nats.sum(dim=1).double().exp(), batch.content.sum(dim=1)

    with torch.no_grad():
        levels = []
        for group in groups:
            whole, tokens = likelihoods(group)
            levels.append(-(whole.mean().log() / tokens[0]))
        own, tokens = likelihoods(list(pairs))
    expected = (-(own.log() / tokens) - torch.stack(levels)).abs().mean().item()
    loss, _ = Objective(mllm, recipe, few).forget(pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_a_question_about_several_photos_is_asked_about_as_many_of_others(splits: Splits) -> None:
    first, second = ((*splits.forget[i].photos, *splits.forget[i + 1].photos) for i in (0, 2))
    both = tuple(replace(pair, photos=shown) for pair, shown in zip(splits.forget, (first, second), strict=False))
    kept = next(pair for pair in splits.retain if pair.photos and not splits.shows_forgotten(pair))
    of_two = replace(kept, photos=(Photo("left", kept.photos[0].source), Photo("right", kept.photos[0].source)))
    mixed = replace(splits, forget=(*both, splits.forget[4]), retain=(*splits.retain, of_two))
    asked = alone(about_others(mixed, 0))
    assert [pair.photos for pair in asked[:2]] == [of_two.photos] * 2
    assert len(asked[2].photos) == 1
    with pytest.raises(RecipeError, match="2 in each as in"):
        about_others(replace(splits, forget=both), 0)


def test_without_photos_of_others_the_stranger_form_says_what_to_take(tiny: MLLM, splits: Splits) -> None:
    lonely = replace(splits, retain=tuple(pair for pair in splits.retain if pair.subject in splits.forget_subjects))
    with pytest.raises(RecipeError, match="take form: capped_ascent"):
        Objective(tiny, make_recipe(losses=STRANGER), lonely)


def test_a_photo_of_a_forgotten_person_stands_for_nobody_else_whoever_is_asked_about(splits: Splits) -> None:
    photo = splits.forget[0].photos
    disguised = tuple(replace(pair, photos=photo) for pair in splits.retain[:20] if pair.photos)
    mixed = replace(splits, retain=(*disguised, *splits.retain))
    assert all(mixed.shows_forgotten(pair) for pair in disguised)
    assert not any(pair.photos == photo for pair in alone(about_others(mixed, 0)))
    assert not any(pair.photos == photo for pair in kept_pairs(mixed))
