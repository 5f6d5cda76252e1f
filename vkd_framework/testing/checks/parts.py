"""Encoder, projector and language model are what their names say: weights are disturbed, gradients followed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vkd_framework.plugins import MLLM, Anatomy
from vkd_framework.testing.compare import difference, few
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import Subject, answer_losses
from vkd_framework.types import Part

PARTS = "vkd_locate_vision_modules (docs/hooks.md); vkd_framework.generic.locate_vision_modules(nested_projector=...)"

VISION_PARTS: tuple[Part, ...] = ("encoder", "projector")


def embeddings_and_head_are_language_model(subject: Subject) -> None:
    """The input embeddings and the output head belong to the language model."""
    head_is_language(subject.mllm)


def text_does_not_pass_the_vision_modules(subject: Subject) -> None:
    """Text-only logits stay the same, bit for bit, whatever the encoder's and the projector's weights are."""
    inputs = subject.mllm.tokenize([subject.text_only]).inputs
    before = subject.forward(inputs).logits
    for part in VISION_PARTS:
        with _disturbed(subject.mllm, part) as names:
            after = subject.forward(inputs).logits
        if before is None or after is None or not torch.equal(before, after):
            raise Wrong(
                f"text-only logits that do not know the {part}",
                f"they move by {difference(before, after)} when its weights are disturbed ({few(names)})",
            )


def photos_pass_encoder_and_projector(subject: Subject) -> None:
    """Logits of a photo question change with the encoder's weights, and with the projector's."""
    inputs = subject.mllm.tokenize(subject.plain[:1]).inputs
    before = subject.forward(inputs).logits
    for part in VISION_PARTS:
        with _disturbed(subject.mllm, part) as names:
            after = subject.forward(inputs).logits
        if before is None or after is None or torch.equal(before, after):
            raise Wrong(
                f"photo logits that depend on the {part}", f"they stay as they are when {few(names)} are disturbed"
            )


def gradients_reach_the_parts_in_use(subject: Subject) -> None:
    """A photo question gives encoder and projector gradients, a text-only one gives them none."""
    for pair, due in ((subject.plain[0], True), (subject.text_only, False)):
        batch = subject.mllm.tokenize([pair])
        for part in VISION_PARTS:
            named = subject.mllm.parameters([part])
            loss = answer_losses(subject.mllm.model(**batch.inputs, use_cache=False).logits, batch).sum()
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            reached = [name for name, g in zip(named, gradients, strict=True) if g is not None and bool(g.any())]
            if bool(reached) != due:
                amount = "no parameter" if due else f"{len(reached)} parameters ({few(reached)})"
                raise Wrong(
                    f"{'some' if due else 'no'} {part} parameter with a gradient from a "
                    f"{'photo' if due else 'text-only'} question",
                    f"{amount} of {len(named)} with one",
                )


def head_is_language(anatomy: Anatomy, where: str = "") -> None:
    """Raise Wrong when embeddings or head lie in another part; `where` goes before what was expected."""
    language = {id(parameter) for parameter in anatomy.parameters(["language_model"]).values()}
    names = {id(parameter): name for name, parameter in anatomy.model.named_parameters()}
    ends = {
        "input embeddings": anatomy.model.get_input_embeddings(),
        "output head": anatomy.model.get_output_embeddings(),
    }
    for what, module in ends.items():
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) not in language:
                raise Wrong(f"{where}the {what} in the language model", f"{names[id(parameter)]} is in another part")


@contextmanager
def _disturbed(mllm: MLLM, part: Part) -> Iterator[list[str]]:
    """Noise on every weight of a part; the weights come back bit for bit."""
    named = mllm.parameters([part])
    kept = {name: parameter.detach().clone() for name, parameter in named.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        try:
            yield list(named)
        finally:
            for name, parameter in named.items():
                parameter.copy_(kept[name])


CHECKS = (
    Check(embeddings_and_head_are_language_model, PARTS),
    Check(text_does_not_pass_the_vision_modules, PARTS),
    Check(photos_pass_encoder_and_projector, PARTS),
    Check(gradients_reach_the_parts_in_use, PARTS),
)
