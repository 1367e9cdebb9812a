"""Train the judge's head for which way a subject faces: python -m infusion.world.facing_training --folder runs/facing

Draws scenes, spoils them as generators do (`judge_lessons.corrupt`), trains the head on the shipped judge's features by the clock, sets
from fresh scenes when it is believed, and writes facing.safetensors with its figures on yet other scenes to facing.json. Resumes after a kill.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from infusion.metrics.estimate import rate
from infusion.world.arrays import draw_arrays, load_arrays, stacked
from infusion.world.autoencoder import autoencoded
from infusion.world.facing import FIGURES, FILE, ONE_SIDED, Facing, FacingHead
from infusion.world.judge import Judge, judge_digest, load_judge
from infusion.world.judge_figures import believed_from
from infusion.world.judge_lessons import cells, corrupt
from infusion.world.models import pixels_to_tensor
from infusion.world.release import shipped_autoencoder
from infusion.world.runs import Run, build_accelerator, check_same, generator_of, hardware, log
from infusion.world.scenes import SIDE, Rendered, random_scene, render
from infusion.world.twins import MAX_SUBJECTS, differs, truth
from infusion.world.vocabulary import CLASSES

CHECKPOINT = "facing.pt"
_LAYOUT = {
    "pixels": (np.uint8, (SIDE, SIDE, 3)),
    "centre": (np.float32, (MAX_SUBJECTS, 2)),  # x and y in cells; nan where no facing is to be told
    "left": (np.bool_, (MAX_SUBJECTS,)),
    "kind": (np.int16, (MAX_SUBJECTS,)),
}


@dataclass(frozen=True)
class FacingConfig:
    """Recipe of the head. `minutes` is wall time over all parts."""

    drawn: int = 12_000
    minutes: float = 15.0
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.5
    corrupted: float = 0.6
    ema: float = 0.995
    seed: int = 0
    save_every: int = 200


@dataclass(frozen=True)
class Sides:
    """Of each subject that has a side, in pictures: logits (n,) of facing left, whether it does (n,), its class (n,) by its place in CLASSES."""

    logits: Tensor
    left: Tensor
    kind: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether each answer is (n,)."""
        return (self.logits > 0) == self.left

    @property
    def sure(self) -> Tensor:
        """The probability of each answer (n,), 0.5 at least."""
        return self.logits.abs().sigmoid()


def draw_scenes(seed: int, start: int, count: int) -> dict[str, np.ndarray]:
    """Rows of `_LAYOUT`: scenes of the world, each from (seed, its number) alone."""
    rows: dict[str, list] = {name: [] for name in _LAYOUT}
    for index in range(start, start + count):
        drawn = render(random_scene(np.random.default_rng((seed, 31, index))))
        told, placed = truth(drawn), drawn.scene.subjects
        for s, p in enumerate(placed):
            if p.subject.kind not in ONE_SIDED or not shows_side(drawn, s):
                told["centre"][s] = np.nan
        rest = [0] * (MAX_SUBJECTS - len(placed))
        rows["pixels"].append(told["pixels"])
        rows["centre"].append(told["centre"])
        rows["left"].append([p.mirror for p in placed] + rest)
        rows["kind"].append([CLASSES.index(p.subject.kind) for p in placed] + rest)
    return stacked(rows, _LAYOUT)


def shows_side(drawn: Rendered, index: int) -> bool:
    """Whether the picture would look otherwise if its subject `index` faced the other way."""
    scene = drawn.scene
    turned = [replace(p, mirror=p.mirror ^ (i == index)) for i, p in enumerate(scene.subjects)]
    return differs(render(replace(scene, subjects=tuple(turned))).pixels, drawn.pixels)


def read_sides(judge: Judge, facing: Facing, data: dict[str, np.ndarray], rows: np.ndarray, pictures: Tensor) -> Sides:
    """What the head says at the true centres of `rows`, whose pictures (n, 3, h, w) are given as they are to be read. With gradients of the
    head alone."""
    with torch.no_grad():
        features = [judge.fine(part) for part in (pictures, pictures.flip(-1))]
    b, s, x, y = cells(torch.from_numpy(data["centre"][rows]))
    left, kind = (torch.from_numpy(data[name][rows].copy())[b, s] for name in ("left", "kind"))
    return Sides(facing.head(*features)[b, y, x].cpu(), left, kind.long())


