from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import asked_about, changed, make_recipe, picture, weights
from torch import Tensor

from vkd_framework import external, losses, shelf
from vkd_framework.errors import ModelError, RecipeError, VKDError
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.recipe import Recipe, TeacherConfig
from vkd_framework.run import dry_run, run
from vkd_framework.shelf import Shelf
from vkd_framework.substitutes import without_motif
from vkd_framework.teachers import Teacher, guides, kept_pairs, watched
from vkd_framework.types import ImageQuestionPair, Photo, Splits
from vkd_framework.unlearn import unlearn

RETAIN_ONLY = {"kind": "ignorant", "source": "retain_only"}
TIMM = {"kind": "external", "source": "timm/test_vit", "weights": "random"}
LAYERS = ("vision.1", "projector")
FEATURES_ONLY = {"forget_output": {"weight": 0}, "retain_output": {"weight": 0}}


@pytest.fixture
def pairs() -> list[ImageQuestionPair]:
    """Photos of three sizes with a text-only pair between them."""
    return [
        asked_about(picture(48, 48)),
        asked_about(None),
        asked_about(picture(32, 16, seed=1)),
        asked_about(picture(16, 64, seed=2)),
    ]


@pytest.fixture(scope="module")
def stranger(splits: Splits) -> MLLM:
    """Another model of the same architecture, which stands for one that never knew anybody."""
    from conftest import texts_of

    mllm = load_adapter("qwen_vl").tiny_model(texts_of(splits), 48, 7)
    mllm.model.requires_grad_(False)
    return mllm


def teaching(**changes: Any) -> Recipe:
    terms = FEATURES_ONLY | changes.pop("losses", {})
    return make_recipe(losses=terms, reference="retain_only", **changes)


def features(mllm: MLLM, pair: ImageQuestionPair, layer: str) -> Tensor:
    return watched(mllm, [layer], [pair])[pair.photo_keys][layer]


