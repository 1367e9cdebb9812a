"""The reader: tells from noised latents what a scene shows. The base's training is rewarded by it (`reward.py`).

It is not the judge and shares no weights with it: another network, over latents and noise where the judge looks at pictures, learned from
the base's own training scenes alone. So the judge goes on looking from outside.

It reads style and background at every cell, and that a colour is not there. Else a drawing whose subject is coloured in a sketch would be a
sketch to it, and one with an easier subject (docs/log.md). Since all cells of a scene have one style, subjects of other scenes are pasted
into part of what it learns from: the reader, not the base, meets held-out combinations so, as pieces of two scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from infusion.world.dataset import Batch, Dataset, sample_batch
from infusion.world.judge_lessons import cells, focal_loss, heat_targets
from infusion.world.models import LATENT_CHANNELS, build_scheduler
from infusion.world.runs import Run, generator_of
from infusion.world.segmentation import head_targets, segmentation_loss
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS

READER = "reader.pt"
COLOR_HEADS = ("color1", "color2")
COLORLESS = len(SUBJECT_HEADS["color1"])  # the answer of a colour's head in styles without colours
HEADS = {name: (*names, "colorless") if name in COLOR_HEADS else names for name, names in SUBJECT_HEADS.items()}
STYLE = list(SCENE_HEADS).index("style")
NOISIEST = 500  # timestep up to which it learns to read; beyond it classes are lost in the noise
TIME_WIDTH = 128


@dataclass(frozen=True)
class ReaderConfig:
    """Recipe of the reader. `minutes` is wall time over all parts; `clean` the share of latents without noise; `pasted` that of latents into
    which another scene's subjects are pasted."""

    minutes: float = 35.0
    batch: int = 48
    clean: float = 0.2
    pasted: float = 0.3
    learning_rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.6
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500


@dataclass(frozen=True)
class Seen:
    """The reader's output for b latents, logits by cell, fp32: `heat` (b, g, g) of a subject's centre, `inside` (b, g, g) of a subject,
    `subject` and `scene` (b, names, g, g) by head."""

    heat: Tensor
    inside: Tensor
    subject: dict[str, Tensor]
    scene: dict[str, Tensor]


class Reader(nn.Module):
    """Latents (b, c, 16, 16) noised to timesteps (b,) to `Seen`: blocks at 16x16, at 8x8 and at 16x16 again, a 1x1 head for each
    attribute. 2.5 M parameters."""

    def __init__(self, fine: int = 96, coarse: int = 160) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, TIME_WIDTH), nn.SiLU(), nn.Linear(TIME_WIDTH, TIME_WIDTH), nn.SiLU())
        self.stem = nn.Conv2d(LATENT_CHANNELS, fine, 3, padding=1)
        self.fine = nn.ModuleList(TimedResidual(fine) for _ in range(2))
        self.down = nn.Conv2d(fine, coarse, 3, 2, 1)
        self.coarse = nn.ModuleList(TimedResidual(coarse) for _ in range(3))
        self.back = nn.Conv2d(coarse, fine, 1)
        self.merge = nn.ModuleList(TimedResidual(fine) for _ in range(2))
        self.norm = nn.GroupNorm(16, fine)
        self.heat = nn.Conv2d(fine, 1, 1)
        self.inside = nn.Conv2d(fine, 1, 1)
        self.subject = nn.ModuleDict({name: nn.Conv2d(fine, len(names), 1) for name, names in HEADS.items()})
        self.scene = nn.ModuleDict({name: nn.Conv2d(fine, len(names), 1) for name, names in SCENE_HEADS.items()})

    def forward(self, latents: Tensor, timesteps: Tensor) -> Seen:
        time = self.time(get_timestep_embedding(timesteps, 64, downscale_freq_shift=0, max_period=1000))
        x = self.stem(latents)
        for block in self.fine:
            x = block(x, time)
        coarse = self.down(x)
        for block in self.coarse:
            coarse = block(coarse, time)
        x = x + F.interpolate(self.back(coarse), scale_factor=2.0, mode="nearest")
        for block in self.merge:
            x = block(x, time)
        x = F.silu(self.norm(x))
        return Seen(
            heat=self.heat(x)[:, 0].float(),
            inside=self.inside(x)[:, 0].float(),
            subject={name: head(x).float() for name, head in self.subject.items()},
            scene={name: head(x).float() for name, head in self.scene.items()},
        )


