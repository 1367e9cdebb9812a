"""What the judge learns from: the truth of a batch as tensors, and pictures as generators spoil them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from infusion.world.judge import GRID
from infusion.world.truth import NONE, SUBJECT_HEADS
from infusion.world.twins import CHANGES, Families


@dataclass(frozen=True)
class Labels:
    """Truth of a batch as tensors; fields as in `twins.Families`."""

    subject: Tensor
    scene: Tensor
    centre: Tensor
    change: Tensor


def labels_of(data: Families, rows: np.ndarray) -> Labels:
    """The truth of the pictures `rows`."""
    return Labels(
        torch.from_numpy(data.subject[rows].astype(np.int64)),
        torch.from_numpy(data.scene[rows].astype(np.int64)),
        torch.from_numpy(data.centre[rows]),
        torch.from_numpy(data.change[rows].astype(np.int64)),
    )


def heat_targets(centre: Tensor) -> Tensor:
    """Gaussians of one cell's width about every subject's centre (b, s, 2), the highest counting, and exactly 1 in the cell
    of each centre: (b, g, g) in [0, 1]."""
    middles = torch.arange(GRID) + 0.5
    dx, dy = middles - centre[..., :1], middles - centre[..., 1:]  # (b, s, g) each
    heat = torch.exp(-(dy[..., :, None] ** 2 + dx[..., None, :] ** 2) / 2).nan_to_num(0.0).amax(1)
    b, _, x, y = cells(centre)
    heat[b, y, x] = 1  # else a centre near a cell's corner would have no positive at all
    return heat


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of CenterNet (arXiv 1904.07850, equation 1), per subject, of heat logits (b, g, g) for `heat_targets`."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = (target == 1).float()
    loss = peak * (1 - p) ** 2 * p.log() + (1 - peak) * (1 - target) ** 4 * p**2 * (1 - p).log()
    return -loss.sum() / peak.sum().clamp_min(1)


def cells(centre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Picture, subject, column and row of every subject's centre (b, s, 2), nan where there is none."""
    b, s = torch.nonzero(~centre.isnan().any(-1), as_tuple=True)
    x, y = centre[b, s].long().clamp(0, GRID - 1).unbind(-1)
    return b, s, x, y


def shows_change(labels: Labels) -> Tensor:
    """Whether each picture (n,) shows, of its first subject, the attribute in which the family's twin differs."""
    heads = [list(SUBJECT_HEADS).index(c) if c in SUBJECT_HEADS else -1 for c in CHANGES]  # a shape always shows
    head = torch.tensor(heads)[labels.change]
    told = labels.subject[:, 0].gather(1, head.clamp_min(0)[:, None])[:, 0] != NONE
    return told | (head < 0)


def corrupt(
    pictures: Tensor,
    autoencoder: AutoencoderKL | None,
    rng: np.random.Generator,
    share: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What generators do to pictures (n, 3, h, w) in [-1, 1]: half of `share` warped, and a third of `share` each autoencoded,
    blurred and noised, on the pictures' device, where the autoencoder must be too. generator: of the noise, on the CPU."""
    out = pictures.clone()
    device = out.device
    bent = torch.from_numpy(np.flatnonzero(rng.random(len(out)) < share / 2))
    out[bent] = warp(out[bent], rng)
    kind = rng.choice(4, size=len(out), p=(1 - share, share / 3, share / 3, share / 3))
    coded = torch.from_numpy(np.flatnonzero(kind == 1))
    if autoencoder is not None and len(coded):
        with torch.no_grad():
            latents = autoencoder.encode(out[coded]).latent_dist.mean
            latents = latents + torch.randn(latents.shape, generator=generator).to(latents) * float(rng.uniform(0, 0.3))
            out[coded] = autoencoder.decode(latents).sample.float().clamp(-1, 1)
    blurred = torch.from_numpy(np.flatnonzero(kind == 2))
    amount = torch.from_numpy(rng.uniform(0.2, 1, (len(blurred), 1, 1, 1)).astype(np.float32)).to(device)
    padded = F.pad(out[blurred], (1, 1, 1, 1), mode="replicate")
    out[blurred] = out[blurred].lerp(F.avg_pool2d(padded, 3, 1), amount)
    noised = torch.from_numpy(np.flatnonzero(kind == 3))
    sigma = torch.from_numpy(rng.uniform(0.02, 0.2, (len(noised), 1, 1, 1)).astype(np.float32))
    noise = (sigma * torch.randn(len(noised), *out.shape[1:], generator=generator)).to(device)
    out[noised] = (out[noised] + noise).clamp(-1, 1)
    return out


def warp(pictures: Tensor, rng: np.random.Generator, pixels: float = 1.2) -> Tensor:
    """Pictures (n, 3, h, w) bent by smooth random fields of about `pixels` pixels, as outlines are that a generator wobbles."""
    n, _, h, w = pictures.shape
    if n == 0:
        return pictures
    coarse = torch.from_numpy(rng.normal(0, pixels * 2 / w, (n, 2, 6, 6)).astype(np.float32))
    field = F.interpolate(coarse.to(pictures.device), size=(h, w), mode="bicubic", align_corners=False).permute(
        0, 2, 3, 1
    )
    straight = F.affine_grid(torch.eye(2, 3, device=pictures.device).expand(n, 2, 3), [n, 3, h, w], align_corners=False)
    return F.grid_sample(pictures, straight + field, padding_mode="border", align_corners=False)


def mirrored(pictures: Tensor, labels: Labels, rng: np.random.Generator) -> tuple[Tensor, Labels]:
    """Half of the pictures (n, 3, h, w) mirrored, and their truth: left is right then, nothing else changes."""
    turned = torch.from_numpy(rng.random(len(pictures)) < 0.5)
    x, y = labels.centre.unbind(-1)
    centre = torch.stack([torch.where(turned[:, None], GRID - x, x), y], -1)
    return torch.where(turned[:, None, None, None].to(pictures.device), pictures.flip(-1), pictures), replace(
        labels, centre=centre
    )
