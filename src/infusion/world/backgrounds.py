"""Paint the backgrounds of the world.

Every function takes a random generator and a side length in pixels and returns an RGB picture.
The horizon lies near 58 % of the height, so that subjects stand on the ground wherever they are placed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]


def paint_background(name: str, rng: np.random.Generator, side: int) -> Image.Image:
    """The background `name` of `vocabulary.BACKGROUNDS`, `side` x `side` RGB; details vary with `rng`."""
    return _PAINT[name](rng, side)


def _gradient(side: int, top: RGB, bottom: RGB) -> Image.Image:
    column = np.linspace(np.array(top, np.float32), np.array(bottom, np.float32), side)
    return Image.fromarray(np.broadcast_to(column[:, None], (side, side, 3)).astype(np.uint8), "RGB")


def _split(rng: np.random.Generator, side: int, sky: tuple[RGB, RGB], ground: tuple[RGB, RGB]) -> tuple:
    """Sky over ground; returns the picture, a pen and the horizon in pixels."""
    horizon = int(side * rng.uniform(0.53, 0.63))
    image = _gradient(side, *ground)
    image.paste(_gradient(side, *sky).resize((side, horizon)), (0, 0))
    return image, ImageDraw.Draw(image), horizon


def _beach(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((96, 176, 236), (196, 230, 250)), ((236, 210, 150), (222, 184, 116)))
    sea = int(h * 0.74)
    draw.rectangle((0, sea, side, h), fill=(34, 120, 190))
    draw.rectangle((0, h - side // 40, side, h), fill=(150, 210, 236))
    x, r = rng.uniform(0.1, 0.9) * side, side * 0.07
    draw.ellipse((x - r, sea * 0.42 - r, x + r, sea * 0.42 + r), fill=(255, 240, 120))
    return image


def _snow(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((168, 192, 222), (212, 224, 240)), ((240, 244, 252), (226, 234, 248)))
    for x in rng.uniform(0, side, 3):
        w, top = side * rng.uniform(0.22, 0.36), h - side * rng.uniform(0.16, 0.32)
        draw.polygon([(x - w, h), (x, top), (x + w, h)], fill=(150, 168, 200))
        draw.polygon([(x - w * 0.3, top + (h - top) * 0.3), (x, top), (x + w * 0.3, top + (h - top) * 0.3)], "white")
    for x, y in rng.uniform(0, side, (34, 2)):
        r = side * 0.009
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
    return image


def _forest(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((122, 178, 140), (168, 206, 160)), ((74, 116, 62), (52, 88, 46)))
    for x in np.sort(rng.uniform(-0.02, 1.02, 9)) * side:
        w, top = side * rng.uniform(0.07, 0.1), h - side * rng.uniform(0.36, 0.52)
        shade = int(rng.uniform(-12, 12))
        draw.rectangle((x - w * 0.16, h - side * 0.1, x + w * 0.16, h + side * 0.02), fill=(92, 62, 40))
        for i in range(3):
            y = top + (h - top) * 0.24 * i
            green = (24 + shade, 92 + shade, 48 + shade)
            draw.polygon(
                [(x - w * (0.6 + 0.2 * i), y + side * 0.17), (x, y), (x + w * (0.6 + 0.2 * i), y + side * 0.17)], green
            )
    return image


def _city(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((150, 162, 196), (206, 206, 216)), ((112, 112, 120), (86, 86, 94)))
    x = 0.0
    while x < side:
        w, top = side * rng.uniform(0.1, 0.18), h - side * rng.uniform(0.2, 0.5)
        tone = int(rng.uniform(72, 112))
        draw.rectangle((x, top, x + w - 2, h), fill=(tone, tone, tone + 26))
        step = side / 24
        for wy in np.arange(top + step * 0.6, h - step, step):
            for wx in np.arange(x + step * 0.5, x + w - step, step):
                if rng.random() < 0.55:
                    draw.rectangle((wx, wy, wx + step * 0.45, wy + step * 0.5), fill=(250, 224, 128))
        x += w
    y = (h + side) / 2 + side * 0.06
    for x in np.arange(0.05, 1, 0.25) * side:
        draw.rectangle((x, y, x + side * 0.12, y + side * 0.016), fill=(222, 216, 170))
    return image


def _desert(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((250, 196, 118), (254, 226, 170)), ((226, 166, 92), (202, 134, 66)))
    for x in rng.uniform(0, side, 2):
        w = side * rng.uniform(0.4, 0.6)
        draw.ellipse((x - w, h - side * 0.06, x + w, h + side * 0.2), fill=(216, 152, 80))
    for x in rng.uniform(0.05, 0.95, 2) * side:
        w, tall = side * 0.02, side * rng.uniform(0.18, 0.28)
        draw.rounded_rectangle((x - w, h - tall, x + w, h + side * 0.02), w, fill=(56, 128, 66))
        for s in (-1, 1):
            ax, y = x + s * side * 0.06, h - tall * rng.uniform(0.4, 0.6)
            draw.rectangle((min(x, ax), y, max(x, ax), y + w * 1.3), fill=(56, 128, 66))
            draw.rounded_rectangle(
                (ax - w * 0.7, y - tall * 0.3, ax + w * 0.7, y + w * 1.3), w * 0.6, fill=(56, 128, 66)
            )
    return image


def _space(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((14, 12, 44), (38, 22, 74)), ((128, 126, 138), (96, 94, 108)))
    for x, y in rng.uniform(0, 1, (30, 2)) * (side, h):
        r = side * rng.uniform(0.004, 0.01)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 230))
    x, y, r = rng.uniform(0.12, 0.88) * side, side * rng.uniform(0.1, 0.2), side * rng.uniform(0.07, 0.11)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(206, 118, 84))
    draw.line((x - 1.7 * r, y + r * 0.5, x + 1.7 * r, y - r * 0.5), fill=(240, 210, 160), width=max(2, side // 64))
    for x in rng.uniform(0, side, 4):
        y, r = rng.uniform(h + 0.06 * side, side), side * rng.uniform(0.03, 0.07)
        draw.ellipse((x - r, y - r * 0.35, x + r, y + r * 0.35), fill=(92, 90, 102))
    return image


def _room(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((226, 204, 182), (216, 190, 166)), ((150, 98, 62), (120, 74, 44)))
    draw.rectangle((0, h - side * 0.03, side, h), fill=(246, 238, 226))
    x, y, w = rng.uniform(0.08, 0.62) * side, side * rng.uniform(0.08, 0.14), side * 0.28
    draw.rectangle((x, y, x + w, y + w * 0.9), fill=(250, 246, 238))
    m = side * 0.025
    draw.rectangle((x + m, y + m, x + w - m, y + w * 0.9 - m), fill=(156, 206, 240))
    draw.line((x + w / 2, y, x + w / 2, y + w * 0.9), fill=(250, 246, 238), width=max(2, int(m)))
    for i in range(1, 4):
        yy = h + (side - h) * i / 4
        draw.line((0, yy, side, yy), fill=(108, 66, 40), width=max(1, side // 96))
    return image


def _meadow(rng: np.random.Generator, side: int) -> Image.Image:
    image, draw, h = _split(rng, side, ((110, 178, 244), (198, 226, 252)), ((124, 196, 84), (82, 158, 58)))
    for x in rng.uniform(0.05, 0.95, 2) * side:
        y = side * rng.uniform(0.1, 0.26)
        for dx, r in ((-0.06, 0.045), (0, 0.06), (0.065, 0.045)):
            cx, rr = x + dx * side, r * side
            draw.ellipse((cx - rr, y - rr * 0.8, cx + rr, y + rr * 0.8), fill=(252, 252, 255))
    colors = ((250, 240, 120), (250, 150, 180), (255, 255, 255))
    for i, (x, y) in enumerate(rng.uniform(0, 1, (16, 2)) * (side, side - h - side * 0.05) + (0, h + side * 0.03)):
        r = side * 0.012
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colors[i % 3])
    return image


_PAINT: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "space": _space,
    "room": _room,
    "meadow": _meadow,
}
