"""`vkd bench` and `vkd compare`: what they do, write and print."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vkd_framework import methods
from vkd_framework.bench import estimates, export, page, records, terminal
from vkd_framework.bench.records import NAMING, Record
from vkd_framework.checkpoint import write_text
from vkd_framework.errors import RecipeError, VKDError
from vkd_framework.progress import say

FILES = {"json": "cells.json", "csv": "table.csv", "markdown": "table.md", "html": "table.html"}
"""Format -> its file in the folder of a bench."""
REASON = "; the reason is in .cells/{}.error in the folder of the bench"
"""What files say of a cell that failed: the reason itself may name a user's own people."""


def bench(
    recipes: Sequence[str],
    method_names: Sequence[str] | None,
    seeds: Sequence[int],
    overrides: Sequence[str],
    out: Path | None,
    targets: Mapping[str, Path | None],
    *,
    only_list: bool,
    echo: Callable[[str], None],
) -> bool:
    """Do all cells, or with `only_list` tell how far they are; returns whether one of them failed."""
    from vkd_framework.bench import cells as planned
    from vkd_framework.bench import loop

    folder = out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    cells = planned.plan(recipes, method_names, seeds, overrides, folder, say)
    if only_list:
        width = max(len(cell.name) for cell in cells)
        for cell in cells:
            status, reason = cell.status()
            echo(f"{cell.name:<{width}}  {status}{f': {reason}' if reason else ''}")
        return False
    planned.refuse_others(cells)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    say(f"{len(cells)} runs, {sum(cell.finished() for cell in cells)} of them done; results in {folder}")
    try:
        loop.work(cells)
    except KeyboardInterrupt:
        raise VKDError(f"stopped; the same command with --out {shlex.quote(str(folder))} goes on") from None
    found = [(cell, *cell.status()) for cell in cells]
    missing = {
        f"{cell.name}: {reason or status}": f"{cell.name}: {status}{REASON.format(cell.name) if reason else ''}"
        for cell, status, reason in found
        if not cell.finished()
    }
    done = [cell.record() for cell in cells if cell.finished()]
    used = list(dict.fromkeys(cell.method for cell in cells))
    command = ["vkd", "bench", *recipes, "--methods", ",".join(used), "--seeds", ",".join(map(str, seeds))]
    command += [part for override in overrides for part in ("--set", _without_names(override))]
    written = {form: [folder / name, *([path] if (path := targets.get(form)) else [])] for form, name in FILES.items()}
    echo(_show(done, written, command=shlex.join(command), left_out=missing))
    echo(f"\ntable: {folder / FILES['html']}, {folder / FILES['markdown']} and {folder / FILES['csv']}")
    return any(status == "failed" for _, status, _ in found)


def compare(places: Sequence[Path], targets: Mapping[str, Path | None]) -> str:
    """The table of finished runs, written to the files that were asked for too."""
    written = {form: [path] for form, path in targets.items() if path}
    command = shlex.join(["vkd", "compare", *map(str, places)])
    return _show(records.find(places), written, command=command, left_out={})


def _without_names(override: str) -> str:
    """The override as a table may show it: a user's own people and files stay out, how many are forgotten does not."""
    key, _, value = override.partition("=")
    section, *inside = key.strip().split(".")
    names = section == "data" and (not inside or inside[0] in NAMING)
    counts = inside == ["forget"] and value.strip().isdecimal()
    return f"{key}=..." if names and not counts else override


def _show(
    found: Sequence[Record], targets: Mapping[str, Sequence[Path]], *, command: str, left_out: Mapping[str, str]
) -> str:
    """Write the comparison; returns it for the terminal. Runs with a failed proof are named, and enter no table.

    `left_out`: what the terminal says of a run that is not there -> what the files say. Without any run, a file that is
    there already stays as it is.
    """
    sound = [record for record in found if not record.failed_proofs]
    broken = [
        f"{record.folder.name}: proof failed: {', '.join(record.failed_proofs)}"
        for record in found
        if record.failed_proofs
    ]
    failures = [*left_out.values(), *broken]
    groups = records.gather(sound, list(methods.METHODS))
    comparisons = [estimates.compare(group) for group in groups]
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: export.json_text(sound),
        "csv": lambda: export.csv_text(comparisons),
        "markdown": lambda: export.markdown(comparisons, methods.DEFAULT, command=command, failures=failures),
        "html": lambda: page.render(comparisons, methods.DEFAULT, command=command, failures=failures),
    }
    kept = [path for paths in targets.values() for path in paths if not sound and path.exists()]
    for form, paths in targets.items():
        for path in paths:
            if path in kept:
                continue
            try:
                write_text(path, writers[form]())
            except OSError as error:
                raise RecipeError(f"{path}: cannot be written ({error.strerror}); give another file") from error
    parts = [terminal.table(comparisons, methods.DEFAULT)] if comparisons else []
    parts += ["\n".join(f"left out: {failure}" for failure in (*left_out, *broken))] if failures else []
    parts += [f"no run to write; left as they were: {', '.join(map(str, kept))}"] if kept else []
    return "\n\n".join(parts) or "nothing to show yet"
