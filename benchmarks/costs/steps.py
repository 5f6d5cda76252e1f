"""One step of every method, and of the floor: the bare passes that VKD's losses need, in plain PyTorch.

Every step sees the same number of forget and retain pairs. A method's step is the one that `vkd run` makes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from costs.models import Size, recipe_of
from vkd_framework.batches import in_parts
from vkd_framework.estimate.work import passes
from vkd_framework.features import vision_forward
from vkd_framework.plugins import MLLM, trainable
from vkd_framework.recipe import Recipe
from vkd_framework.saliency import save_mask
from vkd_framework.types import PARTS, SCOPES, EncodedBatch, Scope, Splits
from vkd_framework.unlearn import Stepper

ALONE = "simulated_attack.weight=0"
OUTPUT_ONLY, FEATURES_ONLY = "losses.attract.weight=0", "losses.retain_output.weight=0"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ga_diff": ("ga_diff", ()),
    "kl_min": ("kl_min", ()),
    "npo": ("npo", ()),
    "npo_rt": ("npo_rt", ()),
    "mmunlearner": ("mmunlearner", ()),
    "vkd_paper": ("vkd_paper", ()),
    "vkd_attacker_full": ("vkd", ("simulated_attack.scopes=[full]",)),
    "vkd_attacker_visual": ("vkd", ("simulated_attack.scopes=[visual]",)),
    "vkd_attacker_every_weight": ("vkd", ("simulated_attack.scopes=[full]", "simulated_attack.rank=null")),
    "vkd_in_turns": ("vkd", ("simulated_attack.turns=true",)),
    "vkd_all_asked": ("vkd", ("losses.retain_output.share=1",)),
    "vkd_without_attacker": ("vkd", (ALONE,)),
    "vkd_output_terms_only": ("vkd", (ALONE, OUTPUT_ONLY)),
    "vkd_feature_terms_only": (
        "vkd_paper",
        (ALONE, "losses.forget_output.weight=0", FEATURES_ONLY, "mask={kind: none}", "losses.repel.target=noise"),
    ),
}
"""What is timed -> the method and what is changed of it. `npo` has no retain term, in its paper too."""

FLOORS: dict[str, Scope | None] = {
    "floor": "visual",
    "floor_attacker_every_weight": "full",
    "floor_without_attacker": None,
}
"""The bare passes of VKD's default losses, by the weights that an attacker tunes.

What the default's attacker adds to a language model at a low rank is left out of `floor`: it is next to nothing.
"""

FLOOR_OF = {
    "vkd": "floor",
    "vkd_attacker_full": "floor",
    "vkd_attacker_visual": "floor",
    "vkd_attacker_every_weight": "floor_attacker_every_weight",
    "vkd_without_attacker": "floor_without_attacker",
}
"""Variant -> the floor that has the same passes; the others are compared with `floor`."""


@dataclass(frozen=True)
class Prepared:
    """A step that can be made, and what it holds: all in bytes but `trained`, which counts weights."""

    step: Callable[[int], object]
    trained: int
    optimizer_bytes: Callable[[], int]
    attacker_bytes: Callable[[], int]
    written: Callable[[], int]


def prepared(name: str, mllm: MLLM, family: str, size: Size, splits: Splits) -> Prepared:
    """The variant or floor of that name, on `mllm` itself, which it trains."""
    if name in FLOORS:
        return _floor(mllm, recipe_of(family, size, "vkd"), splits, FLOORS[name])
    method, overrides = VARIANTS[name]
    recipe = recipe_of(family, size, method, *overrides)
    mask = _some_mask(mllm, recipe) if recipe.mask.kind != "none" else None
    stepper = Stepper(mllm, recipe, splits, mask, reference=None)

    def written() -> int:
        """A run writes its mask, what is trained with its moments, and in the end the model."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if mask is not None:
                save_mask(folder / "mask", mask, {})
            of_mask = sum(path.stat().st_size for path in folder.iterdir())
        trained, model = stepper.learned.values(), mllm.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in (*trained, *model))
        return of_mask + weights + _bytes_of(stepper.optimizer)

    return Prepared(
        stepper.step,
        sum(parameter.numel() for parameter in stepper.learned.values()),
        lambda: _bytes_of(stepper.optimizer),
        lambda: stepper.attacker.bytes,
        written,
    )


