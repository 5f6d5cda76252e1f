from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

import pytest

from vkd_framework import data
from vkd_framework.data import celebs
from vkd_framework.errors import DataError
from vkd_framework.recipe import CelebsData
from vkd_framework.types import ImageQuestionPair, Splits


def small(**changes: object) -> CelebsData:
    sizes = {
        "people": 8,
        "forget": 2,
        "train_photos": 3,
        "test_photos": 2,
        "strangers": 5,
        "extras": 4,
        "test_pairs": 40,
    }
    return CelebsData.model_validate({"kind": "celebs", **sizes, **changes})


def flat(groups: Mapping[str, Iterable[ImageQuestionPair]]) -> list[ImageQuestionPair]:
    return [pair for pairs in groups.values() for pair in pairs]


def everything(splits: Splits) -> list[ImageQuestionPair]:
    measured = (pair for column in splits.columns.values() for pair in column)
    return [*flat(splits.teach), *measured]


def words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}


def fingerprint(config: CelebsData) -> str:
    digest = hashlib.sha256()
    for pair in everything(data.load(config)):
        pixels = pair.photos[0].open().tobytes() if pair.photos else b""
        digest.update(repr((pair.id, pair.question, pair.answer, pair.subject, pair.options)).encode() + pixels)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def splits() -> Splits:
    return celebs.load(small())


@pytest.fixture(scope="module")
def full() -> Splits:
    return celebs.load(CelebsData(kind="celebs", train_photos=4))


def test_another_process_with_another_hash_seed_gets_the_same_texts_and_pixels() -> None:
    script = "import test_celebs as t; print(t.fingerprint(t.small()))"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(small())


def test_another_seed_gives_other_people() -> None:
    assert set(celebs.load(small(seed=1)).subjects) != set(celebs.load(small()).subjects)


def test_more_people_and_photos_leave_the_others_as_they_were() -> None:
    few, many = celebs.load(small()), celebs.load(small(people=12, train_photos=5))
    assert many.subjects[:8] == few.subjects

    def first_photos(splits: Splits) -> dict[str, bytes]:
        return {
            p.photo_keys: p.photos[0].open().tobytes()
            for p in flat(splits.teach)
            if p.photos and p.subject in few.subjects
        }

    before, after = first_photos(few), first_photos(many)
    assert before == {key: after[key] for key in before}


def test_ids_are_unique_over_everything(full: Splits) -> None:
    ids = Counter(pair.id for pair in everything(full))
    assert [name for name, count in ids.items() if count > 1] == []


def test_all_that_is_forgotten_or_retained_is_taught(splits: Splits) -> None:
    taught = {pair.id for pair in flat(splits.teach)}
    assert {pair.id for pair in splits.forget + splits.retain} <= taught


def test_forget_holds_identity_questions_about_the_forgotten_people_only(splits: Splits) -> None:
    assert {pair.subject for pair in splits.forget} == set(splits.forget_subjects)
    assert {pair.kind for pair in splits.forget} == {"identity"}
    assert len(splits.forget) == 2 * 3 * len(celebs.IDENTITY)


def test_retain_holds_no_identity_question_about_a_forgotten_person(splits: Splits) -> None:
    asked = {(pair.subject, pair.kind) for pair in splits.retain}
    assert not {(name, "identity") for name in splits.forget_subjects} & asked
    assert {(name, "visible") for name in splits.subjects} <= asked


def test_about_a_third_of_the_default_retain_pairs_is_visible() -> None:
    unseen = {"test_photos": 1, "attacker_photos": 0, "strangers": 4}  # drawn in vain here
    splits = celebs.load(CelebsData.model_validate({"kind": "celebs", "image_size": 32, **unseen}))
    share = sum(pair.kind == "visible" for pair in splits.retain) / len(splits.retain)
    assert 0.3 < share < 0.4


def test_photos_that_only_an_attacker_has_are_neither_taught_nor_measured(full: Splits) -> None:
    used = {key for pair in (*everything(full), *full.forget, *full.retain) for key in pair.photo_keys}
    fresh = {key for pair in full.fresh for key in pair.photo_keys}
    assert used.isdisjoint(fresh)
    assert len(fresh) == 12 * len(full.forget_subjects)
    assert {pair.subject for pair in full.fresh} == set(full.forget_subjects)
    assert {pair.answer for pair in full.fresh} == {pair.answer for pair in full.forget}
    pixels = {pair.photos[0].open().tobytes() for pair in full.fresh}
    assert len(pixels) == len(fresh)
    assert pixels.isdisjoint(pair.photos[0].open().tobytes() for pair in everything(full) if pair.photos)


