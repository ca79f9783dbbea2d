"""Every objective, one function each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import UsageError
from bitwright.graph.points import Point, squared_norms
from bitwright.measure.metrics import as_log_probabilities
from bitwright.transfer import sent


class _Distances(torch.autograd.Function):
    """``sum_n c_n ||a_n - b_n||^2`` of several pairs, with each difference computed once for value and gradient.

    All at once, so that what is done with one number per image is one operator for all of them.
    """

    @staticmethod
    def forward(ctx: Any, points: list[Point], coefficients: Tensor, *pairs: Tensor) -> Tensor:
        students, teachers = pairs[: len(points)], pairs[len(points) :]
        count = coefficients.shape[1]
        differences = [a - b for a, b in zip(students, teachers, strict=True)]
        ctx.save_for_backward(coefficients, *differences)
        ctx.points = points
        return (squared_norms(points, differences, count) * coefficients).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *differences = ctx.saved_tensors
        factors = 2 * gradients[0].unsqueeze(1) * coefficients
        rows = {d.dtype: factors.to(d.dtype).unbind() for d in differences}
        for i, (point, difference) in enumerate(zip(ctx.points, differences, strict=True)):
            difference.mul_(point.spread(rows[difference.dtype][i], difference))
        return None, None, *differences, *[None] * len(differences)


class WeightedDistances:
    """``mean_n w_n mean_positions sum_channels (student - teacher)^2`` at points, in float32.

    EPTQ v2's distances (methods, section 1.4). Gradients flow to the student alone.

    Args:
        points: how the axes of their tensors are to be read.
        over: ``sum`` over channels, or ``mean`` over them too (EPTQ v1).
    """

    def __init__(self, points: list[Point], over: str = "sum") -> None:
        self.points, self.over = points, over
        self._shares: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> Tensor:
        """The distances, [L].

        Args:
            students: the interest tensors of N images, L of them.
            teachers: the same of the float network.
            weights: [N, L].
        """
        count = len(weights)
        each = [_share(s, count, p, self.over) / count for s, p in zip(students, self.points, strict=True)]
        key = (*each, weights.device)
        if key not in self._shares:  # once, so that no step waits for numbers on their way to a GPU
            self._shares[key] = sent(torch.tensor(each), weights.device).unsqueeze(1)
        coefficients = weights.float().T * self._shares[key]
        return _Distances.apply(self.points, coefficients, *students, *teachers)  # type: ignore[no-untyped-call, no-any-return]


def distances_by_image(student: Tensor, teacher: Tensor, weights: Tensor, point: Point, *, over: str = "sum") -> Tensor:
    """Of each image, without a gradient: ``w_n mean_positions sum_channels (student - teacher)^2``, [N]."""
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
