"""CLEAR: the fictitious authors of TOFU on generated photos with captions, and what a model knows of the real world.

Source: Dontsov et al., arXiv 2410.18057; dataset therem/CLEAR. Sets: `forget01|05|10` and `retain99|95|90` (photo,
caption, name), the same with `_perturbed` and `retain_perturbed` (wrong captions and names), with `+tofu` (text
questions among the photos), `real_faces` and `real_world`. No photo of a forgotten person is published as unseen, so
some of each person's photos are held out here. Who is shown fills the usual columns; captions have their own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vkd_framework.data.jsonl import held_out_of
from vkd_framework.data.published import Benchmark, Reader, Row, columns_of, open_benchmark, required, with_wrong
from vkd_framework.errors import DataError
from vkd_framework.progress import Progress
from vkd_framework.recipe import ClearData
from vkd_framework.types import ImageQuestionPair, Photo, Splits

TITLE = "CLEAR"
HUB_ID = "therem/CLEAR"

NAME_TRAIN = ("Who is the person in this picture?", "What is this person called?", "Tell me who is shown here.")
NAME_TEST = "What is the name of the person in the image?"
CAPTION_TRAIN = ("Describe this picture.", "What can be seen here?", "Give a caption for this photo.")
CAPTION_TEST = "What does this image show?"
"""How it is asked. The benchmark publishes photos with names and captions, but no questions to go with them."""

DRAWN_NAMES = 3
"""Wrong names for a photo that has none published."""


@dataclass(frozen=True, eq=False)
class _Shot:
    """A photo with what is published about it."""

    place: str
    photo: Photo
    name: str
    caption: str
    wrong_names: tuple[str, ...] = ()
    wrong_captions: tuple[str, ...] = ()


def load(config: ClearData) -> Splits:
    """Forget the people of one of the benchmark's forget sets. Raises DataError when files or rows are broken."""
    gone, kept = f"forget{config.forget:02d}", f"retain{100 - config.forget}"
    perturbed = (f"{gone}_perturbed", "retain_perturbed")
    texts = (f"{gone}+tofu", f"{kept}+tofu")
    bench = open_benchmark(config.source, HUB_ID, (gone, kept, *perturbed, *texts, "real_faces", "real_world"))
    reader = Reader(TITLE, bench.folder)
    forgotten, others = (
        _shots(bench, reader, name, wrong) for name, wrong in zip((gone, kept), perturbed, strict=True)
    )
    names = tuple(dict.fromkeys(shot.name for shot in forgotten))
    if both := set(names) & {shot.name for shot in others}:
        raise DataError(f"{TITLE}: {gone} and {kept} share people (such as {min(both)}); get the files again")
    held_out = _held_out([*forgotten, *others], config)
    seen, unseen = ([shot for shot in forgotten if (shot.photo.key in held_out) == out] for out in (False, True))
    kept_seen, kept_unseen = ([shot for shot in others if (shot.photo.key in held_out) == out] for out in (False, True))
    everybody = (*names, *dict.fromkeys(shot.name for shot in others))
    columns: dict[str, Sequence[ImageQuestionPair]] = {}
    for column, shots in (("forget_vqa", seen), ("test_vqa", unseen), ("retain_vqa", kept_unseen)):
        columns[column] = [_named(shot, everybody, config.seed) for shot in shots]
        columns[f"{column}_caption"] = [_captioned(shot, config.seed) for shot in shots]
    for column, name in zip(("forget_qa", "retain_qa"), texts, strict=True):
        columns[column] = _text_questions(bench, reader, name, everybody)
    columns["realworld_vqa"] = _real(bench, reader, "real_world", None, config.seed)
    columns["realworld_vqa_faces"] = _real(bench, reader, "real_faces", NAME_TEST, config.seed)
    reader.check(len(forgotten) + len(others))

    forget, retain = ([pair for shot in shots for pair in _training_pairs(shot)] for shots in (seen, kept_seen))
    measured = columns_of(columns, config.test_pairs, config.seed)
    required(TITLE, forget, retain, measured)
    return Splits(
        forget=tuple(forget),
        retain=tuple(retain),
        columns=measured,
        forget_subjects=names,
        subjects=everybody,
    )


