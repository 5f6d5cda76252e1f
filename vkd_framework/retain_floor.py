"""A floor under what must be kept: while the model is below it, nothing is forgotten, only repaired.

For users who cannot tune. Below the floor the forget terms and the simulated attacker have no weight; they come back
when a check finds the model above it again. It is checked where training can be resumed, from the weights alone, so
that a resumed run decides like an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vkd_framework.evaluate import exact_match
from vkd_framework.intervals import wilson
from vkd_framework.plugins import MLLM
from vkd_framework.progress import say
from vkd_framework.recipe import EvaluateConfig, UnlearnConfig
from vkd_framework.types import ImageQuestionPair


class RetainFloor:
    """Made before anything is trained, it remembers how many of its pairs the starting model answers.

    The pairs are a fixed sample of the retain pairs with a photo. The model is below the floor when the whole 95 %
    interval of its score on them is: a single pair of a few dozen decides nothing. It is checked in the last phase
    only, and not before that phase had `checkpoint_every` steps: before, what is kept is expected to suffer and to be
    repaired. Without a floor, a check or a pair, nothing is asked and the floor always holds.
    """

    def __init__(
        self,
        mllm: MLLM,
        config: UnlearnConfig,
        evaluation: EvaluateConfig,
        retain: Sequence[ImageQuestionPair],
        *,
        seed: int,
    ) -> None:
        self._mllm, self._evaluation = mllm, evaluation
        self.checks = check_steps(config) if config.retain_floor is not None else ()
        shown = [pair for pair in retain if pair.photos] if self.checks else []
        self._pairs = random.Random(seed).sample(shown, min(config.floor_pairs, len(shown)))
        self._least = (config.retain_floor or 0.0) * exact_match(mllm, self._pairs, evaluation) if self._pairs else 0.0
        if config.retain_floor is not None and not self._least:
            say(f"unlearn: the retain floor holds nothing: {self._why(config)}")
        self._held = True

    def _why(self, config: UnlearnConfig) -> str:
        """Why there is no floor although one was asked for."""
        if not self.checks:
            every = f"every {config.checkpoint_every} steps (unlearn.checkpoint_every)"
            return f"none of {config.steps} steps is a check; only the last phase has any, {every}"
        if not self._pairs:
            return "no retain pair has a photo"
        return f"none of {len(self._pairs)} retain pairs is answered right to begin with"

    def holds(self, step: int) -> bool:
        """Whether the model was at or above the floor at the last check; checks before the step when it is time."""
        if self._pairs and step in self.checks:
            score, count = exact_match(self._mllm, self._pairs, self._evaluation), len(self._pairs)
            least, most = wilson(score * count, count)
            held = most >= self._least
            if held != self._held:
                then = "forgetting goes on" if held else "only repair until it holds"
                found = f"{score:.1%} of {count} retain pairs (95 %: {least:.1%} to {most:.1%})"
                say(f"unlearn: at step {step} {found}, floor {self._least:.1%}; {then}")
            self._held = held
        return self._held


def check_steps(config: UnlearnConfig) -> tuple[int, ...]:
    """The steps before which the floor is checked."""
    begin = round(config.steps * sum(phase.share for phase in config.phases[:-1]))
    every = config.checkpoint_every
    return tuple(step for step in range(every, config.steps, every) if step >= begin + every)
