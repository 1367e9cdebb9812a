"""Draw one subject of the world as an RGBA picture.

A subject is an individual: class, shape parameters, two colours, a pattern, an accessory. Each class
has one drawing function on a `Pen`, whose coordinates run from 0 to 100, y downwards. The body is
filled with `body` (colour 1 under the pattern), secondary parts with `second` (colour 2).
Knows nothing about scenes, styles or captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from infusion.world.vocabulary import ACCESSORIES, CLASSES, COLORS, PATTERNS

CANVAS = 144  # pixels a side of a subject before it is scaled into its scene
N_SHAPE = 4  # shape parameters per individual, each in [0, 1]

RGB = tuple[int, int, int]
INK: RGB = (34, 30, 38)


@dataclass(frozen=True)
class Subject:
    """One individual of the world.

    `shape` holds `N_SHAPE` numbers in [0, 1]; every class reads them as proportions of its parts.
    `kind` is the class ("dog"); the colour, pattern and accessory names are those of `vocabulary`.
    """

    kind: str
    color1: str
    color2: str
    pattern: str
    accessory: str
    shape: tuple[float, ...]

    def __post_init__(self) -> None:
        for value, allowed, what in (
            (self.kind, CLASSES, "class"),
            (self.color1, tuple(COLORS), "colour"),
            (self.color2, tuple(COLORS), "colour"),
            (self.pattern, PATTERNS, "pattern"),
            (self.accessory, ACCESSORIES, "accessory"),
        ):
            if value not in allowed:
                raise ValueError(f"{value!r} is no {what} of the world; use one of {', '.join(allowed)}.")
        if len(self.shape) != N_SHAPE or not all(0.0 <= s <= 1.0 for s in self.shape):
            raise ValueError(f"shape {self.shape} must be {N_SHAPE} numbers in [0, 1].")


def random_subject(rng: np.random.Generator, kind: str | None = None) -> Subject:
    """An individual drawn uniformly from the world, of class `kind` or of any class."""
    color1, color2 = rng.choice(list(COLORS), size=2, replace=False)
    return Subject(
        kind=kind or str(rng.choice(CLASSES)),
        color1=str(color1),
        color2=str(color2),
        pattern=str(rng.choice(PATTERNS)),
        accessory=str(rng.choice(ACCESSORIES, p=(0.4, 0.2, 0.2, 0.2))),
        shape=tuple(round(float(s), 3) for s in rng.random(N_SHAPE)),
    )


def draw_subject(subject: Subject) -> Image.Image:
    """The individual alone, `CANVAS` x `CANVAS` RGBA, facing right, feet near the lower edge."""
    pen = Pen(subject)
    anchors = _DRAW[subject.kind](pen, subject.shape)
    _ACCESSORY[subject.accessory](pen, anchors)
    return pen.image()


@dataclass(frozen=True)
class Anchors:
    """Where accessories sit: (x, y, width) of the head's top, the neck and the chest."""

    hat: tuple[float, float, float]
    neck: tuple[float, float, float]
    chest: tuple[float, float, float]


