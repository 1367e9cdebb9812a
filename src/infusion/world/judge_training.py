"""Train the judge: python -m infusion.world.judge_training --folder runs/judge

Draws families of pictures, adds what generators do to pictures (autoencoding, blur, noise), trains all heads
together by the clock, sets from fresh families when a head is believed, and writes judge.safetensors with its figures
on yet other families. Resumes after a kill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from infusion.world.autoencoder import load_encoded
from infusion.world.judge import Judge, JudgeNetwork, Maps, load_judge
from infusion.world.judge_figures import (
    TRAININGS,
    all_figures,
    calibrate,
    judge_card,
    read_trainings,
    training_of,
)
from infusion.world.judge_lessons import (
    Labels,
    cells,
    corrupt,
    focal_loss,
    heat_targets,
    labels_of,
    mirrored,
    shows_change,
)
from infusion.world.models import pixels_to_tensor
from infusion.world.release import shipped_autoencoder
from infusion.world.runs import Run, build_accelerator, check_same, generator_of, hardware, log, read_log
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS
from infusion.world.twins import VIEWS, Families, build_families, load_families


@dataclass(frozen=True)
class JudgeConfig:
    """Recipe of the judge. A batch holds `families` families of VIEWS pictures; `minutes` is wall time over all parts."""

    drawn: int = 10_000
    minutes: float = 40.0
    families: int = 12
    learning_rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.5
    embedding_weight: float = 0.5
    temperature: float = 0.1
    corrupted: float = 0.6  # share of pictures that are autoencoded, blurred or noised; half as many are warped
    ema: float = 0.999
    seed: int = 0
    from_weights: bool = False
    save_every: int = 250


def judge_losses(maps: Maps, labels: Labels, config: JudgeConfig) -> dict[str, Tensor]:
    """Loss of each head; every head of a subject is read at its centre's cell."""
    losses = {"heat": focal_loss(maps.heat.float(), heat_targets(labels.centre).to(maps.heat.device))}
    b, s, x, y = cells(labels.centre)
    for k, name in enumerate(SUBJECT_HEADS):
        target = labels.subject[b, s, k]
        known = target != NONE
        logits = maps.subject[name][b[known], :, y[known], x[known]].float()
        losses[name] = F.cross_entropy(logits, target[known].to(logits.device))
    for k, name in enumerate(SCENE_HEADS):
        losses[name] = F.cross_entropy(maps.scene[name].float(), labels.scene[:, k].to(maps.heat.device))
    first = s == 0
    anchors = maps.embedding[b[first], :, y[first], x[first]]
    losses["embedding"] = config.embedding_weight * twin_loss(anchors, labels, b[first], config.temperature)
    return losses


