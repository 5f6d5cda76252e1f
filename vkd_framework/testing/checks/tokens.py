"""Token by token: what is supervised, what counts as the answer, where texts begin and end."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from vkd_framework.generic import image_token_id, render
from vkd_framework.testing.compare import few
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import SCRIPTS, Subject
from vkd_framework.types import IGNORED

TOKENS = "vkd_tokenize_pairs (docs/hooks.md); vkd_framework.generic.tokenize_pairs"
STOP = "vkd_stop_token_ids (docs/hooks.md); vkd_framework.generic.stop_token_ids"


def labels_cover_the_answer_and_one_stop_token(subject: Subject) -> None:
    """Labels decode to exactly the answer and its stop token, in every script and on either padding side."""
    scripts = [replace(subject.text_only, id=answer, answer=answer) for answer in SCRIPTS]
    for side in ("right", "left"):
        for pairs in (subject.pairs, scripts):
            batch = subject.mllm.tokenize(pairs, padding_side=side)
            for row, pair in enumerate(pairs):
                labels = batch.labels[row][batch.labels[row] != IGNORED].tolist()
                due = pair.answer + subject.token(subject.mllm.stop_ids[0])
                # a template that writes a blank before the answer may leave it to the answer's first token
                if subject.token(labels).lstrip() != due or subject.mllm.stop_ids[0] in labels[:-1]:
                    raise Wrong(f"labels of {pair.id!r} that decode to {due!r}", f"{subject.token(labels)!r}")


def labels_begin_right_after_the_prompt(subject: Subject) -> None:
    """The first label lies on the token after the prompt's last one, and labels have no gaps."""
    for pair in subject.pairs:
        prompt = subject.attended(subject.mllm.tokenize([pair], with_answer=False), 0)
        batch = subject.mllm.tokenize([pair])
        covered = (batch.labels[0] != IGNORED).nonzero().flatten().tolist()
        if not covered or covered != list(range(len(prompt), len(prompt) + len(covered))):
            raise Wrong(
                f"{pair.id!r}: the first label on token {len(prompt)}, right after the prompt, and no gaps",
                f"labels on tokens {few(covered)}",
            )


def labels_cover_no_prompt_image_or_padding(subject: Subject) -> None:
    """Labels equal the input ids where they count, and lie on no image token and no padding; prompts have none."""
    for side in ("right", "left"):
        batch = subject.mllm.tokenize(subject.pairs, padding_side=side)
        ids, covered = batch.inputs["input_ids"], batch.labels != IGNORED
        wrong = {
            "padding tokens": covered & (batch.inputs["attention_mask"] == 0),
            "image tokens": covered & (ids == image_token_id(subject.mllm.model)),
            "tokens whose id they do not hold": covered & (batch.labels != ids),
            "tokens that are no content, the stop token apart": covered
            & ~batch.content
            & (ids != ids.where(covered, -1)),
        }
        for what, where in wrong.items():
            if bool(where.any()):
                raise Wrong("labels on answer tokens only", f"{int(where.sum())} labels on {what}")
    prompt = subject.mllm.tokenize(subject.pairs, with_answer=False)
    if bool((prompt.labels != IGNORED).any()) or bool(prompt.content.any()):
        raise Wrong("no labels without an answer", f"{int((prompt.labels != IGNORED).sum())} labels")


def content_is_the_answer_alone(subject: Subject) -> None:
    """Content covers the labelled tokens without the stop token."""
    batch = subject.batch
    stop = torch.isin(batch.labels, torch.tensor(subject.mllm.stop_ids))
    due = (batch.labels != IGNORED) & ~stop
    if not torch.equal(due, batch.content):
        row = int((due != batch.content).any(dim=1).nonzero()[0])
        found = subject.token(batch.inputs["input_ids"][row][batch.content[row]])
        raise Wrong(f"content {subject.token(batch.inputs['input_ids'][row][due[row]])!r}", f"{found!r}")


