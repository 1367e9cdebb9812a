"""Scenes with their truth: what is where, drawn from a seed.

Data flow: `random_scene(rng)` or your own `Scene` -> `render(scene)` -> `Rendered` (picture and truth).
The same `Scene` always gives the same pixels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from infusion.world.backgrounds import paint_background
from infusion.world.styles import apply_style
from infusion.world.subjects import Subject, draw_subject, random_subject
from infusion.world.vocabulary import BACKGROUNDS, POSITIONS, STYLES

SIDE = 64  # pixels a side of a scene
SUPER = 3  # supersampling: scenes are drawn at SIDE * SUPER and box-averaged
STYLE_SHARES = (0.48, 0.13, 0.13, 0.13, 0.13)  # photo first, as in STYLES
GROUND = 0.90  # where feet stand, in the frame


@dataclass(frozen=True)
class Placed:
    """A subject in a scene: centre `x` and foot line `y` in [0, 1], `size` as a share of the frame,
    `mirror` (faces left) and `tilt` in degrees."""

    subject: Subject
    x: float
    y: float = GROUND
    size: float = 0.55
    mirror: bool = False
    tilt: float = 0.0

    @property
    def position(self) -> str:
        """ "left", "center" or "right": the third of the frame that holds the centre."""
        return POSITIONS[min(2, int(self.x * 3))]


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. `seed` varies the background's details."""

    subjects: tuple[Placed, ...]
    background: str
    style: str = "photo"
    seed: int = 0


@dataclass(frozen=True)
class Rendered:
    """A drawn scene: `pixels` (SIDE, SIDE, 3) uint8 and, per subject in the scene's order, its visible
    alpha `masks` (n, SIDE, SIDE) float32 in [0, 1] and `boxes` (x0, y0, x1, y1) in pixels."""

    scene: Scene
    pixels: np.ndarray
    masks: np.ndarray
    boxes: tuple[tuple[int, int, int, int], ...]


def render(scene: Scene) -> Rendered:
    """Draw a scene with its truth. Raises ValueError for a background or style the world does not have."""
    if scene.background not in BACKGROUNDS:
        raise ValueError(f"{scene.background!r} is no background; use one of {', '.join(BACKGROUNDS)}.")
    if scene.style not in STYLES:
        raise ValueError(f"{scene.style!r} is no style; use one of {', '.join(STYLES)}.")
    side = SIDE * SUPER
    canvas = paint_background(scene.background, np.random.default_rng(scene.seed), side)
    alphas: list[np.ndarray] = []
    for placed in scene.subjects:
        sprite, corner = _sprite(placed, side)
        _shadow(canvas, placed, side)
        canvas.paste(sprite, corner, sprite)
        full = Image.new("L", (side, side), 0)
        full.paste(sprite.getchannel("A"), corner)
        alpha = np.asarray(full, np.float32) / 255
        alphas = [a * (1 - alpha) for a in alphas] + [alpha]
    pixels = apply_style(scene.style, np.asarray(canvas, np.float32) / 255, SIDE)
    masks = (
        np.stack(alphas).reshape(-1, SIDE, SUPER, SIDE, SUPER).mean(axis=(2, 4))
        if alphas
        else np.zeros((0, SIDE, SIDE))
    )
    return Rendered(
        scene,
        np.round(pixels * 255).astype(np.uint8),
        masks.astype(np.float32),
        tuple(_box(m) for m in masks),
    )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of one to three subjects, drawn from the world's own shares (one 64 %, two 28 %, three 8 %)."""
    count = int(rng.choice((1, 2, 3), p=(0.64, 0.28, 0.08)))
    subjects = [random_subject(rng)]
    while len(subjects) < count:
        other = random_subject(rng)
        if other.kind not in {s.kind for s in subjects} or rng.random() < 0.15:
            subjects.append(other)
    return Scene(
        subjects=place(subjects, rng),
        background=str(rng.choice(BACKGROUNDS)),
        style=str(rng.choice(STYLES, p=STYLE_SHARES)),
        seed=int(rng.integers(2**31)),
    )


