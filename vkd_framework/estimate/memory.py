"""How much memory each stage of a run takes at its peak, and how much disk the run, line by line.

What training keeps for the way back is counted block by block: what normalisation, attention and the feed-forward part
save, and the inputs of weight matrices where those are trained. The counts are what autograd saves for the usual block
with sdpa attention; on the tiny models of all four families they are within a fifth of what it does save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vkd_framework import encodings, ranks, shelf
from vkd_framework.estimate.tokens import Tokens
from vkd_framework.estimate.work import Pass, Sizes, passes
from vkd_framework.plugins import Anatomy
from vkd_framework.recipe import Recipe
from vkd_framework.types import PARTS, SCOPES, Part

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MASK_BATCH = 16
"""Pairs of a batch while saliency is accumulated."""
ENCODER_SAVES = (10, 3)
"""Numbers that an encoder block saves for each token: times its width, times its inner width."""
FROZEN_SAVES, TRAINED_SAVES = (7, 3), (11, 4)
"""The same for a block of the language model, with frozen weights and with trained ones."""


@dataclass(frozen=True)
class Line:
    """Some bytes, and how they come about."""

    what: str
    bytes: float
    how: str


@dataclass(frozen=True)
class Stage:
    """What one stage of a run holds at its peak."""

    name: str
    lines: tuple[Line, ...]

    @property
    def bytes(self) -> float:
        """All of it."""
        return sum(line.bytes for line in self.lines)


def stages(recipe: Recipe, anatomy: Anatomy, size: Sizes, tokens: Tokens, *, process: int = 0) -> list[Stage]:
    """The stages of a run that take memory worth telling. `process`: bytes that are held before, or 0 on a GPU."""
    each = BYTES[recipe.model.dtype]
    count = {part: anatomy.count([part]) for part in PARTS}
    total = sum(count.values())
    beside: list[Line] = []
    if process:
        encoded = min(encodings.PHOTOS_LIMIT, tokens.photos * tokens.pixels * 4)
        beside += [Line("the program", process, "before anything is loaded"), Line("encoded photos", encoded, "kept")]
    whole = [Line("weights", total * each, f"{total:,} x {each}"), *beside]
    held = [_weights(recipe, total, size, each, beside_gpu=not process), *beside]

    def trained(parts: Sequence[Part]) -> int:
        return sum(count[part] for part in parts)

    def training(
        name: str,
        parts: Sequence[Part],
        pairs: int,
        *more: Line,
        masters: bool = True,
        most: int | None = None,
        added: int = 0,
    ) -> Stage:
        n = trained(parts) + added
        every = Pass(name, pairs, True, PARTS if added else tuple(parts), everywhere=name == "teach", most=most)
        return Stage(
            name,
            (
                *(whole if name == "teach" else held),
                *more,
                Line("gradients", n * each, f"{n:,} x {each}"),
                _optimiser(n, each, masters),
                *_pass_lines(every, size, tokens, each),
            ),
        )

    found = []
    if recipe.teach is not None:
        found.append(training("teach", PARTS, recipe.teach.batch_size))
    if recipe.mask.kind != "none":
        n = trained(recipe.train)
        scores = Line("saliency", (3 if recipe.mask.kind == "ratio" else 2) * n * 4, f"{n:,} scores of each set")
        one = Pass("mask", MASK_BATCH, True, recipe.train)
        found.append(Stage("mask", (*held, scores, *_pass_lines(one, size, tokens, each))))
    if recipe.procedure == "tune":
        found.append(Stage("unlearn", (*held, *_unlearning(recipe, count, size, tokens, anatomy, process > 0))))
    one = Pass("evaluate", recipe.evaluate.batch_size, True, ())
    found.append(Stage("evaluate", (*held, *_pass_lines(one, size, tokens, each))))
    if any(attack.kind == "quantize" for attack in recipe.attacks):
        largest = size.vocabulary * size.hidden
        rounds = [Line("the largest matrix, rounded", largest * (each + 4), f"{largest:,} x {each + 4}")]
        if process:
            rounds.append(Line("weights before rounding", total * each, f"{total:,} x {each}"))
        found.append(Stage("attacks", (*held, *rounds, *_pass_lines(one, size, tokens, each))))
    for scope in recipe.relearn.scopes:
        n = trained(SCOPES[scope])
        added = recipe.relearn.rank * sum(size.channels) if scope == "low_rank" else 0
        copied = Line("the attacker's copy", (n + added) * each, f"{n + added:,} x {each}")
        found.append(
            training(
                f"relearn, {scope}",
                SCOPES[scope],
                recipe.relearn.batch_size,
                copied,
                masters=recipe.relearn.master_weights,
                most=recipe.relearn.micro_batch,
                added=added,
            )
        )
    return found


def disk(recipe: Recipe, anatomy: Anatomy, size: Sizes, tokens: Tokens) -> list[Line]:
    """What a run writes to disk, taught models aside. Of photos that are not counted, a line of 0 bytes."""
    each = BYTES[recipe.model.dtype]
    total, n = anatomy.count(PARTS), anatomy.count(recipe.train)
    lines = [Line("the model", total * each, f"{total:,} x {each}, in the run's folder")]
    if recipe.procedure != "tune":
        return lines
    state = n * each + _optimiser(n, each, recipe.unlearn.master_weights).bytes
    lines.append(Line("where to go on", state, "what is trained and its optimiser, until unlearning is done"))
    remembered = {
        "teacher's features": (_features(recipe, size, tokens, anatomy) * each, shelf.LIMIT, math.inf),
        "encoded photos": (tokens.pixels * 4, encodings.PHOTOS_LIMIT, encodings.DISK_LIMIT),
    }
    for what, (one, in_memory, most) in remembered.items():
        beyond = min(most, max(0.0, tokens.photos * one - in_memory))
        if not tokens.photos and one:
            how = f"{one:,.0f} bytes for each photo, and those could not be counted"
            lines.append(Line(what, 0, f"{how}; in the cache folder while it runs"))
        elif beyond:
            lines.append(Line(what, beyond, f"{tokens.photos:,} photos; in the cache folder while it runs"))
    return lines


def _optimiser(n: int, each: int, masters: bool) -> Line:
    """Two moments of each weight, and in lower precision its master; all three are then in float32."""
    if each == 4 or not masters:
        return Line("optimiser", 2 * n * each, f"2 x {n:,} x {each}")
    return Line("optimiser", 3 * n * 4, f"{n:,} weights in float32 and 2 moments of each")


def frozen_bytes(recipe: Recipe, size: Sizes) -> int:
    """What the language model's matrices take where they are held."""
    return size.matrices["language_model"] * (BYTES[recipe.model.dtype] if recipe.model.quantize is None else 1)