def disturbed(mllm: MLLM) -> MLLM:
    """The model with other visual weights, as after some steps."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(mllm, ("encoder", "projector")).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return mllm


@torch.no_grad()
def test_the_teacher_remembers_what_a_fresh_pass_computes(tiny: MLLM, splits: Splits) -> None:
    pairs = [*splits.forget[:7], *splits.retain[-3:]]
    teacher = Teacher(watched(tiny, LAYERS, pairs, batch_size=3))
    for chosen in (pairs[:1], pairs[2:5], [pairs[9], pairs[0]]):
        for layer in LAYERS:
            fresh = torch.cat([features(tiny, pair, layer) for pair in chosen])
            torch.testing.assert_close(teacher.rows(layer, chosen), fresh, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_teacher_gives_rows_in_the_order_of_the_student(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    teacher = Teacher(watched(tiny, ["vision.0"], pairs))
    shuffled = [pairs[3], pairs[1], pairs[0], pairs[2]]
    expected = torch.cat([features(tiny, pair, "vision.0") for pair in shuffled if pair.photos])
    torch.testing.assert_close(teacher.rows("vision.0", shuffled), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_teacher_does_not_follow_the_student(student: MLLM, pairs: list[ImageQuestionPair]) -> None:
    teacher = Teacher(watched(student, ["projector"], pairs))
    before = teacher.rows("projector", pairs).clone()
    for parameter in student.parameters(["encoder", "projector"]).values():
        parameter.mul_(1.5)
    assert torch.equal(teacher.rows("projector", pairs), before)
    assert not torch.allclose(Teacher(watched(student, ["projector"], pairs)).rows("projector", pairs), before)


def test_the_teachers_features_carry_no_gradient(student: MLLM, pairs: list[ImageQuestionPair]) -> None:
    student.model.requires_grad_(True)
    assert not Teacher(watched(student, ["projector"], pairs)).rows("projector", pairs).requires_grad


def test_features_that_do_not_fit_on_the_disk_are_told_in_one_line(
    tiny: MLLM, pairs: list[ImageQuestionPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Shelf, "_write", full)
    monkeypatch.setattr(shelf.Shelf.__init__, "__defaults__", (0,))
    with pytest.raises(VKDError, match=r"No space left.*VKD_CACHE") as raised:
        watched(tiny, ["vision.0"], pairs)
    assert "\n" not in str(raised.value)


def test_a_teacher_without_layers_holds_nothing(tiny: MLLM, pairs: list[ImageQuestionPair]) -> None:
    assert Teacher(watched(tiny, [], pairs)).bytes == 0
    assert Teacher(watched(tiny, ["projector"], pairs)).bytes > 0


def test_an_ignorant_teacher_gives_the_plain_distance_on_both_sets(tiny: MLLM, stranger: MLLM, splits: Splits) -> None:
    objective = Objective(tiny, teaching(teacher=RETAIN_ONLY), splits, ignorant=lambda: stranger)
    kept = kept_pairs(splits)[:3]
    for chosen, (loss, terms) in (
        (splits.forget[:3], objective.forget(splits.forget[:3])),
        (kept, objective.retain(kept)),
    ):
        expected = []
        for layer in LAYERS:
            ours, theirs = ([features(mllm, pair, layer) for pair in chosen] for mllm in (tiny, stranger))
            expected += [((s - t).square().sum() / t.square().sum()).item() for s, t in zip(ours, theirs, strict=True)]
        (value,) = terms.values()
        assert value == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        assert loss.item() == pytest.approx((0.3 if chosen is not kept else 1) * value, rel=1e-4)  # attract, not repel


def test_an_ignorant_teacher_is_come_nearer_on_both_sets(
    student: MLLM, stranger: MLLM, splits: Splits, tmp_path: Path
) -> None:
    history = unlearn(
        student,
        teaching(teacher=RETAIN_ONLY, unlearn=STEPS),
        splits,
        None,
        resume=tmp_path / "state.pt",
        record=lambda _: None,
        ignorant=lambda: stranger,
    )
    assert history[-1]["attract"] < 0.9 * history[0]["attract"]
    assert history[-1]["repel"] < 0.9 * history[0]["repel"]


def test_an_ignorant_teacher_of_another_size_is_refused_in_one_line(tiny: MLLM, splits: Splits) -> None:
    other = load_adapter("qwen_vl").tiny_model(["What is shown?"], 32, 0)
    other.processor.image_processor.size = {"shortest_edge": 16**2, "longest_edge": 32**2}
    with pytest.raises(
        RecipeError, match=r"teacher\.source: retain_only has features of .* where the student has"
    ) as told:
        guides(tiny, teaching(teacher=RETAIN_ONLY), splits, lambda: other)
    assert "\n" not in str(told.value)


TARGETS = pytest.mark.parametrize("target", ["mean", "stranger", "noise"])


@TARGETS
@pytest.mark.parametrize("distance", list(losses.DISTANCES))
def test_a_substitute_is_come_nearer_and_the_gradient_reaches_the_encoder(
    student: MLLM, splits: Splits, target: str, distance: str
) -> None:
    repel = {"target": target, "distance": distance, "weight": 1.0}
    objective = Objective(student, teaching(losses={"repel": repel}), splits)
    parameters = trainable(student, ("encoder",))
    forget = splits.forget[:4]
    loss, terms = objective.forget(forget)
    assert loss.item() == pytest.approx(terms["repel"], rel=1e-5) and loss.item() > 0
    torch.autograd.backward(loss)
    reached = [parameter for name, parameter in parameters.items() if "blocks.0" in name or "blocks.1" in name]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in reached)
    length = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / length)
    assert objective.forget(forget)[1]["repel"] < terms["repel"]


def test_the_mean_is_the_mean_over_people_who_stay_place_by_place(tiny: MLLM, splits: Splits) -> None:
    found = guides(tiny, teaching(losses={"repel": {"target": "mean"}}), splits).repel
    photos = {pair.photo_keys: pair for pair in kept_pairs(splits)}.values()
    assert not {pair.subject for pair in photos} & set(splits.forget_subjects)
    for layer in LAYERS:
        expected = torch.stack([features(tiny, pair, layer) for pair in photos]).mean(dim=0)
        for pair in splits.forget[:3]:
            torch.testing.assert_close(found.rows(layer, [pair]), expected, atol=1e-5, rtol=1e-4)


def test_a_strangers_features_are_those_of_one_photo_and_stay_the_same(tiny: MLLM, splits: Splits) -> None:
    recipe = teaching(losses={"repel": {"target": "stranger"}})
    one, again = guides(tiny, recipe, splits).repel, guides(tiny, recipe, splits).repel
    shown = {pair.photo_keys: features(tiny, pair, "projector") for pair in kept_pairs(splits)}
    chosen = set()
    for pair in splits.forget:
        rows = one.rows("projector", [pair])
        assert torch.equal(rows, again.rows("projector", [pair]))
        (keys,) = [keys for keys, theirs in shown.items() if torch.allclose(rows, theirs, atol=1e-5)]
        chosen.add(keys)
    assert len(chosen) > 1


def test_noise_has_the_size_the_mean_and_the_spread_of_the_photo_and_nothing_else(splits: Splits) -> None:
    photo = splits.forget[0].photos[0].open()
    noise = without_motif(photo, "seed")
    before, after = (numpy.asarray(image, dtype=float) for image in (photo, noise))
    assert after.shape == before.shape
    assert numpy.abs(after.mean(axis=(0, 1)) - before.mean(axis=(0, 1))).max() < 12
    assert abs(numpy.corrcoef(before.ravel() - before.mean(), after.ravel())[0, 1]) < 0.5
    assert noise.tobytes() == without_motif(photo, "seed").tobytes() != without_motif(photo, "other").tobytes()


def sized(splits: Splits, pairs: Sequence[ImageQuestionPair]) -> Splits:
    """Photos of several sizes: the forgotten one's first."""
    shown = [replace(pair, subject=f"person {i}") for i, pair in enumerate(pairs) if pair.photos]
    return Splits(tuple(shown[:1]), tuple(shown[1:]), splits.columns, ("person 0",), ("person 0", "person 2"))


