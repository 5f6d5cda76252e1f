"""Which adapters are installed, and how one of them is found and loaded; what is not asked for is not imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from vkd_framework.errors import AdapterError, ModelError, with_its_kind
from vkd_framework.hookspecs import PROJECT
from vkd_framework.plugins.adapter import Adapter
from vkd_framework.recipe import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Installed:
    """An adapter as its distribution registers it; nothing of it has been imported."""

    name: str
    module: str
    distribution: str
    version: str
    rival: str | None = None
    """Another distribution that claims the same name."""

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def installed_adapters() -> list[Installed]:
    """All registered adapters, by name; a name claimed twice is an error only for whoever asks for it."""
    found: dict[str, Installed] = {}
    entries = importlib.metadata.entry_points(group=PROJECT)
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.dist.name if entry.dist else "")):
        distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        first = found.setdefault(entry.name, Installed(entry.name, entry.value, distribution, version))
        if first.distribution != distribution:
            found[entry.name] = replace(first, rival=distribution)
    return list(found.values())


def check_installed(name: str) -> Installed:
    """The adapter of that name, not imported. Raises AdapterError when there is none, or more than one."""
    known = {adapter.name: adapter for adapter in installed_adapters()}
    if name not in known:
        raise AdapterError(
            f"adapter {name!r} is not installed{nearest(name, known)}; "
            f"installed: {', '.join(known) or 'none'} (see `vkd adapters`)"
        )
    if rival := known[name].rival:
        raise AdapterError(
            f"adapter {name!r} is registered by both {known[name].distribution} and {rival}; uninstall one of them"
        )
    return known[name]


def load_adapter(name: str) -> Adapter:
    """The facade of one adapter. Raises AdapterError when it is unknown, does not import, or is no valid plugin."""
    found = check_installed(name)
    entry = next(iter(importlib.metadata.entry_points(group=PROJECT, name=name)))
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:
        raise AdapterError(
            f"adapter {found} does not import: {with_its_kind(error)}{_mend_of_import(error, found)}"
        ) from error
    return Adapter(name, plugin, found)


def working_adapters() -> tuple[dict[Installed, Adapter], list[str]]:
    """Every installed adapter that can be asked for its model types and presets, and what is wrong with the others."""
    working: dict[Installed, Adapter] = {}
    broken: list[str] = []
    for installed in installed_adapters():
        try:
            adapter = load_adapter(installed.name)
            _ = adapter.model_types, adapter.presets, adapter.refused_model_types
        except (AdapterError, ModelError) as error:
            broken.append(str(error))
        else:
            working[installed] = adapter
    return working, broken


def adapter_for_model_type(model_type: str) -> Adapter:
    """The one adapter that serves a `config.model_type`.

    Adapters that cannot be asked are passed over unless none fits. Raises AdapterError when none does, and when several
    do: no installed adapter, ours included, wins over another without being chosen.
    """
    working, broken = working_adapters()
    fitting = {installed: adapter for installed, adapter in working.items() if model_type in adapter.model_types}
    if fitting:
        return the_one(fitting, f"model type {model_type!r} is served")
    served = [each for adapter in working.values() for each in adapter.model_types]
    trouble = f"; these could not be asked: {'; '.join(broken)}" if broken else ""
    raise AdapterError(f"no installed adapter serves model type {model_type!r} (served: {', '.join(served)}){trouble}")


def the_one(claims: Mapping[Installed, T], claimed: str) -> T:
    """The only value; with several, AdapterError names who claims it and how to choose. `claimed` begins the sentence.

    Two names for the same module are one claim. Only for what the user can choose with `--adapter` or with a recipe.
    """
    if len({(installed.distribution, installed.module) for installed in claims}) > 1:
        names = " or ".join(installed.name for installed in claims)
        raise AdapterError(
            f"{claimed} by several adapters: {', '.join(str(installed) for installed in claims)}; choose one: "
            f"--adapter {names}, or `adapter:` in a recipe"
        )
    return next(iter(claims.values()))


def _mend_of_import(error: BaseException, installed: Installed) -> str:
    """What to do about an adapter that does not import: a missing package is not the adapter's own missing module."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"; mend or uninstall {installed.distribution}"
    own = installed.module.partition(":")[0]
    if f"{own}.".startswith(f"{error.name}."):
        return f"; its entry point names a module that is not there, so install {installed.distribution} again"
    return (
        f"; install the package that provides {error.name.partition('.')[0]!r}, or uninstall {installed.distribution}"
    )
