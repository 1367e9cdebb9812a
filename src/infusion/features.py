"""Feature spaces of pictures and texts from weights that the user has: CLIP, DINO; nothing is downloaded but what is named by a hub id. LPIPS,
which is a distance and no space, beside them; torchvision downloads its AlexNet once.

spaces = load_features(clip="weights/clip-vit-base-patch32", dino="weights/dinov2-small")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from infusion.errors import InfusionError
from infusion.metrics.estimate import Estimate, bootstrap, paired
from infusion.metrics.similarity import agreement, alignment, diversity, fidelity, preservation, resemblance
from infusion.photos import to_tensor


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
        return torch.cat([self.model.get_image_features(pixel_values=part).pooler_output.cpu() for part in parts])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) text embeddings."""
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.cpu()


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


@dataclass(frozen=True)
class Lpips:
    """LPIPS on AlexNet (Zhang et al., arXiv 1801.03924), by torchmetrics."""

    net: Any

    @torch.no_grad()
    def distances(self, a: Sequence[Image.Image], b: Sequence[Image.Image], batch: int = 32) -> Tensor:
        """Of each pair of pictures, all of one size: (n,) float64, 0 for equal ones."""
        device = next(self.net.parameters()).device
        found = []
        for i in range(0, len(a), batch):
            x, y = (to_tensor(part[i : i + batch]).to(device) for part in (a, b))
            found.append(self.net(x, y).flatten().cpu().double())
        return torch.cat(found)


@dataclass(frozen=True)
class LpipsFigures:
    """diversity: mean distance among one prompt's pictures, a sample a prompt (DIV of DreamBooth, arXiv 2208.12242). nearest_photo: distance of
    a picture to the nearest photo; small is a copy. `above` are the paired differences to the base's pictures."""

    diversity: Estimate
    diversity_base: Estimate
    diversity_above: Estimate
    nearest_photo: Estimate
    nearest_photo_above: Estimate


def load_lpips() -> Lpips:
    """LPIPS with the weights that come with torchvision (AlexNet, downloaded once) and torchmetrics. Raises InfusionError where they are not to be had."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return Lpips(LearnedPerceptualImagePatchSimilarity("alex").net)
    except (ImportError, OSError, RuntimeError) as error:
        raise InfusionError(
            f"LPIPS cannot be had ({str(error).splitlines()[0][:160]}); pip install torchmetrics and the torchvision of your torch, which downloads its AlexNet once."
        ) from None


def lpips_figures(
    lpips: Lpips,
    custom: Sequence[Image.Image],
    base: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    each: int,
) -> LpipsFigures:
    """Figures of pictures (n) beside the base's (n) of the same prompts, `each` pictures of a prompt in a row, and seeds; all of one size."""

    def diversities(pictures: Sequence[Image.Image]) -> Tensor:
        pairs = [p for i in range(0, len(pictures), each) for p in combinations(pictures[i : i + each], 2)]
        return lpips.distances(*zip(*pairs, strict=True)).unflatten(0, (len(pictures) // each, -1)).mean(1)

    def nearest(pictures: Sequence[Image.Image]) -> Tensor:
        pairs = list(product(pictures, photos))
        return lpips.distances(*zip(*pairs, strict=True)).unflatten(0, (-1, len(photos))).amin(1)

    ours, theirs = diversities(custom), diversities(base)
    near, base_near = nearest(custom), nearest(base)
    return LpipsFigures(
        bootstrap(ours), bootstrap(theirs), paired(ours, theirs), bootstrap(near), paired(near, base_near)
    )


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


def left_out(spaces: Sequence[Features], lpips: Lpips | None = None) -> tuple[str, ...]:
    """What is not measured for want of weights, each with how to get it."""
    missing = {
        "CLIP": "CLIP-I and CLIP-T: give --clip openai/clip-vit-base-patch32 or a folder of it",
        "DINO": "DINO: give --dino facebook/dino-vits16 or a folder of it",
        "LPIPS": "LPIPS: install torchmetrics and torchvision and give --lpips",
    }
    there = {space.name for space in spaces} | ({"LPIPS"} if lpips else set())
    return tuple(told for name, told in missing.items() if name not in there)


def _loaded(kind: str, source: str, load: Any) -> Features:
    try:
        space = load()
        if space.pictures([Image.new("RGB", (64, 64), "grey")]).ndim != 2:  # another network's weights are told now
            raise ValueError("it gives no vector for a picture")
        return space
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InfusionError(
            f"The {kind} weights {source!r} cannot be loaded ({str(error).splitlines()[0][:160]}); give a folder with config, weights and preprocessor."
        ) from None


def _pixels(processor: Any, images: Sequence[Image.Image], device: torch.device, batch: int = 16) -> Iterator[Tensor]:
    """The pictures as the model wants them (b, 3, h, w), `batch` at a time."""
    for i in range(0, len(images), batch):
        part = [image.convert("RGB") for image in images[i : i + batch]]
        yield processor(images=part, return_tensors="pt")["pixel_values"].to(device)
