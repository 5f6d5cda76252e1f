from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import asked_about, picture
from torch import Tensor

from vkd_framework.features import FeatureTap, PhotoFeatures, photo_features, vision_forward
from vkd_framework.plugins import MLLM
from vkd_framework.types import ImageQuestionPair

TEXT_ROW = 1


@pytest.fixture
def pairs() -> list[ImageQuestionPair]:
    """Photos of three sizes with a text-only pair between them."""
    return [
        asked_about(picture(48, 48)),
        asked_about(None),
        asked_about(picture(32, 16, seed=1)),
        asked_about(picture(16, 64, seed=2)),
    ]


def tapped(mllm: MLLM, pairs: Sequence[ImageQuestionPair], *, whole: bool = False) -> dict[str, PhotoFeatures]:
    inputs = mllm.tokenize(pairs).inputs
    with FeatureTap(mllm.model, mllm.layers) as tap:
        if whole:
            mllm.model(**inputs)
        else:
            vision_forward(mllm, inputs)
        return photo_features(mllm, inputs, tap)


@torch.no_grad()
def test_vision_alone_gives_the_features_of_a_full_forward_pass(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    alone, whole = tapped(tiny, pairs), tapped(tiny, pairs, whole=True)
    assert set(alone) == set(whole) == {"vision.0", "vision.1", "vision.2", "projector"}
    for layer in alone:
        assert torch.equal(alone[layer].rows, whole[layer].rows)
        assert torch.equal(alone[layer].sample, whole[layer].sample)


def test_vision_alone_does_not_run_the_language_model(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    calls = []
    language_model = tiny.model.get_submodule(tiny.modules.language_model[0])
    handle = language_model.register_forward_hook(lambda *_: calls.append(1))
    tapped(tiny, pairs)
    assert not calls
    tapped(tiny, pairs, whole=True)
    handle.remove()
    assert calls


@torch.no_grad()
def test_features_of_a_batch_are_those_of_its_photos_one_by_one(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    together = tapped(tiny, pairs)
    for b in (0, 2, 3):
        alone = tapped(tiny, [pairs[b]])
        for layer, features in together.items():
            torch.testing.assert_close(features.rows[features.sample == b], alone[layer].rows, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_only_pair_has_no_feature_rows(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    for features in tapped(tiny, pairs).values():
        assert set(features.sample.tolist()) == {0, 2, 3}


@torch.no_grad()
@pytest.mark.parametrize("altered", [0, 2, 3])
def test_another_photo_changes_only_the_rows_of_its_own_sample(
    tiny: MLLM, pairs: list[ImageQuestionPair], altered: int
) -> None:
    photo = pairs[altered].photos[0]
    width, height = photo.open().size
    other = [asked_about(picture(width, height, seed=9)) if b == altered else pair for b, pair in enumerate(pairs)]
    before, after = tapped(tiny, pairs), tapped(tiny, other)
    for layer, features in before.items():
        moved = (features.rows != after[layer].rows).any(dim=1)
        assert set(features.sample[moved].tolist()) == {altered}


@pytest.mark.parametrize("chosen", [0, 2, 3])
def test_the_gradient_of_a_sample_reaches_only_the_pixels_of_its_own_photo(
    tiny: MLLM, pairs: list[ImageQuestionPair], chosen: int
) -> None:
    inputs = dict(tiny.tokenize(pairs).inputs)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_(True)
    patches = inputs["image_grid_thw"].prod(dim=1).tolist()
    owner = torch.repeat_interleave(torch.tensor([0, 2, 3]), torch.tensor(patches))
    with FeatureTap(tiny.model, tiny.layers) as tap:
        vision_forward(tiny, inputs)
        found = photo_features(tiny, inputs, tap)
    for features in found.values():
        (gradient,) = torch.autograd.grad(
            features.rows[features.sample == chosen].square().sum(), pixels, retain_graph=True
        )
        assert set(owner[gradient.abs().sum(dim=1) > 0].tolist()) == {chosen}


def test_hooks_are_gone_after_the_block_even_when_it_raises(tiny: MLLM) -> None:
    places = [tiny.model.get_submodule(layer.path) for layer in tiny.layers]
    before = [len(place._forward_hooks) for place in places]
    with pytest.raises(RuntimeError), FeatureTap(tiny.model, tiny.layers):
        assert [len(place._forward_hooks) for place in places] == [count + 1 for count in before]
        raise RuntimeError
    assert [len(place._forward_hooks) for place in places] == before


def test_layers_have_canonical_names_in_the_order_in_which_they_run(tiny: MLLM) -> None:
    ran: list[str] = []
    handles = [
        tiny.model.get_submodule(layer.path).register_forward_hook(lambda *_, name=layer.name: ran.append(name))
        for layer in tiny.layers
    ]
    with torch.no_grad():
        vision_forward(tiny, tiny.tokenize([asked_about(picture(48, 48))]).inputs)
    for handle in handles:
        handle.remove()
    assert ran == [layer.name for layer in tiny.layers] == ["vision.0", "vision.1", "vision.2", "projector"]


@torch.no_grad()
def test_layer_widths_are_those_of_their_outputs(tiny: MLLM) -> None:
    found = tapped(tiny, [asked_about(picture(48, 48))])
    assert {layer.name: layer.width for layer in tiny.layers} == {name: f.rows.shape[1] for name, f in found.items()}


@torch.no_grad()
def test_a_layer_that_is_said_to_reach_the_language_model_changes_the_logits(tiny: MLLM) -> None:
    inputs = tiny.tokenize([asked_about(picture(48, 48))]).inputs
    before = tiny.model(**inputs).logits

    def disturb(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return (output[0] + torch.randn_like(output[0]), *output[1:])
        return output + torch.randn_like(output)

    for layer in tiny.layers:
        handle = tiny.model.get_submodule(layer.path).register_forward_hook(disturb)
        after = tiny.model(**inputs).logits
        handle.remove()
        assert (not torch.allclose(before, after)) == layer.reaches_language_model
