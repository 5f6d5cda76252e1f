"""Membership: whether an answer's likelihood tells that a photo shows somebody the model was taught.

The forgotten people's training photos are compared with photos of strangers, each asked the same question with the same
answer. Sources: answer loss, Yeom et al., arXiv 1709.01604; Min-K%, Shi et al., arXiv 2310.16789; Min-K%++, Zhang et
al., arXiv 2404.02936. They score a text of many tokens; here it is an answer's content tokens. Of a one-token answer,
Min-K% is the loss.

The truth ratio is that of TOFU (Maini et al., arXiv 2401.06121) with the options as wrong answers. There the right
answer is a paraphrase; here it is the answer itself.

Shapes: `B` samples, `L` tokens, `V` vocabulary, `N` answer tokens of the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vkd_framework import ranks
from vkd_framework.attacks.statistics import auc
from vkd_framework.attacks.target import Target
from vkd_framework.batches import in_parts
from vkd_framework.evaluate import option_losses
from vkd_framework.output import answer_logits
from vkd_framework.plugins import MLLM
from vkd_framework.progress import Progress
from vkd_framework.recipe import MembershipAttack
from vkd_framework.types import ImageQuestionPair, Photo


@dataclass(frozen=True)
class Likelihood:
    """How likely an answer is, three ways, and higher is likelier; `loss` is minus the mean cross-entropy."""

    loss: float
    min_k: float
    min_k_pp: float


def attack(config: MembershipAttack, target: Target) -> dict[str, Any]:
    """The three AUCs (0.5: photos of the forgotten and of strangers look alike; None without strangers).

    `per_question` holds, for each question of Test VQA, the answer's `loss` and probability and the truth ratio (null
    without options), and the `stranger_loss` of the same answer about a stranger's photo: `attacks.conclude` sets
    models against each other with them.
    """
    batch = target.evaluation.batch_size
    members = [pair for pair in target.splits.columns["forget_vqa"] if pair.photos and pair.kind == "identity"]
    strangers = about_strangers(members, target.splits.strangers, target.seed)
    found: dict[str, Any] = dict.fromkeys(("loss_auc", "min_k_auc", "min_k_pp_auc"))
    if strangers:
        own, other = (
            likelihoods(target.mllm, pairs, config.lowest, batch, f"membership of {target.name}")
            for pairs in (members, strangers)
        )
        for name in ("loss", "min_k", "min_k_pp"):
            found[f"{name}_auc"] = auc(*([getattr(answer, name) for answer in answers] for answers in (own, other)))
    test = target.test
    options = option_losses(target.mllm, test, target.evaluation, what=f"truth ratios of {target.name}")
    losses = [-one.loss for one in likelihoods(target.mllm, test, config.lowest, batch, "losses on Test VQA")]
    unknown = about_strangers(test, target.splits.strangers, target.seed)
    stranger_losses = likelihoods(target.mllm, unknown, config.lowest, batch, "losses on strangers")
    return {
        **found,
        "photos": len({pair.photo_keys for pair in members}),
        "strangers": len({pair.photo_keys for pair in strangers}),
        "test_loss": sum(losses) / len(losses),
        "per_question": {
            "loss": losses,
            "stranger_loss": [-one.loss for one in stranger_losses],
            "answer_probability": [math.exp(-loss[pair.answer]) for pair, loss in zip(test, options, strict=True)],
            "truth_ratio": [truth_ratio(pair, loss) for pair, loss in zip(test, options, strict=True)],
        },
    }


def about_strangers(pairs: Sequence[ImageQuestionPair], photos: Sequence[Photo], seed: int) -> list[ImageQuestionPair]:
    """The same questions with the same answers, about strangers' photos dealt out in turn; none without photos."""
    dealt = list(photos)
    random.Random(seed).shuffle(dealt)
    return [
        replace(pair, id=f"{pair.id}/stranger", photos=(dealt[i % len(dealt)],), subject=None)
        for i, pair in enumerate(pairs)
        if dealt
    ]


@torch.inference_mode()
def likelihoods(
    mllm: MLLM, pairs: Sequence[ImageQuestionPair], lowest: float, batch_size: int, what: str
) -> list[Likelihood]:
    """How likely each pair's answer is, over its content tokens."""
    found: list[list[Likelihood]] = []
    for part in Progress(ranks.part(in_parts(pairs, batch_size)), what):
        here = []
        batch = mllm.tokenize(part)
        logits = answer_logits(mllm.model, batch.inputs, batch.content)
        sample, position = batch.content.nonzero(as_tuple=True)
        log_probability, standardised = token_scores(logits, batch.inputs["input_ids"][sample, position])
        for b in range(len(batch.content)):
            own, scores = log_probability[sample == b], standardised[sample == b]
            here.append(Likelihood(own.mean().item(), mean_of_lowest(own, lowest), mean_of_lowest(scores, lowest)))
        found.append(here)
    return [likelihood for here in ranks.in_order(found) for likelihood in here]


def token_scores(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` log-probabilities of `ids` `[N]` under `logits` `[N, V]`, and the same standardised (Min-K%++, eq. 3).

    Standardised by the mean and the standard deviation that the log-probability of a token drawn from the model has.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    own = log_probabilities.gather(1, ids[:, None]).squeeze(1)
    mean = (probabilities * log_probabilities).sum(dim=-1)
    variance = (probabilities * log_probabilities.square()).sum(dim=-1) - mean.square()
    return own, (own - mean) / variance.clamp(min=1e-8).sqrt()


def mean_of_lowest(scores: Tensor, share: float) -> float:
    """The mean of the lowest `share` of `scores`, at least one of them."""
    count = max(1, int(share * len(scores)))
    return scores.topk(count, largest=False).values.mean().item()


def truth_ratio(pair: ImageQuestionPair, losses: dict[str, float]) -> float | None:
    """Mean probability of the wrong options over the right one's, each to the power of 1 / its length."""
    wrong = [math.exp(-loss) for option, loss in losses.items() if option != pair.answer]
    return sum(wrong) / len(wrong) / max(math.exp(-losses[pair.answer]), 1e-12) if wrong else None
