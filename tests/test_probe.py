from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import CAST, asked_about, picture, weights
from torch import Tensor

from vkd_framework.cache import CACHE_VARIABLE
from vkd_framework.cli import main
from vkd_framework.errors import DataError
from vkd_framework.features import FeatureTap, photo_features, vision_forward
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM
from vkd_framework.probe import (
    Identity,
    choose_photos,
    compare,
    deal_folds,
    draw_seen,
    identify,
    nearest_neighbours,
    pooled_features,
    probe,
    ridge_probe,
    squared_gradients,
    standardise,
    suggest,
)
from vkd_framework.types import DistillationLayer, ImageQuestionPair, Photo, Splits

PEOPLE, EACH = 8, 12
PERSON = torch.arange(PEOPLE).repeat_interleave(EACH)
EVERY_PHOTO = torch.ones(len(PERSON), dtype=torch.bool)


def noise(columns: int, seed: int = 0) -> Tensor:
    return torch.randn(len(PERSON), columns, generator=torch.Generator().manual_seed(seed))


def told_apart(features: Tensor, scored: Tensor = EVERY_PHOTO) -> Identity:
    return identify(features, PERSON, deal_folds(PERSON, 5, seed=0), scored)


def test_people_who_lie_apart_are_all_told_apart() -> None:
    found = told_apart(torch.eye(PEOPLE)[PERSON] + 0.01 * noise(PEOPLE))
    assert found.linear.accuracy == found.neighbours.accuracy == found.linear.everybody == 1
    assert found.linear.interval_95[0] > 0.9


@pytest.mark.parametrize("columns", [4, 300], ids=["few channels", "more channels than photos"])
def test_noise_tells_nobody_apart(columns: int) -> None:
    found = told_apart(noise(columns))
    assert found.chance == 1 / PEOPLE
    for score in (found.linear, found.neighbours):
        assert score.interval_95[0] <= found.chance <= score.interval_95[1]


def test_a_probe_finds_on_a_line_what_neighbours_do_not_see() -> None:
    found = told_apart(torch.cat([torch.eye(PEOPLE)[PERSON], noise(90, 1)], dim=1))
    assert found.linear.accuracy > found.neighbours.accuracy + 0.2


def test_only_the_scored_photos_count_for_the_accuracy() -> None:
    hidden = torch.where((PERSON == 0)[:, None], torch.zeros(1, PEOPLE), torch.eye(PEOPLE)[PERSON])
    known = told_apart(hidden + 0.01 * noise(PEOPLE), scored=PERSON == 3)
    assert known.photos == EACH
    assert known.linear.accuracy == 1


def test_a_photo_never_helps_to_recognise_itself() -> None:
    found = told_apart(10 * torch.eye(len(PERSON)))
    assert found.linear.accuracy < 0.4 and found.neighbours.accuracy < 0.4


def test_everybodys_photos_are_in_several_folds_and_each_photo_in_one() -> None:
    person = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    fold = deal_folds(person, 5, seed=3)
    assert fold.shape == person.shape
    for label, several in ((0, 2), (1, 3), (2, 5)):
        assert len(set(fold[person == label].tolist())) == several


