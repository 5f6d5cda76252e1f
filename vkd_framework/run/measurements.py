"""What is measured on a model, a stage for each measurement; every one is done, or what it left behind is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vkd_framework import attacks, methods, relearn
from vkd_framework.answers import changed_text, degenerate_shares, guessed
from vkd_framework.attacks.target import Target
from vkd_framework.cache import CODE, cache_folder
from vkd_framework.checkpoint import Stages
from vkd_framework.errors import ModelError
from vkd_framework.evaluate import evaluate
from vkd_framework.layers_table import source_hash
from vkd_framework.machine import environment, peak_memory
from vkd_framework.plugins import MLLM, Adapter, installed_adapters
from vkd_framework.progress import say
from vkd_framework.recipe import Recipe, digest
from vkd_framework.types import AttackCurve, Splits
from vkd_framework.vanilla import device_of, load, starting_model, taught_weights

TAUGHT = "taught"
UNMEASURED = ("name", "description", "method", "seed", "teach", "reference", "layers", "unlearn")
"""Sections of a recipe that decide nothing about what is measured on a taught model, beside those of the method."""


@dataclass(frozen=True)
class Measurements:
    """The models of a recipe, each named by its source (a folder or a hub id), and what they answer and give away."""

    recipe: Recipe
    adapter: Adapter
    splits: Splits
    folder: Path

    @cached_property
    def device(self) -> str:
        """The device of the recipe, `auto` resolved."""
        return device_of(self.recipe)

    @cached_property
    def stages(self) -> Stages:
        """What is finished."""
        return Stages(self.folder / "checkpoints", peak_memory)

    def load(self, source: str) -> MLLM:
        """A model as the recipe wants it held, frozen."""
        return load(self.adapter, self.recipe.model, source, self.device)

    def load_as_it_is(self, source: str, device: str) -> MLLM:
        """A model as it was saved, in the recipe's dtype."""
        return self.adapter.load(source, getattr(torch, self.recipe.model.dtype), device)

    def starting(self, name: str, *, knows_forgotten: bool) -> str:
        """Where the vanilla or the retain-only model lies; taught first, where the recipe teaches.

        Raises ModelError where the cache lost the model that this began with, and teaching makes another one of it.
        """

        def work() -> str:
            return starting_model(self.adapter, self.recipe, self.splits, self.device, knows_forgotten=knows_forgotten)

        source: str = self.stages.run(f"teach-{name}", work)
        if self.recipe.teach is None:
            return source
        if not Path(source).exists():
            source = work()
        weights = taught_weights(source)
        if self.stages.run(f"weights-{name}", lambda: weights) != weights:
            raise ModelError(
                f"{self.folder}: began with other weights of the {name} model than it was taught now, after the cache "
                "lost them; start anew in another --out"
            )
        return source

    def answers(self, name: str, source: str) -> dict[str, Any]:
        """Column -> {cell, answers} of one model; for the vanilla model also `taught`, over everybody it was taught."""

        def work() -> dict[str, Any]:
            columns = dict(self.splits.columns)
            if name == "vanilla" and self.splits.taught:
                columns[TAUGHT] = self.splits.taught
            answered = evaluate(self.load(source), columns, self.recipe.evaluate, what=f"evaluate {name}")
            return {
                column: {"cell": asdict(result.cell), "answers": result.answers, "cut": result.cut}
                for column, result in answered.items()
            }

        result: dict[str, Any] = self.stages.run(f"evaluate-{name}", work, shared=self.shared_place(source))
        exact = {column: f"{found['cell']['exact_match']:.1%}" for column, found in result.items()}
        say(f"{name}: " + ", ".join(f"{column} {value}" for column, value in exact.items()))
        return result

    def relearned(self, name: str, source: str, columns: Mapping[str, Any]) -> list[AttackCurve]:
        """The recipe's relearning attacks on one model, whose `columns` were measured before."""
        before = columns["test_vqa"]["cell"]["exact_match"]
        stage = self._stage_with(source, self.shared_place(source))
        curves = relearn.attack(
            name, self.recipe.relearn, self.splits, self.recipe.evaluate, before=before, stage=stage
        )
        for curve in curves:
            points = ", ".join(
                f"{score:.0%} after {step}" for step, score in zip(curve.steps, curve.exact_match, strict=True)
            )
            say(f"attack on {name}, {curve.scope}, {curve.pairs} {curve.pool} pairs, seed {curve.seed}: {points}")
        return curves

    def tried(self, name: str, source: str, vanilla: str) -> list[dict[str, Any]]:
        """The recipe's `attacks` on one model."""
        # the unlearned model is attacked with the vanilla model's help
        shared = None if name == "unlearned" else self.shared_place(source)
        recipe, run_stage = self.recipe, self._stage_with(source, shared)

        def stage(key: str, work: Callable[[Target], dict[str, Any]]) -> dict[str, Any]:
            def aim(mllm: MLLM) -> dict[str, Any]:
                return work(
                    Target(name, mllm, self.splits, recipe.evaluate, lambda: self.load_as_it_is(vanilla, "cpu"))
                )

            result: dict[str, Any] = run_stage(key, aim)
            return result

        return attacks.attack(name, recipe.attacks, stage=stage)

    def _stage_with(self, source: str, shared: Path | None) -> Callable[[str, Callable[[MLLM], Any]], Any]:
        """What runs stages that need the model of `source`; it is loaded for the first that is not finished."""
        loaded: list[MLLM] = []

        def stage(key: str, work: Callable[[MLLM], Any]) -> Any:
            def load_and_work() -> Any:
                if not loaded:
                    loaded.append(self.load(source))
                return work(loaded[0])

            return self.stages.run(key, load_and_work, shared=shared)

        return stage

    def shared_place(self, source: str) -> Path | None:
        """Where what is measured on a taught model is kept for runs of other methods and seeds; None for other models.

        A hub id or a user's folder may change.
        """
        taught = cache_folder() / "taught"
        weights = taught_weights(source) if Path(source).parent == taught else None
        if self.recipe.teach is None or weights is None:
            return None
        skipped = {*UNMEASURED, *(key.partition(".")[0] for key in methods.OWNED)}
        settings = self.recipe.model_dump(mode="json", exclude=skipped)
        facts = environment(self.device)
        adapter = [source_hash(one) for one in installed_adapters() if one.name == self.adapter.name]
        key = digest([CODE, adapter, facts["torch"], facts["transformers"], facts["device"], weights, settings])
        return cache_folder() / "measured" / key

    def signs(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """What guessing gives, how many questions have options, and what else tells of damage."""
        found: dict[str, Any] = {
            "guessed": {column: guessed(pairs) for column, pairs in self.splits.columns.items() if pairs},
            "choices": {column: sum(bool(p.options) for p in pairs) for column, pairs in self.splits.columns.items()},
            "degenerate": degenerate_shares(self.splits.columns, columns["vanilla"], columns["unlearned"]),
            "text_only": changed_text(self.splits.columns, columns["vanilla"], columns["unlearned"]),
        }
        return {name: block for name, block in found.items() if block}
