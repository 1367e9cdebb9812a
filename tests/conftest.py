"""Fixtures: tiny random pipelines, made anew for each test session, no network."""

from __future__ import annotations

import copy
import os

from infusion.cores import usable_cores

os.environ["HF_HUB_OFFLINE"] = "1"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores; torch reads it as it is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(workers))))

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from infusion.concept import Concept
from infusion.naive import naive_prediction
from infusion.prompts import parse
from infusion.streams import Plan, value_lengths
from infusion.world.tokenizer import build_tokenizer
from tests.pretend import pretend_device

pretend_device()  # before the first backward pass of all


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """A random UNet with different widths, heads and resolutions per block."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()  # type: ignore[arg-type]


def tiny_pipeline() -> StableDiffusionPipeline:
    """A stock pipeline of random weights: 16x16 pictures, 8x8 latents."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _shared_pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture
def pipe(_shared_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A tiny pipeline of the test's own."""
    return copy.deepcopy(_shared_pipe)


@pytest.fixture(scope="session")
def _shared_xl() -> StableDiffusionXLPipeline:
    torch.manual_seed(3)
    tokenizer = build_tokenizer()

    def text(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=10, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(text(8)),
        text_encoder_2=CLIPTextModelWithProjection(text(12)),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
        unet=tiny_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=20,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=10 + 6 * 4,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def xl(_shared_xl: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """A tiny pipeline of SDXL's kind, with two text encoders."""
    return copy.deepcopy(_shared_xl)


def random_concept(
    unet: torch.nn.Module, name: str = "milo", word: str = "dog", seed: int = 0, scale: float = 1.0
) -> Concept:
    """A concept with random residuals in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return Concept(name, word, {p: scale * torch.randn(n, generator=generator) for p, n in value_lengths(unet).items()})


def latents(pipe: StableDiffusionPipeline, prompt: object, **kwargs: object) -> torch.Tensor:
    """Final latents of a stock call of two steps from one seed."""
    count = (len(prompt) if isinstance(prompt, list) else 1) * kwargs.get("num_images_per_prompt", 1)  # type: ignore[operator]
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "generator": generator}
    return pipe(prompt, **{**options, **kwargs}).images  # type: ignore[operator]


def naive_latents(
    pipe: StableDiffusionPipeline, concept: Concept, prompt: str, two_streams: bool = True, **kwargs: object
) -> torch.Tensor:
    """The stock pipeline under the class word, its UNet replaced by two passes written out for the conditional rows."""
    base, unet = copy.deepcopy(pipe.unet), pipe.unet
    parsed = parse(prompt, {concept.name: concept.word}, pipe.tokenizer)

    def forward(sample, timestep, encoder_hidden_states=None, **rest):
        out = base(sample, timestep, encoder_hidden_states).sample
        states = encoder_hidden_states[-1:]
        plan = Plan((parsed.mentions,), states)
        residuals = {concept.name: concept.residuals}
        out[-1:] = naive_prediction(base, sample[-1:], timestep, states, plan, residuals, two_streams)
        return (out,)

    unet.forward = forward
    try:
        return latents(pipe, parsed.text, **kwargs)
    finally:
        del unet.forward