class TimedResidual(nn.Module):
    """x + conv(act(scaled and shifted by the time (norm(conv(act(norm(x)))))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(16, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(16, width), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(TIME_WIDTH, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(h * (1 + scale) + shift))


def noised(latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Latents (b, c, g, g) at timesteps (b,) of the base's schedule; timestep 0 leaves them as they are."""
    alphas = alphas_at(timesteps)
    return torch.where(
        (timesteps > 0)[:, None, None, None], alphas.sqrt() * latents + (1 - alphas).sqrt() * noise, latents
    )


def alphas_at(timesteps: Tensor) -> Tensor:
    """The base's schedule's cumulative alphas at timesteps (b,), (b, 1, 1, 1)."""
    return _alphas().to(timesteps.device)[timesteps][:, None, None, None]


@cache
def _alphas() -> Tensor:
    return build_scheduler().alphas_cumprod


def centres(masks: Tensor, subjects: Tensor) -> Tensor:
    """Centre (x, y) of each subject's mask in cells, (b, s, 2), nan where there is none or hardly any of it. masks (b, s, g, g) in
    [0, 1]; subjects (b, s, heads) as in `truth.visible`."""
    mass = masks.sum((2, 3))
    middles = torch.arange(masks.shape[-1], device=masks.device) + 0.5
    centre = torch.stack([(masks.sum(2) * middles).sum(-1), (masks.sum(3) * middles).sum(-1)], -1) / mass[..., None]
    return centre.masked_fill(((mass <= 1) | (subjects[..., 0] == NONE))[..., None], float("nan"))


@dataclass(frozen=True)
class Lesson:
    """What the reader learns from: latents (b, c, g, g) and their truth. masks (b, s, g, g) in [0, 1]; subjects (b, s, heads) by their place
    in HEADS, NONE where nobody can tell; scene (b, scene heads, g, g) at every cell. pasted (b, g, g) bool: where another scene is."""

    latents: Tensor
    masks: Tensor
    subjects: Tensor
    scene: Tensor
    pasted: Tensor


def lesson(batch: Batch, rng: np.random.Generator, pasted: float) -> Lesson:
    """The batch with its truth; into a share `pasted` of it another's subjects are pasted, in their style, over what was there. A subject of
    which less than six tenths are left is none any more."""
    b, _, side, _ = batch.masks.shape
    subjects = batch.subjects.clone()
    for name in COLOR_HEADS:
        head = subjects[..., list(HEADS).index(name)]
        head[(head == NONE) & (subjects[..., 0] != NONE)] = COLORLESS
    scene = batch.scene[:, :, None, None].expand(-1, -1, side, side).clone()
    donor = torch.from_numpy((np.arange(b) + rng.integers(1, max(2, b), b)) % b)
    chosen = torch.from_numpy(rng.random(b) < pasted)
    over = (batch.masks[donor].amax(1) > 0.25) & chosen[:, None, None]
    left = batch.masks * ~over[:, None]
    lost = left.sum((2, 3)) < 0.6 * batch.masks.sum((2, 3))
    scene[:, STYLE] = torch.where(over, scene[donor, STYLE], scene[:, STYLE])
    return Lesson(
        torch.where(over[:, None], batch.latents[donor], batch.latents),
        torch.cat([left, batch.masks[donor] * over[:, None]], 1),
        torch.cat(
            [
                subjects.masked_fill(lost[..., None], NONE),
                subjects[donor].masked_fill(~chosen[:, None, None], NONE),
            ],
            1,
        ),
        scene,
        over,
    )


