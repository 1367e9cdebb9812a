"""The base examined by the judge: python -m infusion.world.examination

Draws pictures of combinations that training never saw and of plain prompts, has the judge read them,
and writes examination.json beside the weights: how often class, background, style and what else was
asked for are right, whether what is not named varies as it does in the world, and, with --copies-of, whether
pictures are nearer to training scenes than fresh scenes are. Knows nothing of concepts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from infusion.metrics.estimate import Estimate, bootstrap, rate
from infusion.world.arrays import draw_arrays, load_arrays
from infusion.world.autoencoder import autoencoded
from infusion.world.dataset import training_scene
from infusion.world.judge import Judge, Reading, load_judge
from infusion.world.models import pixels_to_tensor
from infusion.world.questions import answers, both, shown
from infusion.world.release import EXAMINATION, WEIGHTS, load_pipeline, read_index
from infusion.world.requests import Request, unseen_requests, unseen_scenes
from infusion.world.scenes import SIDE, Scene, render
from infusion.world.truth import SHARES, SUBJECT_HEADS
from infusion.world.vocabulary import BACKGROUND_PHRASES, BACKGROUNDS, CLASSES


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int = 20, batch: int = 32
) -> Tensor:
    """Pictures (n, h, w, 3) uint8, one for each pair of prompt and seed."""
    parts = []
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        images = pipe(
            list(prompts[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=6.0,
            generator=generators,
            output_type="np",
        ).images
        parts.append(torch.from_numpy((images * 255).round().astype(np.uint8)))
    return torch.cat(parts)


def followed(requests: Iterable[Request], readings: Iterable[Reading]) -> dict[str, Estimate]:
    """How often each thing that was asked for is there; what the judge cannot tell is wrong."""
    hits: dict[str, list[bool]] = {}
    for request, reading in zip(requests, readings, strict=True):
        right = answers(request, reading) if len(request.subjects) == 1 else both(request, reading)
        for name, value in right.items():
            hits.setdefault(name, []).append(value)
    return {name: rate(torch.tensor(values)) for name, values in hits.items()}


def plain_prompts(count: int) -> list[str]:
    """Prompts that name nothing but class and background, every pair in turn."""
    pairs = [(kind, background) for kind in CLASSES for background in BACKGROUNDS]
    return [f"a photo of a {k} {BACKGROUND_PHRASES[b][0]}" for k, b in islice(cycle(pairs), count)]


def answered(
    pipe: StableDiffusionPipeline, judge: Judge, count: int, subjects: int, seed: int, first: int
) -> dict[str, Estimate]:
    """`followed` for the `unseen_requests` of `seed`, drawn with seeds from `first` on."""
    requests = unseen_requests(count, seed, subjects)
    return followed(requests, judge.read(draw(pipe, [r.prompt for r in requests], range(first, first + count))))


def varied(pipe: StableDiffusionPipeline, judge: Judge, count: int, first: int) -> dict[str, dict[str, Any]]:
    """`variety` of `plain_prompts`, drawn with seeds from `first` on."""
    return variety(judge.read(draw(pipe, plain_prompts(count), range(first, first + count))))


def variety(readings: Sequence[Reading]) -> dict[str, dict[str, Any]]:
    """Of pictures whose prompts name nothing but class and background: the share of each colour, pattern and accessory
    among those read, and the total variation distance to the world's own shares, 1 where nothing can be read; beside it what as many draws
    from the world's shares have on average, since a few never meet them."""
    found = {}
    for name in ("color1", "pattern", "accessory"):
        world = dict(zip(SUBJECT_HEADS[name], SHARES[name], strict=True))
        told = [value for reading in readings if (value := shown(reading)[name]) is not None]
        shares = {value: told.count(value) / max(1, len(told)) for value in world}
        distance = sum(abs(shares[v] - world[v]) for v in world) / 2 if told else 1.0
        found[name] = {
            "shares": shares,
            "distance": distance,
            "by_chance": _chance_distance(len(told), tuple(world.values())),
            "n": len(told),
            "missing": [v for v in world if not shares[v]],
        }
    return found


def _chance_distance(n: int, shares: tuple[float, ...], draws: int = 4000) -> float:
    found = np.random.default_rng(0).multinomial(n, shares, draws) / max(1, n)
    return float(np.abs(found - np.array(shares)).sum(1).mean() / 2)


def nearest_distance(pictures: Tensor, training: np.ndarray, side: int = 32, block: int = 4096) -> Tensor:
    """Root mean square distance, in [0, 1], of pictures (n, h, w, 3) uint8 to the nearest of `training`, at `side` pixels."""
    few = _reduced(pictures, side)
    best = torch.full((len(few),), float("inf"))
    for i in range(0, len(training), block):
        best = torch.minimum(best, torch.cdist(few, _reduced(torch.from_numpy(training[i : i + block]), side)).amin(1))
    return best / few.shape[1] ** 0.5


