"""The examination counts what it says it counts; the better checkpoint is kept."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infusion.world import examination, picking
from infusion.world.dataset import build_dataset, load_dataset
from infusion.world.examination import (
    ceiling,
    copying,
    draw,
    examine_base,
    followed,
    nearest_distance,
    training_pixels,
    variety,
)
from infusion.world.judge import Judge, JudgeNetwork, Reading
from infusion.world.models import build_pipeline, build_text_encoder, build_unet
from infusion.world.picking import BEST, keep_best, save_best
from infusion.world.requests import Request, Wanted, unseen_scenes
from infusion.world.tokenizer import build_tokenizer
from tests.world.test_requests import reading


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_followed_pools_over_requests_of_one_and_of_two():
    one = Request("", "beach", "photo", (Wanted("dog", "red"),))
    two = Request("", "snow", "sketch", (Wanted("dog"), Wanted("cat")))
    readings = [
        Reading("beach", "photo", (reading("dog", "red"),)),
        Reading("snow", None, (reading("dog", "blue"),)),
        Reading("snow", "photo", (reading("dog"), reading("cat"))),
    ]
    found = followed([one, one, two], readings)
    assert {k: (e.value, e.n) for k, e in found.items()} == {
        "background": (0.5, 2), "style": (0.5, 2), "kind": (1, 2), "color1": (0.5, 2), "both": (1, 1),
    }  # fmt: skip


def test_variety_beside_the_worlds_shares():
    readings = [Reading("beach", "photo", (reading(color1="red", pattern="plain"),))] * 3
    readings += [Reading("beach", "photo", (reading(color1="blue", pattern=None),)), Reading("beach", "photo", ())]
    found = variety(readings)
    assert found["color1"]["shares"]["red"] == 0.75
    assert found["color1"]["distance"] == pytest.approx((0.65 + 0.15 + 8 * 0.1) / 2)
    assert (found["pattern"]["n"], found["pattern"]["distance"]) == (3, 0.75)
    alike = [sum(abs(triple.count(v) / 3 - 0.25) for v in range(4)) / 2 for triple in product(range(4), repeat=3)]
    assert found["pattern"]["by_chance"] == pytest.approx(np.mean(alike), abs=0.01)  # three draws, four equal shares
    assert found["accessory"]["missing"] == ["hat", "scarf", "star"]
    assert variety(readings[-1:])["color1"]["distance"] == 1  # nothing is told, nothing is as in the world


def test_the_ceiling_reads_the_true_scenes(pipe, monkeypatch):
    """With an autoencoder that loses nothing and a judge that knows the truth everything is right."""
    scenes = iter([scene for subjects, n in ((1, 4), (2, 3)) for scene, _ in unseen_scenes(n, 0, subjects)])
    monkeypatch.setattr(examination, "_coded", lambda pipe, drawn: list(drawn))

    class Knowing:
        def read(self, drawn):
            told = []
            for scene in drawn:
                assert scene == next(scenes)
                subjects = tuple(
                    reading(s.kind, s.color1, p.x, color2=s.color2, pattern=s.pattern, accessory=s.accessory)
                    for p in scene.subjects
                    if (s := p.subject)
                )
                told.append(Reading(scene.background, scene.style, subjects))
            return told

    found = ceiling(pipe, Knowing(), single=4, double=3)  # type: ignore[arg-type]
    assert {name for name, e in found.items() if e["value"] != 1} == set()


def test_distances_against_a_loop():
    rng = np.random.default_rng(0)
    pictures, training = (rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for n in (3, 7))
    found = nearest_distance(torch.from_numpy(pictures), training, block=3)
    small = [x.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)) / 255 for x in (pictures, training)]
    loop = [min(float(np.sqrt(((p - t) ** 2).mean())) for t in small[1]) for p in small[0]]
    assert found.tolist() == pytest.approx(loop, rel=1e-3)
    assert float(nearest_distance(torch.from_numpy(training[:1]), training)) == pytest.approx(0, abs=1e-3)


def test_a_base_is_examined(pipe):
    torch.manual_seed(0)
    record = examine_base(pipe, Judge(JudgeNetwork()), single=3, double=2, plain=4)
    assert record["pictures"] == 9
    assert record["followed"]["kind"]["n"] == 3
    assert record["followed"]["both"]["n"] == 2
    assert record["variety"].keys() == {"color1", "pattern", "accessory"}
    judge = Judge(JudgeNetwork())
    perfect = ceiling(pipe, judge, single=3, double=2)
    assert {k: e["n"] for k, e in perfect.items()} == {k: e["n"] for k, e in record["followed"].items()}
    again = draw(pipe, ["a dog", "a cat"], [1, 2], steps=2)
    assert torch.equal(again, draw(pipe, ["a dog", "a cat"], [1, 2], steps=2))
    assert again.shape == (2, 64, 64, 3)
    training = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    found = copying(pipe, [training[:2], training[2:]], count=2)
    assert found["generated"]["n"] == 2
    assert found["fresh"]["value"] > 0
    assert found["nearer"]["n"] == 2
    assert found["scenes"] == 5
    copied = draw(pipe, [r.prompt for _, r in unseen_scenes(2, 0)], range(10_000, 10_002)).numpy()
    found = copying(pipe, [training, copied], count=2)
    assert found["generated"]["value"] == pytest.approx(0, abs=1e-3)
    assert found["nearer"]["value"] == 1


def test_the_scenes_of_a_training_are_drawn_again(tmp_path):
    assert list(build_dataset(tmp_path / "a", 3, seed=4, workers=1)) == [3]
    again = training_pixels(tmp_path / "b", 3, 4, workers=1)
    assert np.array_equal(again, load_dataset(tmp_path / "a").pixels)


def test_the_score_weighs_what_is_asked_for_and_what_is_left_open(monkeypatch):
    drawn = []
    half = SimpleNamespace(value=0.5)
    monkeypatch.setattr(examination, "draw", lambda pipe, prompts, seeds: drawn.append(prompts))
    monkeypatch.setattr(
        examination, "followed", lambda requests, readings: dict.fromkeys((*picking.ONE, *picking.TWO), half)
    )
    varied = {name: {"distance": 0.2} for name in ("color1", "pattern", "accessory")}
    monkeypatch.setattr(examination, "variety", lambda readings: varied)
    judge = SimpleNamespace(read=lambda pictures: None)
    score = picking.judged(judge, None, None, None, count=90)  # type: ignore[arg-type]
    assert score == pytest.approx((8 * 0.5 + 3 * 0.8) / 11)
    assert [len(prompts) for prompts in drawn] == [90, 45, 90]
    assert all(" and " in prompt for prompt in drawn[1])
    assert len(set(drawn[2])) == 80  # every class in every background
    assert drawn[2][80:] == drawn[2][:10]


def test_the_better_checkpoint_is_kept(tmp_path):
    text, unet = build_text_encoder(build_tokenizer()), build_unet()
    parameter = next(unet.parameters())

    def score() -> float:
        return float(parameter.detach().flatten()[0])

    with torch.no_grad():
        parameter.flatten()[0] = 5.0
    assert keep_best(tmp_path, text, unet, score) == ({"last": 5.0}, None, 1.0)
    save_best(tmp_path, text, unet, 5.0, 200)
    for now, kept, step in ((7.0, 7.0, None), (3.0, 5.0, 200)):
        with torch.no_grad():
            parameter.flatten()[0] = now
        assert keep_best(tmp_path, text, unet, score) == ({"last": now, "best": 5.0}, step, 1.0)
        assert score() == kept


def test_something_between_may_be_kept(tmp_path):
    text, unet = build_text_encoder(build_tokenizer()), build_unet()
    begun = {"unet": deepcopy(unet.state_dict()), "text_encoder": deepcopy(text.state_dict())}
    one, other = next(unet.parameters()), next(text.parameters())
    before = one.detach().clone(), other.detach().clone()

    def score() -> float:  # highest halfway
        return -abs(float((one.detach() - before[0]).flatten()[0]) - 2.0)

    with torch.no_grad():
        one += 4.0
        other += 1.0
    picked = keep_best(tmp_path, text, unet, score, begun)
    assert (picked.step, picked.share) == (None, 0.5)
    assert {name: round(value, 4) for name, value in picked.scores.items()} == {
        "last": -2.0, "0 of the way": -2.0, "0.25 of the way": -1.0, "0.5 of the way": 0.0, "0.75 of the way": -1.0
    }  # fmt: skip
    assert torch.allclose(one, before[0] + 2.0)
    assert torch.allclose(other, before[1] + 0.5)
    best = deepcopy(begun["unet"])  # with a checkpoint that is better than the last weights, the way ends there
    next(iter(best.values())).add_(2.5)
    torch.save({"score": 0.0, "step": 7, "unet": best, "text_encoder": begun["text_encoder"]}, tmp_path / BEST)
    with torch.no_grad():
        one += 9.0
    picked = keep_best(tmp_path, text, unet, score, begun)
    assert (picked.step, picked.share) == (7, 0.75)
