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
from diffusers import AutoencoderTiny, DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import infusion
from infusion.diagnosis import validation_loss
from infusion.errors import InfusionError, InfusionWarning
from infusion.evaluation import evaluate
from infusion.fit import base_info
from infusion.lesson import TEMPLATES, attention_masks, prepare_lesson
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.interface import rebuilt
from infusion.naive import naive_prediction
from infusion.photos import Photo, load_photos
from infusion.steering import _Watch
from infusion.streams import cross_attention_layers, value_lengths
from infusion.training import LearnConfig, learning, learning_together, masked_loss
from tests.conftest import latents, random_concept, tiny_unet


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


def test_many_photos_are_masked_a_few_at_a_time(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo", masked=False)
    one = [
        dataclasses.replace(lesson, latents=z[None], masks=m[None])
        for z, m in zip(lesson.latents, lesson.masks, strict=True)
    ]
    together, apart = (attention_masks(lesson, pipe.unet, batch=b) for b in (16, 1))
    assert together.shape == lesson.masks.shape
    assert torch.equal(apart, torch.cat([attention_masks(x, pipe.unet) for x in one]))


def test_a_tiny_autoencoder_and_bases_of_other_noise(pipe, photos):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    lesson = prepare_lesson(rebuilt(pipe, vae=tiny), load_photos(photos), "dog", "milo")
    assert lesson.latents.shape == prepare_lesson(pipe, load_photos(photos), "dog", "milo").latents.shape
    for other in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(InfusionError, match=f"draws with {type(other).__name__}"):
            prepare_lesson(rebuilt(pipe, scheduler=other), load_photos(photos), "dog", "milo")
        with pytest.raises(InfusionError, match=f"draws with {type(other).__name__}"):
            evaluate(rebuilt(pipe, scheduler=other), ConceptAdapter("a <milo>", random_concept(pipe.unet)), [], "dog")


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


def test_larger_latents_are_settled_under_more_noise(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "milo")
    noise = lesson.noise.alphas_cumprod.reciprocal().sub(1).sqrt()
    wide = dataclasses.replace(lesson, latents=torch.zeros(1, 4, 16, 16))
    at = [float(noise[part.settled - 1]) for part in (lesson, wide)]
    assert at[1] == pytest.approx(2 * at[0], rel=0.01)
    assert dataclasses.replace(lesson, latents=torch.zeros(1, 4, 400, 400)).settled == 1000


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


def test_layers_can_be_chosen(pipe, photos):
    concept = infusion.learn(pipe, photos, "dog", "milo", LearnConfig(steps=1, batch=2, layers=("up_blocks",)))
    assert len(concept.residuals) == 4
    with pytest.raises(InfusionError, match="No cross-attention layer matches nothing"):
        infusion.learn(pipe, photos, "dog", "milo", LearnConfig(layers=("nothing",)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_and_masks(pipe, photos, prediction_type):
    pipe.scheduler = DDIMScheduler(prediction_type=prediction_type)
    half = Image.new("L", (24, 20), 0)
    half.paste(255, (0, 0, 12, 20))
    lesson = prepare_lesson(pipe, [Photo(photos[0], half)], "dog", "milo")
    assert lesson.masks.shape == (2, 8, 8)
    assert torch.equal(lesson.masks[0].flip(-1), lesson.masks[1])
    assert lesson.masks[0, :, 0].min() == 1.0
    assert lesson.masks[0, :, -1].max() == 0.0
    draw = lesson.draw(4, torch.Generator().manual_seed(0))
    alphas = lesson.noise.alphas_cumprod[draw.timesteps][:, None, None, None]
    if prediction_type == "epsilon":
        clean = (draw.noisy - (1 - alphas).sqrt() * draw.target) / alphas.sqrt()
    else:
        clean = alphas.sqrt() * draw.noisy - (1 - alphas).sqrt() * draw.target
    distance = (clean[:, None] - lesson.latents[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert distance.max() < 1e-2
    prediction = torch.randn(draw.target.shape)
    loop = sum(
        float(((draw.mask[b, 0] * prediction[b, c] - draw.mask[b, 0] * draw.target[b, c]) ** 2).sum())
        for b in range(4)
        for c in range(4)
    )
    assert float(masked_loss(prediction, draw)) == pytest.approx(loop / prediction.numel(), rel=1e-4)


def test_masks_found_by_attention(pipe, photos):
    lesson = prepare_lesson(pipe, load_photos(photos), "teddy bear", "ted", masked=False)
    masks = attention_masks(lesson, pipe.unet)
    assert masks.shape == (6, 8, 8)
    assert masks.min() >= 0
    assert torch.allclose(masks.amax(dim=(1, 2)), torch.ones(6))
    assert len(lesson.texts.states) == len(TEMPLATES)
    assert all(len(m[0].positions) == 2 for m in lesson.texts.mentions)


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


def test_a_mask_outside_the_centre_square_is_told(pipe):
    mask = Image.new("L", (120, 40))
    mask.paste(255, (0, 0, 20, 40))
    photos = [Photo(Image.new("RGB", (120, 40)), mask, "dog.png")]
    with pytest.raises(InfusionError, match=r"'dog\.png' shows nothing of the subject in the photo's centre square"):
        prepare_lesson(pipe, photos, "dog", "milo")
    with pytest.raises(InfusionError, match="mask of photo 1 shows nothing"):
        prepare_lesson(pipe, load_photos([Image.new("RGBA", (40, 40))]), "dog", "milo")


def test_a_photo_smaller_than_the_base_is_told_of(pipe):
    side = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    small = Photo(Image.new("RGB", (side - 4, 40)), name="a.png")
    with pytest.warns(InfusionWarning, match=rf"'a\.png' is {side - 4}x40, smaller than the base's {side} pixels"):
        prepare_lesson(pipe, [Photo(Image.new("RGB", (side, side))), small], "dog", "milo")


def test_bases_of_another_kind_are_refused(pipe, photos):
    takes_more = copy.copy(pipe)
    takes_more.unet = tiny_unet(in_channels=9)
    with pytest.raises(InfusionError, match="takes 9 channels, its latents have 4"):
        infusion.learn(takes_more, photos, "dog", "milo")
    takes_more.unet = torch.nn.Linear(2, 2)
    with pytest.raises(InfusionError, match="draws with a Linear"):
        infusion.learn(takes_more, photos, "dog", "milo")


def test_xl_is_told_each_photos_size_and_crop(xl):
    """The base's side is 16 pixels. Every pixel of the photos tells its column and row."""

    def photo(width, height):
        rows, columns = np.mgrid[:height, :width]
        return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))

    photos = [photo(24, 16), photo(16, 40), photo(96, 48), photo(8, 8)]
    with pytest.warns(InfusionWarning, match="smaller than the base's 16"):
        lesson = prepare_lesson(xl, load_photos(photos), "dog", "milo")
    told = [[16, 24, 0, 4, 16, 16], [40, 16, 12, 0, 16, 16], [48, 96, 0, 8, 16, 16], [8, 8, 0, 0, 16, 16]]
    for picture, (_, _, top, left, *_) in zip(lesson.pictures[:2], told, strict=False):  # those that are not scaled
        assert picture.getpixel((0, 0)) == (left, top, 0)
    assert lesson.sizes.tolist() == [*told, *told]
    seen = []
    xl.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["added_cond_kwargs"]["time_ids"].tolist())),
        with_kwargs=True,
    )
    infusion.learn(xl, lesson, "dog", "milo", LearnConfig(steps=2, batch=4, max_timestep=1))
    assert len(seen) == 4
    for noisy, ids in seen:  # at the first timestep the latents are hardly noisy, so that each tells its photo
        nearest = torch.cdist(noisy.flatten(1), lesson.latents.flatten(1)).argmin(1)
        assert ids == [lesson.sizes[i].tolist() for i in nearest]
    seen.clear()
    assert attention_masks(lesson, xl.unet, timesteps=(300,), batch=3).shape == (8, 8, 8)
    assert [row for _, ids in seen for row in ids] == [*told, *told]


def test_pictures_that_are_no_photos_have_the_bases_size(xl, photos):
    lesson = prepare_lesson(xl, load_photos(photos), "dog", "milo")
    seen = []
    xl.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    _Watch._places(SimpleNamespace(lesson=lesson, pipe=xl), torch.zeros(7, 4, 8, 8))  # type: ignore[arg-type]
    assert seen[0] == [[16, 16, 0, 0, 16, 16]] * 7
