"""Curvature by the definition: dense matrices of tiny networks, from derivatives of whole outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.curvature.hessian import Group, Matrix, weights_of
from bitwright.graph.capture import Captured


def second(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The Hessian, by reverse mode twice: ``torch.func.hessian`` goes through a deprecated part of PyTorch."""
    return torch.func.jacrev(torch.func.jacrev(f))


def function(made: Captured, paths: list[str]) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """``f(all weights end to end, images)``, and those weights."""
    stored = [made.graph.get_buffer(p) for p in paths]
    sizes = [t.numel() for t in stored]

    def outputs(flat: Tensor, x: Tensor) -> Tensor:
        parts = {p: v.view(t.shape) for p, v, t in zip(paths, flat.split(sizes), stored, strict=True)}
        return torch.func.functional_call(made.graph, parts, (x,))[0]

    return outputs, torch.cat([t.reshape(-1) for t in stored])


def bend(matrix: Matrix, y: Tensor) -> Tensor:
    """``A`` at one image's outputs, [k, k], by the formulas of section 0.7."""
    if matrix == "squared":
        return 2 / y.numel() * torch.eye(y.numel())
    scores = y.flatten(1)  # [K, positions]
    full = torch.zeros(y.numel(), y.numel()).view(*scores.shape, *scores.shape)
    for i in range(scores.shape[1]):
        p = scores[:, i].softmax(0)
        full[:, i, :, i] = (torch.diag(p) - torch.outer(p, p)) / scores.shape[1]
    return full.view(y.numel(), y.numel())


def matrix_of(made: Captured, matrix: Matrix, x: Tensor, labels: list[int] | None = None) -> Tensor:
    """The whole matrix, a mean over images, [n, n]."""
    outputs, flat = function(made, list(weights_of(made.graph)))
    total = torch.zeros(len(flat), len(flat))
    for i, image in enumerate(x.split(1)):
        if matrix == "hessian":
            assert labels is not None
            target = torch.tensor([labels[i]])
            total += second(lambda w, a=image, t=target: F.cross_entropy(outputs(w, a), t))(flat)
            continue
        y = outputs(flat, image)[0]
        j = torch.func.jacrev(outputs)(flat, image)[0].reshape(y.numel(), -1)
        total += j.T @ bend(matrix, y if y.dim() > 1 else y[:, None]) @ j
    return total / len(x)


def spans(made: Captured) -> dict[str, range]:
    """Where each weight lies among the rows."""
    found, start = {}, 0
    for path in weights_of(made.graph):
        size = made.graph.get_buffer(path).numel()
        found[path] = range(start, start + size)
        start += size
    return found


def part(whole: Tensor, made: Captured, group: Group) -> Tensor:
    rows = [i for p in group.weights for i in spans(made)[p]]
    return whole[rows][:, rows]
