"""What the values of a network's outputs are: class scores along some axis, probabilities, whole numbers, or others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ReadingKind = Literal["scores", "probabilities", "labels", "whole", "values", "constant"]

SMALLEST = 1e-6
"""Probabilities below it count as it, so that a divergence stays finite."""


@dataclass(frozen=True)
class Reading:
    """How one output is read.

    Attributes:
        kind: ``scores`` and ``probabilities`` of classes, of which one is the answer; ``labels``: probabilities that
            each stand for themselves, so that the answer is which are above one half, and which is the largest;
            ``whole`` numbers or booleans, which are answers already; ``values`` of any other kind, which are no
            answers; ``constant``, the same for all images.
        axis: of the classes or labels; None where each value is an answer of its own, or none.
        note: why there are no answers, for people.

    Example:
        >>> import torch
        >>> Reading("scores", 1).answers(torch.tensor([[0.1, 0.9], [3.0, -1.0]])).tolist()
        [[1], [0]]
        >>> Reading("labels", 1).answers(torch.tensor([[0.1, 0.9], [0.6, 0.8]])).tolist()
        [[0, 1, 1], [1, 1, 1]]
    """

    kind: ReadingKind
    axis: int | None = None
    note: str = ""

    @property
    def tells(self) -> bool:
        """Whether the output holds answers."""
        return self.kind not in {"values", "constant"}

    def answers(self, output: Tensor) -> Tensor | None:
        """What the output says, [B, ..., P], as whole numbers or booleans; those of the last axis belong together."""
        if not self.tells:
            return None
        if self.kind == "whole":
            return output.unsqueeze(-1)
        if self.kind == "labels":
            values = self._last(output)
            above = (values > 0.5).long()
            if above.shape[-1] == 1:
                return above
            import torch

            return torch.cat([above, values.argmax(-1, keepdim=True)], -1)
        return self._last(output).argmax(-1, keepdim=True)

    def same(self, reference: Tensor, other: Tensor) -> Tensor | None:
        """Whether both say the same, bool [B, ...]: one for each image and position; None where they say nothing.

        An answer made from a value that is not a number is never the same.
        """
        a, b = self.answers(reference), self.answers(other)
        if a is None or b is None:
            return None
        broken = reference.isnan() | other.isnan()
        broken = broken.unsqueeze(-1) if self.kind == "whole" else self._last(broken)
        return (a == b).all(-1) & ~broken.any(-1)

    def divergence(self, reference: Tensor, other: Tensor) -> Tensor | None:
        """``KL(reference || other)`` in nats, float64 [B, ...]; None where there are no probabilities.

        For ``labels`` it is the sum over them, since each is a distribution of its own.
        """
        p, q = self.log_probabilities(reference), self.log_probabilities(other)
        return None if p is None or q is None else (p.exp() * (p - q)).nan_to_num(nan=float("inf")).sum((-2, -1))

    def log_probabilities(self, output: Tensor) -> Tensor | None:
        """Logarithms of probabilities, float64 [B, ..., P, K]: P distributions over K classes; None if there are none.

        Classes: P is 1. Labels: K is 2, label absent and label present.
        """
        if not self.tells or self.kind == "whole":
            return None
        values = self._last(output).double()
        if self.kind == "scores":
            return values.log_softmax(-1).clamp_min(-1e4).unsqueeze(-2)
        if self.kind == "probabilities":
            shares = values.clamp_min(SMALLEST)
            return (shares / shares.sum(-1, keepdim=True)).log().unsqueeze(-2)
        import torch

        present = values.clamp(SMALLEST, 1 - SMALLEST)
        return torch.stack([1 - present, present], -1).log()

    def _last(self, output: Tensor) -> Tensor:
        return output.unsqueeze(-1) if self.axis is None else output.movedim(self.axis, -1)


def by_values(output: Tensor) -> Reading:
    """A reading from a batch of values alone, where nothing else is known of a network.

    [B, K] and [B, K, H, W] with more than one channel are taken as class scores along axis 1, or as probabilities
    where they are; one channel in 0..1 as a probability.
    """
    if not output.is_floating_point():
        return Reading("whole")
    if not output.numel():
        return Reading("values", note="It is empty.")
    if output.dim() not in {2, 4} or (output.dim() > 1 and output.shape[1] == 0):
        return Reading("values", note="Its axes are not known.")
    return with_values(Reading("scores", 1), output)


def with_values(reading: Reading, output: Tensor) -> Reading:
    """What the values of a batch [B, ...] add to a reading of class scores along an axis.

    Probabilities that sum to one are told from scores; vectors of length one are embeddings; a single channel is a
    probability or nothing.
    """
    if reading.kind != "scores" or reading.axis is None:
        return reading
    within = bool(((output >= 0) & (output <= 1)).all())
    if output.shape[reading.axis] == 1:
        return Reading("labels", reading.axis) if within else Reading("values", note="It has a single channel.")
    if within and _is_one(output.double().sum(reading.axis)):
        return Reading("probabilities", reading.axis)
    if not within and _is_one(output.double().square().sum(reading.axis)):
        return Reading("values", note="Its vectors have length one, as embeddings have.")
    return reading


def _is_one(sums: Tensor) -> bool:
    return bool(((sums - 1).abs() < 1e-3).all())
