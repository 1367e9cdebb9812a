"""Each method against its published loop written out, or peft; drawn with what was saved; nothing left behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from PIL import Image
from torch import nn

from infusion.concept import Concept
from infusion.errors import InfusionError
from infusion.lesson import prepare_lesson
from infusion.methods import METHODS
from infusion.methods.custom_diffusion import CustomDiffusionConfig, custom_diffusion
from infusion.methods.dreambooth import DreamBoothConfig, dreambooth, prior_lesson
from infusion.methods.infusion import infusion
from infusion.methods.interface import stored_bytes
from infusion.methods.key_value import KeyValueAdapter, KeyValueConfig, added, key_value
from infusion.methods.lora import LoraConfig, dreambooth_lora, loaded_lora
from infusion.methods.perfusion import Edit, PerfusionConfig, inverse_covariance, perfusion, rank_one
from infusion.methods.textual_inversion import TextualInversionConfig, textual_inversion
from infusion.methods.tokens import NewWord
from infusion.photos import Photo
from infusion.pipelines import attach
from infusion.prompts import Mention
from infusion.streams import Plan, Streams, cross_attention_layers, projections
from infusion.training import LearnConfig
from tests.conftest import latents

SMALL = {
    "infusion": partial(infusion, config=LearnConfig(3, 2)),
    "key-value": partial(key_value, config=KeyValueConfig(3, 2)),
    "textual-inversion": partial(textual_inversion, config=TextualInversionConfig(3, 2, 0.05)),
    "dreambooth": partial(dreambooth, config=DreamBoothConfig(3, 2, 1e-3)),
    "dreambooth-lora": partial(dreambooth_lora, config=LoraConfig(3, 2, 1e-2, rank=2)),
    "custom-diffusion": partial(custom_diffusion, config=CustomDiffusionConfig(3, 2, 1e-2)),
    "perfusion": partial(perfusion, config=PerfusionConfig(3, 2)),
}


@pytest.fixture
def lesson(pipe):
    rng = np.random.default_rng(0)
    photos = [Photo(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))) for _ in range(3)]
    return prepare_lesson(pipe, photos, "dog", "milo", masked=False)


def mse(unet, draw, states=None):
    states = draw.kwargs["encoder_hidden_states"] if states is None else states
    return (unet(draw.noisy, draw.timesteps, states).sample - draw.target).pow(2).mean()


def test_every_method_is_tried_here():
    assert SMALL.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in SMALL if name != "infusion"]
    + [(name, torch.bfloat16) for name in ("dreambooth", "custom-diffusion")],
)
def test_a_base_too_coarse_to_learn_in_is_refused(pipe, lesson, name, dtype):
    """fp16 by all but Infusion, which scales its loss; bf16 where the base's own weights learn, whose steps it rounds away."""
    with pytest.raises(InfusionError, match="too coarse for this method; load it in fp32"):
        next(SMALL[name](pipe.to(dtype), lesson))


