"""Text encoder and UNet trained together: denoising, and the terms beside it; a generator that yields its state.

`pretrain.py` draws what they learn from, trains the autoencoder before them, and has the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel

from infusion.errors import InfusionError
from infusion.world.autoencoder import AutoencoderConfig
from infusion.world.dataset import Batch, Dataset, sample_batch
from infusion.world.grounding import grounding_loss, recorded_maps
from infusion.world.models import build_scheduler
from infusion.world.picking import best_score, save_best
from infusion.world.reader import Reader, ReaderConfig
from infusion.world.reward import RewardConfig, Standards, own_states, reward
from infusion.world.runs import Run, adamw, generator_of
from infusion.world.segmentation import (
    SegmentationHead,
    attribute_loss,
    attribute_targets,
    class_targets,
    segmentation_loss,
)
from infusion.world.separation import meanings, separation_loss
from infusion.world.tokenizer import build_tokenizer
from infusion.world.validation import Validation, validate

CHECKPOINT = "base.pt"


@dataclass(frozen=True)
class PretrainConfig:
    """Recipe of the base. `minutes` is wall time of the last stage over all its resumed parts."""

    scenes: int = 40_000
    minutes: float = 90.0
    batch: int = 32
    learning_rate: float = 4e-4  # 1e-3 stalls (docs/log.md)
    warmup: int = 200
    decay: float = 0.4  # share of the time, at the end, over which the learning rate falls to zero
    caption_dropout: float = 0.1
    grounding_weight: float = 0.5
    separation_weight: float = 0.2
    segmentation_weight: float = 0.3
    attribute_weight: float = 0.2
    subject_weight: float = 2.0  # how much more an error inside a subject's mask counts
    reward_weight: float = 0.0  # of what the base's own drawings earn (`reward.py`)
    ema: float = 0.999
    seed: int = 0
    from_weights: bool = False
    save_every: int = 500
    validate_every: int = 1000
    judge_every: int = 2000
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True)
class Progress:
    """State yielded by `train_base` after every step: pictures seen, seconds spent, the batch's losses by name (`Terms`; where the base's own
    drawings are rewarded what they gained too), and every `validate_every` steps the validation, every `judge_every` the judge's score."""

    step: int
    seen: int
    seconds: float
    losses: dict[str, float]
    learning_rate: float
    validation: Validation | None = None
    score: float | None = None


def draw_timesteps(rng: np.random.Generator, count: int, steps: int) -> Tensor:
    """Training timesteps (count,): 70 % logit-normal about 0.62 of `steps`, where captions decide shapes
    (arXiv 2403.03206, section 3.1), the rest uniform, so that no noise level is left out."""
    middle = steps / (1 + np.exp(-rng.normal(0.5, 1.0, count)))
    drawn = np.where(rng.random(count) < 0.7, middle, rng.uniform(0, steps, count))
    return torch.from_numpy(drawn.astype(np.int64).clip(0, steps - 1))


def subject_weights(masks: Tensor, extra: float) -> Tensor:
    """Weights (b, 1, g, g) of mean 1 over the batch for a loss: 1 outside the masks (b, s, g, g), 1 + extra inside."""
    weights = 1 + extra * masks.sum(1, keepdim=True).clamp(max=1)
    return weights / weights.mean()


class Terms(NamedTuple):
    """Losses of one batch, scalars, unweighted."""

    denoising: Tensor
    grounding: Tensor
    separation: Tensor
    segmentation: Tensor
    attribute: Tensor

    def weighted(self, config: PretrainConfig) -> Tensor:
        """Their sum with the recipe's weights."""
        return (
            self.denoising
            + config.grounding_weight * self.grounding
            + config.separation_weight * self.separation
            + config.segmentation_weight * self.segmentation
            + config.attribute_weight * self.attribute
        )


def batch_terms(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    head: SegmentationHead,
    records: list[Tensor],
    batch: Batch,
    timesteps: Tensor,
    noise: Tensor,
    alphas: Tensor,
    table: Tensor,
    config: PretrainConfig,
    time_weights: Tensor | None = None,
) -> Terms:
    """Both networks' losses on a batch at `timesteps` (b,) with `noise` (b, c, g, g). records: the list that the UNet's maps go to
    (`recorded_maps`). alphas (T,): the schedule. table: `meanings` of the vocabulary. time_weights (T,): how much a denoising error at each
    timestep counts; all the same without. The networks run in the caller's autocast, losses in fp32."""
    device = alphas.device
    clean, ids, masks, words = (x.to(device) for x in (batch.latents, batch.ids, batch.masks, batch.words))
    timesteps, noise = timesteps.to(device), noise.to(device)
    a = alphas[timesteps].sqrt()[:, None, None, None]
    s = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    noisy, target = a * clean + s * noise, a * noise - s * clean
    states = text_encoder(ids).last_hidden_state
    predicted = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, states).sample
    logits, attribute_logits = head()
    with torch.autocast(device.type, enabled=False):
        weights = subject_weights(masks, config.subject_weight)
        if time_weights is not None:
            weights = weights * time_weights[timesteps][:, None, None, None]
        return Terms(
            denoising=(weights * (predicted.float() - target).square()).mean(),
            grounding=grounding_loss(records, words, masks),
            separation=separation_loss(states, ids, table),
            segmentation=segmentation_loss(logits, class_targets(ids, words, masks, table)),
            attribute=attribute_loss(attribute_logits, attribute_targets(batch.subjects.to(device), masks)),
        )


