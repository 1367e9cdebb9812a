"""A pretend accelerator: tensors say that they are on another device and compute on the CPU, so that a test without a GPU finds tensors
left behind.

with pretend() as device:
    pipe.to(device)

As on CUDA, an operation whose tensors are on two devices is refused, except copies, CPU tensors of no dimensions, and CPU indices into a
tensor of the device. As on MPS, there are no doubles when `doubles` is False. Nothing else of a GPU is pretended: neither its kernels nor its
numerics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor, aten._index_put_impl_.default)  # fmt: skip
_RESHAPING = ("resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_")


# What torch does with lists (`torch.tensor`, an index that is one) passes by every mode.
_KERNELS = torch.library.Library("aten", "IMPL")


def _empty(size: Any, stride: Any, dtype: Any = None, **_: Any) -> PretendTensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy(source: torch.Tensor, to: torch.Tensor, _: bool = False) -> torch.Tensor:
    (to.raw if isinstance(to, PretendTensor) else to).copy_(source.raw if isinstance(source, PretendTensor) else source)
    return to


class _Hidden(torch._C._acc.PrivateUse1Hooks):
    """Nothing that looks for an accelerator of its own accord finds this one."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return False


class _Module:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def pretend_device() -> torch.device:
    """The device, registered once a process: before its first backward pass, since autograd counts devices but once."""
    _setup_privateuseone_for_python_backend("pretend", _Module(), _Hidden())
    for name, kernel in {"empty_strided": _empty, "_copy_from": _copy}.items():
        _KERNELS.impl(name, kernel, "PrivateUse1")
    return torch.device("pretend:0")


class PretendTensor(torch.Tensor):
    """`raw`, a CPU tensor, seen as one of the pretend device."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, layout=raw.layout,
            device=pretend_device(), requires_grad=False,
        )  # fmt: skip
        self.raw = raw
        return self

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: PretendTensor) -> None:
        torch.Tensor.data.__set__(self, other)
        self.raw = other.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"pretend({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, doubles=True)


class _Pretend(TorchDispatchMode):
    """Sees what makes tensors on the device out of nothing, too."""

    def __init__(self, doubles: bool) -> None:
        super().__init__()
        self.doubles = doubles

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, self.doubles)


@contextmanager
def pretend(doubles: bool = True) -> Iterator[str]:
    """The device's name; within the context tensors can be made there."""
    device = pretend_device()
    with _Pretend(doubles), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield str(device)


def _run(func: Any, args: tuple, kwargs: dict, doubles: bool) -> Any:
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in flat if isinstance(t, PretendTensor)]
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == "pretend"
    if not there and not to_device:
        return func(*args, **kwargs)
    if there and func not in _COPIES:
        _refuse_mixtures(func, args, flat)
    known = {id(t.raw): t for t in there}
    plain = tree_map(lambda x: x.raw if isinstance(x, PretendTensor) else x, (args, kwargs))
    if target is not None:
        plain[1]["device"] = torch.device("cpu")
    result = func(*plain[0], **plain[1])
    if func is aten.copy_.default:
        return args[0]
    if func.overloadpacket.__name__ in _RESHAPING:
        args[0].data = PretendTensor(args[0].raw)
        return args[0]
    leaves = target is not None and not to_device
    if func is aten._to_copy.default and to_device and not there:  # a copy that the CPU would not have made
        result = result.clone() if result is args[0] else result

    def seen(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or leaves:
            return x
        if x.dtype == torch.float64 and not doubles:
            raise TypeError(f"the pretend device has no float64 ({func})")
        return known.get(id(x)) if id(x) in known else PretendTensor(x)

    return tree_map(seen, result)


def _refuse_mixtures(func: Any, args: tuple, flat: list[torch.Tensor]) -> None:
    """Raise RuntimeError where CUDA would."""
    if func in _INDEXED and isinstance(args[0], PretendTensor):
        flat = [t for t in (args[0], *args[2:]) if isinstance(t, torch.Tensor)]
    strays = [t for t in flat if not isinstance(t, PretendTensor) and t.dim() > 0]
    if strays:
        raise RuntimeError(
            f"{func}: a tensor of {tuple(strays[0].shape)} is on {strays[0].device}, others on the pretend device"
        )