def test_where_photos_differ_in_size_the_mean_is_one_row(
    tiny: MLLM, splits: Splits, pairs: list[ImageQuestionPair]
) -> None:
    recipe = teaching(losses={"repel": {"target": "mean"}})
    rows = guides(tiny, recipe, sized(splits, pairs)).repel.rows("projector", pairs[:1])
    expected = torch.stack([features(tiny, pair, "projector").mean(dim=0) for pair in pairs[2:]]).mean(dim=0)
    torch.testing.assert_close(rows, expected.expand(len(rows), -1), atol=1e-5, rtol=1e-4)
    assert len(rows) == len(features(tiny, pairs[0], "projector"))


@pytest.mark.parametrize(
    ("repel", "told"),
    [
        ({"target": "stranger"}, r"as many feature rows as .*take mean or noise"),
        ({"target": "mean", "distance": "cka"}, r"photos have \d+ to \d+ rows at .*take relative_squared or cosine"),
    ],
)
def test_targets_that_photos_of_several_sizes_do_not_have_are_refused(
    tiny: MLLM, splits: Splits, pairs: list[ImageQuestionPair], repel: dict[str, str], told: str
) -> None:
    with pytest.raises(RecipeError, match=rf"losses\.repel\.target: .*{told}"):
        guides(tiny, teaching(losses={"repel": repel}), sized(splits, pairs))


def test_noise_is_had_for_photos_of_any_size(tiny: MLLM, splits: Splits, pairs: list[ImageQuestionPair]) -> None:
    found = guides(tiny, teaching(losses={"repel": {"target": "noise"}}), sized(splits, pairs)).repel
    assert found.rows("projector", pairs[:1]).shape == features(tiny, pairs[0], "projector").shape
    assert not torch.allclose(found.rows("projector", pairs[:1]), features(tiny, pairs[0], "projector"), atol=1e-2)


STEPS = {"steps": 12, "learning_rate": 2e-3, "warmup": 0, "forget_batch": 4, "retain_batch": 8, "cosine_share": 0.0}


