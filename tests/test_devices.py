"""Every tensor is where the pipeline is: on a pretend accelerator the library learns and draws what it does on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.pipelines import pipeline_utils
from PIL import Image

import infusion
from infusion.adapters import load_adapter
from infusion.diagnosis import layer_maps, validation_loss
from infusion.evaluation import EvaluateConfig, evaluate
from infusion.generation import generate
from infusion.lesson import prepare_lesson
from infusion.methods import METHODS
from infusion.methods.infusion import ConceptAdapter
from infusion.methods.infusion import infusion as infusion_method
from infusion.methods.interface import rebuilt
from infusion.offloading import offload, offloaded, take_back
from infusion.photos import Photo
from infusion.steering import SteerConfig, steered
from infusion.training import LearnConfig
from infusion.world.autoencoder import AutoencoderConfig, encode_dataset, train_autoencoder
from infusion.world.base_training import PretrainConfig, train_base
from infusion.world.dataset import build_dataset, load_dataset
from infusion.world.examination import draw
from infusion.world.judge import Judge, JudgeNetwork
from infusion.world.judge_training import JudgeConfig, train_judge
from infusion.world.models import build_autoencoder, build_pipeline, build_text_encoder, build_unet
from infusion.world.reader import Reader, ReaderConfig, reader_figures, train_reader
from infusion.world.reward import RewardConfig
from infusion.world.tokenizer import build_tokenizer
from infusion.world.twins import build_families, load_families
from tests.conftest import latents, random_concept
from tests.pretend import PretendTensor, pretend
from tests.test_adapters import embedding, lora, tuned_unet


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    return [Photo(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))) for _ in range(3)]


def test_the_pretend_device_refuses_what_cuda_would():
    with pretend(doubles=False) as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert isinstance(there, PretendTensor)
        assert float((there * torch.tensor(2.0)).sum()) == 12  # a CPU tensor of no dimensions may join
        assert there[torch.tensor([1])].shape == (1, 3)
        for mixture in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there[0].long()]):
            with pytest.raises(RuntimeError, match="pretend"):
                mixture()
        with pytest.raises(TypeError, match="float64"):
            there.double()
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize(("family", "doubles"), [("pipe", True), ("pipe", False), ("xl", False)])
def test_a_concept_is_learned_and_drawn(request, photos, family, doubles):
    """Without doubles as on MPS."""
    pipe = request.getfixturevalue(family)
    config = LearnConfig(steps=2, batch=2, learning_rate=1.0)
    prompts = ["a <milo:0.5> on the beach", "a cat", "<milo> and <rex>"]
    rex = random_concept(pipe.unet, "rex", seed=1)
    here = infusion.learn(pipe, photos, "dog", "milo", config)
    with infusion.attach(pipe, here, rex):
        expected = latents(pipe, prompts, negative_prompt=["a dog", "", ""])
    with pretend(doubles) as device:
        pipe.to(device)
        there = infusion.learn(pipe, photos, "dog", "milo", config)
        with infusion.attach(pipe, there, rex):
            drawn = latents(pipe, prompts, negative_prompt=["a dog", "", ""])
        assert isinstance(drawn, PretendTensor)
    assert all(torch.allclose(r, here.residuals[path], atol=1e-4) for path, r in there.residuals.items())
    assert torch.allclose(drawn.cpu(), expected, atol=1e-4 * float(expected.abs().max()))


def test_a_unet_on_a_device_of_its_own(pipe):
    """As `device_map="balanced"` lays it: the inputs come from elsewhere, and accelerate moves them after torch's hooks."""
    milo = random_concept(pipe.unet)
    with infusion.attach(pipe, milo):
        expected = latents(pipe, "a <milo> here")
    with pretend(doubles=False) as device:
        pipe.unet.to(device)
        for part, where in ((pipe.vae, "cpu"), (pipe.text_encoder, "cpu"), (pipe.unet, device)):
            add_hook_to_module(part, AlignDevicesHook(execution_device=where, io_same_device=True))
        with infusion.attach(pipe, milo):
            drawn = latents(pipe, "a <milo> here")
    assert torch.allclose(drawn.cpu(), expected, atol=1e-4)


def folder(pipe, tmp_path):
    rebuilt(pipe, unet=tuned_unet(pipe)).save_pretrained(tmp_path / "tuned")
    return None, tmp_path / "tuned"


def test_offloaded_parts_are_there_only_while_they_work(pipe):
    milo = random_concept(pipe.unet)
    with infusion.attach(pipe, milo):
        expected = [latents(pipe, "a <milo>", num_inference_steps=steps) for steps in (2, 3)]
    there = lambda: [name for name in ("text_encoder", "unet", "vae") if getattr(pipe, name).device.type != "cpu"]  # noqa: E731
    seen = []
    with pretend(doubles=False) as device:
        offload(pipe, device)
        assert offloaded(pipe) == torch.device(device)
        pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append(there()))
        sibling = rebuilt(pipe)
        with infusion.attach(pipe, milo):
            for drawing, steps, whole in ((pipe, 2, expected[0]), (sibling, 3, expected[1])):
                drawn = latents(drawing, "a <milo>", num_inference_steps=steps)
                assert isinstance(drawn, PretendTensor)
                assert torch.allclose(drawn.cpu(), whole, atol=1e-4)
                assert there() == []
            generate(sibling, ["a <milo>"], [0], 1)
            generate(sibling, ["a <milo>"], [0], 1)
    assert seen == [["unet"]] * 7


