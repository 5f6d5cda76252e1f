"""Finished runs, and runs that are alike but for their seed put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from vkd_framework.checkpoint import EVALUATED, RELEARNED, read_json
from vkd_framework.errors import RecipeError, on_one_line
from vkd_framework.recipe import Recipe, Section, digest
from vkd_framework.report.findings import proof_rows
from vkd_framework.report.formatting import flatten
from vkd_framework.verdict import verdict

METRICS = "metrics.json"
SHARED_KEYS = ("recipe", "method", "seed", "models", "relearn", "cost")
"""What of `metrics.json` goes into the JSON file of a comparison."""
WHERE_KNOWN = ("train", "attacks", "over_forgotten", "proofs", "verdict")
"""What goes there too where the run has it."""
SETTINGS = "settings"
"""And the settings, under this key, so that the file can be compared again."""
IDENTITY = ("name", "description", "method", "seed")
NAMING = ("forget", "rows", "images")
"""What names a user's own people and files in `data`. A table tells such settings apart and does not tell them."""
STARTING = ("data", "model", "teach", "evaluate")
"""Sections that decide what a run's starting model and its retain-only model answer, whatever the method and seed."""
MAPPINGS = ("teach.shares", "unlearn.retain_shares")
"""Settings with keys of the user's choice: one that a run leaves out is a choice, and no key of a later version."""


@dataclass(frozen=True)
class Record:
    """A finished run: its `metrics.json`, and the settings of its recipe but for name, method and seed.

    A run from the JSON file of a comparison has that file for its folder's parent.
    """

    folder: Path
    metrics: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return str(self.metrics.get("recipe"))

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.metrics.get("method"))

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.metrics.get("seed", 0))

    @cached_property
    def failed_proofs(self) -> tuple[str, ...]:
        """Proofs that do not hold; such a result must not be used."""
        return tuple(proof.title for proof in proof_rows(self.metrics) if proof.status == "FAILED")

    def shared(self) -> dict[str, Any]:
        """The run as an entry of the JSON file."""
        further = {key: self.metrics[key] for key in WHERE_KNOWN if key in self.metrics}
        return {key: self.metrics.get(key) for key in SHARED_KEYS} | further | {SETTINGS: dict(self.settings)}


