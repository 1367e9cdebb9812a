"""Photos as a lesson: latents, targets, masks and what XL is told."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import infusion
from infusion.errors import InfusionError, InfusionWarning
from infusion.evaluation import evaluate
from infusion.lesson import TEMPLATES, attention_masks, prepare_lesson
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.interface import rebuilt
from infusion.photos import Photo, load_photos, mask_to_tensor
from infusion.steering import _Watch
from infusion.training import LearnConfig, masked_loss
from tests.conftest import random_concept


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]


def test_many_photos_are_masked_a_few_at_a_time(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo", masked=False)
    one = [
        dataclasses.replace(lesson, latents=z[None], masks=m[None])
        for z, m in zip(lesson.latents, lesson.masks, strict=True)
    ]
    together, apart = (attention_masks(lesson, pipe.unet, batch=b) for b in (16, 1))
    assert together.shape == lesson.masks.shape
    assert torch.equal(apart, torch.cat([attention_masks(x, pipe.unet) for x in one]))


def test_a_tiny_autoencoder_and_bases_of_other_noise(pipe, photos):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    lesson = prepare_lesson(rebuilt(pipe, vae=tiny), load_photos(photos), "dog", "milo")
    assert lesson.latents.shape == prepare_lesson(pipe, load_photos(photos), "dog", "milo").latents.shape
    for other in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(InfusionError, match=f"draws with {type(other).__name__}"):
            prepare_lesson(rebuilt(pipe, scheduler=other), load_photos(photos), "dog", "milo")
        with pytest.raises(InfusionError, match=f"draws with {type(other).__name__}"):
            evaluate(rebuilt(pipe, scheduler=other), ConceptAdapter("a <milo>", random_concept(pipe.unet)), [], "dog")


def test_larger_latents_are_settled_under_more_noise(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    noise = lesson.noise.alphas_cumprod.reciprocal().sub(1).sqrt()
    wide = dataclasses.replace(lesson, latents=torch.zeros(1, 4, 16, 16))
    at = [float(noise[part.settled - 1]) for part in (lesson, wide)]
    assert at[1] == pytest.approx(2 * at[0], rel=0.01)
    assert dataclasses.replace(lesson, latents=torch.zeros(1, 4, 400, 400)).settled == 1000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_and_masks(pipe, photos, prediction_type):
    pipe.scheduler = DDIMScheduler(prediction_type=prediction_type)
    half = Image.new("L", (24, 20), 0)
    half.paste(255, (0, 0, 12, 20))
    lesson = prepare_lesson(pipe, [Photo(photos[0], half)], "dog", "milo")
    assert lesson.masks.shape == (2, 8, 8)
    assert torch.equal(lesson.masks[0].flip(-1), lesson.masks[1])
    assert lesson.masks[0, :, 0].min() == 1.0
    assert lesson.masks[0, :, -1].max() == 0.0
    draw = lesson.draw(4, torch.Generator().manual_seed(0))
    alphas = lesson.noise.alphas_cumprod[draw.timesteps][:, None, None, None]
    if prediction_type == "epsilon":
        clean = (draw.noisy - (1 - alphas).sqrt() * draw.target) / alphas.sqrt()
    else:
        clean = alphas.sqrt() * draw.noisy - (1 - alphas).sqrt() * draw.target
    distance = (clean[:, None] - lesson.latents[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert distance.max() < 1e-2
    prediction = torch.randn(draw.target.shape)
    loop = sum(
        float(((draw.mask[b, 0] * prediction[b, c] - draw.mask[b, 0] * draw.target[b, c]) ** 2).sum())
        for b in range(4)
        for c in range(4)
    )
    assert float(masked_loss(prediction, draw)) == pytest.approx(loop / prediction.numel(), rel=1e-4)


def test_masks_found_by_attention(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "teddy bear", "ted", masked=False)
    masks = attention_masks(lesson, pipe.unet)
    assert masks.shape == (6, 8, 8)
    assert masks.min() >= 0
    assert torch.allclose(masks.amax(dim=(1, 2)), torch.ones(6))
    assert len(lesson.texts.states) == len(TEMPLATES)
    assert all(len(m[0].positions) == 2 for m in lesson.texts.mentions)


def test_a_mask_outside_the_centre_square_is_told(pipe):
    mask = Image.new("L", (120, 40))
    mask.paste(255, (0, 0, 20, 40))
    photos = [Photo(Image.new("RGB", (120, 40)), mask, "dog.png")]
    with pytest.raises(InfusionError, match=r"'dog\.png' shows nothing of the subject in the photo's centre square"):
        prepare_lesson(pipe, photos, "dog", "milo")
    with pytest.raises(InfusionError, match="mask of photo 1 shows nothing"):
        prepare_lesson(pipe, load_photos([Image.new("RGBA", (40, 40))]), "dog", "milo")


def test_a_photo_smaller_than_the_base_is_told_of(pipe):
    side = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    small = Photo(Image.new("RGB", (side - 4, 40)), name="a.png")
    with pytest.warns(InfusionWarning, match=rf"'a\.png' is {side - 4}x40, smaller than the base's {side} pixels"):
        prepare_lesson(pipe, [Photo(Image.new("RGB", (side, side))), small], "dog", "milo")


def test_xl_is_told_each_photos_size_and_crop(xl):
    """The base's side is 16 pixels. Every pixel of the photos tells its column and row."""

    def photo(width, height):
        rows, columns = np.mgrid[:height, :width]
        return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))

    photos = [photo(24, 16), photo(16, 40), photo(96, 48), photo(8, 8)]
    with pytest.warns(InfusionWarning, match="smaller than the base's 16"):
        lesson = prepare_lesson(xl, load_photos(photos), "dog", "milo")
    told = [[16, 24, 0, 4, 16, 16], [40, 16, 12, 0, 16, 16], [48, 96, 0, 8, 16, 16], [8, 8, 0, 0, 16, 16]]
    for picture, (_, _, top, left, *_) in zip(lesson.pictures[:2], told, strict=False):  # those that are not scaled
        assert picture.getpixel((0, 0)) == (left, top, 0)
    assert lesson.sizes.tolist() == [*told, *told]
    seen = []
    xl.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["added_cond_kwargs"]["time_ids"].tolist())),
        with_kwargs=True,
    )
    infusion.learn(xl, lesson, "dog", "milo", LearnConfig(steps=2, batch=4, max_timestep=1))
    assert len(seen) == 4
    for noisy, ids in seen:  # at the first timestep the latents are hardly noisy, so that each tells its photo
        nearest = torch.cdist(noisy.flatten(1), lesson.latents.flatten(1)).argmin(1)
        assert ids == [lesson.sizes[i].tolist() for i in nearest]
    seen.clear()
    assert attention_masks(lesson, xl.unet, timesteps=(300,), batch=3).shape == (8, 8, 8)
    assert [row for _, ids in seen for row in ids] == [*told, *told]


