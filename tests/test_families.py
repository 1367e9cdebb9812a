"""What people load: SDXL, LoRAs beside a concept, textual inversion, prompt embeddings, slicing, compiling."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from PIL import Image

import infusion
from infusion.errors import InfusionError
from infusion.lesson import prepare_lesson
from infusion.naive import naive_prediction
from infusion.photos import load_photos
from infusion.streams import Plan, Streams
from infusion.training import LearnConfig
from tests.conftest import latents, naive_latents, random_concept, tiny_unet


def test_xl_rows_and_zero(xl):
    milo = random_concept(xl.unet, "milo", "teddy bear", scale=3.0)
    prompts = ["a teddy bear on the beach", "a cat", "a teddy bear"]
    before = latents(xl, prompts)
    with infusion.attach(xl, milo):
        assert torch.equal(latents(xl, prompts), before)
        after = latents(xl, ["a <milo> on the beach", "a cat", "a teddy bear"])
        zero = latents(xl, ["a <milo:0> on the beach", "a cat", "a teddy bear"])
        tiny = latents(xl, ["a <milo:1e-30> on the beach", "a cat", "a teddy bear"])
    change = (after - before).abs().amax(dim=(1, 2, 3))
    assert change[0] > 1e-3
    for same in (change[1:], zero - before, tiny - before):
        assert same.abs().max() < 1e-5 * before.abs().max()


def test_xl_equals_the_naive_method(xl):
    milo = random_concept(xl.unet, "milo", "dog", scale=2.0)
    with infusion.attach(xl, milo):
        states = infusion.encode(xl, ["a <milo> in the snow", "a cat"])
        plan = Plan(((infusion_mention(xl),), ()), states["prompt_embeds"])
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    extra = {"text_embeds": states["pooled_prompt_embeds"], "time_ids": torch.zeros(2, 6)}
    streams = Streams(xl.unet)
    streams.residuals = {"milo": milo.residuals}
    with torch.no_grad(), streams.calls(plan):
        ours = xl.unet(sample, 300, states["prompt_embeds"], added_cond_kwargs=extra).sample
    streams.remove()
    with torch.no_grad():
        naive = naive_prediction(
            xl.unet, sample, 300, states["prompt_embeds"], plan, streams.residuals, added_cond_kwargs=extra
        )
    assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()


def infusion_mention(pipe):
    from infusion.prompts import parse

    return parse("a <milo> in the snow", {"milo": "dog"}, pipe.tokenizer).mentions[0]


def test_xl_second_prompt(xl):
    milo = random_concept(xl.unet)
    with infusion.attach(xl, milo):
        same = latents(xl, "a <milo> here", prompt_2="a <milo> here")
        assert torch.equal(same, latents(xl, "a <milo> here"))
        other = latents(xl, "a <milo> here", prompt_2="a <milo> in the snow at the beach")
        assert (other - same).abs().max() > 1e-4
        with pytest.raises(InfusionError, match="prompt_2 must name the same concepts"):
            latents(xl, "a <milo>", prompt_2="here is a <milo>")
        with pytest.raises(InfusionError, match="negative prompt"):
            latents(xl, "a <milo>", negative_prompt_2="a <milo>")


def test_xl_prompt_embeds(xl):
    milo = random_concept(xl.unet)
    with infusion.attach(xl, milo):
        expected = latents(xl, ["a <milo> here", "a cat"])
        given = latents(xl, None, **infusion.encode(xl, ["a <milo> here", "a cat"]), generator=_generators(2))
        plain = latents(xl, ["a dog here", "a cat"])
    assert torch.equal(given, expected)
    assert (given[0] - plain[0]).abs().max() > 1e-3


def _generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_xl_learns(xl):
    concept = infusion.learn(xl, [Image.effect_noise((20, 20), 80)], "dog", "milo", LearnConfig(steps=2, batch=2))
    assert concept.base.family == "custom"
    assert all(r.abs().max() > 0 for r in concept.residuals.values())


@pytest.fixture
def sd2(pipe):
    """Stable Diffusion 2.1's traits: velocity, linear projections, heads by block."""
    pipe.register_modules(
        unet=tiny_unet(
            use_linear_projection=True, attention_head_dim=[1, 4], cross_attention_dim=12, upcast_attention=True
        )
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def test_velocity_equals_the_method_written_out(sd2):
    milo = random_concept(sd2.unet, "milo", "teddy bear")
    base = latents(sd2, ["a teddy bear", "a cat"])
    naive = naive_latents(sd2, milo, "a <milo> on the beach")
    with infusion.attach(sd2, milo):
        ours = latents(sd2, "a <milo> on the beach")
        assert torch.equal(latents(sd2, ["a teddy bear", "a cat"]), base)
        rows = latents(sd2, ["a <milo>", "a cat"])
        empty = [latents(sd2, f"a <milo:{strength}>") for strength in (0, 1e-30)]
    assert (ours - naive).abs().max() < 1e-4 * naive.abs().max()
    assert (rows[0] - base[0]).abs().max() > 1e-3
    assert (rows[1] - base[1]).abs().max() < 1e-5 * base.abs().max()
    for drawn in empty:
        assert (drawn[0] - latents(sd2, "a teddy bear")[0]).abs().max() < 1e-5 * base.abs().max()


def test_velocity_is_learned(sd2):
    photo = Image.effect_noise((20, 20), 80)
    concept = infusion.learn(sd2, [photo], "dog", "milo", LearnConfig(steps=2, batch=2))
    lesson = prepare_lesson(sd2, load_photos([photo]), "dog", "milo")
    draw = lesson.draw(2, torch.Generator().manual_seed(0))
    noise = (draw.noisy - draw.target).abs().max()
    assert noise > 0.1  # velocity, not the noise itself
    assert all(r.abs().max() > 0 for r in concept.residuals.values())


def test_a_lora_beside_a_concept(pipe):
    """ "Foundational" then means base plus LoRA."""
    milo, empty = random_concept(pipe.unet), random_concept(pipe.unet, scale=0.0)
    plain = latents(pipe, "a dog")
    with infusion.attach(pipe, milo):
        alone = latents(pipe, "a <milo>")
        torch.manual_seed(0)
        pipe.unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )
        lora_base = latents(pipe, "a dog")
        both = latents(pipe, "a <milo>")
        sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 9, 12)
        from infusion.prompts import Mention

        plan = Plan(((Mention("milo", 1.0, (3,)),),), states)
        streams = Streams(pipe.unet)
        streams.residuals = {"milo": milo.residuals}
        with torch.no_grad(), streams.calls(plan):
            ours = pipe.unet(sample, 5, states).sample
        streams.remove()
        with torch.no_grad():
            naive = naive_prediction(pipe.unet, sample, 5, states, plan, streams.residuals)
        assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()
        pipe.unet.delete_adapters("default")
        assert torch.equal(latents(pipe, "a <milo>"), alone)
    assert (lora_base - plain).abs().max() > 1e-3
    assert (both - lora_base).abs().max() > 1e-3
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    with infusion.attach(pipe, empty):
        assert torch.allclose(latents(pipe, "a <milo>"), latents(pipe, "a dog"), atol=1e-5)


