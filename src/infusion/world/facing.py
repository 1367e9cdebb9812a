"""Which way a subject faces: a small head on the judge's features (trained by `facing_training.py`).

What it says at a place of a picture is its evidence there minus that at the same place of the mirror image: turned around, it answers the opposite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infusion.world.models import half_weights

FACINGS = ("left", "right")
# Classes whose outline is another one in the mirror, by about a tenth of its area or more; a house's and a robot's by 4 %, a teddy bear's not at all.
ONE_SIDED = ("dog", "cat", "bird", "fish", "car", "boat", "mug")
FILE = "facing.safetensors"  # its name, beside the judge's file
FIGURES = "facing.json"  # beside them: its training and its figures, as the judge's card tells them
FEATURES = 96  # channels of the judge's features


class FacingHead(nn.Module):
    """The judge's features of pictures and of their mirror images, both (b, FEATURES, g, g), to logits (b, g, g) of facing left."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(FEATURES, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 5, padding=2), nn.SiLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, features: Tensor, mirrored: Tensor) -> Tensor:
        return (self.body(features) - self.body(mirrored).flip(-1))[:, 0]


@dataclass(frozen=True)
class Facing:
    """A head with the probability from which on it is believed."""

    head: FacingHead
    threshold: float = 0.5

    def logits(self, features: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        """Logits (b, g, g) of facing left in pictures (b, 3, h, w); features: the judge's."""
        return self.head(features(pictures), features(pictures.flip(-1)))

    def name(self, kind: str | None, logit: Tensor) -> str | None:
        """ "left" or "right", None where the class `kind` has no side or the head is not sure."""
        left = float(logit.sigmoid())
        if kind not in ONE_SIDED or max(left, 1 - left) < self.threshold:
            return None
        return FACINGS[0] if left >= 0.5 else FACINGS[1]

    def save(self, path: Path, judge: str) -> Path:
        """One safetensors file, weights in fp16; judge: the digest of the judge whose features it reads."""
        save_file(half_weights(self.head), path, metadata={"threshold": str(self.threshold), "judge": judge})
        return path

    @classmethod
    def load(cls, path: Path, judge: str) -> Facing | None:
        """From its file; None where there is none, or one for a judge of another digest, whose features would mean something else."""
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("judge") != judge:
            return None
        head = FacingHead()
        head.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return cls(head.eval(), float(metadata["threshold"]))
