"""Textual Inversion (arXiv 2208.01618): the embedding of one new word, everything else frozen.

As diffusers' textual_inversion.py: the word begins as the class word's embedding, the plain denoising loss on the whole
picture, AdamW with weight decay 1e-2 on the embedding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from infusion.config import hold_types
from infusion.lesson import Lesson
from infusion.methods.dreambooth import denoising_loss
from infusion.methods.interface import MethodState, check_precision, rebuilt
from infusion.methods.tokens import NewWord
from infusion.offloading import offload, offloaded
from infusion.streams import frozen, require_unet


@dataclass(frozen=True)
class TextualInversionConfig:
    """steps x batch samples are seen. The learning rate is for the embedded base; diffusers' is 5e-4 a sample."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)


@dataclass(frozen=True)
class WordEmbedding:
    """One embedding (1, d) for `token`; prompts call the subject "a <name>", as the captions did that it was learned from."""

    token: str
    embedding: Tensor

    @property
    def subject(self) -> str:
        """ "a <name>"."""
        return f"a {self.token}"

    def tensors(self) -> Mapping[str, Tensor]:
        """The embedding, under its token as textual-inversion files have it."""
        return {self.token: self.embedding.detach()}

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """A pipeline that knows the token."""
        yield with_word(pipe, self.token, self.embedding.detach())


def with_word(pipe: DiffusionPipeline, token: str, *embeddings: Tensor) -> DiffusionPipeline:
    """A pipeline with tokenizers and text encoders of its own that have loaded the embeddings, one for each, the way diffusers does; raises what
    diffusers raises where one does not fit."""
    ends = ("", "_2")[: len(embeddings)]
    parts = {
        f"{name}{end}": copy.deepcopy(getattr(pipe, f"{name}{end}"))
        for name in ("tokenizer", "text_encoder")
        for end in ends
    }
    custom = rebuilt(pipe, **parts)
    for embedding, end in zip(embeddings, ends, strict=True):
        encoder, tokenizer = parts[f"text_encoder{end}"], parts[f"tokenizer{end}"]
        custom.load_textual_inversion({token: embedding}, token=token, text_encoder=encoder, tokenizer=tokenizer)
    if device := offloaded(pipe):  # diffusers takes the place where the text encoder lies for the one where it works
        offload(custom, device)
    return custom


def textual_inversion(
    pipe: DiffusionPipeline, lesson: Lesson, config: TextualInversionConfig | None = None
) -> Iterator[MethodState]:
    """Learn the embedding of `<name>`, yielding after every step."""
    config = config or TextualInversionConfig()
    check_precision(pipe)
    word = NewWord(pipe, lesson.name, lesson.word)
    ids = word.token_ids([t.format(word.token) for t in lesson.templates])
    unet = require_unet(pipe)
    optimizer = torch.optim.AdamW([word.embedding], config.learning_rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(config.seed)
    adapter = WordEmbedding(word.token, word.embedding)
    with frozen(unet):
        for step in range(1, config.steps + 1):
            draw = lesson.draw(config.batch, generator)
            loss = denoising_loss(unet, draw, word.states(ids[draw.captions]))
            word.embedding.grad = torch.autograd.grad(loss, word.embedding)[0]  # the text encoder's weights get none
            optimizer.step()
            yield MethodState(step, config.steps, float(loss.detach()), adapter)
