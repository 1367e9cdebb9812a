"""Drawing: the pictures' size, schedulers by their names, and what cannot be drawn so."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

import infusion
from infusion.base import load_base
from infusion.errors import InfusionError
from infusion.generation import default_batch, generate
from infusion.methods.interface import rebuilt
from infusion.schedulers import SCHEDULERS, scheduler_for
from infusion.sheets import square_grid
from tests.conftest import latents, random_concept, tiny_unet


@pytest.fixture(scope="module")
def base():
    return load_base(device="cpu")


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image, np.float64) / 255


def test_pictures_of_another_size(base):
    own, wide = (generate(base, ["a dog"], [0], 1, **size)[0].image.size for size in ({}, {"width": 96}))
    assert (own, wide) == ((64, 64), (96, 64))
    concept = random_concept(base.unet)
    with infusion.attach(base, concept):
        (named,) = generate(base, ["a <milo>"], [0], 2, width=72, height=40)
    (plain,) = generate(base, ["a dog"], [0], 2, width=72, height=40)
    assert named.image.size == plain.image.size == (72, 40)
    assert not np.array_equal(pixels(named), pixels(plain))


@pytest.mark.parametrize("value", [0, -8, 4, 60, 100])
def test_sides_that_the_base_does_not_draw(base, value):
    remedy = {60: "give 56 or 64", 100: "give 96 or 104"}.get(value, "give 8 or 16")
    with pytest.raises(
        InfusionError, match=rf"height is {value}; this base draws multiples of 8 pixels, so {remedy}\."
    ):
        generate(base, ["a dog"], [0], 1, height=value)


def test_fewer_large_pictures_are_drawn_at_a_time(base):
    assert [default_batch(base, size) for size in (None, (64, 64), (512, 512))] == [16, 16, 1]
    assert default_batch(base, (256, 128)) == 8


def test_a_wide_picture_keeps_its_shape_on_a_sheet():
    sheet = np.asarray(square_grid([Image.new("RGB", (80, 40), "red")], cell=128))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.any(1).sum() * 2 == red.any(0).sum() == 128


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_with_concepts(pipe, name):
    pipe.scheduler = scheduler_for(pipe, name)
    assert type(pipe.scheduler) is SCHEDULERS[name]
    assert pipe.scheduler.config["beta_schedule"] == "scaled_linear"
    assert all(len(generate(pipe, ["a dog"], [0], steps)) == 1 for steps in (1, 3))
    with infusion.attach(pipe, random_concept(pipe.unet)):
        assert not latents(pipe, "a <milo>").equal(latents(pipe, "a dog"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_base_that_draws_by_deis_takes_every_scheduler(pipe, name):
    """Its configuration names an algorithm and a solver that no other knows."""
    told = {**pipe.scheduler.config, "algorithm_type": "deis", "solver_type": "logrho"}  # as a checkpoint's file does
    pipe.scheduler = DEISMultistepScheduler.from_config(told)
    pipe.scheduler = scheduler_for(pipe, name)
    assert len(generate(pipe, ["a dog"], [0], 3)) == 1


def test_solvers_of_one_equation_draw_one_picture(base, monkeypatch):
    """Those without noise of their own, also where the base's configuration does not say that latents are not clipped."""

    def drawn(seed):
        return pixels(generate(base, ["a dog on the beach"], [seed], 40)[0])

    own = base.scheduler
    silent = {k: v for k, v in own.config.items() if k != "clip_sample"}
    expected, other = drawn(0), np.abs(drawn(0) - drawn(1)).mean()
    for name in ("ddim", "euler", "dpm++", "unipc"):
        monkeypatch.setattr(base, "scheduler", PNDMScheduler.from_config(silent))
        monkeypatch.setattr(base, "scheduler", scheduler_for(base, name))
        assert np.abs(drawn(0) - expected).mean() < other / 5, name


