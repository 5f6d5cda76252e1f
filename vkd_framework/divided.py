"""A frozen weight that the processes of one machine hold once between them; each reads it where it lies.

FSDP (Zhao et al., arXiv 2304.11277, section 3) gathers a layer on all processes at once, so all have to come by in
step. What is frozen is only read, and needs no step: a process takes a weight when it comes to it, from the GPU of the
one that holds it. So each may generate answers of its own, of any length. Without a GPU, the weight lies in memory that
the processes share.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

from torch import Tensor, multiprocessing

from vkd_framework import ranks
from vkd_framework.errors import RecipeError, first_line


class Division:
    """Who of a machine's processes holds which weight: the next is for the one with the fewest bytes so far."""

    def __init__(self, near: Sequence[int]) -> None:
        self.held = dict.fromkeys(near, 0)
        """Number of a process -> bytes that it holds."""

    def holder(self, size: int) -> int:
        """Who is to hold the next weight, of `size` bytes."""
        chosen = min(self.held, key=lambda number: self.held[number])
        self.held[chosen] += size
        return chosen

    def held_by_one(self, tensor: Tensor, device: str) -> Tensor:
        """`tensor`, copied to the `device` of one process of each machine and readable for all that run there.

        It is not to be written to. All processes come by together. Raises RecipeError where memory cannot be shared.
        """
        holder = self.holder(tensor.nbytes)
        mine = tensor.to(device, copy=True) if ranks.rank() == holder else None
        with _explained():
            # a handle that nobody takes would keep the memory until the end
            handle = _handle(mine) if mine is not None and len(self.held) > 1 else None
            found = ranks.gather(handle)[holder]
            if mine is not None:
                return mine
            assert found is not None
            taken: Tensor = pickle.loads(found)
            return taken


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
        reason = first_line(error)
        mend = "make /dev/shm larger" if "shared memory" in reason else "let each see all GPUs"
        raise RecipeError(
            f"accelerate launch: the processes of this machine cannot read each other's memory ({reason}), which FSDP "
            f"needs; {mend}, or launch with --multi_gpu in its place"
        ) from error