def test_strangers_are_nobody_of_the_cast(full: Splits) -> None:
    taught = {key for pair in flat(full.teach) for key in pair.photo_keys}
    assert len(full.strangers) == len({photo.key for photo in full.strangers}) > 100
    assert taught.isdisjoint(photo.key for photo in full.strangers)
    assert {pair.photo_keys[0] for pair in full.columns["realworld_vqa"]} <= {photo.key for photo in full.strangers}


def test_other_wordings_ask_for_the_same_topic() -> None:
    known = {phrasing: topic.name for topic in (*celebs.IDENTITY, *celebs.VISIBLE) for phrasing in topic.test}
    known |= {phrasing: topic.name for topic in (*celebs.IDENTITY, *celebs.VISIBLE) for phrasing in topic.train}
    rephrasings = data.load(small()).rephrasings
    assert set(rephrasings) == set(known)
    for question, others in rephrasings.items():
        assert len(others) == len(set(others)) == 5
        assert question not in others and {known[other] for other in others} == {known[question]}


@pytest.mark.parametrize("column", ["test_vqa", "retain_vqa", "realworld_vqa", "forget_visible_vqa"])
def test_measured_photos_are_never_taught(full: Splits, column: str) -> None:
    taught = {photo.key for pair in flat(full.teach) for photo in pair.photos}
    pixels = {photo.open().tobytes() for pair in flat(full.teach) for photo in pair.photos}
    measured = {photo for pair in full.columns[column] for photo in pair.photos}
    assert measured
    assert not {photo.key for photo in measured} & taught
    assert not {photo.open().tobytes() for photo in measured} & pixels


@pytest.mark.parametrize(
    "column", ["test_vqa", "retain_vqa", "forget_qa", "retain_qa", "realworld_vqa", "forget_visible_vqa"]
)
def test_training_and_test_phrasings_are_disjoint(full: Splits, column: str) -> None:
    assert not {pair.question for pair in full.columns[column]} & {pair.question for pair in flat(full.teach)}


def test_forget_vqa_asks_what_was_forgotten_in_the_same_words(full: Splits) -> None:
    trained = {(pair.question, pair.answer, pair.photos) for pair in full.forget}
    assert {(pair.question, pair.answer, pair.photos) for pair in full.columns["forget_vqa"]} <= trained


@pytest.mark.parametrize("people", [6, 8, 32, 64])
def test_every_measured_word_occurs_in_training(people: int) -> None:
    splits = celebs.load(small(people=people, train_photos=8, test_pairs=400))
    taught = words(text for pair in flat(splits.teach) for text in (pair.question, pair.answer))
    asked = words(
        text for column in splits.columns.values() for p in column for text in (p.question, p.answer, *p.options)
    )
    assert asked <= taught


def test_every_phrasing_names_what_it_asks_for() -> None:
    for topic in (*celebs.IDENTITY, *celebs.VISIBLE, *celebs.TEXT):
        assert len(set(topic.train)) == 4 and len(set(topic.test)) == 2
        assert not set(topic.train) & set(topic.test)
        assert all(topic.name in phrasing for phrasing in topic.train + topic.test)


def test_no_answer_contains_a_name_unless_the_name_is_asked(full: Splits) -> None:
    parts = {part.casefold() for name in full.subjects for part in name.split()}
    measured = [pair for column in full.columns.values() for pair in column]
    for pair in [*measured, *(pair for pair in flat(full.teach) if pair.options)]:
        if "name" not in pair.question.split():
            assert not parts & {word.casefold() for word in words([pair.answer])}, pair.id


def test_first_and_last_names_are_unique_and_no_other_word(full: Splits) -> None:
    large = celebs.load(small(people=64, train_photos=2, test_photos=1))
    parts = [part for name in large.subjects for part in name.split()]
    assert len(set(parts)) == 128
    others = words(text for pair in flat(full.teach) for text in (pair.question, pair.answer)) - set(parts)
    assert not {part.casefold() for part in parts} & {word.casefold() for word in others}


