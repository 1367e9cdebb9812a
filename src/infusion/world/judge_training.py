"""Train the judge: python -m infusion.world.judge_training --folder runs/judge

Draws families of pictures, adds what generators do to pictures (autoencoding, blur, noise), trains all heads
together by the clock, sets from fresh families when a head is believed, and writes judge.safetensors with its figures
on yet other families. Resumes after a kill.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor

from infusion.world.judge import GRID, Judge, JudgeNetwork, Maps, peaks
from infusion.world.models import build_autoencoder, pixels_to_tensor
from infusion.world.release import read_weights
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS
from infusion.world.twins import CHANGES, VIEWS, Families, build_families, load_families


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
    save_every: int = 250


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
    cells = torch.arange(GRID) + 0.5
    dx, dy = cells - centre[..., :1], cells - centre[..., 1:]  # (b, s, g) each
    heat = torch.exp(-(dy[..., :, None] ** 2 + dx[..., None, :] ** 2) / 2).nan_to_num(0.0).amax(1)
    b, s = torch.nonzero(~centre.isnan().any(-1), as_tuple=True)
    x, y = centre[b, s].long().clamp(0, GRID - 1).unbind(-1)
    heat[b, y, x] = 1  # else a centre near a cell's corner would have no positive at all
    return heat


def _cells(labels: Labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Picture, subject, column and row of every subject's centre."""
    b, s = torch.nonzero(~labels.centre.isnan().any(-1), as_tuple=True)
    x, y = labels.centre[b, s].long().clamp(0, GRID - 1).unbind(-1)
    return b, s, x, y


def judge_losses(maps: Maps, labels: Labels, config: JudgeConfig) -> dict[str, Tensor]:
    """Loss of each head; every head of a subject is read at its centre's cell."""
    losses = {"heat": _focal(maps.heat.float(), heat_targets(labels.centre).to(maps.heat.device))}
    b, s, x, y = _cells(labels)
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


def shows_change(labels: Labels) -> Tensor:
    """Whether each picture (n,) shows, of its first subject, the attribute in which the family's twin differs."""
    heads = [list(SUBJECT_HEADS).index(c) if c in SUBJECT_HEADS else -1 for c in CHANGES]  # a shape always shows
    head = torch.tensor(heads)[labels.change]
    told = labels.subject[:, 0].gather(1, head.clamp_min(0)[:, None])[:, 0] != NONE
    return told | (head < 0)


def corrupt(pictures: Tensor, autoencoder: AutoencoderKL | None, rng: np.random.Generator, share: float) -> Tensor:
    """What generators do to pictures (n, 3, h, w) in [-1, 1]: half of `share` warped, and a third of `share` each autoencoded,
    blurred and noised."""
    out = pictures.clone()
    bent = torch.from_numpy(np.flatnonzero(rng.random(len(out)) < share / 2))
    out[bent] = warp(out[bent], rng)
    kind = rng.choice(4, size=len(out), p=(1 - share, share / 3, share / 3, share / 3))
    coded = torch.from_numpy(np.flatnonzero(kind == 1))
    if autoencoder is not None and len(coded):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = autoencoder.encode(out[coded]).latent_dist.mean
            latents = latents + torch.randn(latents.shape) * float(rng.uniform(0, 0.3))
            out[coded] = autoencoder.decode(latents).sample.float().clamp(-1, 1)
    blurred = torch.from_numpy(np.flatnonzero(kind == 2))
    amount = torch.from_numpy(rng.uniform(0.2, 1, (len(blurred), 1, 1, 1)).astype(np.float32))
    padded = F.pad(out[blurred], (1, 1, 1, 1), mode="replicate")
    out[blurred] = out[blurred].lerp(F.avg_pool2d(padded, 3, 1), amount)
    noised = torch.from_numpy(np.flatnonzero(kind == 3))
    sigma = torch.from_numpy(rng.uniform(0.02, 0.2, (len(noised), 1, 1, 1)).astype(np.float32))
    out[noised] = (out[noised] + sigma * torch.randn(out[noised].shape)).clamp(-1, 1)
    return out


def warp(pictures: Tensor, rng: np.random.Generator, pixels: float = 1.2) -> Tensor:
    """Pictures (n, 3, h, w) bent by smooth random fields of about `pixels` pixels, as outlines are that a generator wobbles."""
    n, _, h, w = pictures.shape
    if n == 0:
        return pictures
    coarse = torch.from_numpy(rng.normal(0, pixels * 2 / w, (n, 2, 6, 6)).astype(np.float32))
    field = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, h, w], align_corners=False)
    return F.grid_sample(pictures, straight + field, padding_mode="border", align_corners=False)


def mirrored(pictures: Tensor, labels: Labels, rng: np.random.Generator) -> tuple[Tensor, Labels]:
    """Half of the pictures (n, 3, h, w) mirrored, and their truth: left is right then, nothing else changes."""
    turned = torch.from_numpy(rng.random(len(pictures)) < 0.5)
    x, y = labels.centre.unbind(-1)
    centre = torch.stack([torch.where(turned[:, None], GRID - x, x), y], -1)
    return torch.where(turned[:, None, None, None], pictures.flip(-1), pictures), replace(labels, centre=centre)


