"""Rephrased questions: whether the answer is only gone for the wording that was asked."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.recipe import RephraseAttack
from vkd_framework.types import ImageQuestionPair, Splits


def attack(config: RephraseAttack, target: Target) -> dict[str, Any]:
    """Exact match of those questions of Test VQA that the data can put into other words."""
    asked = rephrased(target.test, target.splits, target.seed)
    if not asked:
        raise NotPossibleError("the data knows no other words for its questions")
    return {"exact_match": target.exact_match(target.mllm, asked), "questions": len(asked)}


def rephrased(pairs: tuple[ImageQuestionPair, ...], splits: Splits, seed: int) -> list[ImageQuestionPair]:
    """Each pair that has other wordings, in one of them drawn by `seed`."""
    return [
        replace(pair, question=random.Random(f"{seed}/{pair.id}").choice(wordings))
        for pair in pairs
        if (wordings := splits.rephrasings.get(pair.question, ()))
    ]
