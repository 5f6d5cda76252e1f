from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import asked_about, changed, make_recipe, weights

from vkd_framework.evaluate import exact_match
from vkd_framework.methods import METHODS
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import EvaluateConfig, Recipe, UnlearnConfig, load_recipe
from vkd_framework.retain_floor import RetainFloor, check_steps
from vkd_framework.types import Splits
from vkd_framework.unlearn import History, unlearn

STEPS, EVERY = 8, 2
BREAKING = 0.1
"""A learning rate at which a model that knows its retain pairs by heart loses them within a few steps."""
SHORT = EvaluateConfig(max_new_tokens=6)


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def guarded(floor: float | None, rate: float = BREAKING, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        **{"steps": STEPS, "warmup": 0, "forget_batch": 5, "retain_batch": 5, "cosine_share": 0.0},
        **{"learning_rate": rate, "checkpoint_every": EVERY, "retain_floor": floor, "floor_pairs": 6},
        "phases": [{"share": 0.25, "forget": 1.0}, {"share": 0.75, "forget": 1.0}],
    }
    attack = {"weight": 0.5, "horizon": [1, 3], "head_start": 0, "batch_size": 3, "scopes": ["visual"]}
    losses = {"forget_output": {"form": "capped_ascent"}}
    return make_recipe(unlearn=settings | changes, simulated_attack=attack, losses=losses, evaluate=SHORT.model_dump())


def tuned(mllm: MLLM, splits: Splits, recipe: Recipe, folder: Path) -> History:
    return unlearn(mllm, recipe, splits, None, resume=folder / "state.pt", record=lambda _: None)


def killed_at(step: int, mllm: MLLM, splits: Splits, recipe: Recipe, folder: Path) -> Path:
    """What a run leaves behind that is killed at a checkpoint."""
    resume = folder / "killed" / "state.pt"

    def kill(history: History) -> None:
        if len(history) == step:
            raise Killed

    with pytest.raises(Killed):
        unlearn(mllm.copy(), recipe, splits, None, resume=resume, record=kill)
    return resume


def test_a_floor_that_cannot_be_held_switches_forgetting_off_and_nothing_before_it(
    knowing: MLLM, few: Splits, tmp_path: Path
) -> None:
    free, held = knowing.copy(), knowing.copy()
    plain = tuned(free, few, guarded(None), tmp_path / "free")
    history = tuned(held, few, guarded(1.0), tmp_path / "held")
    first = check_steps(guarded(1.0).unlearn)[0]
    assert first == 2 * EVERY
    assert [entry.get("guard") for entry in history[: first + 1]] == [None] * first + ["repair"]
    assert history[:first] == plain[:first]
    for entry in history:
        assert ("attacked" in entry) == ("guard" not in entry)
    assert not any("guard" in entry for entry in plain)
    assert changed(weights(free), weights(held))


def test_below_the_floor_it_does_not_matter_what_is_to_be_forgotten(knowing: MLLM, few: Splits, tmp_path: Path) -> None:
    recipe = guarded(1.0, steps=3 * EVERY)
    state = killed_at(2 * EVERY, knowing, few, recipe, tmp_path)
    ends = []
    for forget in (few.forget, few.forget[:3]):
        mllm, resume = knowing.copy(), tmp_path / f"{len(forget)}.pt"
        shutil.copy(state, resume)
        history = unlearn(mllm, recipe, replace(few, forget=forget), None, resume=resume, record=lambda _: None)
        assert ["guard" in entry for entry in history] == [False] * 2 * EVERY + [True] * EVERY
        ends.append(weights(mllm))
    assert not changed(*ends)


@pytest.mark.slow
def test_a_model_that_never_falls_below_is_trained_as_without_a_floor(
    knowing: MLLM, few: Splits, tmp_path: Path
) -> None:
    free, held = knowing.copy(), knowing.copy()
    plain = tuned(free, few, guarded(None, rate=1e-5), tmp_path / "free")
    assert tuned(held, few, guarded(0.5, rate=1e-5), tmp_path / "held") == plain
    assert not changed(weights(free), weights(held))


