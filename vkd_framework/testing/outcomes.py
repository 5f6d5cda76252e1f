"""What a check is, how it fails, and what came of it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vkd_framework import hookspecs
from vkd_framework.errors import VKDError, on_one_line
from vkd_framework.progress import Progress

LONGEST = 400
"""Characters of a foreign error's message that are shown."""

OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome. `look`: which hook to mend, where it is described, which generic function may help.

    `found`: what is wrong, or what a check that holds could not look at. `also`: further checks that stopped at the
    same error and have no outcome of their own.
    """

    name: str
    ok: bool
    expected: str
    found: str
    look: str
    also: tuple[str, ...] = ()


class Wrong(Exception):
    """Raised by a check that does not hold."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Check:
    """A statement about an adapter, its test, and where to look when it does not hold.

    `run` raises when it does not hold, and may return what it could not look at.
    """

    run: Callable[[Any], str | None]
    look: str

    @property
    def name(self) -> str:
        """The function's name as a slug."""
        return self.run.__name__.replace("_", "-")


def run_checks(checks: Sequence[Check], subject: Any, what: str) -> list[CheckResult]:
    """A result for each check, but one for all that stop at the same error; `what`: their subject, for the progress."""
    results: list[CheckResult] = []
    raised: dict[str, list[str]] = {}
    for check in Progress(checks, f"check {what}"):
        statement = _statement(check)
        try:
            left_out = check.run(subject)
        except Wrong as wrong:
            results.append(CheckResult(check.name, False, wrong.expected, wrong.found, check.look))
        except Exception as error:
            told = one_line(error)
            if told not in raised:
                found = f"raised {told}{place(error)}"
                results.append(CheckResult(check.name, False, statement, found, look_at(error, check.look, checks)))
            raised.setdefault(told, []).append(check.name)
        else:
            results.append(CheckResult(check.name, True, statement, left_out or "", check.look))
    followers = {names[0]: names[1:] for names in raised.values()}
    return [_with_followers(result, followers.get(result.name, [])) for result in results]


def look_at(error: BaseException, look: str, checks: Sequence[Check]) -> str:
    """Where to look for an error: at the hook that it names, in the words of a check of that hook; else `look`."""
    named = next((name for name in re.findall(r"vkd_\w+", str(error)) if hasattr(hookspecs, name)), None)
    if named is None or look.startswith(f"{named} "):
        return look
    return next((c.look for c in checks if c.look.startswith(f"{named} ")), f"{named} (docs/hooks.md)")


def _with_followers(result: CheckResult, followers: Sequence[str]) -> CheckResult:
    if not followers:
        return result
    look = f"{result.look}; {len(followers)} further checks stopped at the same error"
    return replace(result, look=look, also=tuple(followers))


def _statement(check: Check) -> str:
    return (check.run.__doc__ or "").strip().splitlines()[0].rstrip(".")


def count(results: Iterable[CheckResult]) -> int:
    """How many checks the results tell of, with those that stopped at another's error."""
    return sum(1 + len(result.also) for result in results)


def table(results: Sequence[CheckResult], total: int | None = None) -> str:
    """A line a check, three more below each one that failed, and a count; `total` where only failures are given."""
    lines = []
    for result in results:
        left_out = f" ({result.found})" if result.ok and result.found else ""
        lines.append(f"{'ok  ' if result.ok else 'FAIL'}  {result.name}{left_out}")
        if not result.ok:
            lines += [f"      {what:<9} {getattr(result, what)}" for what in ("expected", "found", "look")]
    failed = count(result for result in results if not result.ok)
    number = count(results) if total is None else total
    return "\n".join([*lines, f"{number} checks, {f'{failed} failed' if failed else 'all hold'}"])


def one_line(error: BaseException) -> str:
    """The error's kind and message, long ones without their middle; those of vkd speak for themselves."""
    message = on_one_line(error)
    if isinstance(error, VKDError):
        return message
    if len(message) > LONGEST:  # some hold a whole model's modules, and say what is wrong at the end
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return f"{type(error).__name__}: {message}"


def place(error: BaseException) -> str:
    """What an error came up with, ` with 'tiny' 8x8 alone` (its notes), and where a foreign one came up.

    ` (my_family.py:40, vkd_tokenize_pairs; processing_x.py:12, __call__)`: the innermost place in the adapter, then the
    innermost in transformers' code of the family, because what lies below serves every family. Without either, the
    innermost of all; nothing for what vkd itself raised.
    """
    with_what = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    origin = error.__cause__ if isinstance(error, VKDError) else error
    frames = traceback.extract_tb(origin.__traceback__) if origin is not None else []
    family = [frame for frame in frames if "transformers/models/" in Path(frame.filename).as_posix()]
    innermost = [found[-1] for found in (_of_the_adapter(frames), family) if found] or frames[-1:]
    places = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}, {frame.name}" for frame in innermost)
    return with_what + (f" ({places})" if places else "")


def _of_the_adapter(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Frames in the file of the hook that pluggy called; none where that is a hook of our own."""
    asked = [after for before, after in pairwise(frames) if Path(before.filename).parent.name == "pluggy"]
    if not asked or OURS in Path(asked[-1].filename).parents:
        return []
    return [frame for frame in frames if frame.filename == asked[-1].filename]
