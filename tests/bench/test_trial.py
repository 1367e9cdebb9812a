"""A job from end to end in the smallest size: all methods give a record, and what is frozen forgets nothing."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from infusion.bench import trial
from infusion.bench.figures import point_figures
from infusion.bench.grid import jobs, load_grid
from infusion.errors import InfusionError
from infusion.lesson import prepare_lesson
from infusion.methods.dreambooth import DreamBoothConfig
from infusion.world.facing import Facing, FacingHead
from infusion.world.judge import Judge, JudgeNetwork

SMALL = {"points": [1, 2], "batch": 1, "pictures": 1, "denoising_steps": 1, "subjects": 1}


@pytest.fixture(scope="module")
def guess():
    torch.manual_seed(0)
    network = JudgeNetwork()
    torch.nn.init.constant_(network.heat.bias, 3.0)  # sees subjects everywhere
    return Judge(network)


@pytest.mark.parametrize("label", ["class-word", "infusion", "dreambooth-prior", "perfusion"])
def test_a_job(label, guess, monkeypatch):
    monkeypatch.setattr(trial, "load_judge", lambda: guess)
    settings: dict[str, object] = {"methods.dreambooth-prior.prior": 2, "methods.dreambooth-prior.max_timestep": 900}
    settings |= {f"methods.{drawn_in_part}.strengths": [1.0, 0.5] for drawn_in_part in ("infusion", "dreambooth-prior")}
    (job,) = jobs(load_grid(None, SMALL | settings), (label,))
    record = json.loads(json.dumps(trial.run_job(job, threads=torch.get_num_threads()), allow_nan=False))
    drawn = [(p["step"], p["strength"]) for p in record["points"]]
    whole = {"class-word": [(0, 1)], "perfusion": [(1, 1), (2, 1)]}
    assert drawn == whole.get(label, [(1, 1), (1, 0.5), (2, 1), (2, 0.5)])
    last = record["points"][-1]
    assert len(last["readings"]) == len(record["requests"]) == 14
    assert last["strip"]
    assert point_figures(record, last, record["points"][0])["fidelity"] is not None
    if label in ("class-word", "infusion"):
        assert last["forgetting"] == last["forgetting_class_word"] == 0
    else:
        assert last["forgetting"] > 0
    assert record["job"]["settings"].get("max_timestep") == (900 if label == "dreambooth-prior" else None)
    assert record["versions"].keys() >= {"torch", "diffusers", "transformers"}
    chosen = record["concept_settings"]  # what the defaults came to on this lesson
    assert (label == "infusion") == (chosen is not None and chosen["max_timestep"] == 650)
    if label == "dreambooth-prior":  # half a change of all weights moves the base half as far
        full, half = (p["forgetting"] for p in record["points"][-2:])
        assert half < 0.5 * full
    assert (last["bytes"] > 0) == (label != "class-word")
    if label == "class-word":
        assert last["w2"] == pytest.approx(0, abs=1e-6)


def test_a_method_learns_with_the_grids_settings(monkeypatch, guess):
    seen = {}

    def spy(pipe, lesson, config, prior=None, max_timestep=None):
        seen.update(config=config, prior=prior, max_timestep=max_timestep)
        yield from ()

    monkeypatch.setitem(trial.METHODS, "dreambooth", (spy, DreamBoothConfig))
    settings = {"methods.dreambooth-prior.prior": 2, "methods.dreambooth-prior.max_timestep": 900, "batch": 3}
    (job,) = jobs(load_grid(None, SMALL | settings), ("dreambooth-prior",))
    pipe, chosen = trial._base(), trial.case("test", 0, 0, **job.modality)
    lesson = prepare_lesson(pipe, chosen.photos(), chosen.subject.kind, "subject")
    assert list(trial.states(job, pipe, lesson, chosen)) == []
    assert seen["config"] == DreamBoothConfig(2, 3, learning_rate=3e-4, identifier="sks", seed=0)
    assert seen["max_timestep"] == 900
    assert len(seen["prior"].pictures) == 2


def test_variety_is_ours_as_a_share_of_the_bases():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()  # two prompts, two pictures each
    assert trial._variety([3 * x, x], 2) == pytest.approx(3)
    assert trial._variety([x, x], 1) is None


def test_the_nearest_photo_may_be_one_in_the_mirror():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    photos = trial._pixels(photo)[None]
    assert trial.to_nearest(photo, photos) == trial.to_nearest(ImageOps.mirror(photo), photos) == 0
    assert trial.to_nearest(ImageOps.flip(photo), photos) > 0.1


def test_photos_that_face_one_way_are_not_mirrored(guess, monkeypatch):
    monkeypatch.setattr(trial, "load_judge", lambda: guess)
    flips = []

    def prepare(*args, flip, **kwargs):
        flips.append(flip)
        return prepare_lesson(*args, flip=flip, **kwargs)

    monkeypatch.setattr(trial, "prepare_lesson", prepare)
    either, left, beside = (
        jobs(load_grid(None, SMALL | {"modalities": [m]}), ("class-word",))[0]
        for m in ({}, {"facing": "left"}, {"position": "left"})
    )
    with pytest.raises(InfusionError, match="head for the facing is missing"):
        trial.run_job(left)
    monkeypatch.setattr(guess, "facing", Facing(FacingHead(), threshold=0.5))
    record = trial.run_job(left, threads=torch.get_num_threads())
    trial.run_job(either, threads=torch.get_num_threads())
    trial.run_job(beside, threads=torch.get_num_threads())
    assert flips == [False, True, False]
    assert record["trained"]["facing"] == "left"
    assert {r["facing"] for r in record["points"][0]["readings"]} <= {"left", "right", None}


def test_a_jobs_peak_of_memory_is_its_own():
    held = bytearray(b"x" * (200 << 20))
    before = trial.peak_memory()
    del held
    trial.forget_peak()
    after = trial.peak_memory()
    if after is not None and not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process begin its peak anew")
    assert after is None if sys.platform != "linux" else after < before - (100 << 20)
