"""The parts of the recipes' comparison, and a run of it in small."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from infusion.world.dataset import build_dataset, load_dataset
from tests.test_examples import script

recipes = script("benchmarks/recipes")


def test_noise_and_the_velocity_that_it_implies():
    clean, noise = torch.randn(2, 3, 4, 4, 4).unbind()
    times = torch.tensor([10, 500, 990])
    a, s = recipes.ALPHAS[times].sqrt()[:, None, None, None], (1 - recipes.ALPHAS[times]).sqrt()[:, None, None, None]
    noisy, velocity = a * clean + s * noise, a * noise - s * clean

    class Noise(nn.Module):
        device = torch.device("cpu")

        def forward(self, x, t, states):
            return SimpleNamespace(sample=noise + 0.1)

    said = recipes.Velocity(Noise())(noisy, times, None).sample
    torch.testing.assert_close(said, velocity + 0.1 / a, rtol=1e-3, atol=1e-3)  # so its square weighs 1 / alpha


def test_every_parameter_has_one_optimizer():
    networks = nn.ModuleDict({"linear": nn.Linear(4, 3), "words": nn.Embedding(5, 4), "kernel": nn.Conv2d(2, 2, 3)})
    optimizer = recipes.MuonBesideAdamW(networks, 4e-4)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in networks.parameters())
    assert [id(p) for group in optimizer.both[0].param_groups for p in group["params"]] == [
        id(networks["linear"].weight)
    ]
    before = [p.detach().clone() for p in networks.parameters()]
    sum(p.square().sum() for p in networks.parameters()).backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(networks.parameters(), before, strict=True))


def test_longest_and_shortest_captions(tmp_path):
    for _ in build_dataset(tmp_path, 6, 0):
        pass
    data = load_dataset(tmp_path)

    def lengths(which):
        ids = np.asarray(recipes.captioned(data, which).ids)
        return (ids != ids[:, :, -1:]).sum(-1)

    assert (lengths("longest") == lengths("any").max(1)[:, None]).all()
    assert (lengths("shortest") == lengths("any").min(1)[:, None]).all()
    longest = recipes.captioned(data, "longest")
    assert longest.words.shape == data.words.shape
    row, which = 4, int(lengths("any")[4].argmax())
    assert (longest.words[row] == data.words[row, which]).all()
    assert (longest.ids[row] == data.ids[row, which]).all()


@pytest.mark.slow
def test_a_run_in_small(tmp_path, capsys):
    recipes.main(tmp_path, 0.001, 64, ["eps", "muon"], tmp_path / "recipes.json")
    runs = json.loads((tmp_path / "recipes.json").read_text())
    assert {run["name"] for run in runs} == {"eps", "muon"}
    assert all(run["seen"] >= 32 and len(run["subject"]) == 5 for run in runs)
    assert "| Muon for matrices | 32" in capsys.readouterr().out
