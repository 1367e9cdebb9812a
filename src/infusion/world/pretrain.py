"""Train the embedded base from scratch: python -m infusion.world.pretrain --folder runs/base

Four stages, each resumed where it stopped: draw the training set, train the autoencoder, encode the
set once, train text encoder and UNet together. `--minutes` ends the last stage by the clock, with
the learning rate brought to zero by then. `--from-weights` goes on from the shipped weights alone
(fresh optimizer, warm-up) in a new folder. `--reward-weight` adds to the last stage what a reader of
latents, trained before it, makes of the base's own drawings; for bases that draw subjects already.
Where a judge is shipped it picks the best checkpoint. A GPU wants larger batches (`--batch 256`) and
more scenes; neither was tried on one.
`infusion.world.release` ships the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from transformers import CLIPTextModel

from infusion.errors import InfusionError
from infusion.world.autoencoder import (
    ENCODED,
    AutoencoderConfig,
    encode_dataset,
    load_encoded,
    psnr,
    save_encoded,
    standardize,
    train_autoencoder,
)
from infusion.world.dataset import Batch, Dataset, build_dataset, load_dataset, sample_batch
from infusion.world.grounding import grounding_loss, recorded_maps
from infusion.world.judge import shipped_judge
from infusion.world.models import build_autoencoder, build_scheduler, build_text_encoder, build_unet
from infusion.world.picking import best_score, judged, keep_best, save_best
from infusion.world.reader import READER, Reader, ReaderConfig, reader_figures, train_reader
from infusion.world.release import read_trainings, read_weights
from infusion.world.reward import RewardConfig, own_states, reward
from infusion.world.runs import Run, adamw, build_accelerator, check_same, hardware, log, save_whole
from infusion.world.segmentation import (
    SegmentationHead,
    attribute_loss,
    attribute_targets,
    class_targets,
    segmentation_loss,
)
from infusion.world.separation import meanings, separation_loss
from infusion.world.tokenizer import build_tokenizer
from infusion.world.validation import Validation, measure_maps, validate, validation_scenes

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
    """State yielded by `train_base` after every step: losses of the batch, pictures seen, seconds spent, and every
    `validate_every` steps the validation, every `judge_every` the judge's score. reward: what the base's own drawings earned, where
    they are rewarded."""

    step: int
    seen: int
    seconds: float
    denoising: float
    grounding: float
    separation: float
    segmentation: float
    attribute: float
    learning_rate: float
    validation: Validation | None = None
    score: float | None = None
    reward: float | None = None


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
    `config.reward_weight` is above 0; drawings begun before a kill are not gone on with. Raises InfusionError for such a weight without a
    reader.
    """
    if config.reward_weight > 0 and reader is None:
        raise InfusionError(
            f"reward_weight is {config.reward_weight:g}, which wants a reader (`prepare_reader`); give one, or a weight of 0."
        )
    set_seed(config.seed)
    device = accelerator.device
    unet.to(device, memory_format=torch.channels_last)
    text_encoder.to(device)
    head = SegmentationHead(unet).to(device)
    networks = torch.nn.ModuleDict({"unet": unet, "text": text_encoder, "head": head})
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
                loss, earned = terms.weighted(config), None
                if config.reward_weight > 0:
                    with _unrecorded(unet):
                        states = next(own)
                    rng = np.random.default_rng((config.seed, 17, run.step))
                    earned = reward(text_encoder, unet, reader, states, rng, config.reward)
                    loss = loss - config.reward_weight * earned
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
            parts = [*terms, *([] if earned is None else [earned])]
            values = torch.stack([part.detach() for part in parts]).tolist()  # waits for the device once
            losses, rewards = values[: len(terms)], values[len(terms) :]
            yield Progress(run.step, run.step * config.batch, run.seconds, *losses, rate, measured, score, *rewards)
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
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return batch, drawn, torch.randn(batch.latents.shape, generator=generator)


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


def prepare(folder: Path, config: PretrainConfig, accelerator: Accelerator) -> tuple[AutoencoderKL, Tensor, Dataset]:
    """Stages one to three: the drawn set, the standardized autoencoder, and all latents."""
    for done in build_dataset(folder / "data", config.scenes, config.seed):
        if done % 4096 == 0:
            log(folder, stage="drawing", scenes=done)
    data = load_dataset(folder / "data")
    if not (folder / ENCODED).exists():
        model = build_autoencoder()
        if config.from_weights:
            model.load_state_dict(read_weights("vae"))
        trained = config.autoencoder.minutes > 0
        if trained:
            _train_autoencoder(model, folder, data, config, accelerator)
        latents = encode_dataset(model.eval().to(accelerator.device), data)
        save_encoded(folder, model, standardize(model, latents) if trained else latents)
    autoencoder, latents = load_encoded(folder)
    return autoencoder.to(accelerator.device), latents, data


def _train_autoencoder(
    model: AutoencoderKL, folder: Path, data: Dataset, config: PretrainConfig, accelerator: Accelerator
) -> None:
    fresh = validation_scenes(folder / "validation").pixels
    step = 0
    for step, mse in train_autoencoder(model, data, folder, config.autoencoder, accelerator):
        if step % 500 == 0:
            log(folder, stage="autoencoder", step=step, mse=mse, psnr=psnr(model, fresh))
    if step:  # it did not end before, only to be killed while encoding
        log(folder, stage="autoencoder", step=step, averaged=True, psnr=psnr(model, fresh))


