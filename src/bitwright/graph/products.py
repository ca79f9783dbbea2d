"""Products of linear layers by oneDNN, where it is faster: MKL takes twice as long on AMD's processors."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from bitwright.graph import ops

ROWS, SIDE = 256, 64
"""Rows and columns from which on a product is large enough; the head of a classifier has too few rows."""

_pays: WeakKeyDictionary[fx.GraphModule, bool] = WeakKeyDictionary()


@contextmanager
def fast_products(graph: fx.GraphModule) -> Iterator[None]:
    """Large products of the graph's linear layers are oneDNN's, while inside; they differ in the last digits alone.

    Nothing changes on other processors than AMD's, on GPUs, and for networks whose linear layers see one row per image.
    """
    if graph not in _pays:
        _pays[graph] = _is_amd() and any(map(_sees_rows, graph.graph.nodes))
    if not _pays[graph]:
        yield
        return
    with _Products():
        yield


def _sees_rows(node: fx.Node) -> bool:
    """Whether a node is a linear layer with several rows for each image, as far as is known."""
    val = ops.value(node)
    if ops.base_name(node) != "linear" or not isinstance(val, Tensor):
        return False
    return val.dim() > 2 or (val.dim() == 2 and int(val.shape[0]) > 2)


@cache
def _is_amd() -> bool:
    """Whether this is a processor of AMD, with a PyTorch that has both libraries."""
    if not torch.backends.mkl.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:1000]
    except OSError:
        return "AuthenticAMD" in platform.processor()


def run_graph(graph: fx.GraphModule, images: Tensor) -> list[Tensor]:
    """What the graph returns for images [B, ...], with :func:`fast_products`."""
    with fast_products(graph):
        return list(graph(images))


class _Products(TorchFunctionMode):
    """Sees every function of PyTorch that is called and takes the linear layers out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default and not kwargs and _is_large(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _is_large(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether oneDNN takes the product: of plain float32 tensors."""
    given = [t for t in (x, weight, bias) if t is not None]
    if any(type(t) is not Tensor or t.dtype != torch.float32 or t.device.type != "cpu" for t in given):
        return False
    return bool(weight.dim() == 2 and min(weight.shape) >= SIDE and x.numel() >= ROWS * weight.shape[1])


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias``, [..., N] of [..., K] and [N, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, rows = ctx.needs_input_grad, gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if needed[0] else None,
            _product(rows.t(), x.flatten(0, -2).t()) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return found
