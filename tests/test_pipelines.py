"""Stock pipelines with concepts attached: what changes, what must not, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import types
import warnings
import weakref

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import infusion
from infusion.concept import BaseInfo
from infusion.errors import InfusionError, InfusionWarning
from infusion.lesson import prepare_lesson
from infusion.methods.dreambooth import DreamBoothConfig, dreambooth
from infusion.methods.interface import rebuilt
from infusion.photos import load_photos
from infusion.pipelines import _stock_register
from infusion.streams import Streams
from infusion.training import LearnConfig
from tests.conftest import latents, naive_latents, random_concept, tiny_unet

PROMPTS = ["a dog on the beach", "a dog on the beach", "a teddy bear in the snow"]


@pytest.fixture
def milo(pipe):
    return random_concept(pipe.unet, "milo", "dog", seed=1)


@pytest.fixture
def rex(pipe):
    return random_concept(pipe.unet, "rex", "dog", seed=2)


def test_calls_without_a_name_are_the_bases_bit_for_bit(pipe, milo):
    before = latents(pipe, PROMPTS)
    with infusion.attach(pipe, milo):
        latents(pipe, "a <milo>")
        assert torch.equal(latents(pipe, PROMPTS), before)
    assert torch.equal(latents(pipe, PROMPTS), before)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
@pytest.mark.parametrize("two_streams", [True, False])
def test_an_empty_residual_is_the_base_through_the_full_path(pipe, scale, two_streams):
    before = latents(pipe, "a dog on the beach")
    empty = random_concept(pipe.unet, scale=scale)
    with infusion.attach(pipe, empty, two_streams=two_streams):
        after = latents(pipe, "a <milo> on the beach")
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_only_the_rows_that_name_a_concept_change(pipe, milo):
    before = latents(pipe, PROMPTS)
    with infusion.attach(pipe, milo):
        after = latents(pipe, [PROMPTS[0], "a <milo> on the beach", PROMPTS[2]])
    change = (after - before).abs().amax(dim=(1, 2, 3))
    assert change[1] > 1e-2
    assert change[[0, 2]].max() < 1e-4 * before.abs().max()


def test_two_dogs_of_one_text_are_told_apart(pipe, milo, rex):
    prompts = ["a <milo> on the beach", "a <rex> on the beach", "a <milo:0.5> on the beach"]
    alone = []
    with infusion.attach(pipe, milo, rex):
        for i, prompt in enumerate(prompts):
            alone.append(
                latents(pipe, prompt, negative_prompt="a dog on the beach", generator=torch.Generator().manual_seed(i))
            )
        together = latents(pipe, prompts, negative_prompt=["a dog on the beach"] * 3)
    assert (torch.cat(alone) - together).abs().max() < 1e-4 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-2
    assert (together[0] - together[2]).abs().max() > 1e-2


def test_strength_by_prompt_and_by_argument_multiply(pipe, milo):
    with infusion.attach(pipe, milo, strength={"milo": 0.5}):
        both = latents(pipe, "a <milo:0.5> here")
    with infusion.attach(pipe, milo):
        quarter = latents(pipe, "a <milo:0.25> here")
    assert torch.allclose(both, quarter, atol=1e-5)


def test_a_limited_concept_leaves_early_steps_to_the_base(pipe, milo):
    seen: dict[str, list] = {"a dog": [], "a <milo>": []}

    def drawn(prompt, limit):
        concept = dataclasses.replace(milo, settings={"max_timestep": limit})
        steps = seen[prompt] = []
        keep = lambda p, i, t, k: steps.append((int(t), k["latents"])) or {}  # noqa: E731
        with infusion.attach(pipe, concept):
            return pipe(prompt, generator=torch.Generator().manual_seed(1), num_inference_steps=6, output_type="latent",
                        callback_on_step_end=keep).images  # fmt: skip

    base = drawn("a dog", 400)
    with pytest.warns(InfusionWarning, match="no step of the drawing lies below"):  # the last timestep is 1
        assert torch.equal(drawn("a <milo>", 1), base)
    whole = drawn("a <milo>", 1000)
    part = drawn("a <milo>", 400)
    early = [torch.equal(a, b) for (t, a), (_, b) in zip(seen["a dog"], seen["a <milo>"], strict=True) if t >= 400]
    late = [torch.equal(a, b) for (t, a), (_, b) in zip(seen["a dog"], seen["a <milo>"], strict=True) if t < 400]
    assert (set(early), set(late)) == ({True}, {False})
    assert not torch.equal(part, whole)


def test_an_inner_attachment_brings_its_own_limit(pipe, milo):
    limited = dataclasses.replace(milo, settings={"max_timestep": 300})
    with infusion.attach(pipe, milo):
        whole = latents(pipe, "a <milo>")
        with infusion.attach(pipe, limited) as inner:
            assert inner.streams.limits == {"milo": 300}
            assert not torch.equal(latents(pipe, "a <milo>"), whole)
    with infusion.attach(pipe, limited), infusion.attach(pipe, milo) as inner:
        assert inner.streams.limits == {}
        assert torch.equal(latents(pipe, "a <milo>"), whole)


def test_several_images_per_prompt(pipe, milo):
    with infusion.attach(pipe, milo):
        four = latents(pipe, ["a <milo> here", "a cat"], num_images_per_prompt=2)
        generator = [torch.Generator().manual_seed(i) for i in (0, 1)]
        two = latents(pipe, ["a <milo> here"] * 2, generator=generator)
    assert torch.allclose(four[:2], two, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_schedulers_and_guidance_equal_the_method_written_out(pipe, milo, guidance_scale, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 3}
    naive = naive_latents(pipe, milo, "a <milo> in the snow", **options)
    with infusion.attach(pipe, milo):
        ours = latents(pipe, "a <milo> in the snow", **options)
    assert (ours - latents(pipe, "a dog in the snow", **options)).abs().max() > 1e-3
    assert (ours - naive).abs().max() < 1e-4 * naive.abs().max()


@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("two_streams", [True, False])
def test_streams_are_as_the_innermost_attachment_says(pipe, milo, rex, outer, two_streams):
    naive = naive_latents(pipe, milo, "a <milo> here", two_streams)
    with contextlib.ExitStack() as stack:
        if outer is not None:
            stack.enter_context(infusion.attach(pipe, rex, two_streams=outer))
        stack.enter_context(infusion.attach(pipe, milo, two_streams=two_streams))
        ours = latents(pipe, "a <milo> here")
    assert (ours - naive).abs().max() < 1e-4 * naive.abs().max()
    assert (ours - naive_latents(pipe, milo, "a <milo> here", not two_streams)).abs().max() > 1e-3


def test_attaching_elsewhere_goes_on_after_one_is_detached(pipe, milo):
    """Siblings are learned of by a process-wide hook; it stays as long as anything is attached."""
    other = copy.deepcopy(pipe)
    with infusion.attach(pipe, milo):
        with infusion.attach(other, milo):
            pass
        sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert infusion.encode(sibling, "a <milo>")
    assert "encode_prompt" not in vars(StableDiffusionImg2ImgPipeline.from_pipe(pipe))


def test_guidance_switched_off_in_a_callback(pipe, milo):
    def off(pipe, step, timestep, kwargs):
        if step == 0:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return kwargs

    options = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "num_inference_steps": 3,
    }
    before = latents(pipe, "a dog", **options)
    with infusion.attach(pipe, milo):
        after = latents(pipe, "a <milo>", **options)
        empty = latents(pipe, "a <milo:0>", **options)
    assert (after - before).abs().max() > 1e-3
    assert (empty - before).abs().max() < 1e-5 * before.abs().max()


def test_siblings_made_before_and_inside(pipe, milo):
    image = torch.rand(1, 3, 16, 16)

    def draw(sibling, prompt):
        return sibling(
            prompt, image=image, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images

    earlier = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    with infusion.attach(pipe, milo):
        later = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
        drawn = [draw(p, "a <milo>") for p in (earlier, later)]
    base = draw(earlier, "a dog")
    assert torch.equal(*drawn)
    assert (drawn[0] - base).abs().max() > 1e-3
    for p in (earlier, later, pipe):
        assert not vars(p).keys() & {"encode_prompt", "maybe_free_model_hooks"}
    assert DiffusionPipeline.register_modules is _stock_register


def test_a_sibling_of_one_request_is_let_go_of(pipe, milo):
    with infusion.attach(pipe, milo):
        sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
        assert "encode_prompt" in vars(sibling)
        gone = weakref.ref(sibling)
        del sibling
        gc.collect()
        assert gone() is None
        assert not torch.equal(latents(pipe, "a <milo>"), latents(pipe, "a dog"))
    assert not vars(pipe).keys() & {"encode_prompt", "maybe_free_model_hooks"}


def test_encoded_prompts_keep_no_gradients(pipe, milo):
    prompts = ["a <milo> here", "a cat"]
    with infusion.attach(pipe, milo):
        one = infusion.encode(pipe, prompts, negative_prompt="blurry")  # one for all, as diffusers' XL takes it
        each = infusion.encode(pipe, prompts, negative_prompt=["blurry"] * 2)
        assert not any(states.requires_grad for states in one.values())
        assert all(torch.equal(states, each[name]) for name, states in one.items())


def test_controlnet_and_inpainting(pipe, milo):
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    control.controlnet_cond_embedding.conv_out.weight.data.normal_()
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        block.weight.data.normal_(std=0.1)
    image, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    guided = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control, torch_dtype=torch.float32)
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe, torch_dtype=torch.float32)

    def draw(pipeline, prompts, **kwargs):
        generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", "width": 16, "height": 16}
        return pipeline(prompts, **options, **kwargs).images

    for pipeline, kwargs in ((guided, {"image": image}), (inpaint, {"image": image, "mask_image": mask})):
        pipeline.set_progress_bar_config(disable=True)
        base = draw(pipeline, ["a dog", "a cat"], **kwargs)
        with infusion.attach(pipeline, milo):
            assert torch.equal(draw(pipeline, ["a dog", "a cat"], **kwargs), base)
            after = draw(pipeline, ["a <milo>", "a cat"], **kwargs)
            empty = draw(pipeline, ["a <milo:0>", "a cat"], **kwargs)
        assert (after[0] - base[0]).abs().max() > 1e-3
        assert (after[1] - base[1]).abs().max() < 1e-4 * base.abs().max()
        assert (empty - base).abs().max() < 1e-4 * base.abs().max()


def test_guidance_with_more_rows_is_refused(pipe, milo):
    pag = StableDiffusionPAGPipeline.from_pipe(pipe, torch_dtype=torch.float32, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)
    with infusion.attach(pag, milo), pytest.raises(InfusionError, match="switch off perturbed-attention"):
        pag("a <milo>", num_inference_steps=1, output_type="latent", pag_scale=2.0)


def test_two_rows_a_picture_without_guidance_are_refused(pipe, milo):
    """Perturbed attention alone brings the conditional rows twice; the first would pass for the unconditional one."""
    pag = StableDiffusionPAGPipeline.from_pipe(pipe, torch_dtype=torch.float32, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)
    with infusion.attach(pag, milo), pytest.raises(InfusionError, match="2 rows for 1 pictures"):
        pag("a <milo>", num_inference_steps=1, output_type="latent", pag_scale=2.0, guidance_scale=0.0)


@pytest.mark.parametrize("sibling", [True, False])
def test_a_call_inside_a_call_has_a_plan_of_its_own(pipe, milo, rex, sibling):
    other = rebuilt(pipe) if sibling else pipe
    schedulers = [copy.deepcopy(pipe.scheduler) for _ in range(2)]
    inner = []

    def draw_another(outer, step, timestep, kwargs):
        other.scheduler = schedulers[1]
        inner.append(latents(other, "a <rex> here" if step == 0 else "a dog here"))
        outer.scheduler = schedulers[0]
        return kwargs

    with infusion.attach(pipe, milo, rex):
        pipe.scheduler = schedulers[0]
        expected = latents(pipe, "a <milo> here", num_inference_steps=3)
        drawn = latents(pipe, "a <milo> here", num_inference_steps=3, callback_on_step_end=draw_another)
        assert torch.equal(drawn, expected)
        other.scheduler = schedulers[1]
        assert torch.equal(inner[0], latents(other, "a <rex> here"))
        assert torch.equal(inner[1], latents(other, "a dog here"))


def test_a_concept_named_in_the_last_callback_leaves_the_outer_call_right(pipe, milo, rex):
    other = rebuilt(pipe, scheduler=copy.deepcopy(pipe.scheduler))

    def last(outer, step, timestep, kwargs):
        if step == 1:
            latents(other, "a <rex> there")
        return kwargs

    with infusion.attach(pipe, milo, rex):
        assert torch.equal(latents(pipe, "a <milo> here", callback_on_step_end=last), latents(pipe, "a <milo> here"))


def test_attaching_and_calls_that_never_end_inside_a_call(pipe, milo, rex):
    """Some of SDXL's pipelines return latents without the last of a call's steps."""
    other = rebuilt(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    drawn = []

    def inner(outer, step, timestep, kwargs):
        if step == 0:
            with infusion.attach(other, rex):
                other.maybe_free_model_hooks = lambda: None
                drawn.append([latents(other, text) for text in ("a <rex> there", "a dog there")])
        return kwargs

    base = latents(pipe, "a dog there")
    with infusion.attach(pipe, milo):
        expected = latents(pipe, "a <milo> here", num_inference_steps=3)
        assert torch.equal(latents(pipe, "a <milo> here", num_inference_steps=3, callback_on_step_end=inner), expected)
    assert torch.equal(drawn[0][1], base)
    assert (drawn[0][0] - base).abs().max() > 1e-3


def test_a_call_of_the_unet_after_the_pipelines_is_the_bases(pipe, milo):
    states = pipe.encode_prompt("a dog here", "cpu", 1, False)[0]
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = pipe.unet(sample, 5, states).sample
        with infusion.attach(pipe, milo):
            latents(pipe, "a <milo> here")
            assert torch.equal(pipe.unet(sample, 5, states).sample, base)


def test_a_concept_that_no_call_carried_is_an_error(pipe, milo):
    with infusion.attach(pipe, milo):
        stock = pipe.encode_prompt
        pipe.encode_prompt = lambda *args, **kwargs: tuple(
            None if states is None else states + 1 for states in stock(*args, **kwargs)
        )
        with pytest.raises(InfusionError, match="<milo> was in the prompt, but no UNet call"):
            latents(pipe, "a <milo>")
        latents(pipe, "a dog")
        pipe.encode_prompt = stock


@pytest.mark.parametrize(
    ("slip", "told"), [("a<rex> there", "reads 'adog'"), ("a (<rex>:1.3) there", "write <rex:1.3>")]
)
def test_a_slip_in_a_prompt_is_told_once(xl, slip, told):
    with infusion.attach(xl, random_concept(xl.unet, "rex")):
        for given in ({}, {"prompt_2": [slip, "a cat"]}):
            with pytest.warns(InfusionWarning) as heard:
                latents(xl, [slip, "a cat"], **given)
            assert [told in str(w.message) for w in heard] == [True]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents(xl, "a <rex:1.3> there")


def test_embeddings_by_the_pipelines_own_method_and_of_what_is_detached(pipe, milo, rex):
    with infusion.attach(pipe, milo):
        expected = latents(pipe, "a <milo> here")
        states, negative = pipe.encode_prompt("a <milo> here", "cpu", 1, True)
        given = {"prompt_embeds": states, "negative_prompt_embeds": negative}
        assert torch.equal(latents(pipe, None, **given), expected)
        with infusion.attach(pipe, rex):
            states = infusion.encode(pipe, "a <rex> here")
        with pytest.raises(InfusionError, match="<rex>, which is detached"):
            latents(pipe, None, **states)


def test_a_copy_of_embeddings_is_drawn_without_the_concept_and_said_so(pipe, milo):
    with infusion.attach(pipe, milo):
        states = infusion.encode(pipe, "a <milo> here")
        plain = latents(pipe, "a dog here")
        copied = {**states, "prompt_embeds": states["prompt_embeds"].clone()}
        with pytest.warns(infusion.InfusionWarning, match="hold states encoded with <milo>"):
            assert torch.equal(latents(pipe, None, **copied), plain)
        two = infusion.encode(pipe, ["a cat here", "a <milo> here"])
        longer = {name: torch.cat([s, s], 1) for name, s in states.items()}
        for some in ({name: s[1:] for name, s in two.items()}, longer):
            with pytest.warns(infusion.InfusionWarning, match="hold states encoded with <milo>"):
                latents(pipe, None, **some)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not torch.equal(latents(pipe, None, **states), plain)
            latents(pipe, None, **infusion.encode(pipe, "a cat here"))
            latents(pipe, None, **infusion.encode(pipe, "a dog here"))  # the class word's states, and meant so
            latents(pipe, None, **{name: s[:1] for name, s in two.items()})


def test_embeddings_made_elsewhere_are_told_of(pipe, milo, rex):
    """They carry no concept, whatever they were made from."""
    other = pipe.encode_prompt("a cat here", "cpu", 1, True)[0]
    with infusion.attach(pipe, milo, rex):
        encoded = infusion.encode(pipe, ["a cat here", "a <milo> here"], negative_prompt=["a dog", "a cat"])
        negative = {"negative_prompt_embeds": encoded["negative_prompt_embeds"][:1]}
        for strange in (other * 0.9, torch.cat([other, other], 1) * 0.9):
            with pytest.warns(InfusionWarning) as heard:
                latents(pipe, None, prompt_embeds=strange, negative_prompt_embeds=strange.flip(1))
            (said,) = heard
            assert "made elsewhere and carry no concept, so they are drawn without <milo> and <rex>" in str(
                said.message
            )
            assert "infusion.encode(pipe, prompt)" in str(said.message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents(pipe, None, **encoded, generator=None)
            latents(pipe, None, prompt_embeds=encoded["prompt_embeds"][:1].clone(), **negative)  # its cat alone
            latents(pipe, None, prompt_embeds=other.clone(), **negative)  # the same cat
            latents(pipe, "a <milo> here", negative_prompt_embeds=other * 0.9)
            latents(pipe, "a cat here", negative_prompt_embeds=other * 0.9)
            latents(pipe, None, prompt_embeds=pipe.encode_prompt("a cat", "cpu", 1, False)[0], guidance_scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, None, prompt_embeds=other * 0.9, **negative)  # nothing is attached


def test_embeddings_outlive_the_attachment_that_encoded_them(pipe, milo):
    with infusion.attach(pipe, milo):
        states, expected = infusion.encode(pipe, "a <milo> here"), latents(pipe, "a <milo> here")
        weak = latents(pipe, "a <milo:0.25> here")
    with infusion.attach(pipe, milo):
        assert torch.equal(latents(pipe, None, **states), expected)
    with infusion.attach(pipe, milo, strength={"milo": 0.25}):
        assert torch.equal(latents(pipe, None, **states), weak)
    other = dataclasses.replace(milo, word="cat")
    with infusion.attach(pipe, other), pytest.raises(InfusionError, match="<milo> for 'dog', which stands for 'cat'"):
        latents(pipe, None, **states)


def test_a_callback_that_changes_the_embeddings_is_told_of(pipe, milo):
    def fade(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}

    given = {"callback_on_step_end": fade, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with infusion.attach(pipe, milo):
        with pytest.warns(infusion.InfusionWarning, match="<milo> was in the prompt, but some UNet calls"):
            latents(pipe, "a <milo> here", **given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents(pipe, "a dog here", **given)
            latents(pipe, "a <milo> here")


def test_an_ip_adapter_beside_a_concept(pipe, milo):
    """The pictures' part of attention is the base's own in every row; zero residuals leave it alone."""
    torch.manual_seed(3)
    widths = [p.to_k.out_features for p in Streams(pipe.unet).layers.values()]
    keys = range(1, 2 * len(widths), 2)
    ip = {f"{k}.to_{x}_ip.weight": torch.randn(w, 12) for k, w in zip(keys, widths, strict=True) for x in "kv"}
    image = {"proj.weight": torch.randn(4 * 12, 7), "proj.bias": torch.zeros(48), "norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": ip}])
    pipe.set_ip_adapter_scale(0.7)
    pictures = {"ip_adapter_image_embeds": [torch.randn(2, 1, 7)]}
    plain = latents(pipe, "a dog here", **pictures)
    assert not torch.equal(plain, latents(pipe, "a dog here", ip_adapter_image_embeds=[torch.zeros(2, 1, 7)]))
    nothing = dataclasses.replace(milo, residuals={k: torch.zeros_like(v) for k, v in milo.residuals.items()})
    for two_streams in (True, False):
        with infusion.attach(pipe, milo, two_streams=two_streams):
            assert not torch.allclose(latents(pipe, "a <milo> here", **pictures), plain, atol=1e-3)
            assert torch.equal(latents(pipe, "a dog here", **pictures), plain)
        with infusion.attach(pipe, nothing, two_streams=two_streams):
            assert torch.allclose(latents(pipe, "a <milo> here", **pictures), plain, atol=1e-5)


@pytest.mark.parametrize("two_streams", [True, False])
def test_a_unet_wrapped_by_torch_compile(pipe, milo, two_streams):
    with infusion.attach(pipe, milo, two_streams=two_streams):
        expected, plain = latents(pipe, "a <milo> here"), latents(pipe, "a dog")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with infusion.attach(pipe, milo, two_streams=two_streams):
        assert torch.allclose(latents(pipe, "a <milo> here"), expected, atol=1e-5)
        assert torch.allclose(latents(pipe, "a dog"), plain, atol=1e-5)
        sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert infusion.encode(sibling, "a <milo>")


def interrupted(pipe, prompt):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(prompt, num_inference_steps=2, output_type="latent", callback_on_step_end=stop)


def test_a_call_that_broke_off_is_not_followed_by_later_training(pipe, milo):
    photos = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    config = LearnConfig(steps=3, batch=2, masked=False)
    tuning = DreamBoothConfig(steps=3, batch=2)
    lesson = prepare_lesson(pipe, load_photos(photos), "dog", "rex", templates=["a {} here", "a {}"])
    alone = infusion.learn(pipe, photos, "dog", "rex", config)
    losses = [s.loss for s in dreambooth(pipe, lesson, tuning)]
    with infusion.attach(pipe, milo):
        for prompt in ("a photo of a <milo>", "a <milo>", "a <milo> here"):
            interrupted(pipe, prompt)
        assert infusion.learn(pipe, photos, "dog", "rex", config).to_bytes() == alone.to_bytes()
        prepare_lesson(pipe, load_photos(photos), "dog", "rex")  # its masks are the untouched base's
        assert [s.loss for s in dreambooth(pipe, lesson, tuning)] == losses
        expected = latents(pipe, "a <milo> here")
    with infusion.attach(pipe, milo):
        assert torch.equal(latents(pipe, "a <milo> here"), expected)


def test_a_copied_unet_is_the_bases(pipe, milo):
    before = latents(pipe, "a dog here")
    with infusion.attach(pipe, milo):
        interrupted(pipe, "a <milo> here")  # its plan is still there
        copied = rebuilt(pipe, unet=copy.deepcopy(pipe.unet))
        assert torch.equal(latents(copied, "a dog here"), before)
        assert not torch.equal(latents(pipe, "a <milo> here"), before)


def test_another_family_of_the_same_shapes_is_refused(pipe, milo, monkeypatch):
    elsewhere = dataclasses.replace(milo, base=BaseInfo("stable-diffusion-v1", 512))
    with infusion.attach(pipe, elsewhere):  # a base of no known family
        pass
    monkeypatch.setattr("infusion.fit._family", lambda unet: "stable-diffusion-v2")
    with pytest.raises(InfusionError, match="learned on stable-diffusion-v1, this base is stable-diffusion-v2"):
        infusion.attach(pipe, elsewhere)
    with infusion.attach(pipe, dataclasses.replace(milo, base=BaseInfo("stable-diffusion-v2", 768))):
        pass


def test_values_are_used_as_they_are(pipe, milo):
    drawn = []
    for concept in (milo, milo.on_grid()):
        with infusion.attach(pipe, concept):
            drawn.append(latents(pipe, "a <milo>"))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_nested_and_repeated_attachments(pipe, milo, rex):
    outer = infusion.attach(pipe, milo)
    inner = infusion.attach(pipe, rex)
    again = infusion.attach(pipe, milo, strength={"milo": 0.0})
    base = latents(pipe, "a dog and a dog")
    both = latents(pipe, "a <milo> and a <rex>")
    again.detach()
    outer_again = latents(pipe, "a <milo> and a <rex>")
    assert (both - outer_again).abs().max() > 1e-3
    outer.detach()  # out of order
    assert (latents(pipe, "a dog and a <rex>") - base).abs().max() > 1e-3
    with pytest.raises(InfusionError, match="<milo> is unknown"):
        latents(pipe, "a <milo>")
    inner.detach()
    inner.detach()
    assert torch.equal(latents(pipe, "a dog and a dog"), base)
    assert "encode_prompt" not in vars(pipe)


def test_nothing_is_left_after_an_error(pipe, milo):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())  # noqa: E731
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}

    def fail(*args):
        raise RuntimeError("stopped by the user")

    attachment = infusion.attach(pipe, milo)
    assert hooks() > 0
    with pytest.raises(RuntimeError, match="stopped by the user"), attachment:
        latents(pipe, "a <milo>", callback_on_step_end=fail)
    assert hooks() == 0
    assert "encode_prompt" not in vars(pipe)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert "<milo>" not in pipe.tokenizer.get_vocab()


def test_refusals(pipe, milo):
    with pytest.raises(InfusionError, match="at least one concept"):
        infusion.attach(pipe)
    with pytest.raises(InfusionError, match="Two concepts are named 'milo'"):
        infusion.attach(pipe, milo, milo)
    with pytest.raises(InfusionError, match="strength names 'rex'"):
        infusion.attach(pipe, milo, strength={"rex": 1.0})
    with pytest.raises(InfusionError, match="strength is milo: nan; give finite numbers"):
        infusion.attach(pipe, milo, strength={"milo": float("nan")})
    other = random_concept(tiny_unet(block_out_channels=(8, 32)))
    with pytest.raises(InfusionError, match="another architecture"):
        infusion.attach(pipe, other)
    modular = types.SimpleNamespace(unet=pipe.unet)
    with pytest.raises(InfusionError, match="not yet modular ones"):
        infusion.attach(modular, milo)
    with infusion.attach(pipe, milo), pytest.raises(InfusionError, match="negative prompt"):
        latents(pipe, "a cat", negative_prompt="a <milo>")


def test_a_pipelines_own_encode_prompt_is_called_and_comes_back(pipe, milo):
    seen = []

    def own(prompt, device, copies, guided, negative=None, **kwargs):
        seen.append(prompt)
        return type(pipe).encode_prompt(pipe, prompt, device, copies, guided, negative, **kwargs)

    pipe.encode_prompt = own
    try:
        with infusion.attach(pipe, milo):
            latents(pipe, "a <milo> here")
        assert seen == ["a dog here"]
        assert pipe.__dict__["encode_prompt"] is own
    finally:
        del pipe.encode_prompt
