"""The benchmark's subjects, photos and prompts: all drawn from (split, seed, number), so that anyone can draw others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from infusion.errors import InfusionError
from infusion.photos import Photo
from infusion.world.facing import ONE_SIDED
from infusion.world.requests import Request, Wanted, phrase
from infusion.world.scenes import few_modalities, render
from infusion.world.subjects import Subject, random_subject
from infusion.world.truth import NONE, SUBJECT_HEADS, visible
from infusion.world.vocabulary import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    CLASSES,
    POSITION_PHRASES,
    POSITIONS,
    STYLE_PREFIXES,
    STYLES,
)

PHOTOS = 4
_SPLIT = {"dev": 1, "test": 2}


@dataclass(frozen=True)
class Case:
    """One subject with what its photos have in common."""

    subject: Subject
    background: str
    style: str
    position: str
    seed: int
    facing: str | None = None

    @property
    def trained(self) -> dict[str, str]:
        """What its photos have in common, by name."""
        common = {"background": self.background, "style": self.style, "position": self.position}
        return common | ({"facing": self.facing} if self.facing else {})

    def photos(self) -> list[Photo]:
        """Its PHOTOS photos."""
        scenes = few_modalities(
            self.subject, PHOTOS, self.seed, self.background, self.style, self.position, self.facing
        )
        return [Photo(Image.fromarray(render(scene).pixels)) for scene in scenes]

    def described(self) -> str:
        """The subject in the words that the base knows, without its place."""
        s = self.subject
        accessory = None if s.accessory == "none" else s.accessory
        return phrase(Wanted(s.kind, s.color1, s.color2, s.pattern, accessory))


def case(
    split: str,
    subjects_seed: int,
    number: int,
    background: str | None,
    style: str,
    position: str,
    facing: str | None = None,
) -> Case:
    """Subject `number`; classes and, where `background` is None, backgrounds take turns. Raises InfusionError for a facing of a class that has
    no side."""
    rng = np.random.default_rng((subjects_seed, _SPLIT[split], number))
    subject = random_subject(rng, CLASSES[number % len(CLASSES)])
    if facing and subject.kind not in ONE_SIDED:
        raise InfusionError(
            f"Subject {number} is a {subject.kind}, which faces neither way; with a facing give numbers of a {', '.join(ONE_SIDED)}."
        )
    place = background or BACKGROUNDS[(number + 3 * (number // len(CLASSES))) % len(BACKGROUNDS)]
    return Case(subject, place, style, position, int(rng.integers(2**31)), facing)


def requests(case: Case, split: str) -> list[Request]:
    """Fourteen prompts with "{}" for the subject, each asking for another background than the photos', half of them for another
    style, two thirds for another position; with what a picture must show to be right, the subject's own attributes included.

    The splits word them differently.
    """
    others = [b for b in BACKGROUNDS if b != case.background]
    styles = [s for s in STYLES if s != case.style]
    positions = [None, *(p for p in POSITIONS if p != case.position)]
    wording = 0 if split == "test" else 1
    found = []
    for i in range(2 * len(others)):
        background, position = others[i % len(others)], positions[i % 3]
        style = case.style if i % 2 == 0 else styles[i // 2 % len(styles)]
        where = f" {POSITION_PHRASES[position][wording]}" if position else ""
        text = f"{STYLE_PREFIXES[style][wording]} {{}}{where} {BACKGROUND_PHRASES[background][wording]}"
        found.append(Request(text, background, style, (_wanted(case.subject, style, position),)))
    return found


def _wanted(subject: Subject, style: str, position: str | None) -> Wanted:
    """All attributes that the style shows."""
    shown = {n: SUBJECT_HEADS[n][i] if i != NONE else None for n, i in visible(subject, style).items()}
    return replace(Wanted(subject.kind), **shown, position=position)
