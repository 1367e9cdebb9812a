"""Custom Diffusion against diffusers' own processor."""

from __future__ import annotations

import copy

import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from torch import nn

from tests.methods.loops import SMALL, mse, with_row


def test_custom_diffusion_equals_diffusers_own_processor(pipe, lesson):
    tokenizer, text, table, row = with_row(pipe)
    kept = table.detach().clone()
    unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    text.requires_grad_(False)
    table.requires_grad_(True)
    processors, projected, start = {}, [], {}
    for path, stock in unet.attn_processors.items():
        attn = unet.get_submodule(path.removesuffix(".processor"))
        if ".attn2" not in path:
            processors[path] = stock
            continue
        processors[path] = CustomDiffusionAttnProcessor(True, False, attn.to_q.out_features, attn.to_k.in_features)
        for part in ("to_k", "to_v"):
            weight = getattr(processors[path], f"{part}_custom_diffusion").weight
            weight.data.copy_(getattr(attn, part).weight)
            start[f"{path.removesuffix('.processor')}.{part}"] = weight.detach().clone()
            projected.append((f"{path.removesuffix('.processor')}.{part}", weight))
    unet.set_attn_processor(processors)
    learned = [weight for _, weight in projected]
    captions = [t.format("<milo> dog") for t in lesson.templates]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW([*learned, table], 1e-2, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    others = torch.arange(len(table)) != row
    for _ in range(3):
        draw = lesson.draw(2, generator)
        optimizer.zero_grad()
        mse(unet, draw, text(ids[draw.captions])[0]).backward()
        table.grad[others] = 0  # the example does so; its clipping comes after
        nn.utils.clip_grad_norm_([*learned, table], 1.0)
        optimizer.step()
        table.data[others] = kept[others]
    *_, state = SMALL["custom-diffusion"](pipe, lesson)
    assert state.adapter.weights.keys() == dict(projected).keys()
    for path, weight in projected:
        moved, ours = weight - start[path], state.adapter.weights[path] - start[path]
        assert (
            moved - ours
        ).norm() < 1e-3 * moved.norm()  # Adam turns rounding into steps where a gradient is near zero
    assert torch.allclose(state.adapter.word.embedding[0], table.detach()[row], atol=1e-5)
    assert state.adapter.subject == "a <milo> dog"
