"""True architectures at full size on CPU, random weights: python benchmarks/real_size.py --photos DIR

Learns one step from real photos and samples two steps with the concept, checks one UNet call against the naive method,
and states seconds and peak memory. SDXL runs at reduced depth (--family stable-diffusion-xl-v1-base).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import infusion
from infusion.families import FAMILIES, clip_tokenizer
from infusion.lesson import encode_texts
from infusion.naive import naive_prediction
from infusion.streams import Plan, Streams, value_lengths

XL = "stable-diffusion-xl-v1-base"


def random_pipeline(family: str, reduced: bool = True):
    """The family's true configuration with random weights; SDXL, if `reduced`, with 1 and 2 transformer layers instead of 2 and 10."""
    parts = dict(FAMILIES[family])
    if family == XL and reduced:
        parts["unet"] = {**parts["unet"], "transformer_layers_per_block": [1, 1, 2]}
    torch.manual_seed(0)
    components = {
        "vae": AutoencoderKL.from_config(parts["vae"]).eval(),
        "unet": UNet2DConditionModel.from_config(parts["unet"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])).eval(),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDIMScheduler.from_config({k: v for k, v in parts["scheduler"].items() if k != "_class_name"}),
    }
    if family == XL:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_encoder_2"])).eval()
        pipe = StableDiffusionXLPipeline(
            **components, text_encoder_2=second, tokenizer_2=clip_tokenizer("!"), add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def parity(pipe, side: int) -> float:
    """Largest difference from the naive method over max|eps|, one fp32 UNet call of two rows."""
    torch.backends.cudnn.allow_tf32 = False  # on by default, and coarser by a thousand
    unet = pipe.unet
    texts = encode_texts(pipe, ["a photo of a <x> on the beach", "a cat"], {"x": "teddy bear"}, "x")
    residuals = {"x": {p: torch.randn(n).to(texts.states) for p, n in value_lengths(unet).items()}}
    sample = torch.randn(2, unet.config["in_channels"], side, side).to(texts.states)
    extra = {"added_cond_kwargs": texts.extra} if texts.extra else {}
    plan = Plan(texts.mentions, texts.states)
    streams = Streams(unet)
    streams.residuals = residuals
    with streams.calls(plan):
        ours = unet(sample, 500, texts.states, **extra).sample
    streams.remove()
    naive = naive_prediction(unet, sample, 500, texts.states, plan, residuals, **extra)
    return float((ours - naive).abs().max() / naive.abs().max())


def main(photos: Path, word: str, family: str, side: int | None, out: Path | None) -> dict:
    """Run one family and print its figures."""
    marks = [("start", time.perf_counter())]
    pipe = random_pipeline(family)
    if side:
        pipe.unet.register_to_config(sample_size=side // 8)
    marks.append(("build", time.perf_counter()))
    error = parity(pipe, 16)
    marks.append(("parity, 16x16 latents", time.perf_counter()))
    concept = infusion.learn(pipe, photos, word, "it", infusion.LearnConfig(steps=1, batch=1, flip=False))
    marks.append(("learn one step of 1, masks and encoding included", time.perf_counter()))
    with infusion.attach(pipe, concept):
        image = pipe("a photo of <it> on the beach", num_inference_steps=2, guidance_scale=7.0).images[0]
    marks.append(("sample two steps, three rows, and decode", time.perf_counter()))
    result = {
        "family": family,
        "unet_parameters": sum(p.numel() for p in pipe.unet.parameters()),
        "layers": len(concept.residuals),
        "values": concept.count,
        "file_bytes": len(concept.to_bytes()),
        "picture": image.size,
        "parity_over_max_eps": error,
        "seconds": {name: round(t - marks[i][1], 1) for i, (name, t) in enumerate(marks[1:])},
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--word", default="dog")
    parser.add_argument("--family", choices=list(FAMILIES), default="stable-diffusion-v1")
    parser.add_argument("--side", type=int, help="picture side in pixels; the family's own by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    main(options.photos, options.word, options.family, options.side, options.out)
