"""What holds for every method: nothing is left behind, the same seed learns the same, what was saved draws; strengths and limits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from infusion.errors import InfusionError
from infusion.methods import METHODS
from infusion.methods.infusion import infusion
from infusion.methods.interface import stored_bytes
from infusion.methods.lora import loaded_lora
from infusion.pipelines import attach
from infusion.streams import projections
from infusion.training import LearnConfig
from tests.conftest import latents
from tests.methods.loops import SMALL


def test_every_method_is_tried_here():
    assert SMALL.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in SMALL if name != "infusion"]
    + [(name, torch.bfloat16) for name in ("dreambooth", "custom-diffusion")],
)
def test_a_base_too_coarse_to_learn_in_is_refused(pipe, lesson, name, dtype):
    """fp16 by all but Infusion, which scales its loss; bf16 where the base's own weights learn, whose steps it rounds away."""
    with pytest.raises(InfusionError, match="too coarse for this method; load it in fp32"):
        next(SMALL[name](pipe.to(dtype), lesson))


@pytest.mark.parametrize("name", SMALL)
def test_the_pipeline_stays_and_the_adapter_draws(pipe, lesson, name):
    prompt = "a photo of {} on the beach"
    before = latents(pipe, "a photo of a dog on the beach")
    weights = {k: v.clone() for part in (pipe.unet, pipe.text_encoder) for k, v in part.state_dict().items()}
    first, *_, last = [(s.step, s.loss, s.adapter) for s in SMALL[name](pipe, lesson)]
    assert (first[0], last[0]) == (1, 3)
    adapter = last[2]
    assert adapter.subject.startswith("a ")  # or prompts would read otherwise than the captions learned from
    with adapter.attached(pipe) as custom:
        drawn = latents(custom, prompt.format(adapter.subject))
        assert torch.equal(drawn, latents(custom, prompt.format(adapter.subject)))
    assert (drawn - before).abs().max() > 1e-5
    assert torch.equal(latents(pipe, "a photo of a dog on the beach"), before)
    after = {k: v for part in (pipe.unet, pipe.text_encoder) for k, v in part.state_dict().items()}
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert name == "dreambooth-lora" or all(p.requires_grad for p in pipe.unet.parameters())  # peft's loading freezes
    assert "<milo>" not in pipe.tokenizer.get_vocab()
    assert stored_bytes(adapter) == 2 * sum(t.numel() for t in adapter.tensors().values()) > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_learns_the_same(pipe, lesson, name):
    runs = [[s.adapter for s in SMALL[name](pipe, lesson)][-1].tensors() for _ in range(2)]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora", "custom-diffusion"])
def test_part_of_what_other_methods_learned(pipe, lesson, method):
    """At 0 the base's weights are in use, at 0.5 those halfway, as a LoRA of half its up matrices has them."""
    learn, config = METHODS[method]
    *_, last = learn(pipe, lesson, config(steps=3, batch=2, learning_rate=0.05))

    def prediction(strength):
        with replace(last.adapter, strength=strength).attached(pipe) as custom, torch.no_grad():
            weights = {p: layer.weight.clone() for p, layer in projections(custom.unet).items()}
            return custom.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample, weights

    with torch.no_grad():
        draw = lesson.draw(2, torch.Generator().manual_seed(0))
        base = pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        stock = {p: w.weight.clone() for p, w in projections(pipe.unet).items()}
    whole, half, none = (prediction(s) for s in (1.0, 0.5, 0.0))
    assert torch.allclose(none[0], base, atol=1e-5)
    assert (whole[0] - base).abs().max() > 1e-3
    assert (half[0] - base).abs().max() < (whole[0] - base).abs().max()
    if method != "dreambooth-lora":
        assert all(torch.allclose(half[1][p], (stock[p] + whole[1][p]) / 2, atol=1e-6) for p in stock)
    else:
        halved = {k: v / 2 if "lora_B" in k else v for k, v in last.adapter.tensors().items()}
        with loaded_lora(pipe, {f"unet.{k}": v for k, v in halved.items()}), torch.no_grad():
            expected = pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        assert torch.allclose(half[0], expected, atol=1e-5)
    assert torch.equal(pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample, base)


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora"])
def test_from_its_limit_on_the_base_draws(pipe, lesson, method):
    learn, config = METHODS[method]
    *_, last = learn(pipe, lesson, config(steps=3, batch=2, learning_rate=0.05), max_timestep=500)
    limited = replace(last.adapter, strength=0.5)
    draw = lesson.draw(3, torch.Generator().manual_seed(0))

    def predictions(unet):
        with torch.no_grad():
            return [unet(draw.noisy, timestep=t, **draw.kwargs).sample for t in (torch.tensor([500] * 3), 499)]

    base = predictions(pipe.unet)
    own_forward = pipe.unet.forward = partial(type(pipe.unet).forward, pipe.unet)  # as accelerate's offloading does
    with limited.attached(pipe) as custom:
        drawn = predictions(custom.unet)
        with pytest.raises(InfusionError, match=r"\[500, 499, 499\] lie on both sides of 500"):
            custom.unet(draw.noisy, torch.tensor([500, 499, 499]), **draw.kwargs)
    with replace(limited, max_timestep=None).attached(pipe) as custom:
        whole = predictions(custom.unet)
    assert torch.equal(drawn[0], base[0])
    assert torch.equal(drawn[1], whole[1])
    assert all((w - b).abs().max() > 1e-3 for w, b in zip(whole, base, strict=True))
    assert pipe.unet.forward is own_forward
    assert "forward" not in vars(last.adapter.unet)
    with pytest.raises(InfusionError, match="max_timestep is 0; it must be at least 1"):
        next(learn(pipe, lesson, max_timestep=0))


def test_a_strength_is_for_drawing_alone(pipe, lesson):
    drawn = []
    *_, last = infusion(pipe, lesson, LearnConfig(3, 2, 0.5))
    for strength in (1.0, 0.5, 0.0):
        with replace(last.adapter, strength=strength).attached(pipe):
            drawn.append(latents(pipe, f"a photo of {last.adapter.subject}"))
    assert last.adapter.concept.settings["strength"] == 1.0  # of what was learned, not of the drawing
    with attach(pipe, last.adapter.concept):
        assert torch.equal(latents(pipe, "a photo of a <milo>"), drawn[0])
        assert torch.equal(latents(pipe, "a photo of a <milo:0.5>"), drawn[1])
    assert (drawn[2] - latents(pipe, "a photo of a dog")).abs().max() < 1e-4
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4
