"""A training term for what the base's own drawings show: the reader's log-likelihood of what their prompts asked for.

Denoising teaches slowly what covers few pixels: a class, a colour, a pattern. Here the base draws requests of combinations that training
sees; from a state on the way it guesses the clean latents in one guided step, the guess is noised again to a lower level, and the reader
(`reader.py`) tells how likely it shows each asked subject with its attributes. Only that one step has a gradient, as in ReFL
(arXiv 2304.05977, algorithm 1), and in it the prediction of the prompt alone, not that of the empty one.

What is rewarded drifts where the reader does not look. So the base is also held, outside of subjects, to what it predicted before (its
copy, `Reference`), and what nobody named to the world's own shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
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
from infusion.world.reader import COLOR_HEADS, COLORLESS, HEADS, NOISIEST, Reader, Seen, alphas_at, noised
from infusion.world.requests import Request, seen_request
from infusion.world.runs import generator_of
from infusion.world.tokenizer import build_tokenizer
from infusion.world.truth import ATTRIBUTES, COLORED, NONE, SCENE_HEADS, SHARES, scene_labels
from infusion.world.vocabulary import CLASSES, POSITIONS

SUBJECTS = 2  # at most, in a request
# Attributes that come in the world's shares where nothing is named. Not the accessory: captions name it only where there is one.
SILENT = tuple(name for name in ATTRIBUTES if name != "accessory")


@dataclass(frozen=True)
class RewardConfig:
    """How drawings earn. drawn: requests drawn together, in `steps` steps at `guidance`; batch: states that a training step takes of them,
    each state once, from timesteps `latest` to `earliest`. levels: a guess from timestep t is noised again to a share of t between
    these. scene: how much background and style count, from below `scene_below` on, where a guess is sharp enough to have a style.
    unasked: how much a subject counts that nobody asked for. variety: how much it counts that an attribute which nobody named comes more
    often than in the world, over some `memory` batches. tie: how much it counts that predictions move outside of subjects. enough:
    log-likelihood above which there is nothing more to earn.
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
    variety: float = 0.3
    memory: int = 50
    tie: float = 20.0
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
    """Log-likelihoods (n,) of the asked subjects (their mean) and of background and style (mean over cells, their sum), and the height (n,)
    in [0, 1] of the surest subject that nobody asked for. unnamed: by attribute, the probabilities (m, values) of the subjects of which the
    prompt leaves it open and its silence says nothing (`SILENT`)."""

    subject: Tensor
    scene: Tensor
    unasked: Tensor
    unnamed: dict[str, Tensor]


class Reference(NamedTuple):
    """The base as it was before the reward."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel


class Gain(NamedTuple):
    """What states earn, their mean, a scalar to be made larger, and of it the mean square that predictions have moved outside of subjects."""

    reward: Tensor
    moved: Tensor


class Unnamed:
    """The running shares of what drawings show where their prompts name nothing, by attribute."""

    def __init__(self, memory: int, device: torch.device) -> None:
        self.memory = memory
        self.world = {name: torch.tensor(SHARES[name], device=device) for name in SILENT}
        self.shown = {name: shares.clone() for name, shares in self.world.items()}

    def excess(self, unnamed: dict[str, Tensor]) -> Tensor:
        """How much of these probabilities falls on what comes too often: sum of p log(shown / world), mean over subjects and attributes. Adds
        them to the running shares. Minus its gradient is that of a step towards the world's shares (their relative entropy)."""
        total = torch.zeros((), device=next(iter(self.world.values())).device)
        for name, told in unnamed.items():
            if len(told):
                told = told[:, : len(self.world[name])]  # colours alone, not their absence
                total = total + (told * (self.shown[name] / self.world[name]).log()).sum(1).mean() / len(unnamed)
                self.shown[name].lerp_(told.detach().mean(0).clamp_min(1e-3), 1 / self.memory)
        return total


@dataclass(frozen=True)
class Standards:
    """What drawings are held to: what the reader reads in them, what the base predicted before the reward, and the world's shares of what
    nobody named."""

    reader: Reader
    reference: Reference
    unnamed: Unnamed

    @classmethod
    def begin(
        cls, reader: Reader, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, config: RewardConfig
    ) -> Standards:
        """With copies of the networks as they are."""
        return cls(reader, Reference(deepcopy(text_encoder), deepcopy(unet)), Unnamed(config.memory, unet.device))


def asked_of(requests: Sequence[Request]) -> Asked:
    """What the requests ask for, as tensors; in styles without colours that there are none."""
    asked = Asked(
        torch.full((len(requests), SUBJECTS, len(HEADS)), NONE),
        torch.full((len(requests), SUBJECTS), NONE),
        torch.tensor([scene_labels(request) for request in requests]),
    )
    for i, request in enumerate(requests):
        for j, wanted in enumerate(request.subjects):
            for k, (name, values) in enumerate(HEADS.items()):
                value = getattr(wanted, name)
                if value is not None:
                    asked.subject[i, j, k] = values.index(value)
                elif name in COLOR_HEADS and request.style not in COLORED:
                    asked.subject[i, j, k] = COLORLESS
            if wanted.position:
                asked.third[i, j] = POSITIONS.index(wanted.position)
    return asked


