"""The two streams on one UNet, by torch's own forward hooks.

A UNet call in which some rows carry a concept runs with one more row for each of them, the
foundational row: same latents, same text, no residual. In every cross-attention layer a customized
row takes the foundational row's output plus heat times residual (`layers.py`); everything else
of the UNet runs per row as ever. At and above a concept's `max_timestep` its rows are the base's. Which
rows carry what is told by a `Plan`; prompts and pipelines are `pipelines.py`'s business. Removing the hooks
leaves nothing behind.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from infusion.errors import InfusionError
from infusion.layers import Call, LayerHooks, Mode, Record
from infusion.prompts import Mention

Rows = tuple[tuple[Mention, ...], ...]  # the mentions of each conditional row


def cross_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """Paths and modules of the UNet's cross-attention layers, in the UNet's own order.

    Raises InfusionError where there are none, or where their projections are fused.
    """
    layers = {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, Attention) and path.endswith("attn2") and module.is_cross_attention
    }
    if not layers:
        raise InfusionError(
            f"{type(unet).__name__} has no cross-attention to the text; concepts need a base such as Stable Diffusion 1.5, 2.1 or SDXL."
        )
    if any(getattr(module, "fused_projections", False) for module in layers.values()):
        raise InfusionError(
            "The UNet's projections are fused; call pipe.unet.unfuse_qkv_projections() before attaching concepts."
        )
    return layers


def value_lengths(unet: nn.Module) -> dict[str, int]:
    """Length of the residual of each cross-attention layer: heads x head_dim."""
    return {path: int(m.to_v.out_features) for path, m in cross_attention_layers(unet).items()}


def projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """to_k and to_v of every cross-attention layer, by module path."""
    return {
        f"{path}.{part}": getattr(layer, part)
        for path, layer in cross_attention_layers(unet).items()
        for part in ("to_k", "to_v")
    }


def unwrapped(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; others as they are."""
    return getattr(module, "_orig_mod", module)


def require_unet(pipe: DiffusionPipeline) -> UNet2DConditionModel:
    """The pipeline's UNet, out of what `torch.compile` wraps it in. Raises InfusionError for pipelines of another kind."""
    unet = unwrapped(getattr(pipe, "unet", None))
    if unet is None:
        raise InfusionError(
            f"{type(pipe).__name__} has no UNet; Infusion works with Stable Diffusion 1.x, 2.x and SDXL, not yet with transformer bases."
        )
    if not isinstance(unet, UNet2DConditionModel):
        raise InfusionError(
            f"{type(pipe).__name__} draws with a {type(unet).__name__}; Infusion works with Stable Diffusion 1.x, 2.x and SDXL, not yet with other kinds."
        )
    return unet


@contextmanager
def frozen(unet: nn.Module) -> Iterator[None]:
    """Within it the UNet is in evaluation mode and its own weights want no gradient, so that nothing is kept for one."""
    training, learnable = unet.training, [p for p in unet.parameters() if p.requires_grad]
    try:
        unet.eval()
        for p in learnable:
            p.requires_grad_(False)
        yield
    finally:
        unet.train(training)
        for p in learnable:
            p.requires_grad_(True)


def picture_side(pipe: DiffusionPipeline) -> int:
    """Pixels a side of the pictures that the base was made for. Raises InfusionError as `require_unet` does."""
    return require_unet(pipe).config["sample_size"] * pipe.vae_scale_factor


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where the pipeline computes, also while offloading keeps its weights elsewhere."""
    return pipe._execution_device


@dataclass(frozen=True, eq=False)  # two plans of equal text are two plans
class Plan:
    """What the conditional rows of the coming UNet calls carry.

    rows: mentions of each conditional row. states: the rows' text states (n, m, d), by which a UNet
    call is recognized as one of this plan's; which rows are customized follows from the plan and the batch
    alone, so a negative prompt may be the same text. guidance: whether the calls bring unconditional rows too, None where
    that is not known. caller: whose calls they are, for those who must tell.
    """

    rows: Rows
    states: Tensor
    guidance: bool | None = None
    caller: object = None


class _Speaking(threading.local):
    """Who alone is heard by the calls of a UNet in this thread: a training's passes must not follow the plan of a drawing that broke off."""

    def __init__(self) -> None:
        self.on: WeakKeyDictionary[nn.Module, Streams | None] = WeakKeyDictionary()


_speaking = _Speaking()


