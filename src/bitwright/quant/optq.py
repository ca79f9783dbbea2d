"""OPTQ: rounds a weight column by column and lets the columns to come make up for each error.

After GPTQ/OPTQ, arXiv:2210.17323, algorithm 1 (methods, section 10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitwright.recording import Repeated

SPLIT, WIDTH = 512, 192
"""Inputs from which on a Gram matrix is computed in stripes, half of it, and how many a stripe has."""
TRIANGLE = 192
"""Rows up to which a triangular matrix is inverted by substitution."""


def gram(x: Tensor) -> Tensor:
    """``X^T X``, [G, K, K] of [G, N, K]; of a large one what lies below the diagonal is not computed but copied.

    Example:
        >>> gram(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[10., 14.],
                 [14., 20.]]])
    """
    size = x.shape[2]
    if size < SPLIT:
        return x.transpose(1, 2) @ x
    found = x.new_empty(len(x), size, size)
    for start in range(0, size, WIDTH):
        stop = min(start + WIDTH, size)
        stripe = x[:, :, start:stop].transpose(1, 2) @ x[:, :, start:]
        found[:, start:stop, start:] = stripe
        found[:, stop:, start:stop] = stripe[:, :, stop - start :].transpose(1, 2)
    return found


def compensate(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    *,
    damping: float = 0.01,
    ordered: bool = True,
    lazy: int = 128,
) -> Tensor:
    """The weight just before each of its columns was rounded; rounding it to nearest gives OPTQ's codes.

    Minimises ``tr((W - Q) H (W - Q)^T)`` greedily: after column ``j`` is rounded with error ``e``, the columns to come
    move by ``-e / U_jj U_j,j:`` with ``U`` the upper Cholesky factor of the inverse Hessian.

    Args:
        weight: [G, R, K]: groups, rows (output channels), columns (inputs).
        hessian: [G, K, K], ``X X^T`` over the inputs of the layer.
        scale: step, broadcastable to the weight.
        nearest: the value of the grid next to each element of a column, given that column and its steps, [G, R].
        damping: share of the mean diagonal that is added to the diagonal.
        ordered: take columns of large diagonal first, while there are many left to make up for them.
        lazy: columns whose updates of all the others are collected into one product.

    Returns:
        [G, R, K], float32.

    Example:
        >>> h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> to_integers = lambda column, step: column.round()
        >>> compensate(torch.tensor([[[0.4, 0.4]]]), h, torch.ones(1, 1, 2), to_integers, damping=0.0).round()
        tensor([[[0., 1.]]])
    """
    w = weight.detach().float().clone()
    h, steps = _alive(hessian), scale.float().expand_as(w)
    order = _largest_first(h) if ordered else torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
    w, steps = _columns(w, order), _columns(steps, order)
    h = torch.gather(h, 1, order.unsqueeze(2).expand_as(h))
    h = torch.gather(h, 2, order.unsqueeze(1).expand_as(h))
    upper = _inverse_factor(h, damping).float()
    del h  # of thousands of inputs it is the largest of all
    one_by_one = Repeated(lambda given: _one_by_one(nearest, *given), w.device, w.shape[2] // lazy)
    for start in range(0, w.shape[2], lazy):
        inside, rest = slice(start, start + lazy), slice(start + lazy, None)
        w[:, :, inside], errors = one_by_one(w[:, :, inside], steps[:, :, inside], upper[:, inside, inside])
        w[:, :, rest] -= errors @ upper[:, inside, rest]
    return _columns(w, order.argsort(-1))


def _one_by_one(nearest: Callable[[Tensor, Tensor], Tensor], w: Tensor, steps: Tensor, upper: Tensor) -> Tensor:
    """Columns just before they were rounded, and their errors, [2, G, R, K]: each makes those behind it move.

    Inside, each column lies in one piece.
    """
    w, steps = (t.transpose(1, 2).contiguous() for t in (w, steps))
    errors = torch.empty_like(w)
    for j in range(w.shape[1]):
        column = w[:, j]
        error = (column - nearest(column, steps[:, j])) / upper[:, j, j].unsqueeze(1)
        w[:, j + 1 :] -= upper[:, j, j + 1 :].unsqueeze(2) * error.unsqueeze(1)
        errors[:, j] = error
    return torch.stack((w, errors)).transpose(2, 3)


def sweep_codes(
    weight: Tensor,
    values: Tensor,
    hessian: Tensor,
    scale: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
    *,
    damping: float = 0.01,
    sweeps: int = 3,
) -> Tensor:
    """Values of the grid that no change of a single column betters: coordinate descent from given ones.

    Each step solves ``min tr((W - Q) H (W - Q)^T)`` for one column of ``Q`` while the others stay, which rounds
    ``q_j + ((W - Q) H)_j / H_jj`` to nearest (COMQ, arXiv:2403.07134, in the form of the Gram matrix), so that the
    objective never rises. ``H`` is damped as in :func:`compensate`.

    Args:
        weight: [G, R, K]: groups, rows (output channels), columns (inputs).
        values: on the grid, [G, R, K].
        hessian: [G, K, K], ``X X^T`` over the inputs of the layer.
        scale: step, broadcastable to the weight.
        nearest: as in :func:`compensate`.
        damping: share of the mean diagonal that is added to the diagonal.
        sweeps: over all columns, those of large diagonal first.

    Returns:
        [G, R, K], float32.

    Example:
        >>> h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> to_integers = lambda column, step: column.round()
        >>> w, q = torch.tensor([[[0.4, 0.4]]]), torch.zeros(1, 1, 2)
        >>> sweep_codes(w, q, h, torch.ones(1, 1, 2), to_integers, damping=0.0) + 0
        tensor([[[1., 0.]]])
    """
    w, q, h = weight.detach().float(), values.float().clone(), hessian.detach().float().clone()
    steps, diagonal = scale.float().expand_as(w), h.diagonal(dim1=-2, dim2=-1)
    diagonal += (damping * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    order = torch.argsort(diagonal.mean(0), descending=True, stable=True).tolist()
    for _ in range(sweeps):
        left = (w - q) @ h
        for j in order:
            column = nearest(q[:, :, j] + left[:, :, j] / diagonal[:, j : j + 1], steps[:, :, j])
            left -= (column - q[:, :, j]).unsqueeze(2) * h[:, j : j + 1]
            q[:, :, j] = column
    return q


def towards_float(
    weight: Tensor, hessian: Tensor, cross: Tensor, *, shares: Sequence[float], damping: float
) -> list[Tensor]:
    """The weights with which a layer that reads quantized inputs best gives what it gives for float ones.

    ``||Q X' - Y||^2`` is ``tr((Q - T) H (Q - T)^T)`` and a constant, with ``T = W + (C - W H) H^-1``: rounded for
    ``H``, ``T`` gives what GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695) aim at. ``H`` is damped.

    Args:
        weight: [G, R, K].
        hessian: ``H = X' X'^T`` over the quantized inputs, [G, K, K].
        cross: ``C = Y X'^T``, wanted outputs by quantized inputs, [G, R, K].
        shares: of the way from ``W`` to ``T``.
        damping: share of the mean diagonal that is added to the diagonal of ``H``.

    Returns:
        [G, R, K], float32, for each share.

    Example:
        >>> h = torch.tensor([[[4.0]]])
        >>> towards_float(torch.ones(1, 1, 1), h, h / 2, shares=[0.5], damping=0.0)
        [tensor([[[0.7500]]])]
    """
    if not any(shares):
        return [weight.float() for _ in shares]
    w = weight.double()
    way = (cross.double() - w @ hessian.double()) @ damped_inverse(hessian, damping)
    return [(w + share * way).float() for share in shares]


def least_squares_steps(values: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """What each row's step is multiplied by so that its output is nearest to the wanted one, [G, R], float64.

    ``a = (c q^T) / (q H q^T)``; 1 for rows that give nothing.

    Args:
        values: on the grid, [G, R, K].
        hessian: of the quantized inputs, [G, K, K].
        cross: of wanted outputs by quantized inputs, [G, R, K].

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> least_squares_steps(2 * one, one, 3 * one)
        tensor([[1.5000]], dtype=torch.float64)
    """
    q = values.double()
    power = ((q @ hessian.double()) * q).sum(-1)
    found = (cross.double() * q).sum(-1) / power.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(power > 0, found, torch.ones_like(found))


def damped_inverse(hessian: Tensor, damping: float) -> Tensor:
    """Inverse of the damped Hessian, [G, K, K], float64."""
    upper = _inverse_factor(_alive(hessian), damping)
    return upper.transpose(1, 2) @ upper


def _alive(hessian: Tensor) -> Tensor:
    """A copy in float64 in which inputs that are always zero have the mean diagonal, and no share in it."""
    h = hessian.detach().double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    usual = diagonal.masked_fill(dead, 0.0).sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    diagonal.copy_(torch.where(dead, torch.where(usual > 0, usual, 1.0), diagonal))
    return h


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse, [G, K, K]; damped more where that is not positive definite.

    With rows and columns in reverse order it is the inverse of the lower factor of ``h`` itself, whose own inverse
    is never computed. ``h`` is damped in place.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    plain, mean = diagonal.clone(), diagonal.mean(-1, keepdim=True)
    for attempt in range(8):
        if damping or attempt:
            diagonal.copy_(plain + mean * max(damping, 1e-10) * 10.0**attempt)
        lower, failed = torch.linalg.cholesky_ex(h.flip(-2, -1))
        if not bool(failed.any()):
            return _inverse_of_lower(lower).flip(-2, -1)
    return torch.eye(h.shape[1], dtype=h.dtype, device=h.device).expand_as(h)


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Of a triangular matrix, [G, K, K]; of a large one from those of its quarters, by products.

    Example:
        >>> _inverse_of_lower(torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]))
        tensor([[[ 0.5000,  0.0000],
                 [-0.5000,  1.0000]]])
    """
    size = lower.shape[-1]
    if size <= TRIANGLE:
        ones = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        small: Tensor = torch.linalg.solve_triangular(lower, ones, upper=False)
        return small
    half = size // 2
    first, last = slice(None, half), slice(half, None)
    found = torch.zeros_like(lower)
    found[..., first, first] = _inverse_of_lower(lower[..., first, first])
    found[..., last, last] = _inverse_of_lower(lower[..., last, last])
    found[..., last, first] = -(found[..., last, last] @ lower[..., last, first]) @ found[..., first, first]
    return found


def _largest_first(h: Tensor) -> Tensor:
    return torch.argsort(h.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)


def _columns(w: Tensor, order: Tensor) -> Tensor:
    return torch.gather(w, 2, order.unsqueeze(1).expand_as(w))
