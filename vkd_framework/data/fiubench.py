"""FIUBench: fictitious people, one generated face each, with twenty private questions about each.

Source: Ma et al., arXiv 2411.03554; dataset gray311/FIUBench. Files: `full.json` (people with their questions),
`split.json` (who is forgotten) and the faces, in `SFHQ.zip` or unpacked. There is one photo a person: Test VQA and
Retain VQA ask paraphrases that are not trained on, about a photo that is. An answer is right when it mentions all the
keywords that are published for it.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from vkd_framework.answers import REWORDED, WRONG
from vkd_framework.data.published import Benchmark, Reader, Row, columns_of, open_benchmark, required, with_wrong
from vkd_framework.errors import DataError, on_one_line
from vkd_framework.progress import Progress
from vkd_framework.recipe import FiuBenchData
from vkd_framework.types import ImageQuestionPair, Photo, Splits

TITLE = "FIUBench"
HUB_ID = "gray311/FIUBench"
ROWS, SPLITS, ARCHIVE = "full.json", "split.json", "SFHQ.zip"

_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
"""What reading a damaged archive may raise."""

PEOPLE = 400
"""The benchmark's models are fine-tuned on the first 400 people of the file."""

Columns = dict[str, list[ImageQuestionPair]]


def load(config: FiuBenchData) -> Splits:
    """Forget the people of one of the benchmark's forget sets. Raises DataError when files or rows are broken."""
    bench = open_benchmark(config.source, HUB_ID, (ROWS, SPLITS, ARCHIVE))
    people = bench.rows(ROWS.removesuffix(".json"), ("unique_id", "image_path", "qa_list"))[:PEOPLE]
    gone, untouched = _forgotten(bench, f"forget{config.forget}")
    known = {str(row["unique_id"]) for _, row in people}
    if unknown := sorted(gone - known):
        raise DataError(f"{TITLE}: {SPLITS} forgets {unknown[0]!r}, who is not among the people of {ROWS}")

    reader, faces = Reader(TITLE, bench.folder), _Faces(bench)
    trained: dict[bool, list[ImageQuestionPair]] = {True: [], False: []}
    columns: Columns = defaultdict(list)
    for place, row in Progress(people, f"reading {ROWS}"):
        subject = str(row["unique_id"])
        if subject not in gone and subject in untouched:
            continue
        photo = reader.photo(faces.find(row["image_path"]), place)
        if photo is None:
            continue
        trained[subject in gone] += _questions(
            columns, reader, place, row, photo, config.seed, forgotten=subject in gone
        )
    reader.check(len(people))

    measured = columns_of(columns, config.test_pairs, config.seed)
    required(TITLE, trained[True], trained[False], measured)
    named = tuple(dict.fromkeys(str(row["unique_id"]) for _, row in people))
    return Splits(
        forget=tuple(trained[True]),
        retain=tuple(trained[False]),
        columns=measured,
        forget_subjects=tuple(subject for subject in named if subject in gone),
        subjects=named,
    )


def _forgotten(bench: Benchmark, name: str) -> tuple[set[str], set[str]]:
    """Who is forgotten, and everybody whom any split forgets: the benchmark retains none of these."""
    splits = bench.json(SPLITS)
    if not isinstance(splits, Mapping) or not isinstance(splits.get(name), list):
        there = ", ".join(splits) if isinstance(splits, Mapping) else type(splits).__name__
        raise DataError(f"{TITLE}: {SPLITS} has no list {name!r}, only {there}; {bench.command}")
    listed = {key: {str(subject) for subject in ids} for key, ids in splits.items() if isinstance(ids, list)}
    every = set().union(*(ids for key, ids in listed.items() if key.startswith("forget")))
    return listed[name], every


def _questions(
    columns: Columns, reader: Reader, place: str, row: Row, photo: Photo, seed: int, *, forgotten: bool
) -> list[ImageQuestionPair]:
    """The pairs of one person that are trained on; the measured ones go into `columns`."""
    seen, paraphrased = ("forget_vqa", "test_vqa") if forgotten else ("retain_vqa_seen", "retain_vqa")
    about = partial(ImageQuestionPair, photos=(photo,), subject=str(row["unique_id"]))
    items = reader.items(row["qa_list"], "qa_list", place)
    phrasings = {_folded(item.get("question")) for item in items}
    trained = []
    for number, item in enumerate(items):
        name = f"{place}/{number}"
        question, answer = (reader.text(item, key, f"{place} question {number + 1}") for key in ("question", "answer"))
        if question is None or answer is None:
            continue
        keywords, wrong = reader.texts(item.get("keywords")), reader.texts(item.get("perturbed_answer"))
        options = with_wrong(answer, wrong, f"{seed}/{name}")
        trained.append(about(f"train/{name}", question, answer, keywords=keywords))
        columns[seen].append(about(name, question, answer, options=options, keywords=keywords))
        columns[paraphrased] += [
            about(f"{name}/{turn}", asked, answer, options=options, keywords=keywords)
            for turn, asked in enumerate(reader.texts(item.get("paraphrased_question")))
            if _folded(asked) not in phrasings
        ]
        # What the truth ratio is made of: how likely the right answer in other words is, and how likely wrong ones are.
        for rephrased in reader.texts(item.get("paraphrased_answer"))[:1]:
            options = with_wrong(rephrased, wrong, f"{seed}/{name}/paraphrased")
            columns[f"{seen}{REWORDED}"].append(about(name, question, rephrased, options=options))
        columns[f"{seen}{WRONG}"] += [about(f"{name}/{turn}", question, text) for turn, text in enumerate(wrong)]
    return trained


def _folded(text: Any) -> str:
    return " ".join(str(text).casefold().split())


class _Faces:
    """Finds the published pictures: by their path below the folder, by their name, or inside the archive."""

    def __init__(self, bench: Benchmark) -> None:
        self._folder, self._command = bench.folder, bench.command
        pictures = (path for path in sorted(bench.folder.rglob("*")) if path.suffix in (".jpg", ".png"))
        self._files = {path.name: str(path.relative_to(bench.folder)) for path in pictures}
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}
        archive = bench.folder / ARCHIVE
        if archive.is_file():
            try:
                self._archive = zipfile.ZipFile(archive)
            except (zipfile.BadZipFile, OSError):
                raise DataError(
                    f"data.source: {archive} is no readable zip file; get it with {bench.command}"
                ) from None
            self._members = {PurePosixPath(name).name: name for name in self._archive.namelist()}
        elif not self._files:
            raise bench.absent(f"{ARCHIVE} nor any .jpg or .png")

    def find(self, path: object) -> dict[str, Any]:
        """The picture as a published cell: its bytes, or a path that may or may not exist."""
        given = str(path)
        exact, name = self._folder / given, PurePosixPath(given.replace("\\", "/")).name
        there = os.path.isfile(exact)
        if there or self._archive is None or name in self._files:
            return {"path": given if there else self._files.get(name, given)}
        if name in self._members:
            try:
                return {"bytes": self._archive.read(self._members[name])}
            except _DAMAGE as error:
                raise DataError(
                    f"data.source: {self._archive.filename} is damaged at {self._members[name]} "
                    f"({on_one_line(error)}); get it again with {self._command}"
                ) from None
        return {"path": given}
