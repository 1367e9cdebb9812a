"""Stable Diffusion's families: their configurations and CLIP's tokenizer, so that a single checkpoint file loads offline.

Community checkpoints (.safetensors in the original layout) hold weights only. What diffusers would fetch from
the hub beside them is written here: sizes as published with the models, and the vocabulary in `clip/`.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

Config = dict[str, Any]

_SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
_CLIP_L: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # transformers reads 2 as: pool at the highest token id, which is CLIP's end token
    "pad_token_id": 1,
}
_OPEN_CLIP_H: Config = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_G: Config = {
    **_CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VAE: Config = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}

# Component configurations of each family; `vae_scale_factor` is 8 in all.
FAMILIES: dict[str, dict[str, Config]] = {
    "stable-diffusion-v1": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": _CLIP_L,
        "scheduler": {"_class_name": "DDIMScheduler", **_SCHEDULE},
    },
    "stable-diffusion-v2": {
        "unet": {
            **_UNET,
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae": {**_VAE, "sample_size": 768},
        "text_encoder": _OPEN_CLIP_H,
        "scheduler": {"_class_name": "DDIMScheduler", **_SCHEDULE, "prediction_type": "v_prediction"},
    },
    "stable-diffusion-xl-v1-base": {
        "unet": {
            **_UNET,
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_G,
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **{k: v for k, v in _SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")}},
    },
}  # fmt: skip


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges, built from its merges file as CLIP itself does."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = resources.files("infusion.clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    symbols = list(bytes_to_unicode().values())
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer, 77 tokens. pad_token: the end token for CLIP ViT-L, "!" for OpenCLIP."""
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def write_configuration(components: dict[str, Config], folder: Path) -> Path:
    """The folder that diffusers' `from_single_file(config=...)` wants: configurations and tokenizers, no weights."""
    xl = "text_encoder_2" in components
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", components["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    open_clip = components["text_encoder"]["hidden_act"] == "gelu"
    tokenizers = {"tokenizer": clip_tokenizer("!" if open_clip else "<|endoftext|>")}
    if xl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
        tokenizers["tokenizer_2"] = clip_tokenizer("!")
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, config in components.items():
        (folder / name).mkdir(exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    return folder


def family_of(shapes: dict[str, list[int]]) -> str | None:
    """The family of a checkpoint in the original layout, from its tensors' shapes; None for anything else."""
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        return "stable-diffusion-xl-v1-base"
    key = next((n for n in shapes if n.startswith("model.diffusion_model.") and n.endswith("attn2.to_k.weight")), None)
    return None if key is None else {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(shapes[key][1])