def test_the_mean_and_spread_come_from_the_training_photos_alone() -> None:
    train, test = standardise(noise(3)[:50], 100 + noise(3)[50:])
    assert torch.allclose(train.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert test.mean() > 50
    flat, _ = standardise(torch.ones(5, 2), torch.ones(1, 2))
    assert bool((flat == 0).all())


def test_probes_answer_with_the_labels_they_were_given() -> None:
    train = torch.tensor([[3.0, 0.0], [3.1, 0.0], [-3.0, 0.1], [-3.1, 0.0]]).double()
    label, test = torch.tensor([7, 7, 2, 2]), torch.tensor([[5.0, 0.0], [-5.0, 0.0]]).double()
    assert ridge_probe(train, label, test).tolist() == [7, 2]
    assert nearest_neighbours(train, label, test, count=2).tolist() == [7, 2]


def test_the_leave_one_out_error_chooses_a_penalty_that_does_not_follow_noise() -> None:
    signal = torch.eye(2)[torch.arange(40) % 2] - 0.5
    features = torch.cat([signal, noise(60)[:40]], dim=1).double()
    train, test = standardise(features[:30], features[30:])
    assert (ridge_probe(train, torch.arange(30) % 2, test) == torch.arange(10) % 2).float().mean() >= 0.8


def pairs_of(subject: str | None, *photos: Photo) -> list[ImageQuestionPair]:
    return [
        ImageQuestionPair(f"{photo.key}/{q}", f"{q}?", "yes", (photo,), subject) for photo in photos for q in range(2)
    ]


def shot(key: str, seed: int = 0) -> Photo:
    return Photo(key, picture(16, 16, seed=seed))


def drawn(forget: list[ImageQuestionPair], retain: list[ImageQuestionPair], *subjects: str) -> Splits:
    return Splits(tuple(forget), tuple(retain), {}, subjects[:1], subjects)


def test_each_photo_is_chosen_once_however_often_it_is_asked_about() -> None:
    photos = [shot(f"a{i}", i) for i in range(3)]
    chosen = choose_photos(drawn(pairs_of("a", *photos), [], "a"), 100, 0)
    assert sorted(pair.photos[0].key for pair, _ in chosen) == ["a0", "a1", "a2"]


def test_files_with_the_same_pixels_are_one_photo() -> None:
    same = picture(16, 16)
    photos = [Photo("a0", same), Photo("copy", same.copy()), shot("a1", 5)]
    chosen = choose_photos(drawn(pairs_of("a", *photos), [], "a"), 100, 0)
    assert len(chosen) == 2


def test_photos_of_several_people_and_people_with_one_photo_are_left_out() -> None:
    group = shot("group", 9)
    forget = pairs_of("a", shot("a0", 1), shot("a1", 2), group)
    retain = pairs_of("b", shot("b0", 3), group)
    assert {pair.photos[0].key for pair, _ in choose_photos(drawn(forget, retain, "a", "b"), 100, 0)} == {"a0", "a1"}


def test_photos_that_are_asked_about_together_only_are_left_out_since_nobody_says_who_is_on_which() -> None:
    first, second, third, other = shot("a0", 1), shot("a1", 2), shot("a2", 3), shot("somebody", 4)
    both = replace(asked_about(None), photos=(first, other), subject="a")
    chosen = choose_photos(drawn([both, *pairs_of("a", first, second, third)], [], "a"), 100, 0)
    assert sorted(pair.photo_keys for pair, _ in chosen) == [("a0",), ("a1",), ("a2",)]
    in_retain = replace(asked_about(None), photos=(first, second), subject="b")
    chosen = choose_photos(drawn(pairs_of("a", first, second, third, other), [in_retain], "a", "b"), 100, 0)
    assert sorted(pair.photo_keys for pair, _ in chosen) == [("a2",), ("somebody",)]


def test_a_cap_takes_the_same_from_everybody() -> None:
    forget = pairs_of("a", *(shot(f"a{i}", i) for i in range(6)))
    retain = pairs_of("b", *(shot(f"b{i}", 10 + i) for i in range(6)))
    names = [name for _, name in choose_photos(drawn(forget, retain, "a", "b"), 6, 0)]
    assert names == ["a"] * 3 + ["b"] * 3


def test_nameless_people_are_no_classes_and_measured_photos_are_not_looked_at(splits: Splits) -> None:
    chosen = choose_photos(splits, 1000, 0)
    assert {name for _, name in chosen} == set(splits.subjects)
    unseen = {photo.key for pair in splits.columns["test_vqa"] for photo in pair.photos}
    assert unseen and not unseen & {pair.photos[0].key for pair, _ in chosen}


def test_features_are_pooled_over_the_rows_of_each_photo(tiny: MLLM) -> None:
    pairs = [asked_about(picture(48, 48)), asked_about(picture(32, 16, seed=1)), asked_about(picture(16, 64, seed=2))]
    pooled = pooled_features(tiny, pairs, batch_size=2)
    for b, pair in enumerate(pairs):
        inputs = tiny.tokenize([pair]).inputs
        with torch.no_grad(), FeatureTap(tiny.model, tiny.layers) as tap:
            vision_forward(tiny, inputs)
            alone = photo_features(tiny, inputs, tap)
        for layer in tiny.layers:
            wanted = alone[layer.name].rows.mean(dim=0)
            torch.testing.assert_close(pooled[layer.name][b], wanted, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_each_pair_on_its_own(student: MLLM, splits: Splits) -> None:
    pairs = [splits.forget[0], splits.forget[-1]]
    before = weights(student)
    found = squared_gradients(student, pairs, "gradients")
    assert weights(student) == before
    for q, pair in enumerate(pairs):
        student.model.requires_grad_(True)
        student.model.zero_grad()
        batch = student.tokenize([pair])
        logits = student.model(**batch.inputs).logits
        torch.autograd.backward(answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != -100).sum())
        for layer in student.layers:
            module = student.model.get_submodule(layer.path)
            wanted = sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)
            assert float(found[layer.name][q]) == pytest.approx(wanted, rel=1e-4)
            assert wanted > 0