class Pen:
    """A drawing surface of 100 x 100 units that knows the subject's colours and pattern."""

    def __init__(self, subject: Subject) -> None:
        self.k = CANVAS / 100
        self.color1, self.color2 = COLORS[subject.color1], COLORS[subject.color2]
        self.pattern_image = _pattern(subject.pattern, self.color1, self.color2)
        self.canvas = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.canvas)

    def _xy(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self.k, y * self.k) for x, y in points]

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: RGB | str, line: float = 1.4) -> None:
        box = self._xy([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        self._fill(lambda d, f, o, w: d.ellipse(box, fill=f, outline=o, width=w), fill, line)

    def polygon(self, points: list[tuple[float, float]], fill: RGB | str, line: float = 1.4) -> None:
        xy = self._xy(points)

        def paint(d: ImageDraw.ImageDraw, f: object, o: object, w: int) -> None:
            d.polygon(xy, fill=f)
            if w:
                d.line([*xy, xy[0], xy[1]], fill=o, width=w, joint="curve")

        self._fill(paint, fill, line)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | str, r: float = 0, line: float = 1.4) -> None:
        xy = self._xy([(x0, y0), (x1, y1)])
        self._fill(
            lambda d, f, o, w: d.rounded_rectangle(xy, radius=r * self.k, fill=f, outline=o, width=w), fill, line
        )

    def stroke(self, points: list[tuple[float, float]], color: RGB | str, width: float, edge: float = 1.4) -> None:
        """A round-ended line with a thin dark edge: tails, handles, antennas."""
        xy, rgb = self._xy(points), self._rgb(color)
        for w, c in ((width + 2 * edge, _darker(rgb)), (width, rgb)):
            r = w * self.k / 2
            self.draw.line(xy, fill=(*c, 255), width=round(2 * r), joint="curve")
            for x, y in (xy[0], xy[-1]):
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(*c, 255))

    def _rgb(self, fill: RGB | str) -> RGB:
        return fill if isinstance(fill, tuple) else (self.color2 if fill == "second" else self.color1)

    def _fill(self, paint: Callable, fill: RGB | str, line: float) -> None:
        rgb, width = self._rgb(fill), round(line * self.k)
        if fill == "body" and self.pattern_image is not None:
            mask = Image.new("L", self.canvas.size, 0)
            paint(ImageDraw.Draw(mask), 255, 255, 0)
            self.canvas.paste(self.pattern_image, (0, 0), mask)
            paint(self.draw, None, (*_darker(rgb), 255), width)
        else:
            paint(self.draw, (*rgb, 255), (*_darker(rgb), 255), width)

    def eye(self, x: float, y: float, r: float = 3.6) -> None:
        self.ellipse(x, y, r + 1, r + 1, (250, 250, 250), line=0.8)
        self.ellipse(x + 0.6, y + 0.4, r * 0.62, r * 0.62, INK, line=0)

    def image(self) -> Image.Image:
        """The drawing with soft light from above."""
        rgba = np.asarray(self.canvas, dtype=np.float32)
        light = np.linspace(1.10, 0.84, CANVAS, dtype=np.float32)[:, None, None]
        rgba = np.concatenate([np.clip(rgba[..., :3] * light, 0, 255), rgba[..., 3:]], axis=-1)
        return Image.fromarray(rgba.astype(np.uint8), "RGBA")


def _darker(rgb: RGB) -> RGB:
    r, g, b = (int(c * 0.45) for c in rgb)
    return r, g, b


@cache
def _pattern(name: str, color1: RGB, color2: RGB) -> Image.Image | None:
    """Colour 1 with the pattern in colour 2, as large as the canvas, to paste from; None for a plain body."""
    if name == "plain":
        return None
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / (CANVAS / 100)
    if name == "spotted":  # hexagonal grid of dots
        row = np.floor(y / 13)
        on = np.hypot((x + 7.5 * (row % 2)) % 15 - 7.5, y % 13 - 6.5) < 4.7
    elif name == "striped":
        on = (x + 0.35 * y) % 17 < 8
    else:
        on = (np.floor(x / 10.5) + np.floor(y / 10.5)) % 2 < 1
    rgb = np.where(on[..., None], np.array(color2, np.uint8), np.array(color1, np.uint8))
    return Image.fromarray(np.dstack([rgb, np.full((CANVAS, CANVAS), 255, np.uint8)]), "RGBA")


def _lerp(s: float, low: float, high: float) -> float:
    return low + (high - low) * s


# --- classes -------------------------------------------------------------------------------------


def _dog(pen: Pen, s: tuple[float, ...]) -> Anchors:
    head, ear, tail, leg = _lerp(s[0], 15, 19), _lerp(s[1], 10, 19), _lerp(s[2], 10, 24), _lerp(s[3], 14, 24)
    belly = 96 - leg
    pen.stroke([(16, belly - 22), (8, belly - 26 - tail * 0.4), (7, belly - 26 - tail)], "second", 6)
    for x in (19, 33, 55, 68):
        pen.box(x, belly - 8, x + 9.5, 96, "body", r=3)
    pen.box(14, belly - 30, 80, belly + 2, "body", r=14)
    hx, hy = 77, belly - 33
    pen.ellipse(hx, hy, head, head * 0.95, "body")
    pen.ellipse(hx + head * 0.8, hy + 5, 9.5, 7.5, "second")
    pen.ellipse(hx + head * 0.8 + 7.5, hy + 2.5, 3, 2.6, INK, line=0)
    pen.ellipse(hx - head * 0.55, hy + ear * 0.35, 6.5, ear, "second")
    pen.eye(hx + 4, hy - 4)
    return Anchors((hx, hy - head * 0.9, 27), (67, belly - 17, 25), (42, belly - 14, 12))


