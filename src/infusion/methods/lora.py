"""DreamBooth-LoRA: low-rank updates of the UNet's attention projections, by peft, with DreamBooth's loss.

As diffusers' train_dreambooth_lora.py: rank 4, alpha = rank, gaussian start, on to_q, to_k, to_v and to_out.0 of self- and
cross-attention (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from infusion.config import hold_types
from infusion.lesson import Lesson
from infusion.methods.dreambooth import preserving
from infusion.methods.interface import MethodState, below, check_precision
from infusion.streams import require_unet

_NAME = "infusion_lora"
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoraConfig:
    """steps x batch samples are seen. The learning rate is for the embedded base; at Stable Diffusion's size 1e-4."""

    steps: int = 200
    batch: int = 8
    learning_rate: float = 3e-4
    rank: int = 4
    prior_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        hold_types(self)


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices on a copy of the UNet. strength: its scale when drawing. max_timestep: from there on the base draws."""

    subject: str
    unet: nn.Module
    strength: float = 1.0
    max_timestep: int | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The matrices, under peft's names."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.unet)

    @contextmanager
    def attached(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """The pipeline itself, with the LoRA loaded as a file of it would be, and no other in use."""
        with loaded_lora(pipe, {f"unet.{k}": v for k, v in self.tensors().items()}) as error:
            if error is not None:
                raise error
            pipe.set_adapters(_NAME, self.strength)
            unet = require_unet(pipe)
            with below(self.max_timestep, unet, _without_adapters(unet)):
                yield pipe


@contextmanager
def loaded_lora(pipe: DiffusionPipeline, source: Any, **kwargs: Any) -> Iterator[Exception | None]:
    """A LoRA that alone is in use within the block; those that were in use before are so again after it.

    source, kwargs: as for diffusers' `load_lora_weights`. Yields the error of one that does not fit, or None.
    """
    used = pipe.get_active_adapters() if pipe.get_list_adapters() else []
    scales = [(layer, dict(layer.scaling)) for layer in _lora_layers(pipe)]
    # By pipe.disable_lora(), which would hold for ours too.
    switched_off = any(layer.disable_adapters for layer, _ in scales)
    error = None
    try:
        try:
            pipe.load_lora_weights(source, adapter_name=_NAME, **kwargs)
            if not _loaded(pipe):  # diffusers only logs it
                raise ValueError("no layer of the base is named in it")
            pipe.set_adapters(_NAME)
            if switched_off:
                pipe.enable_lora()
        except (RuntimeError, ValueError, KeyError) as raised:
            error = raised
        yield error
    finally:
        if _loaded(pipe):
            pipe.delete_adapters(_NAME)
        if used:
            pipe.set_adapters(used)  # at scale 1
            for layer, before in scales:
                layer.scaling.update(before)
            if switched_off:
                pipe.disable_lora()
        else:
            pipe.unload_lora_weights()


def _without_adapters(unet: Any) -> Callable[..., Any]:
    forward = unet.forward

    def base(*args: Any, **kwargs: Any) -> Any:
        unet.disable_adapters()
        try:
            return forward(*args, **kwargs)
        finally:
            unet.enable_adapters()

    return base


def _lora_layers(pipe: DiffusionPipeline) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [m for network in networks for m in network.modules() if isinstance(m, BaseTunerLayer)]


def _loaded(pipe: DiffusionPipeline) -> bool:
    return any(_NAME in names for names in pipe.get_list_adapters().values())


def dreambooth_lora(
    pipe: DiffusionPipeline,
    lesson: Lesson,
    config: LoraConfig | None = None,
    prior: Lesson | None = None,
    max_timestep: int | None = None,
) -> Iterator[MethodState]:
    """Train a LoRA on a copy of the pipeline's UNet, yielding after every step. max_timestep: as for `dreambooth`. Needs peft."""
    import peft

    config = config or LoraConfig()
    check_precision(pipe)
    unet = copy.deepcopy(require_unet(pipe)).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet.add_adapter(
            peft.LoraConfig(
                r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
            )
        )
    cast_training_params(unet)  # LoRA weights train in fp32 also under a bf16 UNet
    learned = [p for p in unet.parameters() if p.requires_grad]
    adapter = Lora(f"a {lesson.word}", unet, max_timestep=max_timestep)
    yield from preserving(unet, learned, lesson, prior, config, adapter, max_timestep)
