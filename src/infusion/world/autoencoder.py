"""Stage one of pretraining: the autoencoder.

Most of it is learned on quarter-size crops, which cost a quarter and hold the same strokes; the last
part on whole scenes, so that group norms see what they will see in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from infusion.world.dataset import Dataset
from infusion.world.models import build_autoencoder, pixels_to_tensor
from infusion.world.runs import Run, generator_of, save_whole
from infusion.world.scenes import SIDE

ENCODED = "latents.pt"


@dataclass(frozen=True)
class AutoencoderConfig:
    """`minutes` of wall time over all parts; `whole` is the share of it, at the end, on whole scenes of a fourth the batch."""

    minutes: float = 40.0
    batch: int = 16
    crop: int = 32
    whole: float = 0.15
    learning_rate: float = 1.5e-3
    kl_weight: float = 1e-5  # of the mean KL; larger values collapse the latents
    warmup: int = 200
    decay: float = 0.7
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500


def train_autoencoder(
    model: AutoencoderKL, data: Dataset, folder: Path, config: AutoencoderConfig, accelerator: Accelerator
) -> Iterator[tuple[int, float]]:
    """Train by the clock, yielding (step, mean squared error); resumes from `folder` after a kill. The model holds the averaged
    weights at the end."""
    model.to(accelerator.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    run = Run(model, optimizer, config, folder / "autoencoder.pt")
    while run.unfinished:
        rng = np.random.default_rng((config.seed, run.step))
        batch = _batch(data, rng, config, whole=run.share >= 1 - config.whole).to(accelerator.device)
        with accelerator.autocast():
            posterior = model.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator_of(rng)).to(posterior.mean)
            decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - batch
        mse = error.square().mean()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        run.update(mse + 0.1 * error.abs().mean() + config.kl_weight * kl, accelerator)
        yield run.step, float(mse.detach())
    run.finish()
    model.eval()


@torch.no_grad()
def encode_dataset(model: AutoencoderKL, data: Dataset, batch: int = 64) -> torch.Tensor:
    """Posterior means of all scenes, (n, channels, 16, 16) float16 on the CPU."""
    latents = [
        model.encode(_tensor(data.pixels[i : i + batch], model)).latent_dist.mean.half().cpu()
        for i in range(0, len(data), batch)
    ]
    return torch.cat(latents)


@torch.no_grad()
def standardize(model: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Fold each latent channel's mean and spread over `latents` into the model's 1x1 convolutions.

    Afterwards latents have mean 0 and variance 1 per channel, so that `scaling_factor` is 1 and no
    channel drowns another in the denoising loss. Returns the latents, moved along.
    """
    mean = latents.float().mean(dim=(0, 2, 3)).to(model.device)
    std = latents.float().std(dim=(0, 2, 3)).to(model.device)
    c = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()  # the second half is log variance
    post.bias.add_(post.weight[:, :, 0, 0] @ mean)
    post.weight *= std[None, :, None, None]
    mean, std = mean.cpu()[:, None, None], std.cpu()[:, None, None]
    return ((latents.float() - mean) / std).half()


def save_encoded(folder: Path, model: AutoencoderKL, latents: torch.Tensor) -> None:
    """Keep the autoencoder and its latents of the whole set in `folder`; a kill leaves none or all."""
    save_whole({"latents": latents, "autoencoder": model.state_dict()}, folder / ENCODED)


def load_encoded(folder: Path) -> tuple[AutoencoderKL, torch.Tensor]:
    """What `save_encoded` kept. Raises FileNotFoundError where nothing was."""
    state = torch.load(folder / ENCODED, map_location="cpu", weights_only=True)
    model = build_autoencoder()
    model.load_state_dict(state["autoencoder"])
    return model.eval(), state["latents"]


@torch.no_grad()
def autoencoded(model: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] there and back, by the posterior's mean."""
    return model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)


def psnr(model: AutoencoderKL, pixels: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB over pictures (n, h, w, 3) uint8, from the posterior's mean."""
    x = _tensor(pixels, model)
    mse = ((autoencoded(model, x) - x) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


def _tensor(pixels: np.ndarray, model: AutoencoderKL) -> torch.Tensor:
    x = pixels_to_tensor(torch.from_numpy(np.array(pixels))).to(model.device, model.dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _batch(data: Dataset, rng: np.random.Generator, config: AutoencoderConfig, whole: bool) -> torch.Tensor:
    """Crops, or whole scenes in a fourth the number, mirrored half of the time."""
    count, size = (max(1, config.batch // 4), SIDE) if whole else (config.batch, config.crop)
    rows = rng.integers(len(data), size=count)
    corners = rng.integers(0, SIDE - size + 1, (count, 2))
    crops = np.stack([data.pixels[i, y : y + size, x : x + size] for i, (y, x) in zip(rows, corners, strict=True)])
    if rng.random() < 0.5:
        crops = crops[:, :, ::-1]
    x = pixels_to_tensor(torch.from_numpy(np.ascontiguousarray(crops)))
    return x.contiguous(memory_format=torch.channels_last)