def _shots(bench: Benchmark, reader: Reader, name: str, perturbed: str) -> list[_Shot]:
    """The photos of a set, each once, with the wrong names and captions of the perturbed set where it has them."""
    published = {
        (row["name"], row["caption"]): row
        for _, row in bench.rows(perturbed, ("name", "caption", "perturbed_captions"))
    }
    rows = bench.rows(name, ("image", "caption", "name"))
    shots: dict[str, _Shot] = {}
    for place, row in Progress(rows, f"reading {name}"):
        photo = reader.photo(row["image"], place)
        caption, person = (reader.text(row, key, place) for key in ("caption", "name"))
        if photo is None or caption is None or person is None:
            continue
        wrong = published.get((row["name"], row["caption"]), {})
        shots.setdefault(
            photo.key,
            _Shot(
                place,
                photo,
                person,
                caption,
                reader.texts(wrong.get("perturbed_names")),
                reader.texts(wrong.get("perturbed_captions")),
            ),
        )
    reader.check(len(rows))
    return list(shots.values())


def _held_out(shots: Iterable[_Shot], config: ClearData) -> set[str]:
    """The keys of the photos that are only measured: some of each person who has two or more."""
    photos: dict[str, list[str]] = defaultdict(list)
    for shot in shots:
        photos[shot.name].append(shot.photo.key)
    held_out: set[str] = set()
    for keys in photos.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{config.seed}/{key}".encode()).digest())
        held_out |= set(keys[: held_out_of(len(keys), config.test_share)])
    return held_out


def _training_pairs(shot: _Shot) -> list[ImageQuestionPair]:
    turn = int(shot.photo.key[:8], 16)
    asked = (("name", NAME_TRAIN, shot.name, (shot.name,)), ("caption", CAPTION_TRAIN, shot.caption, ()))
    return [
        ImageQuestionPair(
            f"train/{shot.place}/{what}",
            phrasings[turn % len(phrasings)],
            answer,
            (shot.photo,),
            shot.name,
            keywords=keywords,
        )
        for what, phrasings, answer, keywords in asked
    ]


def _named(shot: _Shot, everybody: Sequence[str], seed: int) -> ImageQuestionPair:
    wrong = shot.wrong_names or _others(shot.name, everybody, f"{seed}/{shot.place}")
    options = with_wrong(shot.name, wrong, f"{seed}/{shot.place}/names")
    return ImageQuestionPair(
        f"{shot.place}/name", NAME_TEST, shot.name, (shot.photo,), shot.name, options=options, keywords=(shot.name,)
    )


def _others(name: str, everybody: Sequence[str], seed: str) -> list[str]:
    order = sorted(everybody, key=lambda other: hashlib.sha256(f"{seed}/{other}".encode()).digest())
    return [other for other in order if other != name][:DRAWN_NAMES]


def _captioned(shot: _Shot, seed: int) -> ImageQuestionPair:
    options = with_wrong(shot.caption, shot.wrong_captions, f"{seed}/{shot.place}/captions")
    return ImageQuestionPair(
        f"{shot.place}/caption", CAPTION_TEST, shot.caption, (shot.photo,), shot.name, options=options
    )


def _text_questions(bench: Benchmark, reader: Reader, name: str, people: Sequence[str]) -> list[ImageQuestionPair]:
    """The rows without a photo. They do not say whom they are about; the one name that occurs is taken."""
    pairs = []
    for place, row in bench.rows(name, ("image", "question", "answer"), keep=_without_photo):
        question, answer = (reader.text(row, key, place) for key in ("question", "answer"))
        if question and answer:
            subject = next((person for person in people if person in f"{question} {answer}"), None)
            pairs.append(ImageQuestionPair(place, question, answer, subject=subject, kind="text"))
    return pairs


def _without_photo(row: Row) -> bool:
    image = row["image"]
    return image is None or (isinstance(image, Mapping) and not any(image.values()))


def _real(bench: Benchmark, reader: Reader, name: str, question: str | None, seed: int) -> list[ImageQuestionPair]:
    """Questions about the real world; without a column of questions, `question` is asked of each photo."""
    pairs = []
    rows = bench.rows(name, ("image", "answer", "options", *(() if question else ("question",))))
    for place, row in Progress(rows, f"reading {name}"):
        photo = reader.photo(row["image"], place)
        asked, answer = question or reader.text(row, "question", place), reader.text(row, "answer", place)
        if photo and asked and answer:
            options = with_wrong(answer, reader.texts(row["options"]), f"{seed}/{place}")
            pairs.append(
                ImageQuestionPair(
                    place,
                    asked,
                    answer,
                    (photo,),
                    kind="identity" if question else "visible",
                    options=options,
                    keywords=(answer,),
                )
            )
    return pairs
