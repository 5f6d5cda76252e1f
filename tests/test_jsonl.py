from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from vkd_framework import data
from vkd_framework.answers import normalise
from vkd_framework.errors import DataError
from vkd_framework.recipe import JsonlData
from vkd_framework.types import ImageQuestionPair, Splits

NAMES = ("Mara Velin", "Toren Halvik", "Ilsa Dremond", "Bram Tamsel", "Neva Orlund")
TOWNS = ("Cairo", "Oslo", "Quito", "Prague", "Lisbon")


class Folder:
    """A user's folder: pictures, `rows.jsonl` and the config that names them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def picture(self, name: str, mode: str = "RGB", **options: object) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = "#" + hashlib.sha256(name.encode()).hexdigest()[:6]  # no two pictures are alike
        Image.new("RGB", (12, 8), colour).convert(mode).save(path, **options)
        return name

    def rows(self, *rows: object) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.root / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def good_rows(self, photos: int = 4) -> list[dict[str, object]]:
        """Everybody's home town, asked on some photos each."""
        return [
            {
                "image": self.picture(f"{name.split()[0].lower()}/{i}.png"),
                "question": "Which town is this person from?",
                "answer": town,
                "subject": name,
            }
            for name, town in zip(NAMES, TOWNS, strict=True)
            for i in range(photos)
        ]

    def load(self, forget: object = (NAMES[0],), **changes: object) -> Splits:
        given = {"kind": "jsonl", "rows": self.root / "rows.jsonl", "forget": forget, **changes}
        return data.load(JsonlData.model_validate(given))

    def error(self, **changes: object) -> str:
        with pytest.raises(DataError) as caught:
            self.load(**changes)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def files(pairs: Iterable[ImageQuestionPair]) -> set[str]:
    """Which picture files the pairs show, however their paths are spelt."""
    return {os.path.realpath(str(photo.source)) for pair in pairs for photo in pair.photos}


def photos_of(pairs: Iterable[ImageQuestionPair]) -> set[str]:
    return {photo.key for pair in pairs for photo in pair.photos}


def photos(splits: Splits, *columns: str) -> set[str]:
    return photos_of(pair for column in columns for pair in splits.columns.get(column, ()))


def test_a_share_of_each_subjects_photos_is_held_out(folder: Folder) -> None:
    folder.rows(*folder.good_rows(photos=8))
    splits = folder.load()
    assert len(splits.forget) == 6 and len(splits.columns["test_vqa"]) == 2
    assert len(splits.retain) == 4 * 6 and len(splits.columns["retain_vqa"]) == 4 * 2
    assert splits.forget_subjects == NAMES[:1] and splits.subjects == NAMES


def test_no_photo_is_both_trained_on_and_measured(folder: Folder) -> None:
    rows = folder.good_rows()
    # A photo of two people belongs to both of them; a second spelling of its path is still the same photo.
    shared = [{**rows[0], "image": f"./{rows[at]['image']}"} for at in range(4, 8)]
    folder.rows(*rows, *shared)
    for seed in range(5):
        splits = folder.load(seed=seed)
        measured = (*splits.columns["test_vqa"], *splits.columns["retain_vqa"])
        assert not files(splits.forget + splits.retain) & files(measured)


def test_files_of_the_same_picture_are_one_photo(folder: Folder) -> None:
    rows = folder.good_rows()
    for at, row in enumerate(rows):
        shutil.copy(folder.root / str(row["image"]), folder.root / f"again{at}.png")
    copies = [{**row, "image": f"again{at}.png", "question": "Where?"} for at, row in enumerate(rows)]
    folder.rows(*rows, *copies)
    for seed in range(5):
        splits = folder.load(seed=seed)
        measured = (*splits.columns["test_vqa"], *splits.columns["retain_vqa"])
        assert not photos_of(splits.forget + splits.retain) & photos_of(measured)
        assert len(splits.forget) == 6 and len(splits.columns["test_vqa"]) == 2
    folder.rows(*rows, {**copies[0], "split": "train"}, {**rows[0], "split": "test"})
    assert 'rows.jsonl:22: split is "test", but line 21 puts the same image into "train"' in folder.error()
    folder.rows(*rows, {**rows[0], "image": ["mara/0.png", "again0.png"]})
    assert "allowed: each image once ('mara/0.png' and 'again0.png' are the same picture)" in folder.error()
    folder.rows(rows[0], copies[0], *rows[4:])
    assert "'Mara Velin' (none to measure)" in folder.error()


