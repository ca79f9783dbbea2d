"""While a model is captured, what would make a plain number of the batch's size leaves it free."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def free_sizes() -> Iterator[None]:
    """Inside, ``len(tensor)`` of a free batch is free, and so are sizes in operators that PyTorch composes in C++."""
    with _free_lengths(), _FreeSizes():
        yield


@contextmanager
def _free_lengths() -> Iterator[None]:
    """Python itself makes a plain number of what ``__len__`` returns."""
    own = builtins.len

    def length(x: Any) -> Any:
        size: Any = x.shape[0] if isinstance(x, Tensor) and x.dim() else None
        return size if isinstance(size, torch.SymInt) else own(x)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = own


class _FreeSizes(TorchFunctionMode):
    """Composes operators of others whose sizes may be free."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        composed = _COMPOSED.get(function)
        found = None if composed is None else composed(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if found is None else found


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None, *, out: Tensor | None = None) -> Any:
    """[N, T, C] at [N, K, 1] along 1 gives [N, K, C]."""
    if dim is None or out is not None or input.dim() != indices.dim():
        return None
    sizes = list(zip(input.shape, indices.shape, strict=True))
    along = dim % input.dim()
    here = [-1 if axis == along or own != 1 else other for axis, (own, other) in enumerate(sizes)]
    there = [-1 if axis == along or own != 1 else other for axis, (other, own) in enumerate(sizes)]
    return input.expand(here).gather(dim, indices.expand(there))


def _channel_shuffle(input: Tensor, groups: int) -> Any:
    return F.channel_shuffle(input, groups)


def _kron(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Any:
    """[N, C, H, W] with [1, 1, 2, 2] gives [N, C, 2H, 2W]."""
    if out is not None:
        return None
    axes = max(input.dim(), other.dim())
    own, theirs = ([1] * (axes - x.dim()) + list(x.shape) for x in (input, other))
    outer = input.reshape([size for pair in zip(own, [1] * axes, strict=True) for size in pair])
    inner = other.reshape([size for pair in zip([1] * axes, theirs, strict=True) for size in pair])
    return (outer * inner).reshape([a * b for a, b in zip(own, theirs, strict=True)])


def _multi_dot(tensors: Sequence[Tensor], *, out: Tensor | None = None) -> Any:
    return reduce(torch.matmul, tensors) if out is None else None


def _chain_matmul(*matrices: Tensor, out: Tensor | None = None) -> Any:
    return reduce(torch.matmul, matrices) if out is None else None


def _gradient(input: Tensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1) -> Any:
    """Half the difference of both neighbours, and at the ends the difference to the only one."""
    axes = [dim] if isinstance(dim, int) else dim
    if axes is None or not isinstance(spacing, int | float) or edge_order != 1:
        return None
    return [_gradient_along(input, axis) / spacing for axis in axes]


def _gradient_along(x: Tensor, axis: int) -> Tensor:
    size = x.shape[axis]
    steps = x.narrow(axis, 1, size - 1) - x.narrow(axis, 0, size - 1)
    inner = (x.narrow(axis, 2, size - 2) - x.narrow(axis, 0, size - 2)) / 2
    return torch.cat([steps.narrow(axis, 0, 1), inner, steps.narrow(axis, size - 2, 1)], axis)


_COMPOSED: dict[Any, Callable[..., Any]] = {
    torch.take_along_dim: _take_along_dim,
    Tensor.take_along_dim: _take_along_dim,
    torch.native_channel_shuffle: _channel_shuffle,
    torch.kron: _kron,
    Tensor.kron: _kron,
    torch.linalg.multi_dot: _multi_dot,
    torch.chain_matmul: _chain_matmul,
    torch.gradient: _gradient,
}
"""What each of these operators does, in others; None from there is what PyTorch itself is asked for."""
