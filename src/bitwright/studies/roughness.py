"""How rough a function on a regular grid is. Imports torch and nothing else."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def directions(count: int, seed: int) -> Tensor:
    """Two random orthonormal directions, [2, count], float64.

    Raises:
        ValueError: there is only one number.

    Example:
        >>> d = directions(5, 0)
        >>> torch.allclose(d @ d.T, torch.eye(2, dtype=torch.float64))
        True
    """
    if count < 2:
        raise ValueError(f"expected at least 2 scales for two directions, found {count}")
    drawn = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: Tensor = torch.linalg.qr(drawn).Q.T.contiguous()
    return found


def offsets(along: Tensor, steps: int, axes: int) -> Tensor:
    """Where to measure: ``x u`` or ``x u + y v`` with x and y evenly spaced in [-1, 1], each of root mean square 1.

    Args:
        along: orthonormal directions [2, D].
        steps: from the middle to an edge.
        axes: 1 or 2.

    Returns:
        [(2 steps + 1)^axes, D], the last axis running fastest; the one in the middle is zero.

    Example:
        >>> offsets(torch.eye(2).double(), 1, 1)
        tensor([[-1.4142, -0.0000],
                [ 0.0000,  0.0000],
                [ 1.4142,  0.0000]], dtype=torch.float64)
    """
    ticks = torch.arange(-steps, steps + 1, dtype=torch.float64) / steps
    points = torch.cartesian_prod(*[ticks] * axes).reshape(-1, axes)
    return points @ along[:axes] * math.sqrt(along.shape[1])


def strict_minima(values: Tensor) -> float:
    """Share of interior points that lie below all of their neighbours: 2 on a line, 8 on a grid.

    One of a bowl's is. Of noise, independent from point to point, one in 3 on a line and one in 9 on a grid are; more
    than one in 2 or 4 cannot be.

    Example:
        >>> strict_minima(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])), strict_minima(torch.arange(5.0))
        (0.6666666666666666, 0.0)
    """
    inside = values[(slice(1, -1),) * values.dim()]
    lowest = torch.ones_like(inside, dtype=torch.bool)
    for shift in itertools.product((-1, 0, 1), repeat=values.dim()):
        if any(shift):
            ends = [(1 + s, n - 1 + s) for s, n in zip(shift, values.shape, strict=True)]
            lowest &= inside < values[tuple(slice(*e) for e in ends)]
    return float(lowest.double().mean())


def bends(values: Tensor) -> float:
    """Mean size of the second differences along the axes, as a share of the range; 0 of what is constant.

    A bowl with n points a side has ``8 / (n - 1)^2`` on a line and half of it on a grid; the jagged line between two
    values has 2.

    Example:
        >>> bends(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])), bends(torch.linspace(-1, 1, 5) ** 2)
        (2.0, 0.5)
    """
    spread = float(values.double().max() - values.double().min())
    return jumps(values) / spread if spread > 0 else 0.0


def jumps(values: Tensor) -> float:
    """Mean size of the second differences along the axes, in units of the function.

    Example:
        >>> jumps(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]) / 2)
        1.0
    """
    values = values.double()
    return float(torch.cat([values.diff(n=2, dim=d).abs().flatten() for d in range(values.dim())]).mean())


def noise_bends(side: int, axes: int) -> float:
    """What :func:`bends` gives for noise, independent and normal from point to point, on average."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((side,) * axes, generator=generator) for _ in range(50)]
    return sum(bends(d) for d in drawn) / len(drawn)
