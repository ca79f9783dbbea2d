"""What calibration remembers of a tensor: a fixed amount, however many images pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bitwright.errors import DataError
from bitwright.transfer import fetched

BINS = 8192
SMALLEST = 2.0**-100
"""Reach of a histogram: where bins would be narrower than floats can say, all is one bin."""
SAMPLE = 2**12
SCATTER = 7919
"""A prime that spreads the starts of neighbouring rows."""


class Statistics:
    """Minimum, maximum and histogram of a stream of tensors.

    The extremes are exact. The histogram counts at most ``SAMPLE`` evenly spaced elements of each index of the first
    axis; its range is a power of two that doubles when a value falls outside, two bins becoming one, so that its bins
    are never wider than 1/2048 of the largest magnitude seen. What it holds does not depend on how images were put
    into batches.

    Args:
        name: the layer, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name, self._each = name, 0
        self._noted: list[tuple[Tensor, int, Tensor]] = []
        self.forget()

    def forget(self) -> None:
        """Nothing was seen but how large a batch is."""
        self.minimum, self.maximum = 0.0, 0.0
        self.count = 0
        self._rows = self._each
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._reach = 0.0
        self._two_sided = False

    def update(self, x: Tensor) -> None:
        """Adds a batch of any shape.

        Raises:
            DataError: a value is not finite; names the layer.
        """
        self.note(x)
        add_noted([self])

    def note(self, x: Tensor) -> None:
        """Takes in a batch of any shape that :func:`add_noted` will add; nothing waits for a GPU."""
        flat = _in_memory_order(x.detach()).reshape(len(x) if x.dim() > 1 else 1, -1)
        self._noted.append((torch.stack(torch.aminmax(flat)).double(), x.numel(), self._sampled(flat)))

    def take_noted(self) -> list[tuple[Tensor, int, Tensor]]:
        """What was noted since, for each batch: both extremes [2], the number of values, and some of them."""
        noted, self._noted = self._noted, []
        return noted

    def _add(self, low: float, high: float, count: int, chosen: Tensor) -> None:
        """Adds a batch: its extremes, how many values it has, and those that are counted."""
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError(
                f"The output of {self.name} is not finite on the calibration images. "
                "Check the preprocessing (mean, std) and the weights before it."
            )
        if not self.count:
            self._counts = torch.zeros(BINS, dtype=torch.float64, device=chosen.device)
        self.minimum = min(low, self.minimum) if self.count else low
        self.maximum = max(high, self.maximum) if self.count else high
        self.count += count
        self._grow(max(abs(low), abs(high)), low < 0)
        if self._reach == 0:
            self._counts[0 if not self._two_sided else BINS // 2] += chosen.numel()
            return
        width = self._reach / (BINS // 2 if self._two_sided else BINS)  # a power of two: the division is exact
        places = (chosen.float() / width).floor().long() + (BINS // 2 if self._two_sided else 0)
        self._counts.scatter_add_(0, places.reshape(-1), self._counts.new_ones(()).expand(places.numel()))

    def _sampled(self, rows: Tensor) -> Tensor:
        """At most ``SAMPLE`` elements of each row, [R, K] of [R, N]; where they start differs from row to row."""
        first, self._rows = self._rows, self._rows + len(rows)
        self._each = self._each or len(rows)
        stride = -(-rows.shape[1] // SAMPLE)
        if stride <= 1:
            return rows
        stride |= 1  # odd, so that it does not run along one column of a power-of-two image
        starts = torch.arange(first, first + len(rows), device=rows.device) * SCATTER % stride
        steps = torch.arange(rows.shape[1] // stride, device=rows.device) * stride
        return rows.gather(1, starts[:, None] + steps)

    def skip(self, batches: int) -> None:
        """Goes past batches that another process sees, as large as the first one."""
        self._rows += batches * self._each

    def absorb(self, other: Statistics) -> None:
        """Takes in what another process has seen of the same tensor: all counts are exact."""
        if not other.count:
            return
        self.minimum = min(self.minimum, other.minimum) if self.count else other.minimum
        self.maximum = max(self.maximum, other.maximum) if self.count else other.maximum
        self.count += other.count
        for each, wider in ((self, other), (other, self)):
            each._grow(wider._reach / 2, wider._two_sided)
        self._counts += other._counts

    def _grow(self, magnitude: float, negative: bool) -> None:
        if negative and not self._two_sided:
            halved = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.cat([torch.zeros_like(halved), halved])
            self._two_sided = True
        if self._reach == 0:
            self._reach = _above(max(magnitude, SMALLEST)) if magnitude else 0
        while magnitude >= self._reach > 0:
            halved = self._counts.reshape(-1, 2).sum(1)
            if self._two_sided:
                quarter = torch.zeros_like(halved[: BINS // 4])
                self._counts = torch.cat([quarter, halved, quarter])
            else:
                self._counts = torch.cat([halved, torch.zeros_like(halved)])
            self._reach *= 2

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Values and counts of the bins that are not empty: [K], [K], float64.

        A bin is represented by its middle, clamped to what was seen; the bin that starts at zero by zero, where
        rectified tensors have most of their mass.
        """
        start = -self._reach if self._two_sided else 0.0
        width = (self._reach - start) / BINS
        middles = start + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
        middles[BINS // 2 if self._two_sided else 0] = 0.0
        counts = self._counts.cpu()
        filled = counts > 0
        return middles[filled].clamp(self.minimum, self.maximum), counts[filled]


def add_noted(statistics: Iterable[Statistics]) -> None:
    """Adds all that was noted, with one wait for a GPU, however many tensors there are.

    Raises:
        DataError: a value is not finite; names the layer.
    """
    noted = [(each, *what) for each in statistics for what in each.take_noted()]
    ends = torch.stack([extremes for _, extremes, _, _ in noted]).tolist() if noted else ()
    for (each, _, count, chosen), (low, high) in zip(noted, ends, strict=True):
        each._add(low, high, count, chosen)


def to_cpu(statistics: Sequence[Statistics]) -> None:
    """Brings all histograms to the CPU, with one wait for a GPU."""
    for each, counts in zip(statistics, fetched([each._counts for each in statistics]), strict=True):
        each._counts = counts


def _above(magnitude: float) -> float:
    """The next power of two above a number; 0 for 0.

    Example:
        >>> _above(3.0), _above(4.0)
        (4.0, 8.0)
    """
    return 2.0 ** math.frexp(magnitude)[1] if magnitude else 0.0


def _in_memory_order(x: Tensor) -> Tensor:
    """The same values with axes in the order of memory, [B, H, W, C] for channels last: much faster to reduce."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if last else x


class MeanInput:
    """Mean over images of a layer's input, elementwise: [1, ...], as large as one image's activation.

    Args:
        channels_only: average over all axes but the last, [1, C], which is all that a linear layer needs, and leaves
            it free where the images are (attention puts tokens first).
    """

    def __init__(self, channels_only: bool = False) -> None:
        self.channels_only = channels_only
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Adds a batch, [B, ...]; windows or tokens folded into the first axis are averaged too."""
        self.add(*self.summed(x))

    def summed(self, x: Tensor) -> tuple[Tensor, int]:
        """The sum of a batch, [1, ...], and of how many it is."""
        if self.channels_only:
            x = x.flatten(0, -2)
        x = x.detach()
        ordered = _in_memory_order(x)
        found = ordered.reshape(len(x), -1).sum(0).reshape(1, *ordered.shape[1:])
        return found if ordered is x else found.permute(0, 3, 1, 2), len(x)

    def add(self, total: Tensor, count: int) -> None:
        """Adds what :meth:`summed` gave.

        Args:
            total: a sum over samples, in the shape of one.
            count: how many samples there were.
        """
        if self.total is None:
            self.total = total.clone()
        else:
            self.total += total
        self.count += count

    @property
    def mean(self) -> Tensor:
        """[1, ...], float32."""
        assert self.total is not None
        return self.total / self.count
