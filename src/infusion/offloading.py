"""A pipeline's parts on the accelerator only while they work, by diffusers' model offloading: for bases larger than its memory."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from infusion.errors import InfusionError


def check_offload(device: str) -> None:
    """Raise InfusionError for a device that has no memory of its own to save."""
    if torch.device(device).type == "cpu":
        raise InfusionError(
            "Offloading moves what does not work from an accelerator to the CPU, but the device is the CPU itself; leave it out, or use a device such as cuda."
        )


def has_own_memory(device: str) -> bool:
    """Whether what leaves the device makes room there; Apple's GPUs share the CPU's memory."""
    return device.partition(":")[0] not in ("cpu", "mps")


def offload(pipe: DiffusionPipeline, device: str | torch.device) -> None:
    """Keep the parts on the CPU; `device` holds one while it works. A call's end takes all back; where parts worked without a call,
    `take_back` does."""
    pipe.enable_model_cpu_offload(device=device)


def offloaded(pipe: DiffusionPipeline) -> torch.device | None:
    """The device that the parts go to while they work; None for a pipeline that is not offloaded so."""
    return pipe._offload_device if getattr(pipe, "_all_hooks", None) else None


def take_back(pipe: DiffusionPipeline) -> None:
    """Take every part of an offloaded pipeline back to the CPU; others stay as they are."""
    if offloaded(pipe):
        pipe.maybe_free_model_hooks()


def in_parts(pipe: DiffusionPipeline, tiles: bool) -> None:
    """Let the autoencoder take one picture at a time and, with `tiles`, what is larger than it was made for in tiles, where it can."""
    if hasattr(pipe.vae, "use_slicing"):
        pipe.vae.enable_slicing()
    if tiles and hasattr(pipe.vae, "use_tiling"):
        pipe.vae.enable_tiling()
