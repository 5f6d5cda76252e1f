from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_recipe
from torch import Tensor

from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.recipe import Recipe, SimulatedAttack
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import ImageQuestionPair, Splits
from vkd_framework.unlearn import unlearn

LOSSES = {"retain_kl": {"weight": 0.7}, "repel": {"weight": 0.3}}


def in_parts_of(micro_batch: int | None, **changes: Any) -> Recipe:
    settings = {"steps": 3, "warmup": 0, "forget_batch": 5, "retain_batch": 6, "micro_batch": micro_batch}
    return make_recipe(**{"unlearn": settings, "losses": LOSSES, **changes})


def uneven(splits: Splits) -> list[ImageQuestionPair]:
    """Photos of the forgotten, which no teacher compares, of others, and questions without a photo."""
    about_forgotten = [pair for pair in splits.retain if splits.shows_forgotten(pair)]
    others = [pair for pair in splits.retain if not splits.shows_forgotten(pair)]
    return [*about_forgotten[:2], *others[:3], *splits.text[:2]]


def gradients(mllm: MLLM, recipe: Recipe, splits: Splits, kind: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The terms, and the gradients that going backward part by part leaves. KL needs a student who has moved."""
    objective = Objective(mllm, recipe, splits)
    parameters = trainable(mllm, recipe.train)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1.1)
    ask, pairs = (objective.forget, splits.forget[:5]) if kind == "forget" else (objective.retain, uneven(splits))
    loss, terms = ask(pairs, lambda part: torch.autograd.backward(part) if part.requires_grad else None)
    assert not loss.requires_grad
    return {**terms, "loss": float(loss)}, {n: p.grad for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("kind", ["forget", "retain"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_add_up_to_the_whole_whatever_they_hold(
    tiny: MLLM, splits: Splits, kind: str, size: int
) -> None:
    wanted, whole = gradients(tiny.copy(), in_parts_of(None), splits, kind)
    found, parts = gradients(tiny.copy(), in_parts_of(size), splits, kind)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_run_in_parts_has_the_history_of_a_run_of_whole_batches(tiny: MLLM, splits: Splits, tmp_path: Path) -> None:
    def history(micro_batch: int | None) -> list[dict[str, Any]]:
        recipe = in_parts_of(micro_batch, simulated_attack={"weight": 0.5, "head_start": 0, "batch_size": 3})
        return unlearn(tiny.copy(), recipe, splits, None, resume=tmp_path / f"{micro_batch}", record=lambda _: None)

    for found, wanted in zip(history(2), history(None), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_no_more_than_one_part_goes_through_the_model_at_once(tiny: MLLM, splits: Splits) -> None:
    mllm, seen = tiny.copy(), list[int]()
    objective = Objective(mllm, in_parts_of(2), splits)
    place = mllm.model.get_submodule(mllm.modules.language_model[0])
    place.register_forward_hook(lambda _module, _given, out: seen.append(len(out[0])))
    objective.forget(splits.forget[:5])
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("settings", [{"scopes": ["visual"]}, {"scopes": ["full"], "rank": None}, {"scopes": ["full"]}])
def test_an_attacker_in_parts_goes_and_pushes_as_with_whole_batches(
    tiny: MLLM, splits: Splits, settings: dict[str, Any]
) -> None:
    """In float64: Adam makes a whole step of a gradient that is nothing but rounding."""

    def attacked(micro_batch: int | None) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        mllm = tiny.copy()
        mllm.model.double()
        student = trainable(mllm, ("encoder", "projector"))
        config = SimulatedAttack.model_validate(
            {"weight": 1, "batch_size": 5, "horizon": [5, 5], "head_start": 0, "rank": 3, "cap": 2.0} | settings
        )
        attacker = SimulatedAttacker(
            mllm, student, config, splits.forget, seed=3, restart_every=100, micro_batch=micro_batch
        )
        losses = [attacker.add_gradient(step, 0.5) for step in range(3)]
        pushed = {name: p.grad for name, p in student.items() if p.grad is not None}
        return losses, pushed, attacker.difference

    losses, pushed, moved = attacked(None)
    losses_in_parts, pushed_in_parts, moved_in_parts = attacked(2)
    assert losses_in_parts == pytest.approx(losses, rel=1e-6)
    assert pushed and any(bool(difference.any()) for difference in moved.values())
    for wanted, found in ((pushed, pushed_in_parts), (moved, moved_in_parts)):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
