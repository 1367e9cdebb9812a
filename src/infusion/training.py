"""Learn a concept: a generator that yields its state.

    for state in infusion.learning(pipe, photos, word="dog", name="milo"):
        print(state.step, state.loss)      # progress, samples and early stops are the caller's
    concept = state.concept

The base stays frozen. Per step the foundational stream runs once without gradient and leaves its
attention outputs and the word's heat; the customized stream replays them and learns the residuals (arXiv 2404.14007).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from infusion.concept import BaseInfo, Concept
from infusion.config import hold_types
from infusion.errors import InfusionError
from infusion.fit import base_info
from infusion.lesson import Draw, Lesson, joined, parted, prepare_lesson
from infusion.packing import SCHEMES
from infusion.photos import Photo, load_photos
from infusion.streams import Streams, execution_device, frozen, require_unet, value_lengths


@dataclass(frozen=True)
class LearnConfig:
    """How a concept is learned.

    steps x batch samples are seen; the authors' 500 x 16 = 8,000 is ample, this default fits 90 s on 2 CPU cores.
    learning_rate: by default 0.06 where a quarter of the timesteps or more is left to the base, else 0.02, in the middle of the authors' 0.01 (SD1.5)
    to 0.03 (SD2.1): at all timesteps faster ones pull subjects to the photos' place. max_timestep: only timesteps below it are learned from and drawn with,
    so that layouts stay the base's; by default where they are settled (`Lesson.settled`: 650 of 1,000 on the embedded base, 950 on Stable Diffusion
    1.5); the authors use all, 1,000. strength: the share of what was learned that the concept holds. two_streams=False is
    the single-stream ablation. layers: substrings of module paths that get a residual; empty means all. scheme: of the file whose
    grid the returned values are on ("q6", "fp16" or "fp32"); learning itself is the same.
    """

    steps: int = 200
    batch: int = 8
    learning_rate: float | None = None
    max_timestep: int | None = None
    strength: float = 1.0
    flip: bool = True
    masked: bool = True
    two_streams: bool = True
    layers: tuple[str, ...] = ()
    scheme: str = "q6"
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)
        for field in ("steps", "batch", "max_timestep"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise InfusionError(f"{field} is {value}; it must be at least 1.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise InfusionError(
                f"learning_rate is {self.learning_rate}; it must lie between 0 and 10, usually 0.01 to 0.1."
            )
        if not 0 < self.strength <= 1:
            raise InfusionError(f"strength is {self.strength}; it must lie above 0 and be at most 1, usually 0.5 or 1.")
        if self.scheme not in SCHEMES:
            raise InfusionError(f"scheme is {self.scheme!r}; use one of {', '.join(SCHEMES)}.")


@dataclass(frozen=True)
class LearnState:
    """State after `step` of `steps`: the batch's masked loss, and the concept so far, on its file's grid."""

    step: int
    steps: int
    loss: float
    concept: Concept


def learning(
    pipe: DiffusionPipeline,
    photos: str | Path | Sequence[Image.Image | Photo] | Lesson,
    word: str,
    name: str,
    config: LearnConfig | None = None,
    at_once: int | None = None,
) -> Generator[LearnState]:
    """Learn a concept step by step; every step yields its `LearnState`.

    photos: a folder, pictures, or a prepared `Lesson`, which has its own say on `flip` and `masked`. word: the class word, as the base knows it.
    at_once: samples that the UNet takes at a time; fewer need less memory, and teach the same but for rounding. By default all on small bases, 4 on
    Stable Diffusion's latents of 64 x 64, 1 on larger ones.
    The same seed on the same machine gives the same concept, on a GPU but for rounding. Leaves nothing on the pipeline,
    also when the caller stops early.
    """
    config = config or LearnConfig()
    Concept(name, word, {})  # names are checked before any work
    lesson = (
        photos
        if isinstance(photos, Lesson)
        else prepare_lesson(pipe, load_photos(photos), word, name, flip=config.flip, masked=config.masked)
    )
    if (lesson.word, lesson.name) != (word, name):
        raise InfusionError(
            f"The lesson is of <{lesson.name}>, a {lesson.word!r}; prepare one of <{name}>, a {word!r}, or learn by its own names."
        )
    with closing(learning_together(pipe, [lesson], config, at_once)) as states:
        for (state,) in states:
            yield state


def learning_together(
    pipe: DiffusionPipeline,
    lessons: Sequence[Lesson],
    config: LearnConfig | None = None,
    at_once: int | None = None,
) -> Generator[tuple[LearnState, ...]]:
    """Learn several concepts side by side, in common UNet calls; every step yields the state of each, in the lessons' order.

    Every lesson draws `config.batch` samples a step from a generator of its own, so each concept is the one that `learning` would give
    alone, but for rounding: the base is frozen, and rows do not see each other. A step holds the activations of `at_once` of their samples (see
    `learning`).
    """
    config = config or LearnConfig()
    if at_once is not None and at_once < 1:
        raise InfusionError(f"at_once is {at_once}; it must be at least 1.")
    unet = require_unet(pipe)
    names = [lesson.name for lesson in lessons]
    if not names or len(set(names)) < len(names):
        raise InfusionError(
            f"The lessons are of {', '.join(f'<{n}>' for n in names) or 'nothing'}; give one at least, each of another name."
        )
    residuals = {name: _zeros(pipe, config.layers) for name in names}
    base = base_info(pipe)
    configs = [_resolved(config, lesson) for lesson in lessons]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(residuals[lesson.name].values()), "lr": own.learning_rate}
            for lesson, own in zip(lessons, configs, strict=True)
        ]
    )
    scaler = torch.amp.GradScaler(  # small gradients vanish in fp16
        execution_device(pipe).type, enabled=unet.dtype == torch.float16
    )
    generators = [torch.Generator().manual_seed(config.seed) for _ in lessons]
    streams = Streams(unet)
    streams.residuals = residuals
    streams.two_streams = config.two_streams
    try:
        with frozen(unet):
            for step in range(1, config.steps + 1):
                draws = [
                    lesson.draw(config.batch, generator, own.max_timestep)
                    for lesson, generator, own in zip(lessons, generators, configs, strict=True)
                ]
                losses = []
                for part in parted(joined(draws), at_once or _fitting(unet, len(lessons) * config.batch)):
                    each = row_losses(predict(streams, part), part)
                    scaler.scale(each.sum() / config.batch).backward()
                    losses.append(each.detach())
                values = torch.cat(losses).unflatten(0, (-1, config.batch)).mean(1).tolist()
                for name, value, own in zip(names, values, configs, strict=True):
                    if not math.isfinite(value):
                        raise InfusionError(
                            f"The loss of <{name}> is {value} at step {step}; learn in fp32 or bf16, or with a lower learning rate than {own.learning_rate}."
                        )
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() < 1:  # it halves whenever a gradient is not finite, and the step is left out
                    raise InfusionError(f"The gradients at step {step} are not finite in fp16; learn in fp32 or bf16.")
                optimizer.zero_grad(set_to_none=True)
                yield tuple(
                    LearnState(step, config.steps, value, _concept(lesson, residuals[lesson.name], own, step, base))
                    for lesson, value, own in zip(lessons, values, configs, strict=True)
                )
    finally:
        streams.remove()


def learn(
    pipe: DiffusionPipeline,
    photos: str | Path | Sequence[Image.Image | Photo] | Lesson,
    word: str,
    name: str,
    config: LearnConfig | None = None,
    at_once: int | None = None,
) -> Concept:
    """Learn a concept from a few photos of one subject and return it. See `learning` for the arguments."""
    state = None
    for state in learning(pipe, photos, word, name, config, at_once):  # noqa: B007 - the last one counts, no other is kept
        pass
    assert state is not None
    return state.concept


def predict(streams: Streams, draw: Draw) -> Tensor:
    """The customized stream's prediction for a batch in which every row carries the concept.

    Two streams: one pass of the base without gradient, then the customized stream alone on what it left.
    """
    if streams.two_streams:
        with streams.calls(draw.plan, "record"), torch.no_grad():
            streams.unet(draw.noisy, draw.timesteps, **draw.kwargs)
    with streams.calls(draw.plan, "replay" if streams.two_streams else "joint"):
        return streams.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample


def row_losses(prediction: Tensor, draw: Draw) -> Tensor:
    """For each row the mean over its elements of (m * prediction - m * target)^2, in float32: (b,)."""
    error = draw.mask.float() * (prediction.float() - draw.target.float())
    return error.square().flatten(1).mean(1)


def masked_loss(prediction: Tensor, draw: Draw) -> Tensor:
    """The mean of `row_losses`."""
    return row_losses(prediction, draw).mean()


def _fitting(unet: UNet2DConditionModel, rows: int) -> int:
    """How many of the rows the UNet takes at a time where nobody says: a row of Stable Diffusion 1.5 keeps 1.4 GiB for the way back, of XL 9.5."""
    side: int = unet.config["sample_size"]
    return rows if side <= 32 else max(1, 4 * 64**2 // side**2)


def _resolved(config: LearnConfig, lesson: Lesson) -> LearnConfig:
    """The configuration with what the lesson has its own say on or decides where nothing is given; max_timestep None for all."""
    steps = lesson.noise.config["num_train_timesteps"]
    limit = config.max_timestep or lesson.settled
    rate = 0.06 if limit <= 0.75 * steps else 0.02
    return replace(
        config,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        max_timestep=limit if limit < steps else None,
        flip=lesson.flipped,
        masked=lesson.masked,
    )


def _zeros(pipe: DiffusionPipeline, layers: Sequence[str]) -> dict[str, Tensor]:
    """A residual of zeros for every layer whose path holds one of `layers`, for all where there are none."""
    device = execution_device(pipe)
    residuals = {
        path: torch.zeros(length, device=device, requires_grad=True)
        for path, length in value_lengths(require_unet(pipe)).items()
        if not layers or any(part in path for part in layers)
    }
    if not residuals:
        raise InfusionError(
            f"No cross-attention layer matches {', '.join(layers)}; give parts of module paths such as 'up_blocks'."
        )
    return residuals


def _concept(
    lesson: Lesson, residuals: Mapping[str, Tensor], config: LearnConfig, step: int, base: BaseInfo
) -> Concept:
    """What is learned by now, at the strength that is held, on its file's grid."""
    settings = {**_plain(config), "steps": step}
    held = {path: config.strength * learned for path, learned in _on_cpu(residuals).items()}
    return Concept(lesson.name, lesson.word, held, settings, base).on_grid(config.scheme)


def _on_cpu(residuals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, fetched at once: a device would be waited for at every one, and at every check of them."""
    values = torch.cat([r.detach() for r in residuals.values()]).cpu()
    return dict(zip(residuals, values.split([len(r) for r in residuals.values()]), strict=True))


def _plain(config: LearnConfig) -> dict[str, int | float | str | bool]:
    """The settings that a file keeps; the scheme has a field of its own."""
    layers = {"layers": named} if 0 < len(named := " ".join(config.layers)) < 300 else {}  # the file lists them anyway
    return {k: v for k, v in asdict(config).items() if isinstance(v, int | float)} | layers
