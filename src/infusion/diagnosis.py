"""Why a concept does or does not carry over: its loss on fixed validation draws, and its word's maps.

    validation_loss(pipe, lesson)                      the base alone, per timestep
    validation_loss(pipe, lesson, concept.residuals)   with the concept
    layer_maps(pipe, lesson)                           where each layer looks at the class word

A lesson of photos that were not learned from tells learning from repeating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from infusion.lesson import Lesson, foundational_passes, layer_heats
from infusion.streams import Streams, require_unet
from infusion.training import masked_loss, predict

TIMESTEPS = (100, 300, 500, 700, 900)


@torch.no_grad()
def validation_loss(
    pipe: DiffusionPipeline,
    lesson: Lesson,
    residuals: Mapping[str, Tensor] | None = None,
    two_streams: bool = True,
    max_timestep: int | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
) -> dict[int, float]:
    """The training loss (`masked_loss`) at each timestep on fixed draws: every latent of the lesson once, captions in
    turn, noise from `seed`. Without residuals it is the loss of the pipeline's UNet as it is, as it is at timesteps from `max_timestep` on, which a
    concept leaves to the base. Leaves nothing attached.
    """
    unet = require_unet(pipe)
    n = len(lesson.latents)
    streams = Streams(unet)
    streams.residuals = {lesson.name: residuals or {}}
    streams.two_streams = two_streams
    streams.limits = {lesson.name: max_timestep} if max_timestep else {}
    losses = {}
    try:
        for i, t in enumerate(timesteps):
            noise = torch.randn(lesson.latents.shape, generator=torch.Generator().manual_seed(seed + i))
            captions = torch.arange(n) % len(lesson.texts.states)
            draw = lesson.batch(torch.arange(n), captions, torch.full((n,), t), noise)
            losses[t] = float(masked_loss(predict(streams, draw), draw))
    finally:
        streams.remove()
    return losses


def layer_maps(pipe: DiffusionPipeline, lesson: Lesson) -> dict[str, Tensor]:
    """The base's maps of the class word on every latent of the lesson, by layer: (n, g, g) in the layer's own
    resolution, mean over heads and middle timesteps; values are shares of attention in [0, 1]."""
    passes = [layer_heats(recorded, plan) for recorded, plan in foundational_passes(lesson, require_unet(pipe))]
    return {path: torch.stack([heats[path] for heats in passes]).mean(0) for path in passes[0]}
