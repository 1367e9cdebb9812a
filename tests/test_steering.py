"""Steering: what overfits is stopped and the best is kept; what does not goes on to the end."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infusion.errors import InfusionError
from infusion.lesson import prepare_lesson
from infusion.methods.dreambooth import DreamBoothConfig, TunedUNet, dreambooth
from infusion.methods.infusion import ConceptAdapter, infusion
from infusion.methods.interface import MethodState
from infusion.photos import Photo
from infusion.report.curve import line_chart
from infusion.schedulers import scheduler_for
from infusion.steering import OTHER_SEEDS, SteerConfig, _Watch, read_checkups, repeats_place, steered, write_checkups
from infusion.training import LearnConfig
from tests.conftest import latents, random_concept

QUICK = {
    "prompts": ("a photo of {} on the beach", "{} in the snow"),
    "positioned": ("{} on the left",),
    "seeds": 2,
    "steps": 2,
}


@pytest.fixture
def lesson(pipe):
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    photos = [
        Photo(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)), Image.fromarray(mask))
        for _ in range(3)
    ]
    return prepare_lesson(pipe, photos, "dog", "milo")


def run(pipe, states, lesson, **more):
    return list(steered(pipe, states, lesson, SteerConfig(**{**QUICK, **more})))


def test_checkups_come_when_asked_and_change_nothing(pipe, lesson):
    before = latents(pipe, "a dog")
    plain = [s.adapter.concept for s in infusion(pipe, lesson, LearnConfig(5, 2))]
    looked = run(pipe, infusion(pipe, lesson, LearnConfig(5, 2)), lesson, every=2, stop=False)
    assert [s.checkup.step for s in looked if s.checkup] == [2, 4, 5]
    for a, b in zip(plain, looked, strict=True):
        for path, residual in a.residuals.items():
            assert torch.equal(residual, b.state.adapter.concept.residuals[path])
    assert all(s.checkup.forgetting == 0 for s in looked if s.checkup)
    assert torch.equal(latents(pipe, "a dog"), before)


@pytest.fixture
def looks(monkeypatch):
    """Sets how many of the pictures repeat a photo at each look, all (1) or none (0); none of the base's do."""

    def given(background, position=()):
        done = []

        def hits(self, anywhere, positioned, *_):
            done.append(1)  # the first two are of the base's own
            drawn = (anywhere, positioned)
            found = [[0, 0, *given][len(done) - 1] if given else 0 for given in (background, position)]
            return {
                name: torch.full((len(pictures),), bool(hit))
                for name, pictures, hit in zip(("background", "position"), drawn, found, strict=True)
            }

        monkeypatch.setattr(_Watch, "_hits", hits)

    return given


def test_a_method_that_repeats_is_stopped_and_the_state_before_is_kept(pipe, lesson, looks):
    """The second and third checkups are made to look like the photos; the adapter kept must be the first one's, not the live one."""
    unet = copy.deepcopy(pipe.unet)

    def states():
        for step in range(1, 9):
            with torch.no_grad():
                for p in unet.parameters():
                    p.add_(0.01)
            yield MethodState(step, 8, 0.1, TunedUNet("a dog", unet))

    looks([0, 1, 1])
    seen = run(pipe, states(), lesson, every=2)
    assert [s.state.step for s in seen] == [1, 2, 3, 4, 5, 6]
    last = seen[-1]
    assert last.stopped.startswith(
        "Stopped at step 6: 100% of the pictures repeat the photos' background, 100 points above"
    )
    assert "step 2 is kept" in last.stopped
    kept, live = (next(a.adapter.unet.parameters()) for a in (last.best, last.state))
    assert float((live - kept).detach().mean()) == pytest.approx(0.04, abs=1e-4)


def test_one_look_beyond_the_limit_does_not_stop(pipe, lesson, looks):
    looks([0, 1, 0, 1, 0])  # the last step is looked at again
    seen = run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(4, 1)), lesson, every=1)
    assert [s.checkup.repeats["background"].above > 0.1 for s in seen] == [False, True, False, False]
    assert not any(s.stopped for s in seen)
    assert [s.best.step for s in seen] == [1, 1, 3, 3]
    assert seen[-1].kept is seen[-1].state


def test_a_last_step_that_two_looks_find_beyond_the_limit_is_not_kept(pipe, lesson, looks):
    looks([0, 0, 1, 1])
    seen = run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(3, 1)), lesson, every=1)
    assert [bool(s.stopped) for s in seen] == [False, False, True]
    assert seen[-1].kept.step == 2
    looks([1, 1])
    (only,) = [s for s in run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(2, 1)), lesson, every=2) if s.checkup]
    assert "no step before it was within the limit" in only.stopped


