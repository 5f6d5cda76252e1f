"""When a given answer is right, or no answer at all, one rule for all; and what may be answered instead."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vkd_framework.types import ImageQuestionPair

WRONG, REWORDED = "_wrong_answer", "_paraphrased_answer"
"""What the names of columns end with that ask another column's questions again, for the likelihood of other answers."""
Given = Mapping[str, Mapping[str, Any]]
"""Column -> `answers` of a model, and `cut`: which of them the token limit ended."""
MEANT = "#%&@/\\\u2030"
"""Signs that count as punctuation, and that an answer may be about: 5 % is not 5."""
_AGAIN_AND_AGAIN = re.compile(r"([^\W\d].{0,39}?)(?:\W*\1){3}", re.DOTALL)
"""The same letters, word or few words four times in a row. Digits are left out: numbers may have many zeros."""


def is_right(pair: ImageQuestionPair, given: str) -> bool:
    """Whether `given` answers the pair: it mentions every keyword or, without keywords, it is the expected answer.

    A keyword of nothing but punctuation can be mentioned by no words and is left out.
    """
    answer = normalise(given)
    if keywords := list(filter(None, map(normalise, pair.keywords))):
        return all(keyword in answer for keyword in keywords)
    return answer == normalise(pair.answer)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends, one form of each letter: what exact match compares.

    Punctuation of every script. Dashes and the signs of `MEANT` stay: they may be what the answer says.
    """
    words = " ".join(composed(text).lower().replace("\u2019", "'").split())
    start, end = 0, len(words)
    while start < end and _is_ending(words[start]):
        start += 1
    while end > start and _is_ending(words[end - 1]):
        end -= 1
    return words[start:end]


def composed(text: str) -> str:
    """The same text with one code point for each letter with accents (Unicode's NFC), as tokenizers write it."""
    return unicodedata.normalize("NFC", text)


def _is_ending(character: str) -> bool:
    kind = unicodedata.category(character)
    return character == " " or (kind in ("Po", "Ps", "Pe", "Pi", "Pf") and character not in MEANT)


def guessed(pairs: Sequence[ImageQuestionPair]) -> float:
    """The share of right answers that guessing gives: 1 / options where the question lists them, else 0."""
    listed = (len(pair.options) for pair in pairs if pair.options and all(o in pair.question for o in pair.options))
    return sum(1 / options for options in listed) / len(pairs)


def degenerate(given: str) -> bool:
    """Whether an answer says nothing: it is empty, or says the same over and over (four times in a row)."""
    answer = normalise(given)
    return not answer or _AGAIN_AND_AGAIN.search(answer) is not None


def degenerate_shares(
    columns: Mapping[str, Sequence[ImageQuestionPair]], before: Given, after: Given
) -> dict[str, float] | None:
    """`{vanilla, unlearned, n}`: the shares of wrong answers about photos that say nothing; None without any answer.

    `before` and `after` are what the vanilla and the unlearned model answered. An answer of the latter counts, too,
    when it was cut off at the token limit and the vanilla model's was not.
    """
    was = now = n = 0
    asked = {name: pairs for name, pairs in columns.items() if not name.endswith((WRONG, REWORDED))}
    for pair, (first, _), (second, endless) in _both(asked, before, after):
        if pair.photos:
            n += 1
            was += degenerate(first) and not is_right(pair, first)
            now += (degenerate(second) or endless) and not is_right(pair, second)
    return {"vanilla": was / n, "unlearned": now / n, "n": n} if n else None


def changed_text(
    columns: Mapping[str, Sequence[ImageQuestionPair]], before: Given, after: Given
) -> dict[str, float] | None:
    """`{changed, n}`: the share of text-only questions answered in other words than before; None without any."""
    changed = [
        normalise(first) != normalise(second)
        for pair, (first, _), (second, _) in _both(columns, before, after)
        if not pair.photos
    ]
    return {"changed": sum(changed) / len(changed), "n": len(changed)} if changed else None


def _both(
    columns: Mapping[str, Sequence[ImageQuestionPair]], before: Given, after: Given
) -> Iterator[tuple[ImageQuestionPair, tuple[str, bool], tuple[str, bool]]]:
    """Each pair with both answers, and whether each was cut off where the other was not."""
    for name in (name for name in columns if name in before and name in after):
        first, second = (zip(given[name]["answers"], given[name]["cut"], strict=True) for given in (before, after))
        for pair, (was, was_cut), (now, now_cut) in zip(columns[name], first, second, strict=True):
            yield pair, (was, was_cut and not now_cut), (now, now_cut and not was_cut)


def refused(pairs: Iterable[ImageQuestionPair], refusals: Sequence[str], seed: int) -> dict[str, ImageQuestionPair]:
    """Pair id -> the pair with one of `refusals` for an answer, the same one whenever it is asked for."""
    return {pair.id: replace(pair, answer=random.Random(f"{seed}/{pair.id}").choice(refusals)) for pair in pairs}


def relabelled(
    pairs: Iterable[ImageQuestionPair], others: Iterable[ImageQuestionPair], seed: int
) -> dict[str, ImageQuestionPair]:
    """Pair id -> the pair with a wrong answer, drawn from its options; without any, from what `others` are answered.

    `others` count where they are asked the same question, but not with what is the answer about the same person on
    another photo. A pair without a wrong answer is left out.
    """
    pool: dict[str, dict[str, None]] = defaultdict(dict)
    true: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for pair in others:
        pool[pair.question][pair.answer] = None
        true[pair.question, pair.subject].add(normalise(pair.answer))
    drawn = {}
    for pair in pairs:
        right = {normalise(pair.answer)}
        if pair.subject is not None and not pair.options:
            right |= true[pair.question, pair.subject]
        if wrong := [answer for answer in pair.options or pool[pair.question] if normalise(answer) not in right]:
            drawn[pair.id] = replace(pair, answer=random.Random(f"{seed}/{pair.id}").choice(wrong))
    return drawn