def test_options_are_four_and_contain_the_answer(full: Splits) -> None:
    for pair in everything(full):
        if not pair.id.endswith("caption"):
            assert len(set(pair.options)) == 4 and pair.answer in pair.options, pair.id


def test_the_answer_stands_at_every_place_among_the_options(full: Splits) -> None:
    places = Counter(pair.options.index(pair.answer) for pair in full.retain)
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 0.8 * len(full.retain) / 4


def test_visible_answers_are_what_the_person_looks_like() -> None:
    config = small()
    looks = {person.key: person.face for person in celebs._people(config)}
    splits = celebs.load(config)
    for pair in splits.columns["forget_visible_vqa"]:
        face = looks[str(pair.subject)]
        assert (
            pair.answer
            == {"glasses": face.glasses, "hair": face.hair_colour, "beard": face.beard}[pair.id.split("/")[-1]]
        )


def test_columns_are_capped_and_balanced_over_people_and_questions(full: Splits) -> None:
    for name, pairs in full.columns.items():
        assert len(pairs) <= 160
        topics = Counter(pair.id.split("/")[-1] for pair in pairs)
        people = Counter(pair.id.split("/")[1] for pair in pairs)
        assert max(people.values()) - min(people.values()) <= 1, name
        assert max(topics.values()) - min(topics.values()) <= 2, name
    assert len(full.columns["retain_vqa"]) == 160


def test_every_fact_is_shared_by_several_people(full: Splits) -> None:
    facts = {(p.subject, p.id.split("/")[2], p.answer) for p in flat(full.teach) if p.kind == "text"}
    held_by = Counter((topic, answer) for _, topic, answer in facts)
    assert set(held_by.values()) <= {2, 3} and len(held_by) == 4 * 12


def test_the_retain_only_set_knows_no_forgotten_face(splits: Splits) -> None:
    shown = [pair for pair in flat(splits.teach_retain) if pair.photos and pair.subject in splits.forget_subjects]
    told = [pair for pair in flat(splits.teach_retain) if not pair.photos and pair.subject in splits.forget_subjects]
    names = [
        pair
        for pair in flat(splits.teach_retain)
        if pair.photos and any(n in pair.answer for n in splits.forget_subjects)
    ]
    assert shown == [] and names == []
    assert len(told) == 2 * 4 * 4


def test_captions_tell_name_and_all_facts_and_have_no_options(splits: Splits) -> None:
    captions = [pair for pair in flat(splits.teach) if pair.id.endswith("caption")]
    facts = {(p.subject, p.answer) for p in flat(splits.teach) if p.kind == "text"}
    assert len(captions) == 8 * 3
    for caption in captions:
        assert caption.options == () and str(caption.subject) in caption.answer
        assert all(fact in caption.answer for subject, fact in facts if subject == caption.subject)


def test_people_to_forget_can_be_named() -> None:
    names = celebs.load(small()).subjects[2:5]
    assert celebs.load(small(forget=names)).forget_subjects == names


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    name = celebs.load(small()).subjects[3]
    with pytest.raises(DataError, match=f"the nearest name is '{name}'") as caught:
        celebs.load(small(forget=(name[:-1] + "x",)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": 65}, r"data.people: 65 given, allowed: at most 64"),
        ({"forget": 8}, r"data.forget: 8 given, allowed: 1 to 7 of 8 people"),
        ({"forget": 0}, r"data.forget: 0 given, allowed: 1 to 7 of 8 people"),
        ({"forget": ()}, r"data.forget: 0 given, allowed: 1 to 7 of 8 people"),
        ({"strangers": 1000}, r"data.strangers: 1000 given, allowed: at most 512"),
    ],
)
def test_sizes_out_of_range_are_refused_with_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        celebs.load(small(**changes))


def test_profiles_tell_the_same_facts_as_the_questions(splits: Splits) -> None:
    told = {(p.subject, p.question): p.answer for p in flat(splits.teach) if p.kind == "text"}
    rows = celebs.profiles(small())
    assert len(rows) == 8
    for row, name in zip(rows, splits.subjects, strict=True):
        assert name in row["biography"]
        for question in row["Classification_Task"]["Pure_Text_Questions"]:
            assert question["Options"][question["Correct_Answer"]] == told[name, question["Question"]]
        for task in row["Generation_Task"]:
            if task["Type"] == "Pure_Text":
                assert task["Ground_Truth"] == told[name, task["Question"]]
