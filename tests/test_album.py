"""The base's pictures are kept once and found again by the same base, prompts, seeds and settings only."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

from infusion.album import default_album, fingerprint, kept
from infusion.errors import InfusionWarning
from infusion.generation import Picture


@pytest.fixture
def ask(pipe, tmp_path):
    """Asks for pictures; returns them and the seeds of those that had to be drawn. breaks_at: how many are drawn before all ends."""

    def asked(prompts=("a dog", "a cat"), seeds=(3, 4), album=tmp_path / "album", breaks_at=None, **settings):
        drawn = []

        def draw(prompts, seeds):
            for prompt, seed in zip(prompts, seeds, strict=True):
                if len(drawn) == breaks_at:
                    raise KeyboardInterrupt
                drawn.append(seed)
                yield [Picture(Image.fromarray(np.full((4, 6, 3), 10 * seed, np.uint8)), prompt, seed)]

        try:
            return kept(album, pipe, prompts, seeds, {"steps": 2, **settings}, draw), drawn
        except KeyboardInterrupt:
            return [], drawn

    return asked


def test_what_was_drawn_is_found_again(ask, tmp_path):
    first, second = ask(), ask()
    assert (first[1], second[1]) == ([3, 4], [])
    for a, b in zip(first[0], second[0], strict=True):
        assert (a.prompt, a.seed, a.image.tobytes()) == (b.prompt, b.seed, b.image.tobytes())
    assert [p.name for p in (tmp_path / "album").glob("*/.*")] == []
    assert ask(album=None)[1] == [3, 4]


def test_only_what_is_missing_is_drawn(ask):
    assert ask(breaks_at=1)[1] == [3]
    assert ask()[1] == [4]
    pictures, drawn = ask(prompts=("a dog", "a bird", "a cat", "a dog"), seeds=(3, 4, 4, 5))
    assert drawn == [4, 5]
    assert [(p.prompt, p.seed) for p in pictures] == [("a dog", 3), ("a bird", 4), ("a cat", 4), ("a dog", 5)]
    assert [p.image.getpixel((0, 0))[0] for p in pictures] == [30, 40, 40, 50]


def test_anything_else_is_drawn(ask, pipe):
    ask()
    assert ask(steps=3)[1]
    pipe.register_to_config(requires_safety_checker=not pipe.config["requires_safety_checker"])
    assert ask()[1]
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
    (picture,) = (tmp_path / "album").glob("*/*-4.png")
    picture.write_bytes(picture.read_bytes()[:30])
    assert ask()[1] == [4]
    assert not ask()[1]


def test_a_loras_strength_makes_another_base(pipe, tmp_path):
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "soft")
    found = [fingerprint(pipe)]
    pipe.unet.set_adapters(["soft"], [0.5])
    found.append(fingerprint(pipe))
    pipe.unet.disable_lora()
    found.append(fingerprint(pipe))
    assert len(set(found)) == 3


def test_an_album_that_cannot_be_written_costs_time_only(ask, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(InfusionWarning, match="Pictures are not kept and will be drawn again: .* cannot be written"):
        pictures, drawn = ask(album=tmp_path / "file")
    assert (len(pictures), drawn) == (2, [3, 4])


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_album() == tmp_path / "infusion" / "pictures"
