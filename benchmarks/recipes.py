"""What makes the embedded base learn faster? python benchmarks/recipes.py --folder runs/recipes

Trains text encoder and UNet from scratch by the recipe of `infusion.world.pretrain` and by recipes that differ from it in one thing, each for
the same wall time on the same scenes, and measures all alike: velocity error and attention maps on scenes that no training draws. The recipe
itself is run with two seeds, to show what chance does. Writes one JSON a run into the folder, goes on where it was
interrupted, prints the table, and writes all runs to --out. One thread a process (OMP_NUM_THREADS=1) and several processes with other
--only's use the cores of a CPU best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from infusion.world.autoencoder import AutoencoderConfig, encode_dataset
from infusion.world.base_training import PretrainConfig, batch_terms, draw_batch
from infusion.world.dataset import CAPTIONS_PER_SCENE, Dataset
from infusion.world.grounding import recorded_maps
from infusion.world.models import build_scheduler, build_text_encoder, build_unet
from infusion.world.pretrain import prepare
from infusion.world.runs import Run, adamw, build_accelerator, hardware
from infusion.world.segmentation import SegmentationHead
from infusion.world.separation import meanings
from infusion.world.tokenizer import build_tokenizer
from infusion.world.validation import measure_maps, validate, validation_scenes

ALPHAS = build_scheduler().alphas_cumprod
SNR = ALPHAS / (1 - ALPHAS)


class MuonBesideAdamW:
    """torch's Muon for the matrices of linear layers, AdamW for kernels, embeddings, biases and norms; Muon's updates
    scaled to AdamW's size (arXiv 2502.16982), so that both take one learning rate."""

    def __init__(self, networks: nn.Module, learning_rate: float) -> None:
        matrices = [m.weight for m in networks.modules() if isinstance(m, nn.Linear)]
        chosen = {id(p) for p in matrices}
        rest = nn.ParameterList(p for p in networks.parameters() if id(p) not in chosen)
        muon = torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.both = (muon, adamw(rest, learning_rate))
        self.param_groups = [group for one in self.both for group in one.param_groups]

    def step(self) -> None:
        for one in self.both:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.both:
            one.zero_grad(set_to_none)


