"""What a reading of a picture says about its request: the judge's answers beside what was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from infusion.world.judge import Reading, SubjectReading
from infusion.world.requests import Request, Wanted
from infusion.world.truth import COLORED, SCENE_HEADS
from infusion.world.vocabulary import BACKGROUND_PHRASES, POSITION_PHRASES, STYLE_PREFIXES, STYLE_SUFFIXES, STYLES

SUBJECT = ("kind", "color1", "color2", "pattern", "accessory", "position")


def meant(reading: Reading, kind: str | None = None) -> SubjectReading | None:
    """The surest subject of the class `kind`, else the surest of all: in a picture of two not the other one. None where there is none."""
    of_kind = (s for s in reading.subjects if kind is not None and s.kind == kind)
    return next(of_kind, next(iter(reading.subjects), None))


def shown(reading: Reading, kind: str | None = None) -> dict[str, str | None]:
    """Background, style, and the attributes and facing of the subject that is `meant`; None for what cannot be told or is not there."""
    first = meant(reading, kind)
    values = {name: getattr(reading, name) for name in SCENE_HEADS}
    return values | {name: getattr(first, name) if first else None for name in (*SUBJECT, "facing")}


def in_words(reading: Reading) -> str:
    """The reading as a caption: "dog purple yellow spotted, left; beach, sketch"; what cannot be told is left out."""
    said = [
        " ".join(v for v in (s.kind, s.color1, s.color2, s.pattern) if v)
        + (f" {s.accessory}" if s.accessory not in (None, "none") else "")
        + f", {s.position}"
        for s in reading.subjects
    ]
    scene = ", ".join(v for v in (reading.background, reading.style) if v)
    return "; ".join(v for v in (*said, scene) if v)


def asked(request: Request) -> dict[str, str | None]:
    """What the request wants of a single subject and its scene; None where it leaves that open or the style hides it."""
    (wanted,) = request.subjects
    colors = request.style in COLORED
    values = {name: getattr(request, name) for name in SCENE_HEADS}
    return values | {
        name: getattr(wanted, name) if colors or not name.startswith("color") else None for name in SUBJECT
    }


def asked_in(prompt: str) -> dict[str, str | None]:
    """Background, style and position that a prompt's words ask for, None for what they leave open. A prompt without a style asks for
    none, though the world takes it for a photo."""
    text = re.sub(r"\W+", " ", f" {prompt.lower()} ")
    phrases = {
        "background": BACKGROUND_PHRASES,
        "style": {s: (*STYLE_PREFIXES[s], *STYLE_SUFFIXES[s]) for s in STYLES},
        "position": POSITION_PHRASES,
    }
    found = {name: _longest(text, meanings) for name, meanings in phrases.items()}
    others = {style: said for style, said in phrases["style"].items() if style != "photo"}
    return found | {"style": _longest(text, others) or found["style"]}  # "a photo of a dog in sepia"


def _longest(text: str, meanings: Mapping[str, Sequence[str]]) -> str | None:
    """The meaning of the longest phrase that the text holds as whole words."""
    found = [(len(p), meaning) for meaning, phrases in meanings.items() for p in phrases if f" {p} " in text]
    return max(found)[1] if found else None


def answers(request: Request, reading: Reading) -> dict[str, bool]:
    """Right or wrong for everything that the request asks of one subject; what cannot be told is wrong."""
    told = shown(reading)
    return {name: told[name] == value for name, value in asked(request).items() if value is not None}


def both(request: Request, reading: Reading) -> dict[str, bool]:
    """Of a request with two subjects of different classes: whether both are there, and each in its own colour."""
    pairs = [_find(wanted, reading.subjects) for wanted in request.subjects]
    right = {"both": all(found is not None for found in pairs)}
    if all(wanted.color1 for wanted in request.subjects):
        right["own colors"] = all(
            found is not None and found.color1 == wanted.color1
            for found, wanted in zip(pairs, request.subjects, strict=True)
        )
    return right


def _find(wanted: Wanted, subjects: Sequence[SubjectReading]) -> SubjectReading | None:
    return next((s for s in subjects if s.kind == wanted.kind), None)