def _cat(pen: Pen, s: tuple[float, ...]) -> Anchors:
    head, ear, tail, wide = _lerp(s[0], 18, 22), _lerp(s[1], 9, 17), _lerp(s[2], 8, 30), _lerp(s[3], 20, 27)
    pen.stroke([(50 + wide * 0.7, 90), (88, 88), (93, 76), (90, 76 - tail)], "second", 6.5)
    pen.ellipse(50, 74, wide, 23, "body")
    for x in (41, 59):
        pen.ellipse(x, 93, 8, 5, "second")
    hy = 38
    for side in (-1, 1):
        base = 50 + side * head * 0.62
        pen.polygon([(base - 8.5, hy - 9), (base + side * 5, hy - head - ear), (base + 8.5, hy - 7)], "second")
    pen.ellipse(50, hy, head * 1.08, head * 0.95, "body")
    for side in (-1, 1):
        pen.eye(50 + side * 8.5, hy - 2, 4)
        for dy in (5, 9):
            pen.stroke([(50 + side * 9, hy + dy), (50 + side * (head + 7), hy + dy - 2)], INK, 0.9, edge=0)
    pen.polygon([(47, hy + 5), (53, hy + 5), (50, hy + 9)], (232, 120, 140), line=0.6)
    return Anchors((50, hy - head * 0.85, 27), (50, 57, 34), (50, 76, 13))


def _bird(pen: Pen, s: tuple[float, ...]) -> Anchors:
    head, beak, tail, wing = _lerp(s[0], 13, 17), _lerp(s[1], 9, 18), _lerp(s[2], 12, 26), _lerp(s[3], 15, 22)
    for x in (45, 56):
        pen.stroke([(x, 76), (x, 94), (x + 7, 94)], (240, 150, 30), 2.6, edge=0.8)
    pen.polygon([(26, 54), (22 - tail * 0.8, 44), (20 - tail * 0.8, 62), (28, 66)], "second")
    pen.ellipse(49, 58, 29, 22, "body")
    hx, hy = 70, 36
    pen.polygon([(hx + head - 4, hy - 4), (hx + head + beak, hy + 3), (hx + head - 4, hy + 8)], (244, 160, 30))
    pen.ellipse(hx, hy, head, head, "body")
    pen.ellipse(41, 59, wing, 12, "second")
    pen.eye(hx + 4, hy - 3)
    return Anchors((hx - 1, hy - head * 0.9, 25), (65, 49, 26), (52, 71, 11))


def _fish(pen: Pen, s: tuple[float, ...]) -> Anchors:
    tall, tail, fin, nose = _lerp(s[0], 19, 28), _lerp(s[1], 13, 24), _lerp(s[2], 8, 18), _lerp(s[3], 28, 35)
    pen.polygon([(28, 58), (8, 58 - tail), (13, 58), (8, 58 + tail)], "second")
    pen.polygon([(38, 60 - tall * 0.8), (50, 58 - tall - fin), (68, 60 - tall * 0.8)], "second")
    pen.polygon([(44, 56 + tall * 0.8), (44, 58 + tall + fin * 0.6), (60, 56 + tall * 0.8)], "second")
    pen.ellipse(56, 58, nose, tall, "body")
    pen.stroke([(66, 50), (63, 58), (66, 66)], INK, 1.2, edge=0)
    pen.eye(76, 52, 4)
    return Anchors((66, 59 - tall, 25), (64, 58, 2 * tall * 0.8), (47, 58, 13))


