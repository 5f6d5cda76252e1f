"""A run from recipe to report: vanilla -> reference -> mask -> unlearn -> evaluate -> attack -> report.

Each stage leaves its result in the run directory; with `--resume` a finished stage is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers

from vkd_framework import data, external, proofs, pruning, ranks, report, saliency
from vkd_framework.checkpoint import atomic_folder, read_json, write_json, write_text
from vkd_framework.errors import ProofError
from vkd_framework.estimate.known import estimate_of, looked_at, told
from vkd_framework.estimate.text import against
from vkd_framework.layers_table import describe, plan
from vkd_framework.machine import environment, resident_memory
from vkd_framework.plugins import MLLM, load_adapter, trainable
from vkd_framework.progress import log_to, say
from vkd_framework.recipe import find_recipe, is_tiny, load_recipe
from vkd_framework.run.checks import check_model, check_pairs, check_photos, checked
from vkd_framework.run.folder import check_data, check_models, held, make, run_folder
from vkd_framework.run.measurements import Measurements
from vkd_framework.run.metrics import cost_of, metrics_of
from vkd_framework.types import PARTS, AttackCurve, ImageQuestionPair
from vkd_framework.unlearn import History, active_parameters, unlearn
from vkd_framework.vanilla import device_of, save, starting_model, teaching_seconds
from vkd_framework.verdict import STILL_ANSWERED


def dry_run(
    reference: str, overrides: tuple[str, ...], *, gpu: str | None = None, gpu_memory: str | None = None
) -> str:
    """The resolved recipe, what it would train, on what, and what that would cost.

    Reads no weights and writes nothing. Raises DataError for broken data; those that only the hub has are assumed.
    """
    recipe = load_recipe(reference, overrides)
    adapter = load_adapter(recipe.adapter)
    anatomy = check_model(recipe, adapter)
    splits = data.load(recipe.data) if data.is_here(recipe.data) else None
    if splits is not None:
        check_pairs(recipe, splits)
        check_photos(recipe, adapter, splits)
    anatomy, found = looked_at(recipe, adapter, anatomy, splits)
    cost = told(
        recipe,
        anatomy,
        found,
        device_of(recipe),
        lambda more: load_recipe(reference, (*overrides, *more)),
        gpu=gpu,
        gpu_memory=gpu_memory,
        process=resident_memory(),
    )
    pairs = "pairs    assumed: the data come from the hub" if splits is None else data.told(splits)
    return f"{recipe.to_yaml()}\n{plan(recipe, anatomy)}\n{pairs}\n\n{cost}"


def run(
    reference: str, overrides: tuple[str, ...] = (), *, out: Path | str | None = None, resume: bool = False
) -> tuple[dict[str, Any], Path]:
    """Do the whole run; returns its metrics and its folder. Nothing is written before everything is checked.

    `reference`: a recipe file, or the name of one that comes along; `overrides`: as `--set` takes them. Raises
    RecipeError, DataError, AdapterError or ModelError for what cannot be run, DivergedError when training runs away,
    and ProofError after everything was written, when the result must not be used.
    """
    recipe, adapter = checked(reference, overrides)
    folder = ranks.once(lambda: run_folder(recipe, None if out is None else Path(out), resume))
    splits = data.load(recipe.data)
    check_pairs(recipe, splits)
    check_photos(recipe, adapter, splits)
    if recipe.teacher.kind == "external" and recipe.distilled:
        # weights that cannot be had are told before anything is taught
        external.load(recipe.teacher, torch.device("cpu"), recipe.seed)
    folder = ranks.once(lambda: make(folder, named=resume or out is not None))
    with held(folder), log_to(folder / "log.txt"):
        people = f"{len(splits.forget_subjects)} of {len(splits.subjects)} people are to be forgotten"
        say(f"{recipe.name}: {people}; results in {folder}")
        return Run(recipe, adapter, splits, folder, find_recipe(reference).read_text(encoding="utf-8")).all(), folder


@dataclass(frozen=True)
class Run(Measurements):
    """The stages of one run. Every method does its stage, or reads what it left behind."""

    source_text: str

    def all(self) -> dict[str, Any]:
        """Every stage in order; returns the metrics.

        Raises DataError or ModelError when the run began with other data or another model, ProofError after the report
        when a proof failed.
        """
        write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
        check_data(self.folder, self.stages, self.splits)
        check_models(self.folder, self.stages, self.sources)
        write_text(self.folder / "recipe.source.yaml", self.source_text)
        write_json(self.folder / "environment.json", environment(self.device))
        expected = self.stages.run("estimate", self._estimate)
        models = {"vanilla": self.starting("vanilla", knows_forgotten=True)}
        if self.recipe.reference == "retain_only":
            models["retain_only"] = self.starting("retain_only", knows_forgotten=False)
        columns = {"vanilla": self._known(models["vanilla"])}
        self._mask(models["vanilla"])
        outcome = self._unlearn(models["vanilla"])
        models["unlearned"] = str(self.folder / "model")
        columns |= {name: self.answers(name, source) for name, source in models.items() if name != "vanilla"}
        curves = [
            curve
            for name in ("unlearned", "retain_only")
            if name in models
            for curve in self.relearned(name, models[name], columns[name])
        ]
        attacked = [result for name, source in models.items() for result in self.tried(name, source, models["vanilla"])]
        mask_bytes = self._mask_file.stat().st_size if self._mask_file.exists() else 0
        metrics = metrics_of(
            self.recipe,
            self.splits,
            outcome,
            columns,
            curves,
            attacked,
            signs=self.signs(columns),
            history=self._history(),
            cost=cost_of(self.recipe, self.stages, outcome, expected, mask_bytes=mask_bytes),
        )
        say(against(metrics["cost"]))
        write_json(self.folder / "relearn.json", metrics["relearn"])
        write_json(self.folder / "metrics.json", metrics)
        self._report(metrics, curves, columns)
        if broken := proofs.failed(metrics["proofs"], self.recipe.train):
            raise ProofError(
                f"{self.folder}: proof failed: {', '.join(broken)}; see report.html. The result must not be used"
            )
        return metrics

    @property
    def sources(self) -> dict[str, str]:
        """What is loaded that this run does not make itself: key of the recipe -> folder or hub id."""
        source, teacher = self.recipe.model.source, self.recipe.teacher
        found = {} if is_tiny(source) else {"model.source": source}
        if teacher.kind == "ignorant" and teacher.source is not None and teacher.source != "retain_only":
            found["teacher.source"] = teacher.source
        return found

    def _estimate(self) -> dict[str, float]:
        """What the run is expected to cost, before anything is loaded."""
        anatomy = describe(self.recipe.model.source, self.adapter)
        found = estimate_of(self.recipe, self.adapter, anatomy, self.device, self.splits, process=resident_memory())
        return {"step_seconds": found.step_seconds, "peak_memory_bytes": found.peak.bytes}

    def _known(self, vanilla: str) -> dict[str, Any]:
        """The starting model's columns; says before anything is unlearned when there is little to unlearn."""
        columns = self.answers("vanilla", vanilla)
        if (known := columns["test_vqa"]["cell"]["exact_match"]) <= STILL_ANSWERED:
            say(
                f"warning: the starting model gives {known:.1%} exact answers about the forgotten people, so there is "
                "little to forget. Does it know them, and are the answers in its own words?"
            )
        return columns

    @property
    def _mask_file(self) -> Path:
        return self.folder / "mask.safetensors"

    @property
    def _has_mask(self) -> bool:
        return self.recipe.mask.kind != "none" or self.recipe.procedure == "prune"

    def _mask(self, vanilla: str) -> None:
        recipe, splits = self.recipe, self.splits
        if not self._has_mask:
            return
        if not ranks.once(self._mask_file.exists):
            ranks.once(lambda: self.stages.forget("mask"))

        def work() -> dict[str, Any]:
            mllm = self.load(vanilla)
            if recipe.procedure == "prune":
                mask = pruning.build_prune_mask(
                    mllm, recipe.prune, recipe.train, splits.forget, splits.retain, seed=recipe.seed
                )
                what = "are set to 0"
            else:
                mask = saliency.build_mask(
                    mllm,
                    recipe.mask,
                    trainable(mllm, recipe.train),
                    splits.forget,
                    splits.retain,
                    seed=recipe.seed,
                    text=splits.text,
                )
                what = "may move for forgetting"
            kept = saliency.count(mask)
            say(f"mask: {kept:,} of {mllm.count(recipe.train):,} weights {what}")
            versions = {
                "recipe": self.recipe.digest(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            ranks.once(lambda: saliency.save_mask(self._mask_file, mask, versions))
            return {"weights": kept}

        self.stages.run("mask", work)

    def _unlearn(self, vanilla: str) -> dict[str, Any]:
        recipe, masked = self.recipe, self.recipe.keeps_masked_weights

        def work() -> dict[str, Any]:
            mllm = self.load(vanilla)
            mllm.check_prompt_is_prefix(self.splits.forget[0])
            parameters = mllm.parameters(recipe.train)
            mask = saliency.load_mask(self._mask_file, parameters) if self._has_mask else None
            asked = self._witness_pairs()
            before = proofs.witness(mllm, asked, list(parameters), mask)
            resume = self.folder / "checkpoints" / "unlearn.pt"
            taught_for = None
            if recipe.procedure == "tune":
                unlearn(
                    mllm,
                    recipe,
                    self.splits,
                    mask,
                    resume=resume,
                    record=self._record,
                    reference=lambda: self.load(self._retain_only()),
                    ignorant=lambda: self.load(self._ignorant()),
                )
            else:
                self._record([])
                if mask is not None:
                    pruning.prune(parameters, mask)
                else:
                    source = self._retain_only()
                    taught_for, mllm = teaching_seconds(source), self.load(source)
            ranks.once(partial(self._save, mllm, vanilla))
            after = proofs.witness(mllm, asked, list(parameters), mask)
            outcome = {
                "trainable_parameters": mllm.count(recipe.train),
                "active_parameters": active_parameters(parameters, mask if masked else None),
                "total_parameters": mllm.count(PARTS),
            }
            trained = list(parameters)
            del mllm, parameters
            reloaded = proofs.witness(self.load(str(self.folder / "model")), asked, trained, mask)
            ranks.once(lambda: resume.unlink(missing_ok=True))
            compared = proofs.compare(before, after, reloaded, masked=masked)
            return {**outcome, "teaching_seconds": taught_for, "proofs": compared}

        result: dict[str, Any] = self.stages.run("unlearn", work)
        return result

    def _save(self, mllm: MLLM, vanilla: str) -> None:
        """Keep the result; a language model that was held in 8 bits is kept as it was before."""
        if self.recipe.model.quantize is not None:
            tuned, mllm = mllm.parameters(self.recipe.train), self.load_as_it_is(vanilla, "cpu")
            with torch.no_grad():
                for name, parameter in mllm.parameters(self.recipe.train).items():
                    parameter.copy_(tuned[name])
        with atomic_folder(self.folder / "model") as temporary:
            save(mllm, temporary)

    def _retain_only(self) -> str:
        return starting_model(self.adapter, self.recipe, self.splits, self.device, knows_forgotten=False)

    def _ignorant(self) -> str:
        source = self.recipe.teacher.source or ""
        return self._retain_only() if source == "retain_only" else source

    def _record(self, history: History) -> None:
        if 0 < len(history) < self.recipe.unlearn.steps:  # a state to go on from was saved
            self.stages.count("unlearn")
        write_text(self.folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))

    def _witness_pairs(self) -> list[ImageQuestionPair]:
        """Measured questions of every column in turn: text-only, about the forgotten, about the others."""
        rounds = zip_longest(*self.splits.columns.values())
        return [pair for turn in rounds for pair in turn if pair is not None]

    def _history(self) -> History:
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _report(self, metrics: Mapping[str, Any], curves: list[AttackCurve], columns: Mapping[str, Any]) -> None:
        facts = read_json(self.folder / "environment.json")
        samples = report.pick_samples(self.splits, columns)
        people = report.people_rows(self.splits, columns)
        history = self._history()
        for name, render in (("report.html", report.render_html), ("report.md", report.render_markdown)):
            text = render(
                metrics,
                curves,
                samples,
                environment=facts,
                recipe_text=self.recipe.to_yaml(),
                history=history,
                people=people,
            )
            write_text(self.folder / name, text)
        card = report.render_model_card(
            metrics,
            base_model=self.recipe.model.source,
            environment=facts,
            forget_count=len(self.splits.forget_subjects),
        )
        write_text(self.folder / "model" / "README.md", card)