def test_a_background_is_looked_at_where_there_is_one(pipe, lesson, monkeypatch):
    """Photos full of their subject have none; where the whole picture is learned, the base finds the subject for the looks."""
    full = dataclasses.replace(lesson, masks=lesson.masks.clamp(0.9, 0.95))
    names = [s.checkup.repeats.keys() for s in run(pipe, infusion(pipe, full, LearnConfig(1, 2)), full, every=1)]
    assert names == [{"position"}]
    whole = dataclasses.replace(lesson, masks=torch.ones_like(lesson.masks))
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    monkeypatch.setattr("infusion.steering.attention_masks", lambda part, unet: left.expand(len(part.latents), 8, 8))
    assert torch.equal(_Watch(pipe, whole, SteerConfig(**QUICK), lambda *_: None).outside, left == 0)


def test_without_looks_the_states_go_through(pipe, lesson):
    plain = [s.loss for s in infusion(pipe, lesson, LearnConfig(3, 2))]
    seen = run(pipe, infusion(pipe, lesson, LearnConfig(3, 2)), lesson, every=0)
    assert [s.state.loss for s in seen] == plain
    assert not any(s.checkup for s in seen)
    assert seen[-1].kept is seen[-1].state


def test_two_looks_must_find_the_same_repeated(pipe, lesson, looks):
    looks([1, 0, 0], [0, 1, 1])
    seen = run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(4, 1)), lesson, every=1)
    assert [bool(s.stopped) for s in seen] == [False, False, True]
    assert "of the pictures repeat the photos' position" in seen[-1].stopped
    assert seen[-1].best is None


def test_nothing_within_the_limit(pipe, lesson, looks):
    looks([1] * 4)
    seen = run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(4, 1)), lesson, every=1)
    assert len(seen) == 2
    assert seen[1].best is None
    assert "no step before it was within the limit" in seen[1].stopped
    looks([1] * 4)
    assert len(run(pipe, dreambooth(pipe, lesson, DreamBoothConfig(4, 1)), lesson, every=1, stop=False)) == 4


