"""Seconds of a training step and of a picture, side by side in one run: python benchmarks/steps.py

Infusion (two streams, single stream) beside a plain LoRA step (peft, rank 4 on the attention projections) and a
full fine-tune step; a picture with a concept beside the base model's own; several concepts learned and drawn one after
another beside all in one call. Rounds are interleaved and the median
counts, so that a slow minute of the machine hits all alike. Prints a table and writes JSON with --out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig

import infusion
from infusion.generation import generate
from infusion.lesson import joined, prepare_lesson
from infusion.photos import load_photos
from infusion.streams import Streams, value_lengths
from infusion.training import masked_loss, predict
from infusion.world.scenes import few_modalities, render
from infusion.world.subjects import Subject

SUBJECT = Subject("dog", "purple", "yellow", "spotted", "none", (0.55, 0.7, 0.5, 0.35))


def training_steps(pipe, lesson, batch: int) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes, for each method, its optimizer step on equal batches."""

    def infusion_step(two_streams: bool) -> Callable[[], None]:
        residuals = {
            p: torch.zeros(n, requires_grad=True, device=pipe.unet.device) for p, n in value_lengths(pipe.unet).items()
        }
        optimizer = torch.optim.AdamW(residuals.values(), 0.02)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            pipe.unet.requires_grad_(False)
            streams = Streams(pipe.unet)
            streams.residuals, streams.two_streams = {lesson.name: residuals}, two_streams
            draw = lesson.draw(batch, generator)
            masked_loss(predict(streams, draw), draw).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            streams.remove()

        return step

    def plain_step(unet) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], 1e-4)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            draw = lesson.draw(batch, generator)
            prediction = unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
            (prediction - draw.target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def lora_step() -> Callable[[], None]:
        lora = copy.deepcopy(pipe.unet).requires_grad_(False)
        lora.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        return plain_step(lora)

    return {
        "Infusion, two streams": lambda: infusion_step(True),
        "Infusion, single stream": lambda: infusion_step(False),
        "LoRA (peft, rank 4)": lora_step,
        "full fine-tune": lambda: plain_step(copy.deepcopy(pipe.unet).requires_grad_(True)),
    }


def pictures(pipe, concept, count: int, steps: int) -> dict[str, Callable[[], None]]:
    """`count` pictures by the base, and with a concept in each, in both streams and in one."""

    def draw(subject: str) -> None:
        generate(pipe, [f"a photo of {subject} on the beach"] * count, list(range(count)), steps=steps)

    def customized(two_streams: bool) -> Callable[[], None]:
        def run() -> None:
            with infusion.attach(pipe, concept, two_streams=two_streams):
                draw("<milo>")

        return run

    return {
        "base model": lambda: draw("a dog"),
        "Infusion, two streams": customized(True),
        "Infusion, single stream": customized(False),
    }


def side_by_side(pipe, lessons, concepts, batch: int, sampling_steps: int) -> dict[str, Callable[[], None]]:
    """A training step of `batch` samples for every lesson, and a picture of every concept: one after another, and in one call."""

    def learn_step(some) -> Callable[[], None]:
        residuals = {
            lesson.name: {p: torch.zeros(n, requires_grad=True) for p, n in value_lengths(pipe.unet).items()}
            for lesson in some
        }
        optimizer = torch.optim.AdamW([r for own in residuals.values() for r in own.values()], 0.02)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            streams = Streams(pipe.unet)
            streams.residuals = residuals
            draws = [lesson.draw(batch, generator) for lesson in some]
            predictions = predict(streams, joined(draws)).split(batch)
            sum(masked_loss(p, d) for p, d in zip(predictions, draws, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            streams.remove()

        return step

    def draw(some) -> None:
        with infusion.attach(pipe, *concepts):
            prompts = [f"a photo of <{concept.name}> on the beach" for concept in some]
            generate(pipe, prompts, list(range(len(some))), steps=sampling_steps)

    alone = [learn_step([lesson]) for lesson in lessons]
    return {
        "learning, one after another": lambda: [step() for step in alone],
        "learning, side by side": learn_step(lessons),
        "drawing, one after another": lambda: [draw([concept]) for concept in concepts],
        "drawing, in one batch": lambda: draw(concepts),
    }


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, rounds interleaved, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(
    rounds: int = 15,
    batch: int = 8,
    count: int = 8,
    sampling_steps: int = 10,
    concepts: int = 4,
    out: Path | None = None,
) -> dict:
    """Measure, print, and write JSON if `out` is given."""
    pipe = infusion.load_base(device="cpu")
    photos = [_picture(scene) for scene in few_modalities(SUBJECT, 4, 1, "meadow")]
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    concept = infusion.Concept("milo", "dog", {p: torch.randn(n) for p, n in value_lengths(pipe.unet).items()})
    training = medians({name: build() for name, build in training_steps(pipe, lesson, batch).items()}, rounds)
    pipe.unet.requires_grad_(False)
    sampling = medians(pictures(pipe, concept, count, sampling_steps), max(1, rounds // 3))
    names = [f"milo{i}" for i in range(concepts)]
    lessons = [prepare_lesson(pipe, load_photos(photos), "dog", name) for name in names]
    named = [dataclasses.replace(concept, name=name) for name in names]
    together = medians(side_by_side(pipe, lessons, named, batch, sampling_steps), max(1, rounds // 3))
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32",
        "training": {
            "batch": batch,
            "seconds_per_step": training,
            "ratio_to_lora": _ratios(training, "LoRA (peft, rank 4)"),
        },
        "sampling": {
            "pictures": count,
            "steps": sampling_steps,
            "seconds_per_picture": {k: v / count for k, v in sampling.items()},
            "ratio_to_base": _ratios(sampling, "base model"),
        },
        "side_by_side": {"concepts": concepts, "batch": batch, "steps": sampling_steps, "seconds": together},
    }
    for title, seconds, ratios in (
        (f"one training step of {batch}", training, result["training"]["ratio_to_lora"]),
        (f"{count} pictures of {sampling_steps} steps", sampling, result["sampling"]["ratio_to_base"]),
    ):
        print(f"\n{title:32}   seconds   ratio")
        for name, value in seconds.items():
            print(f"{name:32}   {value:7.3f}   {ratios[name]:5.2f}")
    print(f"\n{concepts} concepts: a training step of {batch} each, a picture of {sampling_steps} steps each")
    for name, value in together.items():
        print(f"{name:32}   {value:7.3f}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _ratios(seconds: dict[str, float], reference: str) -> dict[str, float]:
    return {name: round(value / seconds[reference], 3) for name, value in seconds.items()}


def _picture(scene):
    from PIL import Image

    return Image.fromarray(render(scene).pixels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--concepts", type=int, default=4, help="how many are learned and drawn side by side")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    main(options.rounds, options.batch, concepts=options.concepts, out=options.out)
