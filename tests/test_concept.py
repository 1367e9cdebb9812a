"""The concept file: saved equals loaded, and bad files are refused in a sentence."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from infusion.concept import Concept
from infusion.errors import InfusionError

RESIDUALS = {"down.attn2": torch.tensor([0.1, -2.0, 3e-8]), "up.attn2": torch.randn(5)}


@pytest.fixture
def path(tmp_path):
    return Concept("milo", "teddy bear", RESIDUALS, {"steps": 3, "learning_rate": 0.02}).save(
        tmp_path / "milo.safetensors"
    )


def test_saved_equals_loaded(path, tmp_path):
    loaded = Concept.load(path)
    assert (loaded.name, loaded.word, loaded.settings) == ("milo", "teddy bear", {"steps": 3, "learning_rate": 0.02})
    assert loaded.residuals.keys() == RESIDUALS.keys()
    assert all(torch.equal(loaded.residuals[k], RESIDUALS[k]) for k in RESIDUALS)
    assert loaded.count == 8
    again = loaded.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.safetensors", "milo.safetensors"]


@pytest.mark.parametrize(
    ("name", "word", "residuals", "message"),
    [
        ("", "dog", {}, "is no concept name"),
        ("my dog", "dog", {}, "is no concept name"),
        ("<milo>", "dog", {}, "is no concept name"),
        ("milo", " ", {}, "class word"),
        ("milo", "dog", {"a": torch.zeros(2, 2)}, "must be a vector"),
        ("milo", "dog", {"a": torch.tensor([1.0, float("nan")])}, "not finite"),
    ],
)
def test_bad_values(name, word, residuals, message):
    with pytest.raises(InfusionError, match=message):
        Concept(name, word, residuals)


def test_bad_files(path, tmp_path):
    with pytest.raises(InfusionError, match="no concept file"):
        Concept.load(tmp_path / "none.safetensors")
    content = path.read_bytes()
    for cut in (0, 7, 40, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:cut])
        with pytest.raises(InfusionError, match="damaged or no safetensors"):
            Concept.load(tmp_path / "cut")
    save_file({"lora.up": torch.zeros(2)}, tmp_path / "lora")
    with pytest.raises(InfusionError, match="load_lora_weights"):
        Concept.load(tmp_path / "lora")
    save_file({"a": torch.zeros(2)}, tmp_path / "half", {"format": "infusion-1", "name": "milo"})
    with pytest.raises(InfusionError, match="lacks part of its header"):
        Concept.load(tmp_path / "half")


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InfusionError, match="cannot be written"):
        Concept("milo", "dog", RESIDUALS).save(tmp_path / "file" / "milo.safetensors")
