"""Residuals on keys and values against the equation written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from infusion.concept import Concept
from infusion.errors import InfusionError
from infusion.methods.infusion import infusion
from infusion.methods.key_value import KeyValueAdapter, KeyValueConfig, added, key_value
from infusion.pipelines import attach
from infusion.prompts import Mention
from infusion.streams import Plan, Streams, cross_attention_layers, projections
from infusion.training import LearnConfig


def test_residuals_on_values_alone_are_the_single_stream(pipe, lesson):
    ours = [s.adapter.tensors() for s in key_value(pipe, lesson, KeyValueConfig(3, 2, on="v"))][-1]
    config = LearnConfig(3, 2, learning_rate=0.02, max_timestep=1000, two_streams=False, scheme="fp32")
    single = [s.adapter.tensors() for s in infusion(pipe, lesson, config)]
    for path, residual in single[-1].items():
        assert torch.allclose(ours[f"{path}.to_v"], residual, atol=1e-6), path


def test_residuals_on_keys_equal_the_equation(pipe):
    """Two rows, two positions and strengths of a concept in one, none in the other; K + w k^T and V + w v^T written out."""
    layers = cross_attention_layers(pipe.unet)
    generator = torch.Generator().manual_seed(0)
    residuals = {path: torch.randn(p.out_features, generator=generator) for path, p in projections(pipe.unet).items()}
    rows = ((), (Mention("milo", 0.5, (2, 3)), Mention("milo", 2.0, (6,))))
    states = torch.randn(2, pipe.tokenizer.model_max_length, 12, generator=generator)
    call = torch.randn(2, 4, 8, 8, generator=generator), 500, states
    words = torch.zeros(2, states.shape[1])
    words[1, [2, 3, 6]] = torch.tensor([0.5, 0.5, 2.0])
    streams = Streams(pipe.unet)
    streams.two_streams = False
    with torch.no_grad(), added(streams, residuals), streams.calls(Plan(rows, states)):
        ours = pipe.unet(*call).sample
    streams.remove()

    def explicit(path, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        k = k + torch.einsum("bm,c->bmc", words, residuals[f"{path}.to_k"])
        v = v + torch.einsum("bm,c->bmc", words, residuals[f"{path}.to_v"])
        heads = [x.chunk(attn.heads, -1) for x in (q, k, v)]
        out = [(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in zip(*heads, strict=True)]
        return attn.to_out[0](torch.cat(out, -1))

    base = pipe.unet(*call).sample
    stock = dict(pipe.unet.attn_processors)
    for path, layer in layers.items():
        layer.set_processor(partial(explicit, path))
    with torch.no_grad():
        expected = pipe.unet(*call).sample
    pipe.unet.set_attn_processor(stock)
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(ours[0], base[0], atol=1e-5)
    assert (ours[1] - base[1]).abs().max() > 1e-3
    with pytest.raises(InfusionError, match="use 'k', 'v' or 'kv'"):
        KeyValueConfig(on="q")
    adapter = KeyValueAdapter("a <rex>", Concept("rex", "dog", {}), residuals)
    with (
        attach(pipe, Concept("milo", "cat", {})) as attachment,
        pytest.raises(InfusionError, match="beside attached"),
        adapter.attached(pipe),
    ):
        pass
    with pytest.raises(InfusionError, match="attach the concepts again"):
        _ = attachment.streams
