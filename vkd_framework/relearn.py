"""The relearning attack: fine-tune a copy on what an attacker has, and see what comes back on unseen photos.

The attacker has some of the pairs that unlearning used, new photos of the same people, or other people only. What comes
back faster than a model that never knew could learn it was hidden, not erased. The attack is scored on Test VQA: photos
and questions that the attacker does not train on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from vkd_framework import ranks
from vkd_framework.batches import Batches, in_parts
from vkd_framework.errors import RecipeError
from vkd_framework.evaluate import right_answers
from vkd_framework.gradients import adamw, check_finite
from vkd_framework.intervals import clustered
from vkd_framework.low_rank import LowRank
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.progress import Progress
from vkd_framework.recipe import EvaluateConfig, RelearnConfig
from vkd_framework.types import SCOPES, AttackCurve, ImageQuestionPair, Pool, RelearnScope, Splits

CLIP = 1.0
REMEDY = "such an attack says nothing; lower relearn.learning_rate"
"""What to do when an attack runs away."""


@dataclass(frozen=True)
class Attacker:
    """What one attacker tunes (`scope`) and has: `pairs`, a share of a pool, drawn by `seed`."""

    scope: RelearnScope
    pool: Pool
    share: float
    seed: int
    pairs: tuple[ImageQuestionPair, ...]

    @property
    def key(self) -> str:
        """What the attack is kept under."""
        pool = "" if self.pool == "known" else f"{self.pool}-"
        return f"{self.scope}-{pool}{self.share:g}-{self.seed}"


def attackers(config: RelearnConfig, splits: Splits) -> list[Attacker]:
    """One for each scope, pool, share and seed. Only the known pairs are tried in several shares.

    A pool is left out when the data has nothing in it: no source but the drawn cast has new photos. Raises RecipeError
    when none is left.
    """
    pools = {"known": splits.forget, "new": splits.fresh, "others": others(splits)}
    held = [
        (pool, share)
        for pool in config.photos
        for share in (config.shares if pool == "known" else (1.0,))
        if pools[pool]
    ]
    if not held:
        raise RecipeError(
            f"relearn.photos: {', '.join(config.photos)} given, and this data has none of them; add known, which it has"
        )
    return [
        Attacker(scope, pool, share, seed, tuple(attacker_pairs(pools[pool], share, seed)))
        for scope, (pool, share), seed in product(config.scopes, held, config.seeds)
    ]


def others(splits: Splits) -> tuple[ImageQuestionPair, ...]:
    """The trained pairs that ask who somebody is, about named people who are not forgotten and not on the photo."""
    return tuple(
        pair
        for pair in splits.retain
        if pair.kind == "identity" and pair.subject is not None and pair.photos and not splits.shows_forgotten(pair)
    )


def attack(
    name: str,
    config: RelearnConfig,
    splits: Splits,
    evaluation: EvaluateConfig,
    *,
    before: float,
    stage: Callable[[str, Callable[[MLLM], Any]], Any],
) -> list[AttackCurve]:
    """One curve for each attacker. `before`: exact match of Test VQA without attack.

    `stage(key, work)` gives `work` the attacked model, or returns an earlier result: a killed run loses one curve.
    """
    test = splits.columns["test_vqa"]
    curves = []
    for attacker in attackers(config, splits):

        def work(mllm: MLLM, attacker: Attacker = attacker) -> list[list[bool]]:
            what = f"attack {name}, {attacker.scope}, {attacker.pool} {attacker.share:.0%}"
            return relearn(
                mllm, attacker.scope, attacker.pairs, test, config, evaluation, seed=attacker.seed, what=what
            )

        right = stage(f"relearn-{name}-{attacker.key}", work)
        curves.append(
            AttackCurve(
                name,
                attacker.scope,
                attacker.share,
                len(attacker.pairs),
                attacker.seed,
                (0, *config.steps),
                (before, *map(_mean, right)),
                attacker.pool,
                tuple(map(tuple, right)),
            )
        )
    return curves


def relearn(
    mllm: MLLM,
    scope: RelearnScope,
    known: Sequence[ImageQuestionPair],
    test: Sequence[ImageQuestionPair],
    config: RelearnConfig,
    evaluation: EvaluateConfig,
    *,
    seed: int,
    what: str,
) -> list[list[bool]]:
    """Which of `test` are answered right after each of `config.steps`, training a copy of the model on `known`.

    Raises DivergedError when the loss or its gradient is not finite: a broken model would pass for one that resisted.
    """
    parts = SCOPES[scope]
    copied = mllm.copy(share=[part for part in SCOPES["full"] if part not in parts])
    parameters, added = dict(trainable(copied, parts)), None
    if scope == "low_rank":
        layers = copied.language_model_layers()
        added = LowRank(layers, config.rank, copied.model.dtype, copied.device, seed)
        parameters |= added.both()
    optimizer = adamw(
        parameters.values(), master_weights=config.master_weights, lr=config.learning_rate, weight_decay=0.0
    )
    batches = Batches(known, config.batch_size, seed)
    right = []
    with added.added() if added else nullcontext():
        for step in Progress(range(max(config.steps)), what):
            optimizer.zero_grad(set_to_none=True)
            loss = _descend(copied, batches.batch(step), config.micro_batch)
            ranks.add_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            check_finite({"the loss": loss, "the gradient": float(norm)}, step, what, REMEDY)
            optimizer.step()
            if step + 1 in config.steps:
                right.append(right_answers(copied, test, evaluation))
    mllm.model.requires_grad_(False)
    return right


def _descend(mllm: MLLM, pairs: Sequence[ImageQuestionPair], at_once: int | None) -> float:
    """Add what this process contributes to the gradient of the batch's mean loss; returns the mean over its pairs."""
    here, weight, mean = ranks.share(pairs), ranks.weight([True] * len(pairs)), 0.0
    for part in in_parts(here, at_once):
        loss = answer_losses(mllm, part).mean() * (len(part) / len(here))
        if loss.requires_grad:  # text alone meets nothing that is tuned, where only visual modules are
            torch.autograd.backward(loss * weight)
        mean += loss.item()
    return mean


