"""DreamBooth-LoRA against its matrices written out."""

from __future__ import annotations

import copy

import torch

from infusion.streams import cross_attention_layers
from tests.methods.loops import SMALL


def test_lora_equals_matrices_written_out(pipe, lesson):
    *_, state = SMALL["dreambooth-lora"](pipe, lesson)
    matrices = state.adapter.tensors()
    assert len(matrices) == 2 * 4 * 2 * len(cross_attention_layers(pipe.unet))  # A and B, 4 projections, self and cross
    merged = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for key in (k for k in matrices if "lora_A" in k):
            a, b = matrices[key], matrices[key.replace("lora_A", "lora_B")]
            merged.get_submodule(key.split(".lora_A")[0]).weight += b @ a  # alpha = rank, so the factor is 1
    draw = lesson.draw(3, torch.Generator().manual_seed(5))
    with torch.no_grad(), state.adapter.attached(pipe) as custom:
        ours = custom.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        assert torch.allclose(ours, merged(draw.noisy, draw.timesteps, **draw.kwargs).sample, atol=1e-5)
        assert (ours - state.adapter.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample).abs().max() < 1e-5
