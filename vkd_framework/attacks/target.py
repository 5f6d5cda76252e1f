"""What an attack is given: a model, the data, and the vanilla model's weights when it asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vkd_framework.evaluate import exact_match
from vkd_framework.plugins import MLLM
from vkd_framework.recipe import EvaluateConfig
from vkd_framework.types import ImageQuestionPair, Splits


class NotPossibleError(Exception):
    """An attack that makes no sense on this model or this data; the message says why, and stands in the results."""


@dataclass(frozen=True, eq=False)
class Target:
    """A model under attack. `name`: which of the run's models it is. `vanilla` loads the model before unlearning.

    `seed` decides every draw. It is not the recipe's: figures of a taught model are shared by runs of several seeds.
    """

    name: str
    mllm: MLLM
    splits: Splits
    evaluation: EvaluateConfig
    vanilla: Callable[[], MLLM]
    seed: int = 0

    @property
    def test(self) -> tuple[ImageQuestionPair, ...]:
        """Test VQA, what every attack is scored on: the forgotten people on photos that nothing was trained on."""
        return self.splits.columns["test_vqa"]

    def exact_match(self, mllm: MLLM, pairs: Sequence[ImageQuestionPair]) -> float:
        """The share of `pairs` that `mllm` answers right."""
        return exact_match(mllm, pairs, self.evaluation)
