"""Diagnosis by parity: the same losses as a loop over the naive method, the same maps as the lesson's masks."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from infusion.diagnosis import layer_maps, validation_loss
from infusion.lesson import attention_masks, prepare_lesson
from infusion.naive import naive_prediction
from infusion.photos import Photo
from infusion.streams import value_lengths
from tests.conftest import random_concept


@pytest.fixture
def lesson(pipe):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    return prepare_lesson(pipe, [Photo(Image.fromarray(p)) for p in pixels], "dog", "milo", flip=False)


@pytest.mark.parametrize("two_streams", [True, False])
@torch.no_grad()
def test_the_validation_loss_equals_a_loop_over_the_naive_method(pipe, lesson, two_streams):
    residuals = random_concept(pipe.unet).residuals
    measured = validation_loss(pipe, lesson, residuals, two_streams, timesteps=(250, 700), seed=3)
    for i, t in enumerate((250, 700)):
        noise = torch.randn(lesson.latents.shape, generator=torch.Generator().manual_seed(3 + i))
        total = 0.0
        for photo in range(3):
            draw = lesson.batch(
                torch.tensor([photo]), torch.tensor([photo]), torch.tensor([t]), noise[photo : photo + 1]
            )
            predicted = naive_prediction(
                pipe.unet, draw.noisy, draw.timesteps, draw.plan.states, draw.plan, {"milo": residuals}, two_streams
            )
            total += float((draw.mask * (predicted - draw.target)).square().mean()) / 3
        assert measured[t] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("two_streams", [True, False])
def test_from_its_limit_on_a_concept_leaves_the_loss_to_the_base(pipe, lesson, two_streams):
    residuals = random_concept(pipe.unet).residuals
    base, whole = validation_loss(pipe, lesson), validation_loss(pipe, lesson, residuals, two_streams)
    limited = validation_loss(pipe, lesson, residuals, two_streams, 500)
    assert limited == {t: (whole if t < 500 else base)[t] for t in base}


def test_without_residuals_it_is_the_base(pipe, lesson):
    zeros = {path: torch.zeros(n) for path, n in value_lengths(pipe.unet).items()}
    base = validation_loss(pipe, lesson)
    assert base == pytest.approx(validation_loss(pipe, lesson, zeros), rel=1e-5)
    assert base != pytest.approx(validation_loss(pipe, lesson, random_concept(pipe.unet, scale=9.0).residuals))
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_maps_of_all_layers_are_shares_and_give_the_masks(pipe, lesson):
    maps = layer_maps(pipe, lesson)
    assert maps.keys() == value_lengths(pipe.unet).keys()
    assert {tuple(m.shape) for m in maps.values()} == {(3, 8, 8), (3, 4, 4)}
    assert all(float(m.min()) >= 0 and float(m.max()) <= 1 for m in maps.values())
    fit = torch.stack([m for m in maps.values() if m.shape[-1] == 8]).mean(0)
    masks = fit / fit.amax(dim=(1, 2), keepdim=True)
    assert torch.allclose(masks, attention_masks(lesson, pipe.unet), atol=1e-5)
