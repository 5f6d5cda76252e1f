from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import changed, make_recipe, weights
from transformers.pytorch_utils import Conv1D

from vkd_framework.batches import Batches
from vkd_framework.errors import RecipeError
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.recipe import SimulatedAttack
from vkd_framework.run.checks import check_language_model
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import SCOPES, EncodedBatch, Scope, Splits

VISUAL = ("encoder", "projector")


def attacker_of(mllm: MLLM, splits: Splits, *, restart_every: int = 100, **settings: Any) -> SimulatedAttacker:
    config = SimulatedAttack.model_validate(
        {"weight": 1, "batch_size": 4, "horizon": [5, 5], "head_start": 0} | settings
    )
    student = trainable(mllm, VISUAL)
    return SimulatedAttacker(mllm, student, config, splits.forget, seed=3, restart_every=restart_every)


@pytest.fixture
def exact(student: MLLM) -> MLLM:
    """In float64: Adam makes a whole step of a gradient that is nothing but rounding."""
    student.model.double()
    return student


def content_loss(mllm: MLLM, batch: EncodedBatch) -> torch.Tensor:
    return answer_cross_entropy(mllm.model(**batch.inputs).logits, batch.inputs["input_ids"], batch.content)


def test_before_the_attacker_has_moved_the_student_gets_plain_gradient_ascent(student: MLLM, splits: Splits) -> None:
    attacker = attacker_of(student, splits)
    parameters = trainable(student, VISUAL)
    reported = attacker.add_gradient(0, 0.5)
    added = {name: parameter.grad for name, parameter in parameters.items()}
    loss = content_loss(student, student.tokenize(attacker.batches.batch(0))).mean()
    expected = torch.autograd.grad(-0.5 * loss, list(parameters.values()), allow_unused=True)
    assert reported == pytest.approx(loss.item(), rel=1e-5)
    for (name, got), wanted in zip(added.items(), expected, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scope", ["visual", "full"])
def test_the_attacker_goes_where_adam_would_take_a_copy_that_is_fine_tuned(
    exact: MLLM, splits: Splits, scope: Scope
) -> None:
    attacker = attacker_of(exact, splits, scopes=[scope], learning_rate=1e-3)
    for step in range(4):
        attacker.add_gradient(step, 1.0)
    copied = exact.copy()
    tuned = trainable(copied, SCOPES[scope])
    optimizer = torch.optim.Adam(tuned.values(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(content_loss(copied, copied.tokenize(attacker.batches.batch(step))).mean())
        optimizer.step()
    start = dict(exact.model.named_parameters())
    moved = {name for name, difference in attacker.difference.items() if bool(difference.any())}
    assert moved and moved <= set(tuned)
    for name, parameter in tuned.items():
        torch.testing.assert_close(start[name] + attacker.difference[name], parameter, rtol=1e-5, atol=1e-7)


def test_the_attacker_leaves_every_weight_of_the_model_as_it_is(student: MLLM, splits: Splits) -> None:
    attacker = attacker_of(student, splits, scopes=["full"])
    before = weights(student)
    for step in range(3):
        attacker.add_gradient(step, 1.0)
    assert not changed(before, weights(student))
    frozen = student.parameters(["language_model"])
    assert all(parameter.grad is None for parameter in frozen.values())


def test_answers_above_the_cap_push_the_student_no_further_and_the_attacker_goes_on(
    student: MLLM, splits: Splits
) -> None:
    attacker = attacker_of(student, splits, cap=1e-3)
    attacker.add_gradient(0, 1.0)
    assert all(p.grad is None or not p.grad.any() for p in trainable(student, VISUAL).values())
    assert any(bool(difference.any()) for difference in attacker.difference.values())


def test_the_student_is_not_pushed_before_the_attacker_had_his_head_start(student: MLLM, splits: Splits) -> None:
    attacker = attacker_of(student, splits, head_start=2)
    parameters = trainable(student, VISUAL)
    for step in range(2):
        attacker.add_gradient(step, 1.0)
        assert all(parameter.grad is None for parameter in parameters.values())
    attacker.add_gradient(2, 1.0)
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters.values())


@pytest.mark.parametrize(("horizon", "restart_every"), [(2, 100), (50, 2)])
def test_an_attack_starts_anew_at_its_horizon_and_where_training_can_be_resumed(
    student: MLLM, splits: Splits, horizon: int, restart_every: int
) -> None:
    going_on = attacker_of(student, splits, horizon=[horizon, horizon], restart_every=restart_every)
    for step in range(3):
        going_on.add_gradient(step, 1.0)
    fresh = attacker_of(student, splits, horizon=[horizon, horizon], restart_every=restart_every)
    fresh.add_gradient(2, 1.0)
    assert going_on.difference.keys() == fresh.difference.keys()
    for name, difference in fresh.difference.items():
        assert torch.equal(difference, going_on.difference[name])


def test_batches_are_of_the_forget_set(student: MLLM, splits: Splits) -> None:
    attacker = attacker_of(student, splits)
    attacker.add_gradient(0, 1.0)
    assert isinstance(attacker.batches, Batches)
    assert {pair.subject for pair in attacker.batches.batch(0)} <= set(splits.forget_subjects)


def test_an_attacker_of_low_rank_goes_where_adam_would_take_what_he_adds(exact: MLLM, splits: Splits) -> None:
    attacker = attacker_of(exact, splits, scopes=["full"], rank=3, learning_rate=1e-3)
    attacker.add_gradient(0, 1.0)
    assert attacker._added is not None
    down = attacker._added.down
    assert {f"{name}.weight" for name in down} <= set(exact.parts["language_model"])
    copied = exact.copy()
    tuned = trainable(copied, VISUAL)
    up = {
        name: torch.zeros(len(layer.weight), 3).double().requires_grad_()
        for name, layer in exact.language_model_layers().items()
    }
    optimizer = torch.optim.Adam([*tuned.values(), *up.values()], lr=1e-3)
    start = {name: copied.model.get_parameter(f"{name}.weight").detach().clone() for name in up}
    for step in range(3):
        optimizer.zero_grad()
        moved = {f"{name}.weight": start[name] + up[name] @ down[name] for name in up}
        batch = copied.tokenize(attacker.batches.batch(step))
        logits = torch.func.functional_call(copied.model, moved, kwargs=batch.inputs).logits
        torch.autograd.backward(answer_cross_entropy(logits, batch.inputs["input_ids"], batch.content).mean())
        optimizer.step()
    for step in range(1, 3):
        attacker.add_gradient(step, 1.0)
    found = attacker.difference
    assert all(bool(found[f"{name}.weight"].any()) for name in up)
    for name, factor in up.items():
        torch.testing.assert_close(found[f"{name}.weight"], factor.detach() @ down[name], rtol=1e-5, atol=1e-7)
    for name, parameter in tuned.items():
        torch.testing.assert_close(exact.model.get_parameter(name) + found[name], parameter, rtol=1e-5, atol=1e-7)


def test_an_attacker_of_low_rank_holds_little_and_moves_as_far_as_one_of_full_rank(
    student: MLLM, splits: Splits
) -> None:
    attackers = {rank: attacker_of(student, splits, scopes=["full"], rank=rank) for rank in (None, 2)}
    for step in range(3):
        for attacker in attackers.values():
            attacker.add_gradient(step, 1.0)
    whole, low = attackers[None], attackers[2]
    names = [f"{name}.weight" for name in student.language_model_layers()]

    def spread(attacker: SimulatedAttacker) -> float:
        return float(torch.cat([attacker.difference[name].flatten() for name in names]).std())

    assert 0.3 < spread(low) / spread(whole) < 3
    visual = sum(p.numel() for p in student.parameters(VISUAL).values())
    language = sum(p.numel() for p in student.parameters(["language_model"]).values())
    assert whole.bytes == 3 * 4 * (visual + language)
    assert low.bytes - 3 * 4 * visual < 3 * 4 * language / 4


def test_a_language_model_to_which_nothing_can_be_added_is_told(student: MLLM, splits: Splits) -> None:
    for path, layer in student.language_model_layers().items():
        parent, _, name = path.rpartition(".")
        other = Conv1D(layer.out_features, layer.in_features)  # what GPT-2 has in place of linear layers
        setattr(student.model.get_submodule(parent), name, other.requires_grad_(False))
    attacker = attacker_of(student, splits, scopes=["full"], rank=2)
    with pytest.raises(RecipeError, match=r"no linear layer .* simulated_attack\.rank to null"):
        attacker.add_gradient(0, 1.0)
    visual: dict[str, Any] = {"relearn": {"scopes": ["visual"]}, "attacks": []}
    for settings, what in (
        ({"relearn": {"scopes": ["low_rank"]}}, r"relearn\.scopes: low_rank"),
        ({**visual, "model": {"offload": True}}, r"model\.offload: true"),
        ({**visual, "model": {"quantize": "int8"}}, r"model\.quantize: int8"),
        ({"simulated_attack": {"weight": 1, "rank": 4}}, r"simulated_attack\.rank: 4"),
    ):
        with pytest.raises(RecipeError, match=f"{what} needs linear layers in the language model"):
            check_language_model(make_recipe(**settings), student)
    check_language_model(make_recipe(**visual), student)
