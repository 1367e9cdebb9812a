"""The reader in small: losses against loops, training that learns and resumes, figures that count."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from infusion.world.dataset import build_dataset, load_dataset, sample_batch, training_scene
from infusion.world.judge_lessons import focal_loss, heat_targets
from infusion.world.models import LATENT_CHANNELS, build_scheduler
from infusion.world.reader import (
    COLORLESS,
    HEADS,
    Reader,
    ReaderConfig,
    Seen,
    centres,
    lesson,
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


def test_a_lesson_pastes_subjects_with_their_style(data, latents):
    batch = sample_batch(latents, data, np.arange(24), np.random.default_rng(0))
    plain = lesson(batch, np.random.default_rng(1), 0.0)
    assert torch.equal(plain.latents, batch.latents)
    assert not plain.pasted.any()
    assert torch.equal(plain.masks[:, :3], batch.masks)
    assert (plain.subjects[:, 3:] == NONE).all()
    for i in range(24):
        scene, _ = training_scene(5, i)
        for j in range(len(scene.subjects)):
            colors = plain.subjects[i, j, 1:3]
            assert ((colors == COLORLESS) == (scene.style in ("sketch", "sepia"))).all()
    mixed = lesson(batch, np.random.default_rng(1), 0.5)
    assert 4 < mixed.pasted.flatten(1).any(1).sum() < 20
    style = list(SCENE_HEADS).index("style")
    for i in range(24):
        over = mixed.pasted[i]
        assert torch.equal(mixed.latents[i][:, ~over], batch.latents[i][:, ~over])
        assert (mixed.scene[i, 0] == batch.scene[i, 0]).all()
        assert (mixed.scene[i, style][~over] == batch.scene[i, style]).all()
        if not over.any():
            continue
        donors = [d for d in range(24) if torch.equal(mixed.latents[i][:, over], batch.latents[d][:, over]) and d != i]
        assert len(donors) == 1
        (d,) = donors
        assert torch.equal(over, batch.masks[d].amax(0) > 0.25)
        assert (mixed.scene[i, style][over] == batch.scene[d, style]).all()
        assert torch.equal(mixed.subjects[i, 3:], plain.subjects[d, :3])
        for j in range(3):
            left = batch.masks[i, j][~over].sum()
            gone = left < 0.6 * batch.masks[i, j].sum()
            assert torch.equal(mixed.subjects[i, j], torch.full((5,), NONE) if gone else plain.subjects[i, j])


def test_losses_against_a_loop(data, latents):
    torch.manual_seed(1)
    batch = sample_batch(latents, data, np.arange(24), np.random.default_rng(0))
    truth = lesson(batch, np.random.default_rng(2), 0.5)
    seen = Seen(
        torch.randn(24, 16, 16),
        torch.randn(24, 16, 16),
        {name: torch.randn(24, len(names), 16, 16) for name, names in HEADS.items()},
        {name: torch.randn(24, len(names), 16, 16) for name, names in SCENE_HEADS.items()},
    )
    losses = reader_losses(seen, truth)
    centre = centres(truth.masks, truth.subjects)
    for k, name in enumerate(HEADS):
        at_centre, everywhere = [], []
        for b in range(24):
            for s in range(6):
                label = truth.subjects[b, s, k]
                if label == NONE:
                    continue
                if not centre[b, s].isnan().any():
                    x, y = centre[b, s].long()
                    at_centre.append(-seen.subject[name][b, :, y, x].log_softmax(0)[label])
                owns = (truth.masks[b].max(0).values > 0.5) & (truth.masks[b].argmax(0) == s)
                everywhere += [-seen.subject[name][b, :, y, x].log_softmax(0)[label] for y, x in owns.nonzero()]
        expected = torch.stack(at_centre).mean() + 0.5 * torch.stack(everywhere).mean()
        assert losses[name] == pytest.approx(float(expected), rel=1e-4)
    assert losses["heat"] == pytest.approx(float(focal_loss(seen.heat, heat_targets(centre))))
    inside = torch.sigmoid(seen.inside)
    held = truth.masks.sum(1).clamp(max=1)
    expected = -(held * inside.log() + (1 - held) * (1 - inside).log()).mean()
    assert losses["inside"] == pytest.approx(float(expected), rel=1e-4)
    styles = [
        -seen.scene["style"][b, :, y, x].log_softmax(0)[truth.scene[b, 1, y, x]]
        for b in range(24) for y in range(16) for x in range(16)
    ]  # fmt: skip
    assert losses["style"] == pytest.approx(float(torch.stack(styles).mean()), rel=1e-4)


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
    rng = np.random.default_rng(0)
    batch = sample_batch(latents, data, np.arange(24), rng)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    truth, mixed = lesson(batch, rng, 0.0), lesson(batch, rng, 1.0)
    with torch.no_grad():
        seen, other = (reader(noised(t.latents, torch.full((24,), 200), noise), torch.full((24,), 200)) for t in (truth, mixed))  # fmt: skip
    centre = centres(truth.masks, truth.subjects)
    for k, name in enumerate(HEADS):
        right = []
        for b, s in (~centre.isnan().any(-1)).nonzero():
            x, y = centre[b, s].long()
            if truth.subjects[b, s, k] != NONE:
                right.append(bool(seen.subject[name][b, :, y, x].argmax() == truth.subjects[b, s, k]))
        assert figures[name] == pytest.approx(sum(right) / len(right), abs=1e-4)
    told = seen.scene["background"].argmax(1) == truth.scene[:, 0]
    assert figures["background"] == pytest.approx(float(told.float().mean()), abs=1e-4)
    told = [
        bool(other.scene["style"][b, :, y, x].argmax() == mixed.scene[b, 1, y, x])
        for b, y, x in mixed.pasted.nonzero()
    ]  # fmt: skip
    assert figures["pasted"] == pytest.approx(sum(told) / len(told), abs=1e-4)
    assert figures.keys() == HEADS.keys() | SCENE_HEADS.keys() | {"pasted"}