@dataclass(frozen=True)
class Row:
    """Runs of one recipe and method that differ in their seed only. `variant` says what else sets them apart."""

    method: str
    variant: str
    records: tuple[Record, ...]

    @property
    def label(self) -> str:
        """The method's name, with what sets it apart from other rows of the same method."""
        return labelled(self.method, self.variant)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, sorted."""
        return tuple(sorted(record.seed for record in self.records))


@dataclass(frozen=True)
class Group:
    """Everything that was run of one recipe."""

    recipe: str
    rows: tuple[Row, ...]


def labelled(name: str, variant: str) -> str:
    """A name with what sets it apart."""
    return f"{name} ({variant})" if variant else name


def read(folder: Path) -> Record:
    """A finished run, or what was measured of a checkpoint. Raises RecipeError when there is none in the folder."""
    if not (folder / METRICS).exists() and (folder / EVALUATED).exists():
        return _assessed(folder)
    if not (folder / METRICS).exists():
        raise RecipeError(f"{folder}: {_lacking(folder)}")
    metrics = _json(folder / METRICS)
    if not _are_metrics(metrics):
        raise RecipeError(f"{folder / METRICS}: is not the metrics of a run; give folders that `vkd run` has made")
    return Record(folder, metrics, _settings(folder))


def _assessed(folder: Path) -> Record:
    """What `vkd evaluate` wrote, and `vkd relearn` where it was run too. The folder's name takes the method's place."""
    recipe = _resolved(folder)
    named = {"recipe": recipe.get("name"), "method": folder.resolve().name, "seed": recipe.get("seed", 0)}
    files = [EVALUATED, *([RELEARNED] if (folder / RELEARNED).exists() else [])]
    found = [_json(folder / file) for file in files]
    if not (recipe and all(isinstance(one, dict) for one in found) and _are_metrics(named | found[0])):
        raise RecipeError(f"{folder}: no {' and '.join(files)} as `vkd evaluate --out` writes them; make them anew")
    metrics = named | found[0] | ({"relearn": found[1]} if len(found) > 1 else {})
    if "verdict" in metrics:
        metrics["verdict"] = asdict(verdict(metrics))
    return Record(folder, metrics, _settings(folder))


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read ({on_one_line(error)})") from None


def _lacking(folder: Path) -> str:
    """Why a folder holds nothing to compare."""
    if not folder.exists():
        return "there is no such file or folder"
    if (folder / RELEARNED).exists():
        return f"holds {RELEARNED} alone; add the answers: vkd evaluate MODEL --recipe RECIPE --out {folder}"
    if (folder / "recipe.yaml").exists():
        return f"holds no finished run (no {METRICS}); go on with it: vkd run RECIPE --resume --out {folder}"
    return (
        "holds no finished run and no folder with one; give what `vkd run`, `vkd bench` or `vkd evaluate --out` wrote"
    )


def read_file(file: Path) -> list[Record]:
    """The runs in the JSON file of a comparison. Raises RecipeError for anything else."""
    entries = _json(file)
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise RecipeError(
            f"{file}: is no list of runs; give a file that `vkd bench --json` or `vkd compare --json` wrote"
        )
    return [
        Record(
            file / f"{entry['recipe']}-{entry['method']}-{entry['seed']}", entry, _completed(entry.get(SETTINGS, {}))
        )
        for entry in entries
    ]


def find(places: Iterable[Path]) -> list[Record]:
    """The finished runs in `places`: a run folder, a folder of them, or the JSON file of a comparison.

    The folder of a measured checkpoint is like that of a run.

    Raises RecipeError for a place without any.
    """
    folders: dict[Path, Path] = {}
    told: dict[Path, list[Record]] = {}
    for place in places:
        if place.is_file():
            told.setdefault(place.resolve(), read_file(place))
            continue
        inside = [] if _is_one(place) else [path for path in sorted(place.glob("*")) if _is_one(path)]
        for folder in inside or [place]:
            folders.setdefault(folder.resolve(), folder)
    return [*(record for records in told.values() for record in records), *map(read, folders.values())]


def _is_one(folder: Path) -> bool:
    return (folder / METRICS).exists() or (folder / EVALUATED).exists()


def _are_metrics(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("models"), dict) and "method" in found


def _is_entry(found: object) -> bool:
    return (
        isinstance(found, dict)
        and _are_metrics(found)
        and isinstance(found.get("recipe"), str)
        and isinstance(found.get("seed"), int)
        and isinstance(found.get(SETTINGS, {}), dict)
    )


def gather(records: Sequence[Record], order: Sequence[str] = ()) -> list[Group]:
    """Group and rows, recipes and methods in the order of `order` or else as they come.

    Runs of one method whose recipes differ become rows of their own. Raises RecipeError when two runs are the same.
    """
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(record.recipe, {}).setdefault(record.method, []).append(record)
    rank = {method: index for index, method in enumerate(order)}
    return [
        Group(
            recipe,
            tuple(
                row
                for method in sorted(found, key=lambda method: rank.get(method, len(rank)))
                for row in _rows(method, found[method])
            ),
        )
        for recipe, found in groups.items()
    ]


def _rows(method: str, records: Sequence[Record]) -> list[Row]:
    rows: dict[str, dict[int, Record]] = {}
    for record, variant in zip(records, _variants(records), strict=True):
        same = rows.setdefault(variant, {})
        if record.seed in same:
            raise RecipeError(
                f"{same[record.seed].folder} and {record.folder}: both are {method} with seed {record.seed} and the "
                "same settings; give one of them"
            )
        same[record.seed] = record
    usual_first = sorted(rows.items(), key=lambda row: row[0] != "")
    return [Row(method, variant, tuple(same[seed] for seed in sorted(same))) for variant, same in usual_first]


def starts(rows: Sequence[Row]) -> list[str]:
    """For each row what sets its starting model and data apart from those of most runs."""
    variants = iter(_variants([record for row in rows for record in row.records], STARTING))
    found = [[next(variants) for _ in row.records] for row in rows]
    return [next(filter(None, own), "") for own in found]


def _variants(records: Sequence[Record], sections: Sequence[str] | None = None) -> list[str]:
    """For each run what sets it apart, as `key=value`: settings that not all runs share, and not most of them either.

    A key that a run does not have sets none apart. With `sections`, only settings of these do.
    """
    every = _comparable([record.settings for record in records])
    known = [settings for settings in every if settings]
    keys = [
        key
        for key in (known[0] if known else ())
        if all(key in settings for settings in known) and (sections is None or key.partition(".")[0] in sections)
    ]
    usual = {}
    for key in keys:
        value, count = Counter(settings[key] for settings in known).most_common(1)[0]
        if 2 * count > len(known):
            usual[key] = value
    return [
        ", ".join(f"{key}={settings[key]}" for key in keys if settings[key] != usual.get(key)) if settings else ""
        for settings in every
    ]


def _comparable(every: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The settings of runs, with one value for a mapping of the user's and for a section that another run has not."""
    keys = {key for settings in every for key in settings}
    nulls = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    found = list(every)
    for parent in sorted({*MAPPINGS, *nulls}, key=lambda key: -key.count(".")):
        inside = [{key for key in settings if key.startswith(f"{parent}.")} for settings in found]
        having = [own for own in inside if own]
        counted = set().union(*having) if parent in MAPPINGS else set.intersection(*having)
        found = [_folded(settings, parent, own, counted) for settings, own in zip(found, inside, strict=True)]
    return found


