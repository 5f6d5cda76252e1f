"""What to change in a recipe so that it fits into the memory at hand, what costs least first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
        return " ".join(f"--set {setting}" for setting in _settings(self.settings))


def advise(found: Estimate, limit: float, again: Callable[[tuple[str, ...]], Estimate]) -> list[Change]:
    """The changes that lower the peak, one after the other, until it is below `limit` bytes or nothing is left.

    `again` estimates the recipe with further `--set` values.
    """
    taken: dict[str, str] = {}
    changes: list[Change] = []
    while found.peak.bytes > limit and (change := _next(found, taken, again)):
        taken, found = taken | change.settings, change.then
        if changes and changes[-1].price == change.price:
            change = replace(change, settings=changes.pop().settings | change.settings)
        changes.append(change)
    return changes


def _next(found: Estimate, taken: dict[str, str], again: Callable[[tuple[str, ...]], Estimate]) -> Change | None:
    """The cheapest change that lowers the peak; None when none does."""
    for ask, price in CHANGES:
        wanted = dict(setting.split("=", 1) for setting in ask(found.recipe, found.peak.name))
        if wanted and (then := again(_settings(taken | wanted))).peak.bytes < found.peak.bytes:
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


def _parts_of_batches(recipe: Recipe, stage: str) -> tuple[str, ...]:
    config = recipe.unlearn
    attacker = recipe.simulated_attack.batch_size if recipe.simulated_attack.weight else 0
    most = config.micro_batch or max(config.forget_batch, config.retain_batch, attacker)
    return _halved("unlearn.micro_batch", most) if stage == "unlearn" else ()


def _relearn_batch(recipe: Recipe, stage: str) -> tuple[str, ...]:
    one = recipe.relearn.batch_size
    return _halved("relearn.batch_size", one) if stage.startswith("relearn") else ()


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


def _relearn_scopes(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("relearn.scopes=[visual]",) if stage == "relearn, full" else ()


def _projector(recipe: Recipe, stage: str) -> tuple[str, ...]:
    return ("train=[projector]",) if stage == "unlearn" and tuple(recipe.train) != ("projector",) else ()


def _halved(key: str, value: int) -> tuple[str, ...]:
    return (f"{key}={value // 2}",) if value > 1 else ()


CHANGES: tuple[tuple[Callable[[Recipe, str], tuple[str, ...]], str], ...] = (
    (_evaluate_batch, "measures the same"),
    (_half_precision, "half the digits; usual at this size"),
    (_parts_of_batches, "the same result, in more and smaller passes"),
    (_recomputing, "the same result, up to half again as long"),
    (_attacker_rank, "withstands attackers of the language model who tune little of it"),
    (_attacker, "withstands attackers of the visual modules, less those who tune everything"),
    (_attacker_batch, "withstands a somewhat weaker attacker"),
    (_batches, "noisier steps; more of them may be needed"),
    (_relearn_batch, "a somewhat weaker attack"),
    (_masters, "small steps are rounded away, and many weights stand still"),
    (_relearn_scopes, "does not measure the attack on every weight"),
    (_projector, "forgets less"),
)
"""What may be changed, given the recipe and the stage that holds most, and what that costs; the cheapest first."""
