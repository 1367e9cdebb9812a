"""Bases as people have them: diffusers folders and single checkpoint files, offline, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import infusion
from infusion.base import _load_single_file, _predicts, from_checkpoint
from infusion.errors import InfusionError
from infusion.families import FAMILIES, clip_tokenizer, family_of
from infusion.streams import value_lengths
from infusion.world.release import load_pipeline
from tests.conftest import latents, random_concept, tiny_pipeline
from tests.hub import serve
from tests.original_layout import original_layout


def small(family: str, width: int, encoders: dict[str, int], **unet) -> dict[str, dict]:
    """A family's configurations with small widths: `width` of the text, `encoders` of each text encoder."""
    config = FAMILIES[family]
    blocks = len(config["unet"]["block_out_channels"])
    return {
        "unet": {**config["unet"], "block_out_channels": [8, 8, 16, 16][-blocks:], "cross_attention_dim": width, "attention_head_dim": 2, "norm_num_groups": 4, "sample_size": 8, **unet},
        "vae": {**config["vae"], "block_out_channels": [4, 4, 8, 8], "norm_num_groups": 4, "sample_size": 64},
        **{
            name: {**config[name], "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": hidden}
            for name, hidden in encoders.items()
        },
        "scheduler": config["scheduler"],
    }  # fmt: skip


SMALL = {
    "stable-diffusion-v1": small("stable-diffusion-v1", 12, {"text_encoder": 12}),
    "stable-diffusion-v2": small("stable-diffusion-v2", 20, {"text_encoder": 20}),
    "stable-diffusion-xl-v1-base": small(
        "stable-diffusion-xl-v1-base", 32, {"text_encoder": 12, "text_encoder_2": 20},
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8, transformer_layers_per_block=[1, 2, 3],
    ),
}  # fmt: skip
TINY = SMALL["stable-diffusion-v1"]


def random_pipeline(family: str) -> DiffusionPipeline:
    """A pipeline of the family in small, of random weights."""
    torch.manual_seed(0)
    config, xl = SMALL[family], "text_encoder_2" in SMALL[family]
    parts = {
        "vae": AutoencoderKL.from_config(config["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval(),
        "tokenizer": clip_tokenizer("!" if family == "stable-diffusion-v2" else "<|endoftext|>"),
        "unet": UNet2DConditionModel.from_config(config["unet"]).eval(),
        "scheduler": (EulerDiscreteScheduler if xl else DDIMScheduler).from_config(config["scheduler"]),
    }
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])).eval()
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=clip_tokenizer("!"))
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd15() -> DiffusionPipeline:
    return random_pipeline("stable-diffusion-v1")