def test_a_watched_training_of_an_offloaded_base(pipe, photos, monkeypatch):
    nothing = SimpleNamespace(eps=SimpleNamespace(value=0.0))
    monkeypatch.setattr(
        "infusion.steering.forgetting", lambda *_, **__: [nothing]
    )  # by the UNet and the text encoder, at length
    steer = SteerConfig(every=2, stop=False, prompts=("{} in the snow",), positioned=("{} on the left",), steps=1)
    there = []

    def states():
        for state in infusion_method(pipe, lesson, LearnConfig(steps=3, batch=2)):
            there.append({n for n in ("text_encoder", "unet", "vae") if getattr(pipe, n).device.type == "pretend"})
            yield state

    with pretend() as device:
        offload(pipe, device)
        lesson = prepare_lesson(pipe, photos, "dog", "milo")
        take_back(pipe)
        looks = [now.checkup.step for now in steered(pipe, states(), lesson, steer) if now.checkup]
    assert looks == [2, 3]
    assert there == [{"unet"}] * 3


@pytest.mark.parametrize("make", [lora, embedding, folder])
def test_what_others_trained_on_an_offloaded_base(pipe, tmp_path, monkeypatch, make):
    monkeypatch.setattr(pipeline_utils, "get_device", lambda: "pretend")  # which diffusers asks after loading a LoRA
    adapter = load_adapter(make(pipe, tmp_path)[1], "dog")
    prompt = f"{adapter.subject} here"
    with adapter.attached(rebuilt(pipe)) as custom:
        expected = latents(custom, prompt)
    with pretend(doubles=False) as device:
        offload(pipe, device)
        with adapter.attached(rebuilt(pipe)) as custom:
            drawn = latents(custom, prompt)
            assert isinstance(drawn, PretendTensor)
            assert {p.device.type for p in custom.components.values() if isinstance(p, torch.nn.Module)} == {"cpu"}
        again = latents(pipe, prompt)
    assert torch.allclose(drawn.cpu(), expected, atol=1e-4)
    assert not torch.allclose(again.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_draws(pipe, photos, method):
    learn, config = METHODS[method]
    with pretend(doubles=False) as device:
        pipe.to(device)
        *_, last = learn(pipe, prepare_lesson(pipe, photos, "dog", "milo"), config(steps=1, batch=2))
        with last.adapter.attached(pipe) as custom:
            assert isinstance(latents(custom, f"a photo of {last.adapter.subject}"), PretendTensor)


def test_diagnosis_and_evaluation(pipe, photos):
    concept = random_concept(pipe.unet)
    config = EvaluateConfig(
        ("a photo of {} on the beach", "{} in the snow"), ("a cat",), seeds=2, other_seeds=2, steps=2, dimensions=2
    )
    with pretend(doubles=False) as device:
        pipe.to(device)
        lesson = prepare_lesson(pipe, photos, "dog", "milo")
        assert all(isinstance(m, PretendTensor) for m in layer_maps(pipe, lesson).values())
        there = {path: r.to(device) for path, r in concept.residuals.items()}
        assert all(np.isfinite(loss) for loss in validation_loss(pipe, lesson, there).values())
        assert evaluate(pipe, ConceptAdapter("<milo>", concept), photos, "dog", config).figures.pictures == 4


def test_the_worlds_own_trainings(tmp_path):
    for _ in build_dataset(tmp_path / "data", 8, seed=1, workers=1):
        pass
    for _ in build_families(tmp_path / "families", 4, seed=1, workers=1):
        pass
    data, families = load_dataset(tmp_path / "data"), load_families(tmp_path / "families")
    with pretend() as name:
        device = torch.device(name)
        accelerator = SimpleNamespace(device=device, autocast=nullcontext, backward=lambda loss: loss.backward())
        coder = build_autoencoder()
        steps = train_autoencoder(coder, data, tmp_path, AutoencoderConfig(batch=2), accelerator)  # type: ignore[arg-type]
        assert [step for step, _ in islice(steps, 2)] == [1, 2]
        encoded = encode_dataset(coder.eval(), data)
        lessons = train_judge(JudgeNetwork(), families, coder, tmp_path, JudgeConfig(families=2), accelerator)  # type: ignore[arg-type]
        assert [step for step, *_ in islice(lessons, 2)] == [1, 2]
        reader = Reader()
        read = train_reader(reader, encoded, data, tmp_path, ReaderConfig(batch=2), accelerator)  # type: ignore[arg-type]
        assert [step for step, _ in islice(read, 2)] == [1, 2]
        assert all(0 <= share <= 1 for share in reader_figures(reader, encoded, data, 100).values())
        config = PretrainConfig(
            batch=2, validate_every=2, reward_weight=0.1, reward=RewardConfig(drawn=2, steps=2, batch=2)
        )
        networks = build_text_encoder(build_tokenizer()), build_unet()
        trained = train_base(
            *networks, encoded, data, (encoded, data), tmp_path, config, accelerator, reader=reader  # type: ignore[arg-type]
        )  # fmt: skip
        assert list(islice(trained, 2))[-1].validation is not None
        drawn = draw(build_pipeline(coder, *networks), ["a dog", "a cat"], range(2))
        assert len(Judge(JudgeNetwork().to(device)).read(drawn)) == 2
