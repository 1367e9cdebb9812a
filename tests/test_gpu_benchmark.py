"""The GPU benchmark's whole path, on a pretend device with CUDA's own calls stood in for: it was never run on a GPU here."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import infusion
from infusion.demo import MILO, draw_photos
from infusion.training import LearnConfig
from tests.pretend import pretend
from tests.test_examples import script


def test_it_says_where_it_cannot_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        script("benchmarks/gpu").main(tmp_path / "gpu.json", None, None, "dog", 1, 1, torch.float32)


def test_its_path_with_cuda_stood_in_for(tmp_path, monkeypatch):
    stand_ins = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "get_device_name": lambda: "none",
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pretend(doubles=False) as device:
        load = infusion.load_base
        benchmark = script("benchmarks/gpu")
        monkeypatch.setattr(benchmark.infusion, "load_base", lambda base, _, dtype: load(base, "cpu", dtype).to(device))
        monkeypatch.setattr(benchmark.infusion, "LearnConfig", lambda **_: LearnConfig(steps=1, batch=1))
        pictures = sys.modules["steps"].pictures
        monkeypatch.setattr(benchmark.cpu_steps, "pictures", lambda pipe, concept, *_: pictures(pipe, concept, 1, 1))
        photos = draw_photos(MILO, tmp_path / "photos", count=2)
        result = benchmark.main(tmp_path / "gpu.json", "embedded", photos, "dog", 1, 1, torch.bfloat16)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    assert result["learned"]["bytes"] == (tmp_path / "gpu.safetensors").stat().st_size
    assert result["parity_over_max_eps"] < 1e-5
    assert (tmp_path / "gpu.png").exists()
    assert "full fine-tune" not in result["training"]["seconds_per_step"]
    assert set(result["training"]["peak_gib"]) == set(result["training"]["seconds_per_step"])
