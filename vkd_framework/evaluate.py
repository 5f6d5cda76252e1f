"""Measure the columns: greedy answers, four-way choices, and the probability of the right answer.

Answers are generated, not teacher-forced: a teacher-forced metric sees the start of the answer and leaks the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import GenerationConfig

from vkd_framework import ranks
from vkd_framework.answers import is_right
from vkd_framework.batches import in_parts
from vkd_framework.intervals import wilson
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress
from vkd_framework.recipe import EvaluateConfig
from vkd_framework.types import Cell, ImageQuestionPair


@dataclass(frozen=True)
class Answered:
    """What a model answered to each pair of a column, and the column's figures.

    `cut`: which answers were still going on at the token limit.
    """

    cell: Cell
    answers: tuple[str, ...]
    cut: tuple[bool, ...]


@torch.inference_mode()
def evaluate(
    mllm: MLLM, columns: Mapping[str, Sequence[ImageQuestionPair]], config: EvaluateConfig, *, what: str = "evaluate"
) -> dict[str, Answered]:
    """Column -> figures and answers. All columns share their batches, so that small ones cost little.

    What is asked in the same words about the same photos is answered once, whatever each column expects. A column
    without pairs has no figures and is left out.
    """
    columns = {name: pairs for name, pairs in columns.items() if pairs}
    every = [pair for pairs in columns.values() for pair in pairs]
    if not every:
        return {}
    asked = {(pair.question, pair.photo_keys): pair for pair in every}
    given = dict(zip(asked, _written(mllm, list(asked.values()), config, what=f"{what}: answers"), strict=True))
    answers, cut = zip(*(given[pair.question, pair.photo_keys] for pair in every), strict=True)
    losses = option_losses(mllm, every, config, what=f"{what}: choices")
    results, start = {}, 0
    for name, pairs in columns.items():
        part = slice(start, start + len(pairs))
        results[name] = Answered(score(pairs, answers[part], losses[part]), answers[part], cut[part])
        start += len(pairs)
    return results


def score(pairs: Sequence[ImageQuestionPair], answers: Sequence[str], losses: Sequence[Mapping[str, float]]) -> Cell:
    """The figures of one column. `losses`: for each pair, option -> mean cross-entropy of its tokens."""
    hits = sum(map(is_right, pairs, answers))
    choices = [
        min(loss, key=loss.__getitem__) == pair.answer for pair, loss in zip(pairs, losses, strict=True) if pair.options
    ]
    n = len(pairs)
    return Cell(
        exact_match=hits / n,
        choice_accuracy=sum(choices) / len(choices) if choices else None,
        rouge_l=sum(rouge_l(answer, pair.answer) for pair, answer in zip(pairs, answers, strict=True)) / n,
        answer_probability=sum(math.exp(-loss[pair.answer]) for pair, loss in zip(pairs, losses, strict=True)) / n,
        n=n,
        interval_95=wilson(hits, n),
    )


@torch.inference_mode()
def exact_match(mllm: MLLM, pairs: Sequence[ImageQuestionPair], config: EvaluateConfig) -> float:
    """The share of greedy answers that are right, and nothing else: what an attack is scored by."""
    return sum(right_answers(mllm, pairs, config)) / len(pairs)


@torch.inference_mode()
def right_answers(mllm: MLLM, pairs: Sequence[ImageQuestionPair], config: EvaluateConfig) -> list[bool]:
    """Whether the greedy answer of each pair is right."""
    return list(map(is_right, pairs, generate(mllm, pairs, config, what="answers under attack")))


@torch.inference_mode()
def generate(mllm: MLLM, pairs: Sequence[ImageQuestionPair], config: EvaluateConfig, *, what: str) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    return [answer for answer, _ in _written(mllm, pairs, config, what=what)]


def _written(
    mllm: MLLM, pairs: Sequence[ImageQuestionPair], config: EvaluateConfig, *, what: str
) -> list[tuple[str, bool]]:
    """For each pair: the greedy answer, and whether the token limit cut it off."""
    stop_ids = torch.tensor(mllm.stop_ids, device=mllm.device)
    written: list[list[tuple[str, bool]]] = []
    for chunk in Progress(ranks.part(in_parts(pairs, config.batch_size)), what):
        inputs = mllm.tokenize(chunk, with_answer=False, padding_side="left").inputs
        with _plainly(mllm):
            out = mllm.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=list(mllm.stop_ids),
                pad_token_id=mllm.stop_ids[0],
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = mllm.processor.batch_decode(new, skip_special_tokens=True)
        cut = (~torch.isin(new, stop_ids).any(dim=1)).tolist()
        written.append([(text.strip(), unfinished) for text, unfinished in zip(texts, cut, strict=True)])
    return [answer for answers in ranks.in_order(written) for answer in answers]


@contextmanager
def _plainly(mllm: MLLM) -> Iterator[None]:
    """Within the block a checkpoint's own generation settings do not count, such as a penalty on repeated words.

    With them, the greedy answer is not the likeliest token each time, and models would not be compared alike.
    """
    model, own = mllm.model, mllm.model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def option_losses(
    mllm: MLLM, pairs: Sequence[ImageQuestionPair], config: EvaluateConfig, *, what: str
) -> list[dict[str, float]]:
    """For each pair: option -> mean cross-entropy of the option's tokens; the right answer is always among them."""
    asked = [(i, option) for i, pair in enumerate(pairs) for option in dict.fromkeys((*pair.options, pair.answer))]
    found: list[list[float]] = []
    for chunk in Progress(ranks.part(in_parts(asked, config.batch_size)), what):
        found.append(answer_losses(mllm, [_with_answer(pairs[i], option) for i, option in chunk]).tolist())
    losses: list[dict[str, float]] = [{} for _ in pairs]
    for (i, option), loss in zip(asked, chain.from_iterable(ranks.in_order(found)), strict=True):
        losses[i][option] = loss
    return losses


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 on lower-cased words (Lin, 2004)."""
    a, b = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", reference.lower())
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(a) + len(b)) if a and b else 0.0


def _with_answer(pair: ImageQuestionPair, answer: str) -> ImageQuestionPair:
    return ImageQuestionPair(pair.id, pair.question, answer, pair.photos, pair.subject, pair.kind)
