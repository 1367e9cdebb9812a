"""How well a base does on scenes that its training never draws: denoising losses and the map gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from infusion.world.dataset import GRID, Dataset, build_dataset, load_dataset, sample_batch
from infusion.world.grounding import MapGate, map_gate, mean_heat, recorded_maps
from infusion.world.models import build_scheduler


@dataclass(frozen=True)
class Validation:
    """Denoising loss of the averaged weights on scenes that training never sees, by timestep: over
    the whole picture, and inside the subjects' masks alone."""

    whole: dict[int, float]
    subject: dict[int, float]


SEED = 1_000_003  # of the scenes that no training draws


def validation_scenes(folder: Path, count: int = 256) -> Dataset:
    """Fresh scenes, drawn into `folder`."""
    for _ in build_dataset(folder, count, SEED):
        pass
    return load_dataset(folder)


@torch.no_grad()
def validate(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: Tensor,
    data: Dataset,
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900),
) -> Validation:
    """Denoising loss at fixed timesteps with fixed captions and noise, on all of `latents`."""
    rows = np.arange(len(latents))
    batch = sample_batch(latents, data, rows, np.random.default_rng(0))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    alphas = build_scheduler().alphas_cumprod
    inside = batch.masks.sum(1, keepdim=True).clamp(max=1)
    states = text_encoder(batch.ids.to(unet.device)).last_hidden_state
    whole, subject = {}, {}
    for t in timesteps:
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noisy = (a * batch.latents + s * noise).to(unet.device)
        parts = [unet(noisy[i : i + 64], t, states[i : i + 64]).sample.float().cpu() for i in range(0, len(rows), 64)]
        error = (torch.cat(parts) - (a * noise - s * batch.latents)).square().mean(1, keepdim=True)
        whole[t] = round(float(error.mean()), 4)
        subject[t] = round(float((error * inside).sum() / inside.sum()), 4)
    return Validation(whole, subject)


@torch.no_grad()
def measure_maps(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: Tensor,
    data: Dataset,
    timesteps: tuple[int, ...] = (400, 500, 600),
) -> MapGate:
    """The map gate at middle timesteps on all of `latents`: maps averaged over the layers of 16x16 and
    8x8, all heads and the timesteps."""
    count = len(latents)
    rows = np.arange(count)
    batch = sample_batch(latents, data, rows, np.random.default_rng(0))
    alphas = build_scheduler().alphas_cumprod
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    states = text_encoder(batch.ids.to(unet.device)).last_hidden_state
    heat = torch.zeros(count, batch.words.shape[1], GRID, GRID)
    with recorded_maps(unet) as records:
        for t in timesteps:
            for i in range(0, count, 64):
                part = slice(i, i + 64)
                noisy = alphas[t].sqrt() * batch.latents[part] + (1 - alphas[t]).sqrt() * noise[part]
                unet(noisy.to(unet.device), t, states[part])
                heat[part] += mean_heat(records, batch.words[part].to(unet.device), GRID).cpu() / len(timesteps)
                records.clear()
    return map_gate(heat, batch.words, batch.masks)
