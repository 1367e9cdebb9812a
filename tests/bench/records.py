"""Records made by hand, small enough to count."""

from __future__ import annotations

READING = {
    "background": "snow", "style": "photo", "kind": "dog", "color1": "red", "color2": "blue", "pattern": "spotted", "accessory": "none",
    "position": "left", "like_subject": 0.8, "to_nearest_photo": 0.2,
}  # fmt: skip
SUBJECT = {
    "kind": "dog", "color1": "red", "color2": "blue", "pattern": "spotted", "accessory": "none", "position": "left",
}  # fmt: skip


def record(label: str, readings: list[dict], *, subject: int = 0, method: str | None = None, **point) -> dict:
    """A record of one point with one picture for each of two requests: snow and sketch in the city."""
    rows = [READING | r for r in readings]
    measured = {
        "step": 10, "samples": 80, "seconds": 3.0, "bytes": 100, "readings": rows, "prior_likeness": [0.1, 0.3],
        "forgetting": 0.0, "forgetting_class_word": 0.0, "w2": 1.0, "strip": None,
    }  # fmt: skip
    return {
        "job": {
            "label": label, "method": method or label, "settings": {}, "prior": 0, "split": "test", "subjects_seed": 0,
            "subject": subject, "modality": {"background": None, "style": "photo", "position": "center"}, "seed": 0,
            "points": [10], "batch": 8, "pictures": 1, "denoising_steps": 2,
        },
        "subject": SUBJECT | {"shape": [0.5] * 4},
        "trained": {"background": "beach", "style": "photo", "position": "center"},
        "requests": [
            {"prompt": "a photo of {}", "background": "snow", "style": "photo", "subjects": [SUBJECT]},
            {"prompt": "a sketch of {}", "background": "city", "style": "sketch",
             "subjects": [SUBJECT | {"color1": None, "color2": None, "position": None}]},
        ],
        "points": [measured | point],
        "seconds": 5.0,
        "threads": 1,
        "base": "abc",
    }  # fmt: skip


FLOOR = record("class-word", [{}, {"background": "city", "style": "sketch"}], step=0, samples=0)
LEAKY = record(
    "dreambooth",
    [{"background": "beach", "position": "center", "color2": None, "to_nearest_photo": 0.1},
     {"background": "beach", "style": "photo", "pattern": "plain", "to_nearest_photo": 0.1}],
    forgetting=0.02, prior_likeness=[0.5, 0.3],
)  # fmt: skip
