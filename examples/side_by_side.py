"""Several users' subjects learned side by side and drawn in one batch: python examples/side_by_side.py milo:dog:PHOTOS rex:cat:PHOTOS"""

from __future__ import annotations

import sys
from pathlib import Path

import infusion
from infusion.lesson import prepare_lesson
from infusion.photos import load_photos


def main(subjects: list[tuple[str, str, Path]], out: Path = Path("outputs/example"), steps: int = 200) -> list[Path]:
    """Learn every (name, class word, folder of photos) in one training, save a file each, draw each in the snow; returns the pictures' paths."""
    pipe = infusion.load_base()
    lessons = [prepare_lesson(pipe, load_photos(folder), word, name) for name, word, folder in subjects]
    config = infusion.LearnConfig(steps=steps)
    *_, last = infusion.learning_together(pipe, lessons, config)
    concepts = [state.concept for state in last]
    for concept in concepts:
        concept.save(out / f"{concept.name}.safetensors")
    with infusion.attach(pipe, *concepts):  # rows of one batch, each with a concept of its own
        images = pipe([f"a photo of a <{c.name}> in the snow" for c in concepts], num_inference_steps=25).images
    paths = [out / f"{concept.name}.png" for concept in concepts]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


if __name__ == "__main__":
    given = [argument.split(":", 2) for argument in sys.argv[1:]]
    print(*main([(name, word, Path(folder)) for name, word, folder in given]), sep="\n")
