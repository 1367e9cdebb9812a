"""The streams against the naive method, row by row. Run: pytest tests/test_streams.py"""

from __future__ import annotations

import pytest
import torch

from infusion.errors import InfusionError
from infusion.naive import naive_prediction
from infusion.prompts import Mention
from infusion.streams import Plan, Streams, cross_attention_layers, value_lengths
from tests.conftest import random_concept, tiny_unet

BATCH, TOKENS = 3, 9


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(BATCH, 4, 8, 8, generator=generator),
        torch.tensor([10, 500, 900]),
        torch.randn(BATCH, TOKENS, 12, generator=generator),
    )


ROWS = {
    "one of three rows": ((), (Mention("milo", 1.0, (3,)),), ()),
    "a word of two tokens, a strength": ((Mention("milo", 0.5, (2, 3)),), (), (Mention("milo", -1.5, (7,)),)),
    "two concepts in one row": (
        (Mention("milo", 1.0, (2,)), Mention("rex", 0.7, (5, 6))),
        (Mention("rex", 1.0, (4,)),),
        (),
    ),
    "a concept twice in one row": ((), (), (Mention("milo", 1.0, (1,)), Mention("milo", 2.0, (8,)))),
}


@torch.no_grad()
def by_both(unet, call, plan, residuals, two_streams):
    """What the streams predict of the call, and the method written out; nothing stays on the UNet."""
    streams = Streams(unet)
    streams.residuals, streams.two_streams = residuals, two_streams
    with streams.calls(plan):
        ours = unet(*call).sample
    streams.remove()
    return ours, naive_prediction(unet, *call, plan, residuals, two_streams)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-30])
def test_equals_the_naive_method(call, rows, two_streams, scale):
    unet = tiny_unet()
    residuals = {n: random_concept(unet, n, seed=i, scale=scale).residuals for i, n in enumerate(("milo", "rex"))}
    plan = Plan(rows, call[2])
    ours, naive = by_both(unet, call, plan, residuals, two_streams)
    with torch.no_grad():
        base = unet(*call).sample
    tolerance = 1e-5 * naive.abs().max()
    assert (ours - naive).abs().max() < tolerance
    if scale == 1.0:
        changed = (ours - base).abs().amax(dim=(1, 2, 3)) > 100 * tolerance
        assert changed.tolist() == [bool(r) for r in rows]
    else:
        assert (ours - base).abs().max() < tolerance


@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("everywhere", ["rex", "nowhere"])
def test_concepts_on_some_layers_only(call, two_streams, everywhere):
    """One has residuals in the up blocks, the other in all layers, or the lower ones: layers know one, the other, both or none."""
    unet = tiny_unet()
    milo, rex = (random_concept(unet, n, seed=i).residuals for i, n in enumerate(("milo", "rex")))
    milo = {p: r for p, r in milo.items() if p.startswith("up_blocks")}
    if everywhere == "nowhere":
        rex = {p: r for p, r in rex.items() if p.startswith("down_blocks")}
    residuals = {"milo": milo, "rex": rex}
    plan = Plan(ROWS["two concepts in one row"], call[2])
    ours, naive = by_both(unet, call, plan, residuals, two_streams)
    assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("timesteps", [[10, 500, 900], [500], [400], [399]])
def test_a_limited_concept_is_heard_below_its_timestep(call, rows, two_streams, timesteps):
    unet, limits = tiny_unet(), {"milo": 500, "rex": 400}
    residuals = {n: random_concept(unet, n, seed=i).residuals for i, n in enumerate(limits)}
    sample, _, states = call
    streams = Streams(unet)
    streams.residuals, streams.two_streams, streams.limits = residuals, two_streams, limits
    each = timesteps * BATCH if len(timesteps) == 1 else timesteps
    heard = [tuple(m for m in row if t < limits[m.name]) for row, t in zip(rows, each, strict=True)]
    with torch.no_grad():
        with streams.calls(Plan(rows, states)):
            ours = unet(sample, torch.tensor(timesteps), states).sample
        streams.remove()
        base = unet(sample, torch.tensor(timesteps), states).sample
        naive = naive_prediction(unet, sample, torch.tensor(each), states, Plan(heard, states), residuals, two_streams)
    assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()
    if not any(heard):
        assert torch.equal(ours, base)


