"""A diffusers pipeline's weights in the original Stable Diffusion 1.x layout, as community checkpoints have them.

Four UNet blocks with two layers each, as the layout fixes them; widths are free. Names after CompVis's modules.
"""

from __future__ import annotations

import re

from torch import Tensor

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
FIXED = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def unet_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in FIXED:
        return f"{FIXED[stem]}.{kind}"
    m = re.fullmatch(r"(down|up|mid)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert m, name
    side, i, what, j, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    if what == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{RESNET[part]}.{tail}"
    if side == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * j}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if what == "upsamplers":
        return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
    block = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
    return f"{block}.{0 if what == 'resnets' else 1}.{rest}"


def vae_name(name: str) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = (
        name.replace("mid_block.attentions.0.", "mid.attn_1.")
        .replace("conv_shortcut", "nin_shortcut")
        .replace("conv_norm_out", "norm_out")
    )
    for ours, theirs in (
        ("group_norm.", "norm."),
        ("to_q.", "q."),
        ("to_k.", "k."),
        ("to_v.", "v."),
        ("to_out.0.", "proj_out."),
    ):
        name = name.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    return name


def original_layout(pipe) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1.x pipeline under their original names."""
    state = {f"model.diffusion_model.{unet_name(k)}": v for k, v in pipe.unet.state_dict().items()}
    for k, v in pipe.vae.state_dict().items():
        name = vae_name(k)
        conv = "attn_1." in name and name.endswith("weight") and ".norm." not in name
        state[f"first_stage_model.{name}"] = v[:, :, None, None] if conv else v
    for k, v in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}"] = v
    return {k: v.contiguous() for k, v in state.items()}