def test_clip_tokenizer_is_clips():
    """Token ids as published for CLIP."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello, world!")["input_ids"] == [49406, 3306, 267, 1002, 256, 49407]
    padded = tokenizer("a", padding="max_length")["input_ids"]
    assert padded == [49406, 320, *[49407] * 75]
    assert clip_tokenizer("!")("a", padding="max_length")["input_ids"] == [49406, 320, 49407, *[0] * 74]


@pytest.mark.parametrize(
    ("family", "layers", "values"),
    [
        ("stable-diffusion-v1", 16, 12_480),
        ("stable-diffusion-v2", 16, 12_480),
        ("stable-diffusion-xl-v1-base", 70, 83_200),
    ],
)
def test_families_have_the_known_layers(family, layers, values):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(FAMILIES[family]["unet"])
    lengths = value_lengths(unet)
    assert len(lengths) == layers
    assert sum(lengths.values()) == values


@pytest.mark.parametrize("family", SMALL)
def test_a_single_checkpoint_file_offline(tmp_path, family):
    pipe = random_pipeline(family)
    save_file(original_layout(pipe), tmp_path / "model.safetensors")
    loaded = from_checkpoint(tmp_path / "model.safetensors", SMALL[family], torch.float32)
    loaded.set_progress_bar_config(disable=True)
    for part in (name for name in SMALL[family] if name != "scheduler"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    milo = random_concept(loaded.unet)
    with infusion.attach(loaded, milo):
        assert not torch.equal(latents(loaded, "a <milo>"), latents(loaded, "a dog"))
    # A copy, since weights that lie in a file's memory are aligned otherwise, which may choose other kernels.
    assert torch.equal(latents(copy.deepcopy(loaded), "a dog"), latents(pipe, "a dog"))


@pytest.mark.parametrize(
    ("metadata", "side", "predicts"),
    [
        ({"modelspec.resolution": "512x512"}, 64, "epsilon"),
        ({"modelspec.prediction_type": "epsilon", "modelspec.resolution": "768x768"}, 96, "epsilon"),
        ({"modelspec.prediction_type": "v", "modelspec.resolution": "512x512"}, 64, "v_prediction"),
        ({}, 96, "v_prediction"),
    ],
)
def test_side_and_prediction_of_a_2x_checkpoint(tmp_path, parts_of_2x, metadata, side, predicts):
    parts = parts_of_2x(metadata, None)
    assert (parts["unet"]["sample_size"], parts["scheduler"]["prediction_type"]) == (side, predicts)


@pytest.fixture
def parts_of_2x(tmp_path, monkeypatch):
    """What a Stable Diffusion 2.x checkpoint of that metadata is taken for."""
    monkeypatch.setattr("infusion.base.family_of", lambda shapes: "stable-diffusion-v2")
    monkeypatch.setattr("infusion.base.from_checkpoint", lambda path, parts, dtype: parts)

    def parts(metadata, prediction):
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.zeros(1)}, path, metadata)
        return _load_single_file(path, torch.float32, prediction)

    return parts


def test_a_prediction_that_the_user_tells_decides_the_side_too(parts_of_2x):
    for prediction, side in (("epsilon", 64), ("v_prediction", 96), (None, 96)):
        assert parts_of_2x({}, prediction)["unet"]["sample_size"] == side


@pytest.mark.parametrize(
    ("name", "metadata", "predicted"),
    [
        ("v2-1_512-ema-pruned", {}, "epsilon"),
        ("v2-1_768-ema-pruned", {}, "v_prediction"),
        ("model", {}, "v_prediction"),
        ("model", {"modelspec.resolution": "512x512"}, "epsilon"),
        ("from-512", {"modelspec.resolution": "768x768", "modelspec.hash_sha256": "0x5120"}, "v_prediction"),
        ("model", {"modelspec.date": "2023-05-12", "sshs_model_hash": "a512"}, "v_prediction"),
        ("from-512", {"modelspec.prediction_type": "v", "modelspec.resolution": "512x512"}, "v_prediction"),
        ("model", {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_what_a_2x_checkpoint_predicts(tmp_path, name, metadata, predicted):
    assert _predicts("stable-diffusion-v2", tmp_path / f"{name}.safetensors", metadata, False) == predicted


@pytest.mark.parametrize("family", ["stable-diffusion-v1", "stable-diffusion-xl-v1-base"])
@pytest.mark.parametrize(
    ("metadata", "marked", "predicted"),
    [
        ({}, False, "epsilon"),
        ({}, True, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, False, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, True, "epsilon"),
        ({"modelspec.resolution": "768x768"}, False, "epsilon"),
    ],
)
def test_what_other_checkpoints_predict(family, metadata, marked, predicted):
    assert _predicts(family, Path("model-512.safetensors"), metadata, marked) == predicted


def test_a_checkpoint_marked_as_predicting_velocity_and_told_otherwise(tmp_path, monkeypatch):
    path, family = tmp_path / "model.safetensors", "stable-diffusion-xl-v1-base"
    pipe = random_pipeline(family)
    save_file(original_layout(pipe) | {"v_pred": torch.empty(0)}, path)
    monkeypatch.setitem(FAMILIES, family, SMALL[family])
    assert infusion.load_base(path, device="cpu").scheduler.config.prediction_type == "v_prediction"
    told = infusion.load_base(path, device="cpu", prediction="epsilon")
    assert told.scheduler.config.prediction_type == "epsilon"
    with pytest.raises(InfusionError, match="prediction is 'noise'; use one of epsilon, v_prediction"):
        infusion.load_base(path, prediction="noise")
    save_file(original_layout(pipe) | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, path)
    scheduler = infusion.load_base(path, device="cpu").scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert infusion.load_base(path, device="cpu", prediction="epsilon").scheduler.alphas_cumprod[-1] > 1e-3
    save_file(original_layout(pipe) | {"edm_mean": torch.zeros(4)}, path)
    with pytest.raises(InfusionError, match="is an EDM checkpoint"):
        infusion.load_base(path)


def test_load_base_takes_a_single_file(tmp_path, monkeypatch):
    pipe = tiny_sd15()
    path = tmp_path / "model.safetensors"
    save_file(original_layout(pipe), path)
    monkeypatch.setitem(FAMILIES, "stable-diffusion-v1", TINY)
    monkeypatch.setattr("infusion.base.family_of", lambda shapes: "stable-diffusion-v1")
    loaded = infusion.load_base(path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    # A copy, since weights that lie in a file's memory are aligned otherwise, which may choose other kernels.
    assert torch.equal(latents(copy.deepcopy(loaded), "a dog"), latents(pipe, "a dog"))
    headless = {k: v for k, v in original_layout(pipe).items() if not k.startswith("cond_stage_model")}
    save_file(headless, path)
    with pytest.raises(InfusionError, match=r"model\.safetensors' cannot be loaded"):
        infusion.load_base(path, device="cpu")


def test_pickled_weights_in_a_folder_are_not_opened(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe", safe_serialization=False)
    with pytest.raises(InfusionError, match="cannot be loaded"):
        infusion.load_base(tmp_path / "pipe", device="cpu")


def test_families_are_told_by_their_shapes():
    attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert family_of({attention: [320, 768]}) == "stable-diffusion-v1"
    assert family_of({attention: [320, 1024]}) == "stable-diffusion-v2"
    assert family_of({"conditioner.embedders.1.model.ln_final.weight": [1280]}) == "stable-diffusion-xl-v1-base"
    assert family_of({attention: [320, 99]}) is None
    assert family_of({"lora.up": [2, 2]}) is None


def test_a_diffusers_folder(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = infusion.load_base(tmp_path / "pipe", device="cpu")
    assert torch.equal(latents(loaded, "a dog on the beach"), latents(pipe, "a dog on the beach"))
    assert loaded.unet.dtype == torch.float32
    assert infusion.load_base(tmp_path / "pipe", device="cpu", dtype="fp16").unet.dtype == torch.float16


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_a_folder_that_holds_a_variant_only(tmp_path, variant, size):
    """Whole and in pieces."""
    pipe = tiny_pipeline().to(torch.float16 if variant == "fp16" else torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    files = [p.name for p in (tmp_path / "unet").glob("*.safetensors")]
    assert all(variant in name for name in files)
    assert (len(files) > 1) == (size == "20KB")
    loaded = infusion.load_base(tmp_path, device="cpu")
    assert loaded.unet.dtype == torch.float32
    same = zip(loaded.unet.state_dict().values(), pipe.unet.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs.float()) for ours, theirs in same)


def test_a_variant_beside_whole_weights_is_left_alone(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    halved = copy.deepcopy(pipe).to(torch.float16)
    halved.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = infusion.load_base(tmp_path, device="cpu")
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    loaded = infusion.load_base(tmp_path, device="cpu")
    assert torch.equal(loaded.unet.conv_in.weight, halved.unet.conv_in.weight.float())
    assert torch.equal(loaded.vae.quant_conv.weight, pipe.vae.quant_conv.weight)


@pytest.mark.parametrize(
    ("unet", "told"),
    [(None, "which has no UNet"), ([None, None], "has no UNet"), (["diffusers", "UNet3DConditionModel"], "a UNet3DC")],
)
def test_other_kinds_of_bases_are_refused_unread(tmp_path, unet, told):
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], "unet": unet}
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v}))
    with pytest.raises(InfusionError, match=f"is a FluxPipeline, which .*{told.removeprefix('which ')}.*SDXL, not yet"):
        infusion.load_base(tmp_path)


def test_a_base_with_another_autoencoder_is_refused_unread(tmp_path):
    index = {"_class_name": "KandinskyV22Pipeline", "unet": ["diffusers", "UNet2DConditionModel"], "movq": ["x", "VQ"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InfusionError, match="a KandinskyV22Pipeline, which has no Stable Diffusion's autoencoder;"):
        infusion.load_base(tmp_path)


def test_an_installation_without_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("infusion.world.release.load_pipeline", partial(load_pipeline, tmp_path))
    with pytest.raises(InfusionError, match="weights are missing from this installation; install the package again"):
        infusion.load_base()


def test_refusals(tmp_path):
    save_file({"lora.up": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(InfusionError, match="no Stable Diffusion"):
        infusion.load_base(tmp_path / "lora.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense" * 9)
    with pytest.raises(InfusionError, match="is damaged"):
        infusion.load_base(tmp_path / "bad.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(InfusionError, match="need pickle are not opened"):
        infusion.load_base(tmp_path / "model.ckpt")
    with pytest.raises(InfusionError, match="cannot be loaded"):
        infusion.load_base("nobody/no-such-model")


def test_a_hub_id_is_downloaded_once_and_found_again_offline(tmp_path):
    """From a hub on this machine, which wants no more than the real one does; the second time the hub is gone."""
    random_pipeline("stable-diffusion-v1").save_pretrained(tmp_path / "folder")

    def generate(base: str, out: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infusion.cli", "generate", "a dog", "--base", base, "-o", str(tmp_path / out)]
        settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **environment}
        few = ["--count", "2", "--steps", "1", "--device", "cpu"]
        return subprocess.run([*command, *few], env={**os.environ, **settings}, capture_output=True, text=True)

    def pictures(base: str, out: str, **environment: str) -> list[bytes]:
        told = generate(base, out, **environment)
        assert told.returncode == 0, told.stderr
        return [path.read_bytes() for path in sorted((tmp_path / out).glob("0*.png"))]

    with serve(tmp_path / "folder", "someone/tiny") as (hub, fetched):
        downloaded = pictures("someone/tiny", "downloaded", HF_ENDPOINT=hub)
        unknown = generate("someone/else", "none", HF_ENDPOINT=hub)
    assert unknown.returncode == 2
    assert "The base 'someone/else' cannot be loaded" in unknown.stderr
    assert "404" in unknown.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert len(fetched) == len(set(fetched))
    again = pictures("someone/tiny", "again", HF_HUB_OFFLINE="1")
    assert len(downloaded) == 2
    assert downloaded == again


LOAD = """
import sys, torch, infusion
from infusion.errors import InfusionError
try:
    pipe = infusion.load_base("someone/tiny", "cpu", sys.argv[1])
    print(pipe.unet.dtype, float(pipe.unet.conv_in.weight.sum()))