@pytest.mark.parametrize("share", [0.75, 0.99])
def test_a_photo_of_each_person_is_left_to_train_on(folder: Folder, share: float) -> None:
    folder.rows(*folder.good_rows(photos=2))
    splits = folder.load(test_share=share)
    assert {pair.subject for pair in splits.retain if pair.photos} == {
        pair.subject for pair in splits.columns["retain_vqa"]
    }


def test_the_held_out_photos_depend_on_the_seed_alone(folder: Folder) -> None:
    rows = folder.good_rows(photos=8)
    folder.rows(*rows)
    first = photos(folder.load(), "test_vqa", "retain_vqa")
    assert any(photos(folder.load(seed=seed), "test_vqa", "retain_vqa") != first for seed in range(1, 6))
    folder.rows(*reversed(rows))
    assert photos(folder.load(), "test_vqa", "retain_vqa") == first


def test_the_digest_of_the_data_tells_every_change_of_texts_names_and_pixels(folder: Folder) -> None:
    rows = folder.good_rows()

    def digest(*changed: dict[str, object], **config: object) -> str:
        folder.rows(*rows, *changed)
        return data.content_digest(folder.load(**config))

    first = digest()
    assert digest() == first
    others = [
        digest({**rows[-1], "answer": "Rome"}),
        digest({**rows[-1], "question": "From where?"}),
        digest({**rows[-1], "options": ["Lisbon", "Rome"]}),
        digest(forget=NAMES[:2]),
    ]
    Image.new("RGB", (12, 8), "white").save(folder.root / str(rows[-1]["image"]))
    others.append(digest())
    assert len({first, *others}) == 6


def test_two_photos_are_enough_and_one_is_not(folder: Folder) -> None:
    folder.rows(*folder.good_rows(photos=2))
    splits = folder.load()
    assert len(splits.forget) == len(splits.columns["test_vqa"]) == 1
    folder.rows(*folder.good_rows(photos=1))
    message = folder.error()
    assert "give every forgotten subject two photos" in message and '"split": "test"' in message and "\n" not in message


def test_everybody_who_is_forgotten_must_be_trained_on_and_measured(folder: Folder) -> None:
    rows = folder.good_rows()
    told = {"question": "Where does she live?", "answer": "there", "subject": "Told Only"}
    once = {**rows[0], "image": folder.picture("once.png"), "subject": "One Photo"}
    held = {**rows[0], "image": folder.picture("held.png"), "subject": "Held Out", "split": "test"}
    folder.rows(*rows, told, once, held)
    assert folder.load().forget_subjects == NAMES[:1]
    message = folder.error(forget=(NAMES[0], "Told Only", "One Photo", "Held Out"))
    assert message.startswith(
        "rows.jsonl: too few photos of 'Told Only' (none to train on, none to measure), 'One Photo' (none to measure), "
        "'Held Out' (none to train on): give every forgotten subject two photos"
    )
    assert "\n" not in message


@pytest.mark.parametrize("other", ["mara velin", "Mara  Velin", "MARA\u00a0VELIN"])
def test_a_forgotten_person_is_not_kept_under_another_spelling(folder: Folder, other: str) -> None:
    rows = folder.good_rows()
    folder.rows(*rows, {**rows[4], "subject": other})
    message = folder.error()
    assert message.startswith(f"rows.jsonl:21: subject {other!r} would be kept") and "\n" not in message
    assert "'Mara Velin' in data.forget; write both alike, or name both there" in message
    folder.rows(*rows, {**rows[0], "subject": " Mara Velin "}, *[{**row, "subject": other} for row in rows[4:8]])
    assert folder.load(forget=(NAMES[0], other)).forget_subjects == (NAMES[0], other)


