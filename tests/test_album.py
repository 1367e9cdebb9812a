"""The base's pictures are kept once and found again by the same base, prompts, seeds and settings only."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

from infusion.album import default_album, fingerprint, kept
from infusion.errors import InfusionWarning
from infusion.generation import Picture


@pytest.fixture
def ask(pipe, tmp_path):
    """Asks for two pictures; returns them and whether they had to be drawn."""

    def asked(prompts=("a dog", "a cat"), seeds=(3, 4), album=tmp_path / "album", **settings):
        drawn = []

        def draw():
            drawn.append(1)
            pixels = [np.full((4, 6, 3), 10 * s, np.uint8) for s in seeds]
            return [Picture(Image.fromarray(x), p, s) for x, p, s in zip(pixels, prompts, seeds, strict=True)]

        return kept(album, pipe, prompts, seeds, {"steps": 2, **settings}, draw), bool(drawn)

    return asked


def test_what_was_drawn_is_found_again(ask, tmp_path):
    first, second = ask(), ask()
    assert (first[1], second[1]) == (True, False)
    for a, b in zip(first[0], second[0], strict=True):
        assert (a.prompt, a.seed, a.image.tobytes()) == (b.prompt, b.seed, b.image.tobytes())
    assert [p.name for p in (tmp_path / "album").glob(".*")] == []
    assert ask(album=None)[1]


def test_anything_else_is_drawn(ask, pipe):
    ask()
    assert ask(prompts=("a dog", "a bird"))[1]
    assert ask(seeds=(3, 5))[1]
    assert ask(steps=3)[1]
    pipe.unet.register_to_config(sample_size=16)
    assert ask()[1]
    pipe.unet.register_to_config(sample_size=8)
    assert not ask()[1]
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert ask()[1]
    before = fingerprint(pipe)
    with torch.no_grad():
        next(iter(pipe.vae.parameters())).view(-1)[0] += 1e-6
    assert fingerprint(pipe) != before
    assert ask()[1]
    pipe.text_encoder.to("meta")
    assert fingerprint(pipe) == ""
    assert ask()[1]
    assert ask()[1]


def test_another_process_finds_them(ask, pipe):
    """diffusers keeps the names of defaults as a set's list, in which every process has its own order."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    ask()
    names = pipe.scheduler.config["_use_default_values"]
    assert len(names) > 2
    pipe.scheduler.register_to_config(_use_default_values=[*names[1:], names[0]])
    assert not ask()[1]


def test_damaged_pictures_are_drawn_again(ask, tmp_path):
    ask()
    (picture,) = (tmp_path / "album").glob("*/1.png")
    picture.write_bytes(picture.read_bytes()[:30])
    assert ask()[1]
    assert not ask()[1]


def test_whoever_keeps_the_same_second_says_nothing(ask, tmp_path, monkeypatch):
    """The folder is there again between being taken away and the renaming."""
    ask()
    (picture,) = (tmp_path / "album").glob("*/1.png")
    picture.write_bytes(b"")
    monkeypatch.setattr("infusion.album.shutil.rmtree", lambda path, **_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask()[1]


def test_an_album_that_cannot_be_written_costs_time_only(ask, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(InfusionWarning, match="cannot be kept"):
        pictures, drawn = ask(album=tmp_path / "file")
    assert (len(pictures), drawn) == (2, True)


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_album() == tmp_path / "infusion" / "pictures"
