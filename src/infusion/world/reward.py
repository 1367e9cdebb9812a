"""A training term for what the base's own drawings show: the reader's log-likelihood of what their prompts asked for.

Denoising teaches slowly what covers few pixels: a class, a colour, a pattern. Here the base draws requests of combinations that training
sees; from a state on the way it guesses the clean latents in one guided step, the guess is noised again to a lower level, and the reader
(`reader.py`) tells how likely it shows each asked subject with its attributes. Only that one step has a gradient, as in ReFL
(arXiv 2304.05977, algorithm 1), and in it the prediction of the prompt alone, not that of the empty one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from infusion.world.models import LATENT_CHANNELS, LATENT_SIDE, build_scheduler
from infusion.world.reader import NOISIEST, Reader, Seen, alphas_at, noised
from infusion.world.requests import Request, seen_request
from infusion.world.tokenizer import build_tokenizer
from infusion.world.truth import NONE, SUBJECT_HEADS, scene_labels
from infusion.world.vocabulary import CLASSES, POSITIONS

SUBJECTS = 2  # at most, in a request


@dataclass(frozen=True)
class RewardConfig:
    """How drawings earn. drawn: requests drawn together, in `steps` steps at `guidance`; batch: states that a training step takes of them,
    each state once, from timesteps `latest` to `earliest`. levels: a guess from timestep t is noised again to a share of t between
    these. scene: how much background and style count, from below `scene_below` on, where a guess is sharp enough to have a style.
    unasked: how much a subject counts that nobody asked for. enough: log-likelihood above which there is nothing more to earn.
    """

    drawn: int = 32
    steps: int = 12
    guidance: float = 6.0
    batch: int = 16
    earliest: int = 900
    latest: int = 120  # at least 1: a finished drawing has no guess to make
    levels: tuple[float, float] = (0.1, 0.6)
    scene: float = 0.5
    scene_below: int = 700
    unasked: float = 0.3
    enough: float = -0.05


class Asked(NamedTuple):
    """What n prompts ask for, by place in each head: subject (n, SUBJECTS, heads) and third (n, SUBJECTS) of the frame, NONE where that is left
    open, and scene (n, scene heads). int64."""

    subject: Tensor
    third: Tensor
    scene: Tensor


class States(NamedTuple):
    """Drawings on their way: latents (n, c, g, g), timesteps (n,), ids (n, m) of their prompts, and what those ask for."""

    latents: Tensor
    timesteps: Tensor
    ids: Tensor
    asked: Asked


class Earned(NamedTuple):
    """Log-likelihoods (n,) of the asked subjects (their mean) and of background and style (their sum), and the height (n,) in
    [0, 1] of the surest subject that nobody asked for."""

    subject: Tensor
    scene: Tensor
    unasked: Tensor


def asked_of(requests: Sequence[Request]) -> Asked:
    """What the requests ask for, as tensors."""
    asked = Asked(
        torch.full((len(requests), SUBJECTS, len(SUBJECT_HEADS)), NONE),
        torch.full((len(requests), SUBJECTS), NONE),
        torch.tensor([scene_labels(request) for request in requests]),
    )
    for i, request in enumerate(requests):
        for j, wanted in enumerate(request.subjects):
            for k, (name, values) in enumerate(SUBJECT_HEADS.items()):
                value = getattr(wanted, name)
                if value is not None:
                    asked.subject[i, j, k] = values.index(value)
            if wanted.position:
                asked.third[i, j] = POSITIONS.index(wanted.position)
    return asked


def earned(seen: Seen, asked: Asked, enough: float) -> Earned:
    """What the reader's output says of what was asked for. A subject's log-likelihood is that of its best cell, in the third of the frame
    that was asked for: log p(a centre) + sum of log p(attribute)."""
    logs = {name: logits.log_softmax(1) for name, logits in seen.subject.items()}
    side = seen.heat.shape[-1]
    third = ((torch.arange(side, device=seen.heat.device) + 0.5) / side * len(POSITIONS)).long()
    total, count = torch.zeros_like(seen.heat[:, 0, 0]), torch.zeros_like(seen.heat[:, 0, 0])
    for j in range(SUBJECTS):
        cells = F.logsigmoid(seen.heat)
        for k, name in enumerate(SUBJECT_HEADS):
            target = asked.subject[:, j, k]
            of_target = logs[name][torch.arange(len(target)), target.clamp_min(0)]  # (n, g, g)
            cells = cells + torch.where((target != NONE)[:, None, None], of_target, 0.0)
        wanted = asked.third[:, j, None]
        elsewhere = (wanted != NONE) & (wanted != third)  # (n, g)
        best = cells.masked_fill(elsewhere[:, None], float("-inf")).amax((1, 2))
        present = asked.subject[:, j, 0] != NONE
        total = total + torch.where(present, best.clamp(max=enough), 0.0)
        count = count + present
    scene = torch.stack(
        [
            logits.log_softmax(1).gather(1, asked.scene[:, k, None])[:, 0].clamp(max=enough)
            for k, logits in enumerate(seen.scene.values())
        ]
    ).sum(0)
    kinds = F.one_hot(asked.subject[..., 0].clamp_min(0), len(CLASSES)) * (asked.subject[..., :1] != NONE)
    known = torch.einsum("nkyx,nk->nyx", logs["kind"].exp(), kinds.sum(1).clamp(max=1).float())
    return Earned(total / count, scene, (seen.heat.sigmoid() * (1 - known)).amax((1, 2)))


@torch.no_grad()
def own_states(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel, rng: np.random.Generator, config: RewardConfig
) -> Iterator[States]:
    """States of the base's own drawings without end, `config.batch` at a time, of several drawings and timesteps mixed, each at most once.
    The networks are used as they are when a drawing is needed, in the caller's autocast. Raises ValueError where drawings that are drawn
    together have fewer states than a batch."""
    tokenizer = build_tokenizer()
    while True:
        requests = [seen_request(rng) for _ in range(config.drawn)]
        prompts = [request.prompt for request in requests]
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(
            unet.device
        )
        noise = torch.randn(
            config.drawn, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE,
            generator=torch.Generator().manual_seed(int(rng.integers(2**31))),
        ).to(unet.device)  # fmt: skip
        way = takewhile(lambda state: state[0] >= config.latest, trajectory(text_encoder, unet, ids, noise, config))
        way = [(t, latents) for t, latents in way if t <= config.earliest]
        if len(way) * config.drawn < config.batch:
            raise ValueError(
                f"{config.drawn} drawings have {len(way)} states each from timestep {config.latest} to {config.earliest}: fewer than a batch of "
                f"{config.batch}; draw more together, in more steps, or allow more timesteps."
            )
        asked = Asked(*(x.to(unet.device).repeat(len(way), *[1] * (x.ndim - 1)) for x in asked_of(requests)))
        timesteps = torch.tensor([t for t, _ in way], device=unet.device).repeat_interleave(config.drawn)
        every = States(torch.cat([latents for _, latents in way]), timesteps, ids.repeat(len(way), 1), asked)
        order = torch.from_numpy(rng.permutation(len(timesteps))).to(unet.device)
        for rows in order.split(config.batch):
            if len(rows) == config.batch:
                yield States(*(x[rows] for x in every[:3]), Asked(*(x[rows] for x in every.asked)))


def trajectory(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel, ids: Tensor, noise: Tensor, config: RewardConfig
) -> Iterator[tuple[int, Tensor]]:
    """The way from noise (n, c, g, g) to a drawing, (timestep, latents) from each step and at the end (0, the drawing): what the pipeline
    does, but that it yields."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(config.steps)
    told = text_encoder(ids).last_hidden_state
    states = torch.cat([text_encoder(no_prompt(ids)).last_hidden_state.expand_as(told), told])
    latents = noise
    for t in scheduler.timesteps.tolist():
        yield t, latents
        empty, told = (
            unet(torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last), t, states)
            .sample.float()
            .chunk(2)
        )
        latents = scheduler.step(empty + config.guidance * (told - empty), t, latents).prev_sample
    yield 0, latents


