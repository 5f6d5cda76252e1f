"""Probes on visual features: whether photos still show, to somebody who looks inside, which of the people they are of.

A model that never knew the people also sees faces, so only what goes beyond it was left behind.
"""

from __future__ import annotations

from typing import Any

import torch

from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.probe import (
    choose_photos,
    nearest_neighbours,
    pooled_features,
    portraits,
    ridge_probe,
    standardise,
)
from vkd_framework.recipe import ProbeAttack
from vkd_framework.types import ImageQuestionPair, Splits


def attack(config: ProbeAttack, target: Target) -> dict[str, Any]:
    """Accuracy on unseen photos of forgotten and of other people, for the last encoder layer and the projector.

    The probes learn from training photos. `chance` is 1 / people.
    """
    train = choose_photos(target.splits, config.photos, target.seed)
    names = list(dict.fromkeys(name for _, name in train))
    test = unseen_photos(target.splits, names)
    forgotten = torch.tensor([name in target.splits.forget_subjects for _, name in test], dtype=torch.bool)
    if len(names) < 2 or not bool(forgotten.any()):
        raise NotPossibleError("needs unseen photos of forgotten people, and two people with two training photos each")
    label, truth = (torch.tensor([names.index(name) for _, name in photos]) for photos in (train, test))
    batch = target.evaluation.batch_size
    features = pooled_features(target.mllm, [pair for pair, _ in (*train, *test)], batch)
    found: dict[str, Any] = {"chance": 1 / len(names), "photos": int(forgotten.sum())}
    for place, layer in probed_layers(target).items():
        seen, unseen = standardise(features[layer][: len(train)], features[layer][len(train) :])
        for method, answers in (
            ("linear", ridge_probe(seen, label, unseen)),
            ("neighbours", nearest_neighbours(seen, label, unseen)),
        ):
            right = (answers == truth).float()
            found[f"{place}_{method}"] = float(right[forgotten].mean())
            if not bool(forgotten.all()):
                found[f"{place}_{method}_others"] = float(right[~forgotten].mean())
    return found


def probed_layers(target: Target) -> dict[str, str]:
    """`encoder` and `projector` -> the layer looked at: of either, the last that reaches the language model."""
    reaching = [layer.name for layer in target.mllm.layers if layer.reaches_language_model]
    encoder = [name for name in reaching if name != reaching[-1]]
    return {"encoder": encoder[-1], "projector": reaching[-1]} if encoder else {"projector": reaching[-1]}


def unseen_photos(splits: Splits, names: list[str]) -> list[tuple[ImageQuestionPair, str]]:
    """Measured photos of one person each that nothing was trained on, alone in a pair, with the person's name."""
    trained = {key for pair in (*splits.forget, *splits.retain) for key in pair.photo_keys}
    measured = portraits((*splits.columns["test_vqa"], *splits.columns["retain_vqa"]))
    return [(pair, name) for pair, name in measured if name in names and trained.isdisjoint(pair.photo_keys)]
