"""Draws fictitious people: a `Face` says who somebody is, `draw` takes one photo of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

WHITE: RGB = (255, 255, 255)
GLASSES = ("none", "round", "square", "dark")
BEARDS = ("none", "moustache", "goatee", "full")
HAIR_COLOURS: dict[str, RGB] = {
    "black": (38, 34, 42),
    "brown": (122, 70, 30),
    "blonde": (244, 208, 92),
    "red": (214, 78, 32),
    "grey": (172, 176, 186),
    "blue": (62, 112, 226),
}
SKINS: dict[str, RGB] = {
    "pale": (255, 226, 204),
    "peach": (244, 200, 160),
    "tan": (214, 160, 112),
    "brown": (166, 112, 78),
    "dark": (104, 66, 50),
}
EYE_COLOURS: dict[str, RGB] = {"dark": (50, 34, 28), "blue": (48, 112, 196), "green": (52, 132, 78)}
CLOTHES_COLOURS: dict[str, RGB] = {
    "crimson": (204, 44, 62),
    "orange": (242, 138, 38),
    "lemon": (248, 222, 72),
    "green": (60, 162, 84),
    "teal": (34, 158, 166),
    "navy": (42, 58, 126),
    "violet": (140, 82, 186),
    "white": (240, 240, 236),
}
HAIR_STYLES = ("short", "spiky", "quiff", "curly", "bob", "long", "bun", "pigtails")
CLOTHES = ("tee", "shirt", "stripes", "turtleneck")

HEADS: dict[str, tuple[float, float, float, float]] = {
    "oval": (18.5, 24.0, 2.0, 0.10),
    "round": (22.0, 22.0, 2.1, 0.0),
    "square": (20.0, 23.0, 3.2, 0.0),
    "heart": (20.5, 24.0, 2.1, 0.34),
}
"""Half width, half height, squareness (the exponent of a superellipse) and how much the jaw narrows."""

TRAITS: dict[str, tuple[str, ...]] = {
    "hair_style": HAIR_STYLES,
    "hair_colour": tuple(HAIR_COLOURS),
    "skin": tuple(SKINS),
    "glasses": GLASSES,
    "beard": BEARDS,
    "clothes_colour": tuple(CLOTHES_COLOURS),
    "shape": tuple(HEADS),
    "clothes": CLOTHES,
    "eye_colour": tuple(EYE_COLOURS),
    "brows": ("thin", "thick"),
    "extra": ("nothing", "freckles", "earrings"),
}
"""Every trait of a `Face` with its values."""
VISIBLE_TRAITS = ("glasses", "hair_colour", "beard")
"""The traits that no pose, crop or light may hide."""

_STRIKING = 7  # the first so many traits are seen at a glance; two people must differ in at least one of them
_CANDIDATES = 12


@dataclass(frozen=True)
class Face:
    """Who somebody is: what stays the same on all photos of them. The values are those of `TRAITS`."""

    hair_style: str
    hair_colour: str
    skin: str
    glasses: str
    beard: str
    clothes_colour: str
    shape: str
    clothes: str
    eye_colour: str
    brows: str
    extra: str


def random_face(rng: random.Random) -> Face:
    """Somebody, every trait drawn evenly."""
    return Face(**{trait: rng.choice(values) for trait, values in TRAITS.items()})


def distance(one: Face, other: Face) -> float:
    """In how many striking traits two faces differ; the small traits count a tenth."""
    return float(_distances(np.array(_numbers(one)), np.array([_numbers(other)]))[0])


def shared_out(seed: str, values: Sequence[str], seat: int) -> str:
    """The value for one seat when seats are served in laps, each lap handing out every value once in random order."""
    lap, place = divmod(seat, len(values))
    order = list(values)
    random.Random(f"{seed}/{lap}").shuffle(order)
    return order[place]


def cast(seed: str, count: int, apart_from: Iterable[Face] = ()) -> list[Face]:
    """`count` people who look as different from each other, and from `apart_from`, as a few tries each allow.

    What is asked about photos (`VISIBLE_TRAITS`) is shared out evenly. A shorter cast of the same seed is the
    beginning of a longer one.
    """
    taken = [_numbers(face) for face in apart_from]
    chosen = []
    for seat in range(count):
        rng = random.Random(f"{seed}/{seat}")
        evenly = {trait: shared_out(f"{seed}/{trait}", TRAITS[trait], seat) for trait in VISIBLE_TRAITS}
        known = np.array(taken, dtype=np.int8).reshape(-1, len(TRAITS))
        nearest = 0.0
        while nearest < 1.0:
            tries = [replace(random_face(rng), **evenly) for _ in range(_CANDIDATES)]
            spread = [float(_distances(np.array(_numbers(face)), known).min(initial=math.inf)) for face in tries]
            nearest = max(spread)
        face = tries[spread.index(nearest)]
        taken.append(_numbers(face))
        chosen.append(face)
    return chosen


def _numbers(face: Face) -> tuple[int, ...]:
    """Each trait as its place among the trait's values."""
    return tuple(values.index(getattr(face, trait)) for trait, values in TRAITS.items())


