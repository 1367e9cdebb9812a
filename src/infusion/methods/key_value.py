"""Residuals on keys, on values, or on both, in a single stream: where a concept may live, beside where Infusion puts it.

At the concept's word every cross-attention layer uses K + 1_P k^T and V + 1_P v^T, P the word's token positions, so that maps change with
what is learned wherever keys have a residual. Values alone are Infusion's own single-stream ablation (arXiv 2404.14007), at all timesteps;
with the maps of a foundational stream a residual on keys would change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.concept import Concept
from infusion.config import hold_types
from infusion.errors import InfusionError
from infusion.lesson import Lesson
from infusion.methods.interface import MethodState, check_precision
from infusion.pipelines import attach
from infusion.streams import Streams, execution_device, frozen, projections, require_unet
from infusion.training import masked_loss, predict


@dataclass(frozen=True)
class KeyValueConfig:
    """steps x batch samples are seen. on: "k", "v" or "kv"."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 0.02
    on: str = "kv"
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)
        if self.on not in ("k", "v", "kv"):
            raise InfusionError(f"on is {self.on!r}; use 'k', 'v' or 'kv'.")


@dataclass(frozen=True)
class KeyValueAdapter:
    """Residuals by the projection's path; `subject` is "a <milo>"."""

    subject: str
    concept: Concept  # name and class word alone: its residuals are these
    residuals: Mapping[str, Tensor]

    def tensors(self) -> Mapping[str, Tensor]:
        """The residuals."""
        return {path: r.detach() for path, r in self.residuals.items()}

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself, which knows the name within the block. Raises InfusionError beside attached concepts, whose
        words would get these residuals too."""
        with attach(pipe, self.concept, two_streams=False) as attachment:
            if not attachment.alone:
                raise InfusionError("Key-value residuals cannot be used beside attached concepts; detach these first.")
            with added(attachment.streams, self.tensors()):
                yield pipe


@contextmanager
def added(streams: Streams, residuals: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the named projections add their residual (c,) at every concept's word, in the rows that carry one."""
    layers = projections(streams.unet)

    def adding(path: str):
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            words = streams.word_strengths()
            return output if words is None else output + (words[..., None] * residuals[path]).to(output.dtype)

        return hook

    handles = [layers[path].register_forward_hook(adding(path)) for path in residuals]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def key_value(pipe: DiffusionPipeline, lesson: Lesson, config: KeyValueConfig | None = None) -> Iterator[MethodState]:
    """Learn the residuals, yielding after every step."""
    config = config or KeyValueConfig()
    check_precision(pipe)
    unet, device = require_unet(pipe), execution_device(pipe)
    residuals = {
        path: nn.Parameter(torch.zeros(layer.out_features, device=device))
        for path, layer in projections(unet).items()
        if path[-1] in config.on
    }
    learned = list(residuals.values())
    optimizer = torch.optim.AdamW(learned, config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    adapter = KeyValueAdapter(f"a <{lesson.name}>", Concept(lesson.name, lesson.word, {}), residuals)
    streams = Streams(unet)
    streams.two_streams = False
    try:
        with frozen(unet):
            for step in range(1, config.steps + 1):
                draw = lesson.draw(config.batch, generator)
                with added(streams, residuals):
                    loss = masked_loss(predict(streams, draw), draw)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                yield MethodState(step, config.steps, float(loss.detach()), adapter)
    finally:
        streams.remove()
