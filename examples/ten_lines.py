"""The README's ten lines: learn a concept from a folder of photos and draw it. Run: python examples/ten_lines.py PHOTOS"""

from __future__ import annotations

import sys
from pathlib import Path

import infusion


def main(photos: Path, out: Path = Path("outputs/example"), steps: int = 200) -> Path:
    """Learn the dog in `photos`, draw it in the snow; returns the picture's path."""
    pipe = infusion.load_base()  # or a folder, a .safetensors checkpoint, a hub id
    config = infusion.LearnConfig(steps=steps)
    milo = infusion.learn(pipe, photos, word="dog", name="milo", config=config)
    milo.save(out / "milo.safetensors")
    with infusion.attach(pipe, milo):
        image = pipe("a photo of a <milo> in the snow", num_inference_steps=25).images[0]
    image.save(out / "milo-in-the-snow.png")
    return out / "milo-in-the-snow.png"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
