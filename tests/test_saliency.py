from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, make_recipe, texts_of, weights
from torch import Tensor, nn

from vkd_framework import saliency
from vkd_framework.errors import DataError, RecipeError
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.recipe import MaskConfig, Recipe
from vkd_framework.saliency import Mask, build_mask, count, cut, load_mask, ratio_scores, save_mask
from vkd_framework.types import Splits
from vkd_framework.unlearn import unlearn

VISUAL = ("encoder", "projector")


def scored(mllm: MLLM, splits: Splits, *, squared: bool = True) -> dict[str, Tensor]:
    parameters = trainable(mllm, VISUAL)
    return saliency.accumulate(mllm, splits.forget[:6], parameters, squared=squared, batch_size=3, what="saliency")


def built(mllm: MLLM, splits: Splits, *, seed: int = 0, **settings: object) -> Mask:
    config = MaskConfig.model_validate({"pairs": 8, **settings})
    return build_mask(mllm, config, trainable(mllm, VISUAL), splits.forget, splits.retain, seed=seed, batch_size=8)


def same(one: Mask, other: Mask) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def share(mask: Mask) -> float:
    return count(mask) / sum(m.numel() for m in mask.values())


def test_saliency_is_the_mean_squared_gradient_of_the_answers(student: MLLM, splits: Splits) -> None:
    found = scored(student, splits)
    parameters = trainable(student, VISUAL)
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for pairs in (splits.forget[:3], splits.forget[3:6]):
        batch = student.tokenize(pairs)
        logits = student.model(**batch.inputs).logits
        per_sample = [
            nn.functional.cross_entropy(logits[b, :-1], batch.labels[b, 1:], ignore_index=-100) for b in range(3)
        ]
        student.model.zero_grad()
        torch.stack(per_sample).mean().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                expected[name] += parameter.grad.square() / 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_half_precision_model_are_squared_and_summed_in_float32(
    student: MLLM, splits: Splits, dtype: torch.dtype
) -> None:
    student.model.to(dtype)
    parameters = trainable(student, VISUAL)

    def found(*, squared: bool, batch_size: int) -> Tensor:
        scores = saliency.accumulate(
            student, splits.forget[:6], parameters, squared=squared, batch_size=batch_size, what="saliency"
        )
        assert {score.dtype for score in scores.values()} == {torch.float32}
        return torch.cat([score.flatten() for score in scores.values()])

    plain, squares = found(squared=False, batch_size=6), found(squared=True, batch_size=6)
    assert torch.equal(squares, plain.square())
    assert (squares.to(dtype).float() != squares).any()  # half precision would have lost something
    summed = found(squared=True, batch_size=2)
    assert not torch.equal(summed, summed.to(dtype).float())


def test_no_gradient_is_ever_allocated_for_the_language_model(student: MLLM, splits: Splits) -> None:
    parameters = trainable(student, VISUAL)
    seen: list[str] = []
    for name, parameter in student.parameters(["language_model"]).items():
        assert not parameter.requires_grad
        if parameter.grad is not None:
            seen.append(name)
    built(student, splits, kind="ratio", threshold=1.0)
    seen += [
        name for name, p in student.parameters(["language_model"]).items() if p.grad is not None or p.requires_grad
    ]
    assert not seen
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_parameter_that_influences_no_answer_counts_as_zero(student: MLLM, splits: Splits) -> None:
    student.model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    parameters = {**trainable(student, VISUAL), "spare": student.model.get_parameter("spare")}
    found = saliency.accumulate(student, splits.forget[:2], parameters, squared=True, batch_size=2, what="saliency")
    assert found["spare"].tolist() == [0, 0, 0]
    assert all(score.any() for name, score in found.items() if name != "spare")


def test_text_only_pairs_have_no_visual_saliency(student: MLLM, splits: Splits) -> None:
    parameters = trainable(student, VISUAL)
    text = splits.columns["retain_qa"][:2]
    found = saliency.accumulate(student, text, parameters, squared=True, batch_size=2, what="saliency")
    assert not any(score.any() for score in found.values())


def test_the_density_is_hit_exactly_when_no_scores_tie() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    scores = {"a": order[:300].view(30, 10), "b": order[300:]}
    for density, kept in ((0.001, 1), (0.1, 100), (0.3333, 333), (1.0, 1000)):
        mask = cut(scores, density=density)
        assert count(mask) == kept
        lowest = min(float(scores[n][m].min()) for n, m in mask.items() if m.any())
        assert lowest == 1000 - kept