def train_facing(
    facing: Facing, judge: Judge, data: dict[str, np.ndarray], autoencoder: AutoencoderKL | None, folder: Path,
    config: FacingConfig, accelerator: Accelerator,
) -> Iterator[tuple[int, float, float]]:  # fmt: skip
    """Train by the clock, yielding (step, seconds, loss); the head holds the averaged weights at the end."""
    device = accelerator.device
    facing.head.to(device).train()
    judge.network.to(device).requires_grad_(False)
    if autoencoder is not None:
        autoencoder.to(device)
    optimizer = torch.optim.AdamW(facing.head.parameters(), config.learning_rate, weight_decay=0.01)
    run = Run(facing.head, optimizer, config, folder / CHECKPOINT)
    while run.unfinished:
        rng = np.random.default_rng((config.seed, run.step))
        rows = np.sort(rng.choice(len(data["pixels"]), config.batch, replace=False))
        pictures = pixels_to_tensor(torch.from_numpy(data["pixels"][rows])).to(device)
        sides = read_sides(
            judge, facing, data, rows, corrupt(pictures, autoencoder, rng, config.corrupted, generator_of(rng))
        )
        loss = F.binary_cross_entropy_with_logits(sides.logits, sides.left.float(), reduction="sum")
        loss = loss / max(1, len(sides.left))  # a small batch may hold no subject that has a side
        run.update(loss, accelerator)
        yield run.step, run.seconds, float(loss.detach())
    run.finish()
    facing.head.eval()


@torch.no_grad()
def examine_facing(
    judge: Judge,
    facing: Facing,
    data: dict[str, np.ndarray],
    spoil: Callable[[Tensor], Tensor] = lambda pictures: pictures,
    batch: int = 64,
) -> Sides:
    """`read_sides` over all of `data`; spoil: what is done to pictures (n, 3, h, w) before they are read."""
    parts = []
    for i in range(0, len(data["pixels"]), batch):
        rows = np.arange(i, min(i + batch, len(data["pixels"])))
        pictures = pixels_to_tensor(torch.from_numpy(data["pixels"][rows]))
        parts.append(read_sides(judge, facing, data, rows, spoil(pictures)))
    return Sides(*(torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "left", "kind")))


def facing_figures(clean: Sides, coded: Sides, threshold: float) -> dict[str, Any]:
    """Share of right answers with Wilson's interval and what it was counted over: of pictures as drawn, "clean" and by class, and of
    autoencoded ones, "autoencoded" and, where the head is believed, "told"; "believed", how often it is."""
    believed = coded.sure >= threshold
    counted = {
        "clean": clean.correct,
        "autoencoded": coded.correct,
        "told": coded.correct[believed],
        "believed": believed,
    }
    counted |= {kind: clean.correct[clean.kind == CLASSES.index(kind)] for kind in ONE_SIDED}
    found = {name: asdict(rate(hits)) for name, hits in counted.items() if len(hits)}
    return {name: {key: round(value, 4) for key, value in figure.items()} for name, figure in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("drawn", "minutes", "batch", "seed"):
        default = getattr(FacingConfig(), name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    config = FacingConfig(**{name: value for name, value in vars(args).items() if name != "folder"})
    args.folder.mkdir(parents=True, exist_ok=True)
    check_same(args.folder, seed=config.seed, drawn=config.drawn)
    accelerator = build_accelerator()
    log(args.folder, stage="start", device=str(accelerator.device), hardware=hardware(accelerator), **asdict(config))
    drawn = {}
    for part, count in (("train", config.drawn), ("calibration", 1_500), ("test", 1_500)):
        seed = 3 * config.seed + len(drawn)
        for _ in draw_arrays(args.folder / part, _LAYOUT, count, partial(draw_scenes, seed)):
            pass
        drawn[part] = load_arrays(args.folder / part, _LAYOUT)
    torch.manual_seed(config.seed)
    judge, autoencoder, facing = load_judge(), shipped_autoencoder().requires_grad_(False), Facing(FacingHead())
    for step, seconds, loss in train_facing(
        facing, judge, drawn["train"], autoencoder, args.folder, config, accelerator
    ):
        if step % 50 == 0:
            log(args.folder, stage="facing", step=step, seconds=round(seconds), loss=round(loss, 4))
    for network in (judge.network, autoencoder, facing.head):
        network.cpu()
    rng = np.random.default_rng(0)
    spoiled = lambda pictures: corrupt(pictures, autoencoder, rng, config.corrupted, generator_of(rng))  # noqa: E731
    sides = examine_facing(judge, facing, drawn["calibration"], spoiled)
    facing = replace(facing, threshold=round(believed_from(sides.sure, sides.correct, 0.995), 4))
    clean = examine_facing(judge, facing, drawn["test"])
    coded = examine_facing(judge, facing, drawn["test"], partial(autoencoded, autoencoder))
    figures = facing_figures(clean, coded, facing.threshold)
    facing.save(args.folder / FILE, judge_digest())
    trained = torch.load(args.folder / CHECKPOINT, weights_only=True)
    training = {
        "scenes": config.drawn,
        "steps": trained["step"],
        "batch": config.batch,
        "minutes": round(trained["seconds"] / 60),
        "hardware": hardware(accelerator),
    }
    (args.folder / FIGURES).write_text(json.dumps({"training": training, "figures": figures}, indent=1) + "\n")
    log(args.folder, stage="figures", threshold=facing.threshold, **figures)


if __name__ == "__main__":
    main()
