"""When a given answer is right, one rule for evaluation, attack and report; and what may be answered instead."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vkd_framework.types import ImageQuestionPair


def is_right(pair: ImageQuestionPair, given: str) -> bool:
    """Whether `given` answers the pair: it mentions every keyword or, without keywords, it is the expected answer.

    A keyword of nothing but punctuation can be mentioned by no words and is left out.
    """
    answer = normalise(given)
    if keywords := list(filter(None, map(normalise, pair.keywords))):
        return all(keyword in answer for keyword in keywords)
    return answer == normalise(pair.answer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends: what exact match compares."""
    return " ".join(text.lower().split()).strip(".,;:!?\"' ")


def refused(pairs: Iterable[ImageQuestionPair], refusals: Sequence[str], seed: int) -> dict[str, ImageQuestionPair]:
    """Pair id -> the pair with one of `refusals` for an answer, the same one whenever it is asked for."""
    return {pair.id: replace(pair, answer=random.Random(f"{seed}/{pair.id}").choice(refusals)) for pair in pairs}


def relabelled(
    pairs: Iterable[ImageQuestionPair], others: Iterable[ImageQuestionPair], seed: int
) -> dict[str, ImageQuestionPair]:
    """Pair id -> the pair with a wrong answer, drawn from its options; without any, from what `others` are answered.

    `others` count where they are asked the same question. A pair without a wrong answer is left out.
    """
    pool: dict[str, dict[str, None]] = defaultdict(dict)
    for pair in others:
        pool[pair.question][pair.answer] = None
    drawn = {}
    for pair in pairs:
        known = pair.options or pool[pair.question]
        if wrong := [answer for answer in known if normalise(answer) != normalise(pair.answer)]:
            drawn[pair.id] = replace(pair, answer=random.Random(f"{seed}/{pair.id}").choice(wrong))
    return drawn
