"""Draw the training set once: pictures, masks and tokenized captions in memory-mapped arrays.

Scene `i` depends on (seed, i) alone, so that a set can be drawn by any number of processes, in
any order, and extended later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infusion.world.arrays import draw_arrays, load_arrays
from infusion.world.captions import Caption, caption
from infusion.world.scenes import SIDE, Scene, held_out, random_scene, render
from infusion.world.tokenizer import MAX_LENGTH, build_tokenizer, span_positions
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS, scene_labels, visible

MAX_SUBJECTS = 3
CAPTIONS_PER_SCENE = 4
GRID = 16  # masks are kept at the latent resolution


@dataclass(frozen=True)
class Dataset:
    """Arrays over n scenes, memory-mapped.

    pixels (n, SIDE, SIDE, 3) uint8; masks (n, MAX_SUBJECTS, GRID, GRID) uint8, 255 = inside;
    subjects (n, MAX_SUBJECTS, heads) int16, attributes as in `truth.visible`, NONE where there is no such subject;
    ids (n, CAPTIONS_PER_SCENE, MAX_LENGTH) int16 token ids; words (n, CAPTIONS_PER_SCENE,
    MAX_SUBJECTS, MAX_LENGTH) bool, True where a token is the subject's class word; scene (n, 2) int16, background and style by
    their place in `truth.SCENE_HEADS`.
    """

    pixels: np.ndarray
    masks: np.ndarray
    subjects: np.ndarray
    ids: np.ndarray
    words: np.ndarray
    scene: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


def training_scene(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of the training set `seed`, never a held-out combination, and the generator that
    goes on to draw its captions."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = random_scene(rng)
        if not held_out(scene):
            return scene, rng


def build_dataset(folder: Path, count: int, seed: int = 0, workers: int | None = None) -> Iterator[int]:
    """Draw `count` scenes into `folder`, yielding how many are done. Does nothing where they exist; where an array of theirs is missing,
    all are drawn again, the same."""
    return draw_arrays(folder, _LAYOUT, count, partial(_draw, seed), workers=workers)


def load_dataset(folder: Path) -> Dataset:
    """The set drawn into `folder` by `build_dataset`."""
    return Dataset(**load_arrays(folder, _LAYOUT))


@dataclass(frozen=True)
class Batch:
    """latents (b, c, g, g); ids (b, m); words (b, s, m) bool; masks (b, s, g, g) in [0, 1]; subjects (b, s, heads); scene (b, 2)."""

    latents: Tensor
    ids: Tensor
    words: Tensor
    masks: Tensor
    subjects: Tensor
    scene: Tensor


def sample_batch(
    latents: Tensor, data: Dataset, rows: np.ndarray, rng: np.random.Generator, dropout: float = 0.0
) -> Batch:
    """The scenes `rows`, each with one of its captions; captions are dropped (empty) with `dropout`."""
    which = rng.integers(CAPTIONS_PER_SCENE, size=len(rows))
    ids = torch.from_numpy(data.ids[rows, which].astype(np.int64))
    words = torch.from_numpy(data.words[rows, which])
    empty = torch.from_numpy(rng.random(len(rows)) < dropout)
    ids[empty, 1:] = int(ids[0, -1])  # a short caption ends in padding, which is the end token: so does an empty one
    words[empty] = False
    masks = torch.from_numpy(data.masks[rows].astype(np.float32) / 255)
    subjects = torch.from_numpy(data.subjects[rows].astype(np.int64))
    scene = torch.from_numpy(data.scene[rows].astype(np.int64))
    return Batch(latents[torch.from_numpy(rows)].float(), ids, words, masks, subjects, scene)


def attributes(scene: Scene) -> np.ndarray:
    """What the scene's style shows of each subject, (MAX_SUBJECTS, heads) int16."""
    rows = np.full((MAX_SUBJECTS, len(SUBJECT_HEADS)), NONE, np.int16)
    for row, placed in zip(rows, scene.subjects, strict=False):
        row[:] = list(visible(placed.subject, scene.style).values())
    return rows


def encode_caption(words: Caption) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (MAX_LENGTH,) int16 and class-word indicators (MAX_SUBJECTS, MAX_LENGTH) bool."""
    encoded = _tokenizer()(words.text, padding="max_length", truncation=True, return_offsets_mapping=True)
    indicator = np.zeros((MAX_SUBJECTS, MAX_LENGTH), bool)
    for i, span in enumerate(words.spans):
        if span is not None:
            indicator[i, span_positions(encoded["offset_mapping"], span)] = True
    return np.array(encoded["input_ids"], np.int16), indicator


_LAYOUT = {
    "pixels": (np.uint8, (SIDE, SIDE, 3)),
    "masks": (np.uint8, (MAX_SUBJECTS, GRID, GRID)),
    "subjects": (np.int16, (MAX_SUBJECTS, len(SUBJECT_HEADS))),
    "ids": (np.int16, (CAPTIONS_PER_SCENE, MAX_LENGTH)),
    "words": (np.bool_, (CAPTIONS_PER_SCENE, MAX_SUBJECTS, MAX_LENGTH)),
    "scene": (np.int16, (len(SCENE_HEADS),)),
}


@cache
def _tokenizer():
    return build_tokenizer()


def _draw(seed: int, start: int, count: int) -> dict[str, np.ndarray]:
    chunk = {name: np.zeros((count, *shape), dtype) for name, (dtype, shape) in _LAYOUT.items()}
    for i in range(count):
        scene, rng = training_scene(seed, start + i)
        drawn = render(scene)
        chunk["pixels"][i] = drawn.pixels
        cells = SIDE // GRID
        masks = drawn.masks.reshape(-1, GRID, cells, GRID, cells).mean(axis=(2, 4))
        chunk["masks"][i, : len(masks)] = np.round(masks * 255)
        chunk["subjects"][i] = attributes(scene)
        chunk["scene"][i] = scene_labels(scene)
        for c in range(CAPTIONS_PER_SCENE):
            chunk["ids"][i, c], chunk["words"][i, c] = encode_caption(caption(scene, rng))
    return chunk
