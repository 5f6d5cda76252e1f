"""What is done to the forgotten answers at the output: the forms of `losses.forget_output`.

An answer is made as unlikely as it is about somebody else (`stranger`) or unlikelier (`capped_ascent`, `ascent`,
`npo`), or another one is taught in its place (`refusal`, `relabel`). Whatever a form needs to know of the starting
model is remembered before anything is trained.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import Tensor

from vkd_framework import losses, ranks
from vkd_framework.answers import refused, relabelled
from vkd_framework.batches import in_parts
from vkd_framework.errors import RecipeError
from vkd_framework.output import answer_losses
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress
from vkd_framework.recipe import Recipe
from vkd_framework.types import EncodedBatch, ImageQuestionPair, Photo, Splits


class ForgetOutput:
    """The forget term at the output, in the recipe's form. `reference` loads the retain-only model, where it is asked.

    Raises RecipeError when a pair has no wrong answer that could be taught.
    """

    def __init__(self, mllm: MLLM, recipe: Recipe, splits: Splits, reference: Callable[[], MLLM] | None) -> None:
        self._term = recipe.losses.forget_output
        self.weight = self._term.weight
        self._batch_size = recipe.evaluate.batch_size
        self._targets: dict[str, ImageQuestionPair] = {}
        self._before: dict[str, float] = {}
        if not self.weight:
            return
        if self._term.form == "refusal":
            self._targets = refused(splits.forget, self._term.refusals, recipe.seed)
        if self._term.form == "relabel":
            self._targets = _wrong_answers(splits, recipe.seed)
        if self._term.form == "stranger":
            asked = about_others(splits, recipe.seed, self._term.strangers)
            self._before = dict(zip((pair.id for pair in splits.forget), self._levels(mllm, asked), strict=True))
        if self._term.form == "npo":
            # A number a pair, so that no second model is needed in training.
            knows = reference() if self._term.reference == "retain_only" and reference else mllm
            found = self._cross_entropies(knows, splits.forget)
            self._before = {pair.id: mean for pair, (mean, _) in zip(splits.forget, found, strict=True)}

    def targets(self, pairs: Sequence[ImageQuestionPair]) -> list[ImageQuestionPair]:
        """The pairs with the answers that the term looks at: their own, or those taught in their place."""
        return [self._targets.get(pair.id, pair) for pair in pairs]

    def loss(self, pairs: Sequence[ImageQuestionPair], batch: EncodedBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The term, unweighted, and the cross-entropy `[B]` it is made of; `logits` `[N, V]` of the `targets`."""
        answer = self.tokens(batch)
        cross_entropy = losses.answer_cross_entropy(logits, batch.inputs["input_ids"], answer)
        if self._term.form == "stranger":
            return losses.level(cross_entropy, cross_entropy.new_tensor(self._known(pairs))), cross_entropy
        if self._term.form == "capped_ascent":
            return losses.capped_ascent(cross_entropy, self._term.cap), cross_entropy
        if self._term.form == "ascent":
            return losses.ascent(cross_entropy), cross_entropy
        if self._term.form == "npo":
            before = -cross_entropy.new_tensor(self._known(pairs)) * answer.sum(dim=1)
            return losses.npo(-cross_entropy * answer.sum(dim=1), before, self._term.beta), cross_entropy
        return cross_entropy.mean(), cross_entropy

    def tokens(self, batch: EncodedBatch) -> Tensor:
        """`[B, L]`: the answer tokens that the term looks at."""
        return batch.content if self._term.tokens == "content" else batch.answer

    def _known(self, pairs: Sequence[ImageQuestionPair]) -> list[float]:
        return [self._before[pair.id] for pair in pairs]

    def _levels(self, mllm: MLLM, asked: Sequence[Sequence[ImageQuestionPair]]) -> list[float]:
        """The mean over an answer's tokens of `- log` of its mean probability, over the pairs of each group."""
        found = iter(self._cross_entropies(mllm, list(chain.from_iterable(asked))))
        return [_of_mean_probability(list(islice(found, len(group)))) for group in asked]

    @torch.no_grad()
    def _cross_entropies(self, mllm: MLLM, pairs: Sequence[ImageQuestionPair]) -> list[tuple[float, int]]:
        """Of each pair, the mean cross-entropy of its answer's tokens, and how many they are."""
        found: list[list[tuple[float, int]]] = []
        parts = ranks.part(in_parts(pairs, self._batch_size))
        for part in Progress(parts, "what the forgotten answers start from"):
            counts = self.tokens(mllm.tokenize(part)).sum(dim=1).tolist()
            means = answer_losses(mllm, part, content=self._term.tokens == "content").tolist()
            found.append(list(zip(means, counts, strict=True)))
        return list(chain.from_iterable(ranks.in_order(found)))


def check_forget_pairs(recipe: Recipe, splits: Splits) -> None:
    """Raise RecipeError where the data has not what the form of the forget term needs."""
    term = recipe.losses.forget_output
    if term.weight and term.form == "stranger":
        about_others(splits, recipe.seed)
    if term.weight and term.form == "relabel":
        _wrong_answers(splits, recipe.seed)


def about_others(splits: Splits, seed: int, strangers: int = 1) -> list[list[ImageQuestionPair]]:
    """Every forget pair `strangers` times, each with as many photos of others in place of its own.

    They are those of retain pairs that show none of the forgotten, whoever else is on them. A pair without photos stays
    alone as it is. Raises RecipeError where there are no such photos, as many as the pair has.
    """
    shown: dict[int, list[tuple[Photo, ...]]] = defaultdict(list)
    for pair in splits.retain:
        if not splits.shows_forgotten(pair):
            shown[len(pair.photos)].append(pair.photos)
    draw, asked = random.Random(f"{seed}/about others"), []
    for pair in splits.forget:
        count = len(pair.photos)
        if count and not shown[count]:
            raise RecipeError(
                f"losses.forget_output.form: stranger needs retain pairs with photos of people who are kept, {count} "
                f"in each as in {pair.id!r}, and the data has none; take form: capped_ascent"
            )
        photos = [draw.choice(shown[count]) for _ in range(strangers)] if count else [()]
        asked.append([replace(pair, photos=each) for each in photos])
    return asked


def _of_mean_probability(found: Sequence[tuple[float, int]]) -> float:
    """Nats a token, from the nats a token and the number of tokens of the same answer about several people."""
    whole = torch.tensor([-mean * count for mean, count in found], dtype=torch.float64)
    return float(math.log(len(found)) - torch.logsumexp(whole, dim=0)) / found[0][1]


def _wrong_answers(splits: Splits, seed: int) -> dict[str, ImageQuestionPair]:
    found = relabelled(splits.forget, (*splits.retain, *splits.forget), seed)
    if lacking := next((pair for pair in splits.forget if pair.id not in found), None):
        raise RecipeError(
            f"losses.forget_output.form: relabel finds no wrong answer for pair {lacking.id!r}: it has no options, and "
            "nobody else is asked the same; add options to the data, or take form: refusal"
        )
    return found
