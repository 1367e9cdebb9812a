"""DreamBooth-LoRA against its matrices written out."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from infusion.methods.lora import TARGETS, LoraConfig, dreambooth_lora
from infusion.streams import cross_attention_layers
from tests.methods.loops import SMALL, mse


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


@pytest.mark.parametrize("limit", [None, 300])
def test_lora_learns_as_a_plain_loop_does(pipe, lesson, limit):
    """Up matrices of zeros, down matrices of a normal of spread 1 / rank, added to the output of each projection."""
    rate, decay = 1e-2, 1e-2
    unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    layers = {path: layer for path, layer in unet.named_modules() if path.endswith(TARGETS)}
    states = list(dreambooth_lora(pipe, lesson, LoraConfig(1, 2, rate, rank=2), max_timestep=limit))
    first = states[
        0
    ].adapter.tensors()  # of one step, in which only weight decay moves the down matrices, since the up ones are 0
    a = {path: nn.Parameter(first[f"{path}.lora_A.weight"] / (1 - rate * decay)) for path in layers}
    b = {path: nn.Parameter(torch.zeros(layer.out_features, 2)) for path, layer in layers.items()}
    assert float(torch.cat([x.detach().flatten() for x in a.values()]).std()) == pytest.approx(1 / 2, rel=0.1)

    def added(path, layer, args, output):
        return output + args[0] @ a[path].T @ b[path].T

    for path, layer in layers.items():
        layer.register_forward_hook(partial(added, path))
    learned = [*a.values(), *b.values()]
    optimizer = torch.optim.AdamW(learned, rate, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        mse(unet, lesson.draw(2, generator, limit)).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    *_, state = dreambooth_lora(pipe, lesson, LoraConfig(3, 2, rate, rank=2), max_timestep=limit)
    matrices = state.adapter.tensors()
    assert len(matrices) == len(learned)
    for path in layers:
        assert torch.allclose(matrices[f"{path}.lora_A.weight"], a[path], atol=1e-5), path
        assert torch.allclose(matrices[f"{path}.lora_B.weight"], b[path], atol=1e-5), path
