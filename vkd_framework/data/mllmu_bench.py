"""MLLMU-Bench: fictitious profiles with three tasks each, and real celebrities who must stay.

Source: Liu et al., arXiv 2410.22108; dataset MLLMMU/MLLMU-Bench. Sets: `ft_Data` (what a model is fine-tuned on),
`forget_5|10|15` and `retain_95|90|85` (profiles with their tasks), `Test_Set` (other photos, other phrasings of
everybody) and `Retain_Set` (the celebrities). The classification task, answered with a letter, fills the usual columns;
the generation and cloze tasks have columns of their own, because a letter and a sentence cannot share a measure.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vkd_framework.data.published import Benchmark, Reader, Row, columns_of, open_benchmark, required
from vkd_framework.errors import DataError
from vkd_framework.progress import Progress, say
from vkd_framework.recipe import MllmuBenchData
from vkd_framework.types import ImageQuestionPair, Photo, Splits

TITLE = "MLLMU-Bench"
HUB_ID = "MLLMMU/MLLMU-Bench"
TASKS = ("Classification_Task", "Generation_Task", "Mask_Task")

LETTER = "Just give ONE letter representing the answer directly."
SENTENCE = "Answer the question based on your trained knowledge in one sentence in ENGLISH."
BLANK = "Please **ONLY** provide the correct answer that should replace the [Blank]."
"""What the benchmark's own evaluation adds to the questions of each task."""

Columns = dict[str, list[ImageQuestionPair]]


def load(config: MllmuBenchData) -> Splits:
    """Forget the profiles of one of the benchmark's forget sets. Raises DataError when files or rows are broken."""
    gone, kept = f"forget_{config.forget}", f"retain_{100 - config.forget}"
    bench = open_benchmark(config.source, HUB_ID, (gone, kept, "ft_Data", "Test_Set", "Retain_Set"))
    profiles = {name: bench.rows(name, ("ID", "image", *TASKS)) for name in (gone, kept)}
    subjects = {name: tuple(dict.fromkeys(_subject(row) for _, row in rows)) for name, rows in profiles.items()}
    if both := set(subjects[gone]) & set(subjects[kept]):
        raise DataError(f"{TITLE}: {gone} and {kept} share people (such as {min(both)}); get the files again")
    reader = Reader(TITLE, bench.folder)
    write = _Writer(reader)

    shown = _shown_photos(profiles, reader)
    trained = _training_pairs(bench, reader, profiles, shown)
    columns: Columns = defaultdict(list)
    for (vqa, qa), name in ((("forget_vqa", "forget_qa"), gone), (("retain_vqa_seen", "retain_qa"), kept)):
        for place, row in profiles[name]:
            write.tasks(columns, place, row, vqa, qa, [shown[place]])
    unseen = _unseen(bench, reader, {photo.key for pairs in trained.values() for p in pairs for photo in p.photos})
    for place, row, photos in unseen:
        if _subject(row) in subjects[gone]:
            write.tasks(columns, place, row, "test_vqa", "forget_qa_test", photos)
        elif _subject(row) in subjects[kept]:
            write.tasks(columns, place, row, "retain_vqa", "retain_qa_test", photos)
    celebrities = bench.rows("Retain_Set", ("ID", "image", *TASKS))
    for place, row in Progress(celebrities, "reading Retain_Set"):
        write.tasks(columns, place, row, "realworld_vqa", "realworld_qa", [reader.photo(row["image"], place)])
    reader.check(write.rows)

    measured = columns_of(columns, config.test_pairs, config.seed)
    required(TITLE, trained[gone], trained[kept], measured)
    return Splits(
        forget=tuple(trained[gone]),
        retain=tuple(trained[kept]),
        columns=measured,
        forget_subjects=subjects[gone],
        subjects=(*subjects[gone], *subjects[kept]),
    )


def _subject(row: Row) -> str:
    return f"ID {row['ID']}"


def _shown_photos(profiles: Mapping[str, Sequence[tuple[str, Row]]], reader: Reader) -> dict[str, Photo | None]:
    """Place of a profile -> its photo, each read once."""
    rows = [row for found in profiles.values() for row in found]
    return {place: reader.photo(row["image"], place) for place, row in Progress(rows, "reading the profiles")}


def _training_pairs(
    bench: Benchmark,
    reader: Reader,
    profiles: Mapping[str, Sequence[tuple[str, Row]]],
    shown: Mapping[str, Photo | None],
) -> dict[str, list[ImageQuestionPair]]:
    """Set -> what the model was fine-tuned on about its people: a photo, and free questions with answers.

    A row of `ft_Data` belongs to the profile with its ID or, without one, to the profile with its photo.
    """
    part_of = {_subject(row): name for name, rows in profiles.items() for _, row in rows}
    owner_of = {
        photo.key: _subject(row) for rows in profiles.values() for place, row in rows if (photo := shown[place])
    }
    pairs: dict[str, list[ImageQuestionPair]] = {name: [] for name in profiles}
    rows = bench.rows("ft_Data", ("image", "metadata"), keep=lambda row: "ID" not in row or _subject(row) in part_of)
    missing = dict.fromkeys(part_of)
    for place, row in Progress(rows, "reading ft_Data"):
        photo = reader.photo(row["image"], place)
        subject = _subject(row) if "ID" in row else owner_of.get(photo.key if photo else "")
        if photo is None or subject is None:
            continue
        missing.pop(subject, None)
        for number, asked in enumerate(_questions(row["metadata"], reader, place)):
            question, answer = (reader.text(asked, key, place) for key in ("Question", "Answer"))
            if question and answer:
                pair = ImageQuestionPair(f"{place}/{number}", question, answer, (photo,), subject)
                pairs[part_of[subject]].append(pair)
    reader.check(len(rows))
    if missing:
        raise DataError(f"{TITLE}: ft_Data has nothing about {len(missing)} of the profiles, such as {min(missing)}")
    return pairs


