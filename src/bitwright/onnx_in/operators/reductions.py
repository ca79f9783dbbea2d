"""Sums, means and extremes over axes, and where extremes lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitwright.onnx_in.operators import OPERATORS, operator
from bitwright.onnx_in.values import Node, NodeCall, Traced, Unsupported, call, from_front, shape_of


def _product(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted(dim, reverse=True):
        x = torch.prod(x, axis, keepdim)
    return x


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": lambda x, dim, keepdim: x.abs().sum(dim, keepdim),
    "ReduceL2": lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim),
    "ReduceSumSquare": lambda x, dim, keepdim: (x * x).sum(dim, keepdim),
    "ReduceLogSum": lambda x, dim, keepdim: x.sum(dim, keepdim).log(),
}
"""Functions of a tensor, axes, and whether these stay with length 1."""


def _reduce(node: Node) -> NodeCall:
    rank = len(shape_of(node.input(0)))
    axes = node.ints("axes", 1)
    if not axes and node.whole("noop_with_empty_axes", 0):
        return call(torch.clone, node.input(0))
    found = tuple(from_front(a, rank) for a in axes) if axes else tuple(range(rank))
    _keep_images(node, found)
    return call(REDUCTIONS[node.kind], node.input(0), dim=found, keepdim=bool(node.whole("keepdims", 1)))


OPERATORS.update(dict.fromkeys(REDUCTIONS, _reduce))


def _keep_images(node: Node, axes: tuple[int, ...]) -> None:
    x = node.input(0)
    if isinstance(x, Traced) and x.batch_axis in axes:
        rows = x.shape[x.batch_axis] // node.batch
        raise Unsupported(
            "it reduces over the images of a batch"
            if rows == 1
            else f"it reduces over an axis in which each image of a batch has {rows} places"
        )


@operator("ArgMax", "ArgMin")
def where_extreme(node: Node) -> NodeCall:
    """Where the largest or smallest lies along an axis; the first of equal ones."""
    if node.whole("select_last_index", 0):
        raise Unsupported("it asks for the last of equal values")
    axis = from_front(node.whole("axis", 0), len(shape_of(node.input(0))))
    _keep_images(node, (axis,))
    function: Any = torch.argmax if node.kind == "ArgMax" else torch.argmin
    return call(function, node.input(0), dim=axis, keepdim=bool(node.whole("keepdims", 1)))


@operator("CumSum")
def running_sum(node: Node) -> NodeCall:
    """Sums of all values up to each, with or without that, from the front or from behind."""
    axis = from_front(node.whole("axis", 0, 1), len(shape_of(node.input(0))))
    _keep_images(node, (axis,))
    without, back = bool(node.whole("exclusive", 0)), bool(node.whole("reverse", 0))
    if not (without or back):
        return call(torch.cumsum, node.input(0), dim=axis)
    return call(_running_sum, node.input(0), axis=axis, without=without, back=back)


def _running_sum(x: Tensor, *, axis: int, without: bool, back: bool) -> Tensor:
    turned = x.flip(axis) if back else x
    found = torch.cumsum(turned, axis)
    found = found - turned if without else found
    return found.flip(axis) if back else found


@operator("TopK")
def largest(node: Node) -> NodeCall:
    """The largest or smallest values along an axis in their order, and where they lie."""
    axis, count = from_front(node.whole("axis", -1), len(shape_of(node.input(0)))), node.whole("k", 1, 1)
    _keep_images(node, (axis,))
    return call(torch.topk, node.input(0), k=count, dim=axis, largest=bool(node.whole("largest", 1)))