@pytest.mark.parametrize("name", SMALL)
def test_the_pipeline_stays_and_the_adapter_draws(pipe, lesson, name):
    prompt = "a photo of {} on the beach"
    before = latents(pipe, "a photo of a dog on the beach")
    weights = {k: v.clone() for part in (pipe.unet, pipe.text_encoder) for k, v in part.state_dict().items()}
    first, *_, last = [(s.step, s.loss, s.adapter) for s in SMALL[name](pipe, lesson)]
    assert (first[0], last[0]) == (1, 3)
    adapter = last[2]
    assert adapter.subject.startswith("a ")  # or prompts would read otherwise than the captions learned from
    with adapter.attached(pipe) as custom:
        drawn = latents(custom, prompt.format(adapter.subject))
        assert torch.equal(drawn, latents(custom, prompt.format(adapter.subject)))
    assert (drawn - before).abs().max() > 1e-5
    assert torch.equal(latents(pipe, "a photo of a dog on the beach"), before)
    after = {k: v for part in (pipe.unet, pipe.text_encoder) for k, v in part.state_dict().items()}
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert name == "dreambooth-lora" or all(p.requires_grad for p in pipe.unet.parameters())  # peft's loading freezes
    assert "<milo>" not in pipe.tokenizer.get_vocab()
    assert stored_bytes(adapter) == 2 * sum(t.numel() for t in adapter.tensors().values()) > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_learns_the_same(pipe, lesson, name):
    runs = [[s.adapter for s in SMALL[name](pipe, lesson)][-1].tensors() for _ in range(2)]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_a_look_at_a_tuned_copy_leaves_it_training(pipe, lesson):
    states = dreambooth(pipe, lesson, DreamBoothConfig(2, 1))
    unet = next(states).adapter.unet
    with next(states).adapter.attached(pipe) as custom:
        assert not custom.unet.training
    assert unet.training


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora", "custom-diffusion"])
def test_part_of_what_other_methods_learned(pipe, lesson, method):
    """At 0 the base's weights are in use, at 0.5 those halfway, as a LoRA of half its up matrices has them."""
    learn, config = METHODS[method]
    *_, last = learn(pipe, lesson, config(steps=3, batch=2, learning_rate=0.05))

    def prediction(strength):
        with replace(last.adapter, strength=strength).attached(pipe) as custom, torch.no_grad():
            weights = {p: layer.weight.clone() for p, layer in projections(custom.unet).items()}
            return custom.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample, weights

    with torch.no_grad():
        draw = lesson.draw(2, torch.Generator().manual_seed(0))
        base = pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        stock = {p: w.weight.clone() for p, w in projections(pipe.unet).items()}
    whole, half, none = (prediction(s) for s in (1.0, 0.5, 0.0))
    assert torch.allclose(none[0], base, atol=1e-5)
    assert (whole[0] - base).abs().max() > 1e-3
    assert (half[0] - base).abs().max() < (whole[0] - base).abs().max()
    if method != "dreambooth-lora":
        assert all(torch.allclose(half[1][p], (stock[p] + whole[1][p]) / 2, atol=1e-6) for p in stock)
    else:
        halved = {k: v / 2 if "lora_B" in k else v for k, v in last.adapter.tensors().items()}
        with loaded_lora(pipe, {f"unet.{k}": v for k, v in halved.items()}), torch.no_grad():
            expected = pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample
        assert torch.allclose(half[0], expected, atol=1e-5)
    assert torch.equal(pipe.unet(draw.noisy, draw.timesteps, **draw.kwargs).sample, base)


@pytest.mark.parametrize("method", ["dreambooth", "dreambooth-lora"])
def test_from_its_limit_on_the_base_draws(pipe, lesson, method):
    learn, config = METHODS[method]
    *_, last = learn(pipe, lesson, config(steps=3, batch=2, learning_rate=0.05), max_timestep=500)
    limited = replace(last.adapter, strength=0.5)
    draw = lesson.draw(3, torch.Generator().manual_seed(0))

    def predictions(unet):
        with torch.no_grad():
            return [unet(draw.noisy, timestep=t, **draw.kwargs).sample for t in (torch.tensor([500] * 3), 499)]

    base = predictions(pipe.unet)
    own_forward = pipe.unet.forward = partial(type(pipe.unet).forward, pipe.unet)  # as accelerate's offloading does
    with limited.attached(pipe) as custom:
        drawn = predictions(custom.unet)
        with pytest.raises(InfusionError, match=r"\[500, 499, 499\] lie on both sides of 500"):
            custom.unet(draw.noisy, torch.tensor([500, 499, 499]), **draw.kwargs)
    with replace(limited, max_timestep=None).attached(pipe) as custom:
        whole = predictions(custom.unet)
    assert torch.equal(drawn[0], base[0])
    assert torch.equal(drawn[1], whole[1])
    assert all((w - b).abs().max() > 1e-3 for w, b in zip(whole, base, strict=True))
    assert pipe.unet.forward is own_forward
    assert "forward" not in vars(last.adapter.unet)
    with pytest.raises(InfusionError, match="max_timestep is 0; it must be at least 1"):
        next(learn(pipe, lesson, max_timestep=0))


