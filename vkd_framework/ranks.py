"""Several processes that do one run together, as `torchrun` or `accelerate launch` start them; alone, nothing happens.

Every process goes through the whole run. Each takes its share of every batch, and what the shares give is added up, so
that all hold the same weights at any time. The first process alone speaks, writes and decides what depends on files.
A part that is tuned is small and asked for through hooks and `functional_call`, so gradients are added up here and not
by a wrapper around the model.

What adds up or gathers waits for the others: all processes have to come by in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from vkd_framework.errors import LostProcessError, RecipeError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a process waits for the others: another run may be teaching the same model, and only the first sees it. Who
has died is found out at once, by its connection or by the launcher."""
PIECE = 2**24
"""Most numbers that are added up at once; they take 4 bytes each beside the gradients."""
LAST_WORDS = 1.0
"""Seconds for the process that failed first to say why, before another one ends and the launcher ends all."""
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets when a plugin was asked for -> its name."""
DIVIDED = "ACCELERATE_USE_FSDP"
"""What it sets when the processes are to hold parts of the model."""
OF_THE_RECIPE = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "model.offload"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "model.gradient_checkpointing"),
}
"""What it sets for FSDP alone and a recipe decides here -> the option, and the setting."""

_rank, _size = 0, 1


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def size() -> int:
    """How many processes do this run."""
    return _size


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return _rank == 0


def launched() -> int:
    """How many processes a launcher started, before any of them joined the others."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() and "RANK" in os.environ else 1


def local() -> int:
    """The number of this process among those of its machine: which GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _size > 1 else 0


def neighbours() -> list[int]:
    """The numbers of the processes on the machine of this one, in order; a launcher counts machine by machine."""
    firsts = gather(_rank - local())
    return [number for number, first in enumerate(firsts) if first == firsts[_rank]]


def divide() -> bool:
    """Whether the processes of a machine are to hold a frozen language model once between them."""
    return _size > 1 and _asked(DIVIDED)


@contextmanager
def together() -> Iterator[None]:
    """Within the block, this process is one of those that a launcher started.

    When one fails, all end. The first to fail lets its error through, the others leave without a word and with the same
    status. Raises RecipeError for a way of sharing out that is not supported.
    """
    global _rank, _size
    if launched() == 1:
        check_launcher()
        yield
        return
    # else transformers 4 leaves the weights out where they are loaded by any but the first process of a machine
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    store, _rank, _size = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    if torch.cuda.is_available() and local() < torch.cuda.device_count():
        torch.cuda.set_device(local())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=_rank, world_size=_size, timeout=PATIENCE)
    try:
        check_launcher()
        yield
        once(lambda: None)
    except BaseException as error:
        if _claimed(store):
            raise
        time.sleep(LAST_WORDS)
        os._exit(getattr(error, "exit_status", 1))
    else:
        distributed.destroy_process_group()
    finally:
        _rank, _size = 0, 1


def check_launcher() -> None:
    """Raise RecipeError when `accelerate launch` was asked for something that a run would not do."""
    for variable, name in UNSUPPORTED.items():
        if _asked(variable):
            raise RecipeError(
                f"accelerate launch: {name} is not supported; launch with --multi_gpu in its place, or with --use_fsdp "
                "to divide a frozen language model among the GPUs of a machine"
            )
    for variable, (option, setting) in OF_THE_RECIPE.items():
        if _asked(DIVIDED) and _asked(variable):
            raise RecipeError(
                f"accelerate launch: {option} true would change nothing, the recipe decides; leave it out and give "
                f"--set {setting}=true"
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("", "no"):
        raise RecipeError(
            f"accelerate launch: --mixed_precision {precision} would change nothing, the recipe decides; leave it out "
            "and give --set model.dtype=bfloat16"
        )
    if "RANK" not in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        raise RecipeError(
            "accelerate launch: --cpu starts a single process; for several without a GPU take --multi_gpu in its "
            "place, and --set model.device=cpu"
        )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def alone(command: str, instead: str) -> None:
    """Raise RecipeError when a launcher started several processes of a command that one process does."""
    if launched() > 1:
        raise RecipeError(f"{command}: works as one process, and {launched()} were launched; {instead}")


def part(items: Sequence[T]) -> list[T]:
    """This process's part of what all of them know; empty when there are fewer items than processes.

    Every `size()`-th item, so that each process gets some of each kind where kinds follow each other.
    """
    return list(items[_rank::_size])


def share(batch: Sequence[T]) -> list[T]:
    """The part of a batch that this process trains on, never empty: who has none of it takes one that weighs nothing.

    So that every process goes the same way through what follows.
    """
    return part(batch) or list(batch[:1])


def weight(counted: Sequence[bool]) -> float:
    """What the mean over `part(counted)` contributes to that over all: the share of the counted items that is here.

    The means of all processes, each times its weight, add up to the mean over the whole batch, however uneven.
    """
    whole = sum(counted)
    return sum(part(counted)) / whole if whole else 0.0


def weight_of(count: int, batch: Sequence[Any]) -> float:
    """The same for a mean over `count` things that this process found in its `share` of a batch."""
    here = count if part(batch) else 0
    whole = sum(gather(here))
    return here / whole if whole else 0.0


def gather(value: T) -> list[T]:
    """Every process's value, in the order of the processes."""
    if _size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _size
    with _connected():
        distributed.all_gather_object(found, value)
    return found


