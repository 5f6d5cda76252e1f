"""What a check is, how it fails, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vkd_framework.errors import VKDError
from vkd_framework.progress import Progress


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
            found = f"raised {one_line(error)}"
            if found not in raised:
                results.append(CheckResult(check.name, False, statement, found, check.look))
            raised.setdefault(found, []).append(check.name)
        else:
            results.append(CheckResult(check.name, True, statement, "", check.look))
    return [_with_followers(result, raised.get(result.found, [])[1:]) for result in results]


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
    """The error's kind and message; those of vkd speak for themselves."""
    message = " ".join(str(error).split())
    return message if isinstance(error, VKDError) else f"{type(error).__name__}: {message}"
