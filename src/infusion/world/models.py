"""The networks of the embedded base, in diffusers' and transformers' own classes.

Training lives in `autoencoder.py` and `base_training.py`.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from infusion.world.scenes import SIDE
from infusion.world.tokenizer import MAX_LENGTH, build_tokenizer

LATENT_CHANNELS = 8
LATENT_SIDE = 16
TEXT_WIDTH = 128


def build_autoencoder() -> AutoencoderKL:
    """64x64x3 pictures to 16x16x8 latents, convolutions only (no attention), 1.6 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
        scaling_factor=1.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextModel:
    """A shallow CLIP text encoder: the deeper it is, the more it pours a caption into its later tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Cross-attention at 16x16, 8x8 and 4x4: ten layers, 1,344 values a concept, 11 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        attention_head_dim=(2, 4, 6),  # SD1.5's convention: the number of heads, 32 channels each
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction and trailing timesteps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # without effect on trailing timesteps; stock pipelines warn of any other value
    )


def build_pipeline(
    autoencoder: AutoencoderKL | None = None,
    text_encoder: CLIPTextModel | None = None,
    unet: UNet2DConditionModel | None = None,
) -> StableDiffusionPipeline:
    """A stock pipeline of the world's networks; those not given start from random weights."""
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=autoencoder or build_autoencoder(),
        text_encoder=text_encoder or build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet or build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe


def half_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights in fp16, as small networks are saved."""
    return {name: value.detach().half().contiguous() for name, value in network.state_dict().items()}


def pixels_to_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
