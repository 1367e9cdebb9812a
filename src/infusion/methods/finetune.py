"""Full fine-tune of the UNet on the subject's photos: DreamBooth (arXiv 2208.12242) without prior preservation.

Every weight of a copy of the UNet is trained with the plain denoising loss on the whole picture.
The subject is called by its class word, as the embedded base has no rare token to spare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from infusion.lesson import Lesson
from infusion.streams import require_unet


@dataclass(frozen=True)
class FinetuneConfig:
    """steps x batch samples are seen. The learning rate is for the embedded base; at Stable Diffusion's
    size DreamBooth uses 5e-6."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class FinetuneState:
    """State after `step`: the batch's loss and the UNet as it is now (the same object at every step)."""

    step: int
    steps: int
    loss: float
    unet: nn.Module


def finetuning(
    pipe: DiffusionPipeline, lesson: Lesson, config: FinetuneConfig | None = None
) -> Iterator[FinetuneState]:
    """Train a copy of the pipeline's UNet, yielding after every step; `pipe` itself stays as it is."""
    config = config or FinetuneConfig()
    unet = copy.deepcopy(require_unet(pipe)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(1, config.steps + 1):
        draw = lesson.draw(config.batch, generator)
        prediction = unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        loss = (prediction.float() - draw.target.float()).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield FinetuneState(step, config.steps, float(loss.detach()), unet)


def with_unet(pipe: DiffusionPipeline, unet: nn.Module) -> DiffusionPipeline:
    """A pipeline like `pipe` with another UNet; everything else is shared."""
    tuned = type(pipe)(**{**pipe.components, "unet": unet.eval()}, requires_safety_checker=False)
    tuned.set_progress_bar_config(disable=True)
    return tuned