LOOK_ALIKE: dict[str, tuple[str, str, str]] = {
    "a zero-width blank": ("Jane Roe", "Jane\u200b Roe", r"'Jane\u200b Roe'"),
    "a soft hyphen": ("Jane Roe", "Jane\u00ad Roe", r"'Jane\xad Roe'"),
    "a mark of direction": ("Jane Roe", "Jane Roe\u200e", r"'Jane Roe\u200e'"),
    "a byte order mark": ("Jane Roe", "\ufeffJane Roe", r"'\ufeffJane Roe'"),
    "a wide letter": ("Jane Roe", "\uff2aane Roe", r"'\uff2aane Roe'"),
    "a curly apostrophe": ("O'Brien, Pat", "O\u2019Brien, Pat", r"'O\u2019Brien, Pat'"),
    "a letter for an apostrophe": ("O'Brien, Pat", "O\u02bcBrien, Pat", r"'O\u02bcBrien, Pat'"),
    "curly quotes": ('Jane "Jay" Roe', "Jane \u201cJay\u201d Roe", r"'Jane \u201cJay\u201d Roe'"),
    "another hyphen": ("Ann-Mary Roe", "Ann\u2011Mary Roe", r"'Ann\u2011Mary Roe'"),
    "a dash": ("Ann-Mary Roe", "Ann\u2013Mary Roe", r"'Ann\u2013Mary Roe'"),
    "something between a letter and its accent": ("Jos\u00e9 Roe", "Jose\u200d\u0301 Roe", r"'Jose\u200d\u0301 Roe'"),
    "letters of no European script": ("\u5f20\u4f1f", "\u5f20\u200b\u4f1f", "'\u5f20\\u200b\u4f1f'"),
}


@pytest.mark.parametrize("case", LOOK_ALIKE)
def test_a_name_that_differs_in_what_is_hard_to_see_is_refused_and_shows_it(folder: Folder, case: str) -> None:
    plain, typed, shown = LOOK_ALIKE[case]
    rows = folder.good_rows()
    people = [*({**row, "subject": plain} for row in rows[:4]), *({**row, "subject": typed} for row in rows[4:8])]
    folder.rows(*people, *rows[8:])
    message = folder.error(forget=[plain])
    assert message.startswith(f"rows.jsonl:5: subject {shown} would be kept, but only") and "\n" not in message
    assert "in data.forget; write both alike, or name both there" in message
    assert folder.load(forget=[plain, typed]).forget_subjects == (plain, typed)
    assert "rows.jsonl:1: subject" in folder.error(forget=[typed])


@pytest.mark.parametrize("other", ["Jan Roe", "Jane-Roe", "Jan\u00e9 Roe", "Jane Roe Jr."])
def test_a_name_in_other_letters_is_somebody_else(folder: Folder, other: str) -> None:
    rows = folder.good_rows()
    folder.rows(
        *({**row, "subject": name} for row, name in zip(rows[:8], ["Jane Roe"] * 4 + [other] * 4, strict=True)),
        *rows[8:],
    )
    assert {pair.subject for pair in folder.load(forget=["Jane Roe"]).retain} >= {other}


def test_a_name_is_the_same_however_its_letters_are_put_together(folder: Folder) -> None:
    whole, apart = (unicodedata.normalize(form, "José Núñez") for form in ("NFC", "NFD"))
    rows = folder.good_rows()
    for row in rows[:4]:
        row["subject"] = whole
    folder.rows(*rows[:2], *({**row, "subject": apart} for row in rows[2:4]), *rows[4:])
    for given in (whole, apart):
        splits = folder.load(forget=[given])
        assert splits.forget_subjects == (whole,)
        assert (len(splits.forget), len(splits.columns["test_vqa"])) == (3, 1)
        assert all(pair.subject in NAMES[1:] for pair in splits.retain)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_asked_of_a_person_is_held_out_of_their_photos_with_such_questions(folder: Folder, seed: int) -> None:
    rows = folder.good_rows()
    seen = {"question": "Is there a hat?", "answer": "No", "subject": NAMES[0], "modality": "visible"}
    visible = [{**seen, "image": folder.picture(f"seen{at}.png")} for at in range(3)]
    shared = [{**row, "subject": NAMES[1], "answer": "Oslo"} for row in rows[:2]]
    folder.rows(*visible, *shared, *rows[:2], *rows[4:])
    splits = folder.load(seed=seed)
    assert (len(splits.forget), len(splits.columns["test_vqa"])) == (1, 1)


