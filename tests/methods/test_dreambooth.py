"""DreamBooth against its plain loop, with and without a prior."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from infusion.methods.dreambooth import DreamBoothConfig, dreambooth, prior_lesson
from tests.methods.loops import mse


@pytest.mark.parametrize("limit", [None, 300])
def test_dreambooth_equals_a_plain_loop(pipe, lesson, limit):
    unet = copy.deepcopy(pipe.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        loss = mse(unet, lesson.draw(2, generator, limit))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    *_, state = dreambooth(pipe, lesson, DreamBoothConfig(3, 2, 1e-3), max_timestep=limit)
    tuned = state.adapter.unet
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(unet.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize("limit", [None, 300])
def test_dreambooth_with_a_prior_and_an_identifier(pipe, lesson, limit):
    prior = prior_lesson(pipe, lesson, count=4, steps=1)
    assert len(prior.latents) == 4
    assert float(prior.masks.min()) == 1
    *_, state = dreambooth(pipe, lesson, DreamBoothConfig(3, 2, 1e-3, identifier="sks", prior_weight=0.5), prior, limit)
    assert state.adapter.subject == "a sks dog"
    unet = copy.deepcopy(pipe.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=1e-2)
    generator, of_prior = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for _ in range(3):
        drawn = lesson.draw(2, generator, limit)
        captions = [lesson.templates[i].format("sks dog") for i in drawn.captions.tolist()]
        states = pipe.encode_prompt(captions, "cpu", 1, False)[0]
        loss = mse(unet, drawn, states) + 0.5 * mse(unet, prior.draw(2, of_prior, limit))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    assert state.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    learned = state.adapter.unet.parameters()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(unet.parameters(), learned, strict=True))


def test_a_look_at_a_tuned_copy_leaves_it_training(pipe, lesson):
    states = dreambooth(pipe, lesson, DreamBoothConfig(2, 1))
    unet = next(states).adapter.unet
    with next(states).adapter.attached(pipe) as custom:
        assert not custom.unet.training
    assert unet.training