def twin_loss(embeddings: Tensor, labels: Labels, rows: Tensor, temperature: float) -> Tensor:
    """Contrastive loss (arXiv 2004.11362): the other view of the same individual against everyone else's, twins too, but not
    against a twin whose difference one of the two pictures does not show. embeddings (n, e) of pictures `rows`."""
    family, twin = rows // VIEWS, rows % VIEWS // 2
    same = (family[:, None] == family[None]) & (twin[:, None] == twin[None])
    shows = shows_change(labels)[rows]
    alike = (family[:, None] == family[None]) & ~same & ~(shows[:, None] & shows[None])
    itself = torch.eye(len(rows), dtype=torch.bool)
    positive = same & ~itself
    logits = (embeddings @ embeddings.T / temperature).masked_fill(
        (itself | alike).to(embeddings.device), float("-inf")
    )
    counted = positive.any(1)
    if not bool(counted.any()):
        return embeddings.sum() * 0
    log_p = logits.log_softmax(1)[counted.to(logits.device)]
    mask = positive[counted].to(logits.device)
    return -(log_p.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()


def train_judge(
    network: JudgeNetwork, data: Families, autoencoder: AutoencoderKL | None, folder: Path, config: JudgeConfig,
    accelerator: Accelerator,
) -> Iterator[tuple[int, float, dict[str, float]]]:  # fmt: skip
    """Train by the clock, yielding (step, seconds, losses); the network holds the averaged weights at the end."""
    device = accelerator.device
    network.to(device, memory_format=torch.channels_last).train()
    if autoencoder is not None:
        autoencoder.to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.02, fused=True
    )
    run = Run(network, optimizer, config, folder / "judge.pt")
    while run.unfinished:
        rng = np.random.default_rng((config.seed, run.step))
        noise = generator_of(np.random.default_rng((config.seed, 23, run.step)))
        chosen = rng.choice(len(data) // VIEWS, config.families, replace=False)
        rows = (chosen[:, None] * VIEWS + np.arange(VIEWS)).ravel()
        pictures = pixels_to_tensor(torch.from_numpy(data.pixels[rows])).to(device)
        pictures, labels = mirrored(pictures, labels_of(data, rows), rng)
        with accelerator.autocast():
            pictures = corrupt(pictures, autoencoder, rng, config.corrupted, noise)
            maps = network(pictures.contiguous(memory_format=torch.channels_last))
        losses = judge_losses(maps, labels, config)
        run.update(torch.stack(list(losses.values())).sum(), accelerator)
        yield run.step, run.seconds, {name: float(loss.detach()) for name, loss in losses.items()}
    run.finish()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("drawn", "minutes", "families", "learning_rate", "decay"):
        default = getattr(JudgeConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--seed", type=int, help="by default the number of trainings that the judge has been through")
    parser.add_argument("--from-weights", action="store_true", help="go on from the shipped judge")
    parser.add_argument(
        "--base",
        type=Path,
        help="folder of `infusion.world.pretrain` to take the autoencoder from; else the shipped one",
    )
    args = parser.parse_args()
    if args.seed is None:  # other families and corruptions than the trainings before
        args.seed = len(read_trainings()) if args.from_weights else 0
    config = JudgeConfig(**{k: v for k, v in vars(args).items() if k not in ("folder", "base")})
    args.folder.mkdir(parents=True, exist_ok=True)
    check_same(args.folder, seed=config.seed, from_weights=config.from_weights, drawn=config.drawn)
    accelerator = build_accelerator()
    log(args.folder, stage="start", device=str(accelerator.device), hardware=hardware(accelerator), **asdict(config))
    parts = (("train", config.drawn, False), ("calibration", 300, False), ("test", 256, True))
    for seed, (part, count, strict) in enumerate(parts, start=3 * config.seed):
        for done in build_families(args.folder / part, count, seed, strict=strict):
            if done % 2048 == 0:
                log(args.folder, stage="drawing", part=part, families=done)
    autoencoder = load_encoded(args.base)[0] if args.base else shipped_autoencoder()
    autoencoder.requires_grad_(False)
    network = load_judge().network if config.from_weights else JudgeNetwork()
    recent: list[dict[str, float]] = []  # since the last line of the log
    for step, seconds, losses in train_judge(
        network, load_families(args.folder / "train"), autoencoder, args.folder, config, accelerator
    ):
        recent.append(losses)
        if step % 100 == 0:
            log(
                args.folder,
                stage="judge",
                step=step,
                seconds=round(seconds),
                **{name: round(fmean(part[name] for part in recent), 4) for name in losses},
            )
            recent = []
    network.cpu()
    autoencoder.cpu()
    test = load_families(args.folder / "test")
    judge = Judge(network, calibrate(network, load_families(args.folder / "calibration"), autoencoder))
    figures = all_figures(judge, test, autoencoder)
    log(args.folder, stage="figures", **figures, thresholds=judge.thresholds)
    judge.save(args.folder / "judge.safetensors")
    trainings = [*(read_trainings() if config.from_weights else []), training_of(read_log(args.folder))]
    (args.folder / TRAININGS).write_text(json.dumps(trainings, indent=1) + "\n")
    (args.folder / "README.md").write_text(judge_card(trainings, figures, args.folder / "judge.safetensors"))


if __name__ == "__main__":
    main()
