"""The examples and benchmarks run, small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

import infusion
from infusion.demo import MILO, draw_photos
from tests.conftest import random_concept

ROOT = Path(__file__).parent.parent


def script(name: str):
    """A script of the repository as a module."""
    path = ROOT / f"{name}.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ten_lines(tmp_path):
    photos = draw_photos(MILO, tmp_path / "photos", count=2)
    picture = script("examples/ten_lines").main(photos, tmp_path, steps=2)
    with Image.open(picture) as image:
        assert image.size == (64, 64)


def test_composing(tmp_path):
    unet = infusion.load_base(device="cpu").unet
    paths = [
        random_concept(unet, name, word).save(tmp_path / name) for name, word in (("milo", "dog"), ("tuna", "fish"))
    ]
    assert script("examples/composing").main(*paths, out=tmp_path, steps=2).exists()


def test_side_by_side(tmp_path):
    photos = draw_photos(MILO, tmp_path / "photos", count=2)
    subjects = [("milo", "dog", photos), ("rex", "cat", photos)]
    pictures = script("examples/side_by_side").main(subjects, tmp_path, steps=2)
    assert [p.name for p in pictures] == ["milo.png", "rex.png"]
    assert all(p.exists() for p in pictures)
    assert infusion.Concept.load(tmp_path / "rex.safetensors").word == "cat"


def test_step_benchmark(tmp_path):
    result = script("benchmarks/steps").main(
        rounds=1, batch=1, count=1, sampling_steps=1, concepts=2, out=tmp_path / "steps.json"
    )
    assert set(result["training"]["seconds_per_step"]) >= {
        "Infusion, two streams",
        "LoRA (peft, rank 4)",
        "full fine-tune",
    }
    assert (tmp_path / "steps.json").exists()


def test_format_benchmark():
    rows = {name: (size, error) for name, size, error in script("benchmarks/formats").main()}
    ours = next(row for name, row in rows.items() if "ours" in name)
    assert ours[0] == 9_750
    assert ours[1] < 0.05


@pytest.mark.slow
def test_gallery(tmp_path):
    script("benchmarks/gallery").main(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"world.png", "base.png", "maps.png", "autoencoder.png"}


@pytest.mark.slow
def test_real_size(tmp_path):
    """Stable Diffusion 1.5's true configuration, random weights: minutes and about 10 GB."""
    Image.effect_noise((600, 512), 90).save(tmp_path / "photo.png")
    result = script("benchmarks/real_size").main(tmp_path, "dog", "stable-diffusion-v1", None, None)
    assert (result["layers"], result["values"]) == (16, 12_480)
    assert result["file_bytes"] <= 11_264
    assert result["parity_over_max_eps"] < 1e-5


@pytest.mark.parametrize(
    ("above", "stops", "keeps"),
    [
        ([(0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.0, 0.0)], None, 100),
        ([(0.0, 0.0), (0.05, 0.1), (0.2, 0.0), (0.2, 0.0)], 100, 50),
        ([(0.2, 0.0), (0.2, 0.2)], 50, 50),
    ],
)
def test_where_looks_would_stop_a_training(above, stops, keeps):
    looks = [{"step": 25 * i, "above": {"background": b, "position": p}} for i, (b, p) in enumerate(above, 1)]
    assert script("benchmarks/stopping").outcome(looks, 0.1) == {"stops": stops, "keeps": keeps}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["infusion", "dreambooth"])
def test_training_stops_before_what_the_photos_show_comes_back(method):
    """By the judge, at the step that would be kept: at most 10 points above the base's own rate. Minutes."""
    found = script("benchmarks/stopping").watched(method, number=0, steps=60, every=10)
    (kept,) = [look for look in found["looks"] if look["step"] == found["keeps"]]
    assert kept["leaks"].keys() == {"background", "position"}
    assert all(leak["here"] - leak["base"] <= 0.1 for leak in kept["leaks"].values())