def _folded(settings: Mapping[str, str], parent: str, inside: set[str], counted: set[str]) -> Mapping[str, str]:
    """`settings` with the keys `inside` the parent as one value, which tells those that are `counted`."""
    told = ", ".join(f"{key.removeprefix(f'{parent}.')}: {settings[key]}" for key in sorted(inside & counted))
    folded: dict[str, str] = {}
    for key, value in settings.items():
        folded[parent if key in inside else key] = f"{{{told}}}" if key in inside else value
    return folded


def _settings(folder: Path) -> dict[str, str]:
    filled = _filled(_resolved(folder))
    data = filled.get("data")
    if isinstance(data, Mapping) and data.get("kind") == "jsonl":
        named = {key: f"#{digest(value)[:6]}" for key in NAMING if (value := data.get(key)) is not None}
        filled["data"] = {**data, **named}
    return dict(flatten({key: value for key, value in filled.items() if key not in IDENTITY}))


def _completed(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of an entry with those that its version did not have yet, at the values that change nothing."""
    found = dict(settings)
    for name, field_ in Recipe.model_fields.items():
        if _is_section(field_.annotation) and any(key.startswith(f"{name}.") for key in settings):
            inside = field_.annotation.model_fields.items()
            defaults = {
                key: each.get_default(call_default_factory=True) for key, each in inside if not each.is_required()
            }
            for key, value in flatten({name: to_jsonable_python(defaults)}):
                if not any(other.startswith(f"{key}.") for other in settings):
                    found.setdefault(key, value)
    return found


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _resolved(folder: Path) -> dict[str, Any]:
    """The recipe that lies beside the figures; nothing where none can be read."""
    try:
        raw = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _filled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recipe with the keys that its version did not have yet, at the values that change nothing.

    Section by section: a whole recipe would take what its method has today.
    """
    found = dict(raw)
    for name, field_ in Recipe.model_fields.items():
        kind = field_.annotation
        if _is_section(kind) and isinstance(raw.get(name), Mapping):
            with suppress(ValidationError):  # of another version
                found[name] = kind.model_validate(raw[name]).model_dump(mode="json")
    return found