def reward(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    reader: Reader,
    states: States,
    rng: np.random.Generator,
    config: RewardConfig,
) -> Tensor:
    """What the states' guesses earn, their mean, a scalar to be made larger. The networks run in the caller's autocast."""
    latents, timesteps, ids, asked = states
    noisy = latents.contiguous(memory_format=torch.channels_last)
    prompts = text_encoder(ids).last_hidden_state
    told = unet(noisy, timesteps, prompts).sample.float()
    with torch.no_grad():
        empty = unet(noisy, timesteps, text_encoder(no_prompt(ids)).last_hidden_state.expand_as(prompts)).sample.float()
    alphas = alphas_at(timesteps)
    clean = alphas.sqrt() * latents - (1 - alphas).sqrt() * (empty + config.guidance * (told - empty))
    share = torch.from_numpy(rng.uniform(*config.levels, len(timesteps)).astype(np.float32)).to(timesteps.device)
    levels = (timesteps * share).long().clamp(1, NOISIEST)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))).to(clean)
    guess = noised(clean, levels, noise)
    seen = reader(guess.contiguous(memory_format=torch.channels_last), levels)
    with torch.autocast(latents.device.type, enabled=False):
        got = earned(seen, asked, config.enough)
        scene = config.scene * torch.where(timesteps < config.scene_below, got.scene, 0.0)
        return (got.subject + scene - config.unasked * got.unasked).mean()


def no_prompt(ids: Tensor) -> Tensor:
    """Token ids (1, m) of an empty prompt: the start token, then the end token, which is also the padding, as in `ids` (n, m)."""
    return torch.cat([ids[:1, :1], ids[:1, -1:].expand(-1, ids.shape[1] - 1)], 1)
