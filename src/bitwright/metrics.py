"""Figures of merit, accumulated batch by batch: accuracy with its interval, agreement, KL, signal to noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), as fractions.

    Example:
        >>> tuple(round(v, 4) for v in wilson_interval(87, 100))
        (0.7902, 0.9224)
    """
    if count == 0:
        return 0.0, 1.0
    p = hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Accuracy:
    """Top-1 and top-5 of class scores [B, K] against labels [B]."""

    hits: int = 0
    hits5: int = 0
    count: int = 0

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels.to(scores.device).unsqueeze(1)
        self.hits += int(top[:, 0].sum())
        self.hits5 += int(top.sum())
        self.count += len(labels)

    def result(self) -> dict[str, float | list[float]]:
        """``top1``, ``top1_ci`` and ``top5``, as fractions."""
        count = max(self.count, 1)
        return {
            "top1": self.hits / count,
            "top1_ci": list(wilson_interval(self.hits, self.count)),
            "top5": self.hits5 / count,
        }


@dataclass
class SignalToNoise:
    """``10 log10(sum x^2 / sum (x - y)^2)`` in decibels over a stream of pairs."""

    signal: float = 0.0
    noise: float = 0.0

    def update(self, reference: Tensor, other: Tensor) -> None:
        """Adds a pair of tensors of one shape."""
        self.signal += float(reference.double().square().sum())
        self.noise += float((reference.double() - other.double()).square().sum())

    def result(self) -> float | None:
        """Decibels; None while both are equal."""
        if self.noise == 0:
            return None
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise)


@dataclass
class Fidelity:
    """How closely one network's outputs follow another's, without labels.

    Class scores [B, K] and dense scores [B, K, ...]: ``agreement`` is the share of images or pixels with the same
    class, ``kl`` the mean ``KL(reference || other)`` in nats. Maps with a single channel are read as probabilities if
    they lie in 0..1 (agreement at 0.5). For any other output only ``sqnr_db`` is defined, and the two are None.
    """

    agreeing: float = 0.0
    divergence: float = 0.0
    count: int = 0
    applicable: bool = True
    ratio: SignalToNoise = field(default_factory=SignalToNoise)

    def update(self, reference: list[Tensor], other: list[Tensor]) -> None:
        """Adds a batch of outputs; classes are read from the first."""
        for a, b in zip(reference, other, strict=True):
            self.ratio.update(a, b)
        p, q = as_log_probabilities(reference[0]), as_log_probabilities(other[0])
        if p is None or q is None:
            self.applicable = False
            return
        self.agreeing += float((p.argmax(1) == q.argmax(1)).sum())
        self.divergence += float((p.exp() * (p - q)).sum())
        self.count += p.numel() // p.shape[1]

    def result(self) -> dict[str, float | None]:
        """``agreement`` as a fraction, ``kl`` in nats, ``sqnr_db``."""
        known = self.applicable and self.count > 0
        return {
            "agreement": self.agreeing / self.count if known else None,
            "kl": max(self.divergence / self.count, 0.0) if known else None,
            "sqnr_db": self.ratio.result(),
        }


def as_log_probabilities(output: Tensor) -> Tensor | None:
    """Logarithms of class probabilities along axis 1, float64; None for outputs that are no class scores."""
    if output.dim() < 2:
        return None
    if output.shape[1] > 1:
        return output.double().log_softmax(1) if output.dim() in {2, 4} else None
    if float(output.min()) < 0 or float(output.max()) > 1:
        return None
    p = output.double().clamp(1e-6, 1 - 1e-6)
    return torch.cat([(1 - p).log(), p.log()], dim=1)
