"""What every method gives: states while it learns, and an adapter that draws.

    for state in dreambooth(pipe, lesson, DreamBoothConfig(steps=200)):
        print(state.step, state.loss)
    with state.adapter.attached(pipe) as custom:
        custom(f"a photo of {state.adapter.subject} on the beach")

All methods learn from the same `Lesson`, leave the given pipeline as it is, and draw photo, caption, timestep and
noise of each step from the same seed in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.errors import InfusionError
from infusion.offloading import offload, offloaded
from infusion.streams import require_unet


class Adapter(Protocol):
    """What a method learned."""

    @property
    def subject(self) -> str:
        """How a prompt names the subject: "a dog", "a <milo>", "a <milo> dog"."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that would have to be stored, by name."""
        ...

    def attached(self, pipe: DiffusionPipeline) -> AbstractContextManager[DiffusionPipeline]:
        """A pipeline that can draw the subject, within the block; `pipe` is as before after it."""
        ...


@dataclass(frozen=True)
class MethodState:
    """State after `step` of `steps`: the batch's loss, and the adapter so far, which goes on changing with later steps."""

    step: int
    steps: int
    loss: float
    adapter: Any


def stored_bytes(adapter: Adapter, bytes_per_value: int = 2) -> int:
    """Size of the learned tensors at `bytes_per_value`, 2 for fp16; headers not counted, so that methods compare."""
    return sum(t.numel() for t in adapter.tensors().values()) * bytes_per_value


def check_precision(pipe: DiffusionPipeline, own_weights: bool = False) -> None:
    """Raise InfusionError for a base whose numbers are too coarse to learn in: gradients vanish in fp16, which only Infusion scales; a step
    of the base's `own_weights` is rounded away in bf16 too, and overflows in fp16."""
    dtype = require_unet(pipe).dtype
    if dtype == torch.float16 or (own_weights and dtype != torch.float32):
        remedy = "fp32" if own_weights else "fp32 or bf16"
        raise InfusionError(
            f"The base is in {str(dtype).removeprefix('torch.')}, too coarse for this method; load it in {remedy}."
        )


@contextmanager
def below(max_timestep: int | None, unet: nn.Module, base: Callable[..., Any]) -> Iterator[None]:
    """Within the block calls of `unet` at timesteps from `max_timestep` on are answered by `base`; with None all are its own.

    Raises InfusionError for a call with rows on both sides."""
    if max_timestep is None:
        yield
        return
    own, replaced = unet.forward, unet.__dict__.get("forward")  # accelerate's offloading replaces it too

    def forward(sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        early = torch.as_tensor(timestep) >= max_timestep
        if early.any() != early.all():
            raise InfusionError(
                f"The timesteps {torch.as_tensor(timestep).tolist()} lie on both sides of {max_timestep}; call each side for itself."
            )
        return (base if early.any() else own)(sample, timestep, *args, **kwargs)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        if replaced is not None:
            unet.forward = replaced


def rebuilt(pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
    """A pipeline like `pipe` with other components; everything else is shared, and keeps its dtype. Offloaded where `pipe` is."""
    accepted = inspect.signature(type(pipe).__init__).parameters
    settings = {k: v for k, v in pipe.config.items() if k in accepted and k not in pipe.components}
    other = type(pipe)(**{**pipe.components, **settings, **components})
    other.set_progress_bar_config(disable=True)
    if device := offloaded(pipe):  # else the first part that works would stay on it
        offload(other, device)
    return other