def texts_have_one_bos(subject: Subject) -> None:
    """A text begins with one BOS token where the tokenizer writes one, never with two."""
    bos = subject.mllm.processor.tokenizer.bos_token_id
    written = list(subject.mllm.processor.tokenizer("a").input_ids)[:1] == [bos]
    if bos is None:
        return
    for row, pair in enumerate(subject.pairs):
        ids = subject.attended(subject.batch, row)
        leading = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        if leading > 1 or leading < written:
            raise Wrong(f"{pair.id!r}: one {subject.token(bos)!r} at its beginning", f"{leading} of them")


def prompts_are_prefixes(subject: Subject) -> None:
    """A prompt's tokens are the first tokens of its full text."""
    for pair in subject.pairs:
        prompt = subject.attended(subject.mllm.tokenize([pair], with_answer=False), 0)
        full = subject.attended(subject.mllm.tokenize([pair]), 0)
        if full[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            raise Wrong(
                f"{pair.id!r}: {subject.token(prompt[at : at + 3])!r} at token {at}, as in the prompt",
                f"{subject.token(full[at : at + 3])!r} (does the template's prompt end in a blank, or "
                "the processor write something behind the text?)",
            )


def answers_end_with_the_first_stop_token(subject: Subject) -> None:
    """The first stop token is what follows an answer in the chat template, or else in the encoded text."""
    processor, pair = subject.mllm.processor, subject.plain[0]
    first = subject.mllm.stop_ids[0]
    written = bool(getattr(processor, "chat_template", None))
    text = render(processor, pair.question, len(pair.photos), pair.answer) if written else ""
    tail = text.rpartition(pair.answer)[2].strip()
    if tail:
        after = list(processor.tokenizer(tail, add_special_tokens=False).input_ids)
    else:  # nothing is written there, so the hook has to
        ids, content = subject.batch.inputs["input_ids"][0], subject.batch.content[0]
        after = ids[int(content.nonzero().max()) + 1 :].tolist()
    if after[:1] != [first]:
        raise Wrong(
            f"{subject.token(after[:1])!r} as first stop token, because it follows an answer",
            f"{subject.token(first)!r} (all: {few([subject.token(i) for i in subject.mllm.stop_ids])})",
        )


def every_key_of_the_processor_is_kept(subject: Subject) -> None:
    """The model is given every key that the processor returned, but no labels."""
    given: set[str] = set()
    spy = _spy(subject.mllm.processor, given)
    stop_ids = subject.mllm.stop_ids
    kept = set(subject.adapter.tokenize_pairs(spy, subject.plain, stop_ids, True, "right").inputs)
    wanted = given - {"offset_mapping", "labels"}
    lost = sorted(wanted - kept)
    if lost:
        raise Wrong(f"the keys {few(sorted(wanted), 9)}", f"without {', '.join(lost)}")


def padding_goes_where_it_is_asked(subject: Subject) -> None:
    """Padding stands on the side that was asked for."""
    for side, edge in (("left", 0), ("right", -1)):
        mask = subject.mllm.tokenize(subject.pairs, padding_side=side).inputs["attention_mask"].bool()
        if bool(mask[:, edge].all()) or not bool(mask[:, -1 - edge].all()):
            raise Wrong(f"padding on the {side}", f"none there, or padding on the other side ({side} was asked for)")


def _spy(processor: Any, given: set[str]) -> Any:
    """The processor, noting the keys of whatever it returns."""
    kind = type(processor)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = kind.__call__(self, *arguments, **named)
        given.update(answer)
        return answer

    spy = copy.copy(processor)
    spy.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return spy


CHECKS = (
    Check(labels_cover_the_answer_and_one_stop_token, TOKENS),
    Check(labels_begin_right_after_the_prompt, TOKENS),
    Check(labels_cover_no_prompt_image_or_padding, TOKENS),
    Check(content_is_the_answer_alone, TOKENS),
    Check(texts_have_one_bos, TOKENS),
    Check(prompts_are_prefixes, TOKENS),
    Check(answers_end_with_the_first_stop_token, STOP),
    Check(every_key_of_the_processor_is_kept, TOKENS),
    Check(padding_goes_where_it_is_asked, TOKENS),
)
