"""Latent Fisher divergence against hand-made denoisers whose divergence is known."""

from __future__ import annotations

import copy
import weakref
from functools import partial

import pytest
import torch

import infusion
from infusion.generation import denoiser
from infusion.metrics.fisher import divergence, hash_seed, latent_fisher_divergence, predicted_noise, to_eps
from tests.conftest import random_concept

ALPHAS = torch.linspace(0.99, 0.01, 100)
LATENTS = {
    "a cat": torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
    "a car": torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)),
}


def zero(noisy, t, prompt):
    return torch.zeros_like(noisy)


def off_by(c):
    return lambda noisy, t, prompt: torch.full_like(noisy, c if prompt == "a cat" else 2 * c)


def test_seeds_are_distinct_and_never_beyond_what_torch_takes():
    seeds = [hash_seed(s, p, t) for s in (0, 1, 2**40) for p in (0, 1) for t in (0, 1, 999)]
    assert len(set(seeds)) == len(seeds)
    for seed in (*seeds, hash_seed(-(2**62), 3, 5)):
        torch.Generator().manual_seed(seed)


def test_a_known_divergence_in_both_forms():
    grid = (10, 50, 90)
    lfd = latent_fisher_divergence(zero, off_by(0.3), LATENTS, ALPHAS, timesteps=grid)
    assert lfd.eps_by_prompt["a cat"].value == pytest.approx(0.09)
    assert lfd.eps_by_prompt["a car"].value == pytest.approx(0.36)
    assert lfd.eps.value == pytest.approx((5 * 0.09 + 3 * 0.36) / 8)
    weight = float((1 / (1 - ALPHAS[list(grid)])).mean())
    assert lfd.score_by_prompt["a cat"].value == pytest.approx(0.09 * weight, rel=1e-5)
    assert (lfd.eps.n, lfd.eps_by_prompt["a car"].n) == (8, 3)
    assert lfd.eps.low < lfd.eps.value < lfd.eps.high


def test_latents_are_noised_as_diffusion_does():
    grid, seen = (10, 50, 90), {}

    def spy(name):
        def model(noisy, t, prompt):
            seen.setdefault((name, prompt), []).append(noisy.clone())
            return torch.zeros_like(noisy)

        return model

    for name, latents in (("some", LATENTS), ("none", {k: 0 * v for k, v in LATENTS.items()})):
        predicted_noise(spy(name), latents, ALPHAS, timesteps=grid)
    for prompt, clean in LATENTS.items():
        noises = []
        for t, noisy, noise in zip(grid, seen["some", prompt], seen["none", prompt], strict=True):
            assert torch.allclose(noisy - noise, ALPHAS[t].sqrt() * clean, atol=1e-6)
            noises.append(noise / (1 - ALPHAS[t]).sqrt())
        assert torch.stack(noises).std() == pytest.approx(1, abs=0.15)
        assert (noises[0] - noises[1]).abs().max() > 0.5
    assert not torch.equal(seen["none", "a cat"][0][:3], seen["none", "a car"][0])


def test_v_prediction_is_the_same_model_in_other_words():
    def eps_model(noisy, t, prompt):
        return 0.5 * noisy

    def v_model(noisy, t, prompt):  # the same noise, told as v
        a = ALPHAS[t][:, None, None, None]
        eps = 0.5 * noisy
        clean = (noisy - (1 - a).sqrt() * eps) / a.sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * clean

    lfd = latent_fisher_divergence(
        eps_model, v_model, LATENTS, ALPHAS, ("epsilon", "v_prediction"), timesteps=(5, 40, 80), batch=2
    )
    assert lfd.eps.value == pytest.approx(0, abs=1e-10)
    other = latent_fisher_divergence(eps_model, v_model, LATENTS, ALPHAS, timesteps=(40,))
    assert other.eps.value > 0.01


