"""A training by the clock that a kill cannot lose: networks, optimizer and averaged weights behind one checkpoint.

run = Run(networks, optimizer, schedule, folder / "base.pt")
while run.unfinished:
    run.update(loss_of(networks, run.step), accelerator)
run.finish()                       # the networks hold the averaged weights
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_bf16_available
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from infusion.errors import InfusionError


class Schedule(Protocol):
    """What the configuration of a training by the clock has. minutes: wall time over all resumed parts. The learning rate rises over
    `warmup` steps and falls to zero over `decay`, a share of the time. ema: decay of the averaged weights. save_every: steps between checkpoints."""

    @property
    def minutes(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> float: ...
    @property
    def ema(self) -> float: ...
    @property
    def save_every(self) -> int: ...


class Run:
    """A training under way. Begins where the checkpoint left it, if there is one. step: updates made; seconds: wall time spent."""

    def __init__(
        self, networks: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, checkpoint: Path
    ) -> None:
        self.networks, self.optimizer, self.schedule, self.checkpoint = networks, optimizer, schedule, checkpoint
        self.ema = EMAModel(networks.parameters(), decay=schedule.ema, use_ema_warmup=True, power=0.75, foreach=True)
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._resume()
        self._last = time.monotonic()

    @property
    def unfinished(self) -> bool:
        """Whether there is time left."""
        return self.seconds < 60 * self.schedule.minutes

    @property
    def share(self) -> float:
        """Of the time, that is spent."""
        return self.seconds / (60 * self.schedule.minutes)

    @property
    def learning_rate(self) -> float:
        """That of the coming step."""
        s = self.schedule
        return s.learning_rate * min(1.0, (self.step + 1) / s.warmup, (1 - self.share) / s.decay)

    def update(self, loss: Tensor, accelerator: Accelerator) -> None:
        """One step down the loss's gradient, clipped to norm 1; saves when it is time to."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.networks.parameters())
        self.step += 1
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        if self.step % self.schedule.save_every == 0:
            self.save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the networks hold the averaged weights."""
        self.ema.store(self.networks.parameters())
        self.ema.copy_to(self.networks.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.networks.parameters())

    def finish(self) -> None:
        """Save, and leave the averaged weights in the networks."""
        self.save()
        self.ema.copy_to(self.networks.parameters())

    def save(self) -> None:
        """Write the checkpoint; a kill leaves the old one or the new one."""
        state = {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_whole(state, self.checkpoint)

    def _resume(self) -> None:
        device = next(self.networks.parameters()).device
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = given  # the optimizer's own, not the checkpoint's: another device may have another
        self.ema.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]


def adamw(networks: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The base's optimizer: matrices, kernels and embeddings decay, biases and norms do not."""
    decayed = [p for p in networks.parameters() if p.ndim >= 2]
    plain = [p for p in networks.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.99), fused=True)


def build_accelerator() -> Accelerator:
    """Accelerate's device, with networks in bf16 where the device is faster in it. A CPU that must emulate it is eighty times slower so than in
    fp32, one that has it in AVX-512 alone nearly twice (docs/log.md). Raises InfusionError for several processes: each would train the same,
    into the same files."""
    state = PartialState()
    if state.num_processes > 1:
        raise InfusionError(
            f"This training uses one device and was started {state.num_processes} times; start it with python -m, without a launcher."
        )
    native = is_bf16_available()
    if state.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if state.device.type == "cpu":
        able = {name for name, has in torch.cpu.get_capabilities().items() if has and name.endswith("bf16")}
        native = bool(able - {"avx512_bf16"})
    return Accelerator(mixed_precision="bf16" if native else "no")


def hardware(accelerator: Accelerator) -> str:
    """What a training runs on, for logs and model cards."""
    device = str(accelerator.device)
    if accelerator.device.type == "cpu":
        device = f"{torch.get_num_threads()} thread(s) of {_processor()}"
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    precision = "bf16 autocast" if accelerator.mixed_precision == "bf16" else "fp32"
    return f"{platform.machine()}, {device}, {precision}, torch {torch.__version__}"


def between(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights on the straight line from those before a training, at 0, to those after it, at 1; counts are those after it."""
    return {
        name: torch.lerp(before[name].to(end), end, share) if end.is_floating_point() else end
        for name, end in after.items()
    }


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def generator_of(rng: np.random.Generator) -> torch.Generator:
    """A torch generator on the CPU, seeded by the next number of `rng`: the same noise on every device."""
    return torch.Generator().manual_seed(int(rng.integers(2**31)))


def save_whole(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def log(folder: Path, **values: object) -> None:
    """Add a line to the folder's log.jsonl, with the time, and print it."""
    line = json.dumps({"time": round(time.time()), **values})
    with (folder / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def check_same(folder: Path, **settings: Any) -> None:
    """Raise InfusionError where the training begun in `folder` had another of these settings: its scenes and its checkpoint would be taken for
    this one's."""
    log_there = (folder / "log.jsonl").exists()
    begun = next((line for line in read_log(folder) if line["stage"] == "start"), {}) if log_there else {}
    for name, value in settings.items():
        if name in begun and begun[name] != value:
            raise InfusionError(
                f"{str(folder)!r} holds a training with {name} {begun[name]}, this one has {value}; go on with the same, or give a new --folder."
            )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The run's log, one dict a line; where a part was run again, the later lines count."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    latest = {(line["stage"], line.get("step", line["time"])): line for line in lines}
    return sorted(latest.values(), key=lambda line: line["time"])