def test_record_and_replay_equal_the_joint_call_and_carry_gradients(call):
    unet = tiny_unet()
    rows = tuple((Mention("milo", 1.0, (i + 1, i + 4)),) for i in range(BATCH))
    plan = Plan(rows, call[2])
    streams = Streams(unet)
    grads = []
    for mode in ("joint", "replay"):
        residuals = {p: r.clone().requires_grad_() for p, r in random_concept(unet).residuals.items()}
        streams.residuals = {"milo": residuals}
        if mode == "replay":
            with streams.calls(plan, "record"), torch.no_grad():
                recorded = unet(*call).sample
        with streams.calls(plan, mode):
            prediction = unet(*call).sample
        prediction.square().sum().backward()
        grads.append((prediction.detach(), {p: r.grad for p, r in residuals.items()}))
    streams.remove()
    (joint, joint_grad), (replay, replay_grad) = grads
    assert (joint - replay).abs().max() < 1e-5 * joint.abs().max()
    for path in joint_grad:
        assert joint_grad[path].abs().max() > 0
        assert (joint_grad[path] - replay_grad[path]).abs().max() < 1e-4 * joint_grad[path].abs().max()
    assert torch.equal(recorded, unet(*call).sample)


@pytest.mark.parametrize("mode", ["joint", "replay"])
def test_gradient_checkpointing_changes_nothing(call, mode):
    """Its second forward pass runs in backward, when the plan is no longer in force."""
    grads = []
    plan = Plan(((), (Mention("milo", 1.0, (3,)),), ()), call[2])
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        residuals = {p: r.clone().requires_grad_() for p, r in random_concept(unet).residuals.items()}
        streams = Streams(unet)
        streams.residuals = {"milo": residuals}
        if mode == "replay":
            with streams.calls(plan, "record"), torch.no_grad():
                unet(*call)
        with streams.calls(plan, mode):
            prediction = unet(*call).sample
        prediction.square().sum().backward()
        streams.remove()
        grads.append(torch.cat([r.grad for r in residuals.values()]))
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def test_guidance_rows_and_calls_of_others_are_recognized(call):
    sample, _, states = call
    unet = tiny_unet()
    streams = Streams(unet)
    streams.residuals = {"milo": random_concept(unet).residuals}
    plan = Plan(((Mention("milo", 1.0, (3,)),), (), ()), states)
    negative = torch.randn(states.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), streams.calls(plan):
        alone = unet(sample, 7, states).sample
        guided = unet(torch.cat([sample] * 2), 7, torch.cat([negative, states])).sample
        assert (guided[3:] - alone).abs().max() < 1e-5
        other = unet(sample, 7, negative).sample  # a call that is none of the plan's
        swapped = unet(torch.cat([sample] * 2), 7, torch.cat([states, negative])).sample  # its texts come last
        with pytest.raises(InfusionError, match="9 rows for 3 pictures"):
            unet(torch.cat([sample] * 3), 7, torch.cat([negative, states, states]))
    streams.remove()
    with torch.no_grad():
        assert torch.equal(other, unet(sample, 7, negative).sample)
        assert torch.equal(swapped, unet(torch.cat([sample] * 2), 7, torch.cat([states, negative])).sample)
        assert (guided[:3] - unet(sample, 7, negative).sample).abs().max() < 1e-5


def test_class_word_as_negative_prompt_gets_no_residual(call):
    sample, _, states = call
    unet = tiny_unet()
    streams = Streams(unet)
    streams.residuals = {"milo": random_concept(unet).residuals}
    plan = Plan(tuple((Mention("milo", 1.0, (3,)),) for _ in range(BATCH)), states)
    with torch.no_grad(), streams.calls(plan):
        guided = unet(torch.cat([sample] * 2), 7, torch.cat([states, states])).sample
    streams.remove()
    with torch.no_grad():
        base = unet(sample, 7, states).sample
    assert (guided[:3] - base).abs().max() < 1e-5
    assert (guided[3:] - base).abs().max() > 1e-3


def test_remove_leaves_nothing(call):
    unet = tiny_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    attributes = {path: set(vars(m)) for path, m in unet.named_modules()}
    processors = dict(unet.attn_processors)
    streams = Streams(unet)
    streams.residuals = {"milo": random_concept(unet).residuals}
    with torch.no_grad(), streams.calls(Plan(((Mention("milo", 1.0, (3,)),), (), ()), call[2])):
        unet(*call)
    streams.remove()
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert {path: set(vars(m)) for path, m in unet.named_modules()} == attributes
    assert unet.attn_processors == processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_layers_and_refusals():
    unet = tiny_unet()
    lengths = value_lengths(unet)
    assert len(lengths) == 7
    assert sorted(set(lengths.values())) == [8, 16]
    unet.fuse_qkv_projections()
    with pytest.raises(InfusionError, match="unfuse_qkv_projections"):
        cross_attention_layers(unet)
    with pytest.raises(InfusionError, match="no cross-attention"):
        cross_attention_layers(torch.nn.Linear(2, 2))