def _distances(one: NDArray[np.integer], others: NDArray[np.integer]) -> NDArray[np.float64]:
    """`[n]`: the distance of one face `[traits]` to `others` `[n, traits]`, both as numbers."""
    differ = others != one
    distances: NDArray[np.float64] = differ[:, :_STRIKING].sum(axis=1) + 0.1 * differ[:, _STRIKING:].sum(axis=1)
    return distances


def draw(face: Face, rng: random.Random, size: int) -> Image.Image:
    """One photo of `face`, `size` x `size` RGB; pose, light, background, crop and expression come from `rng`."""
    oversampled = 4 * size
    image = _background(rng, oversampled)
    pen = _Pen.posed(image, rng)
    turn = rng.uniform(-2.6, 2.6)  # features slide sideways on the head, as if it were turned
    _draw_hair_behind(pen, face)
    _draw_clothes(pen, face)
    _draw_head(pen, face, turn)
    _draw_beard(pen, face, turn)
    _draw_lenses(pen, face, turn)
    _draw_expression(pen, face, turn, rng)
    _draw_hair_in_front(pen, face)
    _draw_glasses(pen, face, turn)
    return _lit(image.reduce(4), rng)


class _Pen:
    """Draws in head units: the origin is the middle of the face, the frame is 100 wide, y points down."""

    def __init__(self, image: Image.Image, middle: Point, scale: float, tilt: float) -> None:
        self.canvas = ImageDraw.Draw(image)
        self.unit = image.width / 100 * scale
        self.cos, self.sin = self.unit * math.cos(tilt), self.unit * math.sin(tilt)
        self.x, self.y = (image.width / 100 * at for at in middle)

    @classmethod
    def posed(cls, image: Image.Image, rng: random.Random) -> _Pen:
        # The limits keep all hair, beard and glasses of every face inside the frame.
        middle = (50 + rng.uniform(-5, 5), 53 + rng.uniform(-3, 3))
        return cls(image, middle, scale=rng.uniform(1.02, 1.2), tilt=math.radians(rng.uniform(-9, 9)))

    def place(self, points: Iterable[Point]) -> list[Point]:
        cos, sin, x0, y0 = self.cos, self.sin, self.x, self.y
        return [(x0 + cos * x - sin * y, y0 + sin * x + cos * y) for x, y in points]

    def shape(self, points: Iterable[Point], fill: RGB, edge: RGB | None = None, width: float = 1.2) -> None:
        placed = self.place(points)
        self.canvas.polygon(placed, fill=fill)
        if edge:
            self.canvas.line([*placed, placed[0]], fill=edge, width=max(1, round(width * self.unit)), joint="curve")

    def blob(self, x: float, y: float, rx: float, ry: float, fill: RGB, edge: RGB | None = None) -> None:
        self.shape([(x + rx * cos, y + ry * sin) for cos, sin in _circle(20)], fill, edge)

    def stroke(self, points: Iterable[Point], fill: RGB, width: float) -> None:
        self.canvas.line(self.place(points), fill=fill, width=max(1, round(width * self.unit)), joint="curve")


