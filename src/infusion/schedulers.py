"""The schedulers that users know by name, made for a base from its own scheduler's configuration."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from infusion.errors import InfusionError
from infusion.lesson import check_noise

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
    "unipc": UniPCMultistepScheduler,
}


FEW = 8  # steps that distilled bases are drawn in at most

# What a base's own configuration says otherwise of another scheduler, under the same key: DEIS has an algorithm that DPM++ has not.
_OWN = {"dpm++": {"algorithm_type": "dpmsolver++"}}


def check_scheduler(name: str) -> None:
    """Raise InfusionError for a name that is none of `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise InfusionError(f"{name!r} is no scheduler known here; use one of {', '.join(SCHEDULERS)}.")


def scheduler_for(pipe: DiffusionPipeline, name: str) -> SchedulerMixin:
    """The scheduler of that name with the noise of the pipeline's own. Raises InfusionError for an unknown name, for a base whose noise
    is not Stable Diffusion's, and for one whose pipeline draws with another alone."""
    check_scheduler(name)
    check_noise(pipe)
    takes = lambda call: "original_inference_steps" in inspect.signature(call).parameters  # noqa: E731
    if takes(type(pipe).__call__) and not takes(SCHEDULERS[name].set_timesteps):
        raise InfusionError(f"A {type(pipe).__name__} draws with the scheduler 'lcm' alone, not with {name!r}.")
    # Where a base does not say it: some clip to [-1, 1] by default, as suits pixels and ruins latents.
    return SCHEDULERS[name].from_config({"clip_sample": False, **pipe.scheduler.config, **_OWN.get(name, {})})


def few_steps(pipe: DiffusionPipeline) -> bool:
    """Whether the base is drawn by a distilled one's scheduler: such a base learned some of the timesteps only, and no other scheduler suits it."""
    return isinstance(pipe.scheduler, LCMScheduler | TCDScheduler)


def multistep(pipe: DiffusionPipeline) -> SchedulerMixin:
    """What measuring draws by: DPM++, which needs few steps; of a distilled base its own. Raises as `scheduler_for` does."""
    return pipe.scheduler if few_steps(pipe) else scheduler_for(pipe, "dpm++")