def _weights(recipe: Recipe, total: int, size: Sizes, each: int, *, beside_gpu: bool) -> Line:
    divide = beside_gpu and ranks.divide()
    if not (recipe.model.frozen_language_model or divide):
        return Line("weights", total * each, f"{total:,} x {each}")
    frozen = size.matrices["language_model"]
    rest, held = (total - frozen) * each, frozen_bytes(recipe, size)
    how = f"{total - frozen:,} x {each} + {frozen:,} x {each if recipe.model.quantize is None else 1}"
    if divide:
        near = len(ranks.neighbours())
        return Line("weights", rest + held // near, f"{how}, the latter divided by {near}")
    if recipe.model.offload and beside_gpu:
        return Line("weights", rest, f"{how}, the latter in the computer's memory")
    return Line("weights", rest + held, how)


def _unlearning(
    recipe: Recipe, count: dict[Part, int], size: Sizes, tokens: Tokens, anatomy: Anatomy, host: bool
) -> list[Line]:
    """What unlearning holds beside the weights; the teacher's features lie in the `host`'s memory, never on a GPU."""
    each = BYTES[recipe.model.dtype]
    n = sum(count[part] for part in recipe.train)
    lines = [
        Line("gradients", n * each, f"{n:,} x {each}"),
        _optimiser(n, each, recipe.unlearn.master_weights),
    ]
    if recipe.mask.kind != "none":
        lines.append(Line("mask", n, f"{n:,} x 1"))
        if recipe.mask.scope == "all":
            lines.append(Line("starting weights", n * each, f"{n:,} x {each}, to put back what is masked"))
    if recipe.losses.retain_kl.weight:
        lines.append(Line("model as it was", n * each, f"{n:,} x {each}, the rest is shared"))
    if host and (features := _features(recipe, size, tokens, anatomy)):
        kept = min(shelf.LIMIT, tokens.photos * features * each)
        lines.append(Line("teacher's features", kept, f"{tokens.photos:,} photos x {features:,.0f} x {each}"))
    run = passes(recipe)
    attacks = [one for one in run if one.what.startswith("attacker")]
    if attacks:
        held, moved = max(_of_attacker(recipe, SCOPES[scope], count, size) for scope in recipe.simulated_attack.scopes)
        lines.append(Line("attacker's weights", held * each, f"{held:,} x {each}"))
        lines.append(Line("attacker's optimiser", 2 * moved * each, f"2 x {moved:,} x {each}"))
        if any(one.at_once < one.pairs for one in attacks):
            own = moved - n
            lines.append(Line("attacker's gradients", own * each, f"{own:,} x {each}, added up over parts of a batch"))
    extra = Line("attacked weights", 2 * n * each, f"{n:,} x {each} and their gradients, while he is at it")
    tops = [[*_pass_lines(one, size, tokens, each), *([extra] if one in attacks else [])] for one in run if one.trained]
    return [*lines, *max(tops, key=lambda top: sum(line.bytes for line in top), default=[])]


def _of_attacker(recipe: Recipe, parts: Sequence[Part], count: dict[Part, int], size: Sizes) -> tuple[int, int]:
    """Numbers that an attacker on these parts holds, and how many of them he tunes."""
    rank = recipe.simulated_attack.rank
    if rank is None or "language_model" not in parts or "language_model" in recipe.train:
        moved = sum(count[part] for part in parts)
        return moved, moved
    visual = sum(count[part] for part in parts if part != "language_model")
    inputs, outputs = size.channels
    return visual + rank * (inputs + outputs), visual + rank * outputs


def _pass_lines(one: Pass, size: Sizes, tokens: Tokens, each: int) -> list[Line]:
    """What one pass keeps until the way back, or while it is at it where there is none."""
    reached = PARTS if one.output else PARTS[:2]
    saved = sum(saved_numbers(one.trained, part, size, tokens, recomputed=one.recomputed) for part in reached)
    how = (
        f"{one.at_once} pairs ({one.what}) x {saved:,.0f} x {each}"
        if one.trained
        else f"{one.at_once} pairs, one block"
    )
    lines = [
        Line("activations", one.at_once * saved * each, how),
        Line("photos", one.at_once * tokens.pixels * 4, f"{one.at_once} x {tokens.pixels:,.0f} x 4"),
    ]
    if one.output:
        places = tokens.text if one.everywhere else tokens.answer
        numbers = one.at_once * places * size.vocabulary
        wide = each if each == 4 else each + 4  # losses are computed in float32
        how = f"{one.at_once} x {places:,.0f} x {size.vocabulary:,} x {wide}"
        both = (2, how + " and their gradient") if one.trained else (1, how)
        lines.append(Line("logits", both[0] * numbers * wide, both[1]))
    return lines


def saved_numbers(
    trained: Sequence[Part], part: Part, size: Sizes, tokens: Tokens, *, recomputed: bool = False
) -> float:
    """Numbers that autograd saves in one part for one pair; of a part without a way back, what one block works on.

    `recomputed`: blocks keep their inputs alone, and one of them at a time is computed again.
    """
    if part == "projector":
        return tokens.image * 4 * size.inner[part]
    many = tokens.patches if part == "encoder" else tokens.text
    wide, deep = ENCODER_SAVES if part == "encoder" else TRAINED_SAVES if part in trained else FROZEN_SAVES
    block = many * (wide * size.width[part] + deep * size.inner[part])
    if not any(one in trained for one in PARTS[: PARTS.index(part) + 1]):
        return block
    if recomputed:
        return block + size.blocks[part] * many * size.width[part]
    return size.blocks[part] * block


def _features(recipe: Recipe, size: Sizes, tokens: Tokens, anatomy: Anatomy) -> float:
    """Numbers of the teacher's features of one photo."""
    named = {layer.name: layer for layer in anatomy.layers}
    return sum(
        tokens.image * size.hidden if name == "projector" else tokens.patches * (named[name].width or 0)
        for name in recipe.distilled
    )
