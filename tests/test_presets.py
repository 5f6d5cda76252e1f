"""The real sizes, from configs alone, against the published figures."""

from __future__ import annotations

import pytest

from vkd_framework.layers_table import all_presets, describe
from vkd_framework.plugins import Anatomy
from vkd_framework.recipe import bundled_recipes, load_recipe

# Total in billions, vision encoder, projector and language model in millions; blocks, those that reach the language
# model; channels of a block.
PUBLISHED = {
    "llava-1.5-7b-hf": (7.063, 303.5, 21.0, 6738.9, 24, 23, 1024),
    "llava-v1.6-mistral-7b-hf": (7.567, 303.5, 21.0, 7242.3, 24, 23, 1024),
    "llava-onevision-qwen2-7b-ov-hf": (8.030, 397.7, 17.0, 7615.2, 26, 26, 1152),
    "Qwen2-VL-7B-Instruct": (8.291, 631.2, 44.6, 7615.6, 32, 32, 1280),
    "Qwen2.5-VL-7B-Instruct": (8.292, 632.0, 44.6, 7615.6, 32, 32, 1280),
    "Qwen3-VL-8B-Instruct": (8.767, 415.9, 160.5, 8190.7, 27, 27, 1152),
    "InternVL3-8B-hf": (7.944, 304.0, 27.5, 7612.8, 24, 24, 1024),
    "idefics2-8b": (8.403, 417.8, 743.2, 7241.8, 27, 27, 1152),
    "Idefics3-8B-Llama3": (8.462, 412.9, 18.9, 8030.3, 27, 27, 1152),
    "SmolVLM2-2.2B-Instruct": (2.247, 413.0, 21.2, 1812.6, 27, 27, 1152),
}


def _millions(anatomy: Anatomy) -> tuple[float, ...]:
    return tuple(round(anatomy.count([part]) / 1e6, 1) for part in ("encoder", "projector", "language_model"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_size_and_depth(name: str) -> None:
    total, encoder, projector, language_model, blocks, reaching, width = PUBLISHED[name]
    anatomy = describe(name)
    assert round(anatomy.count(["encoder", "projector", "language_model"]) / 1e9, 3) == total
    assert _millions(anatomy) == (encoder, projector, language_model)
    assert [layer.name for layer in anatomy.layers] == [*(f"vision.{i}" for i in range(blocks)), "projector"]
    assert sum(layer.reaches_language_model for layer in anatomy.layers[:-1]) == reaching
    assert {layer.width for layer in anatomy.layers[:-1]} == {width}
    assert all(not layer.reaches_language_model for layer in anatomy.layers[reaching:-1])


def test_every_size_that_the_project_promises_has_a_preset() -> None:
    assert {name.rpartition("/")[2] for name in all_presets()} >= set(PUBLISHED)


@pytest.mark.parametrize("name", bundled_recipes())
def test_no_simulated_attacker_copies_a_language_model_that_the_attackers_of_a_recipe_leave_alone(name: str) -> None:
    recipe = load_recipe(name)
    attack = recipe.simulated_attack
    assert attack.rank is not None or set(attack.scopes) <= set(recipe.relearn.scopes)
