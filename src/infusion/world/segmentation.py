"""A head that reads from the UNet's features what stands at each pixel: class and attributes; used in training only.

The caption's class changes the denoising loss very little: colours and patterns vary far more than outlines do. So the class hardly
reaches the pixels, and subjects come out as lumps (docs/log.md). In noise, this head can be right only if
cross-attention brings the class to where the subject is; its gradient has no colours in it. Patterns and accessories, a few
pixels each, are read likewise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from infusion.world.separation import KINDS
from infusion.world.truth import ATTRIBUTES, NONE, SUBJECT_HEADS
from infusion.world.vocabulary import CLASSES

IGNORED = -100
_SIZES = [len(SUBJECT_HEADS[name]) for name in ATTRIBUTES]
_CLASS = list(KINDS).index("class")


class SegmentationHead(nn.Module):
    """Class logits (b, 1 + classes, g, g), background first, and those of each of ATTRIBUTES (b, names, g, g), from the
    features that enter the UNet's last block."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        width = unet.config["block_out_channels"][1]
        self.project = nn.Conv2d(width, 1 + len(CLASSES), 1)
        self.attributes = nn.Conv2d(width, sum(_SIZES), 1)
        self._features: Tensor | None = None
        self._handle = unet.up_blocks[-2].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: tuple, output: Tensor) -> None:
        self._features = output

    def forward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits for the UNet's latest call: of the class, and of each attribute."""
        assert self._features is not None, "call the UNet first"
        features, self._features = self._features, None
        return self.project(features), self.attributes(features).split(_SIZES, dim=1)

    def remove(self) -> None:
        """Take the hook off the UNet."""
        self._handle.remove()


def class_targets(ids: Tensor, words: Tensor, masks: Tensor, table: Tensor) -> Tensor:
    """What stands at each pixel, (b, g, g) int64: 0 for background, 1 + class for a subject.

    `IGNORED` where the caption leaves a subject out and everywhere where it names none. ids (b, m); words (b, s, m) bool;
    masks (b, s, g, g) in [0, 1]; table from `separation.meanings`.
    """
    kind, meaning = table[ids].unbind(-1)  # (b, m)
    named = words & (kind == _CLASS)[:, None]  # (b, s, m)
    label = torch.where(named, meaning[:, None], -1).amax(-1)  # (b, s)
    label = torch.where(label < 0, IGNORED, label + 1)
    inside, subject = masks.max(1)
    targets = torch.where(inside > 0.5, label.gather(1, subject.flatten(1)).view_as(subject), 0)
    return torch.where(words.any(-1).any(-1)[:, None, None], targets, IGNORED)


def attribute_targets(subjects: Tensor, masks: Tensor) -> Tensor:
    """The attributes of what stands at each pixel, (b, len(ATTRIBUTES), g, g) int64; `IGNORED` outside of subjects and for what
    the style does not show. subjects (b, s, heads) as in `truth.visible`; masks (b, s, g, g) in [0, 1]."""
    return head_targets(subjects, masks)[:, 1:]


def head_targets(subjects: Tensor, masks: Tensor) -> Tensor:
    """`attribute_targets` with the class before them, (b, heads, g, g)."""
    inside, subject = masks.max(1)  # (b, g, g)
    label = subjects.transpose(1, 2)  # (b, heads, s)
    label = label.gather(2, subject.flatten(1)[:, None].expand(-1, label.shape[1], -1)).unflatten(2, subject.shape[1:])
    return torch.where((inside > 0.5)[:, None] & (label != NONE), label, IGNORED)


def attribute_loss(logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Mean over the attributes of `segmentation_loss`; targets from `attribute_targets`."""
    losses = [segmentation_loss(part, target) for part, target in zip(logits, targets.unbind(1), strict=True)]
    return torch.stack(losses).mean()


def segmentation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that count; zero where none does."""
    counted = (targets != IGNORED).sum().clamp_min(1)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") / counted
