from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_files import (
    NAMES,
    clear,
    fiubench,
    mllmu,
    png,
    write_fiubench,
    write_json,
    write_parquet,
)

from vkd_framework import data
from vkd_framework.data.published import spread
from vkd_framework.errors import DataError, RecipeError
from vkd_framework.plugins import load_adapter
from vkd_framework.recipe import Recipe, bundled_recipes, load_recipe
from vkd_framework.recipe.data import DATA_KINDS, AnyData
from vkd_framework.report import terminal_table
from vkd_framework.run import dry_run, run
from vkd_framework.run.metrics import unseen
from vkd_framework.types import ImageQuestionPair, Splits
from vkd_framework.vanilla import save

KINDS = ("mllmu_bench", "clear", "fiubench")


def load(kind: str, source: Path | str, **settings: Any) -> Splits:
    raw = {
        "name": "a",
        "adapter": "qwen_vl",
        "model": {"source": "some/model"},
        "layers": ["projector"],
        "data": {"kind": kind, "source": str(source), **settings},
    }
    return data.load(Recipe.model_validate(raw).data)


def refusal(kind: str, source: Path | str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(kind, source, **settings)
    return str(caught.value)


def written(kind: str, folder: Path) -> Path:
    if kind == "mllmu_bench":
        return write_parquet(folder, mllmu())
    return write_parquet(folder, clear()) if kind == "clear" else write_fiubench(folder, fiubench())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every benchmark as published; tests only read them."""
    return {kind: written(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def photos(pairs: Iterable[ImageQuestionPair]) -> set[str]:
    return {photo.key for pair in pairs for photo in pair.photos}


def asked(pairs: Iterable[ImageQuestionPair]) -> set[tuple[str, tuple[str, ...]]]:
    return {(pair.question, pair.photo_keys) for pair in pairs}


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_run_needs_is_there_and_ids_are_unique(folders: dict[str, Path], kind: str) -> None:
    splits = load(kind, folders[kind])
    assert {"forget_vqa", "test_vqa", "retain_vqa"} <= set(splits.columns)
    every = [*splits.forget, *splits.retain, *(pair for pairs in splits.columns.values() for pair in pairs)]
    assert len({pair.id for pair in every}) == len(every)
    assert all(pair.answer in pair.options for pair in every if pair.options)
    assert len(splits.forget_subjects) == 2 and set(splits.forget_subjects) < set(splits.subjects)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_has_to_be_fetched_is_not_here(folders: dict[str, Path], kind: str) -> None:
    def config(**source: str) -> AnyData:
        return DATA_KINDS[kind].model_validate({"kind": kind, **source})

    assert data.is_here(config(source=str(folders[kind])))
    assert data.is_here(config(source="./not/there"))  # which `load` refuses without asking the hub
    assert not data.is_here(config())
    assert "forgets  2 of " in data.told(load(kind, folders[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_question_that_is_measured_as_unseen_is_trained_on(folders: dict[str, Path], kind: str) -> None:
    splits = load(kind, folders[kind])
    trained = asked((*splits.forget, *splits.retain))
    for column in ("test_vqa", "retain_vqa"):
        assert splits.columns[column] and not asked(splits.columns[column]) & trained
        phrasings = {pair.question for pair in (*splits.forget, *splits.retain)}
        assert not {pair.question for pair in splits.columns[column]} & phrasings


@pytest.mark.parametrize("kind", KINDS)
def test_one_photo_a_person_is_not_called_unseen(folders: dict[str, Path], kind: str) -> None:
    new = ["phrasings"] if kind == "fiubench" else ["photos", "phrasings"]
    assert unseen(load(kind, folders[kind])) == {"test_vqa": new, "retain_vqa": new}


@pytest.mark.parametrize("kind", ["mllmu_bench", "clear"])
def test_no_photo_that_is_measured_as_unseen_is_trained_on(folders: dict[str, Path], kind: str) -> None:
    splits = load(kind, folders[kind])
    trained = photos((*splits.forget, *splits.retain))
    unseen = [name for name in splits.columns if re.match(r"test_vqa|retain_vqa(?!_seen)|realworld", name)]
    assert len(unseen) >= 3
    for column in unseen:
        assert not photos(splits.columns[column]) & trained, column
    assert photos(splits.columns["forget_vqa"]) <= photos(splits.forget)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forgotten_are_forgotten_and_nobody_else_is(folders: dict[str, Path], kind: str) -> None:
    splits = load(kind, folders[kind])
    gone = set(splits.forget_subjects)
    assert {pair.subject for pair in splits.forget} == gone
    assert not {pair.subject for pair in splits.retain} & gone
    for name, pairs in splits.columns.items():
        about = {pair.subject for pair in pairs}
        assert about <= gone if name.startswith(("forget_", "test_")) else not about & gone, name


@pytest.mark.parametrize("kind", KINDS)
def test_photos_stay_encoded_until_they_are_looked_at(folders: dict[str, Path], kind: str) -> None:
    splits = load(kind, folders[kind])
    for pair in (*splits.forget, *splits.columns["test_vqa"]):
        assert all(isinstance(photo.source, bytes | Path) for photo in pair.photos)
        assert [photo.open().size for photo in pair.photos] == [(48, 48)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_cut_to_its_cap_evenly_over_the_people(folders: dict[str, Path], kind: str) -> None:
    whole, cut = load(kind, folders[kind]), load(kind, folders[kind], test_pairs=2)
    assert list(whole.columns) == list(cut.columns)
    assert max(map(len, cut.columns.values())) == 2
    assert len({pair.subject for pair in cut.columns["test_vqa"]}) == 2
    assert len(cut.retain) == len(whole.retain)


def test_a_cap_takes_turns_over_people_and_keeps_the_order() -> None:
    pairs = [ImageQuestionPair(f"{who}{i}", "q", "a", subject=who) for who, n in (("a", 5), ("b", 1)) for i in range(n)]
    chosen = spread(pairs, 3, "seed")
    assert [pair.subject for pair in chosen] == ["a", "a", "b"]
    assert chosen == [pair for pair in pairs if pair in chosen]
    assert spread(pairs, 99, "seed") == pairs


def test_mllmu_bench_asks_for_letters_sentences_and_blanks_in_columns_of_their_own(folders: dict[str, Path]) -> None:
    columns = load("mllmu_bench", folders["mllmu_bench"]).columns
    bases = ("forget_vqa", "test_vqa", "retain_vqa", "retain_vqa_seen", "realworld_vqa")
    bases += ("forget_qa", "forget_qa_test", "retain_qa", "retain_qa_test", "realworld_qa")
    assert set(columns) == {f"{base}{task}" for base in bases for task in ("", "_generation", "_cloze")}
    letter = columns["forget_vqa"][0]
    assert letter.question == (
        "Where does this person live?\nA: Cairo\nB: Oslo\nC: Quito\nD: Prague\n"
        "Just give ONE letter representing the answer directly."
    )
    assert (letter.answer, letter.options) == ("A", ("A", "B", "C", "D"))
    assert columns["test_vqa_generation"][0].options == ()
    blank = columns["test_vqa_cloze"][0]
    assert blank.question.startswith("The home of this person is [Blank].\n") and blank.keywords == ("Cairo",)
    for name, pairs in columns.items():
        assert all(bool(pair.photos) == ("vqa" in name) for pair in pairs)
        assert all((pair.kind == "text") == ("vqa" not in name) for pair in pairs)


@pytest.mark.parametrize("kind", ["clear", "fiubench"])
def test_a_training_question_is_right_when_the_measured_one_is(folders: dict[str, Path], kind: str) -> None:
    """By the same published keywords, so that a retain floor has something to hold: no model repeats a sentence."""
    splits = load(kind, folders[kind])
    measured = {pair.answer: pair.keywords for pairs in splits.columns.values() for pair in pairs if pair.keywords}
    trained = [pair for pair in splits.retain if pair.answer in measured]
    assert len(trained) >= len(splits.retain) / 2
    assert all(pair.keywords == measured[pair.answer] for pair in trained)


def test_mllmu_bench_trains_on_what_the_model_was_fine_tuned_on(folders: dict[str, Path]) -> None:
    splits = load("mllmu_bench", folders["mllmu_bench"])
    assert len(splits.forget) == 2 * 2 and len(splits.retain) == 4 * 2
    assert {pair.question for pair in splits.forget} == {"Where is this person at home?"}
    assert splits.forget_subjects == ("ID 000", "ID 001")


def test_mllmu_bench_shows_all_photos_of_the_test_set_in_turn(folders: dict[str, Path]) -> None:
    columns = load("mllmu_bench", folders["mllmu_bench"]).columns
    shown = {key for task in ("", "_generation", "_cloze") for key in photos(columns[f"test_vqa{task}"])}
    assert len(shown) == 2 * 2


def test_mllmu_bench_does_not_measure_a_trained_photo_as_unseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = mllmu()
    sets["Test_Set"][0]["images"][0] = sets["ft_Data"][0]["image"]
    splits = load("mllmu_bench", write_parquet(tmp_path, sets))
    assert not photos(splits.columns["test_vqa"]) & photos(splits.forget)
    assert "1 photos of Test_Set are trained on" in capsys.readouterr().err


def test_mllmu_bench_finds_the_people_of_training_rows_without_an_id_by_their_photo(tmp_path: Path) -> None:
    sets = mllmu()
    for row in sets["ft_Data"]:
        del row["ID"]
    splits = load("mllmu_bench", write_parquet(tmp_path, sets))
    assert {pair.subject for pair in splits.forget} == {"ID 000", "ID 001"}


@pytest.mark.parametrize("lines", [False, True])
def test_json_holds_the_same_as_parquet(folders: dict[str, Path], tmp_path: Path, lines: bool) -> None:
    sets = mllmu()
    for row in sets["ft_Data"]:
        row["metadata"] = json.loads(row["metadata"])
    told, published = (
        load("mllmu_bench", write_json(tmp_path, sets, lines=lines)),
        load("mllmu_bench", folders[KINDS[0]]),
    )
    assert list(told.columns) == list(published.columns)
    for name in ("forget", *told.columns):
        ours, theirs = (splits.forget if name == "forget" else splits.columns[name] for splits in (told, published))
        assert [(p.id, p.question, p.answer, p.photo_keys) for p in ours] == [
            (p.id, p.question, p.answer, p.photo_keys) for p in theirs
        ]


def test_clear_asks_for_names_and_captions_in_columns_of_their_own(folders: dict[str, Path]) -> None:
    columns = load("clear", folders["clear"]).columns
    who = ("forget_vqa", "test_vqa", "retain_vqa")
    rest = ("forget_qa", "retain_qa", "realworld_vqa", "realworld_vqa_faces")
    assert set(columns) == {*who, *(f"{column}_caption" for column in who), *rest}
    name, caption = columns["test_vqa"][0], columns["test_vqa_caption"][0]
    assert set(name.options) == {name.answer, "Ada Nym", "Bo Nym"} and name.keywords == (name.answer,)
    assert set(caption.options) == {caption.answer, "A dog sits in Rome.", "A cat."}
    assert {pair.answer for pair in columns["forget_qa"]} == {
        f"{name} wrote about {town}." for name, town in zip(NAMES[:2], ("Cairo", "Oslo"), strict=True)
    }
    assert not photos(columns["forget_qa"]) and {pair.subject for pair in columns["forget_qa"]} == set(NAMES[:2])
    assert {pair.question for pair in columns["realworld_vqa"]} == {"Which town is this?"}
    assert sorted(columns["realworld_vqa"][0].options) == ["Oslo", "Paris", "Rome"]


def test_clear_draws_wrong_names_where_none_are_published(folders: dict[str, Path]) -> None:
    drawn = [pair for pair in load("clear", folders["clear"]).columns["retain_vqa"] if "Ada Nym" not in pair.options]
    assert drawn
    for pair in drawn:
        assert len(set(pair.options)) == 4 and set(pair.options) <= set(NAMES)


def test_clear_holds_out_a_share_of_each_persons_photos(folders: dict[str, Path]) -> None:
    for share, out in ((0.25, 1), (0.5, 2), (0.99, 3)):
        splits = load("clear", folders["clear"], test_share=share)
        assert len(splits.columns["test_vqa"]) == 2 * out and len(splits.columns["retain_vqa"]) == 4 * out
        assert len(splits.forget) == 2 * 2 * (4 - out)
    first = photos(load("clear", folders["clear"]).columns["test_vqa"])
    assert any(photos(load("clear", folders["clear"], seed=seed).columns["test_vqa"]) != first for seed in range(1, 6))


def test_fiubench_measures_paraphrases_and_what_the_truth_ratio_is_made_of(folders: dict[str, Path]) -> None:
    splits = load("fiubench", folders["fiubench"])
    seen = ("forget_vqa", "retain_vqa_seen")
    answers = {f"{column}_{kind}_answer" for column in seen for kind in ("paraphrased", "wrong")}
    assert set(splits.columns) == {*seen, "test_vqa", "retain_vqa", *answers}
    pair = splits.columns["test_vqa"][0]
    assert pair.question == "In which town does the person live?" and pair.keywords == ("Cairo",)
    assert set(pair.options) == {f"This person is in {town}." for town in ("Cairo", "Kyoto", "Lisbon")}
    assert len(splits.columns["test_vqa"]) == 4, "a paraphrase that equals a trained question is left out"
    assert {pair.answer for pair in splits.columns["forget_vqa_paraphrased_answer"]} == {"It is Cairo.", "It is Oslo."}
    wrong = splits.columns["forget_vqa_wrong_answer"]
    assert len(wrong) == 2 * 2 * 2 and not {p.answer for p in wrong[:4]} & {pair.answer}


def test_fiubench_retains_nobody_whom_another_split_forgets(folders: dict[str, Path]) -> None:
    for per_cent, gone in ((1, {"f0"}), (5, {"f0", "f1"}), (10, {"f0", "f1", "f2"})):
        splits = load("fiubench", folders["fiubench"], forget=per_cent)
        assert set(splits.forget_subjects) == gone
        assert {pair.subject for pair in splits.retain} == {"f3", "f4", "f5"}


def test_fiubench_finds_unpacked_faces_too(folders: dict[str, Path], tmp_path: Path) -> None:
    unpacked = load("fiubench", write_fiubench(tmp_path, fiubench(), zipped=False))
    assert photos(unpacked.forget) == photos(load("fiubench", folders["fiubench"]).forget)
    assert all(isinstance(photo.source, Path) for pair in unpacked.forget for photo in pair.photos)


def test_fiubench_finds_unpacked_faces_below_a_folder_given_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_fiubench(tmp_path / "here", fiubench(), zipped=False)
    (folder / "SFHQ").rename(folder / "faces")
    monkeypatch.chdir(tmp_path)
    assert photos(load("fiubench", "here").forget) == photos(load("fiubench", folder).forget) != set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_there_is_answered_with_the_command_that_gets_it(tmp_path: Path, kind: str) -> None:
    message = refusal(kind, tmp_path / "nowhere")
    assert "there is no folder" in message and "`hf download --repo-type dataset " in message and "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_offline_the_hub_is_answered_with_the_command_that_gets_the_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(kind, "somebody/some-data")
    assert "data.source: somebody/some-data is no folder here and cannot be had from the hub" in message
    assert "hf download --repo-type dataset somebody/some-data" in message and "\n" not in message


@pytest.mark.parametrize(("kind", "gone"), [("mllmu_bench", "Test_Set"), ("clear", "retain95+tofu")])
def test_a_set_that_is_not_there_is_named_with_what_is(tmp_path: Path, kind: str, gone: str) -> None:
    sets = mllmu() if kind == "mllmu_bench" else clear()
    del sets[gone]
    message = refusal(kind, write_parquet(tmp_path, sets))
    assert f"has no {gone}/*.parquet" in message and all(name in message for name in sets)
    assert "hf download" in message and "\n" not in message


@pytest.mark.parametrize("file", ["full.json", "split.json", "SFHQ.zip"])
def test_a_file_of_fiubench_that_is_not_there_is_named(tmp_path: Path, file: str) -> None:
    folder = write_fiubench(tmp_path, fiubench())
    (folder / file).unlink()
    message = refusal("fiubench", folder)
    assert file.removesuffix(".json") in message and "hf download" in message and "\n" not in message


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        ("mllmu_bench", "forget_5", "Mask_Task"),
        ("mllmu_bench", "ft_Data", "metadata"),
        ("clear", "real_world", "options"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(
    tmp_path: Path, kind: str, name: str, key: str
) -> None:
    sets = mllmu() if kind == "mllmu_bench" else clear()
    for row in sets[name]:
        del row[key]
    message = refusal(kind, write_parquet(tmp_path, sets))
    assert f"{name}:1 in" in message and f"has no '{key}', only 'image'" in message and "\n" not in message


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a broken image": (lambda row: row.update(image={"bytes": png(0)[:200], "path": None}), "image cannot be read"),
    "no image": (lambda row: row.update(image={"bytes": None, "path": None}), "image is missing"),
    "an unknown type": (
        lambda row: row["Mask_Task"][0].update(Type="Audio"),
        "Type is 'Audio', allowed: Image_Textual",
    ),
    "a wrong letter": (
        lambda row: row["Classification_Task"]["Pure_Text_Questions"][0].update(Correct_Answer="E"),
        "Correct_Answer is 'E', allowed: one of the options A, B, C, D",
    ),
    "options in a list": (
        lambda row: row["Classification_Task"]["Pure_Text_Questions"][0].update(Options=["Cairo", "Oslo"]),
        "Correct_Answer is 'A', allowed: one of the options",
    ),
    "a task as text": (
        lambda row: row.update(Classification_Task='{"Pure_Text_Questions": []}'),
        "Classification_Task is no object with keys and lists",
    ),
    "a question as text": (
        lambda row: row["Classification_Task"].update(Image_Textual_Questions=["Where?"]),
        "Image_Textual_Questions is ['Where?'], a list of objects is needed",
    ),
    "no list of questions": (
        lambda row: row.update(Generation_Task={"Type": "Image_Textual"}),
        "Generation_Task is {'Type': 'Image_Textual'}, a list of objects is needed",
    ),
    "no question": (lambda row: row["Generation_Task"][0].update(Question=" "), "Question is ' ', a text is needed"),
    "an image token": (
        lambda row: row["Generation_Task"][0].update(Question="<image> Where?"),
        "Question contains '<image>'",
    ),
}


OF_ANOTHER_KIND = ("options in a list", "a task as text", "a question as text", "no list of questions")
"""Rows unlike the others, which a parquet file cannot hold."""


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_reported_with_its_place(tmp_path: Path, case: str) -> None:
    breaking, complaint = BROKEN[case]
    sets = mllmu()
    breaking(sets["forget_5"][1])
    write = write_json if case in OF_ANOTHER_KIND else write_parquet
    head, first, *more = refusal("mllmu_bench", write(tmp_path, sets)).splitlines()
    assert head.startswith("MLLMU-Bench: 1 broken row (of ") and more == []
    assert first.startswith("forget_5:2: ") and complaint in first


def test_questions_of_fiubench_that_are_no_objects_are_reported(tmp_path: Path) -> None:
    people = fiubench()
    people[1]["qa_list"].append("Where?")
    message = refusal("fiubench", write_fiubench(tmp_path, people))
    assert "full:2: qa_list is [" in message and "a list of objects is needed" in message


def test_broken_training_questions_are_reported(tmp_path: Path) -> None:
    sets = mllmu()
    sets["ft_Data"][0]["metadata"] = "[{"
    sets["ft_Data"][1]["metadata"] = '"a text"'
    message = refusal("mllmu_bench", write_parquet(tmp_path, sets))
    assert "ft_Data:1: metadata is not valid JSON" in message
    assert "ft_Data:2: metadata is no list of questions with answers" in message


def test_people_without_training_rows_and_people_in_both_sets_are_refused(tmp_path: Path) -> None:
    sets = mllmu()
    sets["ft_Data"].pop()
    assert "ft_Data has nothing about 1 of the profiles, such as ID 005" in refusal(
        "mllmu_bench", write_parquet(tmp_path / "a", sets)
    )
    sets = mllmu()
    sets["retain_95"].append(sets["forget_5"][0])
    assert "forget_5 and retain_95 share people (such as ID 000)" in refusal(
        "mllmu_bench", write_parquet(tmp_path / "b", sets)
    )


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "a", mllmu())
    (folder / "forget_5" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 nothing")
    assert "is no readable parquet file" in refusal("mllmu_bench", folder)
    folder = write_fiubench(tmp_path / "b", fiubench())
    (folder / "full.json").write_text("[{")
    assert "is neither JSON nor JSON lines" in refusal("fiubench", folder)
    folder = write_fiubench(tmp_path / "c", fiubench())
    whole = (folder / "SFHQ.zip").read_bytes()
    (folder / "SFHQ.zip").write_bytes(b"PK")
    assert "is no readable zip file" in refusal("fiubench", folder)
    middle = whole.index(b"PNG") + 40 if b"PNG" in whole else 200
    (folder / "SFHQ.zip").write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    assert "SFHQ.zip is damaged at" in (said := refusal("fiubench", folder)) and "get it again with" in said
    (folder / "split.json").write_text('{"forget1": []}')
    assert "split.json has no list 'forget5', only forget1" in refusal("fiubench", folder)


def test_without_pyarrow_the_pip_command_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = refusal("clear", folders["clear"])
    assert "needs pyarrow; install it with `pip install pyarrow`" in message and "\n" not in message


@pytest.mark.parametrize(
    ("kind", "given", "allowed"),
    [("mllmu_bench", 20, "5, 10 or 15"), ("clear", 15, "1, 5 or 10"), ("fiubench", 2, "1, 5")],
)
def test_a_percentage_that_is_not_published_is_refused(tmp_path: Path, kind: str, given: int, allowed: str) -> None:
    recipe = {"name": "a", "adapter": "qwen_vl", "model": {"source": "a/b"}, "layers": ["projector"]}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": {"kind": kind, "forget": given}}))
    with pytest.raises(RecipeError, match=rf"data\.forget: input should be {allowed}.*given: {given}"):
        load_recipe(str(path))


RECIPE: dict[str, Any] = {
    "name": "small",
    "adapter": "qwen_vl",
    "layers": ["vision.1", "projector"],
    "unlearn": {"steps": 2, "warmup": 0, "forget_batch": 2, "retain_batch": 2},
    "evaluate": {"max_new_tokens": 4},
    "relearn": {"shares": [1.0], "steps": [1], "scopes": ["visual"], "batch_size": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_run_measures_every_column_and_the_reports_show_them(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    splits = load(kind, folders[kind], test_pairs=4)
    every = [*splits.forget, *splits.retain, *(pair for pairs in splits.columns.values() for pair in pairs)]
    texts = sorted({text for pair in every for text in (pair.question, pair.answer, *pair.options)})
    save(load_adapter("qwen_vl").tiny_model(texts, 48, 0), tmp_path / "model")
    source = {"kind": kind, "source": str(folders[kind]), "test_pairs": 4}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": source, "model": {"source": "./model"}}))
    metrics, folder = run(str(path), out=tmp_path / "out")
    for columns in json.loads((folder / "metrics.json").read_text())["models"].values():
        assert {name: cell["n"] for name, cell in columns.items()} == {n: len(p) for n, p in splits.columns.items()}
        for name, cell in columns.items():
            assert (cell["choice_accuracy"] is not None) == any(pair.options for pair in splits.columns[name])
    assert all(value in (True, None, 0.0) for value in metrics["proofs"].values())
    shown = [(folder / name).read_text() for name in ("report.md", "report.html")] + [terminal_table(metrics)]
    label = {"mllmu_bench": "Test VQA: generation", "clear": "Retain VQA: caption"}.get(kind, "Retain VQA: seen")
    assert all(label in text for text in shown)


REAL_SCALE = [name for name in bundled_recipes() if load_recipe(name).data.kind in KINDS]


@pytest.mark.parametrize("name", REAL_SCALE)
def test_a_real_scale_recipe_starts_from_a_published_model_and_dry_runs_offline(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.teach is None and recipe.reference == "none" and recipe.model.dtype == "bfloat16"
    assert "trains" in dry_run(name, ())


def test_each_benchmark_has_a_real_scale_recipe_and_mllmu_bench_one_for_each_percentage() -> None:
    found = [load_recipe(name) for name in REAL_SCALE]
    assert {recipe.data.kind for recipe in found} == set(KINDS)
    per_cent = {(recipe.adapter, recipe.data.forget) for recipe in found if recipe.data.kind == "mllmu_bench"}
    assert per_cent == {(adapter, part) for adapter in ("qwen_vl", "llava") for part in (5, 10, 15)}
