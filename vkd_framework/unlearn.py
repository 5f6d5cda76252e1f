"""VKD: forget people by tuning the visual modules only, supervised by answers and by a teacher's visual features.

Source: Wang et al., arXiv 2512.11325 (the losses are a reconstruction, see `losses`). Two things are ours: the schedule
in phases (forget strongly, then repair with a weak forget term left on), and that a visible question about a forgotten
person's photo is retained at the output while its features are free to move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework import losses
from vkd_framework.batches import Batches
from vkd_framework.checkpoint import load_training, save_training
from vkd_framework.errors import RecipeError
from vkd_framework.features import FeatureTap, Teacher, photo_features, vision_forward
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.progress import Progress
from vkd_framework.recipe import FeatureTerm, Recipe, UnlearnConfig
from vkd_framework.saliency import Mask, mask_gradients, restore_masked
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Splits

History = list[dict[str, Any]]


def unlearn(
    mllm: MLLM,
    recipe: Recipe,
    splits: Splits,
    mask: Mask | None,
    *,
    resume: Path,
    record: Callable[[History], None],
) -> History:
    """Tune the visual modules of `mllm` in place; returns one entry a step. `resume` keeps a state to go on from."""
    config = recipe.unlearn
    parameters = trainable(mllm, recipe.train)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()} if mask else {}
    objective = Objective(mllm, recipe, splits)
    forget = Batches(splits.forget, config.forget_batch, recipe.seed)
    retain = Batches(splits.retain, config.retain_batch, recipe.seed + 1)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    done, history = load_training(resume, parameters, optimizer)
    progress = Progress(range(done, config.steps), "unlearn")
    for step in progress:
        if step > done and step % config.checkpoint_every == 0:
            save_training(resume, step, parameters, optimizer, history)
            record(history)
        rate = config.learning_rate * rate_factor(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        phase = phase_at(step, config)
        optimizer.zero_grad(set_to_none=True)
        forget_loss, forget_terms = objective.forget(forget.batch(step))
        if not forget_loss.requires_grad:
            raise RecipeError(
                f"train: {', '.join(recipe.train)} has no influence on the forget terms; "
                "train what lies before losses.repel.layers, or give losses.forget_output a weight"
            )
        torch.autograd.backward(config.phases[phase].forget * forget_loss)
        if mask and recipe.mask.scope == "forget":
            mask_gradients(parameters, mask)
        retain_loss, retain_terms = objective.retain(retain.batch(step))
        if retain_loss.requires_grad:
            torch.autograd.backward(retain_loss)
        if mask and recipe.mask.scope == "all":
            mask_gradients(parameters, mask)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        optimizer.step()
        if mask and recipe.mask.scope == "all":
            restore_masked(parameters, mask, start)
        entry = {"step": step, "phase": phase, "lr": rate, "gradient_norm": float(norm), **forget_terms, **retain_terms}
        history.append({key: round(value, 6) if isinstance(value, float) else value for key, value in entry.items()})
        progress.note = ", ".join(f"{name} {value:.2f}" for name, value in {**forget_terms, **retain_terms}.items())
    mllm.model.requires_grad_(False)
    record(history)
    return history


@dataclass(frozen=True)
class _Term:
    """A feature term with its layers resolved."""

    weight: float
    layers: tuple[str, ...]
    distance: losses.Distance


class Objective:
    """The recipe's losses on a batch. Only output terms cost a pass through the language model."""

    def __init__(self, mllm: MLLM, recipe: Recipe, splits: Splits) -> None:
        terms = recipe.losses
        self._mllm = mllm
        self._forget_output, self._retain_output, self._repel_cap = (
            terms.forget_output,
            terms.retain_output,
            terms.repel.cap,
        )
        self._attract, self._repel = (self._feature_term(term, recipe.layers) for term in (terms.attract, terms.repel))
        self._forgotten = set(splits.forget_subjects)
        taught = [*(splits.retain if self._attract.weight else ()), *(splits.forget if self._repel.weight else ())]
        self._teacher = Teacher(mllm, dict.fromkeys((*self._attract.layers, *self._repel.layers)), taught)

    def forget(self, pairs: Sequence[ImageQuestionPair]) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the forget terms, and each term before weighting."""
        terms = {}
        output = self._forget_output
        batch, distance, logits = self._forward(pairs, [True] * len(pairs), self._repel, with_output=output.weight > 0)
        loss = torch.zeros((), device=self._mllm.device)
        if logits is not None:
            cross_entropy = losses.answer_cross_entropy(logits, batch.inputs["input_ids"], batch.content)
            loss = loss + output.weight * losses.capped_ascent(cross_entropy, output.cap)
            terms["forget_output"] = cross_entropy.mean().item()
        if distance is not None:
            loss = loss + self._repel.weight * losses.repel(distance, self._repel_cap)
            terms["repel"] = distance.mean().item()
        return loss, terms

    def retain(self, pairs: Sequence[ImageQuestionPair]) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the retain terms, and each term before weighting."""
        terms = {}
        output = self._retain_output
        kept = [pair.subject not in self._forgotten for pair in pairs]
        batch, distance, logits = self._forward(pairs, kept, self._attract, with_output=output.weight > 0)
        loss = torch.zeros((), device=self._mllm.device)
        if logits is not None:
            cross_entropy = losses.answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != -100)
            loss = loss + output.weight * cross_entropy.mean()
            terms["retain_output"] = cross_entropy.mean().item()
        if distance is not None:
            loss = loss + self._attract.weight * losses.attract(distance)
            terms["attract"] = distance.mean().item()
        return loss, terms

    def _forward(
        self, pairs: Sequence[ImageQuestionPair], compared: Sequence[bool], term: _Term, *, with_output: bool
    ) -> tuple[EncodedBatch, Tensor | None, Tensor | None]:
        """Encode; logits when asked for; and distances to the teacher of the `compared` pairs that have a photo."""
        layers = tuple(self._mllm.layer(name) for name in term.layers)
        batch = self._mllm.tokenize(pairs)
        logits = None
        with FeatureTap(self._mllm.model, layers) as tap:
            if with_output:
                logits = self._mllm.model(**batch.inputs).logits
            elif layers:
                vision_forward(self._mllm, batch.inputs)
        wanted = [b for b, pair in enumerate(pairs) if pair.photos and compared[b]]
        if not layers or not wanted:
            return batch, None, logits
        found = photo_features(self._mllm, batch.inputs, tap)
        return batch, self._distances(found, pairs, wanted, term), logits

    def _distances(
        self, found: Mapping[str, Any], pairs: Sequence[ImageQuestionPair], wanted: Sequence[int], term: _Term
    ) -> Tensor:
        """`[layers, len(wanted)]`: the distance of each wanted sample to the teacher at each layer."""
        chosen = torch.tensor(wanted, device=self._mllm.device)
        per_layer = []
        for layer in term.layers:
            student = found[layer]
            teacher = self._teacher.rows(layer, pairs).to(student.rows)
            per_layer.append(term.distance(student.rows, teacher, student.sample, len(pairs))[chosen])
        return torch.stack(per_layer)

    @staticmethod
    def _feature_term(term: FeatureTerm, default: tuple[str, ...]) -> _Term:
        return _Term(term.weight, (term.layers or default) if term.weight else (), losses.DISTANCES[term.distance])


def phase_at(step: int, config: UnlearnConfig) -> int:
    """The index of the phase that a step belongs to."""
    end = 0.0
    for index, phase in enumerate(config.phases):
        end += phase.share * config.steps
        if step < round(end):
            return index
    return len(config.phases) - 1


def rate_factor(step: int, config: UnlearnConfig) -> float:
    """The learning rate's factor: linear warm-up, constant, then a cosine to 0 over the last `cosine_share`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    start = config.steps * (1 - config.cosine_share)
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (config.steps - start)))


def active_parameters(parameters: Mapping[str, nn.Parameter], mask: Mask | None, scope: str) -> int:
    """How many weights can move at all: with a mask of scope `all` the masked-in ones, otherwise all trained ones."""
    if mask and scope == "all":
        return sum(int(m.sum()) for m in mask.values())
    return sum(parameter.numel() for parameter in parameters.values())