def train_judge(
    network: JudgeNetwork, data: Families, autoencoder: AutoencoderKL | None, folder: Path, config: JudgeConfig,
    accelerator: Accelerator,
) -> Iterator[tuple[int, float, dict[str, float]]]:  # fmt: skip
    """Train by the clock, yielding (step, seconds, losses); the network holds the averaged weights at the end."""
    torch.manual_seed(config.seed)
    device = accelerator.device
    network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.02)
    ema = EMAModel(network.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75, foreach=True)
    checkpoint, step, spent = folder / "judge.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, spent = state["step"], state["seconds"]
    limit, last = config.minutes * 60, time.monotonic()

    def save() -> None:
        state = {
            "network": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict(),
            "step": step, "seconds": spent,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    while spent < limit:
        rng = np.random.default_rng((config.seed, step))
        lr = config.learning_rate * min(1.0, (step + 1) / config.warmup, (limit - spent) / (config.decay * limit))
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = rng.choice(len(data) // VIEWS, config.families, replace=False)
        rows = (chosen[:, None] * VIEWS + np.arange(VIEWS)).ravel()
        pictures = pixels_to_tensor(torch.from_numpy(data.pixels[rows]))
        pictures, labels = mirrored(pictures, labels_of(data, rows), rng)
        pictures = corrupt(pictures, autoencoder, rng, config.corrupted).to(device, memory_format=torch.channels_last)
        with accelerator.autocast():
            maps = network(pictures)
        losses = judge_losses(maps, labels, config)
        accelerator.backward(torch.stack(list(losses.values())).sum())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(network.parameters())
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % config.save_every == 0:
            save()
        yield step, spent, {name: float(loss) for name, loss in losses.items()}
    save()
    ema.copy_to(network.parameters())


@torch.no_grad()
def calibrate(
    network: JudgeNetwork, data: Families, autoencoder: AutoencoderKL | None, precision: float = 0.98, batch: int = 64
) -> dict[str, float]:
    """For each head the lowest probability from which on its answers are right in `precision` of the cases, on pictures as
    generators make them (`corrupt`); for "same" the cosine at which as many twins pass as individuals fail."""
    network.eval()
    told: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (*SUBJECT_HEADS, *SCENE_HEADS)}
    embeddings = []
    rng = np.random.default_rng(0)
    for i in range(0, len(data), batch):
        rows = np.arange(i, min(i + batch, len(data)))
        labels = labels_of(data, rows)
        maps = network(corrupt(pixels_to_tensor(torch.from_numpy(data.pixels[rows])), autoencoder, rng, 0.6))
        b, s, x, y = _cells(labels)
        for k, name in enumerate(SUBJECT_HEADS):
            known = labels.subject[b, s, k] != NONE
            p, answer = maps.subject[name][b, :, y, x][known].float().softmax(1).max(1)
            told[name].append((p, answer == labels.subject[b, s, k][known]))
        for k, name in enumerate(SCENE_HEADS):
            p, answer = maps.scene[name].float().softmax(1).max(1)
            told[name].append((p, answer == labels.scene[:, k]))
        cx, cy = labels.centre[:, 0].nan_to_num(GRID / 2).long().clamp(0, GRID - 1).unbind(-1)
        embeddings.append(maps.embedding[torch.arange(len(rows)), :, cy, cx])
    thresholds = {
        name: believed_from(*map(torch.cat, zip(*parts, strict=True)), precision) for name, parts in told.items()
    }
    same, other = twin_cosines(torch.cat(embeddings), labels_of(data, np.arange(len(data))))
    candidates = torch.cat([same, other]).sort().values
    fails = torch.searchsorted(same.sort().values, candidates) / len(same)
    passes = 1 - torch.searchsorted(other.sort().values, candidates) / len(other)
    thresholds["same"] = float(candidates[(fails - passes).abs().argmin()])
    return {name: round(value, 4) for name, value in thresholds.items()}


def believed_from(probability: Tensor, right: Tensor, precision: float) -> float:
    """The lowest probability from which on answers (n,) are right in at least `precision` of the cases; above 1 where
    none is."""
    order = probability.argsort(descending=True)
    share = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = torch.nonzero(share >= precision)
    return float(probability[order[enough[-1, 0]]]) if len(enough) else 1.01


@torch.no_grad()
def examine(
    network: JudgeNetwork, data: Families, autoencoder: AutoencoderKL | None = None, batch: int = 64
) -> dict[str, float]:
    """Figures on `data`, of fresh seed: accuracy of every head over what is visible, read at the true centre; found and
    phantom subjects; position; and the AUC of telling the same individual from its visible twin. With an autoencoder,
    on autoencoded pictures."""
    network.eval()
    hits: dict[str, list[Tensor]] = {name: [] for name in (*SUBJECT_HEADS, *SCENE_HEADS, "found", "real", "position")}
    embeddings = []
    for i in range(0, len(data), batch):
        rows = np.arange(i, min(i + batch, len(data)))
        labels = labels_of(data, rows)
        pictures = pixels_to_tensor(torch.from_numpy(data.pixels[rows]))
        if autoencoder is not None:
            pictures = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        maps = network(pictures)
        _count(maps, labels, hits)
        x, y = labels.centre[:, 0].nan_to_num(GRID / 2).long().clamp(0, GRID - 1).unbind(-1)
        embeddings.append(maps.embedding[torch.arange(len(rows)), :, y, x])
    figures = {name: float(torch.cat(h).float().mean()) for name, h in hits.items()}
    figures["same_auc"] = verification_auc(torch.cat(embeddings), labels_of(data, np.arange(len(data))))
    return {name: round(value, 4) for name, value in figures.items()}


def verification_auc(embeddings: Tensor, labels: Labels) -> float:
    """Area under the ROC curve of cosines: two views of one individual against an individual and its visible twin."""
    positive, negative = twin_cosines(embeddings, labels)
    below = torch.searchsorted(negative.sort().values, positive).double()
    return float(below.mean() / len(negative))


def twin_cosines(embeddings: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Cosines of two views of one individual, and of an individual and its twin where both pictures show the difference."""
    e = embeddings.unflatten(0, (-1, VIEWS))
    shows = shows_change(labels).unflatten(0, (-1, VIEWS))
    here = ~labels.centre[:, 0].isnan().any(-1).unflatten(0, (-1, VIEWS))
    same, other = [], []
    for a, b in ((0, 1), (2, 3)):
        same.append((e[:, a] * e[:, b]).sum(-1)[here[:, a] & here[:, b]])
    for a in (0, 1):
        for b in (2, 3):
            tells = here[:, a] & here[:, b] & shows[:, a] & shows[:, b]
            other.append((e[:, a] * e[:, b]).sum(-1)[tells])
    return torch.cat(same), torch.cat(other)


def _count(maps: Maps, labels: Labels, hits: dict[str, list[Tensor]]) -> None:
    present = ~labels.centre.isnan().any(-1)
    b, s, x, y = _cells(labels)
    for k, name in enumerate(SUBJECT_HEADS):
        target = labels.subject[b, s, k]
        known = target != NONE
        hits[name].append((maps.subject[name][b, :, y, x].argmax(1) == target)[known])
    for k, name in enumerate(SCENE_HEADS):
        hits[name].append(maps.scene[name].argmax(1) == labels.scene[:, k])
    for i in range(len(labels.centre)):
        found = torch.tensor([[c + 0.5, r + 0.5] for r, c, _ in peaks(maps.heat[i])]).reshape(-1, 2)
        true = labels.centre[i][present[i]]
        near = torch.cdist(true, found)
        hits["found"].append((near < 2).any(1) if len(found) else torch.zeros(len(true), dtype=torch.bool))
        hits["real"].append((near < 2).any(0) if len(true) else torch.zeros(len(found), dtype=torch.bool))
        for t, d in zip(true, near, strict=True):
            if len(found) and float(d.min()) < 2:
                hits["position"].append((t[:1] * 3 // GRID) == (found[d.argmin()][:1] * 3 // GRID))


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of CenterNet (arXiv 1904.07850, equation 1), per subject."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = (target == 1).float()
    loss = peak * (1 - p) ** 2 * p.log() + (1 - peak) * (1 - target) ** 4 * p**2 * (1 - p).log()
    return -loss.sum() / peak.sum().clamp_min(1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("drawn", "minutes", "families", "learning_rate", "seed"):
        default = getattr(JudgeConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    config = JudgeConfig(**{k: v for k, v in vars(args).items() if k != "folder"})
    args.folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    _log(args.folder, stage="start", device=str(accelerator.device), **asdict(config))
    parts = (("train", config.drawn), ("calibration", 300), ("test", 500))
    for seed, (part, count) in enumerate(parts, start=3 * config.seed):
        for done in build_families(args.folder / part, count, seed):
            if done % 2048 == 0:
                _log(args.folder, stage="drawing", part=part, families=done)
    autoencoder = build_autoencoder().eval().requires_grad_(False)
    autoencoder.load_state_dict(read_weights("vae"))
    network = JudgeNetwork()
    sums: dict[str, float] = {}
    for step, seconds, losses in train_judge(
        network, load_families(args.folder / "train"), autoencoder, args.folder, config, accelerator
    ):
        sums = {name: sums.get(name, 0.0) + value / 100 for name, value in losses.items()}
        if step % 100 == 0:
            _log(
                args.folder,
                stage="judge",
                step=step,
                seconds=round(seconds),
                **{k: round(v, 4) for k, v in sums.items()},
            )
            sums = {}
    network.cpu()
    test = load_families(args.folder / "test")
    _log(args.folder, stage="clean", **examine(network, test))
    _log(args.folder, stage="autoencoded", **examine(network, test, autoencoder))
    thresholds = calibrate(network, load_families(args.folder / "calibration"), autoencoder)
    _log(args.folder, stage="calibration", **thresholds)
    Judge(network, thresholds).save(args.folder / "judge.safetensors")


def _log(folder: Path, **values: object) -> None:
    line = json.dumps({"time": round(time.time()), **values})
    with (folder / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
