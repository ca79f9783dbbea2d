"""Scales that are powers of two: which of the two next to a scale has the smaller error."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.statistics import Statistics


def neighbours(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The powers of two below and above, the same twice for one that is a power itself.

    Example:
        >>> neighbours(torch.tensor([3.0, 4.0]))
        (tensor([2., 4.]), tensor([4., 4.]))
    """
    above = affine.next_power_of_two(scale)
    return torch.where(above == scale, above, above / 2), above


def nearest_power_scale(
    weight: Tensor,
    scale: Tensor,
    grid: Grid,
    block: tuple[int, ...],
    *,
    power: float = 2.0,
    importance: Tensor | None = None,
) -> Tensor:
    """Of the two neighbours of each step, the one of less error.

    Args:
        weight: [O, I, ...].
        scale: [number of blocks].
        grid: symmetric.
        block: extent of one scale along each axis.
        power: of the absolute error.
        importance: weight of each element's error; ones if absent.

    Returns:
        [number of blocks], powers of two.
    """
    rows = affine.to_blocks(weight.detach().float(), block)
    factors = torch.ones(()) if importance is None else affine.to_blocks(importance.float(), block)
    low, high = neighbours(scale)

    def error(steps: Tensor) -> Tensor:
        return ((grid.nearest(rows, steps.unsqueeze(1)) - rows).abs().pow(power) * factors.to(rows.device)).sum(1)

    return torch.where(error(low) < error(high), low, high)


def activation_parameters(
    low: float, high: float, statistics: Statistics, grid: Grid, *, power: float = 2.0, cover: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [1] each, for an interval that was chosen without regard to powers of two.

    Args:
        low: of the interval, at most 0.
        high: of the interval, at least 0.
        statistics: of the tensor, on whose histogram the two neighbours are compared.
        grid: its integers.
        power: of the absolute error.
        cover: take the wider one, so that nothing in the interval is clipped.
    """
    reach = max(-low, high) / ((grid.qmax - grid.qmin) / 2) if grid.symmetric else (high - low) / grid.qmax
    scales = neighbours(torch.tensor([reach if reach > 0 else 1.0]))
    zeros = [(torch.round(-low / s)).clamp(grid.qmin, grid.qmax) * (not grid.symmetric) for s in scales]
    if cover:
        return scales[1], zeros[1]
    values, counts = statistics.histogram()
    errors = [
        ((grid.nearest(values.float(), s, z) - values).abs().pow(power) * counts).sum()
        for s, z in zip(scales, zeros, strict=True)
    ]
    best = int(errors[1] <= errors[0])
    return scales[best], zeros[best]
