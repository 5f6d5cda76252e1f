"""Published benchmarks: where their files lie, how rows and photos are read, and what is told when something is wrong.

A benchmark is a folder as the hub holds it, or a dataset id of the hub, from which the needed files are fetched. A set
of rows is `NAME/*.parquet`, `NAME.parquet`, `NAME.json` or `NAME.jsonl`. Photos stay encoded until they are looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vkd_framework.answers import composed, normalise
from vkd_framework.data.jsonl import fault_report, placeholder_in
from vkd_framework.errors import DataError, first_line
from vkd_framework.progress import say
from vkd_framework.types import ImageQuestionPair, Photo

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_SUFFIXES = (".parquet", ".json", ".jsonl")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Benchmark:
    """The folder of a benchmark; `hub_id` is where it can be had."""

    folder: Path
    hub_id: str

    def rows(
        self, name: str, needed: Sequence[str], *, keep: Callable[[Row], bool] = lambda row: True
    ) -> list[tuple[str, Row]]:
        """The rows of the set `name`, each with its place for messages; only those that `keep` wants stay in memory."""
        found = []
        for number, row in enumerate(self._read(name), start=1):
            place = f"{name}:{number}"
            if not isinstance(row, Mapping):
                raise DataError(f"data.source: {place} in {self.folder} is not an object with keys and values")
            if missing := [key for key in needed if key not in row]:
                raise DataError(
                    f"data.source: {place} in {self.folder} has no {missing[0]!r}, only {', '.join(map(repr, row))}; "
                    f"get the files as they are published: {self.command}"
                )
            if keep(row):
                found.append((place, row))
        if not found:
            raise DataError(f"data.source: {name} in {self.folder} holds no rows that are needed; {self.command}")
        return found

    def json(self, name: str) -> Any:
        """The contents of one JSON file, or of one file of JSON lines."""
        path = self.folder / name
        if not path.is_file():
            raise self.absent(name)
        return _json(path)

    def absent(self, what: str) -> DataError:
        """What to say when a file of the benchmark is not there."""
        there = ", ".join(sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")))
        return DataError(
            f"data.source: {self.folder} has no {what}, only {there or 'nothing'}; get it with {self.command}"
        )

    @property
    def command(self) -> str:
        """The command that fetches the benchmark."""
        return download_command(self.hub_id)

    def _read(self, name: str) -> Iterator[Any]:
        patterns = [f"{name}{form}{suffix}" for form in ("/*", "") for suffix in _SUFFIXES]
        files = next((found for pattern in patterns if (found := sorted(self.folder.glob(pattern)))), [])
        if not files:
            raise self.absent(f"{name}/*.parquet (nor {name}.json, {name}.jsonl)")
        for file in files:
            if file.suffix == ".parquet":
                yield from _parquet(file)
            else:
                rows = _json(file)
                yield from rows if isinstance(rows, list) else [rows]


def download_command(hub_id: str) -> str:
    """How a user gets a dataset of the hub as a folder."""
    return f"`hf download --repo-type dataset {hub_id} --local-dir {hub_id.rpartition('/')[2]}`"


def on_hub(source: str) -> bool:
    """Whether a source is no folder here, but may be a dataset of the hub."""
    return not os.path.isdir(Path(source).expanduser()) and _HUB_ID.fullmatch(source) is not None


def open_benchmark(source: str, hub_id: str, sets: Sequence[str]) -> Benchmark:
    """The benchmark's folder: `source` itself, or where the hub's files of `sets` were put."""
    path = Path(source).expanduser()
    if os.path.isdir(path):
        return Benchmark(path, hub_id)
    if not on_hub(source):
        raise DataError(
            f"data.source: there is no folder {source}; get one with {download_command(hub_id)}, "
            f"or give the dataset id {hub_id}"
        )
    return Benchmark(_fetched(source, sets), source)


def _fetched(hub_id: str, sets: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    say(f"data: {hub_id} is taken from the hub, or from its cache")
    patterns = [pattern for name in sets for pattern in (f"{name}/*", f"{name}.*", name)]
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the network, the hub and the disk each have their own
        reason = type(error).__name__
        raise DataError(
            f"data.source: {hub_id} is no folder here and cannot be had from the hub ({reason}); with a network, get "
            f"it with {download_command(hub_id)}, then give that folder: --set data.source=FOLDER"
        ) from error


def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"data.source: reading {file} needs pyarrow; install it with `pip install pyarrow`") from None
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"data.source: {file} is no readable parquet file ({first_line(error)})") from None


def _json(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"data.source: {file} is neither JSON nor JSON lines ({first_line(error)})") from None


class Reader:
    """Turns published rows into pairs and remembers everything that is wrong with them.

    Photos are told apart by their content: the same picture in two sets is one photo with one key.
    """

    def __init__(self, title: str, folder: Path) -> None:
        self.title, self._folder = title, folder
        self._faults: list[str] = []
        self._photos: dict[str, Photo | None] = {}

    def fault(self, place: str, what: str) -> None:
        """Remember what is wrong with a row."""
        self._faults.append(f"{place}: {what}")

    def check(self, rows: int) -> None:
        """Raise DataError with every fault there was; at most twenty are listed."""
        if report := fault_report(self.title, self._faults, rows):
            raise DataError("\n".join(report))

    def photo(self, value: object, place: str) -> Photo | None:
        """The photo in a published cell: `{bytes, path}`, bytes, or a path below the folder; None if it is broken."""
        source = self._source(value)
        if source is None:
            self.fault(place, "image is missing")
            return None
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            self.fault(place, f"image {str(source)!r} cannot be read ({error.strerror})")
            return None
        key = hashlib.sha256(content).hexdigest()[:16]
        if key not in self._photos:
            photo = Photo(key, source)
            try:
                photo.open()
            except Exception as error:  # each format has its own
                self.fault(place, f"image cannot be read ({first_line(error)})")
                self._photos[key] = None
            else:
                self._photos[key] = photo
        return self._photos[key]

    def _source(self, value: object) -> Path | bytes | None:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        return self._folder / value if isinstance(value, str) and value else None

    def text(self, row: Row, key: str, place: str) -> str | None:
        """A text that a model may be shown; None if it is missing or broken."""
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            self.fault(place, f"{key} is {_shown(value)}, a text is needed")
            return None
        if token := placeholder_in(value):
            self.fault(place, f"{key} contains {token!r}, which only a model's processor may write")
            return None
        return composed(value.strip())

    def items(self, value: object, key: str, place: str) -> list[Row]:
        """A list of objects with keys; nothing where there is nothing, and where there is something else."""
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            return value
        if value is not None:
            self.fault(place, f"{key} is {_shown(value)}, a list of objects is needed")
        return []

    def texts(self, value: object) -> tuple[str, ...]:
        """One text or several, as they are published; nothing where there is nothing."""
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(dict.fromkeys(composed(text.strip()) for text in values if isinstance(text, str) and text.strip()))


def with_wrong(answer: str, wrong: Iterable[str], seed: str) -> tuple[str, ...]:
    """The options of a question: its answer among wrong ones, in a drawn order; none without a wrong one."""
    told = {normalise(answer): answer}
    for text in wrong:
        told.setdefault(normalise(text), text)
    options = list(told.values())
    random.Random(seed).shuffle(options)
    return tuple(options) if len(options) > 1 else ()


def columns_of(
    columns: Mapping[str, Sequence[ImageQuestionPair]], cap: int | None, seed: int
) -> dict[str, tuple[ImageQuestionPair, ...]]:
    """The columns that hold anything, each cut to `cap` questions that are spread evenly over the people."""
    found = {}
    for name, pairs in columns.items():
        chosen = spread(pairs, cap, f"{seed}/{name}") if cap else pairs
        if chosen:
            found[name] = tuple(replace(pair, id=f"{name}/{pair.id}") for pair in chosen)
    return found


def spread(pairs: Sequence[ImageQuestionPair], cap: int, seed: str) -> list[ImageQuestionPair]:
    """At most `cap` of `pairs`, about equally many of each person, in their old order."""
    piles: dict[str | None, list[int]] = defaultdict(list)
    for at, pair in enumerate(pairs):
        piles[pair.subject].append(at)
    for subject, pile in piles.items():
        random.Random(f"{seed}/{subject}").shuffle(pile)
    order = sorted((turn, seat, at) for seat, pile in enumerate(piles.values()) for turn, at in enumerate(pile))
    return [pairs[at] for at in sorted(at for _, _, at in order[:cap])]


def required(title: str, forget: Sequence[object], retain: Sequence[object], columns: Mapping[str, object]) -> None:
    """Raise DataError when nothing would be trained on, or a column is empty that every run needs."""
    empty = [name for name, pairs in (("forget", forget), ("retain", retain)) if not pairs]
    empty += [name for name in ("forget_vqa", "test_vqa", "retain_vqa") if name not in columns]
    if empty:
        raise DataError(f"{title}: nothing was found for {', '.join(empty)}; is the folder complete?")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
