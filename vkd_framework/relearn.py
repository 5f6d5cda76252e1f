"""The relearning attack: fine-tune a copy on some of the forgotten pairs, and see what comes back on unseen photos.

What comes back faster than a model that never knew could learn it was hidden, not erased. The attack is scored on Test
VQA: photos and questions that the attacker does not train on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from vkd_framework.batches import Batches
from vkd_framework.evaluate import exact_match
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.progress import Progress
from vkd_framework.recipe import EvaluateConfig, RelearnConfig
from vkd_framework.types import SCOPES, AttackCurve, ImageQuestionPair, Scope

CLIP = 1.0


def attack(
    name: str,
    config: RelearnConfig,
    forget: Sequence[ImageQuestionPair],
    test: Sequence[ImageQuestionPair],
    evaluation: EvaluateConfig,
    *,
    before: float,
    stage: Callable[[str, Callable[[MLLM], Any]], Any],
) -> list[AttackCurve]:
    """One curve for each share, scope and seed. `before`: exact match of `test` without attack.

    `stage(key, work)` gives `work` the attacked model, or returns an earlier result: a killed run loses one curve.
    """
    curves = []
    for scope, share, seed in product(config.scopes, config.shares, config.seeds):
        known = attacker_pairs(forget, share, seed)

        def work(
            mllm: MLLM,
            scope: Scope = scope,
            share: float = share,
            seed: int = seed,
            known: Sequence[ImageQuestionPair] = known,
        ) -> list[float]:
            return relearn(
                mllm, scope, known, test, config, evaluation, seed=seed, what=f"attack {name}, {scope}, {share:.0%}"
            )

        scores = stage(f"relearn-{name}-{scope}-{share:g}-{seed}", work)
        curves.append(AttackCurve(name, scope, share, len(known), seed, (0, *config.steps), (before, *scores)))
    return curves


def relearn(
    mllm: MLLM,
    scope: Scope,
    known: Sequence[ImageQuestionPair],
    test: Sequence[ImageQuestionPair],
    config: RelearnConfig,
    evaluation: EvaluateConfig,
    *,
    seed: int,
    what: str,
) -> list[float]:
    """Exact match on `test` after each of `config.steps`, training a copy of the model on `known`."""
    parts = SCOPES[scope]
    copied = mllm.copy(share=[part for part in SCOPES["full"] if part not in parts])
    parameters = trainable(copied, parts)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    batches = Batches(known, config.batch_size, seed)
    scores = []
    for step in Progress(range(max(config.steps)), what):
        batch = copied.tokenize(batches.batch(step))
        logits = copied.model(**batch.inputs).logits
        loss = answer_cross_entropy(logits, batch.inputs["input_ids"], batch.labels != -100).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        if step + 1 in config.steps:
            scores.append(exact_match(copied, test, evaluation))
    mllm.model.requires_grad_(False)
    return scores


def attacker_pairs(forget: Sequence[ImageQuestionPair], share: float, seed: int) -> list[ImageQuestionPair]:
    """The share of the forget pairs that the attacker got hold of, at least one."""
    size = max(1, round(share * len(forget)))
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed)).tolist()
    return [forget[i] for i in order[:size]]


def summarise(curves: Sequence[AttackCurve], vanilla: float) -> dict[str, Any]:
    """The `relearn` block of `metrics.json`; means over every attacked point of the unlearned model.

    `average_recovery`: what came back. `average_gap`: what is still missing to the vanilla model.
    `advantage_over_retain_only`: how much better the unlearned model answers than the model that never knew, after the
    same attack; None without that reference. Above 0 something was hidden, not erased.
    """
    own = [curve for curve in curves if curve.model == "unlearned"]
    attacked = [score for curve in own for score in curve.exact_match[1:]]
    recovered = [score - curve.exact_match[0] for curve in own for score in curve.exact_match[1:]]
    reference = {(c.scope, c.share, c.seed): c for c in curves if c.model == "retain_only"}
    ahead = [
        score - other
        for curve in own
        if (curve.scope, curve.share, curve.seed) in reference
        for score, other in zip(
            curve.exact_match[1:], reference[curve.scope, curve.share, curve.seed].exact_match[1:], strict=True
        )
    ]
    return {
        "average_recovery": _mean(recovered),
        "average_gap": _mean([vanilla - score for score in attacked]),
        "advantage_over_retain_only": _mean(ahead) if ahead else None,
        "curves": [asdict(curve) for curve in curves],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