def test_pictures_that_are_no_photos_have_the_bases_size(xl, photos):
    lesson = prepare_lesson(xl, load_photos(photos), "dog", "milo")
    seen = []
    xl.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    _Watch._places(SimpleNamespace(lesson=lesson, pipe=xl), torch.zeros(7, 4, 8, 8))  # type: ignore[arg-type]
    assert seen[0] == [[16, 16, 0, 0, 16, 16]] * 7


@pytest.mark.parametrize("own", [False, True])
def test_a_mask_that_is_found_is_the_mean_of_the_pictures_and_its_mirror_images(pipe, photos, own):
    """Also where another photo brings its own."""
    given = [Photo(p) for p in photos]
    if own:
        half = Image.new("L", (24, 20))
        half.paste(255, (0, 0, 12, 20))
        given[0] = Photo(photos[0], half)
    found = attention_masks(prepare_lesson(pipe, given, "dog", "milo", masked=False), pipe.unet)
    lesson = prepare_lesson(pipe, given, "dog", "milo")
    for i in range(3):
        mean = (found[i] + found[3 + i].flip(-1)) / 2
        expected = mask_to_tensor(half, 8) if own and i == 0 else mean / mean.max()
        assert torch.allclose(lesson.masks[i], expected, atol=1e-6)
        assert torch.allclose(lesson.masks[3 + i], expected.flip(-1), atol=1e-6)
        assert (expected - expected.flip(-1)).abs().max() > 0.01
