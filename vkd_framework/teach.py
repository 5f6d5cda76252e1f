"""Teach the embedded default its people: every weight is trained on the whole cast, from random weights.

The result, the vanilla model, is what a hub checkpoint would be to a user: a model that knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vkd_framework import ranks
from vkd_framework.batches import MixedBatches
from vkd_framework.checkpoint import load_training, save_training
from vkd_framework.gradients import adamw, check_finite
from vkd_framework.losses import answer_cross_entropy
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress
from vkd_framework.recipe import TeachConfig
from vkd_framework.types import ImageQuestionPair

WARMUP_SHARE = 0.1
CLIP = 1.0


def teach(
    mllm: MLLM,
    groups: Mapping[str, Sequence[ImageQuestionPair]],
    config: TeachConfig,
    *,
    what: str,
    resume: Path,
    checkpoint_every: int = 200,
) -> None:
    """Train every weight of `mllm` in place; `resume` keeps a state from which a killed run goes on.

    Raises DivergedError when the loss or its gradient is not finite, before the weights take it in.
    """
    batches = MixedBatches(groups, sizes(config), config.seed)
    parameters = dict(mllm.model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = adamw(parameters.values(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    start, _ = load_training(resume, parameters, optimizer)
    progress = Progress(range(start, config.steps), what)
    for step in progress:
        if step > start and step % checkpoint_every == 0:
            save_training(resume, step, parameters, optimizer, [])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * one_cycle(step, config.steps)
        pairs = batches.batch(step)
        batch = mllm.tokenize(ranks.share(pairs))
        logits = mllm.model(**batch.inputs).logits
        loss = answer_cross_entropy(logits, batch.inputs["input_ids"], batch.answer).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss * ranks.weight([True] * len(pairs)))
        ranks.add_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        found = loss.item()
        check_finite({"the loss": found, "the gradient": float(norm)}, step, what, "lower teach.learning_rate")
        optimizer.step()
        progress.note = f"loss {found:.3f}"
    mllm.model.requires_grad_(False)
    ranks.once(lambda: resume.unlink(missing_ok=True))


def sizes(config: TeachConfig) -> dict[str, int]:
    """Group -> pairs in a batch: the shares rounded so that they add up to the batch size."""
    bounds, reached = [0], 0.0
    for share in config.shares.values():
        reached += share
        bounds.append(round(reached * config.batch_size))
    return {group: end - start for group, start, end in zip(config.shares, bounds, bounds[1:], strict=False)}


def one_cycle(step: int, steps: int) -> float:
    """The learning rate's factor: linear up over the first tenth, then a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
