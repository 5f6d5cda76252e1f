"""`metrics.json`: what the stages of a run found, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vkd_framework import attacks, relearn
from vkd_framework.answers import normalise
from vkd_framework.checkpoint import Stages
from vkd_framework.recipe import Recipe
from vkd_framework.run.measurements import TAUGHT
from vkd_framework.types import AttackCurve, Splits
from vkd_framework.unlearn import History
from vkd_framework.verdict import verdict

STAGES = ("teach", "mask", "unlearn", "evaluate", "relearn", "attacks")
"""Whose seconds are told, in the order in which they are done."""


def metrics_of(
    recipe: Recipe,
    splits: Splits,
    outcome: Mapping[str, Any],
    columns: Mapping[str, Any],
    curves: Sequence[AttackCurve],
    attacked: Sequence[dict[str, Any]],
    *,
    signs: Mapping[str, Any],
    history: History,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that `metrics.json` says, the verdict included.

    `outcome` is what unlearning left, `columns` model -> column -> its cell and answers, `attacked` what the recipe's
    `attacks` found, `signs` what else tells of damage, `cost` that of `cost_of`.
    """
    cells = {model: {name: found["cell"] for name, found in answered.items()} for model, answered in columns.items()}
    taught = cells["vanilla"].pop(TAUGHT, None)
    concluded, marked = attacks.conclude(attacked, splits.columns["test_vqa"])
    metrics = {
        "schema": 1,
        "recipe": recipe.name,
        "adapter": recipe.adapter,
        "method": recipe.method,
        "train": list(recipe.train),
        "seed": recipe.seed,
        "models": cells,
        "unseen": unseen(splits),
        **({"taught": {"test_vqa_all_people": taught}} if taught else {}),
        "proofs": outcome["proofs"],
        "relearn": relearn.summarise(curves, cells["vanilla"]["test_vqa"]["exact_match"], splits.columns["test_vqa"]),
        "attacks": concluded,
        **({"over_forgotten": marked} if marked else {}),
        **signs,
        **_floor(recipe, history),
        "cost": cost,
    }
    return {**metrics, "verdict": asdict(verdict(metrics))}


def unseen(splits: Splits) -> dict[str, list[str]]:
    """What unlearning never saw of the columns that are measured as unseen: `photos`, `phrasings`, both or neither.

    Phrasings count when no question of the column was trained on, about whomever.
    """
    trained = (*splits.forget, *splits.retain)
    photos = {key for pair in trained for key in pair.photo_keys}
    questions = {normalise(pair.question) for pair in trained}
    found = {}
    for column in ("test_vqa", "retain_vqa"):
        pairs = splits.columns.get(column, ())
        new = {
            "photos": all(photos.isdisjoint(pair.photo_keys) for pair in pairs),
            "phrasings": all(normalise(pair.question) not in questions for pair in pairs),
        }
        found[column] = [what for what, is_new in new.items() if is_new]
    return found


def cost_of(
    recipe: Recipe, stages: Stages, outcome: Mapping[str, Any], expected: Mapping[str, float], *, mask_bytes: int
) -> dict[str, Any]:
    """Seconds and memory of every stage, beside those that were `expected`."""
    seconds = {f"{stage}_seconds": stages.seconds(stage) for stage in STAGES}
    if outcome["teaching_seconds"] is not None:
        # what unlearned here is the teaching of the reference, by whichever run it was done; it counts once
        seconds |= {"teach_seconds": stages.seconds("teach-vanilla"), "unlearn_seconds": outcome["teaching_seconds"]}
    tunes = recipe.procedure == "tune"
    return {
        **seconds,
        "total_seconds": sum(seconds.values()),
        "step_seconds": seconds["unlearn_seconds"] / recipe.unlearn.steps if tunes else None,
        "estimated_step_seconds": expected["step_seconds"] if tunes else None,
        "peak_memory_bytes": stages.peak_memory(),
        "estimated_peak_memory_bytes": round(expected["peak_memory_bytes"]),
        "trainable_parameters": outcome["trainable_parameters"],
        "active_parameters": outcome["active_parameters"],
        "total_parameters": outcome["total_parameters"],
        "mask_bytes": mask_bytes,
    }


def _floor(recipe: Recipe, history: History) -> dict[str, Any]:
    """How long the retain floor kept it from forgetting."""
    if recipe.unlearn.retain_floor is None or recipe.procedure != "tune":
        return {}
    below = sum("guard" in entry for entry in history)
    return {"retain_floor": {"floor": recipe.unlearn.retain_floor, "steps_below": below, "steps": recipe.unlearn.steps}}
