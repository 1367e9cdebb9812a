"""The segmentation head's targets and loss, and that it leaves the UNet as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from infusion.world.models import LATENT_CHANNELS, build_unet
from infusion.world.segmentation import (
    ATTRIBUTES,
    IGNORED,
    SegmentationHead,
    attribute_loss,
    attribute_targets,
    class_targets,
    segmentation_loss,
)
from infusion.world.separation import meanings
from infusion.world.tokenizer import build_tokenizer
from infusion.world.truth import NONE
from infusion.world.vocabulary import CLASSES


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_targets(tokenizer):
    captions = ("a red puppy next to a teddy bear", "a mug on the left", "")
    ids = tokenizer(list(captions), padding="max_length", return_tensors="pt")["input_ids"]
    words = torch.zeros(3, 3, ids.shape[1], dtype=torch.bool)
    words[0, 0, 3] = words[0, 1, 7] = words[0, 1, 8] = words[1, 0, 2] = True  # row 1 leaves its second subject out
    masks = torch.zeros(3, 3, 4, 4)
    masks[0, 0, :, :2], masks[0, 1, :, 3] = 1, 0.8
    masks[1, 0, 0], masks[1, 1, 3], masks[1, 0, 1] = 1, 1, 0.4
    masks[2, 0] = 1
    targets = class_targets(ids, words, masks, meanings(tokenizer))
    dog, bear, mug = (CLASSES.index(c) + 1 for c in ("dog", "teddy bear", "mug"))
    assert targets[0].tolist() == [[dog, dog, 0, bear]] * 4
    assert targets[1].tolist() == [[mug] * 4, [0] * 4, [0] * 4, [IGNORED] * 4]
    assert targets[2].unique().tolist() == [IGNORED]


def test_the_loss_counts_named_pixels_only():
    logits = torch.randn(2, 11, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.full((2, 4, 4), IGNORED)
    assert float(segmentation_loss(logits, targets)) == 0
    targets[0, 1, 2], targets[1, 3, 3] = 5, 0
    loop = (
        F.cross_entropy(logits[0, :, 1, 2], torch.tensor(5)) + F.cross_entropy(logits[1, :, 3, 3], torch.tensor(0))
    ) / 2
    assert float(segmentation_loss(logits, targets)) == pytest.approx(float(loop), rel=1e-5)


def test_attributes_are_those_of_the_subject_at_the_pixel():
    subjects = torch.tensor(
        [[[3, 1, 2, 0, 3], [5, 4, 6, 2, 1], [NONE] * 5], [[0, NONE, NONE, 3, 0], *[[NONE] * 5] * 2]]
    )
    masks = torch.zeros(2, 3, 4, 4)
    masks[0, 0, :, :2], masks[0, 1, :, 3], masks[1, 0, 0], masks[1, 0, 1] = 1, 0.8, 1, 0.4
    targets = attribute_targets(subjects, masks)
    assert ATTRIBUTES == ("color1", "color2", "pattern", "accessory")
    for a, (left, right) in enumerate(((1, 4), (2, 6), (0, 2), (3, 1))):
        assert targets[0, a].tolist() == [[left, left, IGNORED, right]] * 4
    assert targets[1, 0].unique().tolist() == [IGNORED]  # a style without colours
    assert targets[1, 2].tolist() == [[3] * 4, *[[IGNORED] * 4] * 3]
    logits = tuple(
        torch.randn(2, n, 4, 4, generator=torch.Generator().manual_seed(a)) for a, n in enumerate((10, 10, 4, 4))
    )
    parts = [float(segmentation_loss(part, targets[:, a])) for a, part in enumerate(logits)]
    assert float(attribute_loss(logits, targets)) == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_the_head_reads_without_changing():
    torch.manual_seed(0)
    unet = build_unet().eval()
    x, text = torch.randn(2, LATENT_CHANNELS, 16, 16), torch.randn(2, 32, 128)
    with torch.no_grad():
        before = unet(x, 5, text).sample
        head = SegmentationHead(unet)
        during = unet(x, 5, text).sample
        classes, attributes = head()
        assert classes.shape == (2, 11, 16, 16)
        assert [tuple(a.shape) for a in attributes] == [(2, n, 16, 16) for n in (10, 10, 4, 4)]
        head.remove()
    assert torch.equal(before, during)
    assert not any(m._forward_hooks for m in unet.modules())
    with pytest.raises(AssertionError, match="call the UNet first"):
        head()
