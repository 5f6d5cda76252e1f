"""Losses and generated answers are those of the model, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vkd_framework.features import vision_forward
from vkd_framework.generic import image_token_id
from vkd_framework.plugins import MLLM
from vkd_framework.testing.checks.tokens import TOKENS
from vkd_framework.testing.compare import TOLERANCE, relative_gap
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import Subject, answer_losses
from vkd_framework.types import EncodedBatch, ImageQuestionPair


def image_tokens_match_the_features(subject: Subject) -> None:
    """There is one image token for each feature that the projector hands to the language model."""
    handed = _handed_over(subject.mllm, subject.batch.inputs)
    tokens = int((subject.batch.inputs["input_ids"] == image_token_id(subject.mllm.model)).sum())
    if handed != tokens:
        raise Wrong(f"{handed} image tokens, as many as visual features", f"{tokens}")


def losses_do_not_depend_on_the_batch(subject: Subject) -> None:
    """Answer losses of a mixed batch, padded left or right, are those of its pairs one by one."""
    alone = torch.cat([_losses(subject, subject.mllm.tokenize([pair])) for pair in subject.pairs])
    for side in ("right", "left"):
        together = _losses(subject, subject.mllm.tokenize(subject.pairs, padding_side=side))
        gap, b = (together - alone).abs().max(dim=0)
        if not gap <= TOLERANCE:
            raise Wrong(
                f"loss {float(alone[b]):.4f} for {subject.pairs[int(b)].id!r}, as alone",
                f"{float(together[b]):.4f} in a batch padded {side}",
            )


def losses_are_those_of_transformers(subject: Subject) -> None:
    """The answer loss equals the loss that the model itself reports for the labels."""
    for pair in subject.pairs:
        batch = subject.mllm.tokenize([pair])
        own = float(_losses(subject, batch))
        with torch.no_grad():
            reported = float(subject.mllm.model(**batch.inputs, labels=batch.labels).loss)
        if not abs(own - reported) <= TOLERANCE * max(1.0, abs(reported)):
            raise Wrong(f"{pair.id!r}: loss {reported:.4f}, as the model reports", f"{own:.4f}")


def answers_do_not_see_what_follows(subject: Subject) -> None:
    """With another last token in the answers, the logits of all tokens before it stay as they are."""
    inputs, content = subject.batch.inputs, subject.batch.content
    one, other = sorted(set(inputs["input_ids"][content].tolist()))[:2]
    tokens = torch.arange(content.shape[1])
    last = torch.where(content, tokens, -1).amax(dim=1, keepdim=True)
    exchanged = torch.where(inputs["input_ids"] == one, other, one)
    changed = {**inputs, "input_ids": torch.where(tokens == last, exchanged, inputs["input_ids"])}
    before, after = _logits(subject, inputs), _logits(subject, changed)
    earlier = (tokens < last) & inputs["attention_mask"].bool()
    for b, pair in enumerate(subject.pairs):
        gap = relative_gap(after[b][earlier[b]], before[b][earlier[b]])
        if gap > TOLERANCE:
            raise Wrong(
                f"{pair.id!r}: logits that do not know the tokens behind them",
                f"{gap:.2g} apart with another last token of the answer, so the answer sees itself "
                "(is a key of `inputs` left as it is on a prompt, such as token_type_ids?)",
            )


def generation_does_not_depend_on_the_batch(subject: Subject) -> None:
    """Next-token logits of a left-padded mixed batch are those of its pairs one by one, while the tokens agree."""
    together = _generated(subject, subject.pairs)
    for b, pair in enumerate(subject.pairs):
        alone = _generated(subject, [pair])
        for step, (ours, theirs) in enumerate(zip(together, alone, strict=False)):
            gap = relative_gap(ours[b], theirs[0])
            if gap > 10 * TOLERANCE:
                raise Wrong(f"{pair.id!r}: the logits of step {step} as alone", f"{gap:.2g} apart in a batch")
            if int(ours[b].argmax()) != int(theirs[0].argmax()):
                break


def _losses(subject: Subject, batch: EncodedBatch) -> Tensor:
    """`[B]`: the answer losses of a batch."""
    return answer_losses(_logits(subject, batch.inputs), batch)


@torch.no_grad()
def _logits(subject: Subject, inputs: Mapping[str, Tensor]) -> Tensor:
    """`[B, L, V]`: the logits of a batch."""
    logits: Tensor = subject.mllm.model(**inputs, use_cache=False).logits
    return logits


@torch.no_grad()
def _handed_over(mllm: MLLM, inputs: Mapping[str, Tensor]) -> int:
    """How many visual features the language model is handed, whichever form a transformers version gives them."""
    answer = vision_forward(mllm, inputs)
    answer = getattr(answer, "pooler_output", answer)
    while isinstance(answer, tuple) and len(answer) == 2 and not isinstance(answer[0], Tensor):
        answer = answer[0]
    tensors = [answer] if isinstance(answer, Tensor) else list(answer)
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)


def _generated(subject: Subject, pairs: Sequence[ImageQuestionPair]) -> list[Tensor]:
    """Step -> `[B, V]`: the logits of a greedy answer of a few tokens, padded on the left."""
    mllm = subject.mllm
    with torch.no_grad():
        made = mllm.model.generate(
            **mllm.tokenize(pairs, with_answer=False, padding_side="left").inputs,
            do_sample=False,
            max_new_tokens=3,
            eos_token_id=list(mllm.stop_ids),
            pad_token_id=mllm.stop_ids[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
    return list(made.logits)


CHECKS = (
    Check(image_tokens_match_the_features, TOKENS),
    Check(losses_do_not_depend_on_the_batch, TOKENS),
    Check(losses_are_those_of_transformers, TOKENS),
    Check(answers_do_not_see_what_follows, TOKENS),
    Check(generation_does_not_depend_on_the_batch, TOKENS),
)
