"""Feature spaces of pictures and texts from weights that the user has: CLIP, DINO; nothing is downloaded unless it is named by a hub id.

spaces = load_features(clip="weights/clip-vit-base-patch32", dino="weights/dinov2-small")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from infusion.errors import InfusionError
from infusion.metrics.estimate import Estimate, paired
from infusion.metrics.similarity import agreement, alignment, diversity, fidelity, preservation, resemblance


class Features(Protocol):
    """A feature space: pictures to (n, d); texts to (n, d) in the same space, or None where it has none; both on the CPU, wherever the
    model is."""

    name: str
    model: Any

    def pictures(self, images: Sequence[Image.Image]) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> Tensor | None: ...


@dataclass(frozen=True)
class Clip:
    """CLIP's image and text embeddings."""

    model: CLIPModel
    processor: Any
    name: str = "CLIP"

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) image embeddings."""
        parts = _pixels(self.processor, images, self.model.device)
        return torch.cat([_tensor(self.model.get_image_features(pixel_values=part)).cpu() for part in parts])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) text embeddings."""
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _tensor(self.model.get_text_features(**tokens.to(self.model.device))).cpu()


@dataclass(frozen=True)
class Dino:
    """The class token of a DINO or DINOv2 vision transformer."""

    model: Any
    processor: Any
    name: str = "DINO"

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) class tokens."""
        parts = _pixels(self.processor, images, self.model.device)
        return torch.cat([self.model(pixel_values=part).last_hidden_state[:, 0].cpu() for part in parts])

    def texts(self, texts: Sequence[str]) -> None:
        """DINO knows no texts."""
        return None


@dataclass(frozen=True)
class FeatureFigures:
    """In one feature space: subject fidelity (mean cosine to the photos), text alignment (cosine to the prompt with the class
    word; None without texts), diversity of one prompt's pictures (DIV), and likeness of the plain class word's pictures to the photos (PRES, higher is
    worse); `above` are the paired differences to the base's pictures of the same prompts and seeds."""

    subject: Estimate
    subject_above: Estimate
    text: Estimate | None
    text_above: Estimate | None
    diversity: Estimate
    diversity_base: Estimate
    preservation: Estimate
    preservation_above: Estimate


def load_features(clip: str | None = None, dino: str | None = None) -> tuple[Features, ...]:
    """The spaces whose weights are given, as a folder or a hub id. Raises InfusionError for weights that cannot be loaded."""
    found: list[Features] = []
    if clip:
        found.append(
            _loaded(
                "CLIP", clip, lambda: Clip(CLIPModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip))
            )
        )
    if dino:
        found.append(
            _loaded(
                "DINO",
                dino,
                lambda: Dino(AutoModel.from_pretrained(dino).eval(), AutoImageProcessor.from_pretrained(dino)),
            )
        )
    return tuple(found)


def feature_figures(
    space: Features,
    custom: Sequence[Image.Image],
    base: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    texts: Sequence[str],
    classes: tuple[Sequence[Image.Image], Sequence[Image.Image]],
    each: int,
) -> FeatureFigures:
    """Figures of pictures (n) beside the base's (n) of the same prompts `texts` (n), `each` pictures of a prompt in a row, and seeds. classes:
    pictures of the plain class word by either, of the same seeds."""
    ours, theirs, real, of_class, of_class_base = (space.pictures(p) for p in (custom, base, photos, *classes))
    words = space.texts(texts)
    return FeatureFigures(
        subject=fidelity(ours, real),
        subject_above=paired(resemblance(ours, real), resemblance(theirs, real)),
        text=None if words is None else alignment(ours, words),
        text_above=None if words is None else paired(agreement(ours, words), agreement(theirs, words)),
        diversity=diversity(ours.unflatten(0, (-1, each))),
        diversity_base=diversity(theirs.unflatten(0, (-1, each))),
        preservation=preservation(of_class, real),
        preservation_above=paired(resemblance(of_class, real), resemblance(of_class_base, real)),
    )


def left_out(spaces: Sequence[Features]) -> list[str]:
    """What is not measured for want of weights, each with how to get it."""
    missing = {
        "CLIP": "CLIP-I and CLIP-T: give --clip openai/clip-vit-base-patch32 or a folder of it",
        "DINO": "DINO: give --dino facebook/dino-vits16 or a folder of it",
    }
    return [told for name, told in missing.items() if name not in {s.name for s in spaces}]


def _loaded(kind: str, source: str, load: Any) -> Features:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InfusionError(
            f"The {kind} weights {source!r} cannot be loaded ({str(error).splitlines()[0][:160]}); give a folder with config, weights and preprocessor."
        ) from None


def _pixels(processor: Any, images: Sequence[Image.Image], device: torch.device, batch: int = 16) -> Iterator[Tensor]:
    """The pictures as the model wants them (b, 3, h, w), `batch` at a time."""
    for i in range(0, len(images), batch):
        part = [image.convert("RGB") for image in images[i : i + batch]]
        yield processor(images=part, return_tensors="pt")["pixel_values"].to(device)


def _tensor(output: Any) -> Tensor:
    """Newer transformers give an output object, older ones the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
