"""OBQ: rounds a weight element by element, in each row the one that costs least, and lets the others make up for it.

Imports torch and :mod:`bitwright.quant.optq`, of which it is the exact form: OPTQ takes the columns of all rows in one
order. After OBQ, arXiv:2208.11580, algorithm 3 (methods, section 10).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.quant.optq import damped_inverse

MEMORY = 1 << 28
"""Bytes of the inverse Hessians of the rows that are rounded together."""


def compensate_each(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    *,
    damping: float = 0.01,
    order: Tensor | None = None,
) -> Tensor:
    """The weight just before each of its elements was rounded; rounding it to nearest gives OBQ's codes.

    With ``P`` the inverse Hessian of what a row has left, the element of the least ``(w_q - Q(w_q))^2 / P_qq`` is
    rounded next, the others move by ``-(w_q - Q(w_q)) / P_qq P_q:``, and q leaves: ``P -= P_:q P_q: / P_qq``. Elements
    that have moved off the grid come first.

    Args:
        weight: [G, R, K]: groups, rows (output channels), columns (inputs).
        hessian: [G, K, K], ``X X^T`` over the inputs of the layer.
        scale: step, broadcastable to the weight.
        nearest: the value of the grid next to each element, given the elements and their steps, [R, K].
        damping: share of the mean diagonal that is added to the diagonal.
        order: [K], columns in which every row is rounded instead, for comparison with OPTQ.

    Returns:
        [G, R, K], float32.

    Example:
        >>> h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> to_integers = lambda x, step: x.round()
        >>> compensate_each(torch.tensor([[[0.4, 0.4]]]), h, torch.ones(1, 1, 2), to_integers, damping=0.0).round()
        tensor([[[0., 1.]]])
    """
    steps = scale.float().expand_as(weight)
    out = torch.empty_like(weight, dtype=torch.float32)
    inverses = damped_inverse(hessian, damping)
    for group in range(len(weight)):
        at_once = max(1, MEMORY // max(1, inverses[group].nbytes))
        for start in range(0, weight.shape[1], at_once):
            rows = slice(start, start + at_once)
            out[group, rows] = _rows(
                weight[group, rows].double(), inverses[group], steps[group, rows], nearest, order
            ).float()
    return out


def _rows(
    w: Tensor, inverse: Tensor, steps: Tensor, nearest: Callable[[Tensor, Tensor], Tensor], order: Tensor | None
) -> Tensor:
    """Some rows of one group, [R, K], all at once, each in its own order."""
    rows, columns = w.shape
    w, p, out = w.clone(), inverse.expand(rows, -1, -1).clone(), torch.empty_like(w)
    left, every = torch.ones_like(w, dtype=torch.bool), torch.arange(rows, device=w.device)
    for j in range(columns):
        rounded = nearest(w.float(), steps).double()
        diagonal = p.diagonal(dim1=1, dim2=2)
        q = _next(w - rounded, diagonal, steps, left) if order is None else order[j].expand(rows)
        out[every, q] = w[every, q]
        pivot = diagonal[every, q].clamp_min(1e-30)
        row = p[every, q]
        error = (w - rounded)[every, q]
        left[every, q] = False
        w -= (error / pivot).unsqueeze(1) * row * left
        p -= row.unsqueeze(2) * (row / pivot.unsqueeze(1)).unsqueeze(1)
        p[every, q, :] = p[every, :, q] = 0.0
    return out


def _next(error: Tensor, diagonal: Tensor, steps: Tensor, left: Tensor) -> Tensor:
    """The element of each row that is rounded next, [R]."""
    cost = error.square() / diagonal.clamp_min(1e-30)
    off_grid = (error.abs() > 0.5 * steps * (1 + 1e-6)) & left
    cost = torch.where(off_grid.any(1, keepdim=True) & ~off_grid, torch.inf, cost)
    return cost.masked_fill(~left, torch.inf).argmin(1)