def test_textual_inversion_tokens_beside_a_concept(pipe):
    torch.manual_seed(0)
    pipe.load_textual_inversion({"<cat-toy>": torch.randn(3, 12)}, token="<cat-toy>")
    milo = random_concept(pipe.unet)
    with infusion.attach(pipe, milo):
        after = latents(pipe, "a <cat-toy> and <milo>")
        zero = latents(pipe, "a <cat-toy> and <milo:0>")
        with pytest.raises(InfusionError, match="<dog-toy> is unknown"):
            latents(pipe, "a <dog-toy> and <milo>")
        pipe.encode_prompt("a <cat-toy> and <milo>", torch.device("cpu"), 1, False)
        from infusion.pipelines import _Session

        plan = _Session.open[id(pipe.unet)].streams.here.plans[-1]
    base = latents(pipe, "a <cat-toy> and dog")
    assert (zero - base).abs().max() < 1e-5 * base.abs().max()
    assert (after - base).abs().max() > 1e-3
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a <cat-toy> and dog", pipe.tokenizer))["input_ids"]
    (position,) = plan.rows[0][0].positions
    assert pipe.tokenizer.convert_ids_to_tokens(ids[position]) == "dog</w>"


def test_prompt_embeds(pipe):
    milo = random_concept(pipe.unet)
    prompts = ["a <milo> here", "a cat"]
    with pytest.raises(InfusionError, match=r"inside `with infusion\.attach"):
        infusion.encode(pipe, prompts)
    with infusion.attach(pipe, milo):
        expected = latents(pipe, prompts, num_images_per_prompt=2)
        states = infusion.encode(pipe, prompts)
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        given = latents(pipe, None, **states, num_images_per_prompt=2, generator=generator)
        foreign = {k: v.clone() for k, v in states.items()}
        plain = latents(pipe, None, **foreign, generator=generator[:2])
    assert torch.equal(given, expected)
    assert (plain[0] - given[0]).abs().max() > 1e-3