def never_seen(kind: str, color1: str | None, background: str, style: str) -> bool:
    """True for combinations that the base's training never sees: about one in twelve of class x background x style, and one in sixteen of
    class x first colour x background; the latter only where a colour is given.

    Fixed by a checksum of the names, so that it never changes with a seed or a version.
    """
    held = zlib.crc32(f"{kind}|{background}|{style}".encode()) % 12 == 0
    return held or (color1 is not None and zlib.crc32(f"{kind}|{color1}|{background}".encode()) % 16 == 0)


def held_out(scene: Scene) -> bool:
    """Whether any of the scene's subjects is in a combination that is `never_seen`; none such is drawn for training."""
    return any(never_seen(p.subject.kind, p.subject.color1, scene.background, scene.style) for p in scene.subjects)


def place(subjects: list[Subject], rng: np.random.Generator) -> tuple[Placed, ...]:
    """Put one to three subjects side by side, without overlap that hides one, in random pose."""
    n = len(subjects)
    if n == 1:
        slots, sizes = [(0.21, 0.5, 0.79)[int(rng.integers(3))]], (0.46, 0.62)
    elif n == 2:
        slots, sizes = ([0.25, 0.75], [0.24, 0.55], [0.45, 0.78])[int(rng.choice(3, p=(0.7, 0.15, 0.15)))], (0.38, 0.46)
    else:
        slots, sizes = [0.18, 0.5, 0.82], (0.30, 0.34)
    return tuple(
        Placed(
            subject,
            x=float(np.clip(slot + rng.uniform(-0.04, 0.04), 0.15, 0.85)),
            y=float(GROUND + rng.uniform(-0.10, 0.05)),
            size=float(rng.uniform(*sizes)),
            mirror=bool(rng.random() < 0.5),
            tilt=float(rng.uniform(-7, 7)),
        )
        for subject, slot in zip(subjects, slots, strict=True)
    )


def few_modalities(
    subject: Subject,
    count: int,
    seed: int,
    background: str,
    style: str = "photo",
    position: str = "center",
    facing: str | None = None,
) -> list[Scene]:
    """`count` scenes of one subject confined to one background, style and place, as users' photos are; with `facing`, "left" or "right", the
    subject faces that way in all.

    Only small changes of pose and size remain between them.
    """
    rng = np.random.default_rng(seed)
    x = {"left": 0.24, "center": 0.5, "right": 0.76}[position]
    return [
        Scene(
            (
                Placed(
                    subject,
                    x=float(x + rng.uniform(-0.03, 0.03)),
                    y=float(GROUND + rng.uniform(-0.04, 0.02)),
                    size=float(rng.uniform(0.52, 0.62)),
                    mirror={None: bool(rng.random() < 0.5), "left": True, "right": False}[facing],
                    tilt=float(rng.uniform(-5, 5)),
                ),
            ),
            background=background,
            style=style,
            seed=int(rng.integers(2**31)),
        )
        for _ in range(count)
    ]


def with_subject(scene: Scene, index: int, **changes: object) -> Scene:
    """The scene with fields of the subject at `index` replaced: `with_subject(scene, 0, color1="red")`."""
    placed = scene.subjects[index]
    new = replace(placed, subject=replace(placed.subject, **changes))
    return replace(scene, subjects=(*scene.subjects[:index], new, *scene.subjects[index + 1 :]))


def _sprite(placed: Placed, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The posed subject at its size and the corner to paste it at."""
    sprite = draw_subject(placed.subject)
    if placed.mirror:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = max(8, round(placed.size * side))
    sprite = sprite.rotate(placed.tilt, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
    return sprite, (round(placed.x * side - size / 2), round(placed.y * side - size * 0.96))


def _shadow(canvas: Image.Image, placed: Placed, side: int) -> None:
    w, h = placed.size * side * 0.42, placed.size * side * 0.055
    x, y = placed.x * side, placed.y * side
    mask = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(mask).ellipse((x - w, y - h, x + w, y + h), fill=92)
    canvas.paste((20, 20, 30), (0, 0), mask.filter(ImageFilter.BoxBlur(3)))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask > 0.5)
    if len(xs) == 0:
        return 0, 0, 0, 0
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