def test_ties_at_the_cut_are_kept_together() -> None:
    assert count(cut({"a": torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])}, density=0.4)) == 4


def test_a_threshold_keeps_scores_that_reach_it() -> None:
    mask = cut({"a": torch.tensor([0.5, 1.0, 2.0])}, threshold=1.0)
    assert mask["a"].tolist() == [False, True, True]


def test_the_ratio_is_forget_over_retain_and_survives_a_retain_score_of_zero() -> None:
    forget = {"w": torch.tensor([4.0, 1.0, 0.0, 5.0])}
    retain = {"w": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    scores = ratio_scores(forget, retain, "weight")["w"]
    assert scores[:3].tolist() == pytest.approx([4.0, 0.5, 0.0], rel=1e-2)
    assert scores.isfinite().all()
    assert scores[3] > scores[0]


@pytest.mark.parametrize("scale", [1e8, 1e-20])
def test_the_ratio_mask_does_not_depend_on_the_size_of_the_gradients(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    forget, retain = ({"w": torch.rand(100, generator=generator)} for _ in range(2))
    scaled = ratio_scores({"w": forget["w"] * scale}, {"w": retain["w"] * scale}, "weight")
    assert same(cut(scaled, threshold=1.0), cut(ratio_scores(forget, retain, "weight"), threshold=1.0))


@pytest.mark.parametrize("kind", ["ratio", "salun", "random"])
def test_neuron_granularity_masks_whole_rows(student: MLLM, splits: Splits, kind: str) -> None:
    mask = built(student, splits, kind=kind, granularity="neuron", density=0.3)
    matrices = [m.flatten(1) for m in mask.values() if m.dim() > 1]
    assert all((rows.all(dim=1) | ~rows.any(dim=1)).all() for rows in matrices)
    assert any(rows.any() and not rows.all() for rows in matrices)
    assert share(mask) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("kind", ["ratio", "salun", "random"])
def test_every_kind_of_mask_has_the_density_that_was_asked_for(student: MLLM, splits: Splits, kind: str) -> None:
    mask = built(student, splits, kind=kind, density=0.2)
    assert share(mask) == pytest.approx(0.2, abs=1e-5)
    assert {name: m.shape for name, m in mask.items()} == {n: p.shape for n, p in student.parameters(VISUAL).items()}


def test_the_salun_mask_holds_the_steepest_weights_of_the_forget_set(student: MLLM, splits: Splits) -> None:
    mask = built(student, splits, kind="salun", density=0.1, pairs=1000)
    parameters = trainable(student, VISUAL)
    forget = saliency.accumulate(student, splits.forget, parameters, squared=False, batch_size=30, what="saliency")
    kept = torch.cat([forget[name].abs()[m] for name, m in mask.items()])
    left = torch.cat([forget[name].abs()[~m] for name, m in mask.items()])
    assert kept.mean() > 3 * left.mean()


def test_neither_short_rows_nor_vectors_are_left_out_of_a_salun_mask_of_neurons(student: MLLM, splits: Splits) -> None:
    by_weight, by_row = (
        built(student, splits, kind="salun", density=0.5, granularity=granularity)
        for granularity in ("weight", "neuron")
    )
    vectors = [name for name, m in by_row.items() if m.dim() == 1]
    single, whole = (share({name: mask[name] for name in vectors}) for mask in (by_weight, by_row))
    assert whole > single / 2


def test_random_masks_of_one_density_differ_by_seed_only(student: MLLM, splits: Splits) -> None:
    one, again, other = (built(student, splits, kind="random", density=0.5, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)
    assert count(one) == count(other)


def test_the_pairs_that_saliency_is_taken_from_are_drawn_by_the_seed(student: MLLM, splits: Splits) -> None:
    one, again, other = (built(student, splits, kind="ratio", density=0.3, pairs=3, seed=seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("kind", ["ratio", "salun", "random"])
def test_what_no_answer_depends_on_may_not_move_and_is_no_part_of_the_density(
    splits: Splits, kind: str, granularity: str
) -> None:
    mllm = load_adapter("llava").tiny_model(texts_of(splits), 48, 0)
    unread = mllm.layer("vision.2")
    assert not unread.reaches_language_model
    mask = built(mllm, splits, kind=kind, granularity=granularity, density=0.8)
    dead = {name for name in mask if name.startswith(f"{unread.path}.") or "post_layernorm" in name}
    assert not any(mask[name].any() for name in dead)
    live = {name: m for name, m in mask.items() if name not in dead}
    assert share(live) == pytest.approx(0.8, abs=1e-3 if granularity == "weight" else 0.03)


def test_a_random_mask_is_as_large_as_a_salient_one_of_the_same_density(splits: Splits) -> None:
    mllm = load_adapter("llava").tiny_model(texts_of(splits), 48, 0)
    masks = [built(mllm, splits, kind=kind, density=0.3) for kind in ("random", "ratio", "salun")]
    sizes = [count(mask) for mask in masks]
    assert max(sizes) - min(sizes) <= 2  # scores that tie at the cut are kept together


@pytest.mark.parametrize(("settings", "word"), [({"threshold": 1e30}, "none"), ({"threshold": 1e-30}, "all")])
def test_a_mask_that_selects_nothing_or_everything_is_an_error(
    student: MLLM, splits: Splits, settings: dict[str, float], word: str
) -> None:
    for parameter in student.parameters(VISUAL).values():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    if word == "all":  # leave no weight without gradient
        with pytest.raises(RecipeError, match="mask: selects all"):
            build_mask(
                student,
                MaskConfig.model_validate({"kind": "ratio", "pairs": 8, **settings}),
                {"p": next(p for n, p in trainable(student, VISUAL).items() if "merger" in n and p.dim() == 1)},
                splits.forget,
                splits.retain,
                seed=0,
            )
    else:
        with pytest.raises(RecipeError, match=r"mask: selects none.*mask\.kind=none"):
            built(student, splits, kind="ratio", **settings)


def test_a_saved_mask_is_read_back_exactly_and_takes_a_bit_a_weight(tmp_path: Path, tiny: MLLM) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = tiny.parameters(VISUAL)
    mask = {name: torch.rand(p.shape, generator=generator) > 0.5 for name, p in parameters.items()}
    path = tmp_path / "mask.safetensors"
    save_mask(path, mask, {"recipe": "x"})
    assert same(load_mask(path, parameters), mask)
    size = sum(p.numel() for p in parameters.values())
    assert size / 8 <= path.stat().st_size < size / 8 + 200 * len(parameters) + 2000


def test_a_mask_of_other_names_or_shapes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    save_mask(path, {"w": torch.ones(3, 5, dtype=torch.bool)}, {})
    for other in (
        {"v": nn.Parameter(torch.ones(3, 5))},
        {"w": nn.Parameter(torch.ones(5, 3))},
        {},
        {"w": nn.Parameter(torch.ones(3, 5)), "more": nn.Parameter(torch.ones(1))},
    ):
        with pytest.raises(DataError, match=r"mask\.safetensors"):
            load_mask(path, other)


def trained_with(
    mllm: MLLM, splits: Splits, recipe: Recipe, tmp_path: Path
) -> tuple[Mask, dict[str, Tensor], dict[str, Tensor]]:
    """The recipe's mask, and the trained parameters before and after unlearning under it."""
    parameters = trainable(mllm, VISUAL)
    config = recipe.mask.model_copy(update={"pairs": 8})
    mask = build_mask(mllm, config, parameters, splits.forget, splits.retain, seed=0, batch_size=8)
    before = {name: p.detach().clone() for name, p in mllm.parameters(VISUAL).items()}
    unlearn(mllm, recipe, splits, mask, resume=tmp_path / "state.pt", record=lambda _: None)
    return mask, before, {name: p.detach() for name, p in mllm.parameters(VISUAL).items()}


def test_with_scope_all_masked_weights_stay_bit_identical_under_momentum_and_decay(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    recipe = make_recipe(
        mask={"kind": "random", "density": 0.3, "scope": "all"},
        unlearn={
            "steps": 3,
            "warmup": 0,
            "forget_batch": 2,
            "retain_batch": 2,
            "weight_decay": 0.1,
            "learning_rate": 0.01,
        },
    )
    mask, before, after = trained_with(student, splits, recipe, tmp_path)
    for name, m in mask.items():
        assert torch.equal(before[name][~m], after[name][~m])
    assert any((before[name][m] != after[name][m]).any() for name, m in mask.items())


def test_with_scope_forget_the_forget_terms_alone_move_no_masked_weight(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    recipe = make_recipe(
        mask={"kind": "random", "density": 0.3, "scope": "forget"},
        losses={"forget_output": {"cap": 50.0}, "retain_output": {"weight": 0}, "attract": {"weight": 0}},
    )
    mask, before, after = trained_with(student, splits, recipe, tmp_path)
    for name, m in mask.items():
        assert torch.equal(before[name][~m], after[name][~m])
    assert any((before[name][m] != after[name][m]).any() for name, m in mask.items())


def test_with_scope_forget_the_retain_terms_may_move_every_weight(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    recipe = make_recipe(mask={"kind": "random", "density": 0.3, "scope": "forget"})
    mask, before, after = trained_with(student, splits, recipe, tmp_path)
    masked = [(before[name][~m] != after[name][~m]).float().mean() for name, m in mask.items() if (~m).sum() > 100]
    assert min(masked) > 0.5


def test_without_a_mask_nothing_but_the_recipe_decides_what_moves(
    student: MLLM, splits: Splits, tmp_path: Path
) -> None:
    before = weights(student)
    unlearn(student, make_recipe(), splits, None, resume=tmp_path / "state.pt", record=lambda _: None)
    assert set(student.parameters(VISUAL)) >= changed(before, weights(student)) != set()


@pytest.mark.parametrize("scope", ["forget", "all"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("kind", ["ratio", "salun", "random"])
def test_every_kind_granularity_and_scope_stops_what_it_says_it_stops(
    student: MLLM, splits: Splits, tmp_path: Path, kind: str, granularity: str, scope: str
) -> None:
    only_forget = {"forget_output": {"cap": 50.0}, "retain_output": {"weight": 0}, "attract": {"weight": 0}}
    recipe = make_recipe(
        mask={"kind": kind, "granularity": granularity, "density": 0.4, "scope": scope},
        losses=only_forget if scope == "forget" else {},
        unlearn={"steps": 2, "warmup": 0, "forget_batch": 2, "retain_batch": 2},
    )
    mask, before, after = trained_with(student, splits, recipe, tmp_path)
    assert 0.3 < share(mask) < 0.5
    for name, m in mask.items():
        assert torch.equal(before[name][~m], after[name][~m])
    assert any((before[name][m] != after[name][m]).any() for name, m in mask.items())


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_a_threshold_cuts_where_the_ratio_of_two_sums_would_be_cut(
    student: MLLM, splits: Splits, granularity: str
) -> None:
    parameters = trainable(student, ("encoder", "projector"))
    settings = {"kind": "ratio", "threshold": 0.8, "granularity": granularity, "pairs": 6}
    config = MaskConfig.model_validate(settings)
    found = build_mask(student, config, parameters, splits.forget, splits.retain, seed=3, batch_size=2)
    generator = torch.Generator().manual_seed(3)
    forget, retain = (
        saliency.accumulate(
            student, saliency.draw(pairs, 6, generator), parameters, squared=True, batch_size=2, what="saliency"
        )
        for pairs in (splits.forget, splits.retain)
    )
    expected = cut(ratio_scores(forget, retain, granularity), threshold=0.8)
    differing = sum(int((found[name] != expected[name]).sum()) for name in expected)
    assert differing <= count(found) / 10_000  # ties, to the last bit of a float


@pytest.mark.parametrize("squared", [True, False])
def test_a_batch_counts_the_same_however_many_pairs_go_through_the_model_at_once(
    student: MLLM, splits: Splits, monkeypatch: pytest.MonkeyPatch, squared: bool
) -> None:
    parameters = trainable(student, ("encoder", "projector"))
    pairs = [*splits.forget[:5], *splits.text[:2]]

    def scores(part: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(saliency, "PART", part)
        monkeypatch.setattr(saliency, "LARGE", 0)
        return saliency.accumulate(student, pairs, parameters, squared=squared, batch_size=4, what="saliency")

    whole, parts = scores(4), scores(1)
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-3, atol=1e-7)


def test_no_more_than_one_gradient_is_ever_held(student: MLLM, splits: Splits) -> None:
    parameters = trainable(student, ("encoder", "projector"))
    most: list[int] = []
    spied: Any = torch.Tensor.register_post_accumulate_grad_hook
    for parameter in parameters.values():
        spied(parameter, lambda _: most.append(sum(p.grad is not None for p in parameters.values())))
    saliency.accumulate(student, splits.forget[:4], parameters, squared=True, batch_size=2, what="saliency")
    assert len(most) > 10 and max(most) == 1
    assert all(parameter.grad is None for parameter in parameters.values())