def test_to_eps_inverts_v():
    clean, noise, a = torch.randn(3), torch.randn(3), torch.tensor(0.3)
    noisy, v = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
    assert torch.allclose(to_eps(v, noisy, a, "v_prediction"), noise, atol=1e-6)


def test_all_methods_see_the_same_noise_whatever_the_batch():
    seen = []

    def spy(noisy, t, prompt):
        seen.append(noisy)
        return torch.zeros_like(noisy)

    latent_fisher_divergence(spy, zero, LATENTS, ALPHAS, timesteps=(30,), batch=16)
    whole = torch.cat(seen)
    seen.clear()
    latent_fisher_divergence(zero, spy, LATENTS, ALPHAS, timesteps=(30,), batch=2)
    assert torch.equal(torch.cat(seen), whole)


def test_latents_stream_by():
    """2,000 pictures, of which no more than a batch or two and their predictions are ever held; figures as of all at once."""
    held, most = weakref.WeakSet(), 0

    def kept(tensor):
        nonlocal most
        held.add(tensor)
        most = max(most, sum(len(t) for t in held))
        return tensor

    def streaming():
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            yield kept(torch.randn(10, 2, 3, 3, generator=generator))

    def model(c):
        return lambda noisy, t, prompt: kept(noisy + c * noisy.abs())

    grid = (10, 90)
    streamed = latent_fisher_divergence(model(0), model(0.3), {"a cat": streaming()}, ALPHAS, timesteps=grid, batch=8)
    assert streamed.eps.n == 2000
    assert most <= 60
    whole = {"a cat": torch.cat(list(streaming()))}
    at_once = latent_fisher_divergence(model(0), model(0.3), whole, ALPHAS, timesteps=grid, batch=2000)
    apart = divergence(
        predicted_noise(model(0), whole, ALPHAS, timesteps=grid), predicted_noise(model(0.3), whole, ALPHAS, timesteps=grid),
        ALPHAS, grid,
    )  # fmt: skip
    for other in (at_once, apart):
        assert other.score.value == pytest.approx(streamed.score.value, rel=1e-6)
        assert other.eps.low == pytest.approx(streamed.eps.low, rel=1e-6)


def test_a_concept_has_none_where_it_is_not_named_and_some_where_it_is(pipe):
    stock = denoiser(copy.deepcopy(pipe))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas = pipe.scheduler.alphas_cumprod

    def named(noisy, t, prompt):
        return denoiser(pipe)(noisy, t, prompt.replace("dog", "<milo>"))

    with infusion.attach(pipe, random_concept(pipe.unet, scale=3.0)):
        custom = denoiser(pipe)
        others = {"a cat": latents, "a dog in the snow": latents[:1]}
        assert latent_fisher_divergence(stock, custom, others, alphas, timesteps=(100, 700)).score.value == 0
        moved = latent_fisher_divergence(stock, named, {"a dog in the snow": latents}, alphas, timesteps=(100, 700))
        assert moved.eps.value > 1e-6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no latents"):
        latent_fisher_divergence(zero, zero, {}, ALPHAS)
    with pytest.raises(ValueError, match="no latents"):
        latent_fisher_divergence(zero, zero, {"a cat": iter(())}, ALPHAS, timesteps=(1,))
    some = LATENTS | {"a dog": iter([torch.zeros(0, 2, 4, 4)])}  # silence would leave the prompt out
    for measure in (partial(latent_fisher_divergence, zero, zero), partial(predicted_noise, zero)):
        with pytest.raises(ValueError, match="no latents for the prompt 'a dog'"):
            measure(some, ALPHAS, timesteps=(1,))
    with pytest.raises(ValueError, match="0 to 99"):
        latent_fisher_divergence(zero, zero, LATENTS, ALPHAS, timesteps=(100,))
    with pytest.raises(ValueError, match="'sample'"):
        latent_fisher_divergence(zero, zero, LATENTS, ALPHAS, ("epsilon", "sample"), timesteps=(1,))  # type: ignore[arg-type]