except InfusionError as error:
    print(error)
"""


def test_what_of_a_hub_id_is_fetched(tmp_path):
    """Weights in fp16 where no more is asked or there are no others; nothing of a base of another kind."""
    folder, pipe = tmp_path / "folder", tiny_pipeline()
    pipe.save_pretrained(folder)

    def loaded(dtype: str, home: str) -> tuple[str, list[str]]:
        with serve(folder, "someone/tiny") as (hub, fetched):
            settings = {"HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
            told = subprocess.run(
                [sys.executable, "-c", LOAD, dtype], env={**os.environ, **settings, "HF_ENDPOINT": hub},
                capture_output=True, text=True,
            )  # fmt: skip
        assert told.returncode == 0, told.stderr
        return told.stdout.strip(), [name for name in fetched if name.endswith(".safetensors")]

    plain, weights = loaded("bf16", "a")
    assert plain.startswith("torch.bfloat16 ")
    assert weights
    assert not any("fp16" in name for name in weights)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder, variant="fp16")
    assert all("fp16" in name for name in loaded("fp16", "b")[1])
    assert not any("fp16" in name for name in loaded("fp32", "c")[1])
    for name in weights:
        (folder / name).unlink()
    assert all("fp16" in name for name in loaded("fp32", "d")[1])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    said, weights = loaded("fp16", "e")
    assert "'someone/tiny' is a StableDiffusionPipeline, which has no UNet" in said
    assert weights == []
