"""What all checks of one model share: its photos and questions, and the forward passes that several checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from vkd_framework.features import FeatureTap, PhotoFeatures, photo_features, vision_forward
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM, Adapter
from vkd_framework.recipe import is_tiny
from vkd_framework.testing.compare import differs
from vkd_framework.testing.outcomes import Wrong
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Photo

SIDE = 48
"""Height and width in pixels of the square photos, and the image size asked of `vkd_tiny_model`."""

QUESTIONS = ("What is shown?", "Which city is the capital of Norway?", "What is the hobby of the person in this photo?")
ANSWERS = ("chess", "The capital of Norway is Oslo.", "a baker from Oslo who plays chess", "red")
SCRIPTS = ("Zoë Ærø", "山田 太郎", "🙂", "a", "two\nlines", "What is shown?")
TEXTS = (*QUESTIONS, *ANSWERS, *SCRIPTS)


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: which layers ran, what each put out (as it is, and flattened to `[R, D]`), the logits."""

    ran: tuple[str, ...]
    outputs: Mapping[str, Tensor]
    tap: FeatureTap
    logits: Tensor | None


@dataclass(frozen=True, eq=False)
class Subject:
    """What all checks of one model share; each piece is made when the first check asks for it."""

    adapter: Adapter
    source: str
    folder: Path
    mllm: MLLM
    built: MLLM | None
    """The tiny model in memory, before it was saved and loaded."""

    @classmethod
    def load(cls, adapter: Adapter, source: str, folder: Path) -> Subject:
        """Load by `vkd_load_model`, as a run does; a tiny model is saved first."""
        built = tiny(adapter, source) if is_tiny(source) else None
        where = source
        if built is not None:
            where = str(folder / "model")
            save(built, Path(where))
        return cls(adapter, source, folder, adapter.load(where, torch.float32, "cpu"), built)

    @property
    def saved(self) -> Path:
        """The folder with the saved model; a model that came from elsewhere is saved on demand."""
        where = self.folder / "model"
        if not where.exists():
            save(self.mllm, where)
        return where

    @cached_property
    def pictures(self) -> Mapping[str, Photo]:
        """Photos of many shapes and colour modes, drawn as noise, so that no two patches look alike."""
        return {
            "square": Photo("square", noise(SIDE, SIDE, 1)),
            "portrait": self._file("portrait", SIDE * 2 // 3, SIDE, "L"),
            "first": self._file("first", SIDE, SIDE, "RGB"),
            "second": Photo("second", noise(SIDE, SIDE // 2, 2)),
            "panorama": self._file("panorama", SIDE * 2, SIDE // 2, "P"),
            "tiny": self._file("tiny", SIDE // 6, SIDE // 6, "RGBA"),
        }

    def _file(self, name: str, width: int, height: int, mode: str) -> Photo:
        path = self.folder / f"{name}.png"
        noise(width, height, len(name)).convert(mode).save(path)
        return Photo(name, path)

    @cached_property
    def plain(self) -> tuple[ImageQuestionPair, ...]:
        """Two questions about square photos."""
        square = self.pictures["square"]
        return (
            ImageQuestionPair("square", QUESTIONS[0], ANSWERS[0], (square,)),
            ImageQuestionPair("square again", QUESTIONS[2], ANSWERS[2], (self.pictures["first"],)),
        )

    @cached_property
    def text_only(self) -> ImageQuestionPair:
        """A question without a photo."""
        return ImageQuestionPair("text only", QUESTIONS[1], ANSWERS[1])

    @cached_property
    def two_photos(self) -> ImageQuestionPair:
        """A question about two photos."""
        photos = (self.pictures["first"], resized(self.pictures["second"], SIDE, SIDE))
        return ImageQuestionPair("two photos", QUESTIONS[2], ANSWERS[2], photos)

    @cached_property
    def differently_sized(self) -> tuple[ImageQuestionPair, ...]:
        """A portrait from a greyscale file, a panorama from a palette file, a tiny picture with transparency."""
        return tuple(
            ImageQuestionPair(name, question, answer, (self.pictures[name],))
            for name, question, answer in (
                ("portrait", QUESTIONS[2], ANSWERS[3]),
                ("panorama", QUESTIONS[0], ANSWERS[2]),
                ("tiny", QUESTIONS[2], ANSWERS[0]),
            )
        )

    @cached_property
    def pairs(self) -> tuple[ImageQuestionPair, ...]:
        """The mixed batch of the checks: photo, text, photos of other sizes, two photos in one question.

        What the model cannot take in one batch is left out or made the same size; a check of its own says so.
        """
        first, *_ = self.plain
        others = self.differently_sized
        if not self.runs((first, *others)):
            others = tuple(replace(p, photos=(resized(p.photos[0], SIDE, SIDE),)) for p in others)
        two = [self.two_photos] if self.runs((first, self.two_photos)) else []
        text = [self.text_only] if self.runs((first, self.text_only)) else []
        return (first, *text, others[0], *two, *others[1:])

    def runs(self, pairs: Sequence[ImageQuestionPair]) -> bool:
        """Whether the pairs can be encoded and answered in one batch."""
        try:
            self.forward(self.mllm.tokenize(pairs).inputs)
        except Exception:
            return False
        return True

    @cached_property
    def batch(self) -> EncodedBatch:
        """`pairs`, encoded with their answers."""
        return self.mllm.tokenize(self.pairs)

    @cached_property
    def vision(self) -> Pass:
        """A vision-only forward pass of the batch, without gradients."""
        return self.look(self.batch.inputs)

    @cached_property
    def whole(self) -> Pass:
        """A full forward pass of the batch, without gradients."""
        return self.forward(self.batch.inputs)

    @cached_property
    def features(self) -> dict[str, PhotoFeatures]:
        """The batch's feature rows as losses see them."""
        return self.rows(self.batch.inputs, self.vision)

    def rows(self, inputs: Mapping[str, Tensor], made: Pass) -> dict[str, PhotoFeatures]:
        """The real rows of a pass by layer."""
        return photo_features(self.mllm, inputs, made.tap)

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Tensor]) -> Pass:
        """Run encoder and projector alone."""
        return self.record(lambda: vision_forward(self.mllm, inputs))

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Pass:
        """Run the whole model."""
        return self.record(lambda: self.mllm.model(**inputs, use_cache=False))

    def record(self, run: Callable[[], Any]) -> Pass:
        """Note the layers that run meanwhile and what they put out."""
        ran: list[str] = []
        outputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                ran.append(name)
                outputs[name] = output if isinstance(output, Tensor) else output[0]

            return hook

        with ExitStack() as stack, FeatureTap(self.mllm.model, self.mllm.layers) as tap:
            for layer in self.mllm.layers:
                handle = self.mllm.model.get_submodule(layer.path).register_forward_hook(note(layer.name))
                stack.callback(handle.remove)
            answer = run()
        return Pass(tuple(ran), outputs, tap, getattr(answer, "logits", None))

    @cached_property
    def exchanged(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """(sample, photo) -> the batch's inputs with that photo replaced by another of its size."""
        found = {}
        for b, pair in enumerate(self.pairs):
            for i, photo in enumerate(pair.photos):
                photos = (*pair.photos[:i], redrawn(photo), *pair.photos[i + 1 :])
                pairs = [replace(pair, photos=photos) if n == b else other for n, other in enumerate(self.pairs)]
                found[b, i] = dict(self.mllm.tokenize(pairs).inputs)
        return found

    @cached_property
    def moved(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """(sample, photo) -> layer -> `[R]` bool, the rows that differ once that photo is another one."""
        return {
            key: {
                name: differs(rows, self.vision.tap.features[name])
                for name, rows in self.look(inputs).tap.features.items()
            }
            for key, inputs in self.exchanged.items()
        }

    def token(self, ids: int | Sequence[int] | Tensor) -> str:
        """Token ids as text, special tokens spelt out."""
        listed = [ids] if isinstance(ids, int) else list(ids)
        return str(self.mllm.processor.tokenizer.decode(listed, clean_up_tokenization_spaces=False))

    def attended(self, batch: EncodedBatch, row: int) -> list[int]:
        """A row's token ids without padding."""
        ids: list[int] = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()
        return ids


def answer_losses(logits: Tensor | None, batch: EncodedBatch) -> Tensor:
    """`[B]`: the answer losses that a forward pass of the batch comes to."""
    if logits is None:
        raise Wrong("logits", "none in the model's output")
    return answer_cross_entropy(logits, batch.inputs["input_ids"], batch.answer)


def tiny(adapter: Adapter, source: str) -> MLLM:
    """The tiny model that `tiny`, `tiny:ADAPTER` or `tiny:MODEL_TYPE` means."""
    name = source.partition(":")[2]
    wanted = None if name in ("", adapter.name) and name not in adapter.model_types else name
    return adapter.tiny_model(TEXTS, SIDE, 0, wanted)


def save(mllm: MLLM, folder: Path) -> None:
    """Model and processor as `from_pretrained` reads them."""
    mllm.model.save_pretrained(folder)
    mllm.processor.save_pretrained(folder)


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture in which no two patches look alike."""
    return Image.fromarray(numpy.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=numpy.uint8))


def redrawn(photo: Photo) -> Photo:
    """Another picture of the same size."""
    return Photo(f"{photo.key} redrawn", noise(*photo.open().size, seed=99))


def half_redrawn(photo: Photo, axis: int) -> Photo:
    """The same picture with another left half (`axis` 0) or upper half (`axis` 1)."""
    picture = photo.open()
    half = [size // 2 if i == axis else size for i, size in enumerate(picture.size)]
    picture = picture.copy()
    picture.paste(noise(half[0], half[1], seed=98), (0, 0))
    return Photo(f"{photo.key} half redrawn", picture)


def resized(photo: Photo, width: int, height: int) -> Photo:
    """The same picture in another size."""
    return Photo(f"{photo.key} {width}x{height}", photo.open().resize((width, height)))
