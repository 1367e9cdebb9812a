"""Perfusion against its equation and a loop with edited projections."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from infusion.methods.perfusion import Edit, PerfusionConfig, inverse_covariance, perfusion, rank_one
from infusion.streams import projections
from tests.methods.loops import SMALL, with_row


def test_the_rank_one_edit_equals_equation_3_written_out():
    generator = torch.Generator().manual_seed(0)
    e, w = torch.randn(2, 3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    i, o = torch.randn(5, generator=generator), torch.randn(4, generator=generator)
    root = torch.randn(5, 5, generator=generator)
    c = root @ root.T + torch.eye(5)
    ours = rank_one(e, e @ w.T, w, i, torch.linalg.inv(c), o, beta=0.6, tau=0.2)
    for b in range(2):
        for m in range(3):
            solved = torch.linalg.solve(c, e[b, m])
            sim = float(i @ solved) / float(i @ torch.linalg.solve(c, i))
            orthogonal = e[b, m] - sim * i
            gate = 1 / (1 + np.exp(-(sim - 0.6) / 0.2))
            assert torch.allclose(ours[b, m], w @ orthogonal + gate * o, atol=1e-4)
    here = rank_one(i[None, None], (w @ i)[None, None], w, i, torch.linalg.inv(c), o, 0.0, 1e-3)
    assert torch.allclose(here[0, 0], o, atol=1e-5)  # at i* itself the old output goes and the new one comes


def test_perfusion_locks_keys_and_learns_values(pipe, lesson):
    *_, state = SMALL["perfusion"](pipe, lesson)
    positions = [(k, p) for k, mentions in enumerate(lesson.texts.mentions) for m in mentions for p in m.positions]
    class_state = torch.stack([lesson.texts.states[k, p] for k, p in positions]).mean(0)
    for path, layer in projections(pipe.unet).items():
        same = torch.allclose(state.adapter.edit.outputs[path], layer.weight @ class_state, atol=1e-5)
        assert same == path.endswith("to_k")
    assert not any(layer._forward_hooks for layer in projections(pipe.unet).values())


def test_what_is_drawn_goes_through_the_gate_of_drawing(pipe, lesson):
    """Of other bias and temperature than that of learning."""
    *_, state = SMALL["perfusion"](pipe, lesson)
    edit, (path, layer) = state.adapter.edit, next(iter(projections(pipe.unet).items()))
    states = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    stock = layer(states)
    with state.adapter.attached(pipe):
        ours = layer(states)
    args = (states, stock, layer.weight, edit.direction, edit.inverse, edit.outputs[path])
    config = state.adapter.config
    assert (config.drawing_beta, config.drawing_tau) != (config.beta, config.tau)
    assert torch.allclose(ours, rank_one(*args, config.drawing_beta, config.drawing_tau), atol=1e-6)
    assert not torch.allclose(ours, rank_one(*args, config.beta, config.tau), atol=1e-4)


def test_perfusion_equals_a_loop_with_edited_projections(pipe, lesson):
    config = PerfusionConfig(3, 2)
    tokenizer, text, table, row = with_row(pipe)
    embedding = nn.Parameter(table.detach()[row].clone())
    ids = tokenizer([t.format("<milo>") for t in lesson.templates], padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    inverse = inverse_covariance(pipe, [t.format("dog") for t in lesson.templates])
    unet = copy.deepcopy(pipe.unet)
    positions = [(k, p) for k, mentions in enumerate(lesson.texts.mentions) for m in mentions for p in m.positions]
    class_state = torch.stack([lesson.texts.states[k, p] for k, p in positions]).mean(0)
    layers = projections(unet)
    values = {
        path: nn.Parameter(layer.weight.detach() @ class_state) for path, layer in layers.items() if "to_v" in path
    }
    optimizer = torch.optim.Adam([{"params": values.values(), "lr": 0.03}, {"params": [embedding], "lr": 0.006}])
    generator, smoothed = torch.Generator().manual_seed(0), None
    for _ in range(3):
        draw = lesson.draw(2, generator)
        handle = text.get_input_embeddings().register_forward_hook(
            lambda m, a, out: torch.where((a[0] == row).unsqueeze(-1), embedding, out)
        )
        states = text(ids[draw.captions])[0]
        handle.remove()
        now = states[ids[draw.captions] == row].mean(0)
        smoothed = now.detach() if smoothed is None else 0.99 * smoothed + 0.01 * now.detach()
        i = smoothed + now - now.detach()
        outputs = {path: values.get(path, layer.weight.detach() @ class_state) for path, layer in layers.items()}
        with Edit(i, inverse, outputs, config.beta, config.tau).on(unet):
            error = unet(draw.noisy, draw.timesteps, states).sample - draw.target
        optimizer.zero_grad()
        (draw.mask * error.pow(2)).mean().backward()
        optimizer.step()
    *_, state = SMALL["perfusion"](pipe, lesson)
    assert torch.allclose(state.adapter.word.embedding[0], embedding.detach(), atol=1e-5)
    assert torch.allclose(state.adapter.edit.direction, smoothed, atol=1e-5)
    assert all(torch.allclose(state.adapter.edit.outputs[p], v.detach(), atol=1e-5) for p, v in values.items())


def test_the_covariance_is_over_real_tokens(pipe):
    captions = ["a dog", "the cat in the snow", "a car"]
    total, count = torch.zeros(12, 12, dtype=torch.float64), 0
    for text in captions:
        ids = pipe.tokenizer(text)["input_ids"]
        padded = pipe.tokenizer(text, padding="max_length", return_tensors="pt")["input_ids"]
        for e in pipe.text_encoder(padded)[0][0, : len(ids)].double():
            total, count = total + torch.outer(e, e), count + 1
    c = total / count
    c = c + 1e-3 * c.trace() / 12 * torch.eye(12)
    assert torch.allclose(
        inverse_covariance(pipe, captions).double() @ c, torch.eye(12, dtype=torch.float64), atol=1e-3
    )


def test_perfusion_learns_on_a_half_precision_base(pipe, lesson):
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    half = replace(lesson, latents=lesson.latents.bfloat16())
    state = next(perfusion(pipe, half, PerfusionConfig(1, 2)))
    assert np.isfinite(state.loss)
    assert all(t.dtype == torch.float32 for k, t in state.adapter.tensors().items() if k.endswith("to_v"))
