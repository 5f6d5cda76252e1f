"""What to change in a recipe so that it fits into the memory at hand, what costs least first."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from vkd_framework.errors import RecipeError
from vkd_framework.estimate import Estimate
from vkd_framework.recipe import Recipe

HEADROOM = 0.9
"""Share of a GPU's memory that an estimate may fill: the driver and fragmentation take some."""


@dataclass(frozen=True)
class Change:
    """Settings to change on top of the changes before, what they cost, and the estimate with all of them."""

    settings: dict[str, str]
    price: str
    then: Estimate

    @property
    def flags(self) -> str:
        """The settings as they are given to `vkd run`."""
        return " ".join(f"--set {shlex.quote(setting)}" for setting in _settings(self.settings))


Again = Callable[[tuple[str, ...]], Estimate]
"""Estimates the recipe with further `--set` values. Raises RecipeError where they do not go together."""


def advise(found: Estimate, limit: float, again: Again) -> list[Change]:
    """The changes that lower the peak, one after the other, until it is below `limit` bytes or nothing is left.

    When the run fits in the end, changes without which it fits as well are left out.
    """
    taken: dict[str, str] = {}
    changes: list[Change] = []
    while found.peak.bytes > limit and (change := _next(found, taken, again)):
        taken, found = taken | change.settings, change.then
        if changes and changes[-1].price == change.price:
            change = replace(change, settings=changes.pop().settings | change.settings)
        changes.append(change)
    return _needed(changes, limit, again) if found.peak.bytes <= limit else changes


def _needed(changes: Sequence[Change], limit: float, again: Again) -> list[Change]:
    """The changes without those that can be done without, the dearest first, each with its estimate anew."""
    prices = [price for _, price in CHANGES]
    kept = list(changes)
    for change in sorted(changes, key=lambda change: prices.index(change.price), reverse=True):
        rest = [other for other in kept if other is not change]
        with suppress(RecipeError):  # what is left may need it
            if again(_together(rest)).peak.bytes <= limit:
                kept = rest
    return [replace(change, then=again(_together(kept[: at + 1]))) for at, change in enumerate(kept)]


def _together(changes: Sequence[Change]) -> tuple[str, ...]:
    return _settings({key: value for change in changes for key, value in change.settings.items()})


def _next(found: Estimate, taken: dict[str, str], again: Again) -> Change | None:
    """The cheapest change that lowers the peak, halved until it does; None when none does."""
    for ask, price in CHANGES:
        wanted: dict[str, str] = {}
        then = found
        while further := dict(setting.split("=", 1) for setting in ask(then.recipe, found.peak.name)):
            if further.items() <= wanted.items():
                break
            wanted |= further
            then = again(_settings(taken | wanted))
            if then.peak.bytes < found.peak.bytes:
                return Change(wanted, price, then)
    return None


def _settings(wanted: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in wanted.items())


def wanted_bytes(text: str) -> float:
    """`24GB`, `24 GiB` or `24000MB` as bytes. Raises RecipeError for anything else."""
    units = {"": 1e9, "gb": 1e9, "g": 1e9, "mb": 1e6, "gib": 2**30, "mib": 2**20}
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or match[1].count(".") > 1 or match[1] == ".":
        raise RecipeError(f"--gpu-memory {text}: no amount of memory; write it like 24GB or 22.5GiB")
    return float(match[1]) * units[match[2]]