def reader_losses(seen: Seen, truth: Lesson) -> dict[str, Tensor]:
    """Loss of each head. A subject's heads are held to the truth at its centre, and at half weight wherever its mask is."""
    device = seen.heat.device
    masks, subjects, scene = (x.to(device) for x in (truth.masks, truth.subjects, truth.scene))
    centre = centres(masks, subjects)
    losses = {
        "heat": focal_loss(seen.heat, heat_targets(centre.cpu()).to(device)),
        "inside": F.binary_cross_entropy_with_logits(seen.inside, masks.sum(1).clamp(max=1)),
    }
    b, s, x, y = cells(centre)
    everywhere = head_targets(subjects, masks)
    for k, name in enumerate(HEADS):
        target = subjects[b, s, k]
        known = target != NONE
        at_centre = segmentation_loss(seen.subject[name][b[known], :, y[known], x[known]], target[known])
        losses[name] = at_centre + 0.5 * segmentation_loss(seen.subject[name], everywhere[:, k])
    for k, name in enumerate(SCENE_HEADS):
        losses[name] = F.cross_entropy(seen.scene[name], scene[:, k])
    return losses


def train_reader(
    reader: Reader, latents: Tensor, data: Dataset, folder: Path, config: ReaderConfig, accelerator: Accelerator
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train by the clock on latents (n, c, g, g) of `data`, yielding (step, losses); resumes from `folder` after a kill. The reader holds
    the averaged weights at the end."""
    device = accelerator.device
    reader.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        reader.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.02, fused=True
    )
    run = Run(reader, optimizer, config, folder / "reader-run.pt")
    while run.unfinished:
        rng = np.random.default_rng((config.seed, 11, run.step))
        rows = rng.choice(len(latents), min(config.batch, len(latents)), replace=False)
        truth = lesson(sample_batch(latents, data, rows, rng), rng, config.pasted)
        levels = NOISIEST * rng.random(len(rows)) ** 1.3 * (rng.random(len(rows)) >= config.clean)
        timesteps = torch.from_numpy(levels.astype(np.int64)).to(device)
        noise = torch.randn(truth.latents.shape, generator=generator_of(rng)).to(device)
        noisy = noised(truth.latents.to(device), timesteps, noise)
        with accelerator.autocast():
            seen = reader(noisy.contiguous(memory_format=torch.channels_last), timesteps)
        losses = reader_losses(seen, truth)
        run.update(torch.stack(list(losses.values())).sum(), accelerator)
        yield run.step, {name: float(loss.detach()) for name, loss in losses.items()}
    run.finish()
    reader.eval()


@torch.no_grad()
def reader_figures(reader: Reader, latents: Tensor, data: Dataset, timestep: int) -> dict[str, float]:
    """Share of right answers of each head on all of `latents` noised to `timestep`: a subject's at its centre, of what shows at all; of
    background and style, of all cells. And of "pasted": of the style where another's subject is, once one is pasted into each."""
    device = next(reader.parameters()).device
    rng = np.random.default_rng(0)
    batch = sample_batch(latents, data, np.arange(len(latents)), rng)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    at = torch.full((len(latents),), timestep)
    read = lambda truth: reader(noised(truth.latents, at, noise).to(device), at.to(device))  # noqa: E731
    truth, mixed = lesson(batch, rng, 0.0), lesson(batch, rng, 1.0)
    seen = read(truth)
    b, s, x, y = cells(centres(truth.masks, truth.subjects))
    right = {}
    for k, name in enumerate(HEADS):
        target = truth.subjects[b, s, k]
        told = seen.subject[name].cpu()[b, :, y, x].argmax(1)
        right[name] = (told == target)[target != NONE]
    for k, name in enumerate(SCENE_HEADS):
        right[name] = seen.scene[name].cpu().argmax(1) == truth.scene[:, k]
    right["pasted"] = (read(mixed).scene["style"].cpu().argmax(1) == mixed.scene[:, STYLE])[mixed.pasted]
    return {name: round(float(told.float().mean()), 4) for name, told in right.items()}