def test_the_language_model_gets_no_gradient(student: MLLM, splits: Splits) -> None:
    squared_gradients(student, splits.forget[:1], "gradients")
    assert not any(parameter.requires_grad for parameter in student.model.parameters())
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_pairs_without_a_photo_are_not_drawn() -> None:
    pairs = [asked_about(None), asked_about(picture(16, 16)), asked_about(None)]
    assert draw_seen(pairs, 5, 0) == [pairs[1]]


def test_the_ratio_of_gradients_is_that_of_their_means() -> None:
    found = compare(torch.tensor([2.0, 4.0]).double(), torch.tensor([1.0, 1.0]).double(), 10, seed=0)
    assert (found.forget, found.retain, found.ratio) == (pytest.approx(0.3), pytest.approx(0.1), pytest.approx(3))
    assert found.interval_95 == (pytest.approx(2), pytest.approx(4))


def test_a_layer_without_gradient_has_no_ratio() -> None:
    found = compare(torch.zeros(3).double(), torch.zeros(3).double(), 10, seed=0)
    assert found.ratio is None and found.interval_95 is None and found.forget == 0


@pytest.mark.parametrize(
    ("accuracies", "dead", "wanted"),
    [
        ((0.2, 0.95, 0.9, 1.0), (), ("vision.1", "projector")),
        ((0.2, 0.3, 0.4, 1.0), (), ("projector",)),
        ((0.9, 0.9, 0.9, 0.5), (), ("vision.0", "projector")),
        ((0.2, 0.3, 1.0, 0.4), (2,), ("projector",)),
        ((0.2, 0.3, 1.0, 0.2), (2,), ("vision.1", "projector")),
        ((0.2, 0.9, 0.9, 0.9), (3,), ("vision.1", "vision.2")),
        ((1.0, 1.0, 1.0, 1.0), (0, 1, 2, 3), ()),
    ],
)
def test_the_rule_takes_the_earliest_good_layer_and_the_last_of_those_that_reach_the_language_model(
    accuracies: tuple[float, ...], dead: tuple[int, ...], wanted: tuple[str, ...]
) -> None:
    names = ("vision.0", "vision.1", "vision.2", "projector")
    layers = [DistillationLayer(name, name, 8, 1, i not in dead) for i, name in enumerate(names)]
    assert suggest(layers, dict(zip(names, accuracies, strict=True))) == wanted


def test_the_same_seed_finds_the_same(tiny: MLLM, splits: Splits) -> None:
    first, again = (probe(tiny, splits, pairs=4, seed=1) for _ in range(2))
    assert first == again
    assert first.forget_pairs == first.retain_pairs == 4
    assert list(first.identity) == list(first.gradient) == [layer.name for layer in tiny.layers]


def test_people_with_one_photo_each_are_not_told_apart_and_nothing_is_suggested(tiny: MLLM) -> None:
    found = probe(tiny, drawn(pairs_of("a", shot("a", 1)), pairs_of("b", shot("b", 2)), "a", "b"), pairs=1, seed=0)
    assert found.identity == {} and found.suggested == () and found.people == 0
    assert all(gradient.ratio is not None for gradient in found.gradient.values())


