"""Do the cells, each an ordinary run in a process of its own: what one takes or breaks is nothing to the others.

Several benches may work on the same folder: a cell that another one holds is passed over.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Literal

from filelock import FileLock, Timeout

from vkd_framework import run as runs
from vkd_framework.bench.cells import Cell
from vkd_framework.checkpoint import write_text
from vkd_framework.errors import VKDError, on_one_line
from vkd_framework.progress import say

PRELOADED = [__name__, "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"]
Outcome = Literal["done", "failed", "busy", "stopped"]


def work(cells: Sequence[Cell]) -> None:
    """Do what is to be done, and go round again for cells that were held by somebody else, while there is progress."""
    waiting = list(cells)
    while True:
        busy = []
        for cell in waiting:
            if cell.finished():
                continue
            say(f"[{cells.index(cell) + 1} of {len(cells)}] {cell.name}")
            outcome, reason = _in_a_process(cell)
            if outcome == "stopped":
                raise KeyboardInterrupt
            if outcome == "busy":
                say(f"{cell.name}: is being done by another process; passed over")
                busy.append(cell)
            elif outcome == "failed":
                say(f"{cell.name} failed: {reason}")
        if not busy or len(busy) == len(waiting):
            return
        waiting = busy


def _in_a_process(cell: Cell) -> tuple[Outcome, str]:
    # A fork server imports what all need once, and each cell starts from there with memory and a peak of its own.
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = (
        multiprocessing.get_context("forkserver") if sys.platform == "linux" else multiprocessing.get_context("spawn")
    )
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(cell, dict(os.environ), sender), name=cell.name)
    process.start()
    sender.close()
    try:
        outcome: tuple[Outcome, str] = receiver.recv()
    except EOFError:
        process.join()
        outcome = "failed", _ended(process.exitcode)
        write_text(cell.error, outcome[1])
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    process.join()
    return outcome


def _child(cell: Cell, environment: Mapping[str, str], sender: Connection) -> None:
    """Do one cell. The lock is held by the process that writes, and goes with it however it ends."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cell.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cell.lock, timeout=1):  # `--list` tries it for a moment
            sender.send(_do(cell))
    except Timeout:
        sender.send(("busy", ""))
    except KeyboardInterrupt:
        sender.send(("stopped", ""))


def _do(cell: Cell) -> tuple[Outcome, str]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cell.error.unlink(missing_ok=True)
    if cell.finished():
        return "done", ""
    try:
        runs.run(cell.reference, cell.overrides, out=cell.folder, resume=True)
    except VKDError as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {on_one_line(error)}"
    else:
        return "done", ""
    write_text(cell.error, f"{reason}\n")
    return "failed", reason


def _end_with_parent() -> None:
    """Leave when the bench is killed, so that no cell goes on that nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by signal {-code}; when memory ran out, ask for smaller batches"
    return f"its process ended with status {code}"
