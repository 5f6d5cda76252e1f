"""A user's own people: one JSON object a line, `{image, question, answer, subject, options, modality, id, split}`.

`modality` is `identity` (who is shown must be known), `visible` (anybody can see the answer) or `text` (no image).
`image` may be a list: several photos in one question. `split` says whether a row may be trained on; where no row of a
photo says so, some photos of each subject are held out. A photo is either trained on or measured, never both, and
photos that are shown together stay together. Files of the same picture are one photo, which goes by the first of them.
How the questions are phrased is left to the rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import posixpath
import random
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from vkd_framework.answers import composed, normalise
from vkd_framework.errors import DataError, first_line
from vkd_framework.progress import Progress
from vkd_framework.recipe import JsonlData
from vkd_framework.types import ImageQuestionPair, Kind, Photo, Splits

KEYS = ("image", "question", "answer", "subject", "options", "modality", "id", "split")
SPLITS = ("train", "test")
PLACEHOLDERS = (
    *("<image>", "</image>", "<img>", "</img>", "<|image|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<IMG_CONTEXT>", "<image_soft_token>", "<start_of_image>", "<end_of_image>", "<fake_token_around_image>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|video_pad|>", "<video>"),
)
"""What stands for a photo in the text of some model; only its processor may write it."""

COLUMNS = ("forget_vqa", "test_vqa", "retain_vqa", "forget_qa", "retain_qa", "realworld_vqa", "forget_visible_vqa")

_LISTED = 20


@dataclass(frozen=True)
class _Row:
    pair: ImageQuestionPair
    split: str | None


def load(config: JsonlData) -> Splits:
    """The rows of `config`, checked and sorted into splits. All broken rows are reported in one `DataError`."""
    lines = _lines(config.rows)
    reader = _Reader(config.rows.name, _image_folder(config))
    progress = Progress(lines, f"reading {config.rows.name}")
    rows = [row for number, line in progress if (row := reader.read(number, line)) is not None]
    forgotten = _forget_names(config.forget)
    faults = reader.report(len(lines)) + _unmentioned(forgotten, reader.subjects)
    faults += _spelt_otherwise(config.rows.name, forgotten, reader.subjects)
    if faults:
        raise DataError("\n".join(faults))
    return _sorted_into_splits(config, _with_options(_with_splits(rows, config, forgotten), config.seed), forgotten)


def _sorted_into_splits(config: JsonlData, rows: Sequence[_Row], forgotten: Sequence[str]) -> Splits:
    forget, retain = [], []
    columns: dict[str, list[ImageQuestionPair]] = {column: [] for column in COLUMNS}
    for row in rows:
        pair, gone = row.pair, row.pair.subject in forgotten
        if row.split == "test":
            columns[_column(pair.kind, gone)].append(pair)
        elif gone and pair.kind == "identity":
            forget.append(pair)
            columns["forget_vqa"].append(replace(pair, id=f"forget_vqa/{pair.id}"))
        else:
            retain.append(pair)
    if lacking := _lacking(forgotten, {"train on": forget, "measure": columns["test_vqa"]}):
        raise DataError(
            f"{config.rows.name}: too few photos of {lacking}: give every forgotten subject two photos that differ, "
            'with identity questions, or mark rows with "split": "train" and "split": "test"'
        )
    if not retain:
        raise DataError(
            f"{config.rows.name}: nothing to retain: add identity rows of people who are not named in data.forget"
        )
    if not columns["retain_vqa"]:
        raise DataError(
            f"{config.rows.name}: nobody to measure of those who are kept: give at least one of them two photos that "
            'differ, with identity questions, or mark rows of theirs with "split": "test"'
        )
    splits = Splits(
        forget=tuple(forget),
        retain=tuple(retain),
        columns={column: tuple(pairs) for column, pairs in columns.items() if pairs},
        forget_subjects=tuple(forgotten),
        subjects=tuple(dict.fromkeys(row.pair.subject for row in rows if row.pair.subject is not None)),
    )
    if naming := _retained_naming(splits):
        raise DataError(
            f"{config.rows.name}: a forgotten person would be trained to be named by {', '.join(listed(naming))}: kept "
            "rows about a photo that shows somebody forgotten, with the name of one for an answer; give them that "
            "subject and the modality identity, or take them out"
        )
    return splits


def _retained_naming(splits: Splits) -> list[str]:
    """Ids of retained pairs that would teach again who is on a photo of a forgotten person."""
    names = {normalise(name) for name in splits.forget_subjects}
    return [
        pair.id
        for pair in splits.retain
        if pair.photos and normalise(pair.answer) in names and splits.shows_forgotten(pair)
    ]


def _lacking(forgotten: Sequence[str], needed: Mapping[str, Sequence[ImageQuestionPair]]) -> str:
    """Who of the forgotten has no pair for something that is needed, and for what; empty when nobody lacks anything."""
    had = {what: {pair.subject for pair in pairs} for what, pairs in needed.items()}
    lacks = {name: [f"none to {what}" for what, subjects in had.items() if name not in subjects] for name in forgotten}
    return ", ".join(listed([f"{name!r} ({', '.join(missing)})" for name, missing in lacks.items() if missing]))


def _column(kind: Kind, gone: bool) -> str:
    if kind == "text":
        return "forget_qa" if gone else "retain_qa"
    if kind == "visible":
        return "forget_visible_vqa" if gone else "realworld_vqa"
    return "test_vqa" if gone else "retain_vqa"


def _with_splits(rows: Sequence[_Row], config: JsonlData, forgotten: Sequence[str]) -> list[_Row]:
    """Every row with its split: its photos', which is the one some row gives them or else the one drawn for them.

    It is drawn for each subject, the forgotten first, and of what their identity is asked on before all else: what
    other people's rows, or others of their own, have decided already counts, and cannot leave them without either.
    """
    group_of = Groups()
    for row in rows:
        group_of.join(row.pair.photo_keys)
    groups = [group_of.first(row.pair.photo_keys[0]) if row.pair.photos else None for row in rows]
    split_of = {group: row.split for group, row in zip(groups, rows, strict=True) if group is not None and row.split}
    owners = _groups_by_subject(rows, groups)
    for _, owned in sorted(owners.items(), key=lambda one: (one[0].subject not in forgotten, not one[0].asked)):
        undecided = [group for group in owned if group not in split_of]
        measured = sum(split_of.get(group) == "test" for group in owned)
        held_out = max(0, held_out_of(len(owned), config.test_share) - measured)
        undecided.sort(key=lambda group: hashlib.sha256(f"{config.seed}/{group}".encode()).digest())
        split_of |= {group: "test" if at < held_out else "train" for at, group in enumerate(undecided)}
    return [
        replace(row, split=(row.split if group is None else split_of.get(group)) or "test")
        for group, row in zip(groups, rows, strict=True)
    ]


def held_out_of(count: int, share: float) -> int:
    """How many of somebody's photos are only measured: at least one, and one is left to train on; none of a single."""
    return min(count - 1, max(1, round(share * count))) if count > 1 else 0


