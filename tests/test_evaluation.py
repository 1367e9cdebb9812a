"""Evaluation on a tiny base: known answers for known adapters, and a report that says them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from html import escape
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image, ImageOps

from infusion import evaluation
from infusion.adapters import ConceptAdapter
from infusion.errors import InfusionError
from infusion.evaluation import EvaluateConfig, evaluate, unrelated, verdict
from infusion.evaluation_report import write_report
from infusion.features import feature_figures
from infusion.generation import Picture
from infusion.judged import JudgedFigures
from infusion.lesson import encode_pictures
from infusion.methods.dreambooth import TunedUNet
from infusion.metrics.estimate import Estimate
from infusion.metrics.leaks import leak, pull
from infusion.photos import Photo
from infusion.schedulers import scheduler_for
from tests.conftest import latents, random_concept, tiny_unet

CONFIG = EvaluateConfig(
    ("a photo of {} on the beach", "{} in the snow"),
    ("a cat", "a dog in space"),
    seeds=2,
    other_seeds=2,
    steps=2,
    dimensions=2,
)


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    return [
        Photo(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)), Image.fromarray(mask))
        for _ in range(3)
    ]


def test_a_concept_forgets_nothing_and_a_tuned_unet_does(pipe, photos, tmp_path):
    before = latents(pipe, "a dog")
    concept = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", CONFIG)
    assert concept.figures.forgetting.score.value == 0
    assert concept.verdict[0].startswith("It forgets nothing")
    assert [p.prompt for p in concept.custom][::2] == ["a photo of <milo> on the beach", "<milo> in the snow"]
    assert [p.seed for p in concept.custom] == [p.seed for p in concept.base]
    assert concept.figures.pictures == 4
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tuned = evaluate(pipe, TunedUNet("a dog", unet), photos, "dog", CONFIG)
    assert tuned.figures.forgetting.eps.value > 1e-3
    assert list(tuned.figures.forgetting.eps_by_prompt) == ["a cat"]  # the other one holds the class word
    assert list(tuned.figures.generic.eps_by_prompt) == ["a photo of a dog in the city"]
    assert tuned.verdict[0].startswith("It forgets:")
    assert torch.equal(latents(pipe, "a dog"), before)

    page = write_report(tuned, tmp_path, "tiny", "tuned")
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["figures"]["forgetting"]["eps"]["value"] == tuned.figures.forgetting.eps.value
    assert escape(tuned.verdict[0]).replace("&#x27;", "&#39;") in page.read_text()
    assert page.read_text().count("data:image/png") == 3 + 3 * 2
    assert record["seconds"].keys() >= {"the adapter's pictures", "the base's pictures", "forgetting"}
    assert sum(record["seconds"].values()) > 0
    assert [told.split(":")[0] for told in record["left_out"]] == ["CLIP-I and CLIP-T", "DINO", "LPIPS"]


@pytest.mark.parametrize("kind", ["unet", "concept"])
def test_the_base_against_itself_is_no_different(pipe, photos, kind):
    empty = random_concept(pipe.unet, scale=0.0)
    unchanged = TunedUNet("a dog", copy.deepcopy(pipe.unet)) if kind == "unet" else ConceptAdapter("a <milo>", empty)
    same = evaluate(pipe, unchanged, photos, "dog", CONFIG).figures
    assert same.forgetting.eps.value == 0
    for term in (same.w2_mean, same.w2_covariance, same.w2_exact):
        assert (term.value, term.low, term.high, term.n) == (*[pytest.approx(0, abs=1e-6)] * 3, 4)
    assert same.background_above is not None
    above = (same.background_above.value, same.nearest_photo_above.value, same.variety_above.value)
    assert above == pytest.approx((0, 0, 0), abs=1e-6)


@pytest.mark.parametrize("own_class", [False, True])
def test_a_distilled_base_draws_by_its_own_scheduler(pipe, photos, own_class, monkeypatch):
    pipe.scheduler = scheduler_for(pipe, "lcm")
    if own_class:
        parts = pipe.components | {"unet": tiny_unet(time_cond_proj_dim=8)}
        pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
    taken = []
    step = LCMScheduler.step
    monkeypatch.setattr(LCMScheduler, "step", lambda self, *args, **keys: taken.append(1) or step(self, *args, **keys))
    found = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", CONFIG)
    assert len(taken) >= 2 * CONFIG.steps
    assert found.figures.forgetting.eps.value == 0


def test_photos_without_a_background_give_no_background_figure(pipe, photos):
    filled = [Photo(p.image, Image.new("L", (16, 16), 255)) for p in photos]
    figures = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), filled[:1], "dog", CONFIG).figures
    assert figures.background is None
    assert "cannot be told" in verdict(figures)[1]


@pytest.mark.parametrize("sizes", [[(16, 16)], [(40, 24), (9, 30), (300, 200)]])
def test_one_photo_and_photos_of_different_sizes(pipe, sizes):
    rng = np.random.default_rng(0)
    photos = [Photo(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))) for w, h in sizes]
    found = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", CONFIG)
    assert {p.size for p in found.lesson.pictures} == {found.custom[0].image.size}
    assert set(found.nearest) <= set(range(len(sizes)))
    assert found.figures.nearest_photo.n == 4


def test_verdicts(pipe, photos):
    figures = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", CONFIG).figures

    def told(**changes: object) -> tuple[str, ...]:
        return verdict(replace(figures, **changes))

    assert told(background_above=Estimate(0.2, 0.1, 0.3, 40))[1].startswith("It repeats its background")
    assert told(background_above=Estimate(0.0, -0.1, 0.02, 40))[1].startswith("It keeps to the backgrounds")
    unsure = told(background_above=Estimate(0.2, -0.1, 0.5, 40))[1]
    assert unsure.startswith("Whether it repeats its background cannot be told from 4 pictures (+0.2, between -0.1")
    poor = told(variety_base=Estimate(0.8, 0.7, 0.9, 9), variety_above=Estimate(-0.2, -0.3, -0.1, 9))
    assert poor[2] == "Its pictures of one prompt vary less than the base's (-25%)."
    same = told(variety_base=Estimate(0.8, 0.7, 0.9, 9), variety_above=Estimate(-0.01, -0.04, 0.1, 9))
    assert same[2] == "Its pictures of one prompt vary as the base's do (-1%)."
    more = told(variety_base=Estimate(0.8, 0.7, 0.9, 9), variety_above=Estimate(0.2, 0.1, 0.3, 9))
    assert more[2] == "Its pictures of one prompt vary more than the base's (+25%)."
    few = told(variety_base=Estimate(0.8, 0.7, 0.9, 9), variety_above=Estimate(-0.2, -0.5, 0.1, 9))
    assert "vary less than the base's cannot be told" in few[2]


def test_what_the_judge_sees_come_back_is_in_the_verdict(pipe, photos):
    figures = evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", CONFIG).figures
    shown = (["left"] * 15 + ["right"] * 5, ["right"] * 20)
    leaks = {"position": leak(*shown, ["right"] * 20, "left"), "style": leak(["a"] * 20, ["a"] * 20, ["b"] * 20, "a")}
    pulls = {"position": pull(*shown, [None] * 20, "right"), "style": pull(*shown, [None] * 20, "left")}
    said = verdict(replace(figures, judged=JudgedFigures(*[None] * 6, leaks, pulls, *[None] * 4)))
    assert said[2].startswith(
        "By the judge the photos' position comes back where another was asked for: in 75% of 20 such"
    )
    above = pulls["style"].above
    assert 0 < above.low < 0.75 < above.high < 1
    assert said[3] == (
        "By the judge the photos' style comes back where that was left open: in 75% of 20 such pictures, in 0% of the base's "
        f"({100 * above.low:.0f} to {100 * above.high:.0f} points more)."
    )
    assert len(said) == 5


def test_the_bases_pictures_are_drawn_once_for_a_class(pipe, photos, tmp_path):
    labels: list[str] = []
    told = lambda label, *_: labels.append(label)  # noqa: E731
    adapters = [ConceptAdapter("<milo>", random_concept(pipe.unet, seed=s)) for s in (1, 2)]
    first, second = (evaluate(pipe, a, photos, "dog", CONFIG, told, album=tmp_path) for a in adapters)
    assert labels.count("Drawing with the base") == CONFIG.steps
    assert [p.image.tobytes() for p in first.base] == [p.image.tobytes() for p in second.base]
    plain = evaluate(pipe, adapters[1], photos, "dog", CONFIG).figures
    assert plain == second.figures
    evaluate(pipe, adapters[1], photos, "cat", CONFIG, told, album=tmp_path)
    assert labels.count("Drawing with the base") == 2 * CONFIG.steps


def test_an_interrupted_evaluation_goes_on(pipe, photos, tmp_path, monkeypatch):
    real, drawn = evaluation.drawing, []

    def breaking(pipe, prompts, seeds, steps, guidance, batch, **more):
        for part in real(pipe, prompts, seeds, steps, guidance, 1, **more):
            if len(drawn) == 3:
                raise KeyboardInterrupt
            drawn.append(part[0].prompt)
            yield part

    monkeypatch.setattr(evaluation, "drawing", breaking)
    milo = ConceptAdapter("<milo>", random_concept(pipe.unet))
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, milo, photos, "dog", CONFIG, drawings=tmp_path)
    drawn.append("")  # no more breaking off
    evaluate(pipe, milo, photos, "dog", CONFIG, drawings=tmp_path)
    assert sum("<milo>" in prompt for prompt in drawn) == 4
    for other in (
        replace(milo, strength=0.5),
        replace(milo, two_streams=False),
        ConceptAdapter("<milo>", random_concept(pipe.unet, seed=1)),
    ):
        drawn[:] = [""] * 4
        evaluate(pipe, other, photos, "dog", CONFIG, drawings=tmp_path)
        assert sum("<milo>" in prompt for prompt in drawn) == 4


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InfusionError, match="seeds is 1"):
        EvaluateConfig(seeds=1)
    with pytest.raises(InfusionError, match="other_seeds is 1"):
        EvaluateConfig(other_seeds=1)
    with pytest.raises(InfusionError, match="none of these twice"):
        EvaluateConfig(others=("a cat", "a cat"))
    with pytest.raises(InfusionError, match="does not name the subject"):
        EvaluateConfig(prompts=("a dog", "a {}"))
    with pytest.raises(InfusionError, match="exactly once"):
        EvaluateConfig(prompts=("{} beside {}", "a {}"))


def test_others_that_all_name_the_class_are_refused_before_anything_is_drawn(pipe, photos, monkeypatch):
    monkeypatch.setattr("infusion.evaluation.drawing", lambda *_, **__: pytest.fail("drew"))
    with pytest.raises(InfusionError, match="All of others name the class 'dog'"):
        evaluate(pipe, TunedUNet("a dog", pipe.unet), photos, "dog", EvaluateConfig(others=("a dog in the snow",)))


def test_prompts_of_the_subjects_own_class_tell_nothing_of_forgetting():
    prompts = ("a photo of a cat on the beach", "two cars in the snow", "a house", "a catfish")
    assert unrelated(prompts, "Cat") == ["two cars in the snow", "a house", "a catfish"]
    assert unrelated(prompts, "kitten") == ["two cars in the snow", "a house", "a catfish"]  # a synonym of the world's
    assert unrelated(prompts, "car") == ["a photo of a cat on the beach", "a house", "a catfish"]
    assert unrelated(prompts, "violin") == list(prompts)


@pytest.fixture
def copying(pipe, photos, monkeypatch):
    """Evaluates an adapter whose every drawing is one photo, as it is or turned; the base's drawings are noise of their own. The photos show
    their subject in the left half."""
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    photos = [Photo(p.image, mask) for p in photos]
    noise = np.random.default_rng(7).integers(0, 255, (99, 16, 16, 3), dtype=np.uint8)

    def evaluated(turn, **more):
        def drawn(album, pipe, prompts, seeds, settings, draw):
            if "concept" in settings:
                return [Picture(turn(photos[1].image), p, s) for p, s in zip(prompts, seeds, strict=True)]
            return [Picture(Image.fromarray(noise[i]), p, i) for i, p in enumerate(prompts)]

        monkeypatch.setattr("infusion.evaluation.kept", drawn)
        config = replace(CONFIG, seeds=3)
        return evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), photos, "dog", config, **more)

    return evaluated


@pytest.mark.parametrize("turn", [lambda picture: picture, ImageOps.mirror])
def test_a_repeated_photo_is_found_also_in_the_mirror(copying, turn):
    found = copying(turn)
    figures = found.figures
    assert found.nearest == [1] * 6
    assert figures.nearest_photo.value == pytest.approx(1, abs=1e-6)
    assert figures.background is not None
    assert figures.background.value == pytest.approx(1, abs=1e-6)
    assert figures.background_above is not None
    assert figures.background_above.low > 0.1  # above the base's, not below
    assert figures.nearest_photo_above.low > 0.1
    assert found.verdict[1].startswith("It repeats its background")


def test_variety_is_that_of_one_prompts_pictures_beside_the_bases(copying, pipe):
    found = copying(lambda picture: picture)
    theirs = encode_pictures(pipe, [p.image for p in found.base]).double().flatten(1)
    pairs = [(theirs[i] - theirs[j]).norm() for k in (0, 3) for i, j in combinations(range(k, k + 3), 2)]
    assert found.figures.variety.value == pytest.approx(0, abs=1e-6)
    assert found.figures.variety_base.value == pytest.approx(float(sum(pairs) / 6), rel=1e-5)
    assert found.figures.variety_above.value == pytest.approx(-float(sum(pairs) / 6), rel=1e-5)


class Colour:
    """A feature space: the mean colour."""

    name = "colour"
    model = None

    def pictures(self, images):
        return torch.tensor([np.asarray(i, np.float32).mean((0, 1)).tolist() for i in images])

    def texts(self, texts):
        return None


def test_figures_in_a_feature_space_are_the_adapters_beside_the_bases(copying, tmp_path):
    found = copying(lambda picture: picture, spaces=[Colour()])
    assert found.figures.features["colour"].subject.value > 0.9
    ours, base = ([p.image for p in part] for part in (found.custom, found.base))
    again = feature_figures(Colour(), ours, base, list(found.lesson.pictures), [p.prompt for p in found.base], ([ours[0]] * 2, base[-2:]), 3)  # fmt: skip
    for name in ("subject", "subject_above", "diversity", "diversity_base"):
        assert getattr(found.figures.features["colour"], name) == getattr(again, name), name
    checkup = {
        "step": 5, "loss": 0.1, "repeats": {"background": {"above": 0.2}}, "forgetting": 0.0, "variety": 1.0, "pull": {"above": 0.1},
    }  # fmt: skip
    page = write_report(found, tmp_path, "tiny", "milo", [checkup, checkup | {"step": 10}]).read_text()
    assert page.count("<svg") == 5
    assert "colour: like the photos" in page


def test_a_photo_that_is_refused_is_refused_before_anything_is_drawn(pipe, photos, monkeypatch):
    monkeypatch.setattr("infusion.evaluation.drawing", lambda *_, **__: pytest.fail("drew"))
    outside = Image.new("L", (40, 16))
    outside.paste(255, (0, 0, 8, 16))
    wide = Photo(Image.new("RGB", (40, 16)), outside)
    with pytest.raises(InfusionError, match="shows nothing of the subject in the photo's centre square"):
        evaluate(pipe, ConceptAdapter("<milo>", random_concept(pipe.unet)), [wide], "dog", CONFIG)
