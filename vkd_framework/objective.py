"""The recipe's losses put together on a batch of pairs: encode, run, tap the features, ask the teacher, add up.

A visible question about a forgotten person's photo is retained at the output while its features are free to move. That
is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vkd_framework import losses, ranks
from vkd_framework.alignment import parameters_of
from vkd_framework.batches import in_parts
from vkd_framework.features import FeatureTap, photo_features, vision_forward
from vkd_framework.forgetting import ForgetOutput
from vkd_framework.gradients import recomputed
from vkd_framework.output import answer_logits
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import FeatureTerm, Recipe
from vkd_framework.teachers import Teacher, guides, layers_of
from vkd_framework.types import PARTS, EncodedBatch, ImageQuestionPair, Splits

Down = Callable[[Tensor], None]
"""What goes backward from a loss."""


@dataclass(frozen=True)
class _Term:
    """A feature term with its layers resolved."""

    weight: float
    layers: tuple[str, ...]
    distance: losses.Distance
    teacher: Teacher
    mapped: bool
    """Whether a linear map leads to the teacher's channels."""
    learning: bool
    """Whether that map is trained by this term."""


class Objective:
    """The recipe's losses on a batch. Only output terms cost a pass through the language model.

    Made before anything is trained, it remembers the starting model. For `retain_kl` that is a frozen copy of the
    trained parts, asked anew at each step: to keep every distribution instead would take a float for each word of the
    vocabulary and each answer token. `reference` loads the retain-only model, for forms that compare with it,
    and `ignorant` the model of `teacher.kind: ignorant`. A linear map to a foreign teacher's channels learns from the
    attract term alone: by the repel term it would learn to miss.

    Of several processes each looks at its share of the pairs, and gives what that contributes to the loss and the terms
    of all: the sums over the processes are those of one that looks at every pair.
    """

    def __init__(
        self,
        mllm: MLLM,
        recipe: Recipe,
        splits: Splits,
        *,
        reference: Callable[[], MLLM] | None = None,
        ignorant: Callable[[], MLLM] | None = None,
    ) -> None:
        terms = recipe.losses
        self._mllm, self._recompute = mllm, recipe.model.gradient_checkpointing
        self._micro_batch = recipe.unlearn.micro_batch
        self._forget_output = ForgetOutput(mllm, recipe, splits, reference)
        self._retain_output, self._retain_kl, self._repel_cap = terms.retain_output, terms.retain_kl, terms.repel.cap
        self._vanilla = self._frozen_copy(recipe) if terms.retain_kl.weight else None
        self._splits = splits
        self._moves_away = recipe.repel_target == "repel"
        found = guides(mllm, recipe, splits, ignorant)
        self._maps = found.maps
        self._attract = self._feature_term(terms.attract, recipe, found.attract, learning=True)
        self._repel = self._feature_term(terms.repel, recipe, found.repel, learning=False)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """Parameters to be trained along with the student's, and thrown away with the objective."""
        return parameters_of(self._maps)

    def forget(self, pairs: Sequence[ImageQuestionPair], down: Down | None = None) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the forget terms, and each term before weighting.

        `down` is given the loss of each part of the batch (`unlearn.micro_batch`) as soon as it is known, to go
        backward; the sum then leads nowhere, and no more than one part is held.
        """
        share = ranks.share(pairs)
        weigh = _Weights(pairs, [True] * len(pairs))
        return self._in_parts(share, [True] * len(share), weigh, self._forget_part, down)

    def retain(self, pairs: Sequence[ImageQuestionPair], down: Down | None = None) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the retain terms, and each term before weighting; `down` as for `forget`.

        Who is not asked (`retain_output.share`) takes no pass through the language model.
        """
        if not (self._retain_output.weight or self._retain_kl.weight or self._attract.weight):
            return torch.zeros((), device=self._mllm.device), {}
        whole, terms = torch.zeros((), device=self._mllm.device), dict[str, float]()
        shown = _shown(pairs, [not self._splits.shows_forgotten(pair) for pair in pairs])
        asked = self._asked(shown)
        unasked = [holds and not wanted for holds, wanted in zip(shown, asked, strict=True)]
        for group, of_part in ((asked, self._retain_part), (unasked, self._attract_part)):
            chosen, held = list(compress(pairs, group)), list(compress(shown, group))
            if not chosen:
                continue
            share = ranks.share(chosen)
            tokens = 0 if self._vanilla is None else int(self._mllm.tokenize(share).answer.sum())
            weigh = _Weights(chosen, held, tokens, all_shown=sum(shown))
            loss, found = self._in_parts(share, ranks.share(held), weigh, of_part, down)
            whole = whole + loss
            for name, value in found.items():
                terms[name] = terms[name] + value if name in terms else value
        return whole, terms

    def _asked(self, shown: Sequence[bool]) -> list[bool]:
        """Which pairs of a retain batch are asked: some of the `shown`, which attract holds, and all others."""
        if not (self._retain_output.weight or self._retain_kl.weight):
            return [False] * len(shown)
        if not self._attract.weight:
            return [True] * len(shown)
        held = [index for index, holds in enumerate(shown) if holds]
        count = self._retain_output.asked_of(len(held))
        chosen = {held[place * len(held) // count] for place in range(count)}
        return [index in chosen or not holds for index, holds in enumerate(shown)]

    def _in_parts(
        self,
        share: Sequence[ImageQuestionPair],
        compared: Sequence[bool],
        weigh: _Weights,
        of_part: Callable[[Sequence[ImageQuestionPair], Sequence[bool], _Weights], tuple[Tensor, dict[str, float]]],
        down: Down | None,
    ) -> tuple[Tensor, dict[str, float]]:
        whole, terms = torch.zeros((), device=self._mllm.device), dict[str, float]()
        both = (in_parts(items, self._micro_batch) for items in (share, compared))
        for part, of_part_compared in zip(*both, strict=True):
            loss, found = of_part(part, of_part_compared, weigh)
            if down is not None:
                down(loss)
                loss = loss.detach()
            whole = whole + loss
            for name, value in found.items():
                terms[name] = terms[name] + value if name in terms else value
        return whole, terms

    def _forget_part(
        self, pairs: Sequence[ImageQuestionPair], compared: Sequence[bool], weigh: _Weights
    ) -> tuple[Tensor, dict[str, float]]:
        terms = {}
        output = self._forget_output
        of_pairs, of_compared = weigh.pairs(pairs), weigh.compared(pairs, compared)
        pairs = output.targets(pairs)
        asked = output.tokens if output.weight else None
        batch, distance, logits = self._forward(pairs, compared, self._repel, asked)
        loss = torch.zeros((), device=self._mllm.device)
        if logits is not None:
            term, cross_entropy = output.loss(pairs, batch, logits)
            loss = loss + of_pairs * output.weight * term
            terms["forget_output"] = of_pairs * cross_entropy.mean().item()
        if distance is not None:
            term = losses.repel(distance, self._repel_cap) if self._moves_away else losses.attract(distance)
            loss = loss + of_compared * self._repel.weight * term
            terms["repel"] = of_compared * distance.mean().item()
        return loss, terms

    def _retain_part(
        self, pairs: Sequence[ImageQuestionPair], compared: Sequence[bool], weigh: _Weights
    ) -> tuple[Tensor, dict[str, float]]:
        terms: dict[str, float] = {}
        output, divergence = self._retain_output, self._retain_kl
        of_pairs, of_compared = weigh.pairs(pairs), weigh.compared(pairs, compared)
        loss = torch.zeros((), device=self._mllm.device)
        asked = attrgetter("answer") if output.weight or divergence.weight else None
        batch, distance, logits = self._forward(pairs, compared, self._attract, asked)
        if logits is not None and output.weight:
            cross_entropy = losses.answer_cross_entropy(logits, batch.inputs["input_ids"], batch.answer)
            loss = loss + of_pairs * output.weight * cross_entropy.mean()
            terms["retain_output"] = of_pairs * cross_entropy.mean().item()
        if logits is not None and self._vanilla is not None:
            with torch.no_grad():
                before = answer_logits(self._vanilla.model, batch.inputs, batch.answer)
            apart = losses.kl_divergence(before, logits)
            of_tokens = weigh.tokens(len(logits))
            loss = loss + of_tokens * divergence.weight * apart
            terms["retain_kl"] = of_tokens * apart.item()
        if distance is not None:
            loss = loss + of_compared * self._attract.weight * losses.attract(distance)
            terms["attract"] = of_compared * distance.mean().item()
        return loss, terms

    def _attract_part(
        self, pairs: Sequence[ImageQuestionPair], compared: Sequence[bool], weigh: _Weights
    ) -> tuple[Tensor, dict[str, float]]:
        _, distance, _ = self._forward(pairs, compared, self._attract, None)
        assert distance is not None
        weight = weigh.compared(pairs, compared)
        loss = weight * self._attract.weight * losses.attract(distance)
        return loss, {"attract": weight * distance.mean().item()}

    def _forward(
        self,
        pairs: Sequence[ImageQuestionPair],
        compared: Sequence[bool],
        term: _Term,
        asked: Callable[[EncodedBatch], Tensor] | None,
    ) -> tuple[EncodedBatch, Tensor | None, Tensor | None]:
        """Encode; logits of the `asked` tokens; and distances to the teacher of the `compared` pairs with a photo."""
        layers = tuple(self._mllm.layer(name) for name in term.layers)
        batch = self._mllm.tokenize(pairs)
        logits = None
        with recomputed(self._mllm.model, self._recompute), FeatureTap(self._mllm.model, layers) as tap:
            if asked is not None:
                logits = answer_logits(self._mllm.model, batch.inputs, asked(batch))
            elif layers:
                vision_forward(self._mllm, batch.inputs)
        wanted = [b for b, pair in enumerate(pairs) if pair.photos and compared[b]]
        if not layers or not wanted:
            return batch, None, logits
        found = photo_features(self._mllm, batch.inputs, tap)
        return batch, self._distances(found, pairs, wanted, term), logits

    def _distances(
        self, found: Mapping[str, Any], pairs: Sequence[ImageQuestionPair], wanted: Sequence[int], term: _Term
    ) -> Tensor:
        """`[layers, len(wanted)]`: the distance of each wanted sample to the teacher at each layer."""
        chosen = torch.tensor(wanted, device=self._mllm.device)
        per_layer = []
        for layer in term.layers:
            student = found[layer]
            rows = self._maps[layer](student.rows, learning=term.learning) if term.mapped else student.rows
            teacher = term.teacher.rows(layer, pairs, rows.device)
            per_layer.append(term.distance(rows, teacher, student.sample, len(pairs))[chosen])
        return torch.stack(per_layer)

    def _frozen_copy(self, recipe: Recipe) -> MLLM:
        """The starting model; what is not trained is shared and takes no memory."""
        frozen = self._mllm.copy(share=[part for part in PARTS if part not in recipe.train])
        frozen.model.requires_grad_(False)
        return frozen

    @staticmethod
    def _feature_term(term: FeatureTerm, recipe: Recipe, teacher: Teacher, *, learning: bool) -> _Term:
        mapped = recipe.teacher.kind == "external" and term.distance not in losses.RELATIONAL
        distance = losses.DISTANCES[term.distance]
        return _Term(term.weight, layers_of(term, recipe), distance, teacher, mapped, learning)


class _Weights:
    """What the means over a part of this process's share weigh among those over the whole batch of all processes.

    `all_shown`: how many are compared with the teacher, where `pairs` are not the whole batch.
    """

    def __init__(
        self,
        pairs: Sequence[ImageQuestionPair],
        compared: Sequence[bool],
        tokens: int = 0,
        all_shown: int | None = None,
    ) -> None:
        share, shown = ranks.share(pairs), _shown(pairs, compared)
        self._share, self._shown, self._tokens = len(share), sum(_shown(share, ranks.share(compared))), tokens
        self._of_pairs = ranks.weight([True] * len(pairs))
        self._of_compared = sum(ranks.part(shown)) / max(1, sum(shown) if all_shown is None else all_shown)
        self._of_tokens = ranks.weight_of(tokens, pairs) if tokens else 0.0

    def pairs(self, part: Sequence[ImageQuestionPair]) -> float:
        """Of a mean over the part's pairs."""
        return self._of_pairs * (len(part) / self._share)

    def compared(self, part: Sequence[ImageQuestionPair], compared: Sequence[bool]) -> float:
        """Of a mean over those that are compared with the teacher; 0 where none is."""
        return self._of_compared * (sum(_shown(part, compared)) / self._shown) if self._shown else 0.0

    def tokens(self, count: int) -> float:
        """Of a mean over `count` answer tokens."""
        return self._of_tokens * (count / self._tokens) if self._tokens else 0.0


def _shown(pairs: Sequence[ImageQuestionPair], compared: Sequence[bool]) -> list[bool]:
    return [bool(pair.photos) and wanted for pair, wanted in zip(pairs, compared, strict=True)]