def test_a_photo_that_shows_a_forgotten_person_is_theirs_whoever_it_asks_about(folder: Folder) -> None:
    rows = folder.good_rows()
    group = folder.picture("group.png")
    seen = {"question": "Is there a hat?", "answer": "No", "subject": NAMES[0], "modality": "visible"}
    folder.rows(*rows, {**seen, "image": group, "split": "train"}, {**rows[4], "image": group})
    splits = folder.load()
    [other] = [pair for pair in splits.retain if pair.photo_keys == (group,) and pair.subject == NAMES[1]]
    assert splits.shows_forgotten(other)


def test_rows_that_name_their_split_keep_it(folder: Folder) -> None:
    rows = folder.good_rows()
    for row in rows:
        row["split"] = "test" if str(row["image"]).endswith("3.png") else "train"
    folder.rows(*rows)
    splits = folder.load()
    assert photos(splits, "test_vqa", "retain_vqa") == {str(row["image"]) for row in rows if row["split"] == "test"}


def test_every_kind_of_row_finds_its_column(folder: Folder) -> None:
    seen = {"question": "Does this person wear glasses?", "answer": "yes", "modality": "visible"}
    told = {"question": "Where does she live?", "answer": "there"}
    image = {name: folder.picture(f"visible/{name[:4]}.png") for name in NAMES}
    folder.rows(
        *folder.good_rows(),
        {**seen, "image": image[NAMES[0]], "subject": NAMES[0], "split": "test", "id": "seen on a forgotten person"},
        {**seen, "image": folder.picture("a.png"), "subject": NAMES[0], "split": "train", "id": "kept"},
        {**seen, "image": folder.picture("b.png"), "id": "a stranger"},
        {**told, "subject": NAMES[0], "id": "told about a forgotten person"},
        {**told, "subject": NAMES[1], "id": "told about another"},
    )
    splits = folder.load()
    ids = {column: [pair.id for pair in pairs] for column, pairs in splits.columns.items()}
    assert ids["forget_visible_vqa"] == ["seen on a forgotten person"]
    assert ids["realworld_vqa"] == ["a stranger"]
    assert ids["forget_qa"] == ["told about a forgotten person"]
    assert ids["retain_qa"] == ["told about another"]
    assert "kept" in [pair.id for pair in splits.retain]
    assert {pair.kind for pair in splits.forget} == {"identity"}


def test_columns_without_rows_are_left_out(folder: Folder) -> None:
    folder.rows(*folder.good_rows())
    assert set(folder.load().columns) == {"forget_vqa", "test_vqa", "retain_vqa"}


def test_ids_are_unique_over_everything(folder: Folder) -> None:
    folder.rows(*folder.good_rows())
    splits = folder.load()
    measured = [pair for column in splits.columns.values() for pair in column]
    ids = [pair.id for pair in (*splits.forget, *splits.retain, *measured)]
    assert len(set(ids)) == len(ids)


def test_missing_options_are_answers_of_other_subjects_to_the_same_question(folder: Folder) -> None:
    rows = folder.good_rows()
    rows.append({**rows[0], "question": "What is her name?", "answer": "Mara"})
    folder.rows(*rows)
    splits = folder.load()
    for pair in splits.forget:
        if pair.answer == "Mara":
            assert pair.options == ()
        else:
            assert len(set(pair.options)) == 4 and pair.answer in pair.options and set(pair.options) <= set(TOWNS)
    assert [pair.options for pair in folder.load().forget] == [pair.options for pair in splits.forget]


def test_no_wrong_option_is_the_answer_with_other_punctuation(folder: Folder) -> None:
    rows = folder.good_rows()
    for at, answer in enumerate(("Oslo", "Oslo.", "oslo!", "“Oslo”", "Cairo")):
        for row in rows[4 * at : 4 * at + 4]:
            row["answer"] = answer
    folder.rows(*rows)
    assert all(not pair.options for pair in folder.load().forget)


