"""The reward: what drawings earn against a loop, drawings against the stock pipeline, and where its gradient goes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from infusion.world.models import LATENT_CHANNELS, build_pipeline, build_text_encoder, build_unet
from infusion.world.reader import COLORLESS, HEADS, Reader, Seen
from infusion.world.requests import Request, Wanted, seen_request
from infusion.world.reward import (
    Asked,
    Reference,
    RewardConfig,
    Standards,
    Unnamed,
    asked_of,
    earned,
    no_prompt,
    own_states,
    reward,
    trajectory,
)
from infusion.world.scenes import Placed, Scene, held_out
from infusion.world.subjects import Subject
from infusion.world.tokenizer import build_tokenizer
from infusion.world.truth import NONE, SCENE_HEADS, SHARES
from infusion.world.vocabulary import COLORS, POSITIONS

REQUESTS = [
    Request("", "snow", "photo", (Wanted("cat", "red", None, "striped", "hat", "right"),)),
    Request("", "beach", "sketch", (Wanted("dog", pattern="spotted"), Wanted("mug", position="left"))),
    Request("", "room", "neon", (Wanted("car"),)),
]
SMALL = RewardConfig(drawn=3, steps=4, batch=4)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return build_text_encoder(build_tokenizer()).eval(), build_unet().eval()


def random_seen(n: int) -> Seen:
    return Seen(
        torch.randn(n, 16, 16),
        torch.randn(n, 16, 16),
        {name: torch.randn(n, len(names), 16, 16) for name, names in HEADS.items()},
        {name: torch.randn(n, len(names), 16, 16) for name, names in SCENE_HEADS.items()},
    )


def rewarded(networks, reader, states, config=SMALL, reference=None):
    standards = Standards(reader, Reference(*(reference or networks)), Unnamed(config.memory, torch.device("cpu")))
    return reward(*networks, standards, states, np.random.default_rng(2), config)


def test_what_is_earned_against_a_loop():
    torch.manual_seed(3)
    seen = random_seen(3)
    for logits in (seen.heat[2], seen.subject["kind"][2, 5], seen.scene["style"][2, 3]):
        logits[4, 5] = 50.0  # surely a car in neon, and more than enough
    got = earned(seen, asked_of(REQUESTS), enough=-0.05)
    unnamed = {name: [] for name in ("color1", "color2", "pattern")}
    for n, request in enumerate(REQUESTS):
        total, unasked = 0.0, 0.0
        style = seen.scene["style"][n].log_softmax(0)[SCENE_HEADS["style"].index(request.style)]
        for wanted in request.subjects:
            best, at = float("-inf"), (0, 0)
            for y in range(16):
                for x in range(16):
                    if wanted.position and POSITIONS[int((x + 0.5) / 16 * 3)] != wanted.position:
                        continue
                    log_p = float(torch.sigmoid(seen.heat[n, y, x]).log() + style[y, x])
                    for name, names in HEADS.items():
                        value = getattr(wanted, name)
                        if value is None and request.style == "sketch" and name.startswith("color"):
                            value = "colorless"
                        if value:
                            log_p += float(seen.subject[name][n, :, y, x].log_softmax(0)[names.index(value)])
                    if log_p > best:
                        best, at = log_p, (y, x)
            total += min(best, -0.05) / len(request.subjects)
            colorless = request.style == "sketch"
            for name in unnamed:
                # silence on the pattern beside a named colour speaks for plain, on an accessory for none
                speaks = name == "pattern" and (wanted.color1 or colorless)
                if getattr(wanted, name) is None and not speaks and not (colorless and name.startswith("color")):
                    unnamed[name].append(seen.subject[name][n, :, *at].softmax(0))
        kinds = [HEADS["kind"].index(w.kind) for w in request.subjects]
        for y in range(16):
            for x in range(16):
                known = float(seen.subject["kind"][n, :, y, x].softmax(0)[kinds].sum())
                unasked = max(unasked, float(torch.sigmoid(seen.heat[n, y, x])) * (1 - known))
        scene = sum(
            min(-0.05, float(seen.scene[name][n].log_softmax(0)[names.index(getattr(request, name))].mean()))
            for name, names in SCENE_HEADS.items()
        )
        assert float(got.subject[n]) == pytest.approx(total, rel=1e-4)
        assert float(got.scene[n]) == pytest.approx(scene, rel=1e-4)
        assert float(got.unasked[n]) == pytest.approx(unasked, rel=1e-4)
    assert float(got.subject[2]) == pytest.approx(-0.05)
    assert got.unnamed.keys() == unnamed.keys()
    for name, parts in unnamed.items():
        expected, told = torch.stack(parts), got.unnamed[name]
        assert len(told) == len(expected)
        assert torch.allclose(told.sum(0), expected.sum(0), atol=1e-5)


def test_what_is_not_named_is_left_open():
    asked = asked_of(REQUESTS)
    color = list(HEADS).index("color1")
    assert asked.subject[0, 0, color] == HEADS["color1"].index("red")
    assert asked.subject[1, 0, color] == COLORLESS
    assert asked.subject[2, 0, color] == NONE
    assert asked.subject[2, 1].tolist() == [NONE] * len(HEADS)
    assert asked.third.tolist() == [[2, NONE], [NONE, 0], [NONE, NONE]]


def test_what_comes_too_often_is_in_excess():
    unnamed = Unnamed(memory=2, device=torch.device("cpu"))
    spotted = {"pattern": torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(5, 1), "color1": torch.zeros(0, 11)}
    assert unnamed.excess(spotted) == 0  # so far all is as in the world
    now = 0.5 * 0.25 + 0.5
    told = spotted["pattern"].clone().requires_grad_()
    excess = unnamed.excess({"pattern": told})
    assert float(excess.detach()) == pytest.approx(float(np.log(now / 0.25)))
    excess.backward()
    assert told.grad.argmax(1).tolist() == [1] * 5
    rare = unnamed.excess({"pattern": torch.tensor([[1.0, 0.0, 0.0, 0.0]])})
    assert rare < 0
    colors = unnamed.excess({"color1": torch.cat([torch.full((3, 10), 0.01), torch.full((3, 1), 0.9)], 1)})
    assert colors == 0
    assert sum(SHARES["color1"]) == pytest.approx(1)


def test_drawings_are_the_pipelines(networks):
    text, unet = networks
    pipe = build_pipeline(text_encoder=text, unet=unet)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red dog in the snow", "a photo of a mug on the left and a blue cat on the beach"]
    noise = torch.randn(2, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    laid = noise.contiguous(memory_format=torch.channels_last)  # as `trajectory` lays it: other layouts, other kernels
    expected = pipe(prompts, num_inference_steps=4, guidance_scale=6.0, latents=laid, output_type="latent").images
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        *way, (last, drawn) = trajectory(text, unet, ids, noise, SMALL)
    assert torch.allclose(drawn, expected, atol=1e-5)
    assert [t for t, _ in way] == pipe.scheduler.timesteps.tolist()
    assert last == 0
    assert torch.equal(no_prompt(ids), pipe.tokenizer([""], padding="max_length", return_tensors="pt")["input_ids"])


def test_each_state_is_used_once_and_belongs_to_its_prompt(networks):
    text, unet = networks
    config = replace(SMALL, steps=5, earliest=999, latest=1)  # 3 drawings of 5 states: 3 batches of 4, the rest is left
    parts = list(islice(own_states(text, unet, np.random.default_rng(0), config), 3))
    latents = torch.cat([p.latents for p in parts])
    assert len(latents.flatten(1).unique(dim=0)) == 12
    ids, timesteps = torch.cat([p.ids for p in parts]), torch.cat([p.timesteps for p in parts])
    assert set(timesteps.tolist()) <= {999, 799, 599, 399, 199}
    rng = np.random.default_rng(0)
    requests = [seen_request(rng) for _ in range(3)]
    tokens = build_tokenizer()([r.prompt for r in requests], padding="max_length", return_tensors="pt")["input_ids"]
    of = (ids[:, None] == tokens[None]).all(-1).int().argmax(1)
    assert (ids == tokens[of]).all()
    asked = asked_of(requests)
    for k in range(3):
        assert torch.equal(torch.cat([p.asked[k] for p in parts]), asked[k][of])
    kept = next(own_states(text, unet, np.random.default_rng(0), SMALL))
    assert set(kept.timesteps.tolist()) <= {749, 499, 249}


def test_too_few_states_are_refused(networks):
    for config in (replace(SMALL, drawn=1), replace(SMALL, earliest=130)):
        with pytest.raises(ValueError, match="fewer than a batch of 4"):
            next(own_states(*networks, np.random.default_rng(0), config))


def test_the_gradient_goes_through_the_prompts_prediction_alone(networks):
    text, unet = networks
    torch.manual_seed(4)
    reader = Reader(16, 32).eval().requires_grad_(False)
    states = next(own_states(text, unet, np.random.default_rng(1), SMALL))
    config = replace(SMALL, guidance=0.0)  # nothing of the prompt's prediction is left
    rewarded(networks, reader, states, config).reward.backward()
    assert all(p.grad is None or not p.grad.any() for p in unet.parameters())
    rewarded(networks, reader, states).reward.backward()
    assert any(bool(p.grad.any()) for p in unet.parameters())
    assert text.get_input_embeddings().weight.grad.any()
    for network in networks:
        network.zero_grad(set_to_none=True)


def test_a_step_up_the_reward_earns_more(networks):
    text, unet = networks
    torch.manual_seed(5)
    reader = Reader(16, 32).eval().requires_grad_(False)
    states = next(own_states(text, unet, np.random.default_rng(1), SMALL))
    before = rewarded(networks, reader, states).reward
    gradients = torch.autograd.grad(before, list(unet.parameters()))
    begun = deepcopy(networks)
    with torch.no_grad():
        for p, g in zip(unet.parameters(), gradients, strict=True):
            p += 1e-4 * g / g.norm().clamp_min(1e-8)
        after = rewarded(networks, reader, states, reference=begun).reward
        for p, g in zip(unet.parameters(), gradients, strict=True):
            p -= 1e-4 * g / g.norm().clamp_min(1e-8)
    assert after > before


def test_early_guesses_earn_nothing_for_their_style(networks):
    text, unet = networks
    torch.manual_seed(6)
    reader = Reader(16, 32).eval()
    states = next(own_states(text, unet, np.random.default_rng(1), SMALL))
    other = Asked(states.asked.subject, states.asked.third, states.asked.scene.clone())
    other.scene[:, 0] = (other.scene[:, 0] + 1) % 5  # another background; the style is the subject's too
    got = {}
    with torch.no_grad():
        for timestep in (749, 249):
            at = states._replace(timesteps=torch.full_like(states.timesteps, timestep))
            got[timestep] = [rewarded(networks, reader, s).reward for s in (at, at._replace(asked=other))]
    assert got[749][0] == got[749][1]
    assert got[249][0] != got[249][1]


def test_moving_outside_of_subjects_costs(networks):
    text, unet = networks
    torch.manual_seed(7)
    reader = Reader(16, 32).eval()
    states = next(own_states(text, unet, np.random.default_rng(1), SMALL))
    other = deepcopy(unet)
    with torch.no_grad():
        other.conv_out.bias += torch.arange(LATENT_CHANNELS) / 4.0
        same, moved, free = (
            rewarded(networks, reader, states, config, reference)
            for config, reference in (
                (SMALL, networks), (SMALL, (text, other)), (replace(SMALL, tie=0.0), (text, other)),
            )
        )  # fmt: skip
    assert same.moved == 0
    mean = float((torch.arange(LATENT_CHANNELS) / 4.0).square().mean())
    assert 0 < float(moved.moved) < mean
    assert float(free.reward) == pytest.approx(float(same.reward), rel=1e-5)
    assert float(free.reward - moved.reward) == pytest.approx(SMALL.tie * float(moved.moved), rel=1e-4)
    with torch.no_grad():
        reader.inside.weight.zero_()
        reader.inside.bias.fill_(-50.0)  # nothing is a subject
        assert float(rewarded(networks, reader, states, SMALL, (text, other)).moved) == pytest.approx(mean, rel=1e-4)


def test_requests_that_training_sees():
    rng = np.random.default_rng(0)
    requests = [seen_request(rng) for _ in range(200)]
    two = [r for r in requests if len(r.subjects) == 2]
    assert 30 < len(two) < 100
    assert all(len({w.kind for w in r.subjects}) == len(r.subjects) for r in requests)
    assert len({r.prompt.split(" of ")[0] for r in requests}) > 10  # synonyms
    assert all(w.color1 is None for r in requests if r.style in ("sketch", "sepia") for w in r.subjects)
    for r in requests:
        for w in r.subjects:
            assert w.color2 is None or (w.color1 and w.pattern not in (None, "plain"))
            assert w.color1 is None or w.color1 in r.prompt
            scenes = [
                Scene((Placed(Subject(w.kind, color, "red", "plain", "none", (0.5,) * 4), 0.5),), r.background, r.style)
                for color in ([w.color1] if w.color1 else COLORS)
            ]
            assert not all(held_out(scene) for scene in scenes)
