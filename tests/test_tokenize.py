from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import asked_about, picture
from PIL import Image
from torch import Tensor

from vkd_framework.errors import AdapterError
from vkd_framework.generic import stop_token_ids, tokenize_pairs
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Photo, Splits


def supervised(mllm: MLLM, batch: EncodedBatch, row: int) -> str:
    """The text of the tokens that labels cover, special tokens spelt out."""
    return str(mllm.processor.tokenizer.decode(batch.labels[row][batch.labels[row] != -100]))


@pytest.fixture
def mixed(splits: Splits) -> list[ImageQuestionPair]:
    """Photos of two sizes and a text-only pair between them, with answers of different lengths."""
    text = splits.columns["retain_qa"][0]
    return [
        asked_about(picture(48, 48), "What is the hobby of this person?", "chess"),
        text,
        asked_about(
            picture(32, 48, seed=1), "Describe the person in the photo.", "This is a baker from Oslo who likes chess."
        ),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_cover_only_the_answer_and_one_stop_token(tiny: MLLM, mixed: list[ImageQuestionPair], side: str) -> None:
    batch = tiny.tokenize(mixed, padding_side=side)
    for row, pair in enumerate(mixed):
        assert supervised(tiny, batch, row) == f"{pair.answer}<|im_end|>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_lie_on_no_padding_and_no_image_token(tiny: MLLM, mixed: list[ImageQuestionPair], side: str) -> None:
    batch = tiny.tokenize(mixed, padding_side=side)
    covered = batch.labels != -100
    ids = batch.inputs["input_ids"]
    assert not (covered & (batch.inputs["attention_mask"] == 0)).any()
    assert not (covered & (ids == tiny.model.config.image_token_id)).any()
    assert torch.equal(batch.labels[covered], ids[covered])


def test_padding_goes_to_the_side_that_was_asked_for(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    left = tiny.tokenize(mixed, padding_side="left").inputs["attention_mask"]
    right = tiny.tokenize(mixed, padding_side="right").inputs["attention_mask"]
    assert left[:, -1].all() and not left[:, 0].all()
    assert right[:, 0].all() and not right[:, -1].all()


def test_content_is_the_answer_without_the_stop_token(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    batch = tiny.tokenize(mixed)
    for row, pair in enumerate(mixed):
        assert tiny.processor.tokenizer.decode(batch.inputs["input_ids"][row][batch.content[row]]) == pair.answer


def test_a_word_of_the_question_is_not_taken_for_the_same_word_in_the_answer(tiny: MLLM) -> None:
    pair = asked_about(picture(48, 48), "Is it chess, chess or chess?", "chess")
    batch = tiny.tokenize([pair])
    positions = batch.content[0].nonzero().flatten().tolist()
    ids = batch.inputs["input_ids"][0]
    occurrences = (ids == ids[positions[0]]).nonzero().flatten().tolist()
    assert supervised(tiny, batch, 0) == "chess<|im_end|>"
    assert positions == occurrences[-1:]


def test_the_question_repeated_as_answer_is_supervised_only_where_it_is_the_answer(tiny: MLLM) -> None:
    question = "What is the hobby of this person?"
    batch = tiny.tokenize([asked_about(None, question, question)])
    assert supervised(tiny, batch, 0) == f"{question}<|im_end|>"


@pytest.mark.parametrize("answer", ["Zoë Ærø", "山田 太郎", "🙂", "a", "two\nlines", "  edges  "])
def test_answers_in_any_script_are_covered_whole(tiny: MLLM, answer: str) -> None:
    batch = tiny.tokenize([asked_about(picture(48, 48), "Grüße, 山田?", answer), asked_about(None)])
    assert supervised(tiny, batch, 0) == f"{answer}<|im_end|>"


SILENT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ TEXT }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A template that writes no stop token after an answer."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("part['text']", " tea  <|im_end|>"),
        ("part['text'].strip()", " tea<|im_end|>"),
        ("part['text'].upper()", "TEA<|im_end|>"),
        ("part['text'] ~ ' (end)'", " tea  <|im_end|>"),
    ],
    ids=["as it is", "stripped", "changed", "followed by words"],
)
def test_where_a_template_writes_no_stop_token_it_is_added_right_after_the_answer(
    student: MLLM, text: str, expected: str
) -> None:
    processor = copy.copy(student.processor)
    processor.chat_template = SILENT.replace("TEXT", text)
    pair = asked_about(None, "Does it say tea  or tea?", "tea  ")
    batch = student.adapter.tokenize_pairs(processor, [pair, asked_about(None)], student.stop_ids, True, "right")
    assert supervised(student, batch, 0).endswith(expected)
    assert supervised(student, batch, 0).lower().count("tea") == 1