def test_without_photos_no_layer_can_be_judged(tiny: MLLM) -> None:
    with pytest.raises(DataError, match="without photos"):
        probe(tiny, drawn([asked_about(None)], pairs_of("b", shot("b", 2)), "a", "b"), pairs=1, seed=0)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    settings = {"name": "small", "adapter": "qwen_vl", "data": CAST, "teach": {"steps": 2}, "layers": ["vision.77"]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings | {"mask": {"pairs": 3}}))
    return str(path)


def inspected(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["inspect-layers", *arguments])


def test_a_recipe_is_measured_although_its_layers_are_still_to_be_chosen(recipe_file: str) -> None:
    done = inspected("--recipe", recipe_file, "--set", "seed=2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["people"] == CAST["people"] and found["chance"] == pytest.approx(1 / 6)
    assert found["photos"] == 2 * 3 and found["pairs"] == {"forget": 3, "retain": 3}
    names = [layer["name"] for layer in found["layers"]]
    assert [name for name in names if name in found["suggested_layers"]] == found["suggested_layers"] != []
    for layer in found["layers"]:
        assert layer["suggested"] == (layer["name"] in found["suggested_layers"])
        assert not layer["in_recipe"]
        assert set(layer["identity"]["neighbours"]) == {"accuracy", "interval_95", "everybody"}
        assert layer["gradient"]["ratio"] == pytest.approx(layer["gradient"]["forget"] / layer["gradient"]["retain"])

    text = inspected("tiny", "--recipe", recipe_file, "--set", "seed=2").stdout
    marked = [line.split()[0] for line in text.splitlines() if line.endswith("  distil")]
    assert marked == found["suggested_layers"]
    assert found["rule"] in text and "chance 16.7%" in text and "the recipe has vision.77" in text


def test_a_recipe_whose_people_have_one_photo_each_is_shown_without_a_suggestion(
    recipe_file: str, tmp_path: Path
) -> None:
    kept = inspected("--recipe", recipe_file, "--json")
    assert kept.exit_code == 0
    (model,) = (folder for folder in (tmp_path / "cache" / "taught").iterdir() if folder.is_dir())
    for i, subject in enumerate("ab"):
        picture(48, 48, seed=i).save(tmp_path / f"{subject}.png")
        picture(48, 48, seed=5 + i).save(tmp_path / f"{subject}2.png")
    rows = [
        {"image": f"{s}{n}.png", "question": "Who?", "answer": s, "subject": s, "split": "train" if n == "" else "test"}
        for s in "ab"
        for n in ("", "2")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    own = f"data={{kind: jsonl, rows: {tmp_path / 'rows.jsonl'}, forget: [a]}}"
    sets = [word for each in ("teach=null", f"model.source={model}", own) for word in ("--set", each)]
    done = inspected("--recipe", recipe_file, *sets)
    assert done.exit_code == 0, done.output
    assert "not measured and nothing suggested" in done.stdout and "suggested: none" in done.stdout
    found = json.loads(inspected("--recipe", recipe_file, *sets, "--json").stdout)
    assert found["suggested_layers"] == [] and {str(layer["identity"]) for layer in found["layers"]} == {"None"}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((), "give a MODEL, or --recipe"),
        (("tiny:qwen_vl", "--set", "seed=1"), "--set goes with --recipe"),
        (("--recipe", "RECIPE", "--adapter", "qwen_vl"), "--set adapter=qwen_vl"),
        (("other/model", "--recipe", "RECIPE"), "MODEL other/model: the recipe's own is tiny"),
        (("--recipe", "nothing"), "nothing: no such recipe"),
        (("--recipe", "RECIPE", "--set", "model.device=cuda:9"), "cuda:9"),
    ],
)
def test_a_mistake_is_one_line(recipe_file: str, arguments: tuple[str, ...], fragment: str) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("ends when the machine has no GPU")
    done = inspected(*(recipe_file if word == "RECIPE" else word for word in arguments))
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert fragment in done.stderr
