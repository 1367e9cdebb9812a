"""Residual values <-> bytes: the grids that a concept file can hold. Pure functions, no files.

Scheme "q6": blocks of 64 values, each with its largest magnitude as bfloat16 and its values as
6-bit steps of a 31st of it, from -31 to 31. Putting values on this grid twice changes nothing,
so a concept that is on it goes to a file and back bit for bit. "fp16" and "fp32" are kept for those who ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

SCHEMES = ("q6", "fp16", "fp32")
BLOCK = 64
LEVELS = 31
_TINY = np.float32(2.0**-100)  # blocks that never exceed this are zero
LARGEST = 6e4  # no residual comes near; larger values are a fault, and beyond 65,504 fp16 has none


def in_order(residuals: Iterable[str]) -> list[str]:
    """Layer paths in the file's order: numbers as numbers, words as words."""

    def place(part: str) -> tuple[bool, int, str]:
        number = part.isascii() and part.isdigit() and len(part) < 10  # int() refuses "²" and takes long over long ones
        return not number, int(part) if number else 0, part

    return sorted(residuals, key=lambda path: [place(part) for part in re.split(r"[._]", path)])


def on_grid(residuals: Mapping[str, Tensor], scheme: str = "q6") -> dict[str, Tensor]:
    """The residuals with every value moved to the nearest one that a file of `scheme` can hold."""
    paths = in_order(residuals)
    if not paths:
        return {}
    lengths = [residuals[p].numel() for p in paths]
    flat = torch.cat([residuals[p].detach().float().cpu() for p in paths]).numpy()
    values = torch.from_numpy(unpack(pack(flat, scheme), len(flat), scheme))
    return dict(zip(paths, (part.clone() for part in values.split(lengths)), strict=True))


def packed_size(count: int, scheme: str) -> int:
    """Bytes that `count` values take."""
    if scheme == "q6":
        return 2 * -(-count // BLOCK) + 3 * -(-count // 4)
    return count * (2 if scheme == "fp16" else 4)


def pack(values: np.ndarray, scheme: str) -> bytes:
    """(n,) float32 -> bytes."""
    if scheme == "fp32":
        return values.astype("<f4").tobytes()
    if scheme == "fp16":
        return values.astype("<f2").tobytes()
    peaks, steps = _peaks(values)
    step = np.repeat(steps, BLOCK)[: len(values)]
    scaled = np.divide(values, step, out=np.zeros_like(values), where=step > 0)
    codes = np.clip(np.rint(scaled), -LEVELS, LEVELS) + (LEVELS + 1)
    return peaks.astype("<u2").tobytes() + _pack6(codes.astype(np.uint8))


def unpack(content: bytes, count: int, scheme: str) -> np.ndarray:
    """bytes -> (count,) float32; `content` must be `packed_size(count, scheme)` long."""
    if scheme == "fp32":
        return np.frombuffer(content, "<f4").copy()
    if scheme == "fp16":
        return np.frombuffer(content, "<f2").astype(np.float32)
    blocks = -(-count // BLOCK)
    peaks = np.frombuffer(content[: 2 * blocks], "<u2")
    step = np.repeat(_steps(peaks), BLOCK)[:count]
    codes = _unpack6(content[2 * blocks :])[:count].astype(np.float32)
    return (codes - np.float32(LEVELS + 1)) * step


def _peaks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude of each block as bfloat16 bits (nearest), and the step it stands for."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, np.float32)
    padded[: len(values)] = np.abs(values)
    largest = padded.reshape(-1, BLOCK).max(axis=1)
    largest[largest < _TINY] = 0
    bits = largest.view(np.uint32)
    peaks = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return peaks, _steps(peaks)


def _steps(peaks: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a damaged file's NaN is refused where concepts are checked
        return (peaks.astype(np.uint32) << 16).view(np.float32) / np.float32(LEVELS)


def _pack6(codes: np.ndarray) -> bytes:
    """Four codes in three bytes, the first in the lowest bits; the last group is filled with the code of zero."""
    padded = np.full(-(-len(codes) // 4) * 4, LEVELS + 1, np.uint32)
    padded[: len(codes)] = codes
    a, b, c, d = padded.reshape(-1, 4).T
    word = a | b << 6 | c << 12 | d << 18
    return np.stack([word & 255, word >> 8 & 255, word >> 16 & 255], axis=1).astype(np.uint8).tobytes()


def _unpack6(content: bytes) -> np.ndarray:
    x, y, z = np.frombuffer(content, np.uint8).reshape(-1, 3).T.astype(np.uint32)
    word = x | y << 8 | z << 16
    return np.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], axis=1).reshape(-1)