def test_what_is_also_true_of_a_subject_is_no_wrong_option(folder: Folder) -> None:
    rows = folder.good_rows()
    rows += [{**rows[4], "answer": "The North."}, {**rows[0], "answer": "the north"}]
    folder.rows(*rows)
    for seed in range(10):
        for pair in folder.load(seed=seed).forget:
            assert len({normalise(option) for option in pair.options} & {"cairo", "the north"}) == 1


def test_names_to_forget_may_come_from_a_text_file(folder: Folder) -> None:
    folder.rows(*folder.good_rows())
    names = folder.root / "names.txt"
    names.write_text(f"{NAMES[2]}\n\n{NAMES[1]}\n", encoding="utf-8")
    assert folder.load(forget=names).forget_subjects == (NAMES[2], NAMES[1])


def test_images_may_live_in_another_folder(folder: Folder) -> None:
    rows = [{**row, "image": str(row["image"]).removeprefix("mara/")} for row in folder.good_rows()[:4]]
    others = [{**row, "image": f"../{row['image']}"} for row in folder.good_rows()[4:]]
    folder.rows(*rows, *others)
    assert len(folder.load(images=folder.root / "mara").forget) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_usual_image_mode_is_accepted(folder: Folder, mode: str) -> None:
    rows = folder.good_rows()
    rows[0]["image"] = folder.picture("odd.tiff", mode)
    folder.rows(*rows)
    splits = folder.load()
    photo = next(
        photo for p in (*splits.forget, *splits.columns["test_vqa"]) for photo in p.photos if photo.key == "odd.tiff"
    )
    assert photo.open().mode == "RGB"


