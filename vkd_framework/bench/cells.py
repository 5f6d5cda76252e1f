"""The cells of a bench: recipe x method x seed, checked before anything runs, and how far each of them is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from vkd_framework import methods
from vkd_framework.bench.records import METRICS, Record, read
from vkd_framework.errors import RecipeError
from vkd_framework.recipe import nearest, overrides_without_effect
from vkd_framework.run import checked, recipe_of

CHOSEN = {"method": "--methods", "seed": "--seeds"}
"""Settings that a bench varies itself -> the option that says how."""

Status = Literal["done", "of other settings", "running", "failed", "interrupted", "to do"]


@dataclass(frozen=True)
class Cell:
    """One run of the bench; `digest` is that of its resolved recipe."""

    reference: str
    overrides: tuple[str, ...]
    recipe: str
    method: str
    seed: int
    digest: str
    out: Path

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        return f"{self.recipe}-{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.out / self.name

    @property
    def lock(self) -> Path:
        """Held by whoever is doing the cell."""
        return self.out / ".cells" / f"{self.name}.lock"

    @property
    def error(self) -> Path:
        """Why it failed when it was last tried; the file is gone when it is tried again."""
        return self.out / ".cells" / f"{self.name}.error"

    def finished(self) -> bool:
        """Whether the run is whole: its last file is the model card."""
        card = self.folder / "model" / "README.md"
        return (self.folder / METRICS).exists() and card.exists() and recipe_of(self.folder) == self.digest

    def of_other_settings(self) -> bool:
        """Whether its folder holds a run, finished or not, that was made with another recipe or other settings."""
        return recipe_of(self.folder) not in (None, self.digest)

    def record(self) -> Record:
        """The finished run."""
        return read(self.folder)

    def status(self) -> tuple[Status, str]:
        """How far it is, with the reason of a failure."""
        if self.finished():
            failed = self.record().failed_proofs
            return ("failed", f"proof failed: {', '.join(failed)}") if failed else ("done", "")
        if self.of_other_settings():
            return "of other settings", ""
        if self._taken():
            return "running", ""
        if self.error.exists():
            return "failed", self.error.read_text(encoding="utf-8").strip()
        return ("interrupted" if self.folder.exists() else "to do"), ""

    def _taken(self) -> bool:
        if not self.lock.exists():
            return False
        try:
            with FileLock(self.lock, timeout=0):
                return False
        except Timeout:
            return True


def plan(
    references: Sequence[str],
    method_names: Sequence[str] | None,
    seeds: Sequence[int],
    overrides: Sequence[str],
    out: Path,
    say: Callable[[str], None],
) -> list[Cell]:
    """Every cell, seed by seed, so that all methods can be compared early. Raises RecipeError before anything runs.

    Without `method_names`, all methods that the recipe can be run with; those that it cannot are said and left out. An
    override that a method does not read is left out of its cells, and refused when no method reads it.
    """
    for override in overrides:
        if option := CHOSEN.get(override.partition("=")[0].strip()):
            raise RecipeError(f"--set {override}: a bench varies this itself; use {option}")
    for name in method_names or ():
        if name not in methods.METHODS:
            known = f"there are {', '.join(methods.METHODS)}"
            raise RecipeError(f"--methods {name}: there is no such method{nearest(name, methods.METHODS)}; {known}")
    names: dict[str, str] = {}
    chosen: list[tuple[str, str, tuple[str, ...]]] = []
    for reference in references:
        fitting = _fitting(reference, method_names, tuple(overrides), say)
        chosen += [(reference, method, read) for method, read in fitting.items()]
        method, read = next(iter(fitting.items()))
        name = checked(reference, _settings(method, 0, read))[0].name
        if name in names:
            raise RecipeError(f"{names[name]} and {reference}: both recipes are called {name!r}; rename one of them")
        names[name] = reference
    cells = []
    for seed in dict.fromkeys(seeds):
        for reference, method, read in chosen:
            settings = _settings(method, seed, read)
            recipe, _ = checked(reference, settings)
            cells.append(Cell(reference, settings, recipe.name, method, seed, recipe.digest(), out))
    return cells


def refuse_others(cells: Sequence[Cell]) -> None:
    """Raise RecipeError where cells have runs of other settings in their place."""
    if others := [cell for cell in cells if cell.of_other_settings()]:
        more = f", like {len(others) - 1} more of the {len(cells)} cells" if others[1:] else ""
        raise RecipeError(
            f"{others[0].folder}: holds a run of other settings{more}; go on with the recipe and the --set that made "
            "it, or give another --out"
        )


def _settings(method: str, seed: int, overrides: Sequence[str]) -> tuple[str, ...]:
    return (f"method={method}", f"seed={seed}", *overrides)


def _fitting(
    reference: str, method_names: Sequence[str] | None, overrides: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, tuple[str, ...]]:
    """Method -> the overrides that it reads."""
    unread: dict[str, dict[str, str]] = {}
    errors = []
    for method in method_names or methods.METHODS:
        try:
            unread[method] = overrides_without_effect(reference, _settings(method, 0, overrides))
            if method_names is None:
                checked(reference, _settings(method, 0, _others(overrides, unread[method])))
        except RecipeError as error:
            if method_names is not None:
                raise
            unread.pop(method, None)
            errors.append((method, error))
    if not unread:
        raise errors[0][1]
    for override in overrides:
        if all(override in found for found in unread.values()):
            raise RecipeError(f"--set {override}: {next(iter(unread.values()))[override]}")
    for method, reason in errors:
        say(f"method {method} is left out: {reason}")
    for method, found in unread.items():
        for override in found:
            say(f"method {method} does not read --set {override}, and does without it")
    return {method: _others(overrides, found) for method, found in unread.items()}


def _others(overrides: Sequence[str], unread: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(override for override in overrides if override not in unread)
