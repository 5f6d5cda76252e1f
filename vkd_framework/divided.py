"""A frozen weight that the processes of one machine hold once between them; each reads it where it lies.

FSDP (Zhao et al., arXiv 2304.11277, section 3) gathers a layer on all processes at once, so all have to come by in
step. What is frozen is only read, and needs no step: a process takes a weight when it comes to it, from the GPU of the
one that holds it. So each may generate answers of its own, of any length. Without a GPU, the weight lies in memory that
the processes share.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

from torch import Tensor, multiprocessing

from vkd_framework import ranks
from vkd_framework.errors import RecipeError


def held_by_one(tensor: Tensor, device: str, turn: int) -> Tensor:
    """`tensor`, copied to the `device` of one process of each machine and readable for all that run there.

    `turn`: they take turns at holding, so that each holds its share of many. The result is not to be written to. All
    processes come by together. Raises RecipeError where memory cannot be shared.
    """
    near = ranks.neighbours()
    holder = near[turn % len(near)]
    mine = tensor.to(device, copy=True) if ranks.rank() == holder else None
    with _explained():
        found = ranks.gather(None if mine is None else _handle(mine))[holder]
        assert found is not None
        return pickle.loads(found) if mine is None else mine


def _handle(tensor: Tensor) -> bytes:
    """What another process of this machine makes the same tensor of."""
    strategy = cast(Any, multiprocessing)  # without types
    usual = strategy.get_sharing_strategy()
    strategy.set_sharing_strategy("file_system")  # the other way works between parent and child alone
    try:
        return bytes(ForkingPickler.dumps(tensor))
    finally:
        strategy.set_sharing_strategy(usual)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"accelerate launch: the processes of this machine cannot read each other's memory ({reason}), which FSDP "
            "needs; let each see all GPUs, or launch with --multi_gpu in its place"
        ) from error
