"""What a model says at the answers' tokens, and nowhere else: the logits of all other places are never computed.

With a vocabulary of a hundred thousand words, logits at every place of a text take more memory than all features of the
language model. A hook in front of the output layer leaves it the places that count, in every family and version alike;
`logits_to_keep` of transformers keeps the same places in all samples, and some versions of some models lack it.

Shapes: `B` samples, `L` tokens, `N` answer tokens of the batch, `D` channels, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from vkd_framework.losses import answer_cross_entropy, answer_rows
from vkd_framework.plugins import MLLM
from vkd_framework.types import ImageQuestionPair


def answer_logits(
    model: Any, inputs: Mapping[str, Tensor], answer: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """`[N, V]`: the logits that predict the answer tokens, in float32, sample after sample.

    `inputs`: what `model` takes; `answer` `[B, L]` bool, True on the tokens to predict (never the first). `weights`:
    name of a parameter -> what is computed with in its place.
    """
    sample, position = answer.nonzero(as_tuple=True)

    def only_before_answers(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # `[B, L, D]` -> `[1, N, D]`
        if not given or given[0].shape[:2] != answer.shape:
            return None
        return given[0][sample, position - 1][None], *given[1:]

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(only_before_answers) if head is not None else None
    arguments = {**inputs, "use_cache": False}
    try:
        made = model(**arguments) if weights is None else functional_call(model, dict(weights), kwargs=arguments)
    finally:
        if hook is not None:
            hook.remove()
    logits: Tensor = made.logits
    if logits.shape[:2] == answer.shape:  # no output layer was met that the hook could narrow
        return answer_rows(logits, answer)
    return logits[0].float()


def answer_losses(mllm: MLLM, pairs: Sequence[ImageQuestionPair], *, content: bool = False) -> Tensor:
    """`[B]`: mean cross-entropy of each pair's answer, in nats a token; `content` leaves out the token that ends it."""
    batch = mllm.tokenize(pairs)
    tokens = batch.content if content else batch.answer
    return answer_cross_entropy(answer_logits(mllm.model, batch.inputs, tokens), batch.inputs["input_ids"], tokens)
