"""From statistics to scales: min-max, percentile and the range of least error, for weights and activations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.quant.quantizer import Quantizer
from bitwright.quant.statistics import Statistics

RangeMethod = Literal["minmax", "percentile", "mse"]
TRIED_AT_ONCE = 1 << 18
"""Elements of a weight that are tried together: they stay in a processor's cache."""
FINE_BITS = 12
"""From here on the step is finer than a histogram's bin, and clipping cannot pay: min-max is used."""


def weight_scale(
    weight: Tensor,
    grid: Grid,
    block: tuple[int, ...],
    method: RangeMethod = "mse",
    *,
    percentile: float = 0.9999,
    power: float = 2.0,
    importance: Tensor | None = None,
) -> Tensor:
    """One symmetric step per block of a weight.

    Args:
        weight: [O, I, ...].
        grid: symmetric.
        block: extent of one scale along each axis (:func:`affine.to_blocks`).
        method: ``minmax``; ``percentile`` of the magnitudes; ``mse``, the step of least error.
        percentile: for that method, as a fraction.
        power: of the absolute error, 2 for squares.
        importance: weight of each element's error, shaped as the weight; ones if absent.

    Returns:
        [number of blocks], float32.
    """
    rows = affine.to_blocks(weight.detach().float(), block)
    absmax = rows.abs().amax(1)
    if method == "minmax":
        return _covering(absmax, grid)
    if method == "percentile":
        return _covering(rows.abs().quantile(percentile, dim=1), grid)
    factors = None if importance is None else affine.to_blocks(importance.float(), block)
    start, some = _covering(absmax, grid), max(1, TRIED_AT_ONCE // max(1, rows.shape[1]))
    parts = [slice(first, first + some) for first in range(0, max(1, len(rows)), some)]
    found = [_least_error_scale(rows[p], start[p], grid, power, None if factors is None else factors[p]) for p in parts]
    return torch.cat(found)


def _covering(absmax: Tensor, grid: Grid) -> Tensor:
    """Steps with which [-absmax, absmax] is the grid's span."""
    return grid.spanning(-absmax, absmax)[0]


def _least_error_scale(rows: Tensor, start: Tensor, grid: Grid, power: float, importance: Tensor | None) -> Tensor:
    """Grid search from coarse to fine, all rows at once; from ``start`` itself, so that it is never worse.

    It ends where the highest code reaches the largest magnitude, which pays for rows of one sign.
    """
    best_factor = torch.ones_like(start)
    best_error = torch.full_like(start, float("inf"))
    top = 1.02 * (grid.qmax - grid.qmin) / (2 * grid.qmax)
    width = (top - 0.2) / 2
    centre = torch.full_like(start, 0.2 + width)
    for points in (29, 9, 7):
        around = [centre + offset for offset in torch.linspace(-width, width, points).tolist()]
        for factor in (*around, torch.ones_like(start)) if points == 29 else around:
            scale = (start * factor).unsqueeze(1)
            error = grid.nearest(rows, scale).sub_(rows)
            error = error.square_() if power == 2.0 else error.abs_().pow_(power)
            total = (error if importance is None else error.mul_(importance)).sum(1)
            better = total < best_error
            best_error = torch.where(better, total, best_error)
            best_factor = torch.where(better, factor, best_factor)
        width, centre = 2 * width / (points - 1) * 0.8, best_factor.clone()
    return start * best_factor


def rounded_to(bits: int, weight: Tensor, quantizer: Quantizer) -> Tensor:
    """A weight as its quantizer would round it with so many bits, with the steps of least error, [O, I, ...]."""
    assert quantizer.block is not None
    grid = quantizer.grid.with_bits(bits)
    return grid.nearest(weight, quantizer.spread(weight_scale(weight, grid, quantizer.block)))


def spread_ratio(weight: Tensor, dequantized: Tensor, block: tuple[int, ...]) -> Tensor:
    """By how much each block of a quantized weight is too narrow: ``std(w) / (std(Q(w)) + 1e-8)``, [number of blocks].

    FQ-ViT and Evol-Q (methods, section 2.1, "bias correction"). 1 for a block whose codes are all the same, such as one
    of zeros or of a single element.

    Example:
        >>> spread_ratio(torch.tensor([[0.0, 2.0], [1.0, 3.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]]), (1, 2))
        tensor([2., 1.])
    """
    filled = affine.to_blocks(torch.ones_like(weight, dtype=torch.float64), block)
    wanted, found = (_deviation(affine.to_blocks(x.detach().double(), block), filled) for x in (weight, dequantized))
    return torch.where(found > 0, wanted / (found + 1e-8), torch.ones_like(found)).float()


def _deviation(rows: Tensor, filled: Tensor) -> Tensor:
    """Standard deviation of each row's elements, where 1 stands in ``filled``."""
    count = filled.sum(1, keepdim=True)
    mean = rows.sum(1, keepdim=True) / count
    return ((rows - mean).square() * filled).sum(1).div(count.squeeze(1)).sqrt()


def activation_range(
    statistics: Statistics,
    grid: Grid,
    method: RangeMethod = "mse",
    *,
    percentile: float = 0.9999,
    power: float = 2.0,
) -> tuple[float, float]:
    """Interval [low, high] that a tensor's grid should span; it contains 0.

    Args:
        statistics: of the tensor.
        grid: its bits.
        method: ``minmax``; ``percentile`` cut off on either side; ``mse``, the interval of least error, searched on the
            histogram, first shrinking both ends together, then each alone.
        percentile: for that method, as a fraction.
        power: of the absolute error.
    """
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if low == high or method == "minmax" or grid.bits >= FINE_BITS:
        return low, high
    values, counts = statistics.histogram()
    if method == "percentile":
        return _percentile(values, counts, low, high, percentile)
    return _least_error_range(values, counts, low, high, grid, power)


def _percentile(values: Tensor, counts: Tensor, low: float, high: float, fraction: float) -> tuple[float, float]:
    cumulated = counts.cumsum(0) / counts.sum()
    top = values[int((cumulated >= fraction).int().argmax())]
    bottom = values[int((cumulated >= 1 - fraction).int().argmax())]
    return max(low, min(float(bottom), 0.0)), min(high, max(float(top), 0.0))


def _least_error_range(
    values: Tensor, counts: Tensor, low: float, high: float, grid: Grid, power: float
) -> tuple[float, float]:
    shrink = torch.linspace(1.0, 0.02, 99, dtype=torch.float64)
    lows, highs = low * shrink, high * shrink
    for _ in range(3):
        best = int(_errors(values, counts, lows, highs, grid, power).argmin())
        low, high = float(lows[best]), float(highs[best])
        if grid.symmetric or 0.0 in (low, high):
            around = torch.linspace(0.97, 1.03, 25, dtype=torch.float64)
            lows, highs = low * around, high * around
            continue
        around = torch.linspace(0.6, 1.2, 13, dtype=torch.float64)
        lows, highs = (m.reshape(-1) for m in torch.meshgrid(low * around, high * around, indexing="ij"))
    best = int(_errors(values, counts, lows, highs, grid, power).argmin())
    return float(lows[best]), float(highs[best])


def _errors(values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, grid: Grid, power: float) -> Tensor:
    """Total error of each candidate interval, [K]."""
    scale, zero = grid.spanning(lows, highs)
    scale, zero = scale.unsqueeze(1).float(), zero.unsqueeze(1).float()
    x = values.float()
    error = grid.nearest(x, scale, zero).sub_(x)
    error = error.square_() if power == 2.0 else error.abs_().pow_(power)
    return error @ counts.float()
