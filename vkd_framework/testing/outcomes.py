"""What a check is, how it fails, and what came of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vkd_framework.errors import VKDError, on_one_line
from vkd_framework.progress import Progress

LONGEST = 400
"""Characters of a foreign error's message that are shown."""


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome. `look`: which hook to mend, where it is described, which generic function may help."""

    name: str
    ok: bool
    expected: str
    found: str
    look: str


class Wrong(Exception):
    """Raised by a check that does not hold."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Check:
    """A statement about an adapter, its test, and where to look when it does not hold."""

    run: Callable[[Any], None]
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
            check.run(subject)
        except Wrong as wrong:
            results.append(CheckResult(check.name, False, wrong.expected, wrong.found, check.look))
        except Exception as error:
            told = one_line(error)
            if told not in raised:
                results.append(CheckResult(check.name, False, statement, f"raised {told}{place(error)}", check.look))
            raised.setdefault(told, []).append(check.name)
        else:
            results.append(CheckResult(check.name, True, statement, "", check.look))
    followers = {names[0]: names[1:] for names in raised.values()}
    return [_with_followers(result, followers.get(result.name, [])) for result in results]


def _with_followers(result: CheckResult, followers: Sequence[str]) -> CheckResult:
    if not followers:
        return result
    return replace(result, look=f"{result.look}; {len(followers)} further checks stopped at the same error")


def _statement(check: Check) -> str:
    return (check.run.__doc__ or "").strip().splitlines()[0].rstrip(".")


def table(results: Sequence[CheckResult], total: int | None = None) -> str:
    """A line a check, three more below each one that failed, and a count; `total` where only failures are given."""
    lines = []
    for result in results:
        lines.append(f"{'ok  ' if result.ok else 'FAIL'}  {result.name}")
        if not result.ok:
            lines += [f"      {what:<9} {getattr(result, what)}" for what in ("expected", "found", "look")]
    failed = sum(not result.ok for result in results)
    count = len(results) if total is None else total
    return "\n".join([*lines, f"{count} checks, {f'{failed} failed' if failed else 'all hold'}"])


def one_line(error: BaseException) -> str:
    """The error's kind and message, long ones without their middle; those of vkd speak for themselves."""
    message = on_one_line(error)
    if isinstance(error, VKDError):
        return message
    if len(message) > LONGEST:  # some hold a whole model's modules, and say what is wrong at the end
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return f"{type(error).__name__}: {message}"


def place(error: BaseException) -> str:
    """Where a foreign error came up, ` (processing_x.py:12, __call__)`; nothing for what vkd itself raised.

    The innermost place in a family's own code where there is one, because what lies below serves every family.
    """
    origin = error.__cause__ if isinstance(error, VKDError) else error
    frames = traceback.extract_tb(origin.__traceback__) if origin is not None else []
    if not frames:
        return ""
    family = [frame for frame in frames if "transformers/models/" in Path(frame.filename).as_posix()]
    frame = (family or frames)[-1]
    return f" ({Path(frame.filename).name}:{frame.lineno}, {frame.name})"
