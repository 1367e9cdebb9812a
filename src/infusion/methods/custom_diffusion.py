"""Custom Diffusion (arXiv 2212.04488): key and value projections of cross-attention, and a new word before the class word.

As diffusers' train_custom_diffusion.py with freeze_model="crossattn_kv": captions "a photo of a <milo> dog", no gradient
through keys and values of the first token, prior preservation. Ours: the word begins as the class word's embedding, not as
a rare word's; the prior's pictures are the base's own, where the paper takes real ones; photos are not scaled at random ("far away", "close up"),
as no method's here are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.config import hold_types
from infusion.lesson import Lesson
from infusion.methods.dreambooth import preserving
from infusion.methods.interface import MethodState, check_precision
from infusion.methods.textual_inversion import WordEmbedding
from infusion.methods.tokens import NewWord
from infusion.streams import projections, require_unet


@dataclass(frozen=True)
class CustomDiffusionConfig:
    """steps x batch samples are seen, beside as many of the prior where there is one. Learning rates are for the embedded
    base; at Stable Diffusion's size the authors use 8e-5 in effect."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 1e-3
    prior_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)


@dataclass(frozen=True)
class KeysAndValues:
    """Key and value projections by layer path, and the new word's embedding; `subject` is "a <milo> dog". strength: below 1 the projections
    are taken between the base's and these."""

    subject: str
    word: WordEmbedding
    weights: Mapping[str, Tensor]
    strength: float = 1.0

    def tensors(self) -> Mapping[str, Tensor]:
        """Projections under their module paths, and the embedding."""
        return {**{k: w.detach() for k, w in self.weights.items()}, **self.word.tensors()}

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline with the word, on the same UNet, whose projections are exchanged within the block."""
        layers = projections(require_unet(pipe))
        stock = {path: layers[path].weight for path in self.weights}
        try:
            for path, weight in self.weights.items():
                drawn = torch.lerp(stock[path].detach(), weight.detach().to(stock[path]), self.strength)
                layers[path].weight = nn.Parameter(drawn, requires_grad=False)
            with self.word.attached(pipe) as custom:
                yield custom
        finally:
            for path, weight in stock.items():
                layers[path].weight = weight


def custom_diffusion(
    pipe: DiffusionPipeline, lesson: Lesson, config: CustomDiffusionConfig | None = None, prior: Lesson | None = None
) -> Iterator[MethodState]:
    """Train projections and word, yielding after every step. prior: pictures of the class, from `dreambooth.prior_lesson`."""
    config = config or CustomDiffusionConfig()
    check_precision(pipe, own_weights=True)
    word = NewWord(pipe, lesson.name, lesson.word)
    called = f"{word.token} {lesson.word}"
    ids = word.token_ids([t.format(called) for t in lesson.templates])
    unet = copy.deepcopy(require_unet(pipe)).requires_grad_(False)
    for layer in projections(unet).values():
        layer.register_forward_hook(_first_token_detached)
    weights = {path: layer.weight.requires_grad_(True) for path, layer in projections(unet).items()}
    learned = [*weights.values(), word.embedding]
    adapter = KeysAndValues(f"a {called}", WordEmbedding(word.token, word.embedding), weights)
    yield from preserving(
        unet, learned, lesson, prior, config, adapter, states=lambda draw: word.states(ids[draw.captions])
    )


def _first_token_detached(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """As in diffusers' CustomDiffusionAttnProcessor: the begin token's key and value stay out of the gradient."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)