def _some_mask(mllm: MLLM, recipe: Recipe) -> dict[str, Tensor]:
    """A mask of half of the weights: what a step costs does not depend on which."""
    drawn = mllm.parameters(recipe.train)
    return {name: torch.rand(p.shape, device=p.device) > 0.5 for name, p in drawn.items()}


def _bytes_of(optimizer: torch.optim.Optimizer) -> int:
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held += getattr(optimizer, "masters", [])
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _floor(mllm: MLLM, recipe: Recipe, splits: Splits, attack: Scope | None) -> Prepared:
    """Batches are encoded and the teacher's features known before; nothing is checked, recorded or drawn.

    Of the retain pairs as many are asked as the recipe asks, the photos of all are seen; in parts as the recipe says.
    """
    config, layers = recipe.unlearn, [mllm.model.get_submodule(mllm.layer(name).path) for name in recipe.layers]
    many = next(one.pairs for one in passes(recipe) if one.what == "retain")
    forget, asked, unasked = (
        [(len(part) / len(pairs), mllm.tokenize(part)) for part in in_parts(pairs, config.micro_batch)]
        for pairs in (
            splits.forget[: config.forget_batch],
            splits.retain[:many],
            splits.retain[many : config.retain_batch],
        )
    )
    students = trainable(mllm, recipe.train)
    optimizer = torch.optim.AdamW(students.values(), lr=config.learning_rate, fused=True)
    features: list[Tensor] = []

    def seen(look: Callable[[], Tensor]) -> Tensor:
        features.clear()
        kept = [layer.register_forward_hook(lambda _m, _i, out: features.append(_tensor(out))) for layer in layers]
        loss = look()
        for handle in kept:
            handle.remove()
        return loss

    def photos_alone(batch: EncodedBatch) -> Tensor:
        vision_forward(mllm, batch.inputs)
        return torch.zeros((), device=mllm.device)

    retain = [(weight, partial(cross_entropy, mllm, batch)) for weight, batch in asked]
    retain += [(weight, partial(photos_alone, batch)) for weight, batch in unasked]
    teachers = []
    for _, look in retain:
        with torch.no_grad():
            seen(look)
        teachers.append(list(features))
    attacked, held = mllm, None
    if attack is not None:
        attacked = mllm.copy(share=[part for part in PARTS if part not in SCOPES[attack]])
        attackers = trainable(attacked, SCOPES[attack])
        held = torch.optim.Adam(attackers.values(), lr=recipe.simulated_attack.learning_rate)
        students = trainable(mllm, recipe.train)

    def step(_: int) -> None:
        optimizer.zero_grad()
        if held is not None:
            held.zero_grad()
            for weight, batch in forget:
                torch.autograd.backward(weight * cross_entropy(attacked, batch))
            for name, parameter in students.items():
                parameter.grad = None if attackers[name].grad is None else -attackers[name].grad
            held.step()
        for weight, batch in forget:
            torch.autograd.backward(-weight * cross_entropy(mllm, batch))
        for (weight, look), teacher in zip(retain, teachers, strict=True):
            loss = seen(look)
            apart = [(f - t).square().sum() / t.square().sum() for f, t in zip(features, teacher, strict=True)]
            torch.autograd.backward(weight * (loss + torch.stack(apart).mean()))
        torch.nn.utils.clip_grad_norm_(students.values(), config.clip)
        optimizer.step()

    return Prepared(
        step,
        sum(parameter.numel() for parameter in students.values()),
        lambda: _bytes_of(optimizer),
        lambda: _bytes_of(held) + sum(p.numel() * p.element_size() for p in attackers.values()) if held else 0,
        lambda: 0,
    )


def cross_entropy(mllm: MLLM, batch: EncodedBatch) -> Tensor:
    """Mean cross-entropy of the answers' tokens, with logits at the places of answers only."""
    places = batch.answer.any(dim=0).nonzero().squeeze(1)
    logits = mllm.model(**batch.inputs, logits_to_keep=places - 1).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, places].flatten())


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
