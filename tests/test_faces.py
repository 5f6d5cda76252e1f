from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from vkd_framework.data import faces

SIZE = 48
STRIKING = ("hair_style", "hair_colour", "skin", "glasses", "beard", "clothes_colour", "shape")


def pixels(face: faces.Face, take: int, size: int = SIZE) -> np.ndarray:
    return np.asarray(faces.draw(face, random.Random(f"take {take}"), size), dtype=int)


def changed(one: np.ndarray, other: np.ndarray, by: int) -> int:
    """How many pixels differ clearly."""
    return int((np.abs(one - other).max(axis=-1) >= by).sum())


def test_the_same_take_of_the_same_face_is_the_same_picture() -> None:
    face = faces.random_face(random.Random(1))
    assert np.array_equal(pixels(face, 0), pixels(face, 0))


def test_two_takes_of_the_same_face_differ() -> None:
    face = faces.random_face(random.Random(1))
    assert changed(pixels(face, 0), pixels(face, 1), by=20) > SIZE * SIZE // 4


def test_no_two_people_share_all_striking_traits() -> None:
    cast = faces.cast("crowd", 64)
    assert len({tuple(getattr(face, trait) for trait in STRIKING) for face in cast}) == 64


def test_people_of_a_cast_look_more_different_than_people_drawn_at_random() -> None:
    def nearest(people: list[faces.Face]) -> float:
        return min(faces.distance(one, other) for one, other in combinations(people, 2))

    rng = random.Random(0)
    assert nearest(faces.cast("apart", 32)) > nearest([faces.random_face(rng) for _ in range(32)])


def test_a_small_cast_is_the_beginning_of_a_large_one() -> None:
    assert faces.cast("seed", 20)[:8] == faces.cast("seed", 8)


def test_strangers_look_like_nobody_they_are_kept_apart_from() -> None:
    cast = faces.cast("people", 32)
    strangers = faces.cast("strangers", 32, apart_from=cast)
    assert min(faces.distance(one, other) for one in strangers for other in cast) >= 1


@pytest.mark.parametrize("trait", ["glasses", "beard", "hair_colour"])
def test_every_visible_fact_can_be_seen_on_every_photo(trait: str) -> None:
    values = faces.TRAITS[trait]
    for take in range(25):
        face = faces.random_face(random.Random(take))
        shots = [pixels(replace(face, **{trait: value}), take) for value in values]
        for (one, a), (other, b) in combinations(zip(values, shots, strict=True), 2):
            assert changed(a, b, by=24) >= 14, f"{trait} {one} and {other} look alike on {face}, take {take}"


def test_hair_is_never_cut_off_at_the_top() -> None:
    for take in range(120):
        face = faces.random_face(random.Random(take))
        black, blue = (pixels(replace(face, hair_colour=colour), take) for colour in ("black", "blue"))
        assert np.array_equal(black[0], blue[0]), f"hair touches the upper edge: {face}, take {take}"


@pytest.mark.parametrize("size", [32, 48, 192])
def test_a_photo_has_the_size_it_was_asked_for(size: int) -> None:
    photo = faces.draw(faces.random_face(random.Random(0)), random.Random(0), size)
    assert (photo.mode, photo.size) == ("RGB", (size, size))