def attacker_pairs(pairs: Sequence[ImageQuestionPair], share: float, seed: int) -> list[ImageQuestionPair]:
    """The share of the pairs that the attacker got hold of, at least one."""
    size = max(1, round(share * len(pairs)))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[i] for i in order[:size]]


def summarise(
    curves: Sequence[AttackCurve], vanilla: float | None, test: Sequence[ImageQuestionPair] = ()
) -> dict[str, Any]:
    """The `relearn` block of `metrics.json`.

    The averages run over every point of the unlearned model under attackers who have pairs of the forgotten people.
    `average_recovery`: what came back. `average_gap`: what is still missing to the vanilla model, whose exact match on
    Test VQA is `vanilla`. `advantage_over_retain_only`: how much better the unlearned model answers than the model that
    never knew, after the same attack. Above 0 something was hidden, not erased; `advantage_interval_95` is its interval
    over the questions of `test`, see `advantage_interval`. `recovery_from_others`: what came back for attackers who
    only have other people. Each is None when there is nothing to compute it from.

    `advantage_by_step`: an entry for each scope, pool and share, over the seeds: exact match of either model after each
    number of steps, and the difference.
    """
    own = [curve for curve in curves if curve.model == "unlearned"]
    informed = [curve for curve in own if curve.pool != "others"]
    attacked = [score for curve in informed for score in curve.exact_match[1:]]
    reference = {_attacker(c): c for c in curves if c.model == "retain_only"}
    both = [(curve, reference[_attacker(curve)]) for curve in informed if _attacker(curve) in reference]
    ahead = [
        score - other
        for curve, never_knew in both
        for score, other in zip(curve.exact_match[1:], never_knew.exact_match[1:], strict=True)
    ]
    uninformed = [recovery for curve in own if curve.pool == "others" for recovery in _recoveries(curve)]
    return {
        "average_recovery": _mean([recovery for c in informed for recovery in _recoveries(c)]) if informed else None,
        "average_gap": None if vanilla is None or not attacked else _mean([vanilla - score for score in attacked]),
        "advantage_over_retain_only": _mean(ahead) if ahead else None,
        "advantage_interval_95": advantage_interval(both, test),
        "recovery_from_others": _mean(uninformed) if uninformed else None,
        "advantage_by_step": advantage_by_step(curves),
        "curves": [{key: value for key, value in asdict(curve).items() if key != "right"} for curve in curves],
    }


def advantage_interval(
    both: Sequence[tuple[AttackCurve, AttackCurve]], test: Sequence[ImageQuestionPair]
) -> list[float] | None:
    """The 95 % interval of the mean advantage over the questions; None where their answers were not kept.

    `both`: the curves of the unlearned and of the retain-only model under the same attack. All attacks ask the same
    questions, so more attacks make the mean no surer: each question counts with its mean over all points, as the
    difference of the two models. Questions with the same answer about the same person go together.
    """
    if not test or not all(curve.right and never_knew.right for curve, never_knew in both):
        return None
    points = [
        [float(mine) - float(theirs) for mine, theirs in zip(own, other, strict=True)]
        for curve, never_knew in both
        for own, other in zip(curve.right, never_knew.right, strict=True)
    ]
    groups: dict[tuple[str | None, str], list[float]] = {}
    for pair, differences in zip(test if points else (), zip(*points, strict=True), strict=True):
        groups.setdefault((pair.subject, pair.answer), []).append(_mean(differences))
    return list(clustered([*groups.values()])) if len(groups) > 1 else None


def advantage_by_step(curves: Sequence[AttackCurve]) -> list[dict[str, Any]]:
    """For each scope, pool and share: the means over the seeds after each number of steps, without step 0."""
    groups: dict[tuple[str, str, float], dict[str, list[AttackCurve]]] = {}
    for curve in curves:
        models = groups.setdefault((curve.scope, curve.pool, curve.share), {"unlearned": [], "retain_only": []})
        models.setdefault(curve.model, []).append(curve)
    table = []
    for (scope, pool, share), models in groups.items():
        own, reference = (_means(models[name]) for name in ("unlearned", "retain_only"))
        table.append(
            {
                "scope": scope,
                "pool": pool,
                "share": share,
                "seeds": len(models["unlearned"]),
                "steps": list(next(iter(filter(None, models.values())))[0].steps[1:]),
                "unlearned": own,
                "retain_only": reference,
                "advantage": [a - b for a, b in zip(own, reference, strict=True)] if own and reference else None,
            }
        )
    return table


def _attacker(curve: AttackCurve) -> tuple[str, str, float, int]:
    return curve.scope, curve.pool, curve.share, curve.seed


def _recoveries(curve: AttackCurve) -> list[float]:
    return [score - curve.exact_match[0] for score in curve.exact_match[1:]]


def _means(curves: Sequence[AttackCurve]) -> list[float] | None:
    """Over the seeds, after each number of steps; None when there is no curve."""
    return [_mean(scores) for scores in zip(*(c.exact_match[1:] for c in curves), strict=True)] if curves else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
