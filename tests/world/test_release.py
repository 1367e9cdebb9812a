"""The model card tells of the weights that are released."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from infusion.world.base_training import PretrainConfig
from infusion.world.release import EXAMINATION, model_card, training_of
from infusion.world.runs import between


@pytest.mark.parametrize(("kept", "share", "seen", "minutes"), [(None, 1.0, 96_000, 50), (2000, 0.5, 64_000, 33)])
def test_the_card_tells_of_the_step_that_was_kept_and_of_earlier_trainings(tmp_path, kept, share, seen, minutes):
    log = [
        {"stage": "start", "time": 0, "hardware": "an abacus", **asdict(PretrainConfig())},
        {"stage": "autoencoder", "time": 1, "step": 7000, "mse": 0.1, "psnr": 27.0},
        *({"stage": "base", "time": step, "step": step, "seen": 32 * step, "seconds": step} for step in (1000, 2000, 3000)),
        {"stage": "picked", "time": 4000, "scores": {"last": 0.5, "best": 0.6}, "kept": kept, "share": share},
        {"stage": "done", "time": 4001, "peak": 0.91, "iou": 0.51, "own": 0.84, "ratio": 9.0, "count": 10},
    ]  # fmt: skip
    training = training_of(log)
    assert (training["pictures"], training["minutes"]) == (seen, minutes)
    assert training["autoencoder"]["psnr"] == 27.0
    assert training_of([line for line in log if line["stage"] != "autoencoder"])["autoencoder"] is None
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    (tmp_path / "loss-2.png").touch()
    index = {"sha256": "abc", "files": {"unet": ["a.safetensors"]}}
    earlier = {**training, "pictures": 1000, "minutes": 7, "settings": "learning rate 0.5", "autoencoder": None}
    card = model_card([earlier, training], log, index, tmp_path)
    assert f"{seen + 1000:,} pictures seen" in card
    assert f"text encoder and UNet {minutes + 7} min" in card
    assert "1. 1,000 pictures in 7 min (an abacus); learning rate 0.5" in card
    assert f"2. {seen:,} pictures" in card
    assert "by the judge" not in card  # not examined
    examined = {"sha256": "abc", "followed": {"kind": {"value": 0.945, "low": 0.927, "high": 0.959, "n": 1800}}}
    (tmp_path / EXAMINATION).write_text(json.dumps(examined))
    assert "| class | 94.5% [92.7%, 95.9%] | 1,800 |" in model_card([training], log, index, tmp_path)
    assert "| class |" not in model_card([training], log, {**index, "sha256": "of other weights"}, tmp_path)
    rewarded = {**training, "settings": "from 0 pictures on: reward 0.1", "minutes": 9}
    start = {**log[0], "reward_weight": 0.1}
    commands = model_card([earlier, rewarded], [start, *log[1:]], index, tmp_path)
    assert "--minutes 7\n    python -m infusion.world.release --folder runs/base\n    python -m" in commands
    assert "--folder runs/rewarded --from-weights --minutes 9 --reward-weight 0.1" in commands
    assert "runs/rewarded" not in card
    assert ("50% of the way from the weights before" in card) == (share < 1)
    assert "loss-2.png" in card
    assert "loss-1.png" not in card
    assert "8 bytes" in card
    assert "85% on their own" in card


def test_weights_between_two_trainings():
    before = {"a": torch.tensor([0.0, 2.0]), "count": torch.tensor(1)}
    after = {"a": torch.tensor([1.0, 0.0]), "count": torch.tensor(5)}
    found = between(before, after, 0.25)
    assert found["a"].tolist() == [0.25, 1.5]
    assert int(found["count"]) == 5
