"""Pairs encoded before are put together into exactly what the processor would have returned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import asked_about, picture, texts_of
from PIL import Image

from vkd_framework.encodings import Encodings, fingerprint
from vkd_framework.plugins import MLLM, load_adapter
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Photo, Splits

FAMILIES = ("qwen_vl", "llava", "internvl", "idefics")


class Counting:
    """Encodes with a model's processor and counts the pairs."""

    def __init__(self, mllm: MLLM) -> None:
        self.mllm, self.asked = mllm, 0

    def __call__(self, pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
        self.asked += len(pairs)
        return self.direct(pairs, with_answer, padding_side)

    def direct(self, pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
        mllm = self.mllm
        return mllm.adapter.tokenize_pairs(mllm.processor, pairs, mllm.stop_ids, with_answer, padding_side)


def same(one: EncodedBatch, other: EncodedBatch) -> bool:
    a, b = ({**batch.inputs, "labels": batch.labels, "content": batch.content} for batch in (one, other))
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def batches_of(splits: Splits, size: int = 6) -> list[list[ImageQuestionPair]]:
    """With photos, without any, and mixed; every pair in several of them."""
    shown, text = list(splits.forget[:12]), list(splits.text[:12])
    mixed = [pair for both in zip(shown, text, strict=True) for pair in both]
    cuts = [shown, text, mixed, shown[::-1], text[::-1], mixed[3:] + mixed[:3], mixed[::-1]]
    return [pairs[start : start + size] for pairs in cuts * 2 for start in range(0, len(pairs), size)]


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_put_together_equal_what_the_processor_returns_bit_for_bit(name: str, splits: Splits) -> None:
    mllm = load_adapter(name).tiny_model(texts_of(splits), 48, 0)
    encode = Counting(mllm)
    kept = Encodings(encode)
    for with_answer in (True, False):
        for side in ("right", "left"):
            for pairs in batches_of(splits):
                direct = encode.direct(pairs, with_answer, side)
                assert same(kept.batch(pairs, with_answer, side), direct), (with_answer, side)
    seen = encode.asked
    for pairs in batches_of(splits):
        kept.batch(pairs, True, "right")
    assert encode.asked == seen


def test_a_pair_with_another_photo_under_the_same_key_is_another_pair(tiny: MLLM) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode)
    for seed in range(4):
        pairs = [
            ImageQuestionPair("a", "What is shown?", "chess", (Photo("same key", picture(48, 48, seed=10 * seed + i)),))
            for i in range(3)
        ]
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))


def test_photos_of_several_sizes_are_left_to_the_processor(tiny: MLLM) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode)
    pairs = [asked_about(picture(48, 48)), asked_about(picture(96, 48))]
    for _ in range(3):
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))
    assert encode.asked == 6


def test_a_processor_whose_rows_depend_on_the_whole_batch_goes_on_being_asked(tiny: MLLM, splits: Splits) -> None:
    class Numbering(Counting):
        def direct(self, pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
            batch = super().direct(pairs, with_answer, padding_side)
            rows = torch.arange(len(pairs))[:, None].expand(-1, 3)
            return EncodedBatch({**batch.inputs, "row": rows}, batch.labels, batch.content)

    encode = Numbering(tiny)
    kept = Encodings(encode)
    for pairs in batches_of(splits):
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))


def test_a_question_about_another_photo_of_the_same_size_takes_no_other_tokens(tiny: MLLM, tmp_path: Path) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode)
    questions = ("Who is this?", "What is shown?", "Where does this person live?")
    for i in range(6):
        picture(48, 48, seed=i).save(tmp_path / f"{i}.png")
    photos = [Photo(str(i), tmp_path / f"{i}.png") for i in range(6)]
    whole = [[ImageQuestionPair("a", question, "chess", (photo,)) for photo in photos] for question in questions]
    for pairs in whole[:2]:
        kept.batch(pairs, True, "right")
    seen = encode.asked
    assert same(kept.batch(whole[2], True, "right"), encode.direct(whole[2], True, "right"))
    assert encode.asked == seen + 1


def test_a_processor_whose_tokens_depend_on_what_a_photo_shows_goes_on_being_asked(tiny: MLLM) -> None:
    class Describing(Counting):
        def direct(self, pairs: Sequence[ImageQuestionPair], with_answer: bool, padding_side: str) -> EncodedBatch:
            described = [
                ImageQuestionPair(pair.subject, f"{pair.question} {pair.photos[0].key}", pair.answer, pair.photos)
                for pair in pairs
            ]
            return super().direct(described, with_answer, padding_side)

    encode = Describing(tiny)
    kept = Encodings(encode)
    for step, shown in enumerate(["chess"] * 4 + ["chess music"] * 2):
        photos = [Photo(shown, picture(48, 48, seed=10 * step + i)) for i in range(3)]
        pairs = [ImageQuestionPair("a", "What is shown?", "chess", (photo,)) for photo in photos]
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))


def test_padding_that_no_batch_has_shown_yet_is_asked_for(tiny: MLLM) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode)
    short, long = asked_about(None, "Who?", "chess"), asked_about(None, "Who is this? What is shown?", "chess")
    for pairs in ([short] * 2, [long] * 2, [short, short], [short, long], [long, short]):
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))


def test_what_evaluation_encoded_can_be_trained_on(student: MLLM, splits: Splits) -> None:
    pairs = list(splits.forget[:4])
    with torch.inference_mode():
        for _ in range(3):
            student.tokenize(pairs)
    student.model.requires_grad_(True)
    torch.autograd.backward(student.model(**student.tokenize(pairs).inputs).logits.sum())
    assert all(not value.is_inference() for value in student.tokenize(pairs).inputs.values())


def test_beyond_its_limit_of_memory_all_is_kept_on_disk(tiny: MLLM, splits: Splits) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode, limit=200_000)
    for pairs in batches_of(splits) * 2:
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))
        assert 0 < kept.bytes <= 200_000
    seen = encode.asked
    for pairs in batches_of(splits):
        kept.batch(pairs, True, "right")
    assert encode.asked == seen


def test_what_has_no_room_on_disk_either_is_encoded_again(tiny: MLLM, splits: Splits) -> None:
    encode = Counting(tiny)
    kept = Encodings(encode, limit=20_000, disk_limit=0)
    for pairs in batches_of(splits) * 2:
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))
    seen = encode.asked
    for pairs in batches_of(splits):
        assert same(kept.batch(pairs, True, "right"), encode.direct(pairs, True, "right"))
    assert encode.asked > seen


def test_a_loaded_copy_of_a_processor_shares_what_is_kept(splits: Splits, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from vkd_framework.vanilla import save

    own = load_adapter("qwen_vl").tiny_model(texts_of(splits), 48, 0)
    for _ in range(3):
        own.tokenize(splits.forget[:4])  # leaves a state of padding in the tokenizer
    before = fingerprint(own.processor)
    save(own, tmp_path)
    assert fingerprint(own.processor) == before
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(own.processor)
    assert own.adapter.encodings(loaded, own.stop_ids) is own.adapter.encodings(own.processor, own.stop_ids)
    assert own.adapter.encodings(loaded, [1]) is not own.adapter.encodings(own.processor, own.stop_ids)
    loaded.image_processor.max_pixels = 28 * 28
    assert fingerprint(loaded) != fingerprint(own.processor)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_photo_is_that_of_the_upright_picture(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(60, 40).save(tmp_path / "lying.jpg", exif=exif)
    photo = Photo("lying", tmp_path / "lying.jpg")
    assert photo.size == photo.open().size
    assert Photo("bytes", (tmp_path / "lying.jpg").read_bytes()).size == photo.size