@cache
def _circle(points: int) -> tuple[Point, ...]:
    angles = [2 * math.pi * step / points for step in range(points)]
    return tuple((math.cos(angle), math.sin(angle)) for angle in angles)


@cache
def _outline(shape: str, grow: float = 0.0) -> tuple[Point, ...]:
    """The head's contour, clockwise from the right ear over the chin."""
    rx, ry, squareness, taper = HEADS[shape]
    contour = []
    for cos, sin in _circle(40):
        x = math.copysign(abs(cos) ** (2 / squareness), cos)
        y = math.copysign(abs(sin) ** (2 / squareness), sin)
        contour.append(((rx + grow) * x * (1 - taper * max(0.0, y)), (ry + grow) * y))
    return tuple(contour)


def _shade(colour: RGB, factor: float) -> RGB:
    red, green, blue = (min(255, max(0, round(factor * channel))) for channel in colour)
    return red, green, blue


def _mixed(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round((1 - share) * a + share * b) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _background(rng: random.Random, size: int) -> Image.Image:
    hue = rng.random()
    light = rng.uniform(0.74, 1.0)
    upper = _pastel(hue, light)
    lower = _pastel(hue + rng.uniform(-0.12, 0.12), light * rng.uniform(0.78, 1.0))
    scene = rng.choice(("plain", "gradient", "gradient", "hills", "wall", "lights"))
    image = Image.new("RGB", (size, size), upper)
    canvas = ImageDraw.Draw(image)
    if scene == "gradient":
        bands = 12
        for band in range(bands):
            canvas.rectangle(
                (0, band * size // bands, size, (band + 1) * size // bands), fill=_mixed(upper, lower, band / bands)
            )
    elif scene == "hills":
        for depth, colour in enumerate((_pastel(0.3, light * 0.9), _pastel(0.36, light * 0.76))):
            middle, width = rng.uniform(0, size), rng.uniform(0.5, 0.9) * size
            top = size * (0.5 + 0.14 * depth)
            canvas.ellipse((middle - width, top, middle + width, top + size), fill=colour)
    elif scene == "wall":
        floor = round(rng.uniform(0.6, 0.8) * size)
        canvas.rectangle((0, floor, size, size), fill=_shade(lower, 0.8))
        left, top, side = rng.choice((-0.06, 0.72)) * size, rng.uniform(0.05, 0.2) * size, 0.34 * size
        frame = (left, top, left + side, top + side)
        canvas.rectangle(frame, fill=_pastel(hue + 0.5, 0.9), outline=_shade(lower, 0.6), width=size // 48)
    elif scene == "lights":
        for _ in range(7):
            x, y, radius = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.05, 0.12) * size
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_mixed(upper, (255, 250, 235), 0.4))
    return image


def _pastel(hue: float, light: float) -> RGB:
    red, green, blue = (
        round(255 * light * (1 - 0.28 * (1 + math.cos(2 * math.pi * (hue + third / 3))) / 2)) for third in range(3)
    )
    return red, green, blue


def _draw_clothes(pen: _Pen, face: Face) -> None:
    colour, skin = CLOTHES_COLOURS[face.clothes_colour], SKINS[face.skin]
    edge = _shade(colour, 0.66)
    shoulders = [(-13, 29), (-30, 35), (-38, 46), (-42, 90), (42, 90), (38, 46), (30, 35), (13, 29)]
    pen.shape([(-7.5, 12), (7.5, 12), (9, 34), (-9, 34)], _shade(skin, 0.8))
    pen.shape(shoulders, colour, edge)
    if face.clothes == "stripes":
        for x, top in ((-31, 37), (-20, 32.5), (20, 32.5), (31, 37), (-8, 34), (8, 34)):
            pen.shape([(x - 2.6, top), (x + 2.6, top), (x + 2.6, 90), (x - 2.6, 90)], _mixed(colour, WHITE, 0.72))
    if face.clothes == "turtleneck":
        pen.shape([(-10, 22), (10, 22), (12.5, 34), (-12.5, 34)], colour, edge)
    elif face.clothes == "shirt":
        pen.shape([(-9, 28), (9, 28), (0, 42)], _shade(skin, 0.8))
        collar = _mixed(colour, WHITE, 0.55)
        pen.shape([(-12, 26), (-15, 34), (-6, 41), (0, 41)], collar, edge)
        pen.shape([(12, 26), (15, 34), (6, 41), (0, 41)], collar, edge)
        pen.stroke([(0, 42), (0, 90)], edge, 1.2)
    else:
        pen.blob(0, 29, 11, 6.5, _shade(skin, 0.8), edge)


def _draw_head(pen: _Pen, face: Face, turn: float) -> None:
    skin = SKINS[face.skin]
    edge = _shade(skin, 0.74)
    width = HEADS[face.shape][0]
    for side in (-1, 1):
        pen.blob(side * (width + 0.6) - 0.3 * turn, 1, 3.6, 5.2, skin, edge)
        if face.extra == "earrings":
            pen.blob(side * (width + 1.6) - 0.3 * turn, 8, 2.2, 2.2, (250, 214, 80), (150, 110, 20))
    pen.shape(_outline(face.shape), skin, edge)
    blush = _mixed(skin, (240, 92, 92), 0.26)
    for side in (-1, 1):
        pen.blob(side * 10.5 + turn, 7, 4.2, 2.8, blush)
        if face.extra == "freckles":
            for x, y in ((-2.4, 5.4), (0.4, 6.6), (2.6, 5.2), (-1, 8.4), (1.8, 8.6)):
                pen.blob(side * 10 + x + turn, y, 0.8, 0.8, _shade(skin, 0.62))


def _draw_expression(pen: _Pen, face: Face, turn: float, rng: random.Random) -> None:
    skin, eyes = SKINS[face.skin], EYE_COLOURS[face.eye_colour]
    gaze, raised, open_eyes = rng.uniform(-0.9, 0.9), rng.uniform(-0.8, 1.6), rng.uniform(0.72, 1.0)
    brow = _shade(HAIR_COLOURS[face.hair_colour], 0.62)
    thickness = 2.6 if face.brows == "thick" else 1.5
    for side in (-1, 1):
        x = side * 8 + turn
        pen.blob(x, -1, 4, 3.7 * open_eyes, WHITE, _shade(skin, 0.6))
        pen.blob(x + gaze, -1, 2.4, 2.6 * open_eyes, eyes)
        pen.blob(x + gaze - 0.8, -2, 0.8, 0.8, WHITE)
        pen.stroke(
            [(x - side * 4, -7.4 - raised), (x, -8.8 - raised), (x + side * 4.6, -7.2 - 0.6 * raised)], brow, thickness
        )
    nose = 1.5 * turn
    pen.stroke([(nose - 0.4, 0.5), (nose + 1.4, 5.2), (nose - 1.4, 5.6)], _shade(skin, 0.68), 1.3)
    _draw_mouth(pen, turn, smile=rng.uniform(-0.4, 3.4), width=rng.uniform(5.2, 7), laughs=rng.random() < 0.35)


def _draw_mouth(pen: _Pen, turn: float, smile: float, width: float, laughs: bool) -> None:
    lower = [(turn + width * step / 4, 11.5 + smile * (1 - (step / 4) ** 2)) for step in range(-4, 5)]
    if laughs:
        deep = [(x, 11 + 1.7 * (y - 9.5)) for x, y in lower[1:-1]]
        pen.shape([lower[0], lower[-1], *reversed(deep)], (128, 34, 40), (92, 24, 30))
        pen.shape([lower[1], lower[-2], *((x, y + 0.6) for x, y in reversed(lower[2:-2]))], WHITE)
    else:
        pen.stroke(lower, (168, 52, 56), 2.0)


def _draw_beard(pen: _Pen, face: Face, turn: float) -> None:
    colour = HAIR_COLOURS[face.hair_colour]
    edge = _shade(colour, 0.6)
    width, chin = HEADS[face.shape][:2]
    if face.beard == "full":
        jaw = [point for point in _outline(face.shape, grow=1.8) if point[1] > 3]
        cheek = [(0.95 * width, 3), (0.86 * width, 10), (0.5 * width, 13)]
        lip = [(turn - 6.5, 9.4), (turn, 8.4), (turn + 6.5, 9.4)]
        cheeks = [*((-x, y) for x, y in cheek), *lip, *reversed(cheek)]
        pen.shape([*jaw, *cheeks], colour, edge)
        pen.blob(turn, 12.6, 7, 3.2, _mixed(SKINS[face.skin], (230, 100, 100), 0.2))
    elif face.beard == "goatee":
        half = [(0, 14.8), (5.4, 15.6), (6.4, 19), (5, chin), (2, chin + 3.4), (0, chin + 4)]
        _mirrored(pen, half, colour, edge, shift=0.7 * turn)
    elif face.beard == "moustache":
        half = [(0, 6.4), (4, 6.2), (8, 8), (11, 11), (6.5, 10.8), (0, 9.6)]
        for side in (-1, 1):
            pen.shape([(side * x + turn, y) for x, y in half], colour, edge)


def _draw_lenses(pen: _Pen, face: Face, turn: float) -> None:
    if face.glasses in ("round", "square"):
        for side in (-1, 1):
            pen.shape(_rim(face.glasses, side * 8.6 + turn), _mixed(SKINS[face.skin], (235, 248, 255), 0.5))


def _draw_glasses(pen: _Pen, face: Face, turn: float) -> None:
    if face.glasses == "none":
        return
    frame, width = ((92, 34, 26), 1.7) if face.glasses == "round" else ((22, 22, 28), 2.4)
    ear = HEADS[face.shape][0]
    for side in (-1, 1):
        pen.stroke([(side * 13 + turn, -2), (side * ear, -3)], frame, 1.6)
        x = side * 8.6 + turn
        rim = _rim(face.glasses, x)
        if face.glasses == "dark":
            pen.shape(rim, (30, 32, 42), frame, width)
            pen.stroke([(x - 4, -1), (x - 1, -3.6)], (150, 160, 180), 1.3)
        else:
            pen.stroke([*rim, *rim[:2]], frame, width)
    pen.stroke([(turn - 1.8, -2.4), (turn + 1.8, -2.4)], frame, 2.0)


def _rim(glasses: str, x: float) -> list[Point]:
    if glasses == "round":
        return [(x + 7 * cos, -0.6 + 7 * sin) for cos, sin in _circle(20)]
    if glasses == "square":
        return [(x - 7.2, -6.4), (x + 7.2, -6.4), (x + 7.2, 4.6), (x - 7.2, 4.6)]
    return [(x - 7.4, -5.6), (x + 7.4, -5.6), (x + 7, 2), (x + 3.6, 5.2), (x - 3.6, 5.2), (x - 7, 2)]


def _draw_hair_behind(pen: _Pen, face: Face) -> None:
    colour = _shade(HAIR_COLOURS[face.hair_colour], 0.84)
    edge = _shade(colour, 0.6)
    width, height = HEADS[face.shape][:2]
    if face.hair_style == "long":
        _mirrored(pen, [(0, -height - 2), (width + 2, -12), (width + 6, 10), (width + 6, 36), (0, 36)], colour, edge)
    elif face.hair_style == "bob":
        half = [(0, -height), (width + 3, -12), (width + 6.5, 4), (width + 6, 15), (width + 2, 19), (0, 19)]
        _mirrored(pen, half, colour, edge)
    elif face.hair_style == "bun":
        pen.blob(0, -height - 7, 9, 7.5, colour, edge)
    elif face.hair_style == "curly":
        for cos, sin in _circle(16):
            if sin < 0.55:
                pen.blob((width + 3) * cos, -5 + (height - 0.5) * sin, 7.4, 7.4, colour, edge)
    elif face.hair_style == "pigtails":
        tail = [(-2, -16), (4, -17), (9, -13), (12.5, -4), (13, 8), (9, 22), (6.5, 14), (3, 8)]
        for side in (-1, 1):
            pen.shape([(side * (width + x), y) for x, y in tail], colour, edge)
            pen.blob(side * (width + 2.5), -13, 2.6, 3, (236, 70, 110))


def _mirrored(pen: _Pen, half: Sequence[Point], fill: RGB, edge: RGB, shift: float = 0.0) -> None:
    pen.shape([(x + shift, y) for x, y in (*half, *((-x, y) for x, y in reversed(half)))], fill, edge)


def _draw_hair_in_front(pen: _Pen, face: Face) -> None:
    colour = HAIR_COLOURS[face.hair_colour]
    edge, shine = _shade(colour, 0.6), _mixed(colour, WHITE, 0.28)
    width, height = HEADS[face.shape][:2]
    if face.hair_style == "curly":
        for x, y in ((-15, -15), (-8, -20), (0, -22), (8, -20), (15, -15)):
            pen.blob(x, y, 6.4, 5.6, colour)
        pen.blob(-7, -22, 2.6, 1.8, shine)
        return
    crown = [point for point in _outline(face.shape, grow=2.6) if point[1] <= -2]
    hairline = [(x * (width + 1), y) for x, y in _HAIRLINES[face.hair_style]]
    if face.hair_style == "spiky":
        crown = _spikes(width, height)
    elif face.hair_style == "quiff":
        crown = [(-width - 2.6, -3), (-width - 2, -17), (-width + 5, -height - 4), (-3, -height - 9), (8, -height - 10)]
        crown += [(width - 1, -height - 5), (width + 3, -17), (width + 2.6, -3)]
    if face.hair_style == "long":
        lock = [(-0.5, -8), (2.6, -6), (6.6, 10), (7.6, 30), (4, 44), (-2, 46), (-4, 36), (0.4, 14)]
        for side in (-1, 1):
            pen.shape([(side * (width + x), y) for x, y in lock], colour, edge)
    pen.shape([*crown, *hairline], colour, edge)
    pen.stroke([(-0.55 * width, -0.72 * height), (-0.2 * width, -0.88 * height)], shine, 2.0)


_HAIRLINES: dict[str, Sequence[Point]] = {
    "short": [(1.0, -4), (0.86, -10), (0.5, -13), (-0.2, -11), (-0.7, -15), (-0.88, -10), (-1.0, -4)],
    "spiky": [
        (1.0, -5),
        (0.85, -12),
        (0.5, -12),
        (0.3, -15),
        (0, -11.5),
        (-0.3, -15),
        (-0.5, -12),
        (-0.85, -12),
        (-1, -5),
    ],
    "quiff": [(0.98, -4), (0.84, -12), (0.3, -15), (-0.3, -15), (-0.84, -12), (-0.98, -4)],
    "bob": [(1.06, 2), (0.84, -2), (0.8, -11), (-0.8, -11), (-0.84, -2), (-1.06, 2)],
    "long": [(1.06, 4), (0.9, -2), (0.62, -11), (0, -19), (-0.62, -11), (-0.9, -2), (-1.06, 4)],
    "bun": [(1.0, -5), (0.8, -12), (0.4, -16), (-0.4, -16), (-0.8, -12), (-1.0, -5)],
    "pigtails": [(1.0, -4), (0.84, -9), (0.3, -15), (0, -20), (-0.3, -15), (-0.84, -9), (-1.0, -4)],
}
"""The lower edge of the hair from right to left: x in half widths of the head, y in head units."""


def _spikes(width: float, height: float) -> list[Point]:
    spikes: list[Point] = [(-width - 2.6, -4)]
    for step in range(-3, 4):
        x = step / 3.4 * (width + 1)
        top = -height * math.sqrt(max(0.0, 1 - (step / 3.9) ** 2))
        spikes += [(x - 2.6, top - 1), (1.28 * x, top - 8.5), (x + 2.6, top - 1)]
    return [*spikes, (width + 2.6, -4)]


def _lit(image: Image.Image, rng: random.Random) -> Image.Image:
    """The photo under a light of some strength and warmth that falls in from one side."""
    strength, warmth, shadow = rng.uniform(0.88, 1.1), rng.uniform(-0.07, 0.07), rng.uniform(-0.24, 0.24)
    tint = strength * np.array([1 + warmth, 1.0, 1 - warmth])
    across = 1 - abs(shadow) * np.linspace(0, 1, image.width)[:: 1 if shadow > 0 else -1]
    pixels = np.asarray(image) * across[None, :, None] * tint
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