def prepare_reader(
    folder: Path,
    latents: Tensor,
    data: Dataset,
    validation: tuple[Tensor, Dataset],
    config: ReaderConfig,
    accelerator: Accelerator,
) -> Reader:
    """The reader of `folder`, trained there first where it is not yet."""
    torch.manual_seed(config.seed)
    reader, path = Reader(), folder / READER
    if not path.exists():
        for step, losses in train_reader(reader, latents, data, folder, config, accelerator):
            if step % 200 == 0:
                log(folder, stage="reader", step=step, **{k: round(v, 4) for k, v in losses.items()})
        figures = {str(timestep): reader_figures(reader, *validation, timestep) for timestep in (0, 200, 400)}
        log(folder, stage="reader reads", figures=figures)
        save_whole(reader.state_dict(), path)
    reader.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return reader.eval().requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)


def main() -> None:
    """Command line; every field of PretrainConfig that users vary is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where data, checkpoints and the log live")
    for name in (
        "scenes",
        "minutes",
        "batch",
        "learning_rate",
        "decay",
        "grounding_weight",
        "separation_weight",
        "segmentation_weight",
        "attribute_weight",
        "subject_weight",
        "reward_weight",
        "judge_every",
    ):
        default = getattr(PretrainConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument(
        "--seed", type=int, help="by default the number of trainings that the weights have been through"
    )
    parser.add_argument(
        "--autoencoder-minutes",
        type=float,
        help=f"wall time of its training; {AutoencoderConfig().minutes:g}, or 0 with --from-weights: the latents stay what they are",
    )
    parser.add_argument(
        "--reader-minutes", type=float, default=ReaderConfig().minutes, help="wall time of the reader's training"
    )
    parser.add_argument("--from-weights", action="store_true", help="go on from the shipped weights alone")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name.endswith("_weight") and value < 0:
            parser.error(
                f"--{name.replace('_', '-')} is {value:g}; a weight is 0 or more: give 0 to leave the term out."
            )
    args.folder.mkdir(parents=True, exist_ok=True)
    earlier = read_trainings() if args.from_weights else []
    if args.seed is None:  # other scenes, captions and noise than the trainings before
        args.seed = len(earlier)
    options = {k: v for k, v in vars(args).items() if k not in ("folder", "autoencoder_minutes", "reader_minutes")}
    minutes = args.autoencoder_minutes
    if minutes is None:
        minutes = 0.0 if args.from_weights else AutoencoderConfig().minutes
    config = PretrainConfig(
        **options,
        autoencoder=AutoencoderConfig(minutes=minutes),
        reader=ReaderConfig(minutes=args.reader_minutes, seed=args.seed),
    )
    check_same(args.folder, seed=config.seed, from_weights=config.from_weights, scenes=config.scenes)
    accelerator = build_accelerator()
    log(
        args.folder,
        stage="start",
        device=str(accelerator.device),
        hardware=hardware(accelerator),
        earlier=earlier,
        **asdict(config),
    )

    autoencoder, latents, data = prepare(args.folder, config, accelerator)
    unet, text_encoder = build_unet(), build_text_encoder(build_tokenizer())
    if config.from_weights:
        unet.load_state_dict(read_weights("unet"))
        text_encoder.load_state_dict(read_weights("text_encoder"))
    fresh = validation_scenes(args.folder / "validation")
    validation = encode_dataset(autoencoder, fresh), fresh
    reader = None
    if config.reward_weight > 0:
        reader = prepare_reader(args.folder, latents, data, validation, config.reader, accelerator)
    sums = np.zeros(7)
    judge = shipped_judge()
    if judge is None:
        log(
            args.folder,
            stage="judge",
            missing="no checkpoint is picked; train a judge with infusion.world.judge_training",
        )
    inspect = partial(judged, judge, autoencoder, text_encoder, unet) if judge else None
    steps = train_base(text_encoder, unet, latents, data, validation, args.folder, config, accelerator, inspect, reader)
    for p in steps:
        sums += (1, p.denoising, p.grounding, p.separation, p.segmentation, p.attribute, p.reward or 0.0)
        if p.step % 100 == 0:
            _, denoising, grounding, separation, segmentation, attribute, earned = sums / sums[0]
            sums[:] = 0
            log(
                args.folder,
                stage="base",
                step=p.step,
                seen=p.seen,
                seconds=round(p.seconds),
                denoising=round(denoising, 4),
                grounding=round(grounding, 4),
                separation=round(separation, 4),
                segmentation=round(segmentation, 4),
                attribute=round(attribute, 4),
                **({"reward": round(earned, 4)} if reader else {}),
                lr=p.learning_rate,
            )
        if p.validation:
            log(args.folder, stage="validation", step=p.step, **asdict(p.validation))
        if p.score is not None:
            log(args.folder, stage="judged", step=p.step, score=round(p.score, 4))
    if inspect:
        last, best, picked = keep_best(args.folder, text_encoder, unet, inspect)
        log(args.folder, stage="picked", last=last, best=best, kept=picked)
    finished = {"vae": autoencoder, "text_encoder": text_encoder, "unet": unet}
    torch.save({part: network.state_dict() for part, network in finished.items()}, args.folder / "final.pt")
    log(args.folder, stage="done", **asdict(measure_maps(text_encoder, unet, *validation)))


if __name__ == "__main__":
    main()