class Here(threading.local):
    """What streams keep for each thread that calls their UNet; a new one begins with nothing."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []  # those in force, the innermost last
        self.mode: Mode = "joint"
        self.call: Call | None = None  # in work


class Streams:
    """The two streams on one UNet: hooks, the concepts they know, and the plans of the calls in each thread.

    Threads may call the UNet at once; a plan counts in the thread that laid it. Concepts and hooks are everyone's: what changes them while
    another thread calls changes that call.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.layers = cross_attention_layers(unet)
        self.residuals: dict[str, Mapping[str, Tensor]] = {}  # concept name -> path -> residual
        self.limits: dict[str, int] = {}  # concept name -> the timestep below which alone it is heard
        self.two_streams = True
        self.here = Here()
        self.met: WeakKeyDictionary[Plan, int] = WeakKeyDictionary()  # those that a UNet call followed, and its rows
        self.heard: WeakSet[Plan] = WeakSet()  # those met of which a call heard a concept
        self.strayed: WeakSet[Plan] = WeakSet()  # those met of which a later call as large brought other text states
        self._signature = inspect.signature(unet.forward)
        self._hooks = [LayerHooks(path, layer) for path, layer in self.layers.items()]
        self._handles = [
            unet.register_forward_pre_hook(self._begin, with_kwargs=True),
            unet.register_forward_hook(self._end),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Streams:
        """A copied UNet brings its hooks along; they stay ours, and know that they are on a copy, which is the base's alone."""
        return self

    def remove(self) -> None:
        """Take all hooks off the UNet."""
        for hooks in (*self._hooks, *self._handles):
            hooks.remove()

    @contextmanager
    def calls(self, plan: Plan, mode: Mode = "joint") -> Iterator[None]:
        """UNet calls of this thread within follow `plan`, and none of other streams on the UNet. "record" computes the foundational stream alone and keeps
        its outputs and words' heat; "replay" computes the customized stream alone from what was recorded."""
        here, on = self.here, _speaking.on
        before, speaker = (here.plans, here.mode), on.get(self.unet)
        here.plans, here.mode = [plan], mode
        on[self.unet] = self
        try:
            yield
        finally:
            here.plans, here.mode = before
            on[self.unet] = speaker

    @property
    def recorded(self) -> dict[str, Record]:
        """What the thread's last "record" left, by layer path."""
        return {hooks.path: hooks.recorded for hooks in self._hooks if hooks.recorded}

    def word_strengths(self) -> Tensor | None:
        """Of the thread's UNet call in work, every row's strength on the concepts' words (b, m); None where no row carries one."""
        call = self.here.call
        if call is None:
            return None
        return call.words.new_zeros(call.batch, call.words.shape[1]).index_add(0, call.rows[call.entry_row], call.words)

    # --- hooks ---------------------------------------------------------------------------------
    # They stay out of torch.compile's graphs: all that depends on a prompt or a concept is
    # decided in them, so that compiled layers see tensors only and are not compiled again for another concept.

    @torch.compiler.disable
    def _begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._work_on(None)
        if unet is not self.unet or (_speaking.on.get(unet) or self) is not self:
            return None
        bound = self._signature.bind(*args, **kwargs)
        states = bound.arguments["encoder_hidden_states"]
        batch = bound.arguments["sample"].shape[0]
        call = self._planned(batch, states, bound.arguments["timestep"])
        self._work_on(call)
        if call is None or not call.doubled:
            return None
        rows = call.rows
        bound.arguments = {k: _append_rows(v, rows, batch) for k, v in bound.arguments.items()}
        return bound.args, bound.kwargs

    @torch.compiler.disable
    def _end(self, unet: nn.Module, args: tuple, output: Any) -> Any:
        call = self.here.call
        if call is None or not call.doubled:
            return None
        if isinstance(output, tuple):
            return (output[0][: call.batch], *output[1:])
        output.sample = output.sample[: call.batch]
        return output

    def _work_on(self, call: Call | None) -> None:
        self.here.call = call
        for hooks in self._hooks:
            hooks.begin(call)

    # --- rows ----------------------------------------------------------------------------------

    def _planned(self, batch: int, states: Tensor, timestep: Tensor | float) -> Call | None:
        """The call's customized rows, or None for a call that carries no concept. Of the plans in force the innermost counts whose
        text states the call brings."""
        for plan in reversed(self.here.plans):
            n = len(plan.rows)
            if not n or batch % n or states.shape[1:] != plan.states.shape[1:]:
                continue
            chunks = [torch.equal(c, plan.states.to(c)) for c in states.split(n)]
            if any(chunks):
                return self._following(plan, chunks, states, timestep)
        innermost = self.here.plans[-1] if self.here.plans else None
        if innermost and self.met.get(innermost) == batch and states.shape[1:] == innermost.states.shape[1:]:
            self.strayed.add(innermost)
        return None

    def _following(self, plan: Plan, chunks: list[bool], states: Tensor, timestep: Tensor | float) -> Call | None:
        """The call by a plan whose text states are those of some `chunks` of its rows; None where no concept is heard."""
        n, batch = len(plan.rows), len(states)
        if not any(plan.rows):
            return None
        if len(chunks) > (1 if plan.guidance is False else 2):
            raise InfusionError(
                f"The UNet was called with {batch} rows for {n} pictures; concepts know guidance on (2 rows a picture) and off (1 row), so switch off perturbed-attention or other added guidance."
            )
        if not chunks[-1]:
            return None
        self.met[plan] = batch
        heard = self._heard(plan.rows, timestep)
        if not any(heard):
            return None
        self.heard.add(plan)
        return self._make_call(heard, batch - n, batch, states)

    def _heard(self, rows: Rows, timestep: Tensor | float) -> Rows:
        """The mentions of a plan's rows that are heard at a call's timestep, one number or one for every row."""
        if not any(m.name in self.limits for row in rows for m in row):
            return rows
        given = torch.as_tensor(timestep).flatten().tolist()
        each = given * len(rows) if len(given) == 1 else given[-len(rows) :]
        return tuple(
            tuple(m for m in row if t < self.limits.get(m.name, math.inf)) for row, t in zip(rows, each, strict=True)
        )

    def _make_call(self, plan_rows: Rows, offset: int, batch: int, states: Tensor) -> Call:
        # Of a UNet that lies elsewhere than the pipeline's other parts, torch's hooks run before accelerate's moves the states.
        device = getattr(getattr(self.unet, "_hf_hook", None), "execution_device", None)
        device = states.device if device is None else torch.device(device)
        rows = [i for i, mentions in enumerate(plan_rows) if mentions]
        entries = [(c, m) for c, i in enumerate(rows) for m in plan_rows[i]]
        words = torch.zeros(len(entries), states.shape[1])
        for e, (_, mention) in enumerate(entries):
            words[e, list(mention.positions)] = mention.strength
        customized = [i + offset for i in rows]
        source, keep, origin = customized, None, None
        if self.here.mode == "joint" and self.two_streams:
            source, keep, origin = _foundations(customized, batch)
        places = lambda values: None if values is None else torch.tensor(values, device=device)  # noqa: E731
        return Call(
            rows=torch.tensor(customized, device=device),
            entry_row=torch.tensor([c for c, _ in entries], device=device),
            words=words.to(device),
            residuals=self._entry_residuals([m.name for _, m in entries], device, states.dtype),
            batch=batch,
            mode=self.here.mode,
            source=torch.tensor(source, device=device),
            keep=places(keep),
            origin=places(origin),
        )

    def _entry_residuals(self, names: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Residuals of the named concepts, stacked per layer; zero where a concept has none in a layer that another has."""
        stacked = {}
        for path in self.layers:
            found = [self.residuals.get(name, {}).get(path) for name in names]
            length = next((len(r) for r in found if r is not None), None)
            if length is not None:
                zero = torch.zeros(length)
                stacked[path] = torch.stack([(zero if r is None else r).to(device, dtype) for r in found])
        return stacked


def _foundations(customized: list[int], batch: int) -> tuple[list[int], list[int], list[int]]:
    """Of a batch to which a foundational row for each of the `customized` is appended: the rows that attention computes itself; for each
    customized row the place among them that holds its maps; for every row the place that holds its output. Returns
    (source, keep, origin) of `Call`."""
    total = batch + len(customized)
    keep = [row for row in range(total) if row not in customized]
    place = {row: i for i, row in enumerate(keep)}
    source = [place[batch + c] for c in range(len(customized))]
    foundation = dict(zip(customized, source, strict=True))
    return source, keep, [foundation.get(row, place.get(row, 0)) for row in range(total)]


def _append_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Every tensor whose first axis is the batch, nested ones too, with `rows` of it appended."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows.to(value.device)]]) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: _append_rows(v, rows, batch) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_append_rows(v, rows, batch) for v in value)
    return value
