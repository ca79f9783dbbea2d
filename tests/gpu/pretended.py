"""A GPU that is pretended: real numbers, which lie on the CPU, under the rules that a real one has about devices.

Every tensor on ``cuda`` is a wrapper around a tensor on the CPU. What a CUDA build refuses is refused here as well:
tensors of two devices in one operator (single numbers may mix), a tensor on the CPU that is indexed by one on the GPU,
a generator of the other device, NumPy. Values are right, so that every branch goes where it would go.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
MOVES = {"_to_copy", "copy_", "_copy_from"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class DeviceMixError(Exception):
    """What a GPU would refuse."""


class OnGpu(Tensor):
    """A tensor on the GPU that there is not."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=GPU
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # an error's message would compute
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise DeviceMixError("a tensor on the GPU cannot become an array of NumPy: call cpu() first")

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        return memo.setdefault(id(self), OnGpu(self.inner.detach().clone()))


waits: Counter[str] = Counter()
"""How often the host waited for the device, by operator."""
launches: Counter[str] = Counter()
"""How many operators computed on the device, by name; what only looks at memory otherwise does not count."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    device = kwargs.get("device")
    device = next((a for a in args if isinstance(a, torch.device)), None) if device is None else torch.device(device)
    there = any(isinstance(t, OnGpu) for t in tensors)
    _check(name, args, tensors, there)
    if device is not None and device.type == "cuda" and getattr(kwargs.get("generator"), "device", GPU).type != "cuda":
        raise DeviceMixError(f"{name}: a generator of the CPU for numbers on the GPU")
    if there and not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        launches[name] += 1
    if _waits(name, args, kwargs, device, there):
        waits[name] += 1
    wrapped = there if device is None else device.type == "cuda"
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    with _disable_current_modes():
        found = func(*plain_args, **plain_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return _wrapped(found) if wrapped else found


def _waits(name: str, args: Any, kwargs: dict[str, Any], device: torch.device | None, there: bool) -> bool:
    """Whether a real GPU would let the host wait: for numbers that it has to know, or for a copy of pageable memory."""
    if name == "_to_copy" and device is not None:
        return there != (device.type == "cuda") and not (device.type == "cuda" and kwargs.get("non_blocking"))
    if name == "copy_":
        return isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu) and not any(args[2:])
    if name in INDEXES:
        picks = [t for t in args[1] if isinstance(t, Tensor)]
        return there and any(t.dtype == torch.bool or not isinstance(t, OnGpu) for t in picks)
    return there and name in WAITING


def _wrapped(found: Any) -> Any:
    return tree_map(lambda t: OnGpu(t) if isinstance(t, Tensor) else t, found)


def _plain(x: Any) -> Any:
    if isinstance(x, OnGpu):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument that the operator writes into and returns; None where it does not."""
    returns = func._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[position] if position < len(args) else kwargs[argument.name]
    return None


def _check(name: str, args: Any, tensors: list[Tensor], there: bool) -> None:
    if not there or name in MOVES:
        return
    if name in INDEXES:
        picks = [t for t in args[1] if isinstance(t, Tensor)]
        rest = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor)]
        if not isinstance(args[0], OnGpu) and any(isinstance(t, OnGpu) for t in picks):
            raise DeviceMixError(f"{name}: a tensor on the CPU is indexed by one on the GPU")
        tensors = rest
    if any(not isinstance(t, OnGpu) and t.dim() for t in tensors):
        shapes = [("gpu" if isinstance(t, OnGpu) else "cpu", tuple(t.shape)) for t in tensors]
        raise DeviceMixError(f"{name}: tensors of two devices: {shapes}")
    if any(not isinstance(t, OnGpu) for t in tensors) and name.endswith("_") and not isinstance(args[0], OnGpu):
        raise DeviceMixError(f"{name}: a number on the CPU is changed by the GPU")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_OWN = {
    name: getattr(torch.cuda, name)
    for name in ("is_available", "device_count", "current_device", "synchronize", "is_bf16_supported",
                 "get_device_properties", "_lazy_init")
}  # fmt: skip


@contextlib.contextmanager
def _in_torch(**functions: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield


@contextlib.contextmanager
def pretended_gpu(memory: int = 1 << 34) -> Iterator[None]:
    """Inside there is one GPU."""
    there = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *a: None,
        "is_bf16_supported": lambda *a: True,
        "get_device_properties": lambda *a: SimpleNamespace(total_memory=memory, name="pretended"),
        "_lazy_init": lambda: None,
    }
    unpinned = mock.patch.object(Tensor, "pin_memory", lambda t, *a: t)
    with _in_torch(**there), unpinned, torch.autograd.set_multithreading_enabled(False), _Mode():
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside a pretended GPU there is none."""
    with _in_torch(**_OWN), _disable_current_modes():
        yield
