"""Normalisations and softmax."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.onnx_in.operators import operator
from bitwright.onnx_in.values import Known, Node, NodeCall, Operand, Unsupported, call, from_front, shape_of


@operator("BatchNormalization")
def batch_norm(node: Node) -> NodeCall:
    """By stored statistics."""
    if node.whole("training_mode", 0) or node.outputs > 1:
        raise Unsupported("it takes its statistics from the images, as in training")
    scale, bias, mean, variance = (node.input(k) for k in range(1, 5))
    return call(_batch_norm, node.input(0), mean, variance, scale, bias, eps=node.number("epsilon", 1e-5))


def _batch_norm(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=eps)


@operator("InstanceNormalization")
def instance_norm(node: Node) -> NodeCall:
    """Each channel of each image by its own statistics."""
    return call(_instance_norm, *(node.input(k) for k in range(3)), eps=node.number("epsilon", 1e-5))


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=eps)


@operator("LayerNormalization", "bitwright.LayerNorm")
def layer_norm(node: Node) -> NodeCall:
    """Over the axes from ``axis`` on."""
    if node.outputs > 1:
        raise Unsupported("its mean and deviation are asked for")
    shape = shape_of(node.input(0))
    sizes = shape[from_front(node.whole("axis", -1), len(shape)) :]
    operands: list[Operand] = [node.input(0)]
    for k in (1, 2):
        if node.has(k):
            value = node.input(k)
            if not isinstance(value, Known):
                raise Unsupported("its scale is computed from the images")
            operands.append(Known.of(np.ascontiguousarray(np.broadcast_to(value.small, sizes))))
    return call(_layer_norm, *operands, sizes=sizes, eps=node.number("epsilon", 1e-5))


def _layer_norm(
    x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, sizes: tuple[int, ...], eps: float
) -> Tensor:
    return F.layer_norm(x, sizes, scale, bias, eps)


@operator("RMSNormalization")
def rms_norm(node: Node) -> NodeCall:
    """By the root of the mean square over the axes from ``axis`` on."""
    shape = shape_of(node.input(0))
    sizes = shape[from_front(node.whole("axis", -1), len(shape)) :]
    return call(_rms_norm, node.input(0), node.input(1), sizes=sizes, eps=node.number("epsilon", 1e-5))


def _rms_norm(x: Tensor, scale: Tensor, *, sizes: tuple[int, ...], eps: float) -> Tensor:
    return F.rms_norm(x, sizes, scale.expand(sizes), eps)


@operator("GroupNormalization", "bitwright.GroupNorm")
def group_norm(node: Node) -> NodeCall:
    """Groups of channels; a scale for each group before opset 21, for each channel since."""
    groups, channels = node.whole("num_groups", 1), shape_of(node.input(0))[1]
    stored: list[Operand] = []
    for k in (1, 2):
        value = node.input(k)
        if not isinstance(value, Known):
            raise Unsupported("its scale is computed from the images")
        stored.append(Known.of(np.repeat(value.small, channels // value.small.size)))
    return call(_group_norm, node.input(0), *stored, groups=groups, eps=node.number("epsilon", 1e-5))


def _group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    return F.group_norm(x, groups, scale, bias, eps)


@operator("MeanVarianceNormalization")
def mean_variance_norm(node: Node) -> NodeCall:
    """By the mean and deviation over axes, those of the pixels of a channel where the axes are no others."""
    x = node.traced()
    axes = tuple(sorted(from_front(a, len(x.shape)) for a in node.ints("axes") or (0, 2, 3)))
    if x.batch_axis in axes:
        raise Unsupported("it takes its statistics from the images of a batch")
    return call(_centred_and_scaled, x, axes=axes)


def _centred_and_scaled(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LpNormalization")
def lp_norm(node: Node) -> NodeCall:
    """Divided by its norm along an axis."""
    return call(_normalize, node.input(0), p=node.whole("p", 2), axis=node.whole("axis", -1))


def _normalize(x: Tensor, *, p: int, axis: int) -> Tensor:
    return F.normalize(x, float(p), axis)


@operator("LRN")
def local_response_norm(node: Node) -> NodeCall:
    """By the squares of neighbouring channels."""
    size, alpha = node.whole("size", 1), node.number("alpha", 1e-4)
    return call(
        F.local_response_norm,
        node.input(0),
        size=size,
        alpha=alpha,
        beta=node.number("beta", 0.75),
        k=node.number("bias", 1.0),
    )


@operator("Softmax", "LogSoftmax")
def softmax(node: Node) -> NodeCall:
    """Along an axis; before opset 13 over that axis and all behind it."""
    shape = shape_of(node.input(0))
    function = torch.softmax if node.kind == "Softmax" else torch.log_softmax
    axis = from_front(node.whole("axis", -1 if node.opset >= 13 else 1), len(shape))
    if node.opset < 13 and math.prod(shape[axis + 1 :]) > 1:
        return call(_flat_softmax, node.input(0), axis=axis, logarithm=node.kind == "LogSoftmax")
    return call(function, node.input(0), dim=axis)


def _flat_softmax(x: Tensor, *, axis: int, logarithm: bool) -> Tensor:
    flat = x.flatten(axis)
    found = torch.log_softmax(flat, axis) if logarithm else torch.softmax(flat, axis)
    return found.reshape(x.shape)
