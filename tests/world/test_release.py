"""The model card tells of the weights that are released."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from infusion.world.pretrain import PretrainConfig
from infusion.world.release import model_card


@pytest.mark.parametrize(
    ("kept", "seen", "minutes"), [(None, "96,000 pictures", "50 min"), (2000, "64,000 pictures", "33 min")]
)
def test_the_card_tells_of_the_step_that_was_kept(tmp_path, kept, seen, minutes):
    log = [
        {"stage": "start", "time": 0, "device": "cpu", **asdict(PretrainConfig())},
        {"stage": "autoencoder", "time": 1, "step": 7000, "mse": 0.1, "psnr": 27.0},
        *({"stage": "base", "time": step, "step": step, "seen": 32 * step, "seconds": step} for step in (1000, 2000, 3000)),
        {"stage": "picked", "time": 4000, "last": 0.5, "best": 0.6, "kept": kept},
        {"stage": "done", "time": 4001, "peak": 0.91, "iou": 0.51, "own": 0.84, "ratio": 9.0, "count": 10},
    ]  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    card = model_card(log, {"sha256": "abc", "files": {"unet": ["a.safetensors"]}}, tmp_path)
    assert seen in card
    assert f"text encoder and UNet {minutes}" in card
    assert "8 bytes" in card
    assert "85% on their own" in card
