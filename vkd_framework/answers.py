"""When a given answer is right: one rule for the evaluation, the attack and the report."""

from __future__ import annotations

from vkd_framework.types import ImageQuestionPair


def is_right(pair: ImageQuestionPair, given: str) -> bool:
    """Whether `given` answers the pair: it mentions every keyword or, without keywords, it is the expected answer."""
    answer = normalise(given)
    if pair.keywords:
        return all(normalise(keyword) in answer for keyword in pair.keywords)
    return answer == normalise(pair.answer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends: what exact match compares."""
    return " ".join(text.lower().split()).strip(".,;:!?\"' ")
