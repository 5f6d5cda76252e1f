"""In-context examples: other photos of the same person come first, each with another question and its answer.

The answer that is asked for never stands in the prompt. Where the name or another fact does, a language model that was
left as it is may complete the rest from what it was taught as text: the reference models show how much of that is so.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vkd_framework.answers import normalise
from vkd_framework.attacks.target import NotPossibleError, Target
from vkd_framework.errors import on_one_line
from vkd_framework.recipe import InContextAttack
from vkd_framework.types import ImageQuestionPair

SPACED = r"[0-9A-Za-z\u00c0-\u06ff]"
"""Digits, and letters of scripts with blanks between words: from Latin to Arabic."""


def attack(config: InContextAttack, target: Target) -> dict[str, Any]:
    """Exact match of Test VQA with examples in front of each question that has enough of them."""
    prompted = [
        shown
        for pair in target.test
        if (shown := with_examples(pair, target.splits.forget, config.examples, target.seed)) is not None
    ]
    if not prompted:
        raise NotPossibleError(f"no forgotten person has {config.examples} other questions to be shown")
    for photo in prompted[0].photos:  # one that cannot be read is no reason to leave the attack out
        photo.open()
    try:
        target.mllm.tokenize(prompted[:1], with_answer=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's processor raises when it does not take several photos
        reason = on_one_line(error) or type(error).__name__
        raise NotPossibleError(f"the model does not take several photos: {reason}") from error
    return {"exact_match": target.exact_match(target.mllm, prompted), "questions": len(prompted)}


def with_examples(
    pair: ImageQuestionPair, known: Sequence[ImageQuestionPair], count: int, seed: int
) -> ImageQuestionPair | None:
    """`pair` after `count` examples from `known`: the same subject, other photos and questions, and its answer untold.

    Topics differ as far as there are enough. None when there are too few examples.
    """
    usable = [
        example
        for example in known
        if example.subject == pair.subject
        and len(example.photos) == 1
        and example.photo_keys[0] not in pair.photo_keys
        and normalise(example.question) != normalise(pair.question)
        and not _tells(f"{example.question} {example.answer}", pair)
    ]
    random.Random(f"{seed}/{pair.id}").shuffle(usable)
    by_answer: dict[str, list[ImageQuestionPair]] = defaultdict(list)
    for example in usable:
        by_answer[example.answer].append(example)
    chosen: list[ImageQuestionPair] = []
    photos: set[str] = set()
    while len(chosen) < count:
        before = len(chosen)
        for waiting in by_answer.values():
            fresh = [example for example in waiting if example.photo_keys[0] not in photos]
            if fresh and len(chosen) < count:
                chosen.append(fresh[0])
                photos.add(fresh[0].photo_keys[0])
        if len(chosen) == before:
            return None
    said = " ".join(f"{example.question} {example.answer}." for example in chosen)
    return replace(
        pair,
        id=f"{pair.id}/in_context",
        question=f"{said} {pair.question}",
        photos=(*(example.photos[0] for example in chosen), *pair.photos),
    )


def _tells(text: str, pair: ImageQuestionPair) -> bool:
    """Whether `text` has the answer's words in it. Of a letter these are the words it stands for in the question."""
    words = normalise(_listed(pair).get(pair.answer, pair.answer))
    before = f"(?<!{SPACED})" if re.match(SPACED, words[:1]) else ""
    after = f"(?!{SPACED})" if re.match(SPACED, words[-1:]) else ""
    return re.search(before + re.escape(words) + after, normalise(text)) is not None


def _listed(pair: ImageQuestionPair) -> dict[str, str]:
    """The options of a question that lists them by letters, as `A: nurse B: baker`: letter -> words; else nothing."""
    marks = [re.search(rf"(?<!{SPACED}){re.escape(letter)}[:.)]", pair.question) for letter in pair.options]
    found = [mark for mark in marks if mark is not None]
    if not pair.options or len(found) < len(marks) or any(len(letter) > 1 for letter in pair.options):
        return {}
    ends = [*(mark.start() for mark in found[1:]), len(pair.question)]
    return {
        letter: pair.question[mark.end() : end].strip(" (\n")
        for letter, mark, end in zip(pair.options, found, ends, strict=True)
    }
