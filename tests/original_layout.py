"""A diffusers pipeline's weights in the original layouts of Stable Diffusion 1.x, 2.x and XL, as community checkpoints have them.

UNet blocks of two layers each, as the layouts fix them; widths are free. Names after CompVis's, OpenCLIP's and Stability's modules.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
FIXED = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
OPEN_CLIP = {"final_layer_norm": "ln_final", "encoder.layers.": "transformer.resblocks.", ".layer_norm": ".ln_", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip


def unet_name(name: str, attended: set[str]) -> str:
    """attended: "up_blocks.1" and the like, blocks with attention, whose upsampler comes third."""
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
        return f"output_blocks.{3 * i + 2}.{2 if f'up_blocks.{i}' in attended else 1}.{rest}"
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


def open_clip(encoder, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under OpenCLIP's names: query, key and value in one, the projection transposed."""
    state, weights = {}, {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    for name, value in weights.items():
        if m := re.fullmatch(r"(encoder\.layers\.\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            value = torch.cat([weights[f"{m[1]}.self_attn.{x}_proj.{m[2]}"] for x in "qkv"])
            name = f"{m[1]}.attn.in_proj_{m[2]}"
        elif re.search(r"self_attn\.[kv]_proj", name):
            continue
        elif name == "text_projection.weight":
            name, value = "text_projection", value.T
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        state[prefix + name] = value
    return state


def original_layout(pipe) -> dict[str, Tensor]:
    """All weights of a pipeline under their original names."""
    names = pipe.unet.state_dict()
    attended = {k.partition(".attentions")[0] for k in names if ".attentions." in k}
    state = {f"model.diffusion_model.{unet_name(k, attended)}": v for k, v in names.items()}
    for k, v in pipe.vae.state_dict().items():
        name = vae_name(k)
        conv = "attn_1." in name and name.endswith("weight") and ".norm." not in name
        state[f"first_stage_model.{name}"] = v[:, :, None, None] if conv else v
    xl = hasattr(pipe, "text_encoder_2")
    if pipe.text_encoder.config.hidden_act == "gelu":
        state |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
        for k, v in pipe.text_encoder.state_dict().items():
            state[f"{prefix}text_model.{k.removeprefix('text_model.')}"] = v
    if xl:
        state |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {k: v.contiguous() for k, v in state.items()}