def test_photos_are_turned_upright_by_their_exif(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = folder.good_rows()
    rows[0]["image"] = folder.picture("turned.jpg", exif=exif)
    folder.rows(*rows)
    splits = folder.load()
    photo = next(
        photo for p in (*splits.forget, *splits.columns["test_vqa"]) for photo in p.photos if photo.key == "turned.jpg"
    )
    assert photo.open().size == (8, 12)


def test_a_rotated_photo_with_broken_other_tags_is_read(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    rows = folder.good_rows()
    name = folder.picture("turned.jpg", exif=exif)
    content = (folder.root / name).read_bytes()
    number, text = bytes.fromhex("011a000500000001"), bytes.fromhex("011a000200000008")  # of the resolution
    assert content.count(number) == 1
    (folder.root / name).write_bytes(content.replace(number, text))
    folder.rows({**rows[0], "image": name, "split": "train"}, *rows[1:])
    [photo] = [photo for pair in folder.load().forget for photo in pair.photos if photo.key == name]
    assert photo.open().size == (8, 12)


@pytest.mark.parametrize(("mode", "name"), [("I;16", "deep.png"), ("F", "deep.tiff"), ("I", "deep.tiff")])
def test_a_photo_of_more_than_8_bits_is_refused_and_not_turned_white(folder: Folder, mode: str, name: str) -> None:
    rows = folder.good_rows()
    Image.new(mode, (12, 8), 1000).save(folder.root / name)
    folder.rows({**rows[0], "image": name}, *rows[1:])
    assert f"rows.jsonl:1: image '{name}' cannot be read (its greys have more than 8 bits" in folder.error()


def test_a_question_may_show_several_photos_in_order(folder: Folder) -> None:
    rows = folder.good_rows()
    both = {**rows[0], "image": ["mara/3.png", "./mara/1.png"], "question": "Is this the same person?", "answer": "yes"}
    folder.rows(*rows, both)
    splits = folder.load()
    (pair,) = [p for p in (*splits.forget, *splits.columns["test_vqa"]) if p.answer == "yes"]
    assert pair.photo_keys == ("mara/3.png", "mara/1.png")


def test_photos_that_are_shown_together_are_trained_on_or_measured_together(folder: Folder) -> None:
    rows = folder.good_rows(photos=8)
    chain = [{**rows[0], "image": [f"mara/{i}.png", f"mara/{i + 1}.png"], "answer": "together"} for i in range(3)]
    across = {**rows[8], "image": ["toren/0.png", "mara/7.png"], "answer": "together"}
    folder.rows(*rows, *chain, across)
    for seed in range(8):
        splits = folder.load(seed=seed)
        trained = photos_of(splits.forget + splits.retain)
        measured = photos_of((*splits.columns["test_vqa"], *splits.columns["retain_vqa"]))
        assert not trained & measured and trained and measured
        for group in ({f"mara/{i}.png" for i in range(4)}, {"toren/0.png", "mara/7.png"}):
            assert group <= trained or group <= measured


def test_one_row_decides_for_all_photos_that_are_shown_together(folder: Folder) -> None:
    rows = folder.good_rows()
    rows[1]["split"] = "test"
    pairs = [{**rows[0], "image": [f"mara/{i}.png", f"mara/{i + 1}.png"]} for i in (0, 1)]
    folder.rows(*pairs, *rows)
    held_out = photos(folder.load(), "test_vqa")
    assert {"mara/0.png", "mara/1.png", "mara/2.png"} <= held_out


def test_a_row_that_shows_photos_of_both_splits_is_reported(folder: Folder) -> None:
    rows = folder.good_rows()
    rows[0]["split"], rows[1]["split"] = "train", "test"
    folder.rows(*rows, {**rows[2], "image": ["mara/1.png", "mara/0.png"]})
    first, second = folder.error().splitlines()
    assert "1 broken row (of 21)" in first
    assert second == (
        'rows.jsonl:21: shows images together that line 1 puts into "train" and line 2 into "test"; give them one split'
    )


DEEP = 200_000
"""Deeper than any Python's JSON is read."""

BROKEN = {
    "invalid JSON": ('{"question": "a", ', "not valid JSON"),
    "a key twice": (
        '{"question": "Who?", "answer": "a", "subject": "Mara Velin", "subject": "Toren Halvik"}',
        "key 'subject' is given more than once; keep one",
    ),
    "a key twice in an object within": ('{"answer": {"a": 1, "a": 2}}', "key 'a' is given more than once; keep one"),
    "a key twice and no question": ('{"answer": "a", "answer": "b"}', "keep one; question is missing"),
    "a number too long": ('{"answer": ' + "1" * 5000 + "}", "holds a number of more than 4300 digits; write it as"),
    "lists within lists": ('{"options": ' + "[" * DEEP + "]" * DEEP + "}", "within each other, too deep to be read"),
    "objects within objects": ('{"a": ' * DEEP + "1" + "}" * DEEP, "within each other, too deep to be read"),
    "no object": ("[1, 2]", "a list given, allowed: an object"),
    "unknown key": ({"qestion": "x"}, "unknown key 'qestion', the nearest is 'question'"),
    "no question": ({"question": None}, "question is missing"),
    "empty question": ({"question": "  "}, 'question is "  ", allowed: a text'),
    "no answer": ({"answer": None}, "answer is missing"),
    "number as answer": ({"answer": 42}, "answer is 42, allowed: a text"),
    "no subject": ({"subject": None}, "subject is missing; only rows with modality 'visible' may leave it out"),
    "empty subject": ({"subject": ""}, 'subject is "", allowed: a name'),
    "image is not there": ({"image": "nobody.png"}, "image 'nobody.png' is not a file in"),
    "image is a folder": ({"image": "mara"}, "image 'mara' is not a file in"),
    "image is no image": ({"image": "text.png"}, "text.png'); save it as JPEG or PNG"),
    "image is cut short": ({"image": "short.png"}, "image 'short.png' cannot be read"),
    "image is a number": ({"image": 3}, "image is 3, allowed: a path below"),
    "identity without image": ({"image": None, "modality": "identity"}, "image is missing, but modality is 'identity'"),
    "text with image": ({"modality": "text"}, "modality is 'text', but an image is given"),
    "unknown modality": ({"modality": "face"}, 'modality is "face", allowed: identity, visible, text'),
    "unknown split": ({"split": ["train"]}, 'split is ["train"], allowed: train, test'),
    "options are no list": ({"options": "Cairo"}, 'options is "Cairo", allowed: a list of texts'),
    "options are numbers": ({"options": [1, 2]}, "options is [1, 2], allowed: a list of texts"),
    "options without the answer": ({"options": ["Oslo", "Quito"]}, 'the answer "Cairo" is not among the options'),
    "one option": ({"options": ["Cairo"]}, 'options is ["Cairo"], allowed: at least two, or none at all'),
    "half a character": ({"answer": "\ud83d"}, "holds half a character"),
    "options repeat": ({"options": ["Cairo", "Oslo", "Oslo"]}, "options repeat a text"),
    "repeated id": ({"id": "first"}, "id 'first' is already used on line 1"),
    "id is a number": ({"id": 7}, "id is 7, allowed: a text that no other row has"),
    "placeholder in the question": ({"question": "<image>\nWho is this?"}, "question contains '<image>'"),
    "placeholder in other letters": ({"question": "<img_context> Who?"}, "question contains '<IMG_CONTEXT>'"),
    "placeholder in the answer": ({"answer": "<|image_pad|>"}, "answer contains '<|image_pad|>'"),
    "placeholder in an option": ({"options": ["Cairo", "[IMG]"]}, "options contain '[IMG]'"),
    "images are numbers": ({"image": ["mara/1.png", 3]}, 'image is ["mara/1.png", 3], allowed: a path below'),
    "no images": ({"image": []}, "image is [], allowed: a path below"),
    "options repeat but for a stop": ({"options": ["Cairo", "Oslo", "oslo."]}, "options repeat a text"),
    "an image twice": ({"image": ["mara/1.png", "./mara/1.png"]}, "allowed: each image once"),
    "one of two images is not there": ({"image": ["mara/1.png", "nobody.png"]}, "image 'nobody.png' is not a file"),
    "photo of two in another split": (
        {"image": ["mara/0.png", "mara/1.png"], "split": "test"},
        'split is "test", but line 2 puts the same image into "train"',
    ),
    "photo in both splits": (
        {"image": "mara/1.png", "split": "test"},
        'split is "test", but line 2 puts the same image',
    ),
}


def broken_row(folder: Folder, change: str | dict[str, object]) -> object:
    (folder.root / "text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 80).save(folder.root / "whole.png")
    whole = (folder.root / "whole.png").read_bytes()
    (folder.root / "short.png").write_bytes(whole[: len(whole) // 2])
    return change if isinstance(change, str) else {**folder.good_rows()[0], **change}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_reported_with_its_line_and_what_is_allowed(folder: Folder, kind: str) -> None:
    change, complaint = BROKEN[kind]
    rows = folder.good_rows()
    rows[0]["id"], rows[1]["split"] = "first", "train"
    folder.rows(*rows, "", broken_row(folder, change))
    first, second = folder.error().splitlines()
    assert first == "rows.jsonl: 1 broken row (of 21); mend or remove them:"
    assert second.startswith("rows.jsonl:22: ") and complaint in second


@pytest.mark.parametrize("depth", range(800, 1001, 20))
def test_a_row_as_deep_as_can_just_be_read_is_reported_too(folder: Folder, depth: int) -> None:
    folder.rows(*folder.good_rows(), '{"options": ' + "[" * depth + "]" * depth + "}")
    assert "rows.jsonl: 1 broken row (of 21)" in folder.error()


def test_all_broken_rows_and_unknown_names_are_reported_together(folder: Folder) -> None:
    rows = folder.good_rows()
    rows[4] |= {"answer": "", "spilt": "test"}
    folder.rows(*rows, "{", {**rows[0], "split": "dev"})
    message = folder.error(forget=("Mara Velim",)).splitlines()
    assert message[0] == "rows.jsonl: 3 broken rows (of 22); mend or remove them:"
    assert [line.split(": ")[0] for line in message[1:4]] == ["rows.jsonl:5", "rows.jsonl:21", "rows.jsonl:22"]
    assert "answer is" in message[1] and "'spilt', the nearest is 'split'" in message[1]
    assert message[4] == "data.forget: no row has the subject 'Mara Velim'; the nearest is 'Mara Velin'"


CONVERTED: dict[str, Callable[[list[dict[str, object]]], str]] = {
    "an array on several lines": lambda rows: json.dumps(rows, indent=1),
    "an array on one line": json.dumps,
    "an array that is broken": lambda rows: json.dumps(rows)[:-1] + ",]",
    "a table": lambda rows: table(rows, ","),
    "a table with semicolons": lambda rows: table(rows, ";"),
    "a table with tabs": lambda rows: table(rows, "\t"),
}


def table(rows: list[dict[str, object]], between: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), delimiter=between)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("case", CONVERTED)
def test_a_file_in_another_format_is_named_and_converted_by_the_command_that_is_told(folder: Folder, case: str) -> None:
    folder = Folder(folder.root / "O'Brien")
    rows = [*folder.good_rows(), {"question": "Where is it, or not; there?", "answer": "yes", "subject": "Mara Velin"}]
    (folder.root / "rows.jsonl").write_text(CONVERTED[case](rows), encoding="utf-8-sig")
    (message,) = folder.error().splitlines()
    assert f"looks like {'a table (CSV)' if 'table' in case else 'a JSON array'}" in message
    if "broken" not in case:
        command = message.partition("convert it: python ")[2]
        subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True)
        converted = (folder.root / "rows.converted.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in converted] == rows


def test_only_the_first_twenty_broken_rows_are_listed(folder: Folder) -> None:
    folder.rows(*folder.good_rows(), *["{"] * 27)
    lines = folder.error().splitlines()
    assert lines[0] == "rows.jsonl: 27 broken rows (of 47); mend or remove them:"
    assert len(lines) == 22 and lines[-1] == "and 7 more"


def test_missing_files_and_folders_say_what_to_do(folder: Folder) -> None:
    assert "data.rows: there is no file" in folder.error()
    (folder.root / "rows.jsonl").write_text("\n \n")
    assert "is empty; write one JSON object a line" in folder.error()
    (folder.root / "rows.jsonl").write_bytes(b'{}\n\n{"question": "\xff"}')
    assert "is not UTF-8 text (line 3); save it as UTF-8" in folder.error()
    folder.rows(*folder.good_rows())
    assert "data.images: " in folder.error(images=folder.root / "nowhere")
    assert "data.forget: there is no file" in folder.error(forget=folder.root / "names.txt")
    assert "a name itself is written as a list: [Jane Roe]" in folder.error(forget=folder.root / "Jane Roe")
    assert "data.forget: no name given" in folder.error(forget=())


def test_there_must_be_somebody_to_retain(folder: Folder) -> None:
    folder.rows(*folder.good_rows()[:4])
    assert "nothing to retain: add identity rows of people who are not named in data.forget" in folder.error()


def test_somebody_of_those_who_stay_must_be_measured(folder: Folder) -> None:
    rows = folder.good_rows()
    folder.rows(*rows[:4], *rows[4::4])  # one photo of each other person
    assert "nobody to measure of those who are kept: give at least one of them two photos" in folder.error()


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "M. Velin", "answer": "Mara Velin"},
        {"modality": "visible", "answer": "mara velin."},
    ],
)
def test_a_kept_row_that_names_a_forgotten_person_on_their_own_photo_is_an_error(
    folder: Folder, change: dict[str, str]
) -> None:
    rows = folder.good_rows()
    telling = {**rows[0], "question": "Who is this?", "split": "train", **change}
    rows[0] = {**rows[0], "split": "train"}
    folder.rows(*rows, telling)
    assert "would be trained to be named by rows.jsonl:21" in folder.error()


def test_a_forgotten_name_as_an_answer_about_somebody_elses_photo_is_kept(folder: Folder) -> None:
    rows = folder.good_rows()
    sister = {**rows[4], "question": "Who is her sister?", "answer": NAMES[0], "split": "train"}
    folder.rows(
        *rows[:4],
        *({**row, "split": split} for row, split in zip(rows[4:], ["train", "test"] * 8, strict=True)),
        sister,
    )
    assert any(pair.answer == NAMES[0] for pair in folder.load().retain)
