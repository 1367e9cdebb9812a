"""The judge picks the base's best checkpoint, and how far to go from the weights that it began with.

Weights between those before and after a training often do better than either: what was learned is mostly there, and what was lost is not yet
(Wortsman and others, arXiv 2109.01903). A reward's gains and losses do so (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from infusion.world.examination import answered, varied
from infusion.world.judge import Judge
from infusion.world.models import build_pipeline
from infusion.world.runs import between, save_whole
from infusion.world.truth import SCENE_HEADS

BEST = "best.pt"
BLENDS = (0.0, 0.25, 0.5, 0.75)  # shares of the way that are tried beside all of it
ONE = ("kind", *SCENE_HEADS, "color1", "pattern", "position")
TWO = ("both", "own colors")


class Picked(NamedTuple):
    """What was kept. scores: of each candidate by name; step: that of the checkpoint, None for the last weights; share: how far of the way
    from the weights that the training began with, 1 for all of it."""

    scores: dict[str, float]
    step: int | None
    share: float


def judged(
    judge: Judge, autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, count: int = 128
) -> float:
    """Mean over what a base should do, each in [0, 1]. Of `count` pictures with one subject, how many show the class, background, style, first
    colour, pattern and position that were asked for; of half as many with two subjects, how many show both, and each in its colour; of as
    many whose prompts name no more than class and background, how far colours, patterns and accessories come as in the world (1 minus the
    total variation distance)."""
    pipe = build_pipeline(autoencoder, text_encoder, unet)
    pipe.set_progress_bar_config(disable=True)
    shares = []
    for subjects, number, names in ((1, count, ONE), (2, count // 2, TWO)):
        right = answered(pipe, judge, number, subjects, seed=1, first=0)
        shares += [right[name].value for name in names]
    shares += [1 - found["distance"] for found in varied(pipe, judge, count, first=0).values()]
    return sum(shares) / len(shares)


def save_best(folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, score: float, step: int) -> None:
    """Write the networks as they are to BEST, with their step and score: a run that goes on knows by it what it has to beat."""
    state = {"score": score, "step": step, "unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
    save_whole(state, folder / BEST)


def best_score(folder: Path) -> float:
    """The score that BEST was saved with; minus infinity where there is none."""
    path = folder / BEST
    return torch.load(path, weights_only=True, map_location="cpu")["score"] if path.exists() else float("-inf")


def keep_best(
    folder: Path,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    inspect: Callable[[], float],
    begun: dict[str, dict[str, Tensor]] | None = None,
) -> Picked:
    """Leave the best in the networks: as they are, the checkpoint BEST, if there is one, or, where `begun` is given, something between that
    and the better of the two. begun: the weights that the training began with, by part."""
    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    top, step = _copy(networks), None
    scores = {"last": inspect()}
    if (folder / BEST).exists():
        best = torch.load(folder / BEST, weights_only=True, map_location="cpu")
        for part, network in networks.items():
            network.load_state_dict(best[part])
        scores["best"] = inspect()
        if scores["best"] > scores["last"]:
            top, step = _copy(networks), best["step"]
    kept, kept_share, highest = top, 1.0, max(scores.values())
    if begun is not None:
        start = {f"{part}.{name}": tensor for part, state in begun.items() for name, tensor in state.items()}
        for share in BLENDS:
            blend = between(start, top, share)
            networks.load_state_dict(blend)
            scores[f"{share:g} of the way"] = score = inspect()
            if score > highest:
                kept, kept_share, highest = blend, share, score
    networks.load_state_dict(kept)
    return Picked(scores, step, kept_share)


def _copy(networks: nn.ModuleDict) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in networks.state_dict().items()}
