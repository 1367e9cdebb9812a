"""Which base a concept was learned on, and whether it fits the one at hand."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from infusion.concept import BaseInfo, Concept
from infusion.errors import InfusionError, InfusionWarning
from infusion.families import FAMILIES
from infusion.packing import in_order
from infusion.streams import cross_attention_layers, picture_side, require_unet, value_lengths


def base_info(pipe: DiffusionPipeline) -> BaseInfo:
    """Family, picture size and weights hash of a pipeline's base.

    The hash is over the value projections of cross-attention, rounded to fp16, so that a base loaded
    in fp32 and in fp16 has the same; it is unknown ("") for bf16, which is coarser, and for offloaded weights.
    """
    unet = require_unet(pipe)
    return BaseInfo(_family(unet), picture_side(pipe), _weights_hash(unet))


def check_fits(concepts: Sequence[Concept], unet: UNet2DConditionModel) -> None:
    """Raise InfusionError for a concept of another family or architecture; warn of one learned on other weights."""
    lengths, family = value_lengths(unet), _family(unet)
    for concept in concepts:
        if concept.base.family in FAMILIES and family in FAMILIES and concept.base.family != family:
            raise InfusionError(
                f"<{concept.name}> was learned on {concept.base.family}, this base is {family}; their layers have the same "
                "shapes, but what was learned does not carry over: learn it again on this one."
            )
        for path, residual in concept.residuals.items():
            if lengths.get(path) != len(residual):
                have = f"has length {lengths[path]}" if path in lengths else "is missing"
                raise InfusionError(
                    f"<{concept.name}> was learned on another architecture: its residual of {path} has {len(residual)} values, "
                    f"that layer {have} here; use the base that it was learned on."
                )
    _warn_of_other_weights(concepts, unet)


def _warn_of_other_weights(concepts: Sequence[Concept], unet: nn.Module) -> None:
    expecting = {c.name: c.base.weights for c in concepts if c.base.weights}
    here = _weights_hash(unet) if expecting else ""
    for name, weights in expecting.items():
        if here and weights != here:
            warnings.warn(
                f"<{name}> was learned on a base of the same architecture with other weights ({weights}, here {here}); "
                "it may look different: use its own base, or learn it again on this one.",
                InfusionWarning,
                stacklevel=5,
            )


def _family(unet: UNet2DConditionModel) -> str:
    widths = {parts["unet"]["cross_attention_dim"]: family for family, parts in FAMILIES.items()}
    return widths.get(unet.config["cross_attention_dim"], "custom")


def _weights_hash(unet: nn.Module) -> str:
    layers = cross_attention_layers(unet)
    digest = hashlib.sha256()
    for path in in_order(layers):
        projection = layers[path].to_v
        weight = getattr(projection, "base_layer", projection).weight  # a LoRA wraps the base's own layer
        if weight.dtype not in (torch.float32, torch.float16) or weight.device.type == "meta":
            return ""
        digest.update(weight.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
