"""The loop that unlearns, the same for every method that trains: the recipe decides losses, mask, parts and phases.

The default is VKD (Wang et al., arXiv 2512.11325; the losses are a reconstruction, see `losses`): it tunes the visual
modules only. Its schedule in phases is ours: forget strongly, then repair with a weak forget term left on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework import ranks
from vkd_framework.batches import Batches, MixedBatches, shared_out
from vkd_framework.checkpoint import load_training, save_training
from vkd_framework.errors import RecipeError
from vkd_framework.gradients import adamw, check_finite
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.progress import Progress
from vkd_framework.recipe import Recipe, UnlearnConfig
from vkd_framework.retain_floor import RetainFloor
from vkd_framework.saliency import Mask, mask_gradients, restore_masked
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import ImageQuestionPair, Splits

History = list[dict[str, Any]]
REPAIR = "repair"
"""`guard` of a step in the history that forgot nothing, because the model was below its retain floor."""
REMEDY = (
    "lower unlearn.learning_rate or unlearn.steps, or take a method whose forget term is bounded (see `vkd methods`)"
)
"""What to do when unlearning runs away."""


def unlearn(
    mllm: MLLM,
    recipe: Recipe,
    splits: Splits,
    mask: Mask | None,
    *,
    resume: Path,
    record: Callable[[History], None],
    reference: Callable[[], MLLM] | None = None,
    ignorant: Callable[[], MLLM] | None = None,
) -> History:
    """Tune the parts in `train` in place; returns one entry a step. `resume` keeps a state to go on from.

    `reference` loads the retain-only model, for losses that compare with it, and `ignorant` the model of
    `teacher.kind: ignorant`. Raises DivergedError when a loss or its gradient is not finite, before the weights take it
    in.
    """
    config, stepper = recipe.unlearn, Stepper(mllm, recipe, splits, mask, reference=reference, ignorant=ignorant)
    done, history = load_training(resume, stepper.learned, stepper.optimizer)
    progress = Progress(range(done, config.steps), "unlearn")
    for step in progress:
        if step > done and step % config.checkpoint_every == 0:
            save_training(resume, step, stepper.learned, stepper.optimizer, history)
            record(history)
        entry, terms = stepper.step(step)
        history.append(
            {key: float(f"{value:.8g}") if isinstance(value, float) else value for key, value in entry.items()}
        )
        progress.note = ", ".join(f"{name} {value:.2f}" for name, value in terms.items())
    mllm.model.requires_grad_(False)
    record(history)
    return history


class Stepper:
    """Everything that one step needs, made before anything is trained; the arguments are those of `unlearn`.

    `learned`: name -> what a step changes, the losses' own parameters included.
    """

    def __init__(
        self,
        mllm: MLLM,
        recipe: Recipe,
        splits: Splits,
        mask: Mask | None,
        *,
        reference: Callable[[], MLLM] | None = None,
        ignorant: Callable[[], MLLM] | None = None,
    ) -> None:
        config = recipe.unlearn
        self._recipe, self._mask = recipe, mask
        self._parameters = trainable(mllm, recipe.train)
        restored = self._parameters if mask and recipe.mask.scope == "all" else {}
        self._start = {name: parameter.detach().clone() for name, parameter in restored.items()}
        self._objective = Objective(mllm, recipe, splits, reference=reference, ignorant=ignorant)
        self.learned = {**self._parameters, **self._objective.learned}
        self._forget = Batches(splits.forget, config.forget_batch, recipe.seed)
        self._some_forget_photos = any(pair.photos for pair in splits.forget)
        self._retain = retain_batches(splits, config, recipe.seed + 1)
        self.attacker = SimulatedAttacker(
            mllm,
            self._parameters,
            recipe.simulated_attack,
            splits.forget,
            seed=recipe.seed + 2,
            restart_every=config.checkpoint_every,
            micro_batch=config.micro_batch,
        )
        self._floor = RetainFloor(mllm, config, recipe.evaluate, splits.retain, seed=recipe.seed)
        self.optimizer = adamw(
            self.learned.values(),
            master_weights=config.master_weights,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )

    def step(self, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Make one step; returns its entry in the history, and of that the loss terms before weighting."""
        recipe, mask, parameters, objective = self._recipe, self._mask, self._parameters, self._objective
        config = recipe.unlearn
        rate = config.learning_rate * rate_factor(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        phase, held = phase_at(step, config), self._floor.holds(step)
        self.optimizer.zero_grad(set_to_none=True)
        strength, reached = config.phases[phase].forget if held else 0.0, [False]
        attack = recipe.simulated_attack
        turn, forgets, attacks = step, True, True
        if attack.weight and attack.turns:
            strength, turn, forgets, attacks = 2 * strength, step // 2, step % 2 == 0, step % 2 == 1

        def down(loss: Tensor, strength: float = 1.0) -> None:
            if loss.requires_grad:
                reached.append(True)
                torch.autograd.backward(strength * loss)

        terms: dict[str, float] = {}
        if forgets and strength:
            pairs = self._forget.batch(turn)
            _, terms = objective.forget(pairs, partial(down, strength=strength))
            by_chance = self._some_forget_photos and not any(pair.photos for pair in pairs)  # a batch of text alone
            if not any(ranks.gather(any(reached))) and not by_chance:
                raise RecipeError(
                    f"train: {', '.join(recipe.train)} has no influence on the forget terms; "
                    "train what lies before losses.repel.layers, or give losses.forget_output a weight"
                )
        if attacks and strength * attack.weight:
            terms["attacked"] = self.attacker.add_gradient(step, strength * attack.weight)
        if mask and recipe.mask.scope == "forget":
            mask_gradients(parameters, mask)
        _, retain_terms = objective.retain(self._retain.batch(step), down)
        if mask and recipe.mask.scope == "all":
            mask_gradients(parameters, mask)
        ranks.add_gradients(self.learned)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        terms = ranks.totals({**terms, **retain_terms})
        check_finite({**terms, "the gradient": float(norm)}, step, "unlearn", REMEDY)
        self.optimizer.step()
        if mask and recipe.mask.scope == "all":
            restore_masked(parameters, mask, self._start)
        entry: dict[str, Any] = {"step": step, "phase": phase, "lr": rate, "gradient_norm": float(norm), **terms}
        if not held:
            entry["guard"] = REPAIR
        return entry, terms


def retain_batches(splits: Splits, config: UnlearnConfig, seed: int) -> Batches | MixedBatches:
    """The retain pairs of each step: as often as they occur, or with the recipe's share of each kind of person.

    Raises RecipeError where the data has no pair of a kind that gets a share.
    """
    if config.retain_shares is None:
        return Batches(splits.retain, config.retain_batch, seed)
    kinds: dict[str, list[ImageQuestionPair]] = {"others": [], "strangers": [], "forgotten": []}
    for pair in splits.retain:
        known = "strangers" if pair.subject is None else "others"
        kinds["forgotten" if splits.shows_forgotten(pair) else known].append(pair)
    present: dict[str, float] = {kind: share for kind, share in config.retain_shares.items() if kinds[kind] and share}
    if not present:
        there = ", ".join(f"{len(pairs)} of {kind}" for kind, pairs in kinds.items())
        raise RecipeError(
            "unlearn.retain_shares: every kind that gets a share is missing in the data, which has retain pairs: "
            f"{there}; give a share to one that is there, or leave retain_shares out"
        )
    return MixedBatches({kind: kinds[kind] for kind in present}, shared_out(config.retain_batch, present), seed)


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


def active_parameters(parameters: Mapping[str, nn.Parameter], kept: Mask | None) -> int:
    """How many weights can move at all: those of a mask outside of which nothing may, otherwise all trained ones."""
    if kept is not None:
        return sum(int(m.sum()) for m in kept.values())
    return sum(parameter.numel() for parameter in parameters.values())