def _evaluate_batch(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return _halved("evaluate.batch_size", recipe.evaluate.batch_size) if stage == "evaluate" else ()


def _half_precision(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("model.dtype=bfloat16",) if recipe.model.dtype == "float32" else ()


def _recomputing(recipe: Recipe, stage: str) -> tuple[str, ...]:
    wanted = stage == "unlearn" and not recipe.model.gradient_checkpointing
    return ("model.gradient_checkpointing=true",) if wanted else ()


def _offload(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Where nothing tunes the language model."""
    tuned = "language_model" in recipe.train or "full" in recipe.relearn.scopes or _attacker_rank(recipe, "unlearn")
    return () if recipe.model.offload or tuned else ("model.offload=true",)


def _parts_of_batches(recipe: Recipe, stage: str) -> tuple[str, ...]:
    config = recipe.unlearn
    attacker = recipe.simulated_attack.batch_size if recipe.simulated_attack.weight else 0
    most = config.micro_batch or max(config.forget_batch, config.retain_batch, attacker)
    return _halved("unlearn.micro_batch", most) if stage == "unlearn" else ()


def _parts_of_attacks(recipe: Recipe, stage: str) -> tuple[str, ...]:
    most = recipe.relearn.micro_batch or recipe.relearn.batch_size
    return _halved("relearn.micro_batch", most) if stage.startswith("relearn") else ()


def _batches(recipe: Recipe, stage: str) -> tuple[str, ...]:
    if stage != "unlearn":
        return ()
    config = recipe.unlearn
    return (
        *_halved("unlearn.forget_batch", config.forget_batch),
        *_halved("unlearn.retain_batch", config.retain_batch),
        *_attacker_batch(recipe, stage),
    )


def _attacker_batch(recipe: Recipe, stage: str) -> tuple[str, ...]:
    attack = recipe.simulated_attack
    at_work = stage == "unlearn" and attack.weight
    return _halved("simulated_attack.batch_size", attack.batch_size) if at_work else ()


def _attacks_everything(recipe: Recipe, stage: str) -> bool:
    attack = recipe.simulated_attack
    return stage == "unlearn" and attack.weight > 0 and "full" in attack.scopes


def _attacker_rank(recipe: Recipe, stage: str) -> tuple[str, ...]:
    whole = _attacks_everything(recipe, stage) and recipe.simulated_attack.rank is None
    return ("simulated_attack.rank=8",) if whole and "language_model" not in recipe.train else ()


def _attacker(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("simulated_attack.scopes=[visual]",) if _attacks_everything(recipe, stage) else ()


def _masters(recipe: Recipe, stage: str) -> tuple[str, ...]:
    section = stage.partition(",")[0]
    held = {"unlearn": recipe.unlearn.master_weights, "relearn": recipe.relearn.master_weights}.get(section, False)
    return (f"{section}.master_weights=false",) if held and recipe.model.dtype != "float32" else ()


def _low_rank_attack(recipe: Recipe, stage: str) -> tuple[str, ...]:
    scopes = dict.fromkeys("low_rank" if scope == "full" else scope for scope in recipe.relearn.scopes)
    return (f"relearn.scopes=[{', '.join(scopes)}]",) if stage == "relearn, full" else ()


def _visual_attack(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("relearn.scopes=[visual]",) if stage == "relearn, low_rank" else ()


def _projector(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("train=[projector]",) if stage == "unlearn" and tuple(recipe.train) != ("projector",) else ()


def _halved(key: str, value: int) -> tuple[str, ...]:
    return (f"{key}={value // 2}",) if value > 1 else ()


CHANGES: tuple[tuple[Callable[[Recipe, str], tuple[str, ...]], str], ...] = (
    (_evaluate_batch, "measures the same"),
    (_half_precision, "half the digits; usual at this size"),
    (_parts_of_batches, "the same result, in more and smaller passes"),
    (_parts_of_attacks, "the same attack, in more and smaller passes"),
    (_recomputing, "the same result, up to half again as long"),
    (_offload, "the same result; the computer's memory holds the language model, and each use of a layer waits for it"),
    (_attacker_rank, "withstands attackers of the language model who tune little of it"),
    (_attacker, "withstands attackers of the visual modules, less those who tune everything"),
    (_attacker_batch, "withstands a somewhat weaker attacker"),
    (_batches, "noisier steps; more of them may be needed"),
    (_masters, "small steps are rounded away, and many weights stand still"),
    (_low_rank_attack, "does not measure the attack on every weight"),
    (_visual_attack, "does not measure any attack on the language model"),
    (_projector, "forgets less"),
)
"""What may be changed, given the recipe and the stage that holds most, and what that costs; the cheapest first."""
