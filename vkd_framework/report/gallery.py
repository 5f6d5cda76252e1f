"""Which answers the report shows: a handful for each forgotten person, a few of everybody else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from vkd_framework.answers import is_right
from vkd_framework.report.table import column_of
from vkd_framework.types import Photo, Sample

FORGOTTEN_COLUMNS = frozenset({"forget_vqa", "test_vqa", "forget_qa", "forget_visible_vqa"})
PEOPLE_SHOWN = 12
ANSWERS_PER_PERSON = 4
OTHER_ANSWERS_SHOWN = 6
EMPTY = "(empty answer)"


@dataclass(frozen=True, eq=False)
class Answer:
    """One sample, judged."""

    sample: Sample

    @property
    def column(self) -> str:
        """The column's name for people."""
        return column_of(self.sample.column).label

    @property
    def photos(self) -> tuple[Photo, ...]:
        """The photos that were asked about; none for a text-only question."""
        return self.sample.pair.photos

    @property
    def before(self) -> str:
        """What the vanilla model answered."""
        return self.sample.before.strip() or EMPTY

    @property
    def after(self) -> str:
        """What the unlearned model answered."""
        return self.sample.after.strip() or EMPTY

    @property
    def before_verdict(self) -> str:
        """`right` or `wrong`."""
        return _verdict(self.sample, self.sample.before)

    @property
    def after_verdict(self) -> str:
        """`right` or `wrong`."""
        return _verdict(self.sample, self.sample.after)


@dataclass(frozen=True, eq=False)
class Person:
    """A person with the answers that are shown about them."""

    name: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, eq=False)
class Gallery:
    """The answers that are shown; `left_out` forgotten people have samples and are not."""

    forgotten: tuple[Person, ...]
    others: tuple[Person, ...]
    left_out: int = 0


def build_gallery(samples: Sequence[Sample]) -> Gallery:
    """Group the samples by person and keep a handful of each, spread over the columns."""
    forgotten = _by_subject(sample for sample in samples if sample.column in FORGOTTEN_COLUMNS)
    others = _by_subject(sample for sample in samples if sample.column not in FORGOTTEN_COLUMNS)
    people = [_person(name, group, ANSWERS_PER_PERSON) for name, group in forgotten.items()]
    per_other = max(1, OTHER_ANSWERS_SHOWN // max(1, len(others)))
    return Gallery(
        tuple(people[:PEOPLE_SHOWN]),
        tuple(_person(name, group, per_other) for name, group in list(others.items())[:OTHER_ANSWERS_SHOWN]),
        max(0, len(people) - PEOPLE_SHOWN),
    )


def _by_subject(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.pair.subject or "No name given", []).append(sample)
    return groups


def _person(name: str, samples: Sequence[Sample], limit: int) -> Person:
    columns: dict[str, list[Sample]] = {}
    for sample in samples:
        columns.setdefault(sample.column, []).append(sample)
    spread = [sample for sample in chain.from_iterable(zip_longest(*columns.values())) if sample is not None]
    shown = set(map(id, spread[:limit]))
    return Person(name, tuple(Answer(sample) for sample in samples if id(sample) in shown))


def _verdict(sample: Sample, given: str) -> str:
    return "right" if is_right(sample.pair, given) else "wrong"