@pytest.mark.parametrize("source", ["timm/test_vit", "timm/test_resnet", "open_clip/vkd-tiny", "open_clip/vkd-tiny-rn"])
def test_a_foreign_model_gives_a_map_of_each_whole_photo(source: str, tiny_clip: None) -> None:
    config = TeacherConfig.model_validate(TIMM | {"source": source})
    foreign = external.load(config, torch.device("cpu"), 0)
    again = external.load(config, torch.device("cpu"), 0)
    photos = [Photo("wide", picture(96, 32)), Photo("high", picture(20, 50, seed=1))]
    maps = foreign.see(photos)
    assert maps.ndim == 4 and len(maps) == 2 and maps.shape[2] > 1 and not maps.requires_grad
    assert torch.equal(maps, again.see(photos))
    edge = photos[0].open().copy()
    edge.paste((255, 0, 0), (0, 0, 8, 32))  # what a centre crop would cut off
    assert not torch.allclose(foreign.see([Photo("edge", edge)]), maps[:1], atol=1e-5)


def test_what_all_photos_share_is_taken_off_a_foreign_teachers_features(splits: Splits) -> None:
    foreign = external.load(TeacherConfig.model_validate(TIMM), torch.device("cpu"), 0)
    photos = [pair.photos[0] for pair in splits.forget[:6]]
    centred = foreign.centred(photos, batch_size=4).see(photos)
    assert centred.mean(dim=(0, 2, 3)).abs().max() < 1e-4 < foreign.see(photos).mean(dim=(0, 2, 3)).abs().max()
    plain = foreign.see(photos)
    torch.testing.assert_close(centred[0] - centred[1], plain[0] - plain[1], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two CLIP models small enough for a test, made known to open_clip as its own are."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vit = {"image_size": 48, "layers": 2, "width": 64, "patch_size": 8}
    net = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    for name, vision in (("vkd-tiny", vit), ("vkd-tiny-rn", net)):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize("source", ["timm/test_vit", "timm/test_resnet", "open_clip/vkd-tiny"])
@pytest.mark.parametrize("distance", list(losses.DISTANCES))
def test_every_distance_to_a_foreign_teacher_falls_and_reaches_the_encoder(
    student: MLLM, splits: Splits, tiny_clip: None, source: str, distance: str
) -> None:
    terms = {"attract": {"distance": distance}, "repel": {"distance": distance}}
    recipe = teaching(teacher=TIMM | {"source": source}, losses=terms)
    objective = Objective(student, recipe, splits)
    parameters = trainable(student, ("encoder",))
    kept = kept_pairs(splits)[:6]
    loss, before = objective.retain(kept)
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert length > 0
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / length)
    assert objective.retain(kept)[1]["attract"] < before["attract"]


def test_a_map_is_learnt_by_attract_alone_and_leaves_nothing_behind(student: MLLM, splits: Splits) -> None:
    names = [name for name, _ in student.model.named_parameters()]
    objective = Objective(student, teaching(teacher=TIMM), splits)
    trainable(student, ("encoder", "projector"))
    assert len(objective.learned) == 2 * len(LAYERS)
    torch.autograd.backward(objective.forget(splits.forget[:3])[0])
    assert all(parameter.grad is None for parameter in objective.learned.values())
    torch.autograd.backward(objective.retain(kept_pairs(splits)[:3])[0])
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.learned.values())
    assert [name for name, _ in student.model.named_parameters()] == names


@pytest.mark.parametrize("teacher", [{"kind": "self"}, TIMM])
def test_relational_distances_need_no_map(tiny: MLLM, splits: Splits, teacher: dict[str, str]) -> None:
    terms = {"attract": {"distance": "cka"}, "repel": {"distance": "similarity"}, "forget_output": {"weight": 1.0}}
    objective = Objective(tiny, teaching(teacher=teacher, losses=terms), splits)
    assert objective.learned == {}
    assert 0 <= objective.retain(kept_pairs(splits)[:3])[1]["attract"] <= 1


def test_a_map_fits_better_than_chance_from_the_first_step_on(tiny: MLLM, splits: Splits) -> None:
    objective = Objective(tiny, teaching(teacher=TIMM), splits)
    assert objective.retain(kept_pairs(splits)[:6])[1]["attract"] < 0.5


