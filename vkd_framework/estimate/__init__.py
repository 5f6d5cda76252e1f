"""What a run will cost, worked out from its recipe and the shapes of its model before anything is loaded.

`tokens` says what a pair is made of, `work` what a step computes, `memory` what each stage holds, `devices` how fast it
goes, `advice` what to change so that it fits. Everything but `known` and `devices.measured` is a pure function.
"""

from __future__ import annotations

from dataclasses import dataclass

from vkd_framework.estimate import devices, memory, tokens, work
from vkd_framework.estimate.devices import Rate
from vkd_framework.estimate.memory import Line, Stage
from vkd_framework.estimate.tokens import Tokens
from vkd_framework.estimate.work import Pass, Sizes
from vkd_framework.plugins import Anatomy
from vkd_framework.recipe import Recipe

__all__ = ["Estimate", "Pass", "Rate", "Sizes", "Stage", "Tokens", "devices", "estimate", "memory", "tokens", "work"]


@dataclass(frozen=True)
class Estimate:
    """What one run is expected to cost."""

    recipe: Recipe
    size: Sizes
    tokens: Tokens
    rate: Rate
    passes: tuple[Pass, ...]
    stages: tuple[Stage, ...]
    disk: tuple[Line, ...]
    offloaded: int = 0
    """Bytes of a language model in the computer's memory, beside a GPU."""

    @property
    def step_flops(self) -> float:
        """Operations of one step of unlearning; 0 for methods without steps."""
        return work.step_flops(self.size, self.tokens, self.passes)

    @property
    def fetched(self) -> float:
        """Bytes of an offloaded language model that come to the GPU in one step."""
        return work.fetches(self.passes) * self.offloaded

    @property
    def step_seconds(self) -> float:
        """Seconds of one step of unlearning."""
        return self.step_flops / self.rate.flops + self.fetched / devices.FETCHED

    @property
    def peak(self) -> Stage:
        """The stage that holds the most memory."""
        return max(self.stages, key=lambda stage: stage.bytes)


def estimate(recipe: Recipe, anatomy: Anatomy, found: Tokens, rate: Rate, *, process: int = 0) -> Estimate:
    """Put it together. `process`: bytes that the process holds already, on a CPU."""
    size = work.sizes(anatomy)
    stages = memory.stages(recipe, anatomy, size, found, process=process)
    disk = memory.disk(recipe, anatomy, size, found)
    offloaded = memory.frozen_bytes(recipe, size) if recipe.model.offload and not process else 0
    return Estimate(recipe, size, found, rate, tuple(work.passes(recipe)), tuple(stages), tuple(disk), offloaded)