def earned(seen: Seen, asked: Asked, enough: float) -> Earned:
    """What the reader's output says of what was asked for. A subject's log-likelihood is that of its best cell, in the third of the frame
    that was asked for: log p(a centre) + log p(the style) + sum of log p(attribute)."""
    logs = {name: logits.log_softmax(1) for name, logits in seen.subject.items()}
    places = {name: logits.log_softmax(1) for name, logits in seen.scene.items()}
    n, side, _ = seen.heat.shape
    rows = torch.arange(n, device=seen.heat.device)
    of_scene = {name: places[name][rows, asked.scene[:, k]] for k, name in enumerate(SCENE_HEADS)}  # (n, g, g) each
    third = ((torch.arange(side, device=seen.heat.device) + 0.5) / side * len(POSITIONS)).long()
    total, count = torch.zeros_like(seen.heat[:, 0, 0]), torch.zeros_like(seen.heat[:, 0, 0])
    unnamed: dict[str, list[Tensor]] = {name: [] for name in SILENT}
    color1 = list(HEADS).index("color1")
    for j in range(SUBJECTS):
        cells = F.logsigmoid(seen.heat) + of_scene["style"]
        for k, name in enumerate(HEADS):
            target = asked.subject[:, j, k]
            of_target = logs[name][rows, target.clamp_min(0)]
            cells = cells + torch.where((target != NONE)[:, None, None], of_target, 0.0)
        wanted = asked.third[:, j, None]
        elsewhere = (wanted != NONE) & (wanted != third)  # (n, g)
        best, at = cells.masked_fill(elsewhere[:, None], float("-inf")).flatten(1).max(1)
        present = asked.subject[:, j, 0] != NONE
        total = total + torch.where(present, best.clamp(max=enough), 0.0)
        count = count + present
        for k, name in enumerate(HEADS):
            if name in unnamed:
                left_open = present & (asked.subject[:, j, k] == NONE)
                if name == "pattern":
                    # colours named without a pattern are a plain subject's more than half of the time
                    left_open = left_open & (asked.subject[:, j, color1] == NONE)
                unnamed[name].append(logs[name].flatten(2)[rows, :, at][left_open].exp())
    scene = torch.stack([told.mean((1, 2)).clamp(max=enough) for told in of_scene.values()]).sum(0)
    kinds = F.one_hot(asked.subject[..., 0].clamp_min(0), len(CLASSES)) * (asked.subject[..., :1] != NONE)
    known = torch.einsum("nkyx,nk->nyx", logs["kind"].exp(), kinds.sum(1).clamp(max=1).float())
    unasked = (seen.heat.sigmoid() * (1 - known)).amax((1, 2))
    return Earned(total / count, scene, unasked, {name: torch.cat(parts) for name, parts in unnamed.items()})


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
            generator=generator_of(rng),
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
    standards: Standards,
    states: States,
    rng: np.random.Generator,
    config: RewardConfig,
) -> Gain:
    """What the states' guesses earn. The networks run in the caller's autocast."""
    latents, timesteps, ids, asked = states
    reference = standards.reference
    noisy = latents.contiguous(memory_format=torch.channels_last)
    prompts = text_encoder(ids).last_hidden_state
    told = unet(noisy, timesteps, prompts).sample.float()
    with torch.no_grad():
        empty = unet(noisy, timesteps, text_encoder(no_prompt(ids)).last_hidden_state.expand_as(prompts)).sample.float()
        before = reference.unet(noisy, timesteps, reference.text_encoder(ids).last_hidden_state).sample.float()
    alphas = alphas_at(timesteps)
    clean = alphas.sqrt() * latents - (1 - alphas).sqrt() * (empty + config.guidance * (told - empty))
    share = torch.from_numpy(rng.uniform(*config.levels, len(timesteps)).astype(np.float32)).to(timesteps.device)
    levels = (timesteps * share).long().clamp(1, NOISIEST)
    noise = torch.randn(clean.shape, generator=generator_of(rng)).to(clean)
    guess = noised(clean, levels, noise)
    seen = standards.reader(guess.contiguous(memory_format=torch.channels_last), levels)
    with torch.autocast(latents.device.type, enabled=False):
        got = earned(seen, asked, config.enough)
        scene = config.scene * torch.where(timesteps < config.scene_below, got.scene, 0.0)
        outside = 1 - seen.inside.detach().sigmoid()
        moved = (outside[:, None] * (told - before).square()).mean()
        gained = (got.subject + scene - config.unasked * got.unasked).mean()
        return Gain(gained - config.variety * standards.unnamed.excess(got.unnamed) - config.tie * moved, moved)


def no_prompt(ids: Tensor) -> Tensor:
    """Token ids (1, m) of an empty prompt: the start token, then the end token, which is also the padding, as in `ids` (n, m)."""
    return torch.cat([ids[:1, :1], ids[:1, -1:].expand(-1, ids.shape[1] - 1)], 1)
