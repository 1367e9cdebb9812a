"""Draw pictures for prompts and keep them: one seed a picture, metadata in the file, a contact sheet.

Knows pipelines and files; whether concepts are attached is the caller's business.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infusion.config import check_seed
from infusion.errors import InfusionError
from infusion.lesson import added_conditions
from infusion.schedulers import few_steps
from infusion.streams import execution_device, picture_side, require_unet

Progress = Callable[[str, int, int], None]  # told("Drawing", done, of)


@dataclass(frozen=True)
class Picture:
    """A picture with what made it."""

    image: Image.Image
    prompt: str
    seed: int


def of_each(prompts: Sequence[str], count: int, seed: int) -> tuple[list[str], list[int]]:
    """`count` pictures of each prompt: the prompts, and seeds that depend on a prompt's place and not on `count`."""
    texts = [p for p in prompts for _ in range(count)]
    return texts, [seed + 1000 * i + j for i in range(len(prompts)) for j in range(count)]


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 6.0,
    batch: int | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
    width: int | None = None,
    height: int | None = None,
) -> list[Picture]:
    """One picture for each pair of prompt and seed. See `drawing`, which yields them as they are drawn."""
    drawn = drawing(pipe, prompts, seeds, steps, guidance_scale, batch, negative_prompt, on_step, width, height)
    return [picture for part in drawn for picture in part]


def drawing(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance_scale: float = 6.0,
    batch: int | None = None,
    negative_prompt: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
    width: int | None = None,
    height: int | None = None,
) -> Iterator[list[Picture]]:
    """One picture for each pair of prompt and seed, yielded batch by batch, by a text-to-image pipeline.

    A picture depends on its prompt and seed; the batch changes it by kernel tolerance only. batch: pictures at a time, by default
    `default_batch`. on_step is told (denoising steps done, steps in all) over all batches. width, height: in pixels, by default the
    base's own. Raises InfusionError for what cannot be drawn so.
    """
    check_draws(pipe)
    if len(prompts) != len(seeds):
        raise InfusionError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt.")
    for name, value in (("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise InfusionError(f"{name} is {value}; it must be at least 1.")
    few = few_steps(pipe)
    if steps > (most := pipe.scheduler.config["original_inference_steps" if few else "num_train_timesteps"]):
        raise InfusionError(
            f"steps is {steps}; this base's scheduler has {most:,} timesteps, so give at most as many, usually {'4 to 8' if few else '20 to 50'}."
        )
    size = picture_size(pipe, width, height)
    if negative_prompt is not None and "negative_prompt" not in inspect.signature(type(pipe).__call__).parameters:
        raise InfusionError(f"A {type(pipe).__name__} knows no negative prompt; leave it out.")
    if not math.isfinite(guidance_scale):
        raise InfusionError(f"guidance_scale is {guidance_scale}; give a finite number, usually 1 to 10.")
    for seed in seeds:
        check_seed(seed)
    batch = batch or default_batch(pipe, size)
    parts = range(0, len(prompts), batch)
    for number, start in enumerate(parts):
        part, numbers = list(prompts[start : start + batch]), list(seeds[start : start + batch])

        last: dict[str, Any] = {}

        def told(
            _pipe: object, step: int, _t: object, kwargs: dict, done: int = number * steps, last: dict = last
        ) -> dict:
            last.update(kwargs)
            if on_step:  # Heun's and others call the UNet, and this, more than once a step
                on_step(done + min(step + 1, steps), len(parts) * steps)
            return kwargs

        images = pipe(
            prompt=part,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in numbers],
            callback_on_step_end=told,
            width=size[0],
            height=size[1],
            **({} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(part)}),
        ).images
        if not bool(last["latents"].isfinite().all()):  # diffusers makes black pictures of it without a word
            raise InfusionError(
                f"The base gave no finite numbers in {str(pipe.unet.dtype).removeprefix('torch.')}; load it in bf16 or fp32."
            )
        yield [Picture(i, p, s) for i, p, s in zip(images, part, numbers, strict=True)]


def check_draws(pipe: DiffusionPipeline) -> None:
    """Raise InfusionError for a pipeline that does not draw from a prompt alone: for inpainting, image-to-image, a refiner."""
    unet, kind = require_unet(pipe), type(pipe).__name__
    wants = None
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        wants = "wants a picture beside the prompt"
    elif unet.config["in_channels"] != pipe.vae.config["latent_channels"]:
        wants = f"has a UNet of {unet.config['in_channels']} channels for latents of {pipe.vae.config['latent_channels']}, as for inpainting"
    elif pipe.tokenizer is None:
        wants = "has no tokenizer of its own, as a refiner"
    if wants:
        raise InfusionError(
            f"This base is a {kind}, which {wants}; draw with a text-to-image base, or attach concepts to it in Python."
        )


def picture_size(pipe: DiffusionPipeline, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels, the base's own where None. Raises InfusionError for a side that it cannot draw."""
    own = picture_side(pipe)
    step = math.lcm(8, pipe.vae_scale_factor)  # of which diffusers' pipelines want multiples, and the autoencoder
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value < step or value % step):
            below = max(1, value // step) * step
            raise InfusionError(
                f"{name} is {value}; this base draws multiples of {step} pixels, so give {below} or {below + step}."
            )
    return width or own, height or own


def default_batch(pipe: DiffusionPipeline, size: tuple[int, int] | None = None) -> int:
    """Pictures of that size drawn at a time, by default of the base's own: 16 of the embedded base's, 4 of 512 pixels, 1 of 768 and more."""
    width, height = size or picture_size(pipe)
    latents = width * height // pipe.vae_scale_factor**2
    return max(1, min(16, 4 * 64**2 // latents))


def denoiser(pipe: DiffusionPipeline) -> Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]:
    """The pipeline as `metrics.fisher` takes it: noisy latents (b, c, h, w), timesteps (b,) and one prompt for all rows to the
    UNet's prediction, without guidance. It understands the names of what is attached at the time of each call."""
    unet = require_unet(pipe)

    @torch.no_grad()
    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, prompt: str) -> torch.Tensor:
        encoded = pipe.encode_prompt(
            prompt,
            device=execution_device(pipe),
            num_images_per_prompt=len(noisy),
            do_classifier_free_guidance=False,
        )
        extra = added_conditions(pipe, encoded)
        return unet(noisy, timesteps, encoded[0], added_cond_kwargs=extra or None).sample

    return predict


def save_pictures(pictures: Sequence[Picture], folder: Path, details: dict[str, str] | None = None) -> list[Path]:
    """Write PNGs named by number, prompt and seed; prompt, seed and `details` go into their metadata.

    Existing files are never overwritten: numbers go on after the highest one there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in folder.glob("*.png") if (m := re.match(r"(\d+)-", p.name))]
        paths = []
        for number, picture in enumerate(pictures, start=max(taken, default=0) + 1):
            info = PngInfo()
            for key, value in {"prompt": picture.prompt, "seed": str(picture.seed), **(details or {})}.items():
                info.add_text(key, value)
            paths.append(folder / f"{number:04d}-{slug(picture.prompt)}-{picture.seed}.png")
            picture.image.save(paths[-1], pnginfo=info)
        return paths
    except OSError as error:
        raise InfusionError(
            f"{str(folder)!r} cannot be written ({error.strerror}); choose a folder that you may write to."
        ) from None


def free(path: Path) -> Path:
    """The path, or the first of name-2, name-3 and so on that is not there yet."""
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def slug(text: str) -> str:
    """A short file name for a text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "picture"