def test_without_answer_nothing_is_supervised(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    batch = tiny.tokenize(mixed, with_answer=False)
    assert (batch.labels == -100).all()
    assert not batch.content.any()


def test_the_prompt_is_a_prefix_of_the_full_text(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    for pair in mixed:
        prompt = tiny.tokenize([pair], with_answer=False).inputs["input_ids"][0].tolist()
        batch = tiny.tokenize([pair])
        full = batch.inputs["input_ids"][0].tolist()
        assert full[: len(prompt)] == prompt
        assert int((batch.labels[0] != -100).nonzero()[0]) == len(prompt)
        tiny.check_prompt_is_prefix(pair)


def test_every_key_of_the_processor_reaches_the_model(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    texts = ["<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n"]
    given = set(tiny.processor(text=texts, images=[picture(48, 48)], return_tensors="pt"))
    assert set(tiny.tokenize(mixed).inputs) == given
    assert set(tiny.tokenize(mixed[1:2]).inputs) <= given


def test_labels_that_a_processor_makes_up_are_left_out(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    kind = type(tiny.processor)

    def call(self: Any, **arguments: Any) -> Any:
        encoded = kind.__call__(self, **arguments)
        return {**encoded, "labels": encoded["input_ids"]}

    processor = copy.copy(tiny.processor)
    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    assert set(tokenize_pairs(processor, mixed, tiny.stop_ids, True, "right").inputs) == set(
        tiny.tokenize(mixed).inputs
    )


def test_without_a_chat_template_the_hooks_to_write_are_named(tiny: MLLM) -> None:
    processor = copy.copy(tiny.processor)
    processor.chat_template = None
    told = "Processor has no chat template .*vkd_tokenize_pairs.*vkd_stop_token_ids"
    with pytest.raises(AdapterError, match=told):
        stop_token_ids(tiny.model, processor)
    with pytest.raises(AdapterError, match=told):
        tokenize_pairs(processor, [asked_about(None)], tiny.stop_ids, True, "right")


@pytest.mark.parametrize("kind", ["RGBA", "L", "P", "LA", "CMYK", "1"])
def test_photos_of_every_colour_mode_can_be_read_from_files(tiny: MLLM, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("photo.tiff" if kind == "CMYK" else "photo.png")
    picture(40, 48, kind).save(path)
    batch = tiny.tokenize([asked_about(path), asked_about(picture(48, 48))])
    assert batch.inputs["pixel_values"].isfinite().all()
    assert len(batch.inputs["image_grid_thw"]) == 2


def test_differently_sized_photos_are_encoded_in_the_order_of_the_pairs(tiny: MLLM) -> None:
    sizes = [(48, 48), (32, 16), (16, 64), (200, 20)]
    photos = [asked_about(picture(*size)) for size in sizes]
    alone = [tiny.tokenize([pair]).inputs for pair in photos]
    together = tiny.tokenize([photos[0], asked_about(None), *photos[1:]]).inputs
    assert torch.equal(together["image_grid_thw"], torch.cat([inputs["image_grid_thw"] for inputs in alone]))
    assert torch.equal(together["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in alone]))
    assert len({tuple(inputs["image_grid_thw"][0].tolist()) for inputs in alone}) > 2


def test_a_photo_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "sideways.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture(40, 20).save(path, exif=exif)
    assert Photo("sideways", path).open().size == (20, 40)


@torch.no_grad()
def _own_and_reported_loss(mllm: MLLM, pair: ImageQuestionPair) -> tuple[Tensor, Tensor]:
    batch = mllm.tokenize([pair])
    output = mllm.model(**batch.inputs, labels=batch.labels)
    return answer_cross_entropy(output.logits, batch.inputs["input_ids"], batch.labels != -100)[0], output.loss


def test_our_cross_entropy_is_the_loss_that_transformers_reports(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    for pair in mixed:
        own, reported = _own_and_reported_loss(tiny, pair)
        torch.testing.assert_close(own, reported)


@torch.no_grad()
def test_losses_of_a_mixed_batch_are_those_of_its_pairs_one_by_one(tiny: MLLM, mixed: list[ImageQuestionPair]) -> None:
    for side in ("left", "right"):
        batch = tiny.tokenize(mixed, padding_side=side)
        logits = tiny.model(**batch.inputs).logits
        together = answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != -100)
        alone = torch.stack([_own_and_reported_loss(tiny, pair)[0] for pair in mixed])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
