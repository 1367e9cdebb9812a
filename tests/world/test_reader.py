"""The reader in small: losses against loops, training that learns and resumes, figures that count."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from infusion.world.dataset import build_dataset, load_dataset, sample_batch, training_scene
from infusion.world.judge_lessons import focal_loss, heat_targets
from infusion.world.models import LATENT_CHANNELS, build_scheduler
from infusion.world.reader import (
    Reader,
    ReaderConfig,
    Seen,
    centres,
    noised,
    reader_figures,
    reader_losses,
    train_reader,
)
from infusion.world.truth import NONE, SCENE_HEADS, SUBJECT_HEADS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for _ in build_dataset(folder, 24, seed=5, workers=2):
        pass
    return load_dataset(folder)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(24, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)).half()


def test_latents_are_noised_as_the_scheduler_does_it():
    clean, noise = torch.randn(3, LATENT_CHANNELS, 16, 16), torch.randn(3, LATENT_CHANNELS, 16, 16)
    timesteps = torch.tensor([0, 17, 499])
    expected = build_scheduler().add_noise(clean, noise, timesteps)
    got = noised(clean, timesteps, noise)
    assert torch.equal(got[0], clean[0])
    assert torch.allclose(got[1:], expected[1:], atol=1e-6)


def test_centres_are_the_masks_centres():
    masks = torch.zeros(2, 3, 16, 16)
    masks[0, 0, 2:4, 10:14] = 1
    masks[0, 1, 5:9, 3] = 0.5  # mass 2
    masks[1, 0, 7, 7] = 1  # too little of it
    masks[1, 1, :4, :4] = 1  # no subject
    subjects = torch.full((2, 3, len(SUBJECT_HEADS)), NONE)
    subjects[0, :2] = subjects[1, 0] = 0
    centre = centres(masks, subjects)
    assert centre[0, 0].tolist() == [12.0, 3.0]
    assert centre[0, 1].tolist() == [3.5, 7.0]
    assert centre[[0, 1, 1, 1], [2, 0, 1, 2]].isnan().all()


def test_losses_against_a_loop(data, latents):
    torch.manual_seed(1)
    batch = sample_batch(latents, data, np.arange(24), np.random.default_rng(0))
    seen = Seen(
        torch.randn(24, 16, 16),
        {name: torch.randn(24, len(names), 16, 16) for name, names in SUBJECT_HEADS.items()},
        {name: torch.randn(24, len(names)) for name, names in SCENE_HEADS.items()},
    )
    losses = reader_losses(seen, batch)
    centre = centres(batch.masks, batch.subjects)
    for k, name in enumerate(SUBJECT_HEADS):
        at_centre, everywhere = [], []
        for b in range(24):
            for s in range(3):
                label = batch.subjects[b, s, k]
                if label == NONE:
                    continue
                if not centre[b, s].isnan().any():
                    x, y = centre[b, s].long()
                    at_centre.append(-seen.subject[name][b, :, y, x].log_softmax(0)[label])
                owns = (batch.masks[b].max(0).values > 0.5) & (batch.masks[b].argmax(0) == s)
                everywhere += [-seen.subject[name][b, :, y, x].log_softmax(0)[label] for y, x in owns.nonzero()]
        expected = torch.stack(at_centre).mean() + 0.5 * torch.stack(everywhere).mean()
        assert losses[name] == pytest.approx(float(expected), rel=1e-4)
    assert losses["heat"] == pytest.approx(float(focal_loss(seen.heat, heat_targets(centre))))
    assert losses["style"] == pytest.approx(float(F.cross_entropy(seen.scene["style"], batch.scene[:, 1])))


def test_the_dataset_keeps_the_scenes_truth(data):
    for i in (0, 7, 23):
        scene, _ = training_scene(5, i)
        told = [names[j] for names, j in zip(SCENE_HEADS.values(), data.scene[i], strict=True)]
        assert told == [scene.background, scene.style]


def test_it_learns_and_resumes(data, latents, tmp_path):
    config = ReaderConfig(minutes=60, batch=6, warmup=2, save_every=6)

    def trained(folder, steps):
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        return dict(islice(train_reader(Reader(16, 32), latents, data, folder, config, Accelerator(cpu=True)), steps))

    straight = trained(tmp_path / "straight", 12)
    assert straight[12]["style"] < straight[1]["style"]
    trained(tmp_path / "again", 8)  # two steps after the last checkpoint
    resumed = trained(tmp_path / "again", 6)
    assert list(resumed) == list(range(7, 13))
    assert resumed[7] == pytest.approx(straight[7], rel=1e-3)


def test_its_figures_are_shares_of_right_answers(data, latents):
    torch.manual_seed(2)
    reader = Reader(16, 32).eval()
    figures = reader_figures(reader, latents, data, 200)
    batch = sample_batch(latents, data, np.arange(24), np.random.default_rng(0))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = reader(noised(batch.latents, torch.full((24,), 200), noise), torch.full((24,), 200))
    centre = centres(batch.masks, batch.subjects)
    right = []
    for b, s in (~centre.isnan().any(-1)).nonzero():
        x, y = centre[b, s].long()
        right.append(bool(seen.subject["kind"][b, :, y, x].argmax() == batch.subjects[b, s, 0]))
    assert figures["kind"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert figures["background"] == pytest.approx(
        float((seen.scene["background"].argmax(1) == batch.scene[:, 0]).float().mean()), abs=1e-4
    )
    assert figures.keys() == SUBJECT_HEADS.keys() | SCENE_HEADS.keys()
