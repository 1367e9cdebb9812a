"""Full size and speed on a GPU, random weights: python benchmarks/gpu.py --out gpu.json

Seconds per training step of Infusion (two streams, single stream) beside a LoRA step, and per picture with and
without a concept, at the true configuration of Stable Diffusion 1.5 or, with --family, of another; medians of interleaved rounds, peak memory.
First one UNet call in fp32 is held against the naive method.
With --base a real checkpoint is used, and --photos makes it learn a concept and draw it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import steps as cpu_steps
from real_size import parity, random_pipeline

import infusion
from infusion.families import FAMILIES
from infusion.lesson import prepare_lesson
from infusion.photos import Photo, load_photos
from infusion.streams import value_lengths


def noise_photos(count: int = 4) -> list[Photo]:
    """Stand-ins for photos, where speed is all that is measured."""
    from PIL import Image

    return [Photo(Image.effect_noise((640, 512), 60 + i).convert("RGB")) for i in range(count)]


def synchronized(step):
    """The step, waiting for the GPU to finish."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def main(
    out: Path, base: str | None, photos: Path | None, word: str, batch: int | None, rounds: int, dtype: torch.dtype,
    family: str = "stable-diffusion-v1",
) -> dict:  # fmt: skip
    """Measure and write JSON."""
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here; benchmarks/steps.py and benchmarks/real_size.py measure on a CPU.")
    pipe = (
        infusion.load_base(base, "cuda", torch.float32) if base else random_pipeline(family, reduced=False).to("cuda")
    )
    error = parity(pipe, 16)
    pipe.to(dtype)
    lesson = prepare_lesson(pipe, load_photos(photos) if photos else noise_photos(), word, "milo")
    concept = infusion.Concept("milo", word, {p: torch.randn(n) for p, n in value_lengths(pipe.unet).items()})
    batch = batch or max(1, 16 * 512**2 // lesson.pictures[0].width ** 2)
    training, train_memory = {}, {}
    for name, build in cpu_steps.training_steps(pipe, lesson, batch).items():
        if name != "full fine-tune":
            torch.cuda.reset_peak_memory_stats()  # counts what is there: the base, and for LoRA its own copy of it
            training[name] = synchronized(build())
            training[name]()
            train_memory[name] = torch.cuda.max_memory_allocated() / 2**30
    train_seconds = cpu_steps.medians(training, rounds)
    pipe.unet.requires_grad_(False)
    torch.cuda.reset_peak_memory_stats()
    sampling = {n: synchronized(s) for n, s in cpu_steps.pictures(pipe, concept, 8, 50).items()}
    sample_seconds = cpu_steps.medians(sampling, max(1, rounds // 5))
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "base": base or f"{family}, random weights",
        "parity_over_max_eps": error,
        "training": {"batch": batch, "seconds_per_step": train_seconds, "peak_gib": train_memory},
        "sampling": {
            "pictures": 8,
            "steps": 50,
            "seconds_per_picture": {n: s / 8 for n, s in sample_seconds.items()},
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        },
    }
    if photos:
        start = time.perf_counter()
        learned = infusion.learn(
            pipe, lesson, word, "milo", infusion.LearnConfig(steps=400, batch=batch, learning_rate=0.01)
        )
        result["learned"] = {"seconds": time.perf_counter() - start, "bytes": len(learned.to_bytes())}
        learned.save(out.with_suffix(".safetensors"))
        with infusion.attach(pipe, learned):
            pipe("a photo of a <milo> on the beach", num_inference_steps=50).images[0].save(out.with_suffix(".png"))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="a real checkpoint instead of random weights")
    parser.add_argument("--family", choices=list(FAMILIES), default="stable-diffusion-v1", help="without --base")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--word", default="dog")
    parser.add_argument("--batch", type=int, help="samples a step; by default 16 of 512 pixels, or as many pixels")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="bf16")
    o = parser.parse_args()
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    main(o.out, o.base, o.photos, o.word, o.batch, o.rounds, dtypes[o.dtype], o.family)
