"""Several concepts in one picture, with strengths: python examples/composing.py milo.safetensors rex.safetensors"""

from __future__ import annotations

import sys
from pathlib import Path

import infusion


def main(first: Path, second: Path, out: Path = Path("outputs/example"), steps: int = 25) -> Path:
    """Draw both concepts next to each other, the second one at 80 %, from prompt embeddings; returns the picture's path."""
    pipe = infusion.load_base()
    a, b = infusion.Concept.load(first), infusion.Concept.load(second)
    out.mkdir(parents=True, exist_ok=True)
    with infusion.attach(pipe, a, b):
        prompt = f"a photo of a <{a.name}> next to a <{b.name}:0.8> on the beach"
        states = infusion.encode(pipe, prompt, negative_prompt="sketch")  # as pipe(prompt) does by itself
        image = pipe(**states, num_inference_steps=steps).images[0]
    image.save(out / "both.png")
    return out / "both.png"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
