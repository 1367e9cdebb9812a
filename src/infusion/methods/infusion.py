"""Infusion itself behind the same interface: one residual a cross-attention layer, maps of the foundational stream.

Switches are those of `LearnConfig`: a single stream, subsets of layers. Mirror images and masks are the lesson's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor

from infusion.concept import Concept
from infusion.lesson import Lesson
from infusion.methods.interface import MethodState
from infusion.pipelines import attach
from infusion.training import LearnConfig, learning


@dataclass(frozen=True)
class ConceptAdapter:
    """A concept; `subject` holds its "<name>". two_streams=False draws in the single stream. strength: factor on the residuals."""

    subject: str
    concept: Concept
    two_streams: bool = True
    strength: float = 1.0

    def tensors(self) -> Mapping[str, Tensor]:
        """The residuals."""
        return self.concept.residuals

    @property
    def digest(self) -> str:
        """Of all that decides what is drawn with it and that a pipeline's own weights do not show."""
        decides = f"{self.two_streams} {self.strength} ".encode() + self.concept.to_bytes("fp32")
        return hashlib.sha256(decides).hexdigest()

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself with the concept attached."""
        with attach(pipe, self.concept, two_streams=self.two_streams, strength={self.concept.name: self.strength}):
            yield pipe


def infusion(
    pipe: DiffusionPipeline, lesson: Lesson, config: LearnConfig | None = None, at_once: int | None = None
) -> Iterator[MethodState]:
    """Learn a concept, yielding after every step. See `training.learning`."""
    config = config or LearnConfig()
    for state in learning(pipe, lesson, lesson.word, lesson.name, config, at_once):
        adapter = ConceptAdapter(f"a <{lesson.name}>", state.concept, config.two_streams)
        yield MethodState(state.step, state.steps, state.loss, adapter)