def test_slicing_and_tiling(pipe):
    milo = random_concept(pipe.unet, scale=20.0)
    with infusion.attach(pipe, milo):
        before = latents(pipe, "a <milo>")
        pipe.enable_attention_slicing(1)
        assert torch.allclose(latents(pipe, "a <milo>"), before, atol=1e-4)
        whole = latents(pipe, "a <milo>", output_type="pt")
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
        tiled = latents(pipe, "a <milo>", output_type="pt")
        drawn = latents(pipe, "a <milo>")
        with torch.no_grad():
            alone = pipe.vae.tiled_decode(drawn / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert (tiled - whole).abs().max() > 1e-4
    assert torch.allclose(tiled, (alone / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype):
    milo = random_concept(pipe.unet, scale=20.0)
    with infusion.attach(pipe, milo):
        exact = [latents(pipe, text) for text in ("a <milo>", "a dog")]
        half = [latents(pipe.to(dtype), text) for text in ("a <milo>", "a dog")]
    assert half[0].dtype == dtype
    moved, expected = (x[0].double() - x[1].double() for x in (half, exact))
    assert (moved - expected).norm() < 0.3 * expected.norm()  # what the concept alone does


def counting_into(graphs):
    """A backend of torch.compile that runs what it is given, and keeps it."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_compiled_once_for_all_concepts(pipe):
    graphs = []
    milo, rex = random_concept(pipe.unet), random_concept(pipe.unet, "rex", seed=5)
    prompts = ["a <milo> here", "a <milo:0.3> on the beach", "a <rex> in the snow", "a dog"]
    with infusion.attach(pipe, milo, rex):
        eager = [latents(pipe, p) for p in prompts]
        pipe.unet.compile(backend=counting_into(graphs))
        first = latents(pipe, prompts[0])
        latents(pipe, "a dog")
        latents(pipe, prompts[0])
        count = len(graphs)
        assert count > 0
        compiled = [first, *(latents(pipe, p) for p in prompts[1:])]
        for residual in milo.residuals.values():
            residual.mul_(2)
        doubled = latents(pipe, prompts[0])
    with infusion.attach(pipe, random_concept(pipe.unet, "max", seed=9)):
        latents(pipe, "a <max> here")
    assert len(graphs) == count
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, compiled, strict=True))
    assert (doubled - first).abs().max() > 1e-3


def test_blocks_compiled_one_by_one_share_their_graphs(pipe):
    graphs = []
    milo, rex = random_concept(pipe.unet), random_concept(pipe.unet, "rex", seed=5)
    prompts = ["a dog", "a <milo> here", "a <milo:0.3> on the beach", "a <rex> in the snow"]
    with infusion.attach(pipe, milo, rex):
        eager = [latents(pipe, p) for p in prompts]
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counting_into(graphs))
        compiled, counts = zip(*((latents(pipe, p), len(graphs)) for p in prompts), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager, compiled, strict=True))
    assert counts == (2, 4, 4, 4)  # two shapes of seven blocks, without a concept and with one


def test_bases_without_unet_are_refused():
    class Transformer:
        unet = None

    with pytest.raises(InfusionError, match="not yet with transformer bases"):
        infusion.attach(Transformer(), random_concept(tiny_unet()))
