"""Where the time of one step of VKD's default goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from costs.memory import Stopwatch
from costs.models import Size
from costs.steps import prepared
from vkd_framework import unlearn
from vkd_framework.objective import Objective
from vkd_framework.plugins import MLLM
from vkd_framework.simulated_attack import SimulatedAttacker
from vkd_framework.types import Splits

PIECES: dict[str, tuple[Any, str]] = {
    "pairs encoded and moved to the device": (MLLM, "tokenize"),
    "forget pass, there and back": (Objective, "forget"),
    "retain pass, there and back": (Objective, "retain"),
    "the attacker's pass, there and back": (SimulatedAttacker, "add_gradient"),
    "the mask on gradients": (unlearn, "mask_gradients"),
    "what is masked put back": (unlearn, "restore_masked"),
    "gradients clipped": (torch.nn.utils, "clip_grad_norm_"),
    "optimiser": (torch.optim.AdamW, "step"),
}
"""Name -> what is timed, from its first line to its last, less the pieces within."""
STEPS = 4


def seconds(variant: str, mllm: MLLM, family: str, size: Size, splits: Splits) -> dict[str, float]:
    """Piece -> seconds of a step of that variant, the mean of `STEPS` after two that do not count; largest first."""
    one = prepared(variant, mllm, family, size, splits)
    one.step(0)
    one.step(1)
    spent: Counter[str] = Counter()
    with _timed(spent, size):
        for step in range(2, 2 + STEPS):
            one.step(step)
    return {name: took / STEPS for name, took in spent.most_common()}


@contextmanager
def _timed(spent: Counter[str], size: Size) -> Iterator[None]:
    """Within the block, every piece adds its own seconds to `spent`. A GPU is waited for at each border."""
    within: list[str] = ["the rest"]
    watch = [Stopwatch(size.device)]

    def border() -> None:
        spent[within[-1]] += watch.pop().seconds()[0]
        watch.append(Stopwatch(size.device))

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            border()
            within.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                border()
                within.pop()

        return wrapped

    with ExitStack() as stack:
        for name, (owner, attribute) in PIECES.items():
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield
        border()
