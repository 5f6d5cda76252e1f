"""Progress: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from vkd_framework import ranks

T = TypeVar("T")
QUIET_SECONDS = 2.0
LINE_SECONDS = 15.0
LOG = logging.getLogger("vkd_framework")
LOG.setLevel(logging.INFO)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())


class Progress(Generic[T]):
    """Iterate over `items`, telling the user how far it is. `note` adds a word such as the current loss."""

    def __init__(self, items: Sequence[T], what: str) -> None:
        self._items, self._what = items, what
        self.note = ""

    def __iter__(self) -> Iterator[T]:
        if not ranks.is_main():
            return iter(self._items)
        return self._bar() if sys.stderr.isatty() else self._lines()

    def _bar(self) -> Iterator[T]:
        from tqdm import tqdm

        with tqdm(self._items, desc=self._what, delay=QUIET_SECONDS, leave=False, file=sys.stderr) as bar:
            for item in bar:
                bar.set_postfix_str(self.note, refresh=False)
                yield item

    def _lines(self) -> Iterator[T]:
        start = last = time.monotonic()
        for done, item in enumerate(self._items):
            now = time.monotonic()
            if done and now - last > LINE_SECONDS:
                last = now
                left = (now - start) / done * (len(self._items) - done)
                note = f", {self.note}" if self.note else ""
                say(f"  {self._what}: {done} of {len(self._items)}{note}, about {left:.0f} s left")
            yield item


def say(text: str) -> None:
    """A line about what is happening, on stderr (stdout is for results) and in the run's log.

    Of several processes, the first one says it.
    """
    if not ranks.is_main():
        return
    print(text, file=sys.stderr, flush=True)
    LOG.info(text)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Within the block, keep what is said in a file as well, with times; of several processes, the first one does."""
    if not ranks.is_main():
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()
