"""Pools: means and maxima of windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.operators.windows import Window, padded, window_of
from bitwright.onnx_in.values import Known, Node, NodeCall, Unsupported, call, shape_of

MEANS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMA: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _window(node: Node) -> Window:
    kernel = node.ints("kernel_shape") or ()
    if len(kernel) not in MEANS:
        raise Unsupported(f"its windows have {len(kernel)} axes")
    return window_of(node, kernel)


def _fits(window: Window) -> bool:
    """Whether PyTorch's pools take this padding: the same on both sides, and at most half a window."""
    return window.even and all(2 * p <= k for p, k in zip(window.before, window.kernel, strict=True))


@operator("MaxPool")
def max_pool(node: Node) -> NodeCall:
    """The largest of each window."""
    if node.outputs > 1:
        raise Unsupported("where its maxima lie is asked for")
    window, up = _window(node), bool(node.whole("ceil_mode", 0))
    function = MAXIMA[len(window.kernel)]
    if _fits(window):
        return call(
            function,
            node.input(0),
            kernel_size=window.kernel,
            stride=window.stride,
            padding=window.before,
            dilation=window.dilation,
            ceil_mode=up,
        )
    return call(_padded_maximum, node.input(0), window=window, up=up)


def _padded_maximum(x: Tensor, *, window: Window, up: bool) -> Tensor:
    function = MAXIMA[len(window.kernel)]
    around = padded(x, window, -math.inf)
    return function(around, window.kernel, window.stride, dilation=window.dilation, ceil_mode=up)


@operator("AveragePool")
def average_pool(node: Node) -> NodeCall:
    """The mean of each window, with what was added around counted or not."""
    window, up = _window(node), bool(node.whole("ceil_mode", 0))
    counts = bool(node.whole("count_include_pad", 0))
    if max(window.dilation) > 1:
        raise Unsupported("its windows are dilated")
    if _fits(window):
        return call(
            MEANS[len(window.kernel)],
            node.input(0),
            kernel_size=window.kernel,
            stride=window.stride,
            padding=window.before,
            ceil_mode=up,
            count_include_pad=counts,
        )
    if up:
        raise Unsupported("its uneven padding is rounded up")
    if counts:
        return call(_padded_mean, node.input(0), window=window)
    ones = torch.ones(1, 1, *shape_of(node.input(0))[2:])
    share = _padded_mean(ones, window=window)
    return call(_mean_of_part, node.input(0), Known.of(np.asarray(1 / share)), window=window)


def _padded_mean(x: Tensor, *, window: Window) -> Tensor:
    return MEANS[len(window.kernel)](padded(x, window, 0.0), window.kernel, window.stride)


def _mean_of_part(x: Tensor, factors: Tensor, *, window: Window) -> Tensor:
    return _padded_mean(x, window=window) * factors


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> NodeCall:
    """The mean or the largest of each channel."""
    axes = tuple(range(2, len(shape_of(node.input(0)))))
    function = torch.mean if node.kind == "GlobalAveragePool" else torch.amax
    return call(function, node.input(0), dim=axes, keepdim=True)
