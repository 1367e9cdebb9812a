"""Learning on a tiny random base: it lowers the loss, repeats itself exactly, and leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler
from PIL import Image

import infusion
from infusion.diagnosis import validation_loss
from infusion.errors import InfusionError, InfusionWarning
from infusion.fit import base_info
from infusion.lesson import prepare_lesson
from infusion.naive import naive_prediction
from infusion.photos import Photo, load_photos
from infusion.streams import cross_attention_layers, value_lengths
from infusion.training import LearnConfig, _fitting, learning, learning_together
from tests.conftest import latents, tiny_unet


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("two_streams", [True, False])
def test_learning_lowers_the_loss(pipe, photos, two_streams):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    concept = infusion.learn(
        pipe, lesson, "dog", "milo", LearnConfig(steps=25, batch=8, learning_rate=1.0, two_streams=two_streams)
    )
    before = validation_loss(pipe, lesson)
    after = validation_loss(pipe, lesson, concept.residuals, two_streams)
    assert sum(after.values()) < 0.98 * sum(before.values())


@pytest.mark.parametrize(("two_streams", "limit"), [(True, 1000), (True, 400), (False, 1000)])
def test_learning_equals_a_plain_loop_over_the_naive_method(pipe, photos, two_streams, limit):
    config = LearnConfig(
        steps=3, batch=2, learning_rate=0.05, max_timestep=limit, two_streams=two_streams, scheme="fp32"
    )
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    learned = infusion.learn(pipe, lesson, "dog", "milo", config).residuals
    unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    residuals = {path: torch.zeros(length, requires_grad=True) for path, length in value_lengths(unet).items()}
    optimizer = torch.optim.AdamW(residuals.values(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        draw = lesson.draw(2, generator, limit)
        states = draw.kwargs["encoder_hidden_states"]
        eps = naive_prediction(unet, draw.noisy, draw.timesteps, states, draw.plan, {"milo": residuals}, two_streams)
        optimizer.zero_grad()
        (draw.mask * (eps - draw.target)).square().mean().backward()
        optimizer.step()
    for path, residual in residuals.items():
        assert residual.abs().max() > 0.05
        assert torch.allclose(learned[path], residual, atol=1e-4), path


def test_the_same_seed_gives_the_same_bytes(pipe, photos, tmp_path):
    config = LearnConfig(steps=3, batch=2)
    paths = [infusion.learn(pipe, photos, "dog", "milo", config).save(tmp_path / f"{i}.safetensors") for i in range(2)]
    other = infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=3, batch=2, seed=1)).save(tmp_path / "other")
    assert paths[0].read_bytes() == paths[1].read_bytes() != other.read_bytes()


def test_what_a_file_tells_of_its_training(pipe, photos, tmp_path):
    folder = tmp_path / "secretname"
    folder.mkdir()
    photos[0].save(folder / "private.png")
    config = LearnConfig(steps=2, batch=2, layers=("mid", "up_blocks.0"))
    learned = infusion.learn(pipe, folder, "dog", "milo", config)
    assert learned.settings == {
        "steps": 2, "batch": 2, "learning_rate": 0.06, "max_timestep": 492, "strength": 1.0, "flip": True, "masked": True,
        "two_streams": True, "seed": 0, "layers": "mid up_blocks.0",
    }  # fmt: skip
    content = learned.to_bytes()
    assert not any(word in content for word in (b"secret", b"private", str(tmp_path).encode(), b"photo"))
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo", flip=False, masked=False)
    told = infusion.learn(pipe, lesson, "dog", "milo", LearnConfig(steps=1, batch=2)).settings
    assert (told["flip"], told["masked"]) == (False, False)
    for word, name in (("cat", "milo"), ("dog", "rex")):
        with pytest.raises(InfusionError, match="The lesson is of <milo>, a 'dog'"):
            infusion.learn(pipe, lesson, word, name)


@pytest.mark.parametrize("two_streams", [True, False])
def test_concepts_learned_side_by_side_are_those_learned_alone(pipe, photos, two_streams):
    config = LearnConfig(steps=4, batch=3, scheme="fp32", two_streams=two_streams, layers=("up_blocks", "mid"))
    lessons = [
        prepare_lesson(pipe, load_photos(photos), "dog", "milo"),
        prepare_lesson(pipe, load_photos(photos[:1]), "teddy bear", "bruno", templates=("a {} here",), flip=False),
        prepare_lesson(pipe, load_photos(photos[1:]), "dog", "rex", masked=False),
    ]
    for state in learning_together(pipe, lessons, config):
        together = state
    for lesson, beside in zip(lessons, together, strict=True):
        *_, alone = learning(pipe, lesson, lesson.word, lesson.name, config)
        assert beside.loss == pytest.approx(alone.loss, rel=1e-5)
        assert {**vars(beside.concept), "residuals": None} == {**vars(alone.concept), "residuals": None}
        assert list(beside.concept.residuals) == list(alone.concept.residuals)
        for path, residual in alone.concept.residuals.items():
            assert residual.abs().max() > 0.01
            torch.testing.assert_close(beside.concept.residuals[path], residual, rtol=1e-3, atol=1e-5)
    assert not pipe.unet._forward_pre_hooks


def test_lessons_side_by_side_that_cannot_be(pipe, photos):
    lessons = [prepare_lesson(pipe, load_photos(photos), "dog", name) for name in ("milo", "rex")]
    for wrong, said in (
        ([], "of nothing"),
        ([lessons[0]] * 2, "of <milo>, <milo>; give one at least, each of another"),
    ):
        with pytest.raises(InfusionError, match=said):
            next(learning_together(pipe, wrong))
    broken = dataclasses.replace(lessons[1], latents=lessons[1].latents * float("nan"))
    with pytest.raises(InfusionError, match="loss of <rex> is nan at step 1"):
        next(learning_together(pipe, [lessons[0], broken]))
    assert not pipe.unet._forward_pre_hooks


def test_gradient_checkpointing_learns_the_same(pipe, photos):
    config = LearnConfig(steps=2, batch=2, scheme="fp32")
    plain = infusion.learn(pipe, photos, "dog", "milo", config)
    pipe.unet.enable_gradient_checkpointing()
    assert infusion.learn(pipe, photos, "dog", "milo", config).to_bytes("fp32") == plain.to_bytes("fp32")


def test_the_weights_hash_knows_its_base(pipe, photos):
    learned = infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=1, batch=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfusionWarning)
        with infusion.attach(pipe, learned):
            pass
        assert base_info(pipe.to(torch.float16)) == learned.base
        with infusion.attach(pipe, learned):
            pass
    pipe.to(torch.float32)
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    with torch.no_grad():
        layer.to_v.weight[0, 0] += 0.1
    assert base_info(pipe).weights != learned.base.weights
    with pytest.warns(InfusionWarning, match="other weights"), infusion.attach(pipe, learned):
        pass


def test_a_scheme_changes_the_grid_and_not_the_learning(pipe, photos):
    fine, coarse = (
        infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=3, batch=2, scheme=s)) for s in ("fp32", "q6")
    )
    assert fine.on_grid().to_bytes() == coarse.to_bytes()
    assert fine.to_bytes("fp32") != coarse.to_bytes("fp32")
    with pytest.raises(InfusionError, match="scheme is 'int4'; use one of q6, fp16, fp32"):
        LearnConfig(scheme="int4")


def test_learning_and_drawing_below_a_timestep(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    draws = lesson.draw(400, torch.Generator().manual_seed(0), 30)
    assert sorted(set(draws.timesteps.tolist())) == list(range(30))
    assert lesson.draw(400, torch.Generator().manual_seed(0)).timesteps.max() > 900
    learned = lambda limit: infusion.learn(pipe, lesson, "dog", "milo", LearnConfig(steps=2, max_timestep=limit))  # noqa: E731
    assert [learned(limit).max_timestep for limit in (None, 30, 1000, 2000)] == [lesson.settled, 30, None, None]
    assert infusion.Concept.from_bytes(learned(30).to_bytes()).max_timestep == 30
    path = next(iter(cross_attention_layers(pipe.unet)))
    assert not torch.equal(learned(30).residuals[path], learned(1000).residuals[path])


def test_a_limit_beyond_all_timesteps_is_none(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo", masked=False)
    drawn = [lesson.draw(4, torch.Generator().manual_seed(0), limit) for limit in (None, 1000, 5000)]
    assert all(torch.equal(d.timesteps, drawn[0].timesteps) for d in drawn)


def test_the_learning_rate_follows_the_limit(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    given = (({}, 0.06), ({"max_timestep": 750}, 0.06), ({"max_timestep": 751}, 0.02), ({"learning_rate": 0.5}, 0.5))
    for settings, rate in given:
        concept = infusion.learn(pipe, lesson, "dog", "milo", LearnConfig(steps=1, batch=1, scheme="fp32", **settings))
        assert concept.settings["learning_rate"] == rate
        assert max(float(r.abs().max()) for r in concept.residuals.values()) == pytest.approx(rate, rel=1e-3)


def test_a_concept_holds_a_share_of_what_was_learned(pipe, photos):
    whole, part = (
        infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=3, batch=2, scheme="fp32", strength=s))
        for s in (1.0, 0.25)
    )
    assert all(torch.equal(part.residuals[path], 0.25 * learned) for path, learned in whole.residuals.items())
    with infusion.attach(pipe, whole, strength={"milo": 0.25}):
        expected = latents(pipe, "a photo of <milo>")
    with infusion.attach(pipe, part):
        assert torch.allclose(latents(pipe, "a photo of <milo>"), expected, atol=1e-4)


def test_learning_and_drawing_with_offloaded_weights(pipe, photos):
    config = LearnConfig(steps=2, batch=2)
    concept = infusion.learn(pipe, photos, "dog", "milo", config)
    with infusion.attach(pipe, concept):
        expected = latents(pipe, "a photo of <milo>")
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert pipe.unet.device.type == "meta"
    offloaded = infusion.learn(pipe, photos, "dog", "milo", config)
    assert all(torch.equal(offloaded.residuals[p], r) for p, r in concept.residuals.items())
    with infusion.attach(pipe, offloaded):
        assert torch.equal(latents(pipe, "a photo of <milo>"), expected)


def test_the_pipeline_is_as_before_also_after_an_early_stop(pipe, photos):
    before = latents(pipe, "a dog")
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    pipe.unet.train()
    for state in learning(pipe, photos, "dog", "milo", LearnConfig(steps=10, batch=2)):
        if state.step == 2:
            break
    del state
    assert pipe.unet.training
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    pipe.unet.eval()
    assert torch.equal(latents(pipe, "a dog"), before)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_what_fp32_learns(pipe, photos, dtype):
    config = LearnConfig(steps=10, batch=8, learning_rate=0.5)
    exact = infusion.learn(pipe, photos, "dog", "milo", config)
    half = infusion.learn(pipe.to(dtype), photos, "dog", "milo", config)
    a, b = (torch.cat(list(c.residuals.values())) for c in (exact, half))
    assert torch.cosine_similarity(a, b, dim=0) > 0.9


def test_a_loss_that_is_not_finite_stops_with_a_remedy(pipe, photos):
    pipe.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(InfusionError, match="loss of <milo> is nan at step 1; learn in fp32"):
        infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=2, batch=2))
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_gradients_that_are_never_finite_stop_with_a_remedy(pipe, photos, monkeypatch):
    """fp16 leaves such steps out, so that a concept of zeros would come back as learned."""
    monkeypatch.setattr(
        "infusion.training.row_losses", lambda prediction, _: (0 * prediction.float()).flatten(1).sum(1).sqrt()
    )
    with pytest.raises(InfusionError, match="gradients at step 17 are not finite in fp16"):
        infusion.learn(pipe.to(torch.float16), photos, "dog", "milo", LearnConfig(steps=20, batch=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_taken_in_parts_teach_the_same(pipe, photos, dtype):
    """Two concepts of five samples a step, ten rows, taken seven or three at a time."""
    pipe = pipe.to(dtype)
    lessons = [prepare_lesson(pipe, load_photos(photos[:n]), "dog", name) for n, name in ((1, "milo"), (3, "rex"))]
    config = LearnConfig(steps=3, batch=5, learning_rate=0.05, scheme="fp32")
    *_, whole = learning_together(pipe, lessons, config)
    for at_once in (7, 3):
        rows = []
        handle = pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))  # noqa: B023
        *_, parts = learning_together(pipe, lessons, config, at_once)
        handle.remove()
        assert max(rows) == at_once
        for a, b in zip(whole, parts, strict=True):
            assert b.loss == pytest.approx(a.loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
            for path, residual in a.concept.residuals.items():
                assert torch.allclose(
                    b.concept.residuals[path], residual, atol=1e-5 if dtype == torch.float32 else 2e-2
                )
    with pytest.raises(InfusionError, match="at_once is 0; it must be at least 1"):
        next(learning_together(pipe, lessons, config, 0))


def test_how_many_samples_go_through_a_base_at_once():
    sides = [16, 64, 96, 128]
    fitting = [_fitting(SimpleNamespace(config={"sample_size": side}), 8) for side in sides]  # type: ignore[arg-type]
    assert fitting == [8, 4, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_learned_is_told_as_it_was(pipe, photos, side):
    mask = Image.new("L", (24, 20))
    mask.paste(255, (0, 0, 12, 20) if side == "left" else (12, 0, 24, 20))
    given = [Photo(p, mask) for p in photos]
    settings = infusion.learn(pipe, given, "dog", "milo", LearnConfig(1, 2, flip=False, masked=False)).settings
    assert (settings["flip"], settings["masked"]) == (False, False)
    losses = [next(learning(pipe, given, "dog", "milo", LearnConfig(1, 8, masked=m))).loss for m in (True, False)]
    assert losses[0] != losses[1]


def test_layers_can_be_chosen(pipe, photos):
    concept = infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=1, batch=2, layers=("up_blocks",)))
    assert len(concept.residuals) == 4
    with pytest.raises(InfusionError, match="No cross-attention layer matches nothing"):
        infusion.learn(pipe, photos, "dog", "milo", LearnConfig(layers=("nothing",)))


def test_bad_settings(pipe, photos):
    for change, message in (
        ({"steps": 0}, "steps is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"max_timestep": 0}, "max_timestep is 0; it must be at least 1"),
        ({"strength": 0.0}, "strength is 0.0; it must lie above 0"),
        ({"strength": 1.5}, "strength is 1.5; it must lie above 0"),
    ):
        with pytest.raises(InfusionError, match=message):
            LearnConfig(**change)
    with pytest.raises(InfusionError, match="is no concept name"):
        infusion.learn(pipe, photos, "dog", "my dog")
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(InfusionError, match="predicts 'sample'"):
        infusion.learn(pipe, photos, "dog", "milo")


def test_settings_are_what_they_say_or_refused():
    assert LearnConfig(layers=["mid_block", "up_blocks"]).layers == ("mid_block", "up_blocks")
    assert LearnConfig(two_streams="False").two_streams is False  # as --set brings it
    for bad, message in (
        ({"layers": "mid_block"}, "layers is 'mid_block': input should be a valid tuple"),
        ({"steps": 2.5}, "steps is 2.5: input should be a valid integer"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': input should be a valid number"),
    ):
        with pytest.raises(InfusionError, match=message):
            LearnConfig(**bad)


def test_bases_of_another_kind_are_refused(pipe, photos):
    takes_more = copy.copy(pipe)
    takes_more.unet = tiny_unet(in_channels=9)
    with pytest.raises(InfusionError, match="takes 9 channels, its latents have 4"):
        infusion.learn(takes_more, photos, "dog", "milo")
    takes_more.unet = torch.nn.Linear(2, 2)
    with pytest.raises(InfusionError, match="draws with a Linear"):
        infusion.learn(takes_more, photos, "dog", "milo")
