"""DreamBooth (arXiv 2208.12242): every weight of a copy of the UNet, with or without prior preservation.

    loss = |v(z_t, "a [identifier] dog") - v|^2 + prior_weight |v(z'_t, "a dog") - v'|^2

z are the photos, z' pictures of the class that the base itself drew (the paper's equation 2). Without a prior and
an identifier it is the plain full fine-tune: the embedded base has no rare token to spare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.config import hold_types
from infusion.errors import InfusionError
from infusion.generation import generate
from infusion.lesson import Draw, Lesson, encode_texts, prepare_lesson
from infusion.methods.interface import MethodState, below, check_precision, rebuilt
from infusion.photos import Photo
from infusion.streams import require_unet


@dataclass(frozen=True)
class DreamBoothConfig:
    """steps x batch samples are seen, beside as many of the prior where there is one. The learning rate is for the
    embedded base; at Stable Diffusion's size DreamBooth uses 5e-6. identifier: a rare word before the class word."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 1e-4
    identifier: str = ""
    prior_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)


@dataclass(frozen=True)
class TunedUNet:
    """A whole UNet. strength: below 1 its weights are taken between the base's and its own. max_timestep: from there on the base draws."""

    subject: str
    unet: nn.Module
    strength: float = 1.0
    max_timestep: int | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """All weights."""
        return self.unet.state_dict()

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline with this UNet, in evaluation mode, in place of the base's."""
        training, base = self.unet.training, require_unet(pipe)
        unet = self.unet if self.strength == 1 else self._between(base)
        try:
            with below(self.max_timestep, unet, base):
                yield rebuilt(pipe, unet=unet.eval())
        finally:
            self.unet.train(training)

    @torch.no_grad()
    def _between(self, base: nn.Module) -> nn.Module:
        unet = copy.deepcopy(self.unet)
        for ours, theirs in zip(unet.parameters(), base.parameters(), strict=True):
            ours.copy_(torch.lerp(theirs.to(ours), ours, self.strength))
        return unet


def dreambooth(
    pipe: DiffusionPipeline,
    lesson: Lesson,
    config: DreamBoothConfig | None = None,
    prior: Lesson | None = None,
    max_timestep: int | None = None,
) -> Iterator[MethodState]:
    """Train a copy of the pipeline's UNet, yielding after every step. prior: pictures of the class, from `prior_lesson`. max_timestep:
    learned and drawn below it alone, as a concept is (`LearnConfig`), which the paper does not do."""
    config = config or DreamBoothConfig()
    check_precision(pipe, own_weights=True)
    called = f"{config.identifier} {lesson.word}".strip()
    if config.identifier:
        captions = [t.format(called) for t in lesson.templates]
        lesson = replace(lesson, texts=encode_texts(pipe, captions, {}, lesson.name))
    unet = copy.deepcopy(require_unet(pipe)).requires_grad_(True).train()
    adapter = TunedUNet(f"a {called}", unet, max_timestep=max_timestep)
    yield from preserving(unet, list(unet.parameters()), lesson, prior, config, adapter, max_timestep)


def preserving(
    unet: nn.Module,
    learned: Sequence[nn.Parameter],
    lesson: Lesson,
    prior: Lesson | None,
    config: Any,
    adapter: Any,
    max_timestep: int | None = None,
    states: Callable[[Draw], Tensor] | None = None,
) -> Iterator[MethodState]:
    """The training loop of methods with prior preservation: AdamW on `learned`, gradients clipped to norm 1. config: has steps, batch,
    learning_rate, prior_weight and seed. max_timestep: timesteps, the prior's too, are drawn below it. states: a draw's text states, where
    they are learned too; the prior keeps its own."""
    if max_timestep is not None and max_timestep < 1:
        raise InfusionError(f"max_timestep is {max_timestep}; it must be at least 1.")
    optimizer = torch.optim.AdamW(learned, config.learning_rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(config.seed)
    prior_generator = torch.Generator().manual_seed(config.seed + 1)  # photos are drawn alike with and without a prior
    for step in range(1, config.steps + 1):
        draw = lesson.draw(config.batch, generator, max_timestep)
        loss = denoising_loss(unet, draw, states(draw) if states else None)
        if prior is not None:
            loss = loss + config.prior_weight * denoising_loss(
                unet, prior.draw(config.batch, prior_generator, max_timestep)
            )
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield MethodState(step, config.steps, float(loss.detach()), adapter)


def prior_lesson(
    pipe: DiffusionPipeline, lesson: Lesson, count: int = 64, steps: int = 25, seed: int = 10_000
) -> Lesson:
    """Pictures of the class drawn by the base, as a lesson without masks; the paper draws 200 per photo set."""
    pictures = generate(pipe, [f"a {lesson.word}"] * count, list(range(seed, seed + count)), steps)
    photos = [Photo(p.image) for p in pictures]
    return prepare_lesson(pipe, photos, lesson.word, lesson.name, flip=False, masked=False)


def denoising_loss(unet: nn.Module, draw: Draw, states: Tensor | None = None) -> Tensor:
    """Mean squared error of the UNet's prediction over the whole picture; `states` replace the draw's text states."""
    kwargs = draw.kwargs if states is None else {**draw.kwargs, "encoder_hidden_states": states}
    prediction = unet(draw.noisy, draw.timesteps, **kwargs).sample
    return (prediction.float() - draw.target.float()).square().mean()
