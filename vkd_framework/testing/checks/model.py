"""The model itself: it answers every kind of question, is saved and loaded whole, and is known without its weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vkd_framework.errors import ModelError
from vkd_framework.layers_table import describe
from vkd_framework.plugins import MLLM
from vkd_framework.testing.checks.layers import LAYERS
from vkd_framework.testing.checks.tokens import TOKENS
from vkd_framework.testing.compare import difference, few
from vkd_framework.testing.outcomes import Check, Wrong
from vkd_framework.testing.subject import Subject, tiny

LOAD = "vkd_load_model (docs/hooks.md); vkd_framework.generic.load_model"
TINY = "vkd_tiny_model (docs/hooks.md); vkd_framework.tiny"


def a_question_about_a_photo_is_answered(subject: Subject) -> None:
    """Two questions about photos of one size can be encoded and answered in one batch."""
    subject.forward(subject.mllm.tokenize(subject.plain).inputs)


def text_and_photos_share_a_batch(subject: Subject) -> None:
    """A question without a photo can share a batch with one about a photo."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], subject.text_only]).inputs)


def a_question_may_show_two_photos(subject: Subject) -> None:
    """A question about two photos can share a batch with one about a single photo."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], subject.two_photos]).inputs)


def differently_sized_photos_share_a_batch(subject: Subject) -> None:
    """Square, portrait, panorama and tiny photos can share a batch."""
    subject.forward(subject.mllm.tokenize([subject.plain[0], *subject.differently_sized]).inputs)


def the_same_seed_gives_the_same_tiny_model(subject: Subject) -> None:
    """vkd_tiny_model gives the same weights for the same arguments."""
    if subject.built is not None:
        _same_weights(subject.built, tiny(subject.adapter, subject.source), "a second vkd_tiny_model")


def a_saved_model_loads_unchanged(subject: Subject) -> None:
    """Weights and logits are identical after saving and loading, by the adapter and by the Auto classes."""
    folder = str(subject.saved)
    again = subject.adapter.load(folder, torch.float32, "cpu")
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    others = {
        "vkd_load_model": again,
        "the Auto classes": subject.adapter.bind(auto, AutoProcessor.from_pretrained(folder)),
    }
    if subject.built is not None:
        others["the tiny model before it was saved"] = subject.built
    logits = subject.forward(subject.mllm.tokenize(subject.plain).inputs).logits
    for what, other in others.items():
        _same_weights(subject.mllm, other, what)
        with torch.no_grad():
            theirs = other.model.eval()(**other.tokenize(subject.plain).inputs, use_cache=False).logits
        if logits is None or not torch.equal(logits, theirs):
            raise Wrong("identical logits", f"{what} gives others, apart by {difference(logits, theirs)}")


def incomplete_weights_are_refused(subject: Subject) -> None:
    """A checkpoint that lacks a weight of the encoder, or has one too many, raises ModelError."""
    from safetensors.torch import load_file, save_file

    kept = subject.saved / "model.safetensors"
    if not kept.is_file():
        return
    weights = load_file(kept)
    encoder = next(p for p in subject.mllm.parameters(["encoder"]).values() if p.ndim > 1)
    gone = next(n for n, w in weights.items() if w.shape == encoder.shape and torch.equal(w, encoder.detach()))
    lacking = {name: weight for name, weight in weights.items() if name != gone}
    for what, tensors in (
        (f"{gone} is missing", lacking),
        ("an unknown weight is left over", {**weights, "model.left_over.weight": torch.ones(2)}),
    ):
        try:
            save_file(tensors, kept, metadata={"format": "pt"})
            subject.adapter.load(str(subject.saved), torch.float32, "cpu")
        except ModelError:
            continue
        finally:
            save_file(weights, kept, metadata={"format": "pt"})
        raise Wrong("ModelError", f"loads although {what}")


def the_meta_device_shows_the_same_model(subject: Subject) -> None:
    """Parts and layers found without weights are those of the loaded model."""
    bare = describe(str(subject.saved), subject.adapter)
    for what, ours, theirs in (
        ("parts", subject.mllm.modules, bare.modules),
        ("layers", subject.mllm.layers, bare.layers),
    ):
        if ours != theirs:
            raise Wrong(f"the {what} of the loaded model", f"without weights: {theirs}")


def _same_weights(ours: MLLM, theirs: MLLM, what: str) -> None:
    other = dict(theirs.model.named_parameters())
    mine = dict(ours.model.named_parameters())
    wrong = [name for name in mine if name not in other or not torch.equal(mine[name], other[name])]
    if wrong or len(mine) != len(other):
        raise Wrong("identical weights", f"{what} gives others in {len(wrong)} parameters ({few(wrong)})")


CHECKS = (
    Check(a_question_about_a_photo_is_answered, TOKENS),
    Check(text_and_photos_share_a_batch, TOKENS),
    Check(a_question_may_show_two_photos, TOKENS),
    Check(differently_sized_photos_share_a_batch, TOKENS),
    Check(the_same_seed_gives_the_same_tiny_model, TINY),
    Check(a_saved_model_loads_unchanged, LOAD),
    Check(incomplete_weights_are_refused, LOAD),
    Check(the_meta_device_shows_the_same_model, LAYERS),
)