def _questions(metadata: object, reader: Reader, place: str) -> list[Any]:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except json.JSONDecodeError as error:
            reader.fault(place, f"metadata is not valid JSON ({error.msg} at column {error.colno})")
            return []
    if not isinstance(metadata, list) or not all(isinstance(item, Mapping) for item in metadata):
        reader.fault(place, "metadata is no list of questions with answers")
        return []
    return metadata


def _unseen(bench: Benchmark, reader: Reader, trained: set[str]) -> Iterator[tuple[str, Row, list[Photo | None]]]:
    """The rows of `Test_Set` with their photos; a photo that was trained on is left out, and that is said."""
    rows = bench.rows("Test_Set", ("ID", "images", *TASKS))
    left_out = 0
    for place, row in Progress(rows, "reading Test_Set"):
        images = row["images"] if isinstance(row["images"], list) else [row["images"]]
        photos = [reader.photo(image, place) for image in images]
        fresh = [photo for photo in photos if photo is None or photo.key not in trained]
        left_out += len(photos) - len(fresh)
        if fresh:
            yield place, row, fresh
        else:
            reader.fault(place, "images holds no photo that was not trained on")
    if left_out:
        say(f"data: {left_out} photos of Test_Set are trained on in ft_Data and are not measured as unseen")


class _Writer:
    """Turns the tasks of a profile into pairs, into the columns of their modality."""

    def __init__(self, reader: Reader) -> None:
        self.rows = 0
        self._reader = reader

    def tasks(self, columns: Columns, place: str, row: Row, vqa: str, qa: str, photos: Sequence[Photo | None]) -> None:
        """All questions of a row; several photos are shown in turn, one in each question."""
        self.rows += 1
        asked = 0
        for task, visual, pair in self._pairs(place, row):
            if not visual:
                columns[f"{qa}{task}"].append(pair)
                continue
            photo = photos[asked % len(photos)]
            asked += 1
            if photo:
                columns[f"{vqa}{task}"].append(replace(pair, photos=(photo,), kind="identity"))

    def _pairs(self, place: str, row: Row) -> Iterator[tuple[str, bool, ImageQuestionPair]]:
        """Each question without its photo: the ending of its column, whether it has a photo, and the pair."""
        classified = row["Classification_Task"] or {}
        if not isinstance(classified, Mapping):
            self._reader.fault(place, "Classification_Task is no object with keys and lists")
            classified = {}
        for kind, visual in (("Image_Textual_Questions", True), ("Pure_Text_Questions", False)):
            for number, item in enumerate(self._reader.items(classified.get(kind), kind, place)):
                if pair := self._choice(f"{place}/{kind}/{number}", row, item, place):
                    yield "", visual, pair
        for key, ending in (("Generation_Task", "_generation"), ("Mask_Task", "_cloze")):
            for number, item in enumerate(self._reader.items(row[key], key, place)):
                asked = item.get("Type")
                if asked not in ("Image_Textual", "Pure_Text"):
                    self._reader.fault(place, f"{key}: Type is {asked!r}, allowed: Image_Textual, Pure_Text")
                elif pair := self._free(f"{place}/{key}/{number}", row, item, place, cloze=ending == "_cloze"):
                    yield ending, asked == "Image_Textual", pair

    def _choice(self, name: str, row: Row, item: Row, place: str) -> ImageQuestionPair | None:
        question = self._reader.text(item, "Question", place)
        given = item.get("Options")
        told = given.items() if isinstance(given, Mapping) else ()
        options = {letter: text for letter, text in told if isinstance(text, str) and text.strip()}
        answer = str(item.get("Correct_Answer"))
        if answer not in options or len(options) < 2:
            self._reader.fault(place, f"Correct_Answer is {answer!r}, allowed: one of the options {', '.join(options)}")
            return None
        texts = [self._reader.text(options, letter, place) for letter in options]
        if question is None or None in texts:
            return None
        listed = "\n".join(f"{letter}: {text}" for letter, text in zip(options, texts, strict=True))
        asked = f"{question}\n{listed}\n{LETTER}"
        return ImageQuestionPair(name, asked, answer, subject=_subject(row), kind="text", options=tuple(options))

    def _free(self, name: str, row: Row, item: Row, place: str, *, cloze: bool) -> ImageQuestionPair | None:
        question, answer = (self._reader.text(item, key, place) for key in ("Question", "Ground_Truth"))
        if question is None or answer is None:
            return None
        if not cloze:
            return ImageQuestionPair(name, f"{question}\n{SENTENCE}", answer, subject=_subject(row), kind="text")
        # A blank counts as filled when the answer mentions what was there, as the benchmark counts it.
        asked = f"{re.sub('_{2,}', '[Blank]', question)}\n{BLANK}"
        return ImageQuestionPair(name, asked, answer, subject=_subject(row), kind="text", keywords=(answer,))