class Velocity(nn.Module):
    """The velocity that a network of noise says: (eps - s x) / a, with the schedule's a and s at the timestep."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, noisy: Tensor, timestep: Tensor | int, states: Tensor) -> SimpleNamespace:
        alphas = ALPHAS.to(noisy.device)[torch.as_tensor(timestep, device=noisy.device)].reshape(-1, 1, 1, 1)
        noise = self.unet(noisy, timestep, states).sample.float()
        return SimpleNamespace(sample=(noise - (1 - alphas).sqrt() * noisy) / alphas.sqrt())


@dataclass(frozen=True)
class Recipe:
    """One run. says: what is other than in the recipe. captions: of a scene's four, any, or its longest or shortest alone. time_weights (T,):
    how much a velocity error at each timestep counts. An error of the noise is a (= sqrt(alpha)) times that of the velocity
    that it implies, so noise as the target is `wrap` with weights of alpha."""

    says: str
    config: PretrainConfig
    uniform: bool = False
    time_weights: Tensor | None = None
    wrap: Callable[[nn.Module], nn.Module] | None = None
    optimizer: Callable = adamw
    text_layers: int = 3
    captions: str = "any"


def recipes(minutes: float) -> dict[str, Recipe]:
    """By name; the first is the recipe itself."""
    c = PretrainConfig(minutes=minutes, warmup=50, save_every=10**9)
    snr_weights = SNR.clamp(max=5) / (SNR + 1)  # min-SNR's for velocity (arXiv 2303.09556), gamma 5
    noise_weights, snr_weights = ALPHAS / ALPHAS.mean(), snr_weights / snr_weights.mean()
    return {
        "recipe": Recipe("the recipe", c),
        "seed": Recipe("the recipe, another seed", replace(c, seed=1)),
        "eps": Recipe("noise instead of velocity", c, time_weights=noise_weights, wrap=Velocity),
        "min-snr": Recipe("min-SNR weights", c, time_weights=snr_weights),
        "uniform": Recipe("uniform timesteps", c, uniform=True),
        "rate-8e-4": Recipe("learning rate 8e-4", replace(c, learning_rate=8e-4)),
        "rate-2e-4": Recipe("learning rate 2e-4", replace(c, learning_rate=2e-4)),
        "batch-16": Recipe("batch 16", replace(c, batch=16)),
        "batch-64": Recipe("batch 64", replace(c, batch=64)),
        "muon": Recipe("Muon for matrices", c, optimizer=MuonBesideAdamW),
        "muon-1e-3": Recipe("Muon for matrices, rate 1e-3", replace(c, learning_rate=1e-3), optimizer=MuonBesideAdamW),
        "text-1": Recipe("text encoder of 1 layer", c, text_layers=1),
        "text-6": Recipe("text encoder of 6 layers", c, text_layers=6),
        "longest": Recipe("longest captions", c, captions="longest"),
        "shortest": Recipe("shortest captions", c, captions="shortest"),
        "denoising": Recipe(
            "denoising alone",
            replace(
                c, grounding_weight=0, separation_weight=0, segmentation_weight=0, attribute_weight=0, subject_weight=0
            ),
        ),
    }


def captioned(data: Dataset, which: str) -> Dataset:
    """The scenes with the captions that the recipe wants."""
    if which == "any":
        return data
    ids, words = np.asarray(data.ids), np.asarray(data.words)
    lengths = (ids != ids[:, :, -1:]).sum(-1)  # a caption ends in padding
    one = (lengths.argmax if which == "longest" else lengths.argmin)(axis=1)
    rows = np.arange(len(data))
    ids, words = (np.repeat(x[rows, one][:, None], CAPTIONS_PER_SCENE, axis=1) for x in (ids, words))
    return replace(data, ids=ids, words=words)


def train(
    recipe: Recipe, latents: Tensor, data: Dataset, validation: tuple[Tensor, Dataset], folder: Path
) -> Iterator[dict]:
    """Its steps' losses, and at the end what was measured."""
    config, accelerator = recipe.config, build_accelerator()
    torch.manual_seed(config.seed)
    device = accelerator.device
    text = build_text_encoder(build_tokenizer(), recipe.text_layers).to(device)
    unet = build_unet().to(device, memory_format=torch.channels_last)
    predictor = recipe.wrap(unet) if recipe.wrap else unet
    head = SegmentationHead(unet).to(device)
    networks = nn.ModuleDict({"unet": unet, "text": text, "head": head})
    run = Run(networks, recipe.optimizer(networks, config.learning_rate), config, folder / "unused.pt")
    alphas, table = ALPHAS.to(device), meanings(build_tokenizer()).to(device)
    weights = None if recipe.time_weights is None else recipe.time_weights.to(device)
    with recorded_maps(unet) as records:
        while run.unfinished:
            batch, timesteps, noise = draw_batch(latents, data, config, run.step, len(alphas))
            if recipe.uniform:
                rng = np.random.default_rng((config.seed, 1, run.step))
                timesteps = torch.from_numpy(rng.integers(len(alphas), size=len(timesteps)))
            with accelerator.autocast():
                terms = batch_terms(
                    text, predictor, head, records, batch, timesteps, noise, alphas, table, config, weights
                )
            records.clear()
            run.update(terms.weighted(config), accelerator)
            if run.step % 50 == 0:
                yield {"step": run.step, "denoising": terms.denoising.item()}
    head.remove()
    last = asdict(validate(text, predictor, *validation))
    run.ema.copy_to(networks.parameters())
    yield {
        "seen": run.step * config.batch,
        "seconds": round(run.seconds),
        **asdict(validate(text, predictor, *validation)),
        "without averaging": last,
        "maps": asdict(measure_maps(text, unet, *validation)),
        "hardware": hardware(accelerator),
    }


def main(folder: Path, minutes: float, scenes: int, only: list[str], out: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shipped = PretrainConfig(scenes=scenes, from_weights=True, autoencoder=AutoencoderConfig(minutes=0))
    autoencoder, latents, data = prepare(folder, shipped, build_accelerator())
    fresh = validation_scenes(folder / "validation")
    validation = encode_dataset(autoencoder, fresh), fresh
    all_recipes = recipes(minutes)
    for name in only:
        path, recipe = folder / f"{name}.json", all_recipes[name]
        if path.exists():
            continue
        found: dict = {}
        for found in train(recipe, latents, captioned(data, recipe.captions), validation, folder):
            print(name, found, flush=True)
        path.write_text(json.dumps({"name": name, "says": recipe.says, "minutes": minutes, **found}, indent=1))
    table(folder, out)


def table(folder: Path, out: Path | None) -> None:
    """Print the runs there are, best first, and write them to `out`."""
    runs = [json.loads(path.read_text()) for name in recipes(1) if (path := folder / f"{name}.json").exists()]
    print("| | pictures seen | error in subjects | of all | last weights, in subjects | peak inside | two apart |")
    for run in sorted(runs, key=lambda run: statistics.fmean(run["subject"].values())):
        errors = (run["subject"], run["whole"], run["without averaging"]["subject"])
        means = " | ".join(f"{statistics.fmean(e.values()):.4f}" for e in errors)
        maps = " | ".join(f"{100 * run['maps'][name]:.0f} %" for name in ("peak", "own"))
        print(f"| {run['says']} | {run['seen']:,} | {means} | {maps} |")
    if out:
        out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    names = list(recipes(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where scenes and runs live")
    parser.add_argument("--minutes", type=float, default=6.0, help="wall time of each run")
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--only", action="append", choices=names, help="may be given several times; all without")
    parser.add_argument("--out", type=Path, help="write all runs of the folder there, as JSON")
    args = parser.parse_args()
    main(args.folder, args.minutes, args.scenes, args.only or names, args.out)