def _teddy_bear(pen: Pen, s: tuple[float, ...]) -> Anchors:
    head, ear, belly, limb = _lerp(s[0], 19, 23), _lerp(s[1], 6.5, 10.5), _lerp(s[2], 19, 25), _lerp(s[3], 8, 11)
    for side in (-1, 1):
        pen.ellipse(50 + side * head * 0.78, 30 - head * 0.72, ear, ear, "second")
        pen.ellipse(50 + side * (belly + 5), 62, limb, 13, "body")
    pen.ellipse(50, 70, belly, 22, "body")
    for side in (-1, 1):
        pen.ellipse(50 + side * (belly - 2), 88, limb + 2, 9, "second")
    pen.ellipse(50, 32, head, head * 0.92, "body")
    pen.ellipse(50, 39, 9, 7, "second")
    pen.ellipse(50, 36, 3, 2.4, INK, line=0)
    for side in (-1, 1):
        pen.ellipse(50 + side * 8, 28, 2.8, 2.8, INK, line=0)
    return Anchors((50, 32 - head * 0.85, 27), (50, 52, 32), (50, 70, 14))


def _car(pen: Pen, s: tuple[float, ...]) -> Anchors:
    roof, cabin, wheel, hood = _lerp(s[0], 16, 26), _lerp(s[1], 18, 25), _lerp(s[2], 9, 12.5), _lerp(s[3], 58, 66)
    top = 60 - roof
    pen.polygon([(50 - cabin - 7, 62), (50 - cabin, top), (46 + cabin * 0.6, top), (50 + cabin + 6, 62)], "second")
    glass = (190, 226, 244)
    pen.polygon([(50 - cabin - 1, 60), (53 - cabin, top + 5), (44, top + 5), (44, 60)], glass, line=0.8)
    pen.polygon([(49, 60), (49, top + 5), (44 + cabin * 0.6, top + 5), (48 + cabin, 60)], glass, line=0.8)
    pen.polygon([(5, hood), (10, 58), (84, 58), (95, hood + 4), (95, 86), (5, 86)], "body")
    pen.ellipse(92, 70, 3, 4, (255, 244, 170), line=0.8)
    for x in (26, 74):
        pen.ellipse(x, 86, wheel, wheel, INK)
        pen.ellipse(x, 86, wheel * 0.45, wheel * 0.45, "second", line=0.6)
    return Anchors((46, top + 1, 27), (50, 60, 42), (50, 72, 12))


def _boat(pen: Pen, s: tuple[float, ...]) -> Anchors:
    mast, sail, hull, jib = _lerp(s[0], 8, 20), _lerp(s[1], 30, 42), _lerp(s[2], 30, 42), _lerp(s[3], 14, 28)
    pen.box(47, mast - 2, 50, 76, (120, 84, 52), line=0.8)
    pen.polygon([(52, mast), (52, 70), (52 + sail, 68)], "body")
    pen.polygon([(45, mast + 8), (45, 70), (45 - jib, 70)], "second")
    pen.polygon([(50 - hull - 4, 75), (50 + hull + 6, 75), (50 + hull - 8, 94), (50 - hull + 8, 94)], "body")
    pen.box(50 - hull - 4, 74, 50 + hull + 6, 79, "second", r=1.5)
    return Anchors((49, mast + 2, 21), (50, 73, 46), (62, 55, 11))


def _house(pen: Pen, s: tuple[float, ...]) -> Anchors:
    wide, wall, roof, eave = _lerp(s[0], 29, 37), _lerp(s[1], 42, 54), _lerp(s[2], 20, 32), _lerp(s[3], 4, 9)
    pen.box(50 + wide * 0.35, wall - roof * 0.95, 50 + wide * 0.35 + 9, wall - 4, (150, 86, 70))
    pen.box(50 - wide, wall - 2, 50 + wide, 96, "body")
    pen.polygon([(50 - wide - eave, wall), (50, wall - roof), (50 + wide + eave, wall)], "second")
    pen.box(50 - wide * 0.62, 73, 50 - wide * 0.62 + 15, 96, (112, 72, 44))
    pen.box(50 + wide * 0.1, wall + 10, 50 + wide * 0.1 + 17, wall + 25, (255, 236, 150))
    return Anchors((50, wall - roof + 1, 24), (50, wall + 3, 2 * wide * 0.9), (50, wall - roof * 0.38, 9))


