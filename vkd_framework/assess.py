"""Measure or attack one checkpoint by a recipe, without unlearning anything: also one that was made elsewhere.

The columns, the attacks and every figure are those of a run, made by the same stages. The checkpoint takes the place of
the run's unlearned model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vkd_framework import attacks, data, ranks, relearn
from vkd_framework.checkpoint import EVALUATED, RELEARNED, write_json, write_text
from vkd_framework.errors import ModelError, RecipeError
from vkd_framework.layers_table import describe
from vkd_framework.machine import environment
from vkd_framework.plugins import Adapter, load_adapter
from vkd_framework.progress import say
from vkd_framework.recipe import Recipe, is_tiny, load_recipe
from vkd_framework.run.checks import check_divided
from vkd_framework.run.folder import check_data, check_models, held, make
from vkd_framework.run.measurements import TAUGHT, Measurements
from vkd_framework.run.metrics import unseen
from vkd_framework.verdict import verdict

UNLEARNED = "unlearned"
"""The place that the checkpoint takes among a run's models, so that its figures have the same names."""


def evaluate(
    model: str | Path,
    reference: str,
    overrides: tuple[str, ...] = (),
    *,
    out: Path | str | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """The columns of `model` and the recipe's `attacks` on it, beside the recipe's starting model and reference.

    `model` is a hub id, a local folder or the folder of a run, `reference` a recipe. The result has the keys `models`,
    `attacks`, `over_forgotten`, `guessed`, `degenerate`, `text_only` and `verdict` of `metrics.json`. With `alone`, no
    other model is loaded, and the figures that compare and the verdict are left out. Raises RecipeError, DataError or
    ModelError before anything is measured.
    """
    with _assessment(
        str(model), reference, overrides, None if out is None else Path(out), alone, adds=EVALUATED
    ) as assessment:
        return assessment.written(EVALUATED, assessment.evaluated())


def attack(
    model: str | Path,
    reference: str,
    overrides: tuple[str, ...] = (),
    *,
    out: Path | str | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """The recipe's relearning attacks on `model` and, if the recipe has one, on the retain-only reference.

    The arguments and errors are those of `evaluate`, the result is the `relearn` block of `metrics.json`. With `alone`,
    `average_gap` and the advantages are None.
    """
    with _assessment(
        str(model), reference, overrides, None if out is None else Path(out), alone, adds=RELEARNED
    ) as assessment:
        return assessment.written(RELEARNED, assessment.attacked())


@dataclass(frozen=True)
class Assessment(Measurements):
    """A run's measurements of a model that is there already. `kept`: whether the folder is one that the user wants."""

    model: str = ""
    alone: bool = False
    kept: bool = False

    def begin(self) -> None:
        """Say whose folder it is, so that the same command goes on there after it was stopped.

        Raises DataError or ModelError when the data or the checkpoint changed since.
        """
        write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
        check_data(self.folder, self.stages, self.splits)
        check_models(self.folder, self.stages, {"model": self.model})
        if not self.alone and not is_tiny(self.recipe.model.source):
            check_models(self.folder, self.stages, {"model.source": self.recipe.model.source}, "models-compared")

    def evaluated(self) -> dict[str, Any]:
        """Columns and attacks of every model."""
        models, columns = self._measured()
        tried = [
            result
            for name, source in models.items()
            for result in self.tried(name, source, models.get("vanilla", self.model))
        ]
        concluded, marked = attacks.conclude(tried, self.splits.columns["test_vqa"])
        cells = {
            name: {column: found["cell"] for column, found in answered.items() if column != TAUGHT}
            for name, answered in columns.items()
        }
        found = {
            "models": cells,
            "unseen": unseen(self.splits),
            "attacks": concluded,
            **({"over_forgotten": marked} if marked else {}),
        }
        if self.alone:
            return found
        found |= self.signs(columns)
        return found | {"verdict": asdict(verdict(found))}

    def attacked(self) -> dict[str, Any]:
        """Curves of the model and of the reference."""
        models, columns = self._measured()
        curves = [
            curve
            for name in (UNLEARNED, "retain_only")
            if name in models
            for curve in self.relearned(name, models[name], columns[name])
        ]
        vanilla = columns["vanilla"]["test_vqa"]["cell"]["exact_match"] if "vanilla" in columns else None
        return relearn.summarise(curves, vanilla, self.splits.columns["test_vqa"])

    def written(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """`result`, put into a file when the folder is kept."""
        if self.kept:
            write_json(self.folder / "environment.json", environment(self.device))
            write_json(self.folder / name, {"model": self.model, **result})
            say(f"results in {self.folder}")
        return result

    def _measured(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Model -> its source, and its columns. The checkpoint comes first: if it fails, no other is taught for it."""
        own = self.answers(UNLEARNED, self.model)
        models = self._others()
        columns = {name: self.answers(name, source) for name, source in models.items()}
        return {**models, UNLEARNED: self.model}, {**columns, UNLEARNED: own}

    def _others(self) -> dict[str, str]:
        if self.alone:
            return {}
        models = {"vanilla": self.starting("vanilla", knows_forgotten=True)}
        if self.recipe.reference == "retain_only":
            models["retain_only"] = self.starting("retain_only", knows_forgotten=False)
        return models


@contextmanager
def _assessment(
    model: str, reference: str, overrides: tuple[str, ...], out: Path | None, alone: bool, *, adds: str
) -> Iterator[Assessment]:
    """Everything checked and ready to write `adds`; without `out`, in a folder that is gone afterwards."""
    recipe = load_recipe(reference, overrides)
    adapter = load_adapter(recipe.adapter)
    source = _checkpoint(model, adapter)
    if alone:  # nothing to put back, and nothing to compare with
        others = tuple(config for config in recipe.attacks if config.kind != "module_restore")
        recipe = recipe.model_copy(update={"attacks": others})
    if out is not None and ranks.once(lambda: _taken(out, adds, recipe)):
        raise RecipeError(
            f"{out}: exists already; choose another --out, or the folder where this command was stopped, or the other "
            "of `vkd evaluate` and `vkd relearn` left what it found, of the same model by the same recipe"
        )
    check_divided(recipe)
    splits = data.load(recipe.data)
    relearn.attackers(recipe.relearn, splits)
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="vkd-") as folder:
        assessment = Assessment(recipe, adapter, splits, Path(folder), model=source, alone=alone, kept=out is not None)
        if out is None:
            yield assessment
            return
        ranks.once(lambda: make(out, named=True))
        with held(out):
            assessment.begin()
            yield assessment


def _taken(out: Path, adds: str, recipe: Recipe) -> bool:
    """Whether a folder holds anything but what this command, stopped, or the other one left by the same recipe."""
    if not out.is_dir():
        return out.exists()
    found = {path.name for path in out.iterdir()}
    other = RELEARNED if adds == EVALUATED else EVALUATED
    if "recipe.yaml" not in found or found - {other, "recipe.yaml", "environment.json", "checkpoints"}:
        return bool(found)
    return (out / "recipe.yaml").read_text(encoding="utf-8") != recipe.to_yaml()


def _checkpoint(model: str, adapter: Adapter) -> str:
    """What to load. Raises ModelError when it is no checkpoint, or not one of the adapter's family."""
    if is_tiny(model):
        raise ModelError(
            f"{model}: a tiny model has no checkpoint before a recipe teaches it; give a folder or a hub id"
        )
    inside = Path(model) / "model"
    source = str(inside) if os.path.isfile(inside / "config.json") else model
    describe(source, adapter)
    return source
