"""Train the embedded base from scratch: python -m infusion.world.pretrain --folder runs/base

Four stages: draw the training set, train the autoencoder, encode the set once, train text encoder and
UNet together. Trainings are resumed where they stopped, drawing and encoding begun again. `--minutes`
ends the last stage by the clock, with the learning rate brought to zero by then. `--from-weights` goes
on from the shipped weights alone (fresh optimizer, warm-up) in a new folder. With it `--reward-weight`
adds to the last stage what a reader of latents, trained before it, makes of the base's own drawings.
Where a judge is shipped it picks the best checkpoint, and with `--from-weights` how far to go to it
from those weights. A GPU wants larger batches (`--batch 256`) and more scenes; neither was tried on one.
`infusion.world.release` ships the result.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

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
from infusion.world.base_training import PretrainConfig, train_base
from infusion.world.dataset import Dataset, build_dataset, load_dataset
from infusion.world.judge import shipped_judge
from infusion.world.models import build_autoencoder, build_text_encoder, build_unet
from infusion.world.picking import judged, keep_best
from infusion.world.reader import READER, Reader, ReaderConfig, reader_figures, train_reader
from infusion.world.release import read_index, read_trainings, read_weights
from infusion.world.runs import build_accelerator, check_same, hardware, log, save_whole
from infusion.world.tokenizer import build_tokenizer
from infusion.world.validation import measure_maps, validation_scenes


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
    for name, least in (("scenes", args.batch), ("batch", 1), ("judge_every", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {least} or more.")
    if not 0 < args.decay <= 1:
        parser.error(f"--decay is {args.decay:g}; it is a share of the time, above 0 and at most 1.")
    if args.reward_weight > 0 and not args.from_weights:
        parser.error(
            f"--reward-weight is {args.reward_weight:g}: only a base that draws subjects already can be rewarded for them; add --from-weights."
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
    begun_with = read_index()["sha256"] if config.from_weights else None
    check_same(
        args.folder,
        seed=config.seed,
        from_weights=config.from_weights,
        weights=begun_with,
        scenes=config.scenes,
        batch=config.batch,
    )
    accelerator = build_accelerator()
    log(
        args.folder,
        stage="start",
        device=str(accelerator.device),
        hardware=hardware(accelerator),
        earlier=earlier,
        weights=begun_with,
        **asdict(config),
    )

    autoencoder, latents, data = prepare(args.folder, config, accelerator)
    unet, text_encoder = build_unet(), build_text_encoder(build_tokenizer())
    begun = None
    if config.from_weights:
        begun = {part: read_weights(part) for part in ("unet", "text_encoder")}
        unet.load_state_dict(begun["unet"])
        text_encoder.load_state_dict(begun["text_encoder"])
    fresh = validation_scenes(args.folder / "validation")
    validation = encode_dataset(autoencoder, fresh), fresh
    reader = None
    if config.reward_weight > 0:
        reader = prepare_reader(args.folder, latents, data, validation, config.reader, accelerator)
    judge = shipped_judge()
    if judge is None:
        log(
            args.folder,
            stage="judge",
            missing="no checkpoint is picked; train a judge with infusion.world.judge_training",
        )
    inspect = partial(judged, judge, autoencoder, text_encoder, unet) if judge else None
    steps = train_base(text_encoder, unet, latents, data, validation, args.folder, config, accelerator, inspect, reader)
    recent: list[dict[str, float]] = []
    for p in steps:
        recent.append(p.losses)
        if p.step % 100 == 0:
            means = {name: round(fmean(losses[name] for losses in recent), 5) for name in p.losses}
            recent.clear()
            log(
                args.folder,
                stage="base",
                step=p.step,
                seen=p.seen,
                seconds=round(p.seconds),
                **means,
                lr=p.learning_rate,
            )
        if p.validation:
            log(args.folder, stage="validation", step=p.step, **asdict(p.validation))
        if p.score is not None:
            log(args.folder, stage="judged", step=p.step, score=round(p.score, 4))
    if inspect:
        picked = keep_best(args.folder, text_encoder, unet, inspect, begun)
        log(args.folder, stage="picked", scores=picked.scores, kept=picked.step, share=picked.share)
    finished = {"vae": autoencoder, "text_encoder": text_encoder, "unet": unet}
    torch.save({part: network.state_dict() for part, network in finished.items()}, args.folder / "final.pt")
    log(args.folder, stage="done", **asdict(measure_maps(text_encoder, unet, *validation)))


if __name__ == "__main__":
    main()
