"""Every objective, one function each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import UsageError
from bitwright.graph.points import Point
from bitwright.measure.metrics import as_log_probabilities


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
    coefficients = weights * (_share(student, len(weights), point, over) / len(weights))
    value: Tensor = _WeightedDistance.apply(student, teacher, coefficients, point)  # type: ignore[no-untyped-call]
    return value


def weighted_distances(student: Tensor, teacher: Tensor, weights: Tensor, point: Point, *, over: str = "sum") -> Tensor:
    """The same of each image, without a gradient: ``w_n mean_positions sum_channels (student - teacher)^2``, [N]."""
    distances: Tensor = point.squared_norm(student.detach() - teacher, len(weights))
    return distances * weights * _share(student, len(weights), point, over)


def _share(student: Tensor, count: int, point: Point, over: str) -> float:
    """Of one element in an image's mean over positions, and over channels where it is taken over them too."""
    share = 1.0 / point.positions(student, count)
    return share / student.shape[point.channels] if over == "mean" else share


def info_nce(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """Contrastive loss of each image against its own teacher output among those of the batch, [N].

    ``2 T CE(cos(student_n, teacher_m) / T, m = n)``, as Evol-Q computes it (arXiv:2308.10814, section 3.2; methods,
    section 2.1): negatives are teacher outputs of other images, in one direction. A perfect student does not reach 0.

    Args:
        student: [N, ...], flattened for each image; its length does not matter.
        teacher: the same of the float network.
        temperature: T.

    Raises:
        UsageError: N is 1, so that there are no negatives.
    """
    if len(student) < 2:
        raise UsageError("infoNCE needs at least two images in a batch: the others are its negatives.")
    q, k = (functional.normalize(x.reshape(len(x), -1).float(), dim=1) for x in (student, teacher))
    own = torch.arange(len(q), device=q.device)
    return 2 * temperature * functional.cross_entropy(q @ k.T / temperature, own, reduction="none")


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each image over the mean square of the batch's teacher outputs, [N] for [N, ...]."""
    scale = teacher.float().square().mean().clamp_min(1e-30)
    return (student.float() - teacher.float()).square().reshape(len(student), -1).mean(1) / scale


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between each image's outputs, [N] for [N, ...]."""
    a, b = (x.reshape(len(x), -1).float() for x in (student, teacher))
    return 1 - functional.cosine_similarity(a, b, dim=1)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of each image in nats, the mean over positions, [N].

    Args:
        student: class scores [N, K] or [N, K, H, W], or a map of probabilities [N, 1, H, W].
        teacher: the same of the float network.

    Raises:
        UsageError: the outputs are neither.
    """
    p, q = as_log_probabilities(teacher), as_log_probabilities(student)
    if p is None or q is None:
        raise UsageError(f"KL needs class scores or probabilities, found outputs of {list(student.shape[1:])}.")
    return (p.exp() * (p - q)).sum(1).flatten(1).mean(1).float() if p.dim() > 2 else (p.exp() * (p - q)).sum(1).float()