def examine_base(
    pipe: StableDiffusionPipeline, judge: Judge, single: int = 800, double: int = 240, plain: int = 240, seed: int = 0
) -> dict[str, Any]:
    """All figures that need no training set: `followed` over single and double requests, and `variety`."""
    figures: dict[str, Estimate] = {}
    for subjects, count in ((1, single), (2, double)):
        figures |= answered(pipe, judge, count, subjects, seed, 10_000 * subjects)
    return {
        "followed": {name: asdict(e) for name, e in figures.items()},
        "variety": varied(pipe, judge, plain, 30_000),
        "pictures": single + double + plain,
    }


def ceiling(
    pipe: StableDiffusionPipeline, judge: Judge, single: int = 800, double: int = 240, seed: int = 0
) -> dict[str, Any]:
    """`followed` for the true scenes of the same requests, through the autoencoder: what this judge would say of a base without fault."""
    figures: dict[str, Estimate] = {}
    for subjects, count in ((1, single), (2, double)):
        scenes, requests = zip(*unseen_scenes(count, seed, subjects), strict=True)
        figures |= followed(requests, judge.read(_coded(pipe, scenes)))
    return {name: asdict(e) for name, e in figures.items()}


def _coded(pipe: StableDiffusionPipeline, scenes: Sequence[Scene], batch: int = 64) -> Tensor:
    """Scenes drawn and taken through the autoencoder, (n, h, w, 3) uint8."""
    drawn = pixels_to_tensor(torch.stack([torch.from_numpy(render(s).pixels) for s in scenes]))
    parts = [autoencoded(pipe.vae, part) for part in drawn.split(batch)]
    return ((torch.cat(parts) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def copying(
    pipe: StableDiffusionPipeline, training: Sequence[np.ndarray], count: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Distances to the nearest scene of `training`, sets of (n, h, w, 3) uint8, of the base's pictures for `unseen_requests` and of those
    requests' true scenes through the autoencoder, since what is smoother lies nearer to everything: the medians, and the share of the base's
    pictures that lie nearer than all but one in a hundred of the true ones."""
    scenes, requests = zip(*unseen_scenes(count, seed), strict=True)
    drawn = draw(pipe, [r.prompt for r in requests], range(10_000, 10_000 + count))
    distance = lambda x: torch.stack([nearest_distance(x, part) for part in training]).amin(0)  # noqa: E731
    generated, fresh = distance(drawn), distance(_coded(pipe, scenes))
    median = lambda x: asdict(bootstrap(x, lambda d: d.median()))  # noqa: E731
    return {
        "generated": median(generated),
        "fresh": median(fresh),
        "nearer": asdict(rate(generated < fresh.quantile(0.01))),
        "scenes": sum(map(len, training)),
    }


def training_pixels(folder: Path, count: int, seed: int, workers: int | None = None) -> np.ndarray:
    """The scenes of the training of `seed`, (count, h, w, 3) uint8, drawn again into `folder`."""
    for _ in draw_arrays(folder, _LAYOUT, count, partial(_draw_training, seed), workers=workers):
        pass
    return load_arrays(folder, _LAYOUT)["pixels"]


_LAYOUT = {"pixels": (np.uint8, (SIDE, SIDE, 3))}


def _draw_training(seed: int, start: int, count: int) -> dict[str, np.ndarray]:
    return {"pixels": np.stack([render(training_scene(seed, start + i)[0]).pixels for i in range(count)])}


def _reduced(pictures: Tensor, side: int) -> Tensor:
    small = F.interpolate(pictures.permute(0, 3, 1, 2).float() / 255, size=(side, side), mode="area")
    return small.flatten(1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with index.json")
    parser.add_argument("--out", type=Path, help="by default examination.json beside the weights")
    parser.add_argument("--copies-of", type=int, nargs="*", default=[], help="seeds of trainings, to look for copies")
    parser.add_argument("--scenes", type=int, default=40_000, help="of each of these trainings")
    parser.add_argument("--single", type=int, default=800)
    parser.add_argument("--double", type=int, default=240)
    args = parser.parse_args()
    pipe, judge = load_pipeline(args.weights), load_judge()
    record = {
        "sha256": read_index(args.weights)["sha256"],
        **examine_base(pipe, judge, args.single, args.double),
        "ceiling": ceiling(pipe, judge, args.single, args.double),
    }
    if args.copies_of:
        with TemporaryDirectory() as folder:
            sets = [training_pixels(Path(folder) / str(seed), args.scenes, seed) for seed in args.copies_of]
            record["copying"] = copying(pipe, sets) | {"seeds": args.copies_of}
    (args.out or args.weights / EXAMINATION).write_text(json.dumps(record, indent=1) + "\n")
    for name, e in record["followed"].items():
        print(f"{name:12} {Estimate(**e)}, a base without fault {Estimate(**record['ceiling'][name])}")
    print(json.dumps({k: v for k, v in record.items() if k not in ("followed", "ceiling")}, indent=1))


if __name__ == "__main__":
    main()