def train_base(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: Tensor,
    data: Dataset,
    validation: tuple[Tensor, Dataset],
    folder: Path,
    config: PretrainConfig,
    accelerator: Accelerator,
    inspect: Callable[[], float] | None = None,
    reader: Reader | None = None,
) -> Iterator[Progress]:
    """Train both networks with v-prediction, the terms of `PretrainConfig`; they hold the averaged weights at the end.

    Every step yields; every `save_every` steps and at the end a checkpoint is written to `folder`,
    from which a later call with the same folder goes on. inspect: a score of the networks as they are, higher is
    better; the best averaged weights by it are kept in `folder` (`picking.save_best`). reader: rewards the base's own drawings, where
    `config.reward_weight` is above 0; drawings begun before a kill are not gone on with, and the shares of what nobody
    named are counted anew. Raises InfusionError for such a weight without a reader.
    """
    if config.reward_weight > 0 and reader is None:
        raise InfusionError(
            f"reward_weight is {config.reward_weight:g}, which wants a reader (`prepare_reader`); give one, or a weight of 0."
        )
    set_seed(config.seed)
    device = accelerator.device
    unet.to(device, memory_format=torch.channels_last)
    text_encoder.to(device)
    standards = Standards.begin(reader, text_encoder, unet, config.reward) if config.reward_weight > 0 else None
    head = SegmentationHead(unet).to(device)
    networks = nn.ModuleDict({"unet": unet, "text": text_encoder, "head": head})
    run = Run(networks, adamw(networks, config.learning_rate), config, folder / CHECKPOINT)
    best = best_score(folder) if run.step else float("-inf")
    alphas = build_scheduler().alphas_cumprod.to(device)
    table = meanings(build_tokenizer()).to(device)
    own = own_states(text_encoder, unet, np.random.default_rng((config.seed, 13, run.step)), config.reward)
    with recorded_maps(unet) as records, ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(draw_batch, latents, data, config, run.step, len(alphas))
        while run.unfinished:
            batch, timesteps, noise = coming.result()
            coming = ahead.submit(draw_batch, latents, data, config, run.step + 1, len(alphas))
            with accelerator.autocast():
                terms = batch_terms(text_encoder, unet, head, records, batch, timesteps, noise, alphas, table, config)
                loss, gain = terms.weighted(config), None
                if standards is not None:
                    rng = np.random.default_rng((config.seed, 17, run.step))
                    with _unrecorded(unet):
                        gain = reward(text_encoder, unet, standards, next(own), rng, config.reward)
                    loss = loss - config.reward_weight * gain.reward
            records.clear()
            rate = run.learning_rate
            run.update(loss, accelerator)
            measured = score = None
            validates, judges = run.step % config.validate_every == 0, inspect and run.step % config.judge_every == 0
            if validates or judges:
                with run.averaged(), _unrecorded(unet):
                    if validates:
                        measured = validate(text_encoder, unet, *validation)
                    if judges and (score := inspect()) > best:
                        best = score
                        save_best(folder, text_encoder, unet, score, run.step)
            parts = terms._asdict() | (gain._asdict() if gain else {})
            values = torch.stack([part.detach() for part in parts.values()]).tolist()  # waits for the device once
            losses = dict(zip(parts, values, strict=True))
            yield Progress(run.step, run.step * config.batch, run.seconds, losses, rate, measured, score)
    run.finish()
    head.remove()


def draw_batch(
    latents: Tensor, data: Dataset, config: PretrainConfig, step: int, timesteps: int
) -> tuple[Batch, Tensor, Tensor]:
    """Batch `step` with its timesteps (b,) and noise (b, c, g, g), the same whenever it is drawn."""
    rng = np.random.default_rng((config.seed, step))
    rows = _epoch_rows(len(latents), config, step)
    batch = sample_batch(latents, data, rows, rng, config.caption_dropout)
    drawn = draw_timesteps(rng, len(rows), timesteps)
    return batch, drawn, torch.randn(batch.latents.shape, generator=generator_of(rng))


@contextmanager
def _unrecorded(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within it the maps of what is drawn are not kept."""
    recording = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        unet.set_attn_processor(recording)


def _epoch_rows(count: int, config: PretrainConfig, step: int) -> np.ndarray:
    """Rows of batch `step`: every epoch is a fresh permutation of all scenes."""
    per_epoch = count // config.batch
    epoch, index = divmod(step, per_epoch)
    return _order(config.seed, epoch, count)[index * config.batch : (index + 1) * config.batch]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 7, epoch)).permutation(count)
