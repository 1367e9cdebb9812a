"""Candidates for the concept file at Stable Diffusion 1.5's size: python benchmarks/formats.py

With --learned: what the 6-bit grid costs learned concepts, those of benchmarks/subjects.py, against fp32.
Payload bytes and relative error (L2) on white noise, 12,480 values in 16 layers, mean of five seeds. The whole file
may take 11,264 bytes; header and checksum take about 0.8 kB of it with one packed tensor, more with 16 named ones.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from subjects import SUBJECTS

import infusion
from infusion.demo import PROMPTS, draw_photos
from infusion.diagnosis import validation_loss
from infusion.families import FAMILIES
from infusion.generation import generate
from infusion.lesson import prepare_lesson
from infusion.packing import BLOCK, pack, packed_size, unpack
from infusion.photos import load_photos
from infusion.streams import value_lengths
from infusion.training import LearnConfig

TEXT_WIDTH = 768
LENGTHS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320)


def uniform(values: np.ndarray, bits: int, block: int | None) -> tuple[int, np.ndarray]:
    """Symmetric uniform steps of the largest magnitude per block (None: per layer), 16-bit scales."""
    levels = 2 ** (bits - 1) - 1
    out, scales = np.empty_like(values), 0
    for layer, end in zip(LENGTHS, np.cumsum(LENGTHS), strict=True):
        for start in range(end - layer, end, block or layer):
            part = slice(start, min(start + (block or layer), end))
            step = np.abs(values[part]).max() / levels
            out[part] = np.rint(values[part] / step) * step
            scales += 1
    return len(values) * bits // 8 + 2 * scales, out


def entropy_coded(values: np.ndarray, step: float, coder) -> tuple[int, np.ndarray]:
    """Uniform steps of `step` standard deviations per layer, then a general-purpose coder."""
    codes, out = [], np.empty_like(values)
    for layer, end in zip(LENGTHS, np.cumsum(LENGTHS), strict=True):
        part = slice(end - layer, end)
        width = values[part].std() * step
        q = np.rint(values[part] / width)
        out[part] = q * width
        codes.append(q.astype(np.int8))
    return len(coder(np.concatenate(codes).tobytes())) + 2 * len(LENGTHS), out


def one_vector(values: np.ndarray, projections: np.ndarray) -> np.ndarray:
    """Shared structure: the nearest values that one vector of the text's space gives through the layers' value projections (n, width)."""
    return projections @ np.linalg.lstsq(projections, values, rcond=None)[0]


def ideal_bits(values: np.ndarray, step: float) -> float:
    """Bytes that a perfect entropy coder would need for the same steps."""
    codes = np.concatenate([np.rint(v / (v.std() * step)) for v in np.split(values, np.cumsum(LENGTHS)[:-1])])
    _, counts = np.unique(codes, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum()) * len(values) / 8


def main() -> list[tuple[str, int, float]]:
    """Print and return (candidate, payload bytes, relative error)."""
    candidates = {
        "int8, scale per layer": lambda v: uniform(v, 8, None),
        "7 bits, scale per layer": lambda v: uniform(v, 7, None),
        "6 bits, scale per layer": lambda v: uniform(v, 6, None),
        f"6 bits, scale per {BLOCK} (ours)": lambda v: (
            packed_size(len(v), "q6"),
            unpack(pack(v.astype(np.float32), "q6"), len(v), "q6"),
        ),
        "the same in 16 named entries, their header counted": lambda v: (
            packed_size(len(v), "q6") + named_header(),
            unpack(pack(v.astype(np.float32), "q6"), len(v), "q6"),
        ),
        "6 bits, scale per 32": lambda v: uniform(v, 6, 32),
        "5 bits, scale per 32": lambda v: uniform(v, 5, 32),
        "5 bits, scale per layer": lambda v: uniform(v, 5, None),
        "steps of 0.08 sigma, zlib": lambda v: entropy_coded(v, 0.08, lambda b: zlib.compress(b, 9)),
        "steps of 0.08 sigma, lzma": lambda v: entropy_coded(v, 0.08, lzma.compress),
        "steps of 0.08 sigma, perfect coder": lambda v: (round(ideal_bits(v, 0.08)), entropy_coded(v, 0.08, bytes)[1]),
        "one vector of the text, fp16": lambda v: (2 * TEXT_WIDTH, one_vector(v, random_projections())),
        "int8 of 15 layers (no mid block)": lambda v: (
            11_200 + 30,
            np.where(_in_mid_block(), 0, uniform(v, 8, None)[1]),
        ),
    }
    rows = []
    for name, candidate in candidates.items():
        sizes, errors = [], []
        for seed in range(5):
            values = np.random.default_rng(seed).normal(size=sum(LENGTHS))
            size, out = candidate(values)
            sizes.append(size)
            errors.append(np.linalg.norm(out - values) / np.linalg.norm(values))
        rows.append((name, round(np.mean(sizes)), float(np.mean(errors))))
        print(f"{name:40} {rows[-1][1]:7,} bytes   {rows[-1][2]:7.2%}")
    return rows


def learned(work: Path) -> list[tuple[str, float, float, float, float, float, float]]:
    """Print and return, per subject: relative error (L2) of the grid, and of one vector shared by all layers; validation loss of the base, with fp32 and with 6-bit
    values; and the mean difference between the pictures of the two, of 255, over the twelve prompts."""
    rows = []
    for name, subject, background in SUBJECTS:
        pipe = infusion.load_base(device="cpu")
        photos = draw_photos(subject, work / name, background=background)
        lesson = prepare_lesson(pipe, load_photos(photos), subject.kind, name)
        exact = infusion.learn(pipe, lesson, subject.kind, name, LearnConfig(scheme="fp32"))
        packed = exact.on_grid("q6")
        a, b = (torch.cat([c.residuals[p] for p in exact.residuals]) for c in (exact, packed))
        limit = exact.max_timestep
        losses = [validation_loss(pipe, lesson, r, True, limit) for r in (None, exact.residuals, packed.residuals)]
        pictures = []
        for concept in (exact, packed):
            with infusion.attach(pipe, concept):
                drawn = generate(pipe, [p.format(f"<{name}>") for p in PROMPTS], list(range(len(PROMPTS))))
            pictures.append(np.stack([np.asarray(p.image, np.float32) for p in drawn]))
        weights = torch.cat([pipe.unet.get_submodule(f"{p}.to_v").weight for p in exact.residuals]).detach().numpy()
        shared = np.linalg.norm(one_vector(a.numpy(), weights) - a.numpy()) / np.linalg.norm(a.numpy())
        means = [sum(loss.values()) / len(loss) for loss in losses]
        rows.append(
            (
                name,
                float((a - b).norm() / a.norm()),
                float(shared),
                *means,
                float(np.abs(pictures[0] - pictures[1]).mean()),
            )
        )
        name, error, shared, base, fp32, q6, moved = rows[-1]
        print(
            f"{name:8} error {error:.2%} (one vector {shared:.1%})   loss {base:.5f} (base) {fp32:.5f} (fp32) {q6:.5f} (q6)   pictures {moved:.2f} of 255"
        )
    return rows


def named_header() -> int:
    """Bytes that the header of 16 named entries of Stable Diffusion 1.5's layers takes, metadata not counted."""
    with torch.device("meta"):
        lengths = value_lengths(UNet2DConditionModel.from_config(FAMILIES["stable-diffusion-v1"]["unet"]))
    content = save({path: torch.zeros(n * 6 // 8, dtype=torch.uint8) for path, n in lengths.items()})
    return int.from_bytes(content[:8], "little")


@cache
def random_projections() -> np.ndarray:
    return np.random.default_rng(99).normal(size=(sum(LENGTHS), TEXT_WIDTH))


def _in_mid_block() -> np.ndarray:
    inside = np.zeros(sum(LENGTHS), bool)
    start = sum(LENGTHS[:6])
    inside[start : start + 1280] = True
    return inside


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", action="store_true", help="measure learned concepts; takes about six minutes")
    parser.add_argument("--work", type=Path, default=Path("outputs/formats"))
    options = parser.parse_args()
    learned(options.work) if options.learned else main()
