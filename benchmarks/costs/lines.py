"""How cost grows: with steps, with pairs in a batch, and with people; and what is not a step: measuring, starting."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from costs.memory import Stopwatch
from costs.models import PEOPLE, Size, build, recipe_of, splits_of
from costs.steps import Prepared, prepared
from vkd_framework.evaluate import evaluate
from vkd_framework.plugins import MLLM
from vkd_framework.relearn import relearn
from vkd_framework.types import Scope, Splits

FACTORS = (1, 4, 16)
CASTS = (*FACTORS, 64, 256)
"""For people: until what is remembered of them is at its limits."""
VARIANT = "vkd_attacker_full"

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "vkd --help": ("--help",),
    "vkd recipes list": ("recipes", "list"),
    "vkd recipes schema": ("recipes", "schema"),
    "vkd recipes validate": ("recipes", "validate", "qwen2vl_celeb"),
    "vkd methods": ("methods",),
    "vkd adapters": ("adapters",),
    "vkd run --help": ("run", "--help"),
    "vkd inspect-layers": ("inspect-layers", "Qwen/Qwen2-VL-7B-Instruct"),
    "vkd run --dry-run": ("run", "qwen2vl_celeb", "--dry-run"),
    "vkd doctor": ("doctor",),
}


def two_steps(one: Prepared, size: Size) -> tuple[float, float]:
    """Seconds of a step, processor and wall: the mean of two, as terms may take turns, after two that do not count."""
    one.step(0)
    one.step(1)
    watch = Stopwatch(size.device)
    one.step(2)
    one.step(3)
    counted, wall = watch.seconds()
    return counted / 2, wall / 2


def in_steps(mllm: MLLM, family: str, size: Size, splits: Splits) -> list[dict[str, Any]]:
    """Seconds of 1, 4 and 16 times as many steps: two to begin with."""
    one = prepared(VARIANT, mllm, family, size, splits)
    one.step(0)
    one.step(1)
    found, done = [], 2
    for factor in FACTORS:
        watch = Stopwatch(size.device)
        for step in range(done, done + 2 * factor):
            one.step(step)
        done += 2 * factor
        found.append({"factor": factor, "steps": 2 * factor, "seconds": watch.seconds()[0]})
    return found


def in_pairs(mllm: MLLM, family: str, size: Size, splits: Splits) -> list[dict[str, Any]]:
    """Seconds of a step with 1, 4 and 16 times as many pairs, from one forget and three retain pairs on."""
    found = []
    for factor in FACTORS:
        larger = replace(size, forget_batch=factor, retain_batch=3 * factor)
        one = prepared(VARIANT, mllm, family, larger, splits)
        found.append({"factor": factor, "pairs": 4 * factor, "seconds_per_step": two_steps(one, size)[0]})
    return found


def with_people(family: str, size: Size, factor: int) -> dict[str, Any]:
    """Seconds of a step where the cast is `factor` times as large; for a fresh process, which then knows its peak."""
    splits = splits_of(size, casts=factor)
    one = prepared(VARIANT, build(family, size, splits), family, size, splits)
    return {"factor": factor, "people": PEOPLE * factor, "seconds_per_step": two_steps(one, size)[0]}


def throughput(mllm: MLLM, family: str, size: Size, splits: Splits) -> dict[str, float]:
    """Measured questions a second, and steps a second of a relearning attack."""
    recipe = recipe_of(family, size, "vkd")
    column = splits.columns["test_vqa"]
    watch = Stopwatch(size.device)
    evaluate(mllm, {"test_vqa": column}, recipe.evaluate)
    found = {"evaluated_pairs_per_second": len(column) / watch.seconds()[0]}
    steps = 4
    config = recipe.relearn.model_copy(update={"steps": (steps,), "batch_size": size.forget_batch})
    scopes: tuple[Scope, ...] = ("visual", "full")
    for scope in scopes:
        watch = Stopwatch(size.device)
        relearn(mllm, scope, splits.forget, column[:1], config, recipe.evaluate, seed=0, what="attack")
        found[f"attack_steps_per_second_{scope}"] = steps / watch.seconds()[0]
    return found


def start_up(repeats: int = 3) -> dict[str, float]:
    """Command -> its least seconds of processor time, of a few tries."""
    return {name: min(_seconds_of(arguments) for _ in range(repeats)) for name, arguments in COMMANDS.items()}


def _seconds_of(arguments: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "vkd_framework", *arguments]
    subprocess.run(command, capture_output=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
