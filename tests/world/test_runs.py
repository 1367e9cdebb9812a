"""A training by the clock: what a kill leaves, and whose weights the networks hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from infusion.errors import InfusionError
from infusion.world.runs import Run, build_accelerator, check_same, hardware, log

SCHEDULE = SimpleNamespace(minutes=5, learning_rate=0.1, warmup=4, decay=0.5, ema=0.9, save_every=3)


def begun(path, schedule=SCHEDULE):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    return network, Run(network, torch.optim.AdamW(network.parameters(), 0.1), schedule, path)


def train(network, run, steps):
    accelerator = Accelerator(cpu=True)
    while run.step < steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(run.step))
        run.update((network(x) - 1).square().mean(), accelerator)


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path, monkeypatch):
    ticks = iter(range(1000))  # a clock of one second a look, so that the learning rate is the same in both
    monkeypatch.setattr("infusion.world.runs.time.monotonic", lambda: next(ticks))
    whole = begun(tmp_path / "whole.pt")
    train(*whole, 8)
    killed = begun(tmp_path / "killed.pt")
    train(*killed, 5)  # the checkpoint is that of step 3
    again = begun(tmp_path / "killed.pt")
    assert (again[1].step, again[1].seconds) == (3, 3.0)
    train(*again, 8)
    whole[1].finish()
    again[1].finish()
    for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_averaged_weights_are_lent_and_taken_back_even_after_an_error(tmp_path):
    network, run = begun(tmp_path / "a.pt")
    train(network, run, 6)
    before = network.weight.detach().clone()
    lent = []

    def interrupted():
        with run.averaged():
            lent.append(network.weight.detach().clone())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not torch.equal(lent[0], before)
    assert torch.equal(network.weight, before)
    run.finish()
    assert torch.equal(network.weight, lent[0])


def test_the_learning_rate_rises_and_falls_to_nothing(tmp_path):
    network, run = begun(tmp_path / "a.pt")
    assert run.learning_rate == pytest.approx(0.1 / 4)
    train(network, run, 4)
    assert run.learning_rate == pytest.approx(0.1)
    run.seconds = 5 * 60 * 0.75
    assert run.learning_rate == pytest.approx(0.05)
    assert run.unfinished
    run.seconds = 300.0
    assert run.learning_rate == 0
    assert not run.unfinished


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of CPUs")
@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "no")])
def test_bf16_is_used_only_where_the_processor_is_faster_in_it(monkeypatch, has, precision):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": True, "amx_bf16": has})
    AcceleratorState._reset_state(reset_partial_state=True)  # one a process, else the first test's
    accelerator = build_accelerator()
    try:
        assert accelerator.mixed_precision == precision
        assert ("bf16" in hardware(accelerator)) == has
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_launcher_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("infusion.world.runs.PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(InfusionError, match="was started 2 times; start it with python -m"):
        build_accelerator()


def test_the_hardware_of_a_device_without_a_name_is_the_device():
    assert ", mps, fp32, torch " in hardware(SimpleNamespace(device=torch.device("mps"), mixed_precision="no"))


def test_a_folder_holds_one_training(tmp_path):
    check_same(tmp_path, seed=1)  # nothing there yet
    log(tmp_path, stage="start", seed=1, from_weights=False)
    check_same(tmp_path, seed=1, from_weights=False, drawn=3)
    with pytest.raises(InfusionError, match="holds a training with from_weights False, this one has True"):
        check_same(tmp_path, seed=1, from_weights=True)