def test_a_strength_is_for_drawing_alone(pipe, lesson):
    drawn = []
    *_, last = infusion(pipe, lesson, LearnConfig(3, 2, 0.5))
    for strength in (1.0, 0.5, 0.0):
        with replace(last.adapter, strength=strength).attached(pipe):
            drawn.append(latents(pipe, f"a photo of {last.adapter.subject}"))
    assert last.adapter.concept.settings["strength"] == 1.0  # of what was learned, not of the drawing
    with attach(pipe, last.adapter.concept):
        assert torch.equal(latents(pipe, "a photo of a <milo>"), drawn[0])
        assert torch.equal(latents(pipe, "a photo of a <milo:0.5>"), drawn[1])
    assert (drawn[2] - latents(pipe, "a photo of a dog")).abs().max() < 1e-4
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


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


@pytest.mark.parametrize("limit", [None, 300])
def test_dreambooth_equals_a_plain_loop(pipe, lesson, limit):
    unet = copy.deepcopy(pipe.unet)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        loss = mse(unet, lesson.draw(2, generator, limit))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    *_, state = dreambooth(pipe, lesson, DreamBoothConfig(3, 2, 1e-3), max_timestep=limit)
    tuned = state.adapter.unet
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(unet.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize("limit", [None, 300])
def test_dreambooth_with_a_prior_and_an_identifier(pipe, lesson, limit):
    prior = prior_lesson(pipe, lesson, count=4, steps=1)
    assert len(prior.latents) == 4
    assert float(prior.masks.min()) == 1
    config = DreamBoothConfig(1, 2, 1e-3, identifier="sks", prior_weight=0.5)
    state = next(dreambooth(pipe, lesson, config, prior, limit))
    assert state.adapter.subject == "a sks dog"
    drawn = lesson.draw(2, torch.Generator().manual_seed(0), limit)
    captions = [lesson.templates[i].format("sks dog") for i in drawn.captions.tolist()]
    states = pipe.encode_prompt(captions, "cpu", 1, False)[0]
    of_prior = mse(pipe.unet, prior.draw(2, torch.Generator().manual_seed(1), limit))
    expected = mse(pipe.unet, drawn, states) + 0.5 * of_prior
    assert state.loss == pytest.approx(float(expected.detach()), rel=1e-4)


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


def with_row(pipe):
    """Tokenizer and text encoder with a token `<milo>` begun as "dog", the way diffusers' example does it."""
    tokenizer, text = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    tokenizer.add_tokens("<milo>")
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text.get_input_embeddings().weight
    row = tokenizer.convert_tokens_to_ids("<milo>")
    table.data[row] = table.data[tokenizer.convert_tokens_to_ids("dog</w>")]
    return tokenizer, text, table, row


def test_textual_inversion_equals_diffusers_loop(pipe, lesson):
    tokenizer, text, table, row = with_row(pipe)
    kept = table.detach().clone()
    ids = tokenizer([t.format("<milo>") for t in lesson.templates], padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    optimizer = torch.optim.AdamW([table], 0.05, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    others = torch.arange(len(table)) != row
    for _ in range(3):
        draw = lesson.draw(2, generator)
        optimizer.zero_grad()
        mse(pipe.unet, draw, text(ids[draw.captions])[0]).backward()
        optimizer.step()
        table.data[others] = kept[others]  # the example restores all other rows after every step
    *_, state = SMALL["textual-inversion"](pipe, lesson)
    assert torch.allclose(state.adapter.embedding[0], table.detach()[row], atol=1e-5)
    assert (table.detach()[row] - kept[row]).abs().max() > 0.01


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


def test_a_new_word_is_refused_where_it_cannot_be(pipe):
    word = NewWord(pipe, "milo", "dog")
    stock = pipe.encode_prompt("a dog", "cpu", 1, False)[0]  # the word begins as "dog"
    assert torch.allclose(word.states(word.token_ids(["a <milo>"])), stock, atol=1e-6)
    with pytest.raises(InfusionError, match="cut off"):
        word.token_ids(["a " * 60 + "<milo>"])
    with pytest.raises(InfusionError, match="known to the tokenizer already"):
        NewWord(word.pipe, "milo", "dog")


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
