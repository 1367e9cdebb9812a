"""What can be told from a picture: the attributes of a subject and of a scene, and which of them a style shows."""

from __future__ import annotations

from infusion.world.subjects import Subject
from infusion.world.vocabulary import ACCESSORIES, BACKGROUNDS, CLASSES, COLORS, PATTERNS, STYLES

SUBJECT_HEADS: dict[str, tuple[str, ...]] = {
    "kind": CLASSES,
    "color1": tuple(COLORS),
    "color2": tuple(COLORS),
    "pattern": PATTERNS,
    "accessory": ACCESSORIES,
}
# Shares of each name in the world, as `subjects.random_subject` draws them. What a caption leaves open may be likelier: an accessory is named
# only where there is one (`captions.py`), so that of scenes told by class and background alone 53 % have none.
SHARES: dict[str, tuple[float, ...]] = {
    "kind": (1 / len(CLASSES),) * len(CLASSES),
    "color1": (1 / len(COLORS),) * len(COLORS),
    "color2": (1 / len(COLORS),) * len(COLORS),
    "pattern": (1 / len(PATTERNS),) * len(PATTERNS),
    "accessory": (0.4, 0.2, 0.2, 0.2),
}
ATTRIBUTES = tuple(name for name in SUBJECT_HEADS if name != "kind")
SCENE_HEADS: dict[str, tuple[str, ...]] = {"background": BACKGROUNDS, "style": STYLES}
TEXT = ("background", "style", "position")  # what a prompt says of a picture beside its subject
COLORED = ("photo", "neon", "pixel art")  # styles that show colours
NONE = -1


def scene_labels(scene: object) -> list[int]:
    """Background and style of a scene, or of a request for one, by their place in each head."""
    return [values.index(getattr(scene, head)) for head, values in SCENE_HEADS.items()]


def visible(subject: Subject, style: str) -> dict[str, int]:
    """The subject's names by their place in each head; NONE for colours in styles without any, and for a pattern whose
    two colours are one grey in sepia, where plain and striped look the same."""
    names = {head: values.index(getattr(subject, head)) for head, values in SUBJECT_HEADS.items()}
    if style not in COLORED:
        names["color1"] = names["color2"] = NONE
    if style == "sepia" and _contrast(subject) < 0.08:
        names["pattern"] = NONE
    return names


def _contrast(subject: Subject) -> float:
    grey = [
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), COLORS[n], strict=True))
        for n in (subject.color1, subject.color2)
    ]
    return abs(grey[0] - grey[1]) / 255
