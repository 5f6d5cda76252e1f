"""Proofs of a run, computed from the saved result: what must not have moved did not move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vkd_framework.batches import in_parts
from vkd_framework.plugins import MLLM
from vkd_framework.saliency import Mask
from vkd_framework.types import ImageQuestionPair, Part
from vkd_framework.vanilla import fingerprint

TEXT = "text_only_max_logit_difference"
WITNESSES = 64
"""How many questions are compared, text-only ones and ones about photos."""
AT_ONCE = 4
"""Of them in one pass: at every place of a text, logits take far more memory than anything that training holds."""


@dataclass(frozen=True, eq=False)
class Witness:
    """What a model says and is made of, kept for comparison after the model itself is gone."""

    text_logits: tuple[Tensor, ...]
    photo_logits: str
    frozen: str
    masked: str
    everything: str


@torch.inference_mode()
def witness(mllm: MLLM, pairs: Sequence[ImageQuestionPair], trained: Sequence[str], mask: Mask | None) -> Witness:
    """Logits on text-only questions, and fingerprints of those on photos and of frozen, masked-out and all weights.

    `pairs` with a photo are asked twice: with it, and as text alone. `trained`: names of parameters; a tensor that
    shares its memory with one of them (tied embeddings) counts as trained.
    """
    chosen = pairs[:WITNESSES]
    texts = [ImageQuestionPair(pair.id, pair.question, pair.answer) for pair in chosen]
    photos = [pair for pair in chosen if pair.photos]
    state = mllm.model.state_dict()
    moving = {state[name].data_ptr() for name in trained}
    return Witness(
        text_logits=tuple(_logits(mllm, texts)),
        photo_logits=fingerprint({f"{part}": logits for part, logits in enumerate(_logits(mllm, photos))}),
        frozen=fingerprint(state, [name for name, tensor in state.items() if tensor.data_ptr() not in moving]),
        masked=fingerprint({name: state[name][~kept] for name, kept in (mask or {}).items()}),
        everything=fingerprint(state),
    )


def compare(vanilla: Witness, unlearned: Witness, reloaded: Witness, *, masked: bool) -> dict[str, float | bool | None]:
    """The `proofs` block: vanilla against the reloaded result, and the result in memory against the reloaded one.

    `masked`: whether masked-out weights had to stay (mask scope `all`); otherwise that proof is null.
    """
    both = zip(vanilla.text_logits, reloaded.text_logits, strict=True)
    differences = [(before - after).abs().max() for before, after in both]
    return {
        TEXT: float(torch.stack(differences).max()),
        "frozen_parameters_identical": vanilla.frozen == reloaded.frozen,
        "masked_parameters_identical": vanilla.masked == reloaded.masked if masked else None,
        "reload_identical": unlearned.everything == reloaded.everything
        and unlearned.photo_logits == reloaded.photo_logits,
    }


def failed(proofs: Mapping[str, float | bool | None], train: Sequence[Part] = ()) -> list[str]:
    """The names of the proofs that do not hold; a difference that is not a number does not hold.

    `train`: the parts that might change. With the language model among them, text-only answers are not promised to
    stay: their difference is measured and fails nothing.
    """
    promised = {name: value for name, value in proofs.items() if not (name == TEXT and "language_model" in train)}
    return [
        name
        for name, value in promised.items()
        if value is not None and not (value == 0.0 if name.endswith("difference") else value is True)
    ]


def _logits(mllm: MLLM, pairs: Sequence[ImageQuestionPair]) -> Iterator[Tensor]:
    """`[T, V]` of each part of the pairs, at its `T` real tokens."""
    for part in in_parts(pairs, AT_ONCE):
        inputs = mllm.tokenize(part).inputs
        yield mllm.model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].float().cpu()
