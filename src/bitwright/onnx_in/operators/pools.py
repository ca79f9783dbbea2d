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
    if _fits(window) and max(window.dilation) == 1:
        return call(
            MEANS[len(window.kernel)],
            node.input(0),
            kernel_size=window.kernel,
            stride=window.stride,
            padding=window.before,
            ceil_mode=up,
            count_include_pad=counts,
        )
    if max(window.dilation) > 1 and len(window.kernel) > 2:
        raise Unsupported("its windows are dilated and have three axes")
    sizes = shape_of(node.input(0))[2:]
    longer = _rounded_up(window, sizes) if up else window
    further = tuple(a - b for a, b in zip(longer.after, window.after, strict=True))
    counted = padded(torch.ones(1, 1, *sizes), window, float(counts))
    counted = padded(counted, window._replace(before=(0,) * len(sizes), after=further), 0.0)
    share = np.asarray(_mean_of_windows(counted, window=longer))
    if (share == 1).all():
        return call(_padded_mean, node.input(0), window=longer)
    return call(_mean_of_part, node.input(0), Known.of(1 / share), window=longer)


def _rounded_up(window: Window, sizes: tuple[int, ...]) -> Window:
    """The window with so much added behind that a last one begins where one is begun, if not behind the image."""
    after = []
    for n, k, s, d, low, high in zip(sizes, *window, strict=True):
        reach = d * (k - 1) + 1
        last = -(-(n + low + high - reach) // s) * s
        last -= s * (last >= n + low)
        after.append(max(high, last + reach - n - low))
    return window._replace(after=tuple(after))


def _padded_mean(x: Tensor, *, window: Window) -> Tensor:
    return _mean_of_windows(padded(x, window, 0.0), window=window)


def _mean_of_part(x: Tensor, factors: Tensor, *, window: Window) -> Tensor:
    return _padded_mean(x, window=window) * factors


def _mean_of_windows(x: Tensor, *, window: Window) -> Tensor:
    """Means of windows that lie within ``x`` [N, C, ...]; PyTorch's own have no dilation."""
    kernel, stride, dilation = window[:3]
    if max(dilation) == 1:
        return MEANS[len(kernel)](x, kernel, stride)
    lengths = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    rows = (1,) * (2 - len(kernel))
    plane = x if len(kernel) == 2 else x.unsqueeze(2)
    parts = F.unfold(plane, (*rows, *kernel), dilation=(*rows, *dilation), stride=(*rows, *stride))
    return parts.reshape(-1, x.shape[1], math.prod(kernel), *lengths).mean(2)


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> NodeCall:
    """The mean or the largest of each channel."""
    axes = tuple(range(2, len(shape_of(node.input(0)))))
    function = torch.mean if node.kind == "GlobalAveragePool" else torch.amax
    return call(function, node.input(0), dim=axes, keepdim=True)


@operator("LpPool")
def norm_pool(node: Node) -> NodeCall:
    """The norm of each window."""
    window = _window(node)
    if node.whole("ceil_mode", 0) or max(window.dilation) > 1:
        raise Unsupported("its windows are dilated or rounded up")
    return call(_norms, node.input(0), window=window, p=node.whole("p", 2))


def _norms(x: Tensor, *, window: Window, p: int) -> Tensor:
    powers = padded(x.abs().pow(p), window, 0.0)
    return (_mean_of_windows(powers, window=window) * math.prod(window.kernel)).pow(1 / p)


@operator("GlobalLpPool")
def global_norm_pool(node: Node) -> NodeCall:
    """The norm of each channel."""
    return call(_norm, node.input(0), p=node.whole("p", 2), axes=tuple(range(2, len(shape_of(node.input(0))))))


def _norm(x: Tensor, *, p: int, axes: tuple[int, ...]) -> Tensor:
    return x.abs().pow(p).sum(axes, keepdim=True).pow(1 / p)
