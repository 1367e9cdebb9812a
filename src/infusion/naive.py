"""The method written out: two passes, explicit maps, loops over rows and heads.

Slow, and easy to check against the equations of docs/idea.md; what tests and benchmarks hold the real thing to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from infusion.streams import Plan, cross_attention_layers


class _Explicit:
    """Cross-attention with explicit maps; given maps replace its own, added values go to the text's values."""

    def __init__(self, given: Tensor | None = None, added: Tensor | None = None) -> None:
        self.given, self.added = given, added
        self.maps: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if self.added is not None:
            v = v + self.added
        b, n, width = q.shape
        d = width // attn.heads
        out, maps = torch.zeros_like(q), q.new_zeros(b, attn.heads, n, k.shape[1])
        for row in range(b):
            for head in range(attn.heads):
                part = slice(head * d, (head + 1) * d)
                a = torch.softmax(q[row, :, part] @ k[row, :, part].T / d**0.5, dim=-1)
                maps[row, head] = a
                if self.given is not None:
                    a = self.given[row, head]
                out[row, :, part] = a @ v[row, :, part]
        self.maps = maps
        return attn.to_out[0](out)


def naive_prediction(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | int,
    states: Tensor,
    plan: Plan,
    residuals: Mapping[str, Mapping[str, Tensor]],
    two_streams: bool = True,
    **kwargs: Any,
) -> Tensor:
    """The customized noise prediction of rows that follow `plan` (conditional rows only).

    residuals: concept name -> layer path -> residual. kwargs go to the UNet.
    """
    layers = cross_attention_layers(unet)
    stock = dict(unet.attn_processors)
    try:
        foundational = {path: _Explicit() for path in layers}
        for path, layer in layers.items():
            layer.set_processor(foundational[path])
        unet(sample, timestep, states, **kwargs)
        for path, layer in layers.items():
            added = states.new_zeros(*states.shape[:2], layer.to_v.out_features)
            for row, mentions in enumerate(plan.rows):
                for mention in mentions:
                    for position in mention.positions:
                        if path in residuals[mention.name]:
                            added[row, position] += mention.strength * residuals[mention.name][path]
            layer.set_processor(_Explicit(foundational[path].maps if two_streams else None, added))
        return unet(sample, timestep, states, **kwargs).sample
    finally:
        unet.set_attn_processor(stock)
