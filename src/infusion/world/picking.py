"""The judge picks the base's best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from infusion.world.examination import draw, followed
from infusion.world.judge import Judge
from infusion.world.models import build_pipeline
from infusion.world.requests import unseen_requests
from infusion.world.runs import save_whole
from infusion.world.truth import SCENE_HEADS

BEST = "best.pt"


def judged(
    judge: Judge, autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, count: int = 128
) -> float:
    """Mean over class, background, style, colour, pattern and position of the share of pictures that show what was asked for."""
    pipe = build_pipeline(autoencoder, text_encoder, unet)
    pipe.set_progress_bar_config(disable=True)
    requests = unseen_requests(count, seed=1)
    right = followed(requests, judge.read(draw(pipe, [r.prompt for r in requests], range(count))))
    return sum(right[name].value for name in ("kind", *SCENE_HEADS, "color1", "pattern", "position")) / 6


def save_best(folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, score: float, step: int) -> None:
    """Write the networks as they are to BEST, with their step and score: a run that goes on knows by it what it has to beat."""
    state = {"score": score, "step": step, "unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
    save_whole(state, folder / BEST)


def best_score(folder: Path) -> float:
    """The score that BEST was saved with; minus infinity where there is none."""
    path = folder / BEST
    return torch.load(path, weights_only=True, map_location="cpu")["score"] if path.exists() else float("-inf")


def keep_best(
    folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, inspect: Callable[[], float]
) -> tuple[float, float | None, int | None]:
    """Leave the better of the networks as they are and the checkpoint BEST, if there is one, in the networks; returns both
    scores, and the checkpoint's step where it is the better one."""
    last, path = inspect(), folder / BEST
    if not path.exists():
        return last, None, None
    now = [{k: v.clone() for k, v in n.state_dict().items()} for n in (unet, text_encoder)]
    best = torch.load(path, weights_only=True, map_location="cpu")
    unet.load_state_dict(best["unet"])
    text_encoder.load_state_dict(best["text_encoder"])
    before = inspect()
    if before > last:
        return last, before, best["step"]
    unet.load_state_dict(now[0])
    text_encoder.load_state_dict(now[1])
    return last, before, None
