from __future__ import annotations

import pytest
import torch
from PIL import Image

from vkd_framework.features import FeatureTap, photo_features
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.testing import assert_conforms
from vkd_framework.types import ImageQuestionPair, Photo


@pytest.fixture(scope="module")
def tiny() -> MLLM:
    return load_adapter("perception_lm").tiny_model(["What is shown?", "chess"], image_size=48, seed=0)


def asked_about(width: int, height: int) -> ImageQuestionPair:
    name = f"{width} x {height}"
    photo = Photo(name, Image.effect_noise((width, height), 80).convert("RGB"))
    return ImageQuestionPair(name, "What is shown?", "chess", (photo,))


def test_the_adapter_conforms() -> None:
    assert_conforms("perception_lm")


def test_photos_of_different_shapes_share_a_batch_and_each_keeps_its_own_tiles(tiny: MLLM) -> None:
    square, wide = asked_about(48, 48), asked_about(96, 40)
    alone = [tiny.tokenize([pair]).inputs["pixel_values"].shape[1] for pair in (square, wide)]
    assert alone[0] != alone[1], "the two photos must differ in tiles, or this tests nothing"
    batch = tiny.tokenize([square, wide])
    assert batch.inputs["pixel_values"].shape[:2] == (1, sum(alone))
    with torch.no_grad():
        together = tiny.model(**batch.inputs).logits
        for row, pair in enumerate((square, wide)):
            inputs = tiny.tokenize([pair]).inputs
            torch.testing.assert_close(
                together[row, : inputs["input_ids"].shape[1]], tiny.model(**inputs).logits[0], atol=1e-5, rtol=1e-4
            )


def test_the_class_token_of_every_tile_enters_no_loss(tiny: MLLM) -> None:
    pairs = [asked_about(48, 48), asked_about(96, 40)]
    inputs = tiny.tokenize(pairs).inputs
    with torch.no_grad(), FeatureTap(tiny.model, tiny.layers[:1]) as tap:
        tiny.model(**inputs)
    found = photo_features(tiny, inputs, tap)["vision.0"]
    tiles = inputs["pixel_values"].shape[1]
    patches = (48 // 8) ** 2
    assert len(tap.features["vision.0"]) == tiles * (1 + patches)
    torch.testing.assert_close(found.rows, tap.features["vision.0"].unflatten(0, (tiles, -1))[:, 1:].flatten(0, 1))
