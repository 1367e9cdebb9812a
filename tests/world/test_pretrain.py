"""Pretraining in small: every stage of learning runs, resumes, and what is shipped equals what was trained."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from infusion.errors import InfusionError
from infusion.world.autoencoder import AutoencoderConfig, encode_dataset, psnr, standardize, train_autoencoder
from infusion.world.base_training import PretrainConfig, draw_timesteps, subject_weights, train_base
from infusion.world.dataset import Dataset, build_dataset, load_dataset, sample_batch
from infusion.world.grounding import LEVEL, grounding_loss, map_gate, recorded_maps
from infusion.world.models import (
    LATENT_CHANNELS,
    build_autoencoder,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_unet,
)
from infusion.world.picking import best_score
from infusion.world.pretrain import main, prepare_reader
from infusion.world.reader import Reader, ReaderConfig
from infusion.world.release import read_weights, write_weights
from infusion.world.reward import RewardConfig
from infusion.world.runs import read_log
from infusion.world.tokenizer import build_tokenizer
from infusion.world.validation import measure_maps, validate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for _ in build_dataset(folder, 64, seed=1, workers=2):
        pass
    return load_dataset(folder)


def first(data, count):
    """The first `count` scenes of a dataset."""
    return Dataset(**{f.name: getattr(data, f.name)[:count] for f in fields(data)})


def test_the_autoencoder_learns_and_resumes(data, tmp_path):
    config = AutoencoderConfig(minutes=60, batch=4, warmup=2, save_every=6, whole=0.25)
    accelerator = Accelerator(cpu=True)

    def trained(folder, steps):
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        return dict(islice(train_autoencoder(build_autoencoder(), data, folder, config, accelerator), steps))

    straight = trained(tmp_path / "straight", 12)
    assert straight[12] < straight[1]
    trained(tmp_path / "again", 8)  # two steps after the last checkpoint
    resumed = trained(tmp_path / "again", 6)
    assert list(resumed) == list(range(7, 13))
    assert resumed[7] == pytest.approx(straight[7], rel=1e-3)


def test_the_autoencoder_ends_on_whole_scenes(data, tmp_path, monkeypatch):
    ticks = iter(range(1000))  # a clock of one second a step
    monkeypatch.setattr("infusion.world.runs.time.monotonic", lambda: next(ticks))
    sizes = []
    model = build_autoencoder()
    model.encoder.register_forward_pre_hook(lambda _, args: sizes.append((len(args[0]), args[0].shape[-1])))
    config = AutoencoderConfig(minutes=8 / 60, batch=4, whole=0.25)
    assert len(list(train_autoencoder(model, data, tmp_path, config, Accelerator(cpu=True)))) == 8
    assert sizes == 6 * [(4, 32)] + 2 * [(1, 64)]
    assert not model.training


def test_standardized_latents_decode_to_the_same_picture(data):
    torch.manual_seed(0)
    model = build_autoencoder().eval()
    before = encode_dataset(model, data)
    decoded = model.decode(before.float()).sample
    spread = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.std
    scale = before.float().std(dim=(0, 2, 3))
    after = standardize(model, before)
    assert torch.allclose(after.float().mean(dim=(0, 2, 3)), torch.zeros(LATENT_CHANNELS), atol=1e-2)
    assert torch.allclose(after.float().std(dim=(0, 2, 3)), torch.ones(LATENT_CHANNELS), atol=1e-2)
    assert torch.allclose(encode_dataset(model, data).float(), after.float(), atol=1e-2)
    assert torch.allclose(model.decode(after.float()).sample, decoded, atol=2e-2)
    new_spread = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.std
    assert torch.allclose(new_spread * scale[None, :, None, None], spread, rtol=1e-3)
    assert psnr(model, data.pixels[:4]) > 0


def test_the_base_trains_resumes_and_keeps_its_processors(data, tmp_path):
    latents = torch.randn(64, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    config = PretrainConfig(scenes=64, minutes=60, batch=4, warmup=1, save_every=2, validate_every=3, judge_every=1)
    validation = latents[:16], first(data, 16)
    accelerator = Accelerator(cpu=True)

    def parts():
        torch.manual_seed(0)
        return build_text_encoder(build_tokenizer()), build_unet()

    text, unet = parts()
    processors = dict(unet.attn_processors)
    straight = []
    scores = iter((0.4, 0.7, 0.5))
    for p in train_base(text, unet, latents, data, validation, tmp_path, config, accelerator, lambda: next(scores)):
        straight.append(p)
        if p.step == 3:  # one step after the last checkpoint
            break
    resumed = next(train_base(*parts(), latents, data, validation, tmp_path, config, accelerator))
    assert [p.score for p in straight] == [0.4, 0.7, 0.5]
    assert best_score(tmp_path) == 0.7
    assert resumed.step == 3
    assert resumed.score is None
    assert resumed.seen == 12
    assert resumed.losses["denoising"] == pytest.approx(straight[2].losses["denoising"], rel=1e-3)
    assert straight[1].validation is None
    assert straight[2].validation is not None
    assert straight[2].validation.whole.keys() == straight[2].validation.subject.keys()
    assert unet.attn_processors.keys() == processors.keys()
    gate = measure_maps(text, unet, *validation, timesteps=(500,))
    assert 0 <= gate.peak <= 1
    assert gate.count > 10


def test_a_reward_is_learned_from_beside_the_rest(data, tmp_path):
    latents = torch.randn(64, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    validation = latents[:16], first(data, 16)
    config = PretrainConfig(
        scenes=64, minutes=60, batch=4, warmup=1, validate_every=100, reward=RewardConfig(drawn=4, steps=4, batch=4)
    )

    def trained(name, weight, reader):
        torch.manual_seed(0)
        text, unet = build_text_encoder(build_tokenizer()), build_unet()
        steps = train_base(
            text, unet, latents, data, validation, tmp_path / name, replace(config, reward_weight=weight),
            Accelerator(cpu=True), reader=reader,
        )  # fmt: skip
        return list(islice(steps, 2)), unet

    reader = Reader(16, 32).eval().requires_grad_(False)
    plain, plain_unet = trained("plain", 0.0, None)
    unweighted, unweighted_unet = trained("unweighted", 0.0, reader)
    barely, _ = trained("barely", 1e-9, reader)
    rewarded, _ = trained("rewarded", 10.0, reader)
    assert [p.losses["denoising"] for p in unweighted] == [p.losses["denoising"] for p in plain]
    assert all(map(torch.equal, unweighted_unet.parameters(), plain_unet.parameters()))
    assert not any("reward" in p.losses for p in plain)
    assert rewarded[0].losses["denoising"] == plain[0].losses["denoising"]
    assert rewarded[0].losses["reward"] == barely[0].losses["reward"]
    assert (
        rewarded[1].losses["reward"] > barely[1].losses["reward"]
    )  # of the same states: the first step's drawings have enough for two
    with pytest.raises(InfusionError, match="wants a reader"):
        trained("without", 0.1, None)


def test_the_reader_is_trained_once(data, tmp_path):
    latents = torch.randn(64, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    accelerator, config = Accelerator(cpu=True), ReaderConfig(minutes=1e-6, batch=4)
    validation = latents[:8], first(data, 8)
    trained = prepare_reader(tmp_path, latents, data, validation, config, accelerator)
    again = prepare_reader(tmp_path, latents, data, validation, replace(config, minutes=60), accelerator)
    assert all(map(torch.equal, trained.parameters(), again.parameters()))
    assert not any(p.requires_grad for p in again.parameters())
    lines = read_log(tmp_path)
    assert [line["stage"] for line in lines] == ["reader reads"]
    assert lines[0]["figures"].keys() == {"0", "200", "400"}


def test_scenes_without_one_of_their_arrays_are_drawn_again(tmp_path):
    assert list(build_dataset(tmp_path, 8, seed=3, workers=1)) == [8]
    before = load_dataset(tmp_path).scene.copy()
    (tmp_path / "scene.npy").unlink()
    assert list(build_dataset(tmp_path, 8, seed=3, workers=1)) == [8]
    assert (load_dataset(tmp_path).scene == before).all()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--reward-weight", "-0.1", "--reward-weight is -0.1; a weight is 0 or more"),
        ("--reward-weight", "0.1", "add --from-weights"),  # a base that draws nothing yet is not rewarded
        ("--scenes", "31", "--scenes is 31; it must be 32 or more"),  # a batch's
        ("--judge-every", "0", "--judge-every is 0; it must be 1 or more"),
        ("--decay", "0", "--decay is 0; it is a share of the time"),
    ],
)
def test_such_an_option_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys, option, value, told):
    monkeypatch.setattr("sys.argv", ["pretrain", "--folder", str(tmp_path / "run"), option, value])
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_against_a_loop(data):
    torch.manual_seed(0)
    text, unet = build_text_encoder(build_tokenizer()).eval(), build_unet().eval()
    latents = torch.randn(64, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    rows = latents[:5], first(data, 5)
    measured = validate(text, unet, *rows, timesteps=(300,))
    batch = sample_batch(*rows, np.arange(5), np.random.default_rng(0))
    noise = torch.randn(5, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    a = build_scheduler().alphas_cumprod[300]
    whole, subject, area = 0.0, 0.0, 0.0
    with torch.no_grad():
        for i in range(5):
            noisy = a.sqrt() * batch.latents[i] + (1 - a).sqrt() * noise[i]
            states = text(batch.ids[i : i + 1]).last_hidden_state
            target = a.sqrt() * noise[i] - (1 - a).sqrt() * batch.latents[i]
            error = (unet(noisy[None], 300, states).sample[0] - target).square().mean(0)
            inside = batch.masks[i].sum(0).clamp(max=1)
            whole, subject, area = whole + error.mean() / 5, subject + (error * inside).sum(), area + inside.sum()
    assert measured.whole[300] == pytest.approx(float(whole), rel=1e-3)
    assert measured.subject[300] == pytest.approx(float(subject / area), rel=1e-3)


def test_timesteps_favour_the_middle_and_leave_none_out():
    drawn = draw_timesteps(np.random.default_rng(0), 20_000, 1000).float()
    assert drawn.dtype == torch.float32
    assert 0 <= drawn.min() < 5
    assert 995 <= drawn.max() < 1000
    middle = ((drawn > 300) & (drawn < 800)).float().mean()
    assert 0.6 < middle < 0.75  # uniform: 0.5


def test_weights_favour_subjects_at_an_unchanged_mean():
    masks = torch.zeros(2, 3, 16, 16)
    masks[0, 0, :4] = masks[0, 1, 2:6] = 1  # overlapping masks count once
    weights = subject_weights(masks, 2.0)
    assert weights.shape == (2, 1, 16, 16)
    assert float(weights.mean()) == pytest.approx(1)
    assert torch.allclose(weights[0, 0, :6] / weights[1, 0, :6], torch.tensor(3.0))
    assert torch.equal(subject_weights(masks, 0.0), torch.ones(2, 1, 16, 16))


def test_captions_are_dropped_to_the_empty_prompt(data):
    latents = torch.zeros(64, LATENT_CHANNELS, 16, 16)
    batch = sample_batch(latents, data, np.arange(8), np.random.default_rng(0), dropout=1.0)
    empty = build_tokenizer()("", padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(batch.ids, empty.expand(8, -1))
    assert not batch.words.any()


def test_grounding_loss_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 64, 5, generator=generator).softmax(-1)
    words = torch.zeros(2, 2, 5, dtype=torch.bool)
    words[0, 0, 1] = words[0, 1, 3] = words[1, 0, 2] = True
    masks = torch.zeros(2, 2, 16, 16)
    masks[0, 0, :8] = masks[0, 1, 8:] = 1
    masks[1, 0, :, 4:12] = 0.5
    expected = []
    for b, s in ((0, 0), (0, 1), (1, 0)):
        heat = maps[b, :, :, words[b, s]].sum(-1).mean(0)
        inside = masks[b, s].view(8, 2, 8, 2).mean((1, 3)).flatten()
        share = (heat * inside).sum() / heat.sum()
        uneven = sum(i * (h - LEVEL) ** 2 for i, h in zip(inside, heat, strict=True)) / inside.sum()
        expected.append((1 - share) ** 2 + uneven)
    assert float(grounding_loss([maps], words, masks)) == pytest.approx(float(sum(expected) / 3), rel=1e-4)


def test_the_gate_on_perfect_and_swapped_maps():
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 0, 2:8, 2:8] = masks[0, 1, 9:14, 9:14] = 1
    words = torch.zeros(1, 3, 6, dtype=torch.bool)
    words[0, 0, 1] = words[0, 1, 4] = True
    perfect = map_gate(masks.clone(), words, masks)
    assert perfect.passed
    assert (perfect.peak, perfect.own, perfect.iou, perfect.count) == (1.0, 1.0, 1.0, 2)
    swapped = map_gate(masks[:, [1, 0, 2]], words, masks)
    assert (swapped.peak, swapped.own) == (0.0, 0.0)
    assert not swapped.passed


def test_recorded_maps_are_the_stock_attention_and_go_away():
    torch.manual_seed(0)
    unet = build_unet().eval()
    x, text = torch.randn(2, LATENT_CHANNELS, 16, 16), torch.randn(2, 32, 128)
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        before = unet(x, 5, text).sample
        with recorded_maps(unet) as records:
            during = unet(x, 5, text).sample
    assert torch.allclose(before, during, atol=1e-4)
    assert [tuple(m.shape) for m in records] == [
        (2, 2, 256, 32),
        (2, 4, 64, 32),
        (2, 4, 64, 32),
        (2, 4, 64, 32),
        (2, 2, 256, 32),
        (2, 2, 256, 32),
    ]
    assert all(torch.allclose(m.sum(-1), torch.ones_like(m[..., 0])) for m in records)
    assert dict(unet.attn_processors) == processors


def test_what_is_shipped_is_what_was_trained(tmp_path):
    pipe = build_pipeline()
    networks = {"vae": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}
    index = write_weights(networks, tmp_path)
    assert len(index["files"]["unet"]) == 2
    assert max(p.stat().st_size for p in tmp_path.glob("*.safetensors")) < 15_000_000
    for part, network in networks.items():
        read = read_weights(part, tmp_path)
        assert read.keys() == network.state_dict().keys()
        assert all(
            torch.equal(read[k], v.half().float()) for k, v in network.state_dict().items() if v.is_floating_point()
        )
    assert build_scheduler().config["prediction_type"] == "v_prediction"


def test_a_pipeline_of_the_world_is_built_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = build_pipeline()
    assert pipe.scheduler.config["steps_offset"] == 1


def test_the_steps_offset_moves_no_timestep():
    ours = build_scheduler()
    other = DDIMScheduler.from_config(ours.config, steps_offset=0)
    for steps in (7, 25, 1000):
        ours.set_timesteps(steps)
        other.set_timesteps(steps)
        assert torch.equal(ours.timesteps, other.timesteps)