def test_pipelines_that_do_not_draw_from_a_prompt_alone(pipe, xl):
    inpainting = rebuilt(pipe, unet=tiny_unet(in_channels=9))
    refiner = copy.copy(xl)
    refiner.tokenizer = None
    for other, message in (
        (StableDiffusionInpaintPipeline.from_pipe(pipe), "StableDiffusionInpaintPipeline, which wants a picture"),
        (StableDiffusionXLImg2ImgPipeline.from_pipe(xl), "XLImg2ImgPipeline, which wants a picture"),
        (inpainting, "has a UNet of 9 channels for latents of 4, as for inpainting"),
        (refiner, "has no tokenizer of its own"),
    ):
        with pytest.raises(InfusionError, match=message):
            generate(other, ["a dog"], [0], 1)


def test_a_picture_depends_on_its_own_prompt_and_seed(pipe):
    prompts, seeds = ["a dog", "a cat", "a bird in space"], [5, 9, 2]
    together = generate(pipe, prompts, seeds, 2, batch=2)
    alone = [generate(pipe, [p], [s], 2)[0] for p, s in zip(prompts, seeds, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert (a.prompt, a.seed) == (b.prompt, b.seed)
        assert np.abs(pixels(a) - pixels(b)).max() <= 1 / 255 + 1e-6
    assert len({p.image.tobytes() for p in alone}) == 3
    assert generate(pipe, ["a dog"], [6], 2)[0].image.tobytes() != alone[0].image.tobytes()


def test_a_negative_prompt_is_the_pipelines_own(pipe):
    (ours,) = generate(pipe, ["a dog"], [3], 2, 4.0, negative_prompt="a red car")
    noise = torch.Generator().manual_seed(3)
    stock = pipe("a dog", num_inference_steps=2, guidance_scale=4.0, generator=noise, negative_prompt="a red car")
    assert ours.image.tobytes() == stock.images[0].tobytes()
    assert generate(pipe, ["a dog"], [3], 2, 4.0)[0].image.tobytes() != ours.image.tobytes()


def test_what_is_not_finite_is_no_picture(pipe):
    """diffusers makes it black."""
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("inf")
    with pytest.raises(InfusionError, match="no finite numbers in float32; load it in bf16 or fp32"):
        generate(pipe, ["a dog"], [0], 2)


def test_a_solver_that_calls_the_unet_more_than_once_a_step_is_done_at_its_last(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    told = []
    generate(pipe, ["a dog", "a cat"], [0, 1], 3, batch=1, on_step=lambda *done: told.append(done))
    assert told == sorted(told)
    assert told[-1] == (6, 6)


def test_a_pipeline_without_negative_prompts(pipe):
    distilled = LatentConsistencyModelPipeline(
        **{**pipe.components, "unet": tiny_unet(time_cond_proj_dim=8), "scheduler": scheduler_for(pipe, "lcm")},
        requires_safety_checker=False,
    )
    distilled.set_progress_bar_config(disable=True)
    (plain,) = generate(distilled, ["a dog"], [0], 2)
    with infusion.attach(distilled, random_concept(distilled.unet)):
        (named,) = generate(distilled, ["a <milo>"], [0], 2)
    assert not np.array_equal(pixels(plain), pixels(named))
    with pytest.raises(InfusionError, match="A LatentConsistencyModelPipeline knows no negative prompt; leave it out"):
        generate(distilled, ["a dog"], [0], 2, negative_prompt="blurry")


def test_what_schedulers_are_refused(pipe):
    with pytest.raises(InfusionError, match=r"'heun' is no scheduler known here; use one of ddim, euler, .*unipc\."):
        scheduler_for(pipe, "heun")
    pipe.scheduler = scheduler_for(pipe, "lcm")
    with pytest.raises(InfusionError, match=r"steps is 51; this base's scheduler has 50 timesteps, .* usually 4 to 8"):
        generate(pipe, ["a dog"], [0], 51)
    parts = pipe.components | {"unet": tiny_unet(time_cond_proj_dim=8)}
    with pytest.raises(
        InfusionError, match=r"LatentConsistencyModelPipeline draws with the scheduler 'lcm' alone, not"
    ):
        scheduler_for(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False), "euler")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(InfusionError, match="draws with EDMEulerScheduler"):
        scheduler_for(pipe, "ddim")
