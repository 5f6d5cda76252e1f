"""The nouns of the framework: what the rooms hand to each other.

Shape letters, here and everywhere: `B` samples, `L` text tokens, `R` feature rows (one row is one visual token of one
photo at one layer), `D` channels, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["identity", "visible", "text"]
"""`identity`: the answer needs to know who is shown. `visible`: anybody can see it. `text`: no photo at all."""

Part = Literal["encoder", "projector", "language_model"]
"""The three parts into which every adapter splits the parameters of its model."""

PARTS: tuple[Part, ...] = ("encoder", "projector", "language_model")

Scope = Literal["visual", "full"]
"""What an attacker tunes: the visual modules alone, or every weight."""

RelearnScope = Literal["visual", "low_rank", "full"]
"""`low_rank`: beside the visual modules, something of low rank that he adds to the language model's layers."""

SCOPES: Mapping[RelearnScope, tuple[Part, ...]] = {
    "visual": ("encoder", "projector"),
    "low_rank": ("encoder", "projector"),
    "full": ("encoder", "projector", "language_model"),
}
"""The parts of which he tunes every weight."""


Pool = Literal["known", "new", "others"]
"""What a relearning attacker has. `known`: the pairs that unlearning used. `new`: pairs about photos of the same people
that nothing used. `others`: pairs about other people only."""


ORIENTATION = 0x0112
TURNS = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}
"""Value of the EXIF tag `ORIENTATION` -> what turns the picture upright; none for 1."""
LYING = (5, 6, 7, 8)
"""Its values for pictures that are stored on their side."""