def test_forgetting_goes_on_when_the_floor_holds_again(knowing: MLLM, few: Splits) -> None:
    mllm = knowing.copy()
    config = guarded(1.0).unlearn
    floor = RetainFloor(mllm, config, SHORT, few.retain, seed=0)
    first, second, third = floor.checks[0], floor.checks[1], STEPS
    assert len(floor.checks) == 2 and third not in floor.checks
    kept = {name: parameter.detach().clone() for name, parameter in mllm.parameters(["projector"]).items()}
    for parameter in mllm.parameters(["projector"]).values():
        parameter.data.zero_()
    assert floor.holds(first - 1)
    assert not floor.holds(first)
    assert not floor.holds(first + 1)
    for name, parameter in mllm.parameters(["projector"]).items():
        parameter.data.copy_(kept[name])
    assert not floor.holds(second - 1), "it is asked at checks only"
    assert floor.holds(second)


def test_a_pair_or_two_that_are_lost_by_chance_do_not_stop_the_forgetting(knowing: MLLM, few: Splits) -> None:
    mllm = knowing.copy()
    config = guarded(0.9).unlearn
    floor = RetainFloor(mllm, config, SHORT, few.retain, seed=0)
    asked = [pair for pair in few.retain if pair.photos]
    sample = random.Random(0).sample(asked, config.floor_pairs)
    assert exact_match(mllm, sample, SHORT) == 1
    lost = 0.0
    while not lost:
        for parameter in mllm.parameters(["projector"]).values():
            parameter.data.mul_(0.98)
        lost = 1 - exact_match(mllm, sample, SHORT)
    assert 0.1 < lost < 0.4, "below a floor of 0.9, and not by more than chance explains in six pairs"
    assert floor.holds(floor.checks[0])


@pytest.mark.parametrize("at", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_checkpoint_decides_like_an_uninterrupted_one(
    knowing: MLLM, few: Splits, tmp_path: Path, at: int
) -> None:
    recipe = guarded(1.0)
    straight, resumed = knowing.copy(), knowing.copy()
    expected = tuned(straight, few, recipe, tmp_path / "straight")
    assert any("guard" in entry for entry in expected)
    resume = killed_at(at * EVERY, knowing, few, recipe, tmp_path)
    assert unlearn(resumed, recipe, few, None, resume=resume, record=lambda _: None) == expected
    assert not changed(weights(straight), weights(resumed))


def test_the_floor_is_checked_at_checkpoints_of_the_last_phase_after_it_had_time_to_repair() -> None:
    def steps(**settings: Any) -> tuple[int, ...]:
        return check_steps(UnlearnConfig.model_validate(settings))

    halves = [{"share": 0.5}, {"share": 0.5}]
    assert steps(steps=400, checkpoint_every=100, phases=halves) == (300,)
    assert steps(steps=400, checkpoint_every=50, phases=halves) == (250, 300, 350)
    assert steps(steps=400, checkpoint_every=100, phases=[{"share": 1.0}]) == (100, 200, 300)
    assert steps(steps=100, checkpoint_every=100, phases=halves) == ()


def test_without_a_check_or_a_photo_the_model_is_not_even_asked(tiny: MLLM, splits: Splits) -> None:
    calls: list[int] = []
    place = tiny.model.get_submodule(tiny.modules.language_model[0])
    handle = place.register_forward_hook(lambda *_: calls.append(1))
    texts = [asked_about(None)]
    for settings, retain in (
        (guarded(None).unlearn, splits.retain),
        (guarded(0.9, checkpoint_every=100).unlearn, splits.retain),
        (guarded(0.9).unlearn, texts),
    ):
        floor = RetainFloor(tiny, settings, SHORT, retain, seed=0)
        assert all(floor.holds(step) for step in range(STEPS))
    handle.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "texts", "why"),
    [
        ({"checkpoint_every": 100}, False, "none of 8 steps is a check; only the last phase has any, every 100 steps "),
        ({}, True, "no retain pair has a photo\n"),
        ({}, False, "none of 6 retain pairs is answered right to begin with\n"),
    ],
)
def test_a_floor_that_holds_nothing_tells_the_one_reason(
    tiny: MLLM, splits: Splits, capfd: pytest.CaptureFixture[str], settings: dict[str, Any], texts: bool, why: str
) -> None:
    retain = [asked_about(None)] if texts else splits.retain
    RetainFloor(tiny, guarded(0.9, **settings).unlearn, SHORT, retain, seed=0)
    assert f"unlearn: the retain floor holds nothing: {why}" in capfd.readouterr().err


def test_our_method_has_a_floor_and_published_ones_have_none() -> None:
    floors = {name: load_recipe("qwen2vl_celeb", [f"method={name}"]).unlearn.retain_floor for name in METHODS}
    assert floors == dict.fromkeys(METHODS, None) | {"vkd": 0.8}


def test_the_floor_is_a_share_above_zero() -> None:
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="retain_floor"):
            guarded(wrong)
