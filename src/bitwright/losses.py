"""Every objective, one function each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.graph.points import Point


class _WeightedDistance(torch.autograd.Function):
    """``sum_n c_n ||a_n - b_n||^2`` with the difference computed once for value and gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, coefficients: Tensor, point: Point) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference, coefficients)
        ctx.point = point
        return (point.squared_norm(difference, len(coefficients)) * coefficients).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference, coefficients = ctx.saved_tensors
        factors = ctx.point.spread(2 * gradients[0] * coefficients, difference)
        return difference * factors.to(difference.dtype), None, None, None


def weighted_distance(student: Tensor, teacher: Tensor, weights: Tensor, point: Point, *, over: str = "sum") -> Tensor:
    """``mean_n w_n mean_positions sum_channels (student - teacher)^2``, a scalar in float32.

    EPTQ v2's distance at one layer (methods, section 1.4). The gradient flows to the student alone.

    Args:
        student: the interest tensor of N images.
        teacher: the same of the float network.
        weights: [N].
        point: how the tensor's axes are to be read.
        over: ``sum`` over channels, or ``mean`` over them too (EPTQ v1).
    """
    count = len(weights)
    scale = 1.0 / (count * point.positions(student, count))
    if over == "mean":
        scale /= student.shape[point.channels]
    value: Tensor = _WeightedDistance.apply(student, teacher, weights * scale, point)  # type: ignore[no-untyped-call]
    return value
