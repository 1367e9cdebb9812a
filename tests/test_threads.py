"""Pipelines on one UNet in threads of their own: each draws what it draws alone."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch

import infusion
from infusion.methods.interface import rebuilt
from infusion.prompts import Mention
from infusion.streams import Plan, Streams
from tests.conftest import latents, random_concept, tiny_unet

PROMPTS = ("a <milo> here", "a dog on the beach", "a <rex:0.7> in the snow and a <milo>")
ROUNDS = 4


@pytest.fixture
def turns():
    """Threads take turns often; torch computes with one of its own, since sums in parallel parts may round in another order."""
    cores, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(cores)
    sys.setswitchinterval(interval)


def drawn(pipe, prompt):
    """A picture from the prompt, and one from its embeddings, without guidance."""
    embeds = infusion.encode(pipe, prompt, do_classifier_free_guidance=False)
    return latents(pipe, prompt, num_inference_steps=4), latents(pipe, None, **embeds, guidance_scale=1.0)


def test_threads_draw_what_each_draws_alone(pipe, turns):
    milo, rex = random_concept(pipe.unet, "milo", seed=1), random_concept(pipe.unet, "rex", "cat", seed=2)
    pipes = [rebuilt(pipe, scheduler=copy.deepcopy(pipe.scheduler)) for _ in PROMPTS]
    together = Barrier(len(PROMPTS), timeout=60)

    def several(own, prompt):
        try:
            pictures = []
            for _ in range(ROUNDS):
                together.wait()
                pictures.append(drawn(own, prompt))
            return pictures
        except BaseException:
            together.abort()  # the others would wait for this one
            raise

    with infusion.attach(pipe, milo, rex), ThreadPoolExecutor(len(PROMPTS)) as threads:
        alone = [drawn(own, prompt) for own, prompt in zip(pipes, PROMPTS, strict=True)]
        for expected, rounds in zip(alone, threads.map(several, pipes, PROMPTS), strict=True):
            for pictures in rounds:
                assert all(torch.equal(a, b) for a, b in zip(expected, pictures, strict=True))
    assert not torch.equal(alone[0][0], alone[2][0])


def test_prompts_are_encoded_one_at_a_time(pipe, turns):
    """Tokenizers keep how they pad from call to call."""

    def encoded(prompt):
        return [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for _ in range(100)]

    with infusion.attach(pipe, random_concept(pipe.unet)), ThreadPoolExecutor(3) as threads:
        prompts = ["a <milo> here", "a dog on the beach", "a <milo> in the snow"]
        alone = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts]
        for expected, states in zip(alone, threads.map(encoded, prompts), strict=True):
            assert all(torch.equal(expected, each) for each in states)


def test_a_call_that_broke_off_in_another_thread_is_not_followed(pipe):
    def encoded(prompt):
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]

    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), infusion.attach(pipe, random_concept(pipe.unet)), ThreadPoolExecutor(1) as thread:
        states = thread.submit(encoded, "a <milo> here").result()
        here = pipe.unet(sample, 5, states).sample
        there = thread.submit(lambda: torch.no_grad()(pipe.unet)(sample, 5, states).sample).result()
    with torch.no_grad():
        assert torch.equal(here, pipe.unet(sample, 5, states).sample)
    assert (there - here).abs().max() > 1e-3


def test_learning_in_a_thread_beside_a_drawing(pipe, turns):
    """A training's passes speak alone, in their own thread."""
    milo, rex = random_concept(pipe.unet, "milo", seed=1), random_concept(pipe.unet, "rex", seed=2)
    states = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(0))
    training = Streams(pipe.unet)
    training.residuals = {"rex": rex.residuals}
    inside, done = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def learn():
        with training.calls(Plan(((Mention("rex", 1.0, (3,)),),), states)):
            inside.wait()
            done.wait()

    with infusion.attach(pipe, milo):
        alone = latents(pipe, "a <milo> here")
        other = Thread(target=learn)
        other.start()
        inside.wait()
        try:
            assert torch.equal(latents(pipe, "a <milo> here"), alone)
        finally:
            done.wait()
            other.join()
    training.remove()


@pytest.mark.parametrize("mode", ["joint", "replay"])
def test_checkpoints_are_computed_again_in_whatever_thread_goes_backward(mode):
    """On a GPU that is autograd's own thread."""
    generator = torch.Generator().manual_seed(5)
    call = (torch.randn(3, 4, 8, 8, generator=generator), 500, torch.randn(3, 9, 12, generator=generator))
    plan = Plan(((), (Mention("milo", 1.0, (3,)),), ()), call[2])
    unet = tiny_unet().train()
    unet.enable_gradient_checkpointing()
    residuals = {p: r.clone().requires_grad_() for p, r in random_concept(unet).residuals.items()}
    streams = Streams(unet)
    streams.residuals = {"milo": residuals}

    def gradient(backward):
        if mode == "replay":
            with streams.calls(plan, "record"), torch.no_grad():
                unet(*call)
        with streams.calls(plan, mode):
            loss = unet(*call).sample.square().sum()
        backward(loss)
        gradients = torch.cat([r.grad for r in residuals.values()])
        for r in residuals.values():
            r.grad = None
        return gradients

    def elsewhere(loss):
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()

    here = gradient(torch.Tensor.backward)
    assert here.abs().max() > 0
    assert torch.equal(gradient(elsewhere), here)