@dataclass(frozen=True)
class _Owner:
    """Whose photos, and whether those on which the subject's identity is asked, or the rest."""

    subject: str
    asked: bool


def _groups_by_subject(rows: Sequence[_Row], groups: Sequence[str | None]) -> Mapping[_Owner, list[str]]:
    """Everybody's photos, and in them each once."""
    asked = {(row.pair.subject, group) for group, row in zip(groups, rows, strict=True) if row.pair.kind == "identity"}
    owned: dict[_Owner, dict[str, None]] = defaultdict(dict)
    for group, row in zip(groups, rows, strict=True):
        if group is not None and (subject := row.pair.subject) is not None:
            owned[_Owner(subject, (subject, group) in asked)][group] = None
    return {owner: list(found) for owner, found in owned.items()}


class Groups:
    """Photos that rows show together, directly or by way of others; a group goes by its first key in sorting order."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def first(self, key: str) -> str:
        """The name of the group that `key` is in."""
        while (before := self._before.setdefault(key, key)) != key:
            key = before
        return key

    def join(self, keys: Sequence[str]) -> None:
        """Put these into one group."""
        firsts = [self.first(key) for key in keys]
        for first in firsts:
            self._before[first] = min(firsts)


def _with_options(rows: Sequence[_Row], seed: int) -> list[_Row]:
    """Rows without options get three answers of other subjects to the same question, where there are three."""
    answers: dict[str, dict[str, set[str | None]]] = defaultdict(lambda: defaultdict(set))
    written: dict[str, str] = {}
    for row in rows:
        answers[_folded(row.pair.question)][normalise(row.pair.answer)].add(row.pair.subject)
        written.setdefault(normalise(row.pair.answer), row.pair.answer)

    def filled(pair: ImageQuestionPair) -> ImageQuestionPair:
        wrong = {
            written[answer]
            for answer, subjects in answers[_folded(pair.question)].items()
            # What is also true of this subject (on another photo, say) would be a second right answer.
            if answer != normalise(pair.answer) and (pair.subject is None or pair.subject not in subjects)
        }
        if pair.options or len(wrong) < 3:
            return pair
        rng = random.Random(f"{seed}/{pair.id}/options")
        options = [pair.answer, *rng.sample(sorted(wrong), 3)]
        rng.shuffle(options)
        return replace(pair, options=tuple(options))

    return [replace(row, pair=filled(row.pair)) for row in rows]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


_PLAIN = {"'": "\u2018\u2019\u02bc", '"': "\u201c\u201d", "-": "\u2010\u2011\u2012\u2013\u2014\u2015"}
_VARIANTS = str.maketrans({variant: plain for plain, variants in _PLAIN.items() for variant in variants})
"""Quotes and dashes as a word processor writes them -> the plain ones."""


def _as_it_looks(name: str) -> str:
    """The name without what an eye may pass over: case, blanks, invisible characters, variants of a sign."""
    visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return _folded(unicodedata.normalize("NFKC", visible).translate(_VARIANTS))


def _told_apart(name: str, other: str) -> str:
    """The name in quotes, with escapes for what cannot be seen, and for signs that are not in the other name."""
    known = other.lower()
    return "".join(
        letter if letter.isascii() or letter.lower() in known else ascii(letter)[1:-1] for letter in repr(name)
    )


class _Reader:
    """Turns lines into rows and remembers everything that is wrong with them."""

    def __init__(self, name: str, images: Path) -> None:
        self.name, self.images = name, images
        self.faults: list[str] = []
        self.subjects: dict[str, int] = {}
        """Subject -> the first line that names it."""
        self._lines: dict[str, int] = {}
        self._photos: dict[str, Photo | str] = {}
        self._by_pixels: dict[str, Photo] = {}
        self._groups = Groups()
        self._splits: dict[str, tuple[str, int]] = {}

    def read(self, number: int, line: str) -> _Row | None:
        """The row on that line, or None if it is broken."""
        faults: list[str] = []
        row = self._row(number, line, faults)
        if faults:
            self.faults.append(f"{self.name}:{number}: {'; '.join(faults)}")
            return None
        return row

    def _row(self, number: int, line: str, faults: list[str]) -> _Row | None:
        given = _parsed(line, faults)
        if faults and not isinstance(given, dict):
            return None
        if not isinstance(given, dict):
            faults.append(f'{_kind_of(given)} given, allowed: an object such as {{"question": ..., "answer": ...}}')
            return None
        given |= {key: _composed(given[key]) for key in ("question", "answer", "subject", "options") if key in given}
        modality = given.get("modality")
        if modality is None:
            modality = "text" if given.get("image") is None else "identity"
        faults += [
            *_unknown_keys(given),
            *_text_faults(given),
            *_choice_faults(given, modality),
            *_option_faults(given),
        ]
        photos = self._shown_photos(given, modality, faults)
        self._check_id(given, number, faults)
        self._check_split(given, photos, number, faults)
        subject = given.get("subject")
        if isinstance(subject, str) and subject.strip():
            subject = subject.strip()
            self.subjects.setdefault(subject, number)
        if faults:
            return None
        pair = ImageQuestionPair(
            id=given.get("id") or f"{self.name}:{number}",
            question=given["question"].strip(),
            answer=given["answer"].strip(),
            photos=photos,
            subject=subject,
            kind=cast(Kind, modality),
            options=tuple(option.strip() for option in given.get("options") or ()),
        )
        return _Row(pair, given.get("split"))

    def report(self, rows: int) -> list[str]:
        """The faults as the lines of one message: none if there are none."""
        return fault_report(self.name, self.faults, rows)

    def _shown_photos(self, given: Mapping[str, Any], modality: object, faults: list[str]) -> tuple[Photo, ...]:
        image = given.get("image")
        if image is None:
            if modality in ("identity", "visible"):
                faults.append(
                    f"image is missing, but modality is {modality!r}; without an image only 'text' is allowed"
                )
            return ()
        paths = image if isinstance(image, list) else [image]
        if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
            faults.append(f"image is {_shown(image)}, allowed: a path below {self.images}, or a list of such paths")
            return ()
        if modality == "text":
            faults.append("modality is 'text', but an image is given; remove one of the two")
        keys = [posixpath.normpath(path.replace("\\", "/")) for path in paths]
        found = [self._photo(key) for key in keys]
        for at, photo in enumerate(found):
            if (first := found.index(photo)) < at:
                same = "" if keys[first] == keys[at] else f" ({keys[first]!r} and {keys[at]!r} are the same picture)"
                faults.append(f"image is {_shown(image)}, allowed: each image once{same}")
                return ()
        faults += [photo for photo in found if isinstance(photo, str)]
        photos = tuple(photo for photo in found if isinstance(photo, Photo))
        return photos if len(photos) == len(found) else ()

    def _photo(self, key: str) -> Photo | str:
        """The photo of that path, or what is wrong with it."""
        if key not in self._photos:
            photo = _verified(key, self.images)
            self._photos[key] = self._by_pixels.setdefault(photo.pixels, photo) if isinstance(photo, Photo) else photo
        return self._photos[key]

    def _check_id(self, given: Mapping[str, Any], number: int, faults: list[str]) -> None:
        name = given.get("id")
        if name is None:
            return
        if not isinstance(name, str) or not name.strip():
            faults.append(f"id is {_shown(name)}, allowed: a text that no other row has")
        elif (first := self._lines.setdefault(name, number)) != number:
            faults.append(f"id {name!r} is already used on line {first}")

    def _check_split(self, given: Mapping[str, Any], photos: Sequence[Photo], number: int, faults: list[str]) -> None:
        """A group of photos has one split: that of the first line that names one."""
        if not photos:
            return
        keys = [photo.key for photo in photos]
        known = {split for key in keys if (split := self._splits.pop(self._groups.first(key), None))}
        self._groups.join(keys)
        own = given.get("split")
        decided = sorted(known, key=lambda split: split[1]) + ([(own, number)] if own in SPLITS else [])
        if not decided:
            return
        split, first = self._splits[self._groups.first(keys[0])] = decided[0]
        other = next((found for found in decided if found[0] != split), None)
        if other is None:
            return
        if other == (own, number):
            faults.append(f"split is {_shown(own)}, but line {first} puts the same image into {_shown(split)}")
        else:
            faults.append(
                f"shows images together that line {first} puts into {_shown(split)} and line {other[1]} into "
                f"{_shown(other[0])}; give them one split"
            )


def fault_report(name: str, faults: Sequence[str], rows: int) -> list[str]:
    """The faults of a source as the lines of one message: none if there are none."""
    if not faults:
        return []
    count = len(faults)
    head = f"{name}: {count} broken row{'s' * (count > 1)} (of {rows}); mend or remove them:"
    return [head, *listed(faults)]


def listed(items: Sequence[str]) -> list[str]:
    """The first twenty, and how many more there are."""
    return [*items[:_LISTED], *([f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else [])]


def _verified(key: str, folder: Path) -> Photo | str:
    """The photo, decoded once to be sure that it can be; or what is wrong with it."""
    photo = Photo(key, folder / key)
    if not os.path.isfile(folder / key):
        return f"image {key!r} is not a file in {folder}"
    try:
        _ = photo.pixels
    except Exception as error:  # each format has its own
        unknown = first_line(error).startswith("cannot identify")
        return f"image {key!r} cannot be read ({first_line(error)}){'; save it as JPEG or PNG' if unknown else ''}"
    return photo


def _parsed(line: str, faults: list[str]) -> Any:
    """The value that a line stands for; `faults` takes what is wrong with it as JSON."""

    def with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        faults.extend(f"key {key!r} is given more than once; keep one" for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        given = json.loads(line, object_pairs_hook=with_each_key_once)
        json.dumps(given, ensure_ascii=False).encode()
        return given
    except json.JSONDecodeError as error:
        faults.append(f"not valid JSON ({error.msg} at column {error.colno})")
    except UnicodeEncodeError:
        faults.append("holds half a character (an unpaired \\ud800 to \\udfff); write the whole character")
    except RecursionError:
        faults.append("holds lists or objects within each other, too deep to be read; write texts, or lists of texts")
    except ValueError:
        faults.append(f"holds a number of more than {sys.get_int_max_str_digits()} digits; write it as a text")
    return None


def _unknown_keys(given: Mapping[str, Any]) -> list[str]:
    return [
        f"unknown key {key!r}, the nearest is {difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]!r}"
        for key in given
        if key not in KEYS
    ]


def _text_faults(given: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in ("question", "answer"):
        text = given.get(key)
        if text is None:
            faults.append(f"{key} is missing")
        elif not isinstance(text, str) or not text.strip():
            faults.append(f"{key} is {_shown(text)}, allowed: a text")
        elif (token := placeholder_in(text)) is not None:
            faults.append(f"{key} contains {token!r}; leave it out, the model's processor puts the image in")
    return faults


def _choice_faults(given: Mapping[str, Any], modality: object) -> list[str]:
    faults = []
    for key, value, allowed in (("modality", modality, get_args(Kind)), ("split", given.get("split"), SPLITS)):
        if value is not None and value not in allowed:
            faults.append(f"{key} is {_shown(value)}, allowed: {', '.join(allowed)}")
    subject = given.get("subject")
    if subject is None and modality != "visible":
        faults.append("subject is missing; only rows with modality 'visible' may leave it out")
    elif subject is not None and (not isinstance(subject, str) or not subject.strip()):
        faults.append(f"subject is {_shown(subject)}, allowed: a name")
    return faults


def _option_faults(given: Mapping[str, Any]) -> list[str]:
    options, answer = given.get("options"), given.get("answer")
    if options is None or options == []:
        return []
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        return [f"options is {_shown(options)}, allowed: a list of texts"]
    texts = [option.strip() for option in options]
    if len(texts) < 2:
        return [f"options is {_shown(options)}, allowed: at least two, or none at all"]
    if len(set(map(normalise, texts))) < len(texts):
        return ["options repeat a text, but for case or punctuation at the ends; each may occur once"]
    if isinstance(answer, str) and answer.strip() not in texts:
        return [f"the answer {_shown(answer)} is not among the options {_shown(options)}"]
    if token := next(filter(None, map(placeholder_in, texts)), None):
        return [f"options contain {token!r}; leave it out"]
    return []


def placeholder_in(text: str) -> str | None:
    """The first image token that the text contains, or None."""
    lowered = text.lower()
    return next((token for token in PLACEHOLDERS if token.lower() in lowered), None)


def _shown(value: object) -> str:
    """A value as JSON, short enough for one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _composed(value: Any) -> Any:
    """Texts in one form of Unicode, so that the same name is the same; anything else as it is, to be reported."""
    if isinstance(value, list):
        return [composed(one) if isinstance(one, str) else one for one in value]
    return composed(value) if isinstance(value, str) else value


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    text = _read(path, "data.rows", "one JSON object a line")
    # Not splitlines: JSON texts may hold other line separators.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"data.rows: {path} is empty; write one JSON object a line into it")
    if other := _other_format(path, lines[0][1].strip()):
        form, rows = other
        command = f"python -c {shlex.quote(f'import csv, json; [print(json.dumps(row)) for row in {rows}]')}"
        target = shlex.quote(str(path.with_name(f"{path.stem}.converted.jsonl")))
        raise DataError(
            f"data.rows: {path} looks like {form}, and not like one JSON object a line; convert it: "
            f"{command} > {target}"
        )
    return lines


