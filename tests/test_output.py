from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import texts_of
from torch import nn

from vkd_framework.losses import answer_cross_entropy, answer_rows
from vkd_framework.output import answer_logits
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.types import EncodedBatch, Splits

FAMILIES = ("qwen_vl", "llava", "internvl", "idefics")
TYPES = [(name, kind) for name in FAMILIES for kind in load_adapter(name).model_types]


def mixed(mllm: MLLM, splits: Splits) -> EncodedBatch:
    """Answers of different length at different places: with a photo, and without."""
    return mllm.tokenize([*splits.forget[:3], *splits.columns["retain_qa"][:2]])


@pytest.mark.parametrize(("adapter", "model_type"), TYPES)
def test_logits_at_the_answers_are_those_of_the_whole_text_and_so_are_the_gradients(
    splits: Splits, adapter: str, model_type: str
) -> None:
    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0, model_type)
    batch = mixed(mllm, splits)
    answer = batch.labels != -100
    whole = mllm.model(**batch.inputs).logits
    alone = answer_logits(mllm.model, batch.inputs, answer)
    assert alone.shape == (int(answer.sum()), whole.shape[-1])
    torch.testing.assert_close(alone, answer_rows(whole, answer), rtol=1e-4, atol=1e-5)
    wanted, found = (
        torch.autograd.grad(answer_cross_entropy(logits, batch.inputs["input_ids"], answer).mean(), weights)
        for logits, weights in ((whole, seen(mllm)), (alone, seen(mllm)))
    )
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def seen(mllm: MLLM) -> list[nn.Parameter]:
    """Some weights of every part."""
    return [
        next(p for n, p in mllm.model.named_parameters() if n in mllm.parts[part] and p.dim() == 2 and "embed" not in n)
        for part in ("projector", "language_model")
    ]


def test_the_output_layer_sees_only_the_places_before_answers_and_afterwards_all_again(
    tiny: MLLM, splits: Splits
) -> None:
    batch = mixed(tiny, splits)
    rows: list[int] = []
    handle = tiny.model.get_output_embeddings().register_forward_hook(
        lambda _module, given, _out: rows.append(given[0].shape[:-1].numel())
    )
    with torch.no_grad():
        answer_logits(tiny.model, batch.inputs, batch.content)
        tiny.model(**batch.inputs)
    handle.remove()
    assert rows == [int(batch.content.sum()), batch.content.numel()]


def test_the_places_are_all_computed_again_after_a_forward_pass_that_failed(tiny: MLLM, splits: Splits) -> None:
    batch = mixed(tiny, splits)
    with pytest.raises(Exception, match=r".+"):
        answer_logits(tiny.model, {**batch.inputs, "input_ids": batch.inputs["input_ids"][:, :3]}, batch.content)
    with torch.no_grad():
        assert tiny.model(**batch.inputs).logits.shape[:2] == batch.content.shape


def test_a_model_without_an_output_layer_to_narrow_gives_the_same_from_all_its_logits(
    tiny: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = mixed(tiny, splits)
    with torch.no_grad():
        expected = answer_logits(tiny.model, batch.inputs, batch.content)
        nothing: Any = lambda: None  # noqa: E731
        monkeypatch.setattr(tiny.model, "get_output_embeddings", nothing)
        torch.testing.assert_close(answer_logits(tiny.model, batch.inputs, batch.content), expected)


def test_other_weights_are_computed_with_in_place_of_the_models_own(tiny: MLLM, splits: Splits) -> None:
    batch = mixed(tiny, splits)
    copied = tiny.copy()
    name, weight = next(iter(copied.parameters(["projector"]).items()))
    with torch.no_grad():
        weight.add_(0.1)
        expected = answer_logits(copied.model, batch.inputs, batch.content)
        found = answer_logits(tiny.model, batch.inputs, batch.content, {name: weight})
    torch.testing.assert_close(found, expected)
