"""Depthwise convolutions in bfloat16 whose weight gradient is computed in float32, which is faster on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bitwright.graph import ops, rewrite

LARGE_KERNEL = 5
"""Width of a kernel from which on that is faster; of 3x3 the conversions cost more than they save."""


def speed_up_depthwise(graph: fx.Graph) -> None:
    """Puts :func:`depthwise` in the place of convolutions of images with many groups.

    In bfloat16 PyTorch (2.13) computes the gradient of the weight of a depthwise 5x5 convolution two to six times as
    slowly as in float32.
    """
    for node in graph.nodes:
        if ops.base_name(node) == "conv2d" and rewrite.groups(node) > 1 and not isinstance(_padding_of(node), str):
            node.target = depthwise


def _padding_of(node: fx.Node) -> Any:
    return node.args[4] if len(node.args) > 4 else 0


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``aten.conv2d``; under autocast on a CPU, with the weight's gradient in float32.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, kh, kw].
        bias: [C].
        stride: as for the operator, like all that follows.
        padding: numbers.
        dilation: numbers.
        groups: C.

    Returns:
        [B, C, H', W'].
    """
    settings = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    kind = x.device.type
    found: Tensor
    slow = groups == len(weight) and weight.shape[-1] >= LARGE_KERNEL and weight.requires_grad
    if kind != "cpu" or not slow or not torch.is_autocast_enabled(kind):
        found = torch.ops.aten.conv2d.default(x, weight, bias, *settings[:3], groups)
        return found
    low = torch.get_autocast_dtype(kind)
    biased = None if bias is None else bias.to(low)
    found = _Depthwise.apply(x.to(low), weight, biased, settings)  # type: ignore[no-untyped-call]
    return found


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.bias = settings, None if bias is None else list(bias.shape)
        found: Tensor = torch.ops.aten.convolution.default(x, weight.to(x.dtype), bias, *settings)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants, low = ctx.needs_input_grad, weight.to(x.dtype)
        of_x = of_weight = of_bias = None
        if wants[0]:
            of_x, _, _ = _backward(ctx, gradients[0], x, low, [True, False, False])
        if wants[1]:
            _, of_weight, _ = _backward(ctx, gradients[0].float(), x.float(), weight.float(), [False, True, False])
        if wants[2]:
            of_bias = gradients[0].sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


def _backward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward.default(gradient, x, weight, ctx.bias, *ctx.settings, wanted)