def in_order(results: Iterable[T]) -> list[T]:
    """What every process made of its `part`, in the order of the whole."""
    parts = gather(list(results))
    whole: list[Any] = [None] * sum(map(len, parts))
    for r, own in enumerate(parts):
        whole[r::_size] = own
    return whole


def totals(values: Mapping[str, float]) -> dict[str, float]:
    """Named numbers added up; a name that a process does not have counts as 0 there."""
    summed: dict[str, float] = {}
    for own in gather(dict(values)):
        for name, value in own.items():
            summed[name] = summed[name] + value if name in summed else value
    return summed


def once(work: Callable[[], T]) -> T:
    """Done by the first process; all get what it returns, and none goes on before."""
    if _size == 1:
        return work()
    from torch import distributed

    holder: list[Any] = [work() if _rank == 0 else None]
    with _connected():
        distributed.broadcast_object_list(holder, src=0)
    result: T = holder[0]
    return result


def add(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors added up over the processes, in place; in float32 where their own dtype is less precise.

    `like` has every name, in the same order everywhere, with the tensor's shape, dtype and device. A name that no
    process found stays out, one that only others found is new.
    """
    if _size == 1:
        return dict(found)
    import torch

    somewhere = {name for names in gather([name for name in like if name in found]) for name in names}
    summed = {
        name: found[name].contiguous() if name in found else torch.zeros_like(tensor).contiguous()
        for name, tensor in like.items()
        if name in somewhere
    }
    for pieces in _pieces([tensor.view(-1) for tensor in summed.values()]):
        precise = torch.promote_types(pieces[0].dtype, torch.float32)
        together = torch.cat([piece.to(precise) for piece in pieces])
        _all_reduce(together)
        for piece, total in zip(pieces, torch.split(together, [len(piece) for piece in pieces]), strict=True):
            piece.copy_(total)
    for name, tensor in found.items():
        if summed[name] is not tensor:
            tensor.copy_(summed[name])
    return {name: found.get(name, total) for name, total in summed.items()}


def add_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients; a parameter without one anywhere keeps none."""
    if _size == 1:
        return
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for name, gradient in add(found, {name: p.detach() for name, p in parameters.items()}).items():
        parameters[name].grad = gradient


def _pieces(flat: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Views of flat tensors in groups of at most PIECE numbers, of one dtype on one device."""
    import torch

    group: list[Tensor] = []
    for tensor in flat:
        for piece in torch.split(tensor, PIECE):
            alike = not group or (group[0].dtype, group[0].device) == (piece.dtype, piece.device)
            if not alike or sum(map(len, group)) + len(piece) > PIECE:
                yield group
                group = []
            group.append(piece)
    if group:
        yield group


def _all_reduce(tensor: Tensor) -> None:
    from torch import distributed

    with _connected():
        distributed.all_reduce(tensor)


@contextmanager
def _connected() -> Iterator[None]:
    """Turn the ways in which a lost connection is told into one error."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "another process of this run has ended or cannot be reached; what it said is above, or it was killed. "
            f"Start the same again, `vkd run` with --resume ({first_line(error)})"
        ) from error


def _claimed(store: Any) -> bool:
    """Whether this process is the first that failed; not when nobody is left to ask."""
    try:
        return bool(store.add("vkd/failed", 1) == 1)
    except RuntimeError:
        return False
