"""Adapters from files: what is loaded draws what was saved; everything else is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from infusion.adapters import load_adapter
from infusion.errors import InfusionError
from infusion.methods.interface import rebuilt
from infusion.methods.lora import Lora
from infusion.methods.textual_inversion import WordEmbedding
from infusion.schedulers import scheduler_for
from tests.conftest import latents, random_concept, tiny_unet


def tuned_unet(pipe):
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return unet


def lora(pipe, tmp_path):
    from peft import LoraConfig

    unet = copy.deepcopy(pipe.unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapter = Lora("a dog", unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=dict(adapter.tensors()), weight_name="l.safetensors"
    )
    return adapter, tmp_path / "l.safetensors"


def embedding(pipe, tmp_path):
    vector = 0.1 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    save_file({"<milo>": vector}, tmp_path / "e.safetensors")
    return WordEmbedding("<milo>", vector), tmp_path / "e.safetensors"


@pytest.mark.parametrize("make", [lora, embedding])
def test_a_file_draws_what_was_learned(pipe, tmp_path, make):
    learned, path = make(pipe, tmp_path)
    loaded = load_adapter(path, "dog")
    assert loaded.subject in (learned.subject, f"a {learned.subject}")
    prompt = f"a photo of {loaded.subject} on the beach"
    before = latents(pipe, "a photo of a dog on the beach")
    with learned.attached(pipe) as custom:
        expected = latents(custom, prompt)
    with loaded.attached(pipe) as custom:
        assert torch.equal(latents(custom, prompt), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(latents(pipe, "a photo of a dog on the beach"), before)
    assert sum(t.numel() for t in loaded.tensors().values()) == sum(t.numel() for t in learned.tensors().values())


def test_a_concept_and_a_folder(pipe, tmp_path):
    path = random_concept(pipe.unet).save(tmp_path / "milo.safetensors")
    concept = load_adapter(path, "dog")
    assert concept.subject == "a <milo>"
    with concept.attached(pipe) as custom:
        assert latents(custom, "a <milo>").shape == (1, 4, 8, 8)
    assert load_adapter(path, "dog", subject="the <milo:0.5>").subject == "the <milo:0.5>"
    with pytest.raises(InfusionError, match="does not hold '<milo>'"):
        load_adapter(path, "dog", subject="the <rex:0.5>")
    unet = tuned_unet(pipe)
    rebuilt(pipe, unet=unet).save_pretrained(tmp_path / "tuned")
    folder = load_adapter(tmp_path / "tuned", "dog", subject="a sks dog")
    assert folder.subject == "a sks dog"
    assert folder.tensors().keys() == unet.state_dict().keys()
    with folder.attached(pipe) as custom:
        assert torch.equal(latents(custom, "a dog"), latents(rebuilt(pipe, unet=unet), "a dog"))


def test_an_embedding_of_xls_two_text_encoders(xl, pipe, tmp_path):
    vectors = {"clip_g": 0.1 * torch.randn(2, 12), "clip_l": 0.1 * torch.randn(2, 8)}
    save_file(vectors, tmp_path / "milo.safetensors")
    loaded = load_adapter(tmp_path / "milo.safetensors", "dog")
    assert loaded.subject == "a <milo>"
    before = latents(xl, "a <milo> here")
    with loaded.attached(xl) as custom:
        ids = [
            [t.convert_tokens_to_ids(x) for x in ("<milo>", "<milo>_1")] for t in (custom.tokenizer, custom.tokenizer_2)
        ]
        both = (custom.text_encoder, vectors["clip_l"]), (custom.text_encoder_2, vectors["clip_g"])
        for (encoder, expected), known in zip(both, ids, strict=True):
            assert torch.equal(encoder.get_input_embeddings().weight[known], expected)
        assert not torch.equal(latents(custom, "a <milo> here"), before)
    assert torch.equal(latents(xl, "a <milo> here"), before)
    save_file({"<rex>": torch.zeros(1, 8)}, tmp_path / "one.safetensors")  # the other encoder would read letters
    for file, base, message in (
        ("one.safetensors", xl, r"holds 1 embedding\(s\), the base has 2 .* both, clip_l and clip_g"),
        ("milo.safetensors", pipe, r"holds 2 embedding\(s\), the base has 1"),
    ):
        with pytest.raises(InfusionError, match=message), load_adapter(tmp_path / file, "dog").attached(base):
            pass


def test_what_is_none_of_them_is_refused(pipe, tmp_path):
    refused = partial(pytest.raises, InfusionError)
    with refused(match="There is no file"):
        load_adapter(tmp_path / "nothing.safetensors", "dog")
    with refused(match="model_index.json is missing"):
        load_adapter(tmp_path, "dog")
    (tmp_path / "x.bin").write_bytes(b"\x80\x02pickle")
    with refused(match="is no safetensors file"):
        load_adapter(tmp_path / "x.bin", "dog")
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "two.safetensors")
    save_file({"<milo>": torch.zeros(1, 12)}, tmp_path / "e.safetensors")
    with refused(match="does not hold '<milo>'"):
        load_adapter(tmp_path / "e.safetensors", "dog", subject="sks dog")
    assert load_adapter(tmp_path / "e.safetensors", "dog", subject="a <milo> dog").token == "<milo>"
    with refused(match=r"neither a concept nor a LoRA nor an embedding \(2 tensors"):
        load_adapter(tmp_path / "two.safetensors", "dog")


def test_adapters_of_another_base_are_refused_and_leave_nothing(pipe, tmp_path):
    before = latents(pipe, "a dog")
    other = copy.copy(pipe)
    other.unet = tiny_unet(block_out_channels=(8, 24), attention_head_dim=(2, 3))
    _, path = lora(other, tmp_path)
    save_file({"<milo>": torch.zeros(1, 7)}, tmp_path / "e.safetensors")
    wide = random_concept(other.unet).save(tmp_path / "wide.safetensors")
    rebuilt(pipe, unet=tiny_unet(sample_size=16)).save_pretrained(tmp_path / "tuned")
    velocity = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    rebuilt(pipe, scheduler=velocity).save_pretrained(tmp_path / "velocity")
    distilled = {**pipe.components, "unet": tiny_unet(time_cond_proj_dim=8), "scheduler": scheduler_for(pipe, "lcm")}
    LatentConsistencyModelPipeline(**distilled, requires_safety_checker=False).save_pretrained(tmp_path / "lcm")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "foreign.safetensors")
    for file, message in (
        (path, "does not fit this base"),
        (tmp_path / "e.safetensors", "does not fit this base"),
        (wide, "another architecture"),
        (tmp_path / "tuned", r"differs from the base in pixels a side \(32, the base 16\)"),
        (tmp_path / "velocity", "in what its UNet predicts"),
        (tmp_path / "lcm", r"in steps \(few, distilled, the base many\)"),
        (tmp_path / "foreign.safetensors", "no layer of the base is named in it"),
    ):
        with pytest.raises(InfusionError, match=message), load_adapter(file, "dog").attached(pipe):
            pass
    assert torch.equal(latents(pipe, "a dog"), before)


def test_a_lora_of_the_users_own_is_in_use_again_afterwards(pipe, tmp_path):
    _, path = lora(pipe, tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.5)
    styled = latents(pipe, "a dog")
    with load_adapter(path, "dog").attached(pipe):
        assert pipe.get_active_adapters() != ["style"]
    assert pipe.get_list_adapters() == {"unet": ["style"]}
    assert torch.equal(latents(pipe, "a dog"), styled)


def test_a_lora_of_the_users_own_that_is_switched_off(pipe, tmp_path):
    _, path = lora(pipe, tmp_path)
    plain = latents(pipe, "a dog")
    with load_adapter(path, "dog").attached(pipe):
        expected = latents(pipe, "a dog")
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors", adapter_name="style")
    pipe.disable_lora()
    with load_adapter(path, "dog").attached(pipe):
        assert torch.equal(latents(pipe, "a dog"), expected)
    assert torch.equal(latents(pipe, "a dog"), plain)
    pipe.enable_lora()
    assert not torch.equal(latents(pipe, "a dog"), plain)


def test_a_concept_of_another_class_word_is_refused(pipe, tmp_path):
    path = random_concept(pipe.unet).save(tmp_path / "milo.safetensors")
    assert load_adapter(path, "Dog").subject == "a <milo>"
    with pytest.raises(InfusionError, match="learned as a 'dog', the word given is 'cat'; give 'dog'"):
        load_adapter(path, "cat")


def test_a_folder_whose_base_was_told_what_it_predicts(pipe, tmp_path):
    rebuilt(pipe, unet=tuned_unet(pipe)).save_pretrained(tmp_path / "tuned")  # says epsilon, as its base's file does
    velocity = rebuilt(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction"))
    with load_adapter(tmp_path / "tuned", "dog", prediction="v_prediction").attached(velocity) as custom:
        assert custom.scheduler.config["prediction_type"] == "v_prediction"


def test_an_error_of_the_callers_own_stays_its_own(pipe, tmp_path):
    _, path = lora(pipe, tmp_path)
    with pytest.raises(ValueError, match="mine"), load_adapter(path, "dog").attached(pipe):
        raise ValueError("mine")
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("two_streams", [True, False])
def test_a_concept_is_drawn_as_it_was_learned(pipe, tmp_path, two_streams):
    concept = dataclasses.replace(random_concept(pipe.unet), settings={"two_streams": two_streams})
    adapter = load_adapter(concept.save(tmp_path / "milo.safetensors"), "dog")
    assert adapter.two_streams is two_streams
