"""Turn a photo-like scene into one of the world's styles.

Works on float pictures (height, width, 3) in [0, 1]; knows nothing about what they show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def apply_style(name: str, pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture in style `name`, reduced to `side` x `side`, float32 in [0, 1].

    `pixels`: (s, s, 3) in [0, 1], s a multiple of `side` (the supersampled scene).
    """
    return _STYLE[name](pixels.astype(np.float32), side)


def _reduce(pixels: np.ndarray, side: int) -> np.ndarray:
    """Box average to `side` pixels a side: what makes the scenes anti-aliased."""
    f = pixels.shape[0] // side
    return pixels.reshape(side, f, side, f, -1).mean(axis=(1, 3))


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Gradient magnitude over all channels, (h, w), roughly in [0, 1]."""
    dy = np.zeros(pixels.shape[:2], np.float32)
    dx = np.zeros(pixels.shape[:2], np.float32)
    dy[1:] = np.abs(np.diff(pixels, axis=0)).max(-1)
    dx[:, 1:] = np.abs(np.diff(pixels, axis=1)).max(-1)
    return np.maximum(dx, dy)


def _photo(pixels: np.ndarray, side: int) -> np.ndarray:
    return _reduce(pixels, side)


def _sketch(pixels: np.ndarray, side: int) -> np.ndarray:
    small = _reduce(pixels, side * 3 // 2 if pixels.shape[0] % (side * 3 // 2) == 0 else side)
    edges = np.clip(_edges(small) * 2.2, 0, 1)
    grey = small @ LUMA
    page = 0.97 - 0.34 * (1 - grey) ** 1.3 - 0.72 * edges
    page = np.asarray(Image.fromarray(np.clip(page, 0.05, 1)).resize((side, side), Image.Resampling.BOX))
    return np.clip(page[..., None] * np.array([1.0, 0.995, 0.975], np.float32), 0, 1)


def _sepia(pixels: np.ndarray, side: int) -> np.ndarray:
    grey = (_reduce(pixels, side) @ LUMA)[..., None]
    dark, light = np.array([0.20, 0.12, 0.06], np.float32), np.array([1.0, 0.89, 0.68], np.float32)
    return np.clip(dark + (light - dark) * grey, 0, 1)


def _neon(pixels: np.ndarray, side: int) -> np.ndarray:
    small = _reduce(pixels, side)
    edges = np.clip(_edges(small) * 2.0, 0, 1)[..., None]
    vivid = small / np.maximum(small.max(-1, keepdims=True), 0.25)
    night = small * 0.22 + np.array([0.05, 0.0, 0.13], np.float32)
    return np.clip(night * (1 - edges) + edges * (0.15 + 0.85 * vivid), 0, 1)


def _pixel_art(pixels: np.ndarray, side: int) -> np.ndarray:
    coarse = _reduce(pixels, side // 2)
    levels = np.round(np.clip((coarse - 0.5) * 1.25 + 0.5, 0, 1) * 4) / 4
    return np.clip(levels.repeat(2, axis=0).repeat(2, axis=1), 0, 1)


_STYLE: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "photo": _photo,
    "sketch": _sketch,
    "sepia": _sepia,
    "neon": _neon,
    "pixel art": _pixel_art,
}
