"""A run from recipe to report: vanilla -> reference -> mask -> unlearn -> evaluate -> attack -> report.

Each stage leaves its result in the run directory; with `--resume` a finished stage is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from pydantic import ValidationError

from vkd_framework import attacks, data, external, methods, proofs, pruning, ranks, relearn, report, saliency
from vkd_framework.answers import changed_text, degenerate_shares, guessed
from vkd_framework.attacks.target import Target
from vkd_framework.cache import CODE, cache_folder
from vkd_framework.checkpoint import Stages, atomic_folder, read_json, write_json, write_text
from vkd_framework.errors import ProofError, RecipeError
from vkd_framework.estimate.known import estimate_of, looked_at, told
from vkd_framework.estimate.text import against
from vkd_framework.evaluate import evaluate
from vkd_framework.int8 import hold_language_model_in_int8
from vkd_framework.layers_table import describe, plan, source_hash
from vkd_framework.machine import environment, peak_memory, resident_memory
from vkd_framework.plugins import MLLM, Adapter, Anatomy, installed_adapters, load_adapter, trainable
from vkd_framework.progress import log_to, say
from vkd_framework.recipe import Recipe, digest, find_recipe, load_recipe
from vkd_framework.types import PARTS, AttackCurve, ImageQuestionPair, Splits
from vkd_framework.unlearn import History, active_parameters, unlearn
from vkd_framework.vanilla import attend, device_of, save, starting_model, teaching_seconds
from vkd_framework.verdict import verdict

TAUGHT = "taught"
UNMEASURED = ("name", "description", "method", "seed", "teach", "reference", "layers", "unlearn")
"""Sections of a recipe that decide nothing about what is measured on a taught model, beside those of the method."""


def dry_run(
    reference: str, overrides: tuple[str, ...], *, gpu: str | None = None, gpu_memory: str | None = None
) -> str:
    """The resolved recipe, what it would train and what that would cost; reads no weights and writes nothing."""
    recipe = load_recipe(reference, overrides)
    adapter = load_adapter(recipe.adapter)
    anatomy, found = looked_at(recipe, adapter, _check_model(recipe, adapter))
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
    return f"{recipe.to_yaml()}\n{plan(recipe, anatomy)}\n\n{cost}"


def run(
    reference: str, overrides: tuple[str, ...] = (), *, out: Path | None = None, resume: bool = False
) -> tuple[dict[str, Any], Path]:
    """Do the whole run; returns its metrics and its folder. Nothing is written before everything is checked."""
    recipe, adapter = checked(reference, overrides)
    folder = ranks.once(lambda: _run_folder(recipe, out, resume))
    splits = data.load(recipe.data)
    relearn.attackers(recipe.relearn, splits)
    if recipe.teacher.kind == "external" and recipe.distilled:
        # weights that cannot be had are told before anything is taught
        external.load(recipe.teacher, torch.device("cpu"), recipe.seed)
    try:
        ranks.once(lambda: folder.mkdir(parents=True, exist_ok=True))
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    with log_to(folder / "log.txt"):
        people = f"{len(splits.forget_subjects)} of {len(splits.subjects)} people are to be forgotten"
        say(f"{recipe.name}: {people}; results in {folder}")
        return Run(recipe, adapter, splits, folder, find_recipe(reference).read_text(encoding="utf-8")).all(), folder


def checked(reference: str, overrides: tuple[str, ...] = ()) -> tuple[Recipe, Adapter]:
    """The recipe and its adapter, when its layers are there and its device is; reads no weights and writes nothing."""
    recipe = load_recipe(reference, overrides)
    adapter = load_adapter(recipe.adapter)
    _check_model(recipe, adapter)
    return recipe, adapter


def _check_model(recipe: Recipe, adapter: Adapter) -> Anatomy:
    anatomy = describe(recipe.model.source, adapter)
    terms = recipe.losses
    for where, names in (
        ("layers", recipe.layers),
        ("losses.attract.layers", terms.attract.layers),
        ("losses.repel.layers", terms.repel.layers),
    ):
        for name in names or ():
            layer = anatomy.layer(name, where)
            if not layer.reaches_language_model:
                raise RecipeError(
                    f"{where}: {name} does not reach the language model, distilling it changes no answer; "
                    "see `vkd inspect-layers`"
                )
    teacher = recipe.teacher
    if teacher.kind == "external":
        external.check(teacher)
    elif teacher.source not in (None, "retain_only"):
        describe(teacher.source, adapter)
    device_of(recipe)
    return anatomy


def _run_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """Where the run is written. With `resume`, an existing run of the same resolved recipe."""
    if not resume:
        folder = out or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
            raise RecipeError(f"{folder}: exists already; add --resume to go on with it, or choose another --out")
        return folder
    candidates = [out] if out else sorted(Path("runs").glob(f"{recipe.name}-*"), reverse=True)
    for folder in candidates:
        if recipe_of(folder) == recipe.digest():
            return folder
    if out and out.exists() and any(out.iterdir()):
        raise RecipeError(
            f"{out}: holds no run of this recipe with these settings; resume with the same --set, or leave --resume out"
        )
    if out:
        return out
    raise RecipeError(
        f"runs/{recipe.name}-*: no run of this recipe with these settings to resume; leave --resume out, or give --out"
    )


def recipe_of(folder: Path) -> str | None:
    """The digest of the recipe that a run folder was made with; None where there is none to be read."""
    try:
        return Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))).digest()
    except (OSError, yaml.YAMLError, ValidationError, UnicodeDecodeError):
        return None


@dataclass(frozen=True)
class Run:
    """The stages of one run. Every method does its stage, or reads what it left behind."""

    recipe: Recipe
    adapter: Adapter
    splits: Splits
    folder: Path
    source_text: str

    def all(self) -> dict[str, Any]:
        """Every stage in order; returns the metrics. Raises ProofError after the report when a proof failed."""
        write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
        write_text(self.folder / "recipe.source.yaml", self.source_text)
        write_json(self.folder / "environment.json", environment(self.device))
        expected = self.stages.run("estimate", self._estimate)
        models = {"vanilla": self._starting_model("vanilla", knows_forgotten=True)}
        if self.recipe.reference == "retain_only":
            models["retain_only"] = self._starting_model("retain_only", knows_forgotten=False)
        self._mask(models["vanilla"])
        outcome = self._unlearn(models["vanilla"])
        models["unlearned"] = str(self.folder / "model")
        columns = {name: self._evaluate(name, source) for name, source in models.items()}
        curves = [
            curve
            for name in ("unlearned", "retain_only")
            if name in models
            for curve in self._attack(name, models[name], columns[name])
        ]
        attacked = [
            result for name, source in models.items() for result in self._other_attacks(name, source, models["vanilla"])
        ]
        metrics = self._metrics(outcome, columns, curves, attacked, expected)
        self._report(metrics, curves, columns)
        if broken := proofs.failed(metrics["proofs"], self.recipe.train):
            raise ProofError(
                f"{self.folder}: proof failed: {', '.join(broken)}; see report.html. The result must not be used"
            )
        return metrics

    def _estimate(self) -> dict[str, float]:
        """What the run is expected to cost, before anything is loaded."""
        anatomy = describe(self.recipe.model.source, self.adapter)
        found = estimate_of(self.recipe, self.adapter, anatomy, self.device, self.splits, process=resident_memory())
        return {"step_seconds": found.step_seconds, "peak_memory_bytes": found.peak.bytes}

    @cached_property
    def device(self) -> str:
        """The device of the recipe, `auto` resolved."""
        return device_of(self.recipe)

    @cached_property
    def stages(self) -> Stages:
        """What is finished."""
        return Stages(self.folder / "checkpoints", peak_memory)

    def _load(self, source: str) -> MLLM:
        quantized = self.recipe.model.quantize is not None
        mllm = self._load_as_it_is(source, "cpu" if quantized else self.device)
        if quantized:
            hold_language_model_in_int8(mllm)
            mllm.model.to(self.device)
        mllm.model.requires_grad_(False)
        if self.recipe.model.attention is not None:
            attend(mllm, self.recipe.model.attention)
        return mllm

    def _load_as_it_is(self, source: str, device: str) -> MLLM:
        return self.adapter.load(source, getattr(torch, self.recipe.model.dtype), device)

    def _starting_model(self, name: str, *, knows_forgotten: bool) -> str:
        source: str = self.stages.run(
            f"teach-{name}",
            lambda: starting_model(
                self.adapter, self.recipe, self.splits, self.device, knows_forgotten=knows_forgotten
            ),
        )
        if self.recipe.teach is not None and not Path(source).exists():
            return starting_model(self.adapter, self.recipe, self.splits, self.device, knows_forgotten=knows_forgotten)
        return source

    @property
    def _has_mask(self) -> bool:
        return self.recipe.mask.kind != "none" or self.recipe.procedure == "prune"

    def _mask(self, vanilla: str) -> None:
        recipe, splits = self.recipe, self.splits
        if not self._has_mask:
            return
        if not ranks.once((self.folder / "mask.safetensors").exists):
            ranks.once(lambda: self.stages.forget("mask"))

        def work() -> dict[str, Any]:
            mllm = self._load(vanilla)
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
            ranks.once(lambda: saliency.save_mask(self.folder / "mask.safetensors", mask, versions))
            return {"weights": kept}

        self.stages.run("mask", work)

    def _unlearn(self, vanilla: str) -> dict[str, Any]:
        recipe, masked = self.recipe, self.recipe.keeps_masked_weights

        def work() -> dict[str, Any]:
            mllm = self._load(vanilla)
            mllm.check_prompt_is_prefix(self.splits.forget[0])
            parameters = mllm.parameters(recipe.train)
            mask = saliency.load_mask(self.folder / "mask.safetensors", parameters) if self._has_mask else None
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
                    reference=lambda: self._load(self._retain_only()),
                    ignorant=lambda: self._load(self._ignorant()),
                )
            else:
                self._record([])
                if mask is not None:
                    pruning.prune(parameters, mask)
                else:
                    source = self._retain_only()
                    taught_for, mllm = teaching_seconds(source), self._load(source)
            ranks.once(partial(self._save, mllm, vanilla))
            after = proofs.witness(mllm, asked, list(parameters), mask)
            outcome = {
                "trainable_parameters": mllm.count(recipe.train),
                "active_parameters": active_parameters(parameters, mask if masked else None),
                "total_parameters": mllm.count(PARTS),
            }
            trained = list(parameters)
            del mllm, parameters
            reloaded = proofs.witness(self._load(str(self.folder / "model")), asked, trained, mask)
            ranks.once(lambda: resume.unlink(missing_ok=True))
            compared = proofs.compare(before, after, reloaded, masked=masked)
            return {**outcome, "teaching_seconds": taught_for, "proofs": compared}

        result: dict[str, Any] = self.stages.run("unlearn", work)
        return result

    def _save(self, mllm: MLLM, vanilla: str) -> None:
        """Keep the result; a language model that was held in 8 bits is kept as it was before."""
        if self.recipe.model.quantize is not None:
            tuned, mllm = mllm.parameters(self.recipe.train), self._load_as_it_is(vanilla, "cpu")
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
        write_text(self.folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))

    def _witness_pairs(self) -> list[ImageQuestionPair]:
        """Measured questions of every column in turn: text-only, about the forgotten, about the others."""
        rounds = zip_longest(*self.splits.columns.values())
        return [pair for turn in rounds for pair in turn if pair is not None]

    def _shared(self, source: str) -> Path | None:
        """Where what is measured on a taught model is kept for runs of other methods and seeds; None for other models.

        The name of a taught model's folder is a hash of its content. A hub id or a user's folder may change.
        """
        taught = cache_folder() / "taught"
        if self.recipe.teach is None or Path(source).parent != taught:
            return None
        skipped = {*UNMEASURED, *(key.partition(".")[0] for key in methods.OWNED)}
        settings = self.recipe.model_dump(mode="json", exclude=skipped)
        facts = environment(self.device)
        adapter = [source_hash(one) for one in installed_adapters() if one.name == self.adapter.name]
        key = digest(
            [CODE, adapter, facts["torch"], facts["transformers"], facts["device"], Path(source).name, settings]
        )
        return cache_folder() / "measured" / key

    def _evaluate(self, name: str, source: str) -> dict[str, Any]:
        """Column -> {cell, answers} of one model; for the vanilla model also `taught`, over everybody it was taught."""

        def work() -> dict[str, Any]:
            columns = dict(self.splits.columns)
            if name == "vanilla" and self.splits.taught:
                columns[TAUGHT] = self.splits.taught
            answered = evaluate(self._load(source), columns, self.recipe.evaluate, what=f"evaluate {name}")
            return {
                column: {"cell": asdict(result.cell), "answers": result.answers, "cut": result.cut}
                for column, result in answered.items()
            }

        result: dict[str, Any] = self.stages.run(f"evaluate-{name}", work, shared=self._shared(source))
        exact = {column: f"{found['cell']['exact_match']:.1%}" for column, found in result.items()}
        say(f"{name}: " + ", ".join(f"{column} {value}" for column, value in exact.items()))
        return result

    def _attack(self, name: str, source: str, columns: Mapping[str, Any]) -> list[AttackCurve]:
        before = columns["test_vqa"]["cell"]["exact_match"]
        stage = self._stage_with(source, self._shared(source))
        curves = relearn.attack(
            name, self.recipe.relearn, self.splits, self.recipe.evaluate, before=before, stage=stage
        )
        for curve in curves:
            points = ", ".join(
                f"{score:.0%} after {step}" for step, score in zip(curve.steps, curve.exact_match, strict=True)
            )
            say(f"attack on {name}, {curve.scope}, {curve.pairs} {curve.pool} pairs, seed {curve.seed}: {points}")
        return curves

    def _other_attacks(self, name: str, source: str, vanilla: str) -> list[dict[str, Any]]:
        """The recipe's `attacks` on one model."""
        shared = self._shared(source) if name != "unlearned" else None  # it is attacked with the vanilla model's help
        recipe, run_stage = self.recipe, self._stage_with(source, shared)

        def stage(key: str, work: Callable[[Target], dict[str, Any]]) -> dict[str, Any]:
            def aim(mllm: MLLM) -> dict[str, Any]:
                return work(Target(name, mllm, self.splits, recipe.evaluate, lambda: self._load(vanilla)))

            result: dict[str, Any] = run_stage(key, aim)
            return result

        return attacks.attack(name, recipe.attacks, stage=stage)

    def _stage_with(self, source: str, shared: Path | None) -> Callable[[str, Callable[[MLLM], Any]], Any]:
        """What runs stages that need the model of `source`; it is loaded for the first that is not finished."""
        loaded: list[MLLM] = []

        def stage(key: str, work: Callable[[MLLM], Any]) -> Any:
            def load_and_work() -> Any:
                if not loaded:
                    loaded.append(self._load(source))
                return work(loaded[0])

            return self.stages.run(key, load_and_work, shared=shared)

        return stage

    def _metrics(
        self,
        outcome: Mapping[str, Any],
        columns: Mapping[str, Any],
        curves: list[AttackCurve],
        attacked: list[dict[str, Any]],
        expected: Mapping[str, float],
    ) -> dict[str, Any]:
        cells = {
            model: {name: found["cell"] for name, found in answered.items()} for model, answered in columns.items()
        }
        taught = cells["vanilla"].pop(TAUGHT, None)
        mask_file = self.folder / "mask.safetensors"
        seconds = {
            f"{stage}_seconds": self.stages.seconds(stage)
            for stage in ("teach", "mask", "unlearn", "evaluate", "relearn", "attacks")
        }
        if outcome["teaching_seconds"] is not None:
            seconds["unlearn_seconds"] = outcome["teaching_seconds"]
        tunes = self.recipe.procedure == "tune"
        concluded, marked = attacks.conclude(attacked, self.splits.columns["test_vqa"])
        metrics = {
            "schema": 1,
            "recipe": self.recipe.name,
            "adapter": self.recipe.adapter,
            "method": self.recipe.method,
            "train": list(self.recipe.train),
            "seed": self.recipe.seed,
            "models": cells,
            **({"taught": {"test_vqa_all_people": taught}} if taught else {}),
            "proofs": outcome["proofs"],
            "relearn": relearn.summarise(
                curves, cells["vanilla"]["test_vqa"]["exact_match"], self.splits.columns["test_vqa"]
            ),
            "attacks": concluded,
            **({"over_forgotten": marked} if marked else {}),
            **self._guards(columns),
            "cost": {
                **seconds,
                "total_seconds": sum(seconds.values()),
                "step_seconds": seconds["unlearn_seconds"] / self.recipe.unlearn.steps if tunes else None,
                "estimated_step_seconds": expected["step_seconds"] if tunes else None,
                "peak_memory_bytes": self.stages.peak_memory(),
                "estimated_peak_memory_bytes": round(expected["peak_memory_bytes"]),
                "trainable_parameters": outcome["trainable_parameters"],
                "active_parameters": outcome["active_parameters"],
                "total_parameters": outcome["total_parameters"],
                "mask_bytes": mask_file.stat().st_size if mask_file.exists() else 0,
            },
        }
        say(against(metrics["cost"]))
        metrics["verdict"] = asdict(verdict(metrics))
        write_json(self.folder / "relearn.json", metrics["relearn"])
        write_json(self.folder / "metrics.json", metrics)
        return metrics

    def _guards(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The signs below, and how long the retain floor kept it from forgetting."""
        found = self._signs(columns)
        if self.recipe.unlearn.retain_floor is not None and self.recipe.procedure == "tune":
            repaired = sum("guard" in entry for entry in self._history())
            steps = self.recipe.unlearn.steps
            found["retain_floor"] = {"floor": self.recipe.unlearn.retain_floor, "steps_below": repaired, "steps": steps}
        return found

    def _signs(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """What guessing gives, and what else tells of damage."""
        # whom a model taught anew never read about, it cannot answer about
        unread = self.splits.forget_subjects if self.recipe.procedure == "reteach" else ()
        found: dict[str, Any] = {
            "guessed": {column: guessed(pairs) for column, pairs in self.splits.columns.items() if pairs},
            "degenerate": degenerate_shares(self.splits.columns, columns["vanilla"], columns["unlearned"]),
            "text_only": changed_text(self.splits.columns, columns["vanilla"], columns["unlearned"], without=unread),
        }
        return {name: block for name, block in found.items() if block}

    def _history(self) -> History:
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _report(self, metrics: Mapping[str, Any], curves: list[AttackCurve], columns: Mapping[str, Any]) -> None:
        facts = read_json(self.folder / "environment.json")
        samples = report.pick_samples(self.splits, columns)
        history = self._history()
        for name, render in (("report.html", report.render_html), ("report.md", report.render_markdown)):
            text = render(
                metrics, curves, samples, environment=facts, recipe_text=self.recipe.to_yaml(), history=history
            )
            write_text(self.folder / name, text)
        card = report.render_model_card(
            metrics,
            base_model=self.recipe.model.source,
            environment=facts,
            forget_count=len(self.splits.forget_subjects),
        )
        write_text(self.folder / "model" / "README.md", card)