def test_a_picture_that_stands_where_a_photo_does_repeats_its_position(pipe, lesson, monkeypatch):
    """Heat is put where each latent's largest value lies; the base draws at the left, the adapter where the second photo stands."""

    def peaks(part, unet):
        flat = part.latents.abs().sum(1).flatten(1)
        return torch.nn.functional.one_hot(flat.argmax(1), flat.shape[1]).float().unflatten(1, part.masks.shape[1:])

    monkeypatch.setattr("infusion.steering.attention_masks", peaks)
    at = lambda *columns: torch.stack([_spot(lesson.latents[0], column) for column in columns])  # noqa: E731
    config = SteerConfig(**{**QUICK, "positioned": ("{} at the side", "{} on the left")})
    watch = _Watch(pipe, dataclasses.replace(lesson, latents=at(3, 6)), config, lambda *_: None)
    anywhere = torch.randn(4, *lesson.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    limits = watch.references[0].centre, watch.references[0].level
    hits = lambda *columns: watch._hits(anywhere, at(*columns), *limits)["position"].tolist()  # noqa: E731
    assert hits(0, 2, 2, 7) == [False, True, False, True]  # an eighth away; the third is at the left as asked
    assert hits(6, 3, 4, 1) == [True, True, True, False]
    assert watch._pulled(at(0, 3, 4, 7)).tolist() == [False, True, True, True]


def test_prompts_that_all_ask_for_a_side_have_no_pull(pipe, lesson):
    sides = ("{} on the left in the snow", "{} on the right in the city")
    (seen,) = run(pipe, infusion(pipe, lesson, LearnConfig(1, 2)), lesson, every=1, prompts=sides)
    assert seen.checkup.pull is None
    (seen,) = run(pipe, infusion(pipe, lesson, LearnConfig(1, 2)), lesson, every=1)
    assert seen.checkup.pull.rate.n == 4


def test_a_background_like_a_photos_more_than_the_bases_repeats_it(pipe, lesson):
    watch = _Watch(pipe, lesson, SteerConfig(**QUICK), lambda *_: None)
    positioned = torch.zeros(2, *lesson.latents.shape[1:])
    photo = lesson.latents[1:2].clone()
    photo[:, :, ~watch.outside] = 9  # whatever the subject looks like
    base = watch.references[0]
    hits = watch._hits(torch.cat([photo, base.centre.float()]), positioned, base.centre, base.level)["background"]
    assert hits.tolist() == [True, False]
    for reference in watch.references:  # of four pictures one lies above the 0.9 quantile
        assert reference.rates["background"] == pytest.approx(0.25)


def test_looks_take_turns_between_two_sets_of_seeds(pipe, lesson, monkeypatch):
    watch, seeds = _Watch(pipe, lesson, SteerConfig(**QUICK), lambda *_: None), []
    real = _Watch._drawn
    monkeypatch.setattr(
        _Watch,
        "_drawn",
        lambda self, pipe, subject, seed, label: (seeds.append(seed), real(self, pipe, subject, seed, label))[1],
    )
    state = next(infusion(pipe, lesson, LearnConfig(1, 2)))
    looks = [watch.look(state) for _ in range(3)]
    assert seeds == [0, OTHER_SEEDS, 0]
    assert looks[0] == looks[2]
    first, second = watch.references
    assert not torch.equal(first.centre, second.centre)


def test_a_look_at_the_base_itself_is_no_different(pipe, lesson):
    watch = _Watch(pipe, lesson, SteerConfig(**QUICK), lambda *_: None)
    assert watch.references[0].rates["background"] > 0  # of its own pictures some repeat too
    nothing = ConceptAdapter("a <milo>", random_concept(pipe.unet, scale=0.0))
    for _ in range(3):
        checkup = watch.look(MethodState(1, 1, 0.1, nothing))
        assert {name: found.above for name, found in checkup.repeats.items()} == {"background": 0, "position": 0}
        assert checkup.variety == pytest.approx(1, rel=1e-3)
        assert (checkup.pull.above, checkup.forgetting) == (0, 0)
    spread = ConceptAdapter("a <milo>", random_concept(pipe.unet, scale=30.0))
    moved = [watch.look(MethodState(1, 1, 0.1, spread)).variety for _ in range(2)]
    base = [watch._drawn(watch.pipe, "a dog", seed, "")[0] for seed in (OTHER_SEEDS, 0)]
    with spread.attached(watch.pipe) as custom:
        ours = [watch._drawn(custom, "a <milo>", seed, "")[0] for seed in (OTHER_SEEDS, 0)]
    by_hand = [watch._spread(a) / watch._spread(b) for a, b in zip(ours, base, strict=True)]
    assert max(abs(x - 1) for x in by_hand) > 0.02
    assert moved == pytest.approx(by_hand, rel=1e-3)


def _spot(like, column):
    latent = torch.zeros_like(like)
    latent[:, 2, column] = 5
    return latent


def test_checkups_beside_the_file(tmp_path):
    path = tmp_path / "milo.safetensors"
    assert read_checkups(path) == []
    told = [{"step": 5, "loss": 0.1, "repeats": {}, "forgetting": 0.0, "variety": 1.0}]
    assert json.loads(write_checkups(path, told).read_text()) == told == read_checkups(path)
    write_checkups(path, [])  # of a training without any: the old ones are another's
    assert read_checkups(path) == []
    first, second = tmp_path / "milo.v1", tmp_path / "milo.v2"
    write_checkups(first, told)
    write_checkups(second, [])  # takes nothing of the first's away
    assert read_checkups(first) == told
    assert read_checkups(Path(".")) == []
    path.with_suffix(".checkups.json").write_text('[{"step": 5}]')
    with pytest.raises(InfusionError, match="damaged"):
        read_checkups(path)


@pytest.mark.parametrize("bad", [{"every": -1}, {"seeds": 1}, {"limit": 1.5}, {"steps": 0}, {"positioned": ()}])
def test_bad_settings(bad):
    with pytest.raises(InfusionError, match=next(iter(bad))):
        SteerConfig(**bad)
    with pytest.raises(
        InfusionError, match=r"'a dog' does not name the subject exactly once; write \{\} where it stands"
    ):
        SteerConfig(positioned=("a dog",))


def test_looks_of_many_steps_are_refused_on_a_distilled_base(pipe, lesson):
    pipe.scheduler = scheduler_for(pipe, "lcm")
    states = lambda: infusion(pipe, lesson, LearnConfig(1, 2, 0.5))  # noqa: E731
    with pytest.raises(InfusionError, match="A look draws 20 steps, this base was distilled to 8 at most"):
        list(steered(pipe, states(), lesson, SteerConfig()))
    (now,) = steered(pipe, states(), lesson, SteerConfig(steps=4, guidance_scale=1.0))
    assert now.checkup


def test_a_look_that_fails_leaves_no_training_behind(pipe, lesson, monkeypatch):
    before = latents(pipe, "a dog")

    def fail(watch, state):
        raise MemoryError

    monkeypatch.setattr(_Watch, "look", fail)
    states = infusion(pipe, lesson, LearnConfig(3, 2, 0.5))
    with pytest.raises(MemoryError):
        run(pipe, states, lesson, every=1)
    assert next(states, None) is None
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(latents(pipe, "a dog"), before)


def test_a_chart_places_its_points():
    svg = line_chart("A & B", [10, 20], [0.0, 5.0], " pt", limit=10)
    assert "A &amp; B" in svg
    assert svg.count("<circle") == 2
    assert 'points="46.0,186.0 404.0,113.0"' in svg  # 5 is halfway to the limit of 10
    assert "<circle" in line_chart("flat", [3], [0.0])
    with pytest.raises(ValueError, match="0 x and 1 y"):
        line_chart("none", [], [1.0])


def test_who_stands_where_asked_repeats_nothing():
    photos = torch.tensor([[0.5, 0.24], [0.5, 0.76]])  # off centre, and mirrored
    shown = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.5, 0.74], [0.5, 0.5], [0.5, 0.25]])
    assert repeats_place(shown, photos, (-1, 1, -1, 1, 0)).tolist() == [False, True, True, False, True]
    centre = torch.tensor([[0.5, 0.5]])
    assert repeats_place(shown, centre, (-1, 1, -1, 1, 0)).tolist() == [False, False, False, True, False]
