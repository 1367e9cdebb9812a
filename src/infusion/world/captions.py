"""Captions of scenes: from full to sparse, with synonyms and changing word order.

A caption remembers which words name which subject, so that attention maps can be held to the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infusion.world.scenes import Placed, Scene
from infusion.world.vocabulary import (
    ACCESSORY_PHRASES,
    BACKGROUND_PHRASES,
    CLASS_WORDS,
    PATTERN_WORDS,
    POSITION_PHRASES,
    STYLE_PREFIXES,
    STYLE_SUFFIXES,
)


@dataclass(frozen=True)
class Caption:
    """`text`, and for each subject of the scene the character span (start, end) of its class word;
    None for a subject that the caption leaves out."""

    text: str
    spans: tuple[tuple[int, int] | None, ...]


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption of the scene. How much it tells is drawn anew at every call."""
    detail = float(rng.choice((0.25, 0.6, 0.95), p=(0.25, 0.4, 0.35)))
    if len(scene.subjects) > 1:
        detail = min(detail, 0.7)

    phrases = [
        _subject_phrase(p, detail / len(scene.subjects) ** 0.5, len(scene.subjects), rng) for p in scene.subjects
    ]
    order = rng.permutation(len(phrases))
    joiner = str(rng.choice((" and ", " next to ", " and "), p=(0.5, 0.25, 0.25)))
    text, spans = "", [None] * len(phrases)
    for i, j in enumerate(order):
        text += joiner if i else ""
        phrase, (start, end) = phrases[j]
        spans[j] = (len(text) + start, len(text) + end)
        text += phrase

    style_named = scene.style != "photo" or rng.random() < 0.4
    style_last = style_named and rng.random() < 0.25
    if rng.random() < 0.9:
        where = pick(BACKGROUND_PHRASES[scene.background], rng)
        if rng.random() < 0.12 and (style_last or not style_named):
            text, spans = _prepend(f"{where}, ", text, spans)
        else:
            text += f" {where}"
    if style_last:
        text += f" {pick(STYLE_SUFFIXES[scene.style], rng)}"
    elif style_named:
        text, spans = _prepend(f"{pick(STYLE_PREFIXES[scene.style], rng)} ", text, spans)
    return Caption(text, tuple(spans))


def _subject_phrase(placed: Placed, detail: float, count: int, rng: np.random.Generator) -> tuple[str, tuple[int, int]]:
    """Words for one subject and the span of its class word in them."""
    s = placed.subject
    words = CLASS_WORDS[s.kind]
    noun = words[0] if len(words) == 1 or rng.random() < 0.75 else words[1]
    adjectives = []
    if rng.random() < detail:
        patterned = s.pattern != "plain"
        colors = f"{s.color1} and {s.color2}" if patterned and rng.random() < 0.5 else s.color1
        if rng.random() < (0.75 if patterned else 0.15):
            pattern = pick(PATTERN_WORDS[s.pattern], rng)
            adjectives = [pattern, colors] if rng.random() < 0.7 else [colors, pattern]
        else:
            adjectives = [colors]
    elif rng.random() < detail * 0.4:
        adjectives = [pick(PATTERN_WORDS[s.pattern], rng)]
    article = str(rng.choice(("a", "the", ""), p=(0.74, 0.14, 0.12)))
    first = (*adjectives, noun)[0]
    if article == "a" and first[0] in "aeiou":
        article = "an"
    lead = " ".join(w for w in (article, *adjectives) if w)
    start = len(lead) + (1 if lead else 0)
    phrase = f"{lead} {noun}" if lead else noun
    if s.accessory != "none" and rng.random() < detail:
        phrase += f" {pick(ACCESSORY_PHRASES[s.accessory], rng)}"
    if rng.random() < (0.45 if count == 1 else 0.3):
        phrase += f" {pick(POSITION_PHRASES[placed.position], rng)}"
    return phrase, (start, start + len(noun))


def pick(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    """The canonical phrase half of the time, else any."""
    return phrases[0] if rng.random() < 0.5 else phrases[int(rng.integers(len(phrases)))]


def _prepend(head: str, text: str, spans: list) -> tuple[str, list]:
    return head + text, [None if s is None else (s[0] + len(head), s[1] + len(head)) for s in spans]