@dataclass(frozen=True, eq=False)
class Photo:
    """One picture. `key` is its stable identity: features are cached and results are reported under it.

    `source`: a file, a picture that is drawn already, or the bytes of an image file.
    """

    key: str
    source: Path | Image.Image | bytes

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright, from the file's head alone. Raises OSError like `open`."""
        if isinstance(self.source, Image.Image):
            return self.source.size
        with Image.open(BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as file:
            width, height = file.size
            return (height, width) if file.getexif().get(ORIENTATION, 1) in LYING else (width, height)

    @cached_property
    def pixels(self) -> str:
        """SHA-256 of the upright picture, the same for every file of it. Raises OSError like `open`."""
        picture = self.open()
        return hashlib.sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).hexdigest()

    def open(self) -> Image.Image:
        """The picture as RGB, turned upright (EXIF). Raises OSError when the file cannot be read, or not as 8 bits."""
        if isinstance(self.source, Image.Image):
            return self.source
        with Image.open(BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as file:
            if file.mode.startswith(("I", "F")):  # to convert these clips nearly all to white
                raise UnidentifiedImageError(f"its greys have more than 8 bits ({file.mode}); save it with 8 bits")
            file.load()
            turn = TURNS.get(file.getexif().get(ORIENTATION, 1))
            return (file if turn is None else file.transpose(turn)).convert("RGB")


@dataclass(frozen=True, eq=False)
class ImageQuestionPair:
    """One question with its answer, about one photo or several (`photos` is empty for a text-only question).

    Photos come before the question, in order. `options` are the choices of the multiple-choice form, the answer among
    them; empty when there are none. `keywords` are what a given answer must mention to be right; without any, it must
    equal `answer`.
    """

    id: str
    question: str
    answer: str
    photos: tuple[Photo, ...] = ()
    subject: str | None = None
    kind: Kind = "identity"
    options: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def photo_keys(self) -> tuple[str, ...]:
        """What the pair's photos are cached and counted under, together."""
        return tuple(photo.key for photo in self.photos)


@dataclass(frozen=True)
class Splits:
    """What a data source yields, whatever it was read from.

    `forget` and `retain` are trained on (unlearning, mask, attack). `columns` are measured; keys are the columns of
    `metrics.json`. Photos and phrasings of `test_vqa` and `retain_vqa` occur neither in `forget` nor in `retain`.
    `teach` makes a vanilla model that knows everybody, group by group (`teach.shares`); `teach_retain` is the same
    without the forgotten people; `taught` asks the vanilla model about everybody, on unseen photos. `text` holds
    text-only questions about everybody in phrasings that no column measures, for methods that want such knowledge
    preserved. Sources without a fictitious cast leave these four empty.
    For attacks only, and empty where a source has none: `fresh` asks about the forgotten people on photos that are
    neither trained on nor measured, `strangers` are photos of people whom no model was taught, taken as all others are,
    and `rephrasings` maps a question to the same in other words.
    """

    forget: tuple[ImageQuestionPair, ...]
    retain: tuple[ImageQuestionPair, ...]
    columns: Mapping[str, tuple[ImageQuestionPair, ...]]
    forget_subjects: tuple[str, ...]
    subjects: tuple[str, ...]
    teach: Mapping[str, tuple[ImageQuestionPair, ...]] = field(default_factory=dict)
    teach_retain: Mapping[str, tuple[ImageQuestionPair, ...]] = field(default_factory=dict)
    taught: tuple[ImageQuestionPair, ...] = ()
    text: tuple[ImageQuestionPair, ...] = ()
    fresh: tuple[ImageQuestionPair, ...] = ()
    strangers: tuple[Photo, ...] = ()
    rephrasings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def photos_of_forgotten(self) -> frozenset[str]:
        """Keys of the photos that the questions about the forgotten people are about, also those anybody can answer."""
        seen = (pair for pair in self.retain if pair.subject in self.forget_subjects)
        return frozenset(key for pair in (*self.forget, *self.fresh, *seen) for key in pair.photo_keys)

    def shows_forgotten(self, pair: ImageQuestionPair) -> bool:
        """Whether a pair is about a forgotten person, or about a photo that shows one, whoever it asks about."""
        return pair.subject in self.forget_subjects or not self.photos_of_forgotten.isdisjoint(pair.photo_keys)


IGNORED = -100
"""The label of a token that nothing is learnt from."""


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Pairs as the model takes them.

    `inputs`: exactly what the processor returned, every key of it but labels of its own. `labels`: `[B, L]`, -100 on
    everything but the answer's tokens and the stop token that ends them. `content`: `[B, L]` bool, the answer's tokens
    without that one.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    content: Tensor

    @property
    def answer(self) -> Tensor:
        """`[B, L]` bool: the answer's tokens, with the stop token that ends them."""
        return self.labels != IGNORED


@dataclass(frozen=True)
class VisionModules:
    """Where an architecture keeps its parts: dotted paths of modules (or of bare parameters) in `named_modules`.

    `projector` may lie inside `encoder` (a merger); the longest path wins. Parameters under none of the given paths
    belong to the projector: whatever sits between the encoder and the language model.
    """

    encoder: str
    language_model: tuple[str, ...]
    projector: tuple[str, ...] = ()


@dataclass(frozen=True)
class DistillationLayer:
    """A place where features can be read. `name` is canonical (`vision.7`, `projector`) and stable across versions.

    `path` is the module whose output is read, `width` the channels of that output (None where it is not known before a
    forward pass), `reaches_language_model` whether that output influences any answer.
    """

    name: str
    path: str
    width: int | None
    parameters: int
    reaches_language_model: bool = True


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Which sample each feature row belongs to.

    `sample`: `[R]` int64, the index in the batch. `real`: `[R]` bool, False for rows that show no part of the photo
    (class tokens, padding); such rows enter no loss.
    """

    sample: Tensor
    real: Tensor


@dataclass(frozen=True, eq=False)
class FeatureGrid:
    """Which part of which photo each feature row shows, whatever the order of the rows.

    `photo`: `[R]` int64, the index among the batch's photos, sample after sample. `box`: `[R, 4]` float32, the left,
    upper, right and lower edge of the row's patch as shares of the photo's width and height. Rows that are not real may
    hold anything.
    """

    photo: Tensor
    box: Tensor


@dataclass(frozen=True)
class Cell:
    """One column's figures for one model, over `n` questions; `interval_95` is the 95 % interval of `exact_match`.

    `choice_accuracy` is None when no question of the column has options.
    """

    exact_match: float
    choice_accuracy: float | None
    rouge_l: float
    answer_probability: float
    n: int
    interval_95: tuple[float, float]


@dataclass(frozen=True)
class AttackCurve:
    """One relearning attack: exact match on Test VQA after each number of steps (0 = before the attack).

    `share` is the attacker's share of the pairs of `pool`, `pairs` how many they are. `right` says of each question
    whether it was answered right, after each number of steps but 0; it is empty where that was not kept.
    """

    model: str
    scope: RelearnScope
    share: float
    pairs: int
    seed: int
    steps: tuple[int, ...]
    exact_match: tuple[float, ...]
    pool: Pool = "known"
    right: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Sample:
    """A question as two models answered it, for the report."""

    column: str
    pair: ImageQuestionPair
    before: str
    after: str = field(default="")
