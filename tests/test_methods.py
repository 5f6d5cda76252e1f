from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import changed, make_recipe, mean_loss, weights

from vkd_framework import saliency
from vkd_framework.answers import refused, relabelled
from vkd_framework.cli import main
from vkd_framework.errors import DivergedError, RecipeError
from vkd_framework.forgetting import ForgetOutput
from vkd_framework.methods import METHODS, OWNED
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.pruning import build_prune_mask, prune
from vkd_framework.recipe import REFUSALS, Recipe, load_recipe
from vkd_framework.run import dry_run
from vkd_framework.saliency import Mask, build_mask
from vkd_framework.types import PARTS, ImageQuestionPair, Splits
from vkd_framework.unlearn import History, unlearn

TRAINED = [name for name, method in METHODS.items() if method.values.get("procedure", "tune") == "tune"]
ALONE = ("ga", "npo")
"""Methods that look at the forget set alone."""
SHORT = {"steps": 8, "learning_rate": 3e-3, "warmup": 0, "forget_batch": 5, "retain_batch": 5, "phases": [{"share": 1}]}


def of_method(name: str, **changes: Any) -> Recipe:
    return make_recipe(method=name, **{"unlearn": SHORT, **changes})


def tuned(
    mllm: MLLM, splits: Splits, recipe: Recipe, folder: Path, record: Callable[[History], None] = lambda _: None
) -> History:
    """The run of a recipe as `run` does it, mask included."""
    mask: Mask | None = None
    if recipe.mask.kind != "none":
        parameters = trainable(mllm, recipe.train)
        mask = build_mask(mllm, recipe.mask, parameters, splits.forget, splits.retain, seed=0, text=splits.text)
    return unlearn(mllm, recipe, splits, mask, resume=folder / "state.pt", record=record)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_valid_recipe_and_cites_its_source(name: str) -> None:
    recipe = load_recipe("qwen2vl_celeb", [f"method={name}"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert "arXiv" in METHODS[name].source and METHODS[name].summary
    assert name == "vkd" or METHODS[name].differs
    assert {".".join(path) for path in paths_of(METHODS[name].values)} <= set(OWNED)


def paths_of(values: Any) -> list[tuple[str, ...]]:
    """Keys that a method sets, as deep as `OWNED` names them."""
    return [("unlearn", key) for key in values.get("unlearn", {})] + [(key,) for key in values if key != "unlearn"]


def test_one_method_leaves_nothing_behind_for_the_next() -> None:
    for first in METHODS:
        for second in ("vkd", "ga", "retain_only"):
            there = load_recipe("qwen2vl_celeb", [f"method={first}", f"method={second}"])
            assert there == load_recipe("qwen2vl_celeb", [f"method={second}"]), (first, second)


def test_methods_without_feature_terms_need_no_layers() -> None:
    for name in ("ga_diff", "manu", "retain_only"):
        assert of_method(name, layers=[]).distilled == ()
    assert of_method("vkd").distilled == ("vision.1", "projector")


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_makes_forgotten_answers_unlikely_and_keeps_what_it_looks_at(
    knowing: MLLM, few: Splits, tmp_path: Path, name: str
) -> None:
    mllm, recipe = knowing.copy(), of_method(name)
    before, start = mean_loss(mllm, few.forget), weights(mllm)
    history = tuned(mllm, few, recipe, tmp_path)
    after, moved = mean_loss(mllm, few.forget), changed(start, weights(mllm))
    assert after > before + 1  # each token e times less likely
    if name not in ALONE:
        assert mean_loss(mllm, few.retain) < 1
    language = set(mllm.parts["language_model"])
    assert bool(moved & language) == ("language_model" in recipe.train)
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    assert ("retain_output" in history[0]) == (name not in ALONE)


def test_manu_makes_forgotten_answers_unlikelier_without_training(knowing: MLLM, few: Splits) -> None:
    mllm, recipe = knowing.copy(), of_method("manu", prune={"share": 0.15})
    rises = {}
    mask = build_prune_mask(mllm, recipe.prune, recipe.train, few.forget, few.retain, seed=0)
    before = {"forget": mean_loss(mllm, few.forget), "retain": mean_loss(mllm, few.retain)}
    prune(mllm.parameters(recipe.train), mask)
    for which, pairs in (("forget", few.forget), ("retain", few.retain)):
        rises[which] = mean_loss(mllm, pairs) - before[which]
    assert rises["forget"] > max(0.05, rises["retain"])


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a run."""


@pytest.mark.parametrize("name", ["npo", "kl_min", pytest.param("mmunlearner", marks=pytest.mark.slow)])
def test_a_resumed_baseline_still_compares_with_the_starting_model(
    knowing: MLLM, few: Splits, tmp_path: Path, name: str
) -> None:
    recipe = of_method(name, unlearn={**SHORT, "steps": 4, "checkpoint_every": 2})
    straight, killed, resumed = knowing.copy(), knowing.copy(), knowing.copy()
    expected = tuned(straight, few, recipe, tmp_path / "straight")

    def kill(_: History) -> None:
        raise Killed

    with pytest.raises(Killed):
        tuned(killed, few, recipe, tmp_path / "killed", kill)
    assert tuned(resumed, few, recipe, tmp_path / "killed") == expected
    assert not changed(weights(straight), weights(resumed))


def supervised(mllm: MLLM, pairs: list[ImageQuestionPair]) -> list[str]:
    """What the labels of each pair spell."""
    return [mllm.processor.tokenizer.decode(row[row != -100]) for row in mllm.tokenize(pairs).labels]


@pytest.mark.parametrize("name", ["idk_po", "salun"])
def test_the_answers_taught_instead_are_supervised_and_nothing_else_is(tiny: MLLM, few: Splits, name: str) -> None:
    """Neither question nor image placeholders, which are most of what public code supervises."""
    term = ForgetOutput(tiny, of_method(name), few, None)
    pairs = term.targets(few.forget)
    end = tiny.processor.tokenizer.decode([tiny.stop_ids[0]])
    assert supervised(tiny, pairs) == [f"{pair.answer}{end}" for pair in pairs]
    assert all(new.answer != old.answer for new, old in zip(pairs, few.forget, strict=True))
    assert all(new.photos == old.photos for new, old in zip(pairs, few.forget, strict=True))
    assert term.targets(few.retain) == list(few.retain)


def test_refusals_are_drawn_from_the_recipes_and_are_the_same_every_time(few: Splits) -> None:
    first, again, other = (refused(few.forget, REFUSALS, seed) for seed in (0, 0, 1))
    answers = [pair.answer for pair in first.values()]
    assert set(answers) <= set(REFUSALS) and len(set(answers)) > 1
    assert answers == [pair.answer for pair in again.values()] != [pair.answer for pair in other.values()]


def test_a_wrong_answer_comes_from_the_options_or_from_others_asked_the_same(splits: Splits) -> None:
    drawn = relabelled(splits.forget, (), seed=0)
    assert len(drawn) == len(splits.forget)
    for pair in splits.forget:
        assert drawn[pair.id].answer in set(pair.options) - {pair.answer}
    bare = [replace(pair, options=()) for pair in splits.forget]
    others = {(pair.question, pair.answer) for pair in splits.retain}
    from_others = relabelled(bare, splits.retain, seed=0)
    assert len(from_others) == len(bare)
    for pair in bare:
        assert (pair.question, from_others[pair.id].answer) in others
        assert from_others[pair.id].answer != pair.answer


def test_no_wrong_answer_is_true_of_the_same_person_on_another_photo(few: Splits) -> None:
    first, second, third = (
        replace(few.forget[0], id=str(i), answer=answer, options=()) for i, answer in enumerate("abc")
    )
    other = replace(first, id="other", subject="somebody else", answer="d")
    drawn = relabelled((first, second, third), (other, first, second, third), seed=0)
    assert [pair.answer for pair in drawn.values()] == ["d"] * 3
    nobody = [replace(pair, subject=None) for pair in (first, second, third)]
    assert {pair.answer for pair in relabelled(nobody, (other, *nobody), seed=0).values()} - {"d"}


def test_without_any_wrong_answer_relabelling_is_refused_in_one_line(tiny: MLLM, few: Splits) -> None:
    alone = replace(few, forget=(replace(few.forget[0], question="Only asked here?", options=()),))
    with pytest.raises(RecipeError, match="relabel finds no wrong answer") as caught:
        ForgetOutput(tiny, of_method("salun"), alone, None)
    assert "\n" not in str(caught.value)


def test_at_the_start_npo_is_its_constant_and_the_divergence_is_zero(knowing: MLLM, few: Splits) -> None:
    loss, _ = Objective(knowing.copy(), of_method("npo"), few).forget(few.forget[:4])
    assert loss.item() == pytest.approx(2 / 0.4 * math.log(2), rel=1e-4)
    _, terms = Objective(knowing.copy(), of_method("kl_min"), few).retain(few.retain[:4])
    assert terms["retain_kl"] == pytest.approx(0, abs=1e-6)


def test_npo_compares_sums_over_whole_answers_with_the_model_that_the_recipe_names(
    knowing: MLLM, tiny: MLLM, few: Splits
) -> None:
    losses = {"forget_output": {"reference": "retain_only"}}
    recipe = of_method("npo", reference="retain_only", losses=losses)
    loss, _ = Objective(knowing.copy(), recipe, few, reference=lambda: tiny).forget(few.forget[:3])

    @torch.no_grad()
    def log_probability(mllm: MLLM, pair: ImageQuestionPair) -> float:
        batch = mllm.tokenize([pair])
        (places,) = (batch.labels[0] != -100).nonzero(as_tuple=True)
        logs = mllm.model(**batch.inputs).logits[0].log_softmax(-1)
        return sum(float(logs[at - 1, batch.labels[0, at]]) for at in places)

    odds = [log_probability(knowing, pair) - log_probability(tiny, pair) for pair in few.forget[:3]]
    expected = 2 / 0.4 * sum(math.log(1 + math.exp(0.4 * each)) for each in odds) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_the_divergence_grows_as_the_model_moves_and_its_reference_stays(knowing: MLLM, few: Splits) -> None:
    mllm, recipe = knowing.copy(), of_method("kl_min")
    objective = Objective(mllm, recipe, few)
    apart = []
    for _ in range(3):
        apart.append(objective.retain(few.retain[:4])[1]["retain_kl"])
        for parameter in mllm.model.parameters():
            parameter.data.mul_(1.02)
    assert apart == sorted(apart) and apart[-1] > 1e-4


def test_the_frozen_copy_holds_no_second_set_of_what_is_not_trained(knowing: MLLM, few: Splits) -> None:
    mllm = knowing.copy()
    losses = {"retain_kl": {"weight": 1}}
    objective = Objective(mllm, make_recipe(train=["projector"], losses=losses), few)
    assert objective._vanilla is not None
    own, copied = (dict(one.model.named_parameters()) for one in (mllm, objective._vanilla))
    assert {name for name in own if own[name] is not copied[name]} == set(mllm.parts["projector"])


@pytest.mark.parametrize(("tokens", "extra"), [("content", 0), ("answer", 1)])
def test_the_token_that_ends_an_answer_is_forgotten_where_the_recipe_says_so(
    tiny: MLLM, few: Splits, tokens: str, extra: int
) -> None:
    recipe = make_recipe(losses={"forget_output": {"form": "ascent", "tokens": tokens}})
    term = ForgetOutput(tiny, recipe, few, None)
    batch = tiny.tokenize(few.forget[:1])
    logits = torch.zeros(*batch.labels.shape, tiny.model.get_output_embeddings().out_features, requires_grad=True)
    term.loss(few.forget[:1], batch, logits)[0].backward()
    assert logits.grad is not None
    touched = int(logits.grad.abs().sum(-1).count_nonzero())
    assert touched == int(batch.content.sum()) + extra


def everywhere(mllm: MLLM, splits: Splits, **changes: object) -> Mask:
    recipe = of_method("mmunlearner")
    config = recipe.mask.model_copy(update={"pairs": 8, **changes})
    return build_mask(
        mllm, config, trainable(mllm, recipe.train), splits.forget, splits.retain, seed=0, text=splits.text
    )


def test_a_mask_over_every_part_covers_every_trained_parameter(student: MLLM, splits: Splits) -> None:
    """Public code has masks whose names match nothing that is trained, and leaves parameters outside of them free."""
    mask = everywhere(student, splits)
    assert set(mask) == {name for name, _ in student.model.named_parameters()}
    inside = {part: sum(int(mask[name].sum()) for name in student.parts[part]) for part in PARTS}
    assert all(0 < inside[part] < student.count([part]) for part in PARTS)


def test_text_only_questions_count_as_preserved_where_the_mask_says_so(student: MLLM, splits: Splits) -> None:
    assert splits.text and not any(pair.photos for pair in splits.text)
    measured = {pair.question for name in ("forget_qa", "retain_qa") for pair in splits.columns[name]}
    assert not measured & {pair.question for pair in splits.text}
    without, with_text = (everywhere(student, splits, preserve=kind) for kind in ("retain", "retain_and_text"))
    language = student.parts["language_model"]
    assert any(not torch.equal(without[name], with_text[name]) for name in language)


def test_the_forget_gradient_moves_no_masked_weight_of_any_part(student: MLLM, splits: Splits, tmp_path: Path) -> None:
    recipe = of_method("mmunlearner", losses={"retain_output": {"weight": 0}}, unlearn={**SHORT, "steps": 2})
    mask = everywhere(student, splits)
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    unlearn(student, recipe, splits, mask, resume=tmp_path / "state.pt", record=lambda _: None)
    moved = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        for name, parameter in student.parameters([part]).items():
            assert torch.equal(parameter[~mask[name]], before[name][~mask[name]]), name
            moved[part] += int((parameter != before[name]).sum())
    assert all(moved.values())


def test_a_mask_changes_what_mmunlearner_does(knowing: MLLM, few: Splits, tmp_path: Path) -> None:
    ends = []
    for name in ("mmunlearner", "ga_diff"):
        mllm = knowing.copy()
        tuned(mllm, few, of_method(name, unlearn={**SHORT, "steps": 1}), tmp_path / name)
        ends.append(weights(mllm))
    assert changed(*ends)


def test_a_loss_that_is_no_number_ends_the_run_in_one_line_before_the_weights_take_it_in(
    knowing: MLLM, few: Splits, tmp_path: Path
) -> None:
    mllm = knowing.copy()
    mllm.model.get_parameter(mllm.parts["projector"][0]).data.view(-1)[0] = math.nan
    before = weights(mllm)
    with pytest.raises(DivergedError, match=r"at step 0 forget_output is nan.*lower unlearn.learning_rate") as caught:
        tuned(mllm, few, of_method("ga"), tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 1
    assert not changed(before, weights(mllm))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("ga_diff", ("trains", "100.00%", "frozen   nothing", "distils  nothing"), marks=pytest.mark.slow),
        pytest.param("kl_min", ("retain, as before", "0 MFLOP back", "100.00%"), marks=pytest.mark.slow),
        pytest.param(
            "manu", ("prunes   vision encoder and language model", "2.0% of the neurons"), marks=pytest.mark.slow
        ),
        pytest.param("retain_only", ("teaches", "frozen   nothing"), marks=pytest.mark.slow),
        ("vkd", ("the language model among them", "distils  vision.1, vision.2, projector")),
    ],
)
def test_a_dry_run_says_what_a_method_would_change(name: str, said: tuple[str, ...]) -> None:
    few = ("data.people=8", "data.forget=2", "data.strangers=4", "data.extras=4")
    plan = dry_run("qwen2vl_celeb", (f"method={name}", *few)).partition("\n\n")[2]
    assert all(part in plan for part in (*said, METHODS[name].summary)), plan


def test_the_methods_are_listed_with_their_sources() -> None:
    listed = CliRunner().invoke(main, ["methods"])
    assert listed.exit_code == 0
    for name, method in METHODS.items():
        assert name in listed.stdout and method.summary in listed.stdout and method.source in listed.stdout
    rows = json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(set(row) == {"name", "summary", "source", "differs", "values"} for row in rows)


def test_no_half_precision_saliency_is_lost_over_every_part(student: MLLM, splits: Splits) -> None:
    student.model.to(torch.bfloat16)
    parameters = trainable(student, PARTS)
    found = saliency.accumulate(student, splits.forget[:4], parameters, squared=True, batch_size=4, what="test")
    assert {score.dtype for score in found.values()} == {torch.float32}
    assert all(score.isfinite().all() for score in found.values())