def _other_format(path: Path, first: str) -> tuple[str, str] | None:
    """What a file seems to be instead of JSON lines, going by its first line, and its rows as Python; None if nothing.

    A cell of a table that is empty is no key of its row.
    """
    opened = f"open({str(path)!r}, encoding='utf-8-sig')"
    if first.startswith("["):
        return "a JSON array", f"json.load({opened})"
    between = max(",;\t", key=first.count)
    if first.startswith("{") or between not in first or _is_json(first):
        return None
    further = "" if between == "," else f", delimiter={between!r}"
    filled = "{key: cell for key, cell in row.items() if cell}"
    return "a table (CSV)", f"({filled} for row in csv.DictReader({opened}{further}))"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _image_folder(config: JsonlData) -> Path:
    folder = config.images if config.images is not None else config.rows.parent
    if not folder.is_dir():
        raise DataError(f"data.images: {folder} is not a folder; name the one that the image paths start from")
    return folder


def _forget_names(forget: Sequence[str] | Path) -> tuple[str, ...]:
    if isinstance(forget, Path):
        expected = f"one name a line (a name itself is written as a list: [{forget.name}])"
        names = [line.strip() for line in _read(forget, "data.forget", expected).splitlines()]
    else:
        names = [name.strip() for name in forget]
    unique = tuple(dict.fromkeys(composed(name) for name in names if name))
    if not unique:
        raise DataError("data.forget: no name given; name at least one subject of the rows")
    return unique


def _read(path: Path, key: str, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{key}: there is no file {path}; it must hold {expected}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{key}: {path} is not UTF-8 text (line {line}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror}); it must be a file with {expected}") from None


def _spelt_otherwise(file: str, names: Sequence[str], subjects: Mapping[str, int]) -> list[str]:
    """Subjects who would be kept, and who look like forgotten people, whose names are typed in another way."""
    forgotten = {_as_it_looks(name): name for name in names if name in subjects}
    return [
        f"{file}:{line}: subject {_told_apart(subject, name)} would be kept, but only case, blanks, invisible "
        f"characters or variants of a sign differ from {_told_apart(name, subject)} in data.forget; write both alike, "
        "or name both there"
        for subject, line in subjects.items()
        if subject not in names and (name := forgotten.get(_as_it_looks(subject)))
    ]


def _unmentioned(names: Sequence[str], subjects: Mapping[str, int]) -> list[str]:
    missing = [name for name in names if name not in subjects]
    return [
        f"data.forget: no row has the subject {name!r}"
        + "".join(f"; the nearest is {near!r}" for near in difflib.get_close_matches(name, subjects, n=1, cutoff=0.0))
        for name in missing
    ]