def _robot(pen: Pen, s: tuple[float, ...]) -> Anchors:
    head, torso, arm, antenna = _lerp(s[0], 14, 19), _lerp(s[1], 18, 25), _lerp(s[2], 14, 26), _lerp(s[3], 4, 13)
    pen.stroke([(50, 20), (50, 16 - antenna)], INK, 2, edge=0)
    pen.ellipse(50, 15 - antenna, 3.4, 3.4, (240, 70, 60))
    for side in (-1, 1):
        x = 50 + side * (torso + 4.5)
        pen.box(x - 4.5, 50, x + 4.5, 52 + arm, "second", r=4)
        pen.box(50 + side * torso * 0.5 - 6, 80, 50 + side * torso * 0.5 + 6, 96, "second", r=2)
    pen.box(50 - torso, 47, 50 + torso, 84, "body", r=5)
    pen.box(50 - head, 18, 50 + head, 44, "second", r=5)
    for side in (-1, 1):
        pen.eye(50 + side * head * 0.45, 29, 4)
    pen.box(43, 36, 57, 40, (240, 240, 240), r=1, line=0.8)
    return Anchors((50, 19, 27), (50, 47, 34), (50, 66, 12))


def _mug(pen: Pen, s: tuple[float, ...]) -> Anchors:
    wide, top, handle, taper = _lerp(s[0], 22, 30), _lerp(s[1], 30, 46), _lerp(s[2], 12, 19), _lerp(s[3], 0, 7)
    mid = (top + 92) / 2
    xs = [46 + wide - 2, 46 + wide + handle, 46 + wide + handle, 46 + wide - 4]
    pen.stroke(list(zip(xs, (mid - 13, mid - 9, mid + 9, mid + 15), strict=True)), "second", 6)
    pen.polygon([(46 - wide, top), (46 + wide, top), (46 + wide - taper, 94), (46 - wide + taper, 94)], "body")
    pen.ellipse(46, top, wide, 6.5, "second")
    pen.ellipse(46, top + 0.8, wide * 0.8, 4.2, (84, 48, 30), line=0.6)
    for x in (38, 52):
        pen.stroke([(x, top - 9), (x + 3, top - 14), (x, top - 19)], (235, 235, 240), 2.2, edge=0.5)
    return Anchors((46, top - 3, 30), (46, top + 15, 2 * wide), (46, mid + 8, 13))


# --- accessories ---------------------------------------------------------------------------------


def _no_accessory(pen: Pen, anchors: Anchors) -> None:
    del pen, anchors


def _hat(pen: Pen, anchors: Anchors) -> None:
    x, y, w = anchors.hat
    y = max(y, 17)
    pen.box(x - w * 0.31, y - 15, x + w * 0.31, y + 2, INK, r=1.5)
    pen.box(x - w * 0.31, y - 4, x + w * 0.31, y - 0.5, (205, 50, 60), line=0)
    pen.box(x - w * 0.58, y - 0.5, x + w * 0.58, y + 3.8, INK, r=1.8)


def _scarf(pen: Pen, anchors: Anchors) -> None:
    x, y, w = anchors.neck
    red = (200, 36, 52)
    pen.box(x - w * 0.5, y - 3.6, x + w * 0.5, y + 3.6, red, r=3.4)
    pen.polygon([(x + w * 0.18, y), (x + w * 0.42, y), (x + w * 0.46, y + 17), (x + w * 0.2, y + 17)], red)
    pen.box(x + w * 0.19, y + 12, x + w * 0.46, y + 14, (250, 230, 220), line=0)


def _star(pen: Pen, anchors: Anchors) -> None:
    x, y, r = anchors.chest
    points = [
        (x + rr * math.sin(i * math.pi / 5), y - rr * math.cos(i * math.pi / 5))
        for i in range(10)
        for rr in ((r, r * 0.45)[i % 2],)
    ]
    pen.polygon(points, (255, 222, 60), line=1.6)


_DRAW: dict[str, Callable[[Pen, tuple[float, ...]], Anchors]] = {
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "fish": _fish,
    "teddy bear": _teddy_bear,
    "car": _car,
    "boat": _boat,
    "house": _house,
    "robot": _robot,
    "mug": _mug,
}
_ACCESSORY: dict[str, Callable[[Pen, Anchors], None]] = {
    "none": _no_accessory,
    "hat": _hat,
    "scarf": _scarf,
    "star": _star,
}
