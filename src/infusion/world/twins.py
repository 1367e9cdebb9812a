"""Pictures for the judge: families of one individual, seen twice, and its twin that differs in one attribute, seen twice.

Family `i` depends on (seed, i) alone. Every picture is a scene like any other, with other subjects beside now and
then; its truth is kept per subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from infusion.world.arrays import draw_arrays, load_arrays, stacked
from infusion.world.judge import GRID
from infusion.world.scenes import SIDE, Rendered, Scene, random_scene, render, with_subject
from infusion.world.subjects import Subject, random_subject
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS, scene_labels, visible

VIEWS = 4  # pictures of a family: the individual twice, its twin twice
MAX_SUBJECTS = 3
CHANGES = ("color1", "color2", "pattern", "accessory", "shape")


@dataclass(frozen=True)
class Families:
    """Arrays over n = VIEWS x families pictures, memory-mapped.

    pixels (n, SIDE, SIDE, 3) uint8. subject (n, MAX_SUBJECTS, heads) int16: names by their place in `SUBJECT_HEADS`, NONE
    where there is no subject or the style does not show it. scene (n, heads) int16. centre (n, MAX_SUBJECTS, 2) float32: x and
    y in cells. change (n,) int16: in what the family's twin differs. The family's individual is subject 0 of each picture.
    """

    pixels: np.ndarray
    subject: np.ndarray
    scene: np.ndarray
    centre: np.ndarray
    change: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


def family(seed: int, index: int) -> tuple[list[Scene], str]:
    """The four scenes of a family, and the attribute in which its twin differs."""
    rng = np.random.default_rng((seed, 11, index))
    individual = random_subject(rng)
    change = str(rng.choice(CHANGES))
    twin = twin_of(individual, change, rng)
    return [_with_first(random_scene(rng), s) for s in (individual, individual, twin, twin)], change


def twin_of(subject: Subject, change: str, rng: np.random.Generator) -> Subject:
    """The subject with another value of the one attribute `change`."""
    while True:
        other = random_subject(rng, subject.kind)
        value = getattr(other, change)
        colors = {subject.color1, subject.color2}
        if value != getattr(subject, change) and not (change in ("color1", "color2") and value in colors):
            return replace(subject, **{change: value})


def tellable(scene: Scene, index: int, head: str, pixels: np.ndarray) -> bool:
    """Whether the picture of the scene, `pixels`, shows the attribute `head` of its subject `index` at all: with any other
    value it would look otherwise (`differs`)."""
    now = getattr(scene.subjects[index].subject, head)
    for value in SUBJECT_HEADS[head]:
        if value != now and not differs(render(with_subject(scene, index, **{head: value})).pixels, pixels):
            return False
    return True


def differs(a: np.ndarray, b: np.ndarray, least: float = 0.06) -> bool:
    """Whether two pictures (SIDE, SIDE, 3) uint8 differ by at least `least` of full brightness, on average over some 4x4 pixels: less does
    not show."""
    difference = np.abs(a.astype(np.float32) - b).mean(-1) / 255
    return bool(difference.reshape(SIDE // 4, 4, SIDE // 4, 4).mean((1, 3)).max() >= least)


def build_families(
    folder: Path, count: int, seed: int, workers: int | None = None, strict: bool = False
) -> Iterator[int]:
    """Draw `count` families into `folder`, yielding how many are done. Does nothing where they exist. strict: attributes that a
    picture does not show (`tellable`) are NONE, which takes many renderings a picture."""
    return draw_arrays(folder, _LAYOUT, count, partial(_draw, seed, strict=strict), VIEWS, workers)


def load_families(folder: Path) -> Families:
    """The families drawn into `folder` by `build_families`."""
    return Families(**load_arrays(folder, _LAYOUT))


def truth(drawn: Rendered) -> dict[str, np.ndarray]:
    """The arrays of `Families` for one picture, without `change`."""
    scene = drawn.scene
    subject = np.full((MAX_SUBJECTS, len(SUBJECT_HEADS)), NONE, np.int16)
    centre = np.full((MAX_SUBJECTS, 2), np.nan, np.float32)
    for s, (placed, mask) in enumerate(zip(scene.subjects, drawn.masks, strict=True)):
        if mask.sum() < 12:  # hidden behind another
            continue
        subject[s] = list(visible(placed.subject, scene.style).values())
        ys, xs = np.mgrid[0:SIDE, 0:SIDE] + 0.5
        centre[s] = np.array([(mask * xs).sum(), (mask * ys).sum()]) / mask.sum() * GRID / SIDE
    names = scene_labels(scene)
    return {"pixels": drawn.pixels, "subject": subject, "scene": np.array(names, np.int16), "centre": centre}


_LAYOUT = {
    "pixels": (np.uint8, (SIDE, SIDE, 3)),
    "subject": (np.int16, (MAX_SUBJECTS, len(SUBJECT_HEADS))),
    "scene": (np.int16, (len(SCENE_HEADS),)),
    "centre": (np.float32, (MAX_SUBJECTS, 2)),
    "change": (np.int16, ()),
}


def _hide(told: dict[str, np.ndarray], drawn: Rendered) -> None:
    """Set to NONE what the picture does not show."""
    for s, row in enumerate(told["subject"][: len(drawn.scene.subjects)]):
        for h, head in enumerate(SUBJECT_HEADS):
            if row[h] != NONE and not tellable(drawn.scene, s, head, drawn.pixels):
                row[h] = NONE


def _draw(seed: int, start: int, count: int, strict: bool) -> dict[str, np.ndarray]:
    rows: dict[str, list] = {name: [] for name in _LAYOUT}
    for index in range(start, start + count):
        scenes, change = family(seed, index)
        for scene in scenes:
            drawn = render(scene)
            told = truth(drawn)
            if strict:
                _hide(told, drawn)
            for name, value in told.items():
                rows[name].append(value)
            rows["change"].append(CHANGES.index(change))
    return stacked(rows, _LAYOUT)


def _with_first(scene: Scene, subject: Subject) -> Scene:
    first, *others = scene.subjects
    return replace(scene, subjects=(replace(first, subject=subject), *others))