def test_a_resumed_run_goes_on_with_the_map_it_had(tiny: MLLM, splits: Splits, tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for whatever ends a process in the middle of a run."""

    def kill(_: object) -> None:
        raise Killed

    recipe = teaching(teacher=TIMM, unlearn=STEPS | {"steps": 4, "checkpoint_every": 2})
    straight, resumed = tiny.copy(), tiny.copy()
    expected = unlearn(straight, recipe, splits, None, resume=tmp_path / "one.pt", record=lambda _: None)
    with pytest.raises(Killed):
        unlearn(tiny.copy(), recipe, splits, None, resume=tmp_path / "two.pt", record=kill)
    history = unlearn(resumed, recipe, splits, None, resume=tmp_path / "two.pt", record=lambda _: None)
    assert history == expected
    assert not changed(weights(straight), weights(resumed))


@pytest.mark.parametrize("adapter", ["llava", "internvl", "idefics"])
def test_a_foreign_teacher_is_laid_over_the_rows_of_every_family(adapter: str, splits: Splits) -> None:
    from conftest import texts_of

    mllm = load_adapter(adapter).tiny_model(texts_of(splits), 48, 0)
    layers = ["vision.0", "projector"]
    recipe = teaching(adapter=adapter, layers=layers, teacher=TIMM, losses={"attract": {"distance": "cka"}})
    found = guides(mllm, recipe, splits)
    pair = splits.forget[0]
    for layer in layers:
        assert len(found.repel.rows(layer, [pair])) == len(features(mllm, pair, layer))


@pytest.mark.parametrize(
    ("source", "weights_", "told"),
    [
        ("timm/test_vitt", "random", "timm has no model 'test_vitt'; did you mean 'test_vit"),
        ("timm/test_vit.nothing", "random", "timm has no weights 'test_vit.nothing'; there are test_vit."),
        ("open_clip/ViT-B-23", "random", "open_clip has no model 'ViT-B-23'; did you mean 'ViT-B-32'"),
        ("open_clip/ViT-B-32", "pretrained", "name the weights; write open_clip/ViT-B-32/TAG, with TAG a file or one"),
        ("open_clip/ViT-B-32/openay", "pretrained", "no weights 'openay' of ViT-B-32; did you mean 'openai'"),
    ],
)
def test_a_foreign_model_that_nobody_knows_is_refused_before_anything_is_taught(
    source: str, weights_: str, told: str
) -> None:
    with pytest.raises(RecipeError) as error:
        external.check(TeacherConfig.model_validate(TIMM | {"source": source, "weights": weights_}))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_weights_that_cannot_be_had_are_told_in_one_line() -> None:
    config = TeacherConfig(kind="external", source="timm/test_vit.r160_in1k")
    with pytest.raises(ModelError, match=r"teacher\.source: timm/test_vit\.r160_in1k cannot be loaded") as error:
        external.load(config, torch.device("cpu"), 0)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_had_are_told_before_anything_is_taught_or_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = "teacher={kind: external, source: open_clip/ViT-S-32-alt, weights: random}"
    assert dry_run("qwen2vl_celeb", (teacher,))
    teacher = "teacher={kind: external, source: open_clip/ViT-B-32/openai}"
    with pytest.raises(ModelError, match="cannot be loaded"):
        run("qwen2vl_celeb", (teacher, "data={kind: celebs, people: 5, forget: 1, extras: 4}"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""


def test_an_ignorant_model_that_is_not_there_or_of_another_family_is_refused_at_once(tmp_path: Path) -> None:
    other = load_adapter("llava").tiny_model(["What is shown?"], 48, 0)
    other.model.config.save_pretrained(tmp_path / "other")
    for source, told in ((tmp_path / "nowhere", "nowhere"), (tmp_path / "other", "the model is of type 'llava'")):
        with pytest.raises(ModelError, match=told):
            dry_run("qwen2vl_celeb", (f"teacher={{kind: ignorant, source: {source}}}",))


def test_a_missing_package_is_told_with_the_command_that_installs_it() -> None:
    check = "external.check(TeacherConfig(kind='external', source='timm/test_vit'))"
    command = (
        "import sys; sys.modules['timm'] = None\nfrom vkd_framework import external\n"
        f"from vkd_framework.recipe import TeacherConfig\ntry: {check}\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert 'pip install "vkd-framework[teachers]"' in done.stdout
