"""The two streams in one cross-attention layer, by torch's own forward hooks.

A customized row takes the foundational row's output plus heat times residual (`attention.py`). A `Call` says which rows
these are; `streams.py` makes it before the UNet begins, and gives it to every layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from infusion.attention import attention_maps, residual_output, split_heads, word_heat

Mode = Literal["joint", "record", "replay"]
Record = tuple[Tensor, Tensor]  # a layer's foundational output, and the heat of each entry (E, h, n)


@dataclass
class Call:
    """One UNet call in work. B rows came in; F foundational rows are appended in joint mode.

    Entries are pairs of a customized row and a mention in it. `source` says for each customized row which
    of the rows that attention computes itself holds its maps.
    """

    rows: Tensor  # (C,) customized rows
    entry_row: Tensor  # (E,) index into rows
    words: Tensor  # (E, m) strength on the word's tokens
    residuals: dict[str, Tensor]  # layer path -> residual of each entry (E, h * d)
    batch: int
    mode: Mode
    source: Tensor  # (C,)
    keep: Tensor | None = None  # rows that attention computes itself; None = all
    origin: Tensor | None = None  # for every row, its place among the kept ones

    @property
    def doubled(self) -> bool:
        """Whether foundational rows were appended."""
        return self.keep is not None


@dataclass(frozen=True)
class _Work:
    """One layer's part in a UNet call."""

    call: Call
    residual: Tensor | None  # of each entry (E, h * d)
    recorded: Record | None


class LayerHooks:
    """The hooks on one layer, and what they need of the UNet call in work, which belongs to the thread that calls.

    They see tensors only, never the layer's path: compiled blocks of one shape share a graph.
    """

    def __init__(self, path: str, layer: Attention) -> None:
        self.path = path
        self._here = threading.local()  # its `work`, and what it `recorded`
        self._learned: _Work | None = None
        self._handles = [
            layer.register_forward_pre_hook(self._select, with_kwargs=True),
            layer.register_forward_hook(self._merge, with_kwargs=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHooks:
        """A copied UNet brings its hooks along; they stay ours."""
        return self

    @property
    def recorded(self) -> Record | None:
        """What the thread's last call in "record" mode left."""
        return getattr(self._here, "recorded", None)

    def begin(self, call: Call | None) -> None:
        """A UNet call of this thread begins; None for one that carries no concept."""
        work = None if call is None else _Work(call, call.residuals.get(self.path), self.recorded)
        self._here.work = work
        if torch.is_grad_enabled():
            self._learned = work

    def remove(self) -> None:
        """Take both hooks off the layer."""
        for handle in self._handles:
            handle.remove()

    @property
    def _work(self) -> _Work | None:
        """What this thread works on. One without a call of its own is autograd's, in which a GPU computes checkpoints again."""
        return getattr(self._here, "work", self._learned)

    def _select(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Let attention compute only rows that need it."""
        work = self._work
        if work is None or work.call.mode == "record":
            return None
        call = work.call
        if call.mode == "replay":  # nothing needs it; one row keeps the stock forward in its shapes
            return tuple(_detached_first(a) for a in args), {k: _detached_first(v) for k, v in kwargs.items()}
        if call.keep is None:
            return None
        total, keep = call.batch + len(call.rows), call.keep
        return tuple(_take(a, keep, total) for a in args), {k: _take(v, keep, total) for k, v in kwargs.items()}

    def _merge(self, layer: Attention, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Give every row its output; customized rows get the foundational one plus heat times residual."""
        work = self._work
        if work is None:
            return None
        call, residual = work.call, work.residual
        if call.mode == "replay":
            assert work.recorded is not None
            output, heat = work.recorded
        elif residual is None and call.mode == "joint":
            return output if call.origin is None else output[call.origin]
        else:
            hidden = args[0] if args else kwargs["hidden_states"]
            text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            if isinstance(text, tuple):  # with an IP-Adapter: the text, and its pictures
                text = text[0]
            maps = _maps(layer, hidden[call.source], text[call.source])
            heat = word_heat(maps[call.entry_row], call.words)
            if call.mode == "record":
                self._here.recorded = output, heat
                return None
            if call.origin is not None:
                output = output[call.origin]
        if residual is None:
            return output
        delta = residual_output(heat, residual)
        per_row = delta.new_zeros(len(call.rows), *delta.shape[1:]).index_add(0, call.entry_row, delta)
        return output.index_add(0, call.rows, _project(layer, per_row).to(output.dtype))


def _maps(layer: Attention, hidden: Tensor, text: Tensor) -> Tensor:
    """The layer's own attention maps (b, h, n, m) for the given rows."""
    if layer.norm_cross:
        text = layer.norm_encoder_hidden_states(text)
    query = split_heads(layer.to_q(hidden), layer.heads)
    key = split_heads(layer.to_k(text), layer.heads)
    query = query if layer.norm_q is None else layer.norm_q(query)
    key = key if layer.norm_k is None else layer.norm_k(key)
    return attention_maps(query, key, layer.scale)


def _project(layer: Attention, delta: Tensor) -> Tensor:
    """The output projection without its bias, whatever wraps it (a LoRA): it is affine."""
    to_out: Callable[[Tensor], Tensor] = layer.to_out[0]
    zero = to_out(delta.new_zeros(1, 1, delta.shape[-1]))
    return (to_out(delta) - zero) / layer.rescale_output_factor


def _take(value: Any, keep: Tensor, total: int) -> Any:
    """Rows `keep` of every tensor that has `total` of them, nested ones too."""
    if isinstance(value, tuple | list):
        return type(value)(_take(v, keep, total) for v in value)
    return value[keep] if isinstance(value, Tensor) and value.ndim and value.shape[0] == total else value


def _detached_first(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_detached_first(v) for v in value)
    return value[:1].detach() if isinstance(value, Tensor) and value.ndim else value
