"""Prompts for combinations that the base's training never saw, or does see, each with what a picture must show to follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from infusion.world.captions import pick
from infusion.world.scenes import Placed, Scene, held_out, never_seen, random_scene
from infusion.world.truth import COLORED
from infusion.world.vocabulary import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    CLASS_WORDS,
    PATTERN_WORDS,
    POSITION_PHRASES,
    STYLE_PREFIXES,
)


@dataclass(frozen=True)
class Wanted:
    """What the prompt says of one subject; None where it says nothing."""

    kind: str
    color1: str | None = None
    color2: str | None = None
    pattern: str | None = None
    accessory: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for; `subjects` in the prompt's order."""

    prompt: str
    background: str
    style: str
    subjects: tuple[Wanted, ...]


def unseen_requests(count: int, seed: int, subjects: int = 1) -> list[Request]:
    """Requests for held-out combinations, those of `unseen_scenes`."""
    return [request for _, request in unseen_scenes(count, seed, subjects)]


def unseen_scenes(count: int, seed: int, subjects: int = 1) -> list[tuple[Scene, Request]]:
    """Scenes, each with a request whose words alone ask for a combination that is `scenes.never_seen`, with one or two `subjects` of
    different classes.

    Of a single subject the prompt names the colours, where its style shows any, half of the time, the pattern half of
    the time, an accessory where there is one, and the position half of the time. Of two it names one colour each.
    """
    rng = np.random.default_rng((seed, subjects))
    found: list[tuple[Scene, Request]] = []
    while len(found) < count:
        scene = random_scene(rng)
        kinds = {p.subject.kind for p in scene.subjects}
        if len(scene.subjects) == subjects == len(kinds) and held_out(scene):
            request = _request(scene, rng)
            if any(never_seen(s.kind, s.color1, request.background, request.style) for s in request.subjects):
                found.append((scene, request))
    return found


def seen_request(rng: np.random.Generator) -> Request:
    """A request for one or two subjects of different classes in a combination that training sees, worded with synonyms as captions are. Of
    one subject it names colours and pattern in 60 % each, an accessory in 80, the position in 40; of two colours in 80, an accessory
    in 20, the position in 15, a pattern in 10."""
    while True:
        scene = random_scene(rng)
        kinds = {p.subject.kind for p in scene.subjects}
        if len(kinds) == len(scene.subjects) <= 2 and not held_out(scene):
            break
    shares = (0.6, 0.6, 0.4, 0.8) if len(scene.subjects) == 1 else (0.8, 0.1, 0.15, 0.2)
    colored = scene.style in COLORED
    subjects = []
    for placed in scene.subjects:
        color, pattern, position, accessory = rng.random(4) < shares
        subjects.append(_wanted(placed, colored and color, pattern, position, accessory))
    return _worded(scene, tuple(subjects), rng)


def _request(scene: Scene, rng: np.random.Generator) -> Request:
    colored = scene.style in COLORED
    placed, *others = scene.subjects
    if others:
        return _worded(
            scene, tuple(Wanted(p.subject.kind, p.subject.color1 if colored else None) for p in scene.subjects)
        )
    names_color, names_pattern, names_position = rng.random(3) < 0.5
    return _worded(scene, (_wanted(placed, colored and names_color, names_pattern, names_position),))


def _wanted(placed: Placed, color: bool, pattern: bool, position: bool, accessory: bool = True) -> Wanted:
    s = placed.subject
    return Wanted(
        s.kind,
        color1=s.color1 if color else None,
        color2=s.color2 if color and pattern and s.pattern != "plain" else None,
        pattern=s.pattern if pattern else None,
        accessory=s.accessory if accessory and s.accessory != "none" else None,
        position=placed.position if position else None,
    )


def _worded(scene: Scene, subjects: tuple[Wanted, ...], rng: np.random.Generator | None = None) -> Request:
    say = _first if rng is None else partial(pick, rng=rng)
    text = " and ".join(phrase(s, say) for s in subjects)
    text = f"{say(STYLE_PREFIXES[scene.style])} {text} {say(BACKGROUND_PHRASES[scene.background])}"
    return Request(text, scene.background, scene.style, subjects)


def _first(phrases: Sequence[str]) -> str:
    return phrases[0]


def phrase(wanted: Wanted, say: Callable[[tuple[str, ...]], str] = _first) -> str:
    """The words for one subject: "a spotted purple and yellow dog with a hat on the left". say: which of several phrases for one thing."""
    pattern = say(PATTERN_WORDS[wanted.pattern]) if wanted.pattern else None
    colors = " and ".join(c for c in (wanted.color1, wanted.color2) if c)
    words = [w for w in (pattern, colors, say(CLASS_WORDS[wanted.kind])) if w]
    text = f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
    if wanted.accessory:
        text += f" {say(ACCESSORY_PHRASES[wanted.accessory])}"
    return text + (f" {say(POSITION_PHRASES[wanted.position])}" if wanted.position else "")
