"""Attention maps of the base in training: recorded, held to the scenes' truth, and measured.

Trained from scratch on little, a text encoder pours a caption's meaning into its later tokens and
no word keeps a map of its own. The world knows every subject's mask, so the base's training gets a
grounding term (as TokenCompose, arXiv 2312.03626). `map_gate` measures whether the maps are usable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from infusion.attention import attention_maps, split_heads, word_heat

LEVEL = 0.6  # heat wanted inside a mask: most of a pixel's attention, and room for the other words
SIDES = (16, 8)  # resolutions that are grounded; maps of 4x4 stay diffuse


class ExplicitProcessor:
    """Plain attention by two matrix products, appending its maps (b, h, n, m) to `records` if given.

    On CPUs its backward pass in bf16 is faster than the fused kernel's at these sizes (docs/log.md).
    """

    def __init__(self, records: list[Tensor] | None = None) -> None:
        self.records = records

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            split_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        maps = attention_maps(query, key, attn.scale)
        if self.records is not None:
            self.records.append(maps)
        out = (maps.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def recorded_maps(unet: UNet2DConditionModel, sides: tuple[int, ...] = SIDES) -> Iterator[list[Tensor]]:
    """Within it, every call of `unet` appends the maps of its cross-attention layers of the given
    resolutions to the list, in order of execution; the caller empties it. Processors come back after. Of the other layers' attention a CPU
    computes the maps too, which is faster there."""
    records: list[Tensor] = []
    processors = dict(unet.attn_processors)
    latent_side = unet.config["sample_size"]

    def recorded(name: str) -> bool:
        return ".attn2." in name and latent_side // _downsampling(name, unet) in sides

    plain = ExplicitProcessor() if unet.device.type == "cpu" else AttnProcessor2_0()
    unet.set_attn_processor({n: ExplicitProcessor(records) if recorded(n) else plain for n in processors})
    try:
        yield records
    finally:
        unet.set_attn_processor(processors)


def grounding_loss(records: list[Tensor], words: Tensor, masks: Tensor) -> Tensor:
    """Mean over layers and subjects of (1 - share of the word's map inside its mask)^2, plus the mean inside the mask
    of (heat - LEVEL)^2, so that maps are neither misplaced nor faint nor a few peaks.

    words (b, s, m) bool; masks (b, s, g, g) in [0, 1], zero where there is no such subject.
    """
    present = (words.any(-1) & (masks.flatten(2).sum(-1) > 2)).float()  # (b, s)
    total = masks.new_zeros(())
    for maps in records:
        heat = torch.einsum("bhnm,bsm->bsn", maps, words.to(maps.dtype)) / maps.shape[1]
        inside = _resized(masks, heat.shape[-1])  # (b, s, n)
        share = (heat * inside).sum(-1) / heat.sum(-1).clamp_min(1e-6)
        uneven = ((heat - LEVEL).square() * inside).sum(-1) / inside.sum(-1).clamp_min(1e-6)
        loss = (1 - share).square() + uneven
        total = total + (loss * present).sum() / present.sum().clamp_min(1)
    return total / max(1, len(records))


BARS = {"peak": 0.9, "iou": 0.5, "own": 0.85}  # what usable maps reach, by field of `MapGate`


@dataclass(frozen=True)
class MapGate:
    """Whether maps are usable: `peak` share of subjects whose word's map peaks inside its mask, `iou`
    mean soft intersection over union, `ratio` heat inside over heat outside, `own` among scenes of two
    subjects, share of words whose map is stronger on their own subject; `count` subjects measured."""

    peak: float
    iou: float
    ratio: float
    own: float
    count: int

    @property
    def passed(self) -> bool:
        """Whether every one of the `BARS` is reached."""
        return all(getattr(self, name) >= bar for name, bar in BARS.items())


def mean_heat(records: list[Tensor], words: Tensor, grid: int) -> Tensor:
    """Maps of words averaged over layers and heads at one size: (b, s, grid, grid)."""
    heats = []
    for maps in records:
        heat = torch.stack([word_heat(maps, words[:, s]).mean(1) for s in range(words.shape[1])], 1)
        side = int(heat.shape[-1] ** 0.5)
        heats.append(F.interpolate(heat.unflatten(-1, (side, side)), (grid, grid), mode="bilinear"))
    return torch.stack(heats).mean(0)


def map_gate(heat: Tensor, words: Tensor, masks: Tensor) -> MapGate:
    """Measure maps against the truth. heat, masks (b, s, g, g); words (b, s, m) bool."""
    inside_masks = masks > 0.5
    peaks, ious, ratios, own = [], [], [], []
    for b in range(len(heat)):
        named = [s for s in range(words.shape[1]) if words[b, s].any() and inside_masks[b, s].any()]
        for s in named:
            h, inside = heat[b, s], inside_masks[b, s]
            peaks.append(bool(inside.flatten()[h.argmax()]))
            scaled = h / h.max().clamp_min(1e-9)
            ious.append(float(torch.minimum(scaled, masks[b, s]).sum() / torch.maximum(scaled, masks[b, s]).sum()))
            ratios.append(float(h[inside].mean() / h[~inside].mean().clamp_min(1e-6)))
            if len(named) == 2:
                other = next(o for o in named if o != s)
                own.append(bool(h[inside].max() > h[inside_masks[b, other]].max()))
    mean = lambda xs: sum(xs) / max(1, len(xs))  # noqa: E731
    return MapGate(mean(peaks), mean(ious), mean(ratios), mean(own), len(peaks))


def _resized(masks: Tensor, n: int) -> Tensor:
    side = int(n**0.5)
    return F.adaptive_avg_pool2d(masks, side).flatten(2)


def _downsampling(name: str, unet: UNet2DConditionModel) -> int:
    """By how much a layer's resolution is below the latents', from its place in the UNet."""
    blocks = len(unet.config["block_out_channels"])
    parts = name.split(".")
    if parts[0] == "mid_block":
        return 2 ** (blocks - 1)
    index = int(parts[1])
    return 2 ** (index if parts[0] == "down_blocks" else blocks - 1 - index)
