"""What a network is fed while it is optimised, and what the float network gives for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx

from bitwright.given.preprocessing import Compact
from bitwright.graph.points import Point
from bitwright.stages.augment import Views
from bitwright.stages.base import Samples
from bitwright.transfer import CPU, sent

PLACED = 64
"""Samples that are copied to a GPU together."""


class Feed(Protocol):
    """What a network is fed, and what it should give."""

    def __len__(self) -> int: ...

    def __call__(self, indices: Tensor) -> Batch:
        """For the samples at these positions, on the device."""

    def keep(self, budget: int, uses: int, at_once: int) -> bool:
        """Computes what it can for all samples, and says whether it did.

        Args:
            budget: bytes that it may take.
            uses: how many samples are taken in all.
            at_once: samples in one pass.
        """


class Batch(NamedTuple):
    """Samples that pass a network, or a part of one, together.

    Attributes:
        inputs: images [B, C, H, W], or the tensors that the part reads.
        targets: the float network's values at the points, times ``roots`` where those are given.
        roots: what values at the points are multiplied by before they are compared.
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    roots: list[Tensor] | None = None


class Targets:
    """The float network's values at the points, computed anew for each batch or kept.

    Args:
        graph: of the teacher, with its points exposed.
        points: the points.
        precision: in which it computes.
    """

    def __init__(self, graph: fx.GraphModule, points: list[Point], precision: torch.dtype) -> None:
        self.graph, self.points, self.precision = graph, points, precision
        self.kept: list[Tensor] | None = None

    def keep(self, samples: Samples, at_once: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Computes them for all samples, and keeps them in that type if one is given."""
        self.kept = kept_rows(len(samples), at_once, lambda part: self._compute(samples.batch(part, device)), dtype)

    def __call__(self, indices: Tensor, images: Tensor) -> list[Tensor]:
        """Values for the samples at these positions, [N ...] each."""
        if self.kept is None:
            return self._compute(images)
        chosen = sent(indices, images.device)
        return [rows(k, chosen) for k in self.kept]

    def bytes_of(self, images: Tensor, dtype: torch.dtype | None = None) -> int:
        """Bytes that keeping one sample takes; 0 where values cannot be kept, because an axis mixes samples.

        Args:
            images: [B, C, H, W] to measure with.
            dtype: in which values would be kept; their own if not given.
        """
        if not all(p.image_after_image for p in self.points):
            return 0
        values = self._compute(images)
        return sum(v.numel() * (dtype or v.dtype).itemsize for v in values) // len(images)

    def _compute(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), autocast(images.device, self.precision):
            return list(self.graph(images)[1])


class OnDevice:
    """Samples that lie where they are computed with, [N, C, H, W] or as bytes."""

    def __init__(self, whole: Compact) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole.values)

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device = CPU) -> Tensor:
        """Some of them, [B, C, H, W]; on a device."""
        chosen = indices if isinstance(indices, Tensor) else torch.tensor(list(indices))
        return self.whole.rows(sent(chosen, self.whole.values.device)).on(device).floats()


def held_on(samples: Views, device: torch.device, budget: int) -> Samples:
    """The samples on a GPU, if all of them fit into a budget of bytes; else as they are, copied batch by batch.

    Whole pictures are kept as bytes; where some are views, which are floats, all are floats.
    """
    last = samples.compact([len(samples) - 1]).values  # a view, if there are any
    if device.type == "cpu" or last.nbytes * len(samples) > budget:
        return samples
    starts = range(0, len(samples), PLACED)
    parts = [samples.compact(range(s, min(s + PLACED, len(samples)))).on(device) for s in starts]
    if last.dtype == torch.uint8:
        return OnDevice(Compact(torch.cat([part.values for part in parts]), parts[0].how))
    return OnDevice(Compact(torch.cat([as_channels_last(part.floats()) for part in parts])))


class ImageFeed:
    """Images for the whole network."""

    def __init__(self, samples: Samples, targets: Targets, device: torch.device) -> None:
        self.samples, self.targets, self.device = samples, targets, device

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, indices: Tensor) -> Batch:
        """Images and the float network's values."""
        images = as_channels_last(self.samples.batch(indices, self.device))
        return Batch([images], self.targets(indices, images))

    def keep(self, budget: int, uses: int, at_once: int) -> bool:
        """Keeps the float network's values where they fit, in bfloat16 if need be: taking rows is faster."""
        one = self.samples.batch([0], self.device)
        for dtype in (None, torch.bfloat16):
            if 0 < self.targets.bytes_of(one, dtype) * len(self) <= budget and uses >= 2 * len(self):
                self.targets.keep(self.samples, at_once, self.device, dtype)
                return True
        return False


def kept_rows(
    count: int, at_once: int, compute: Callable[[range], list[Tensor]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Values of all samples, [N, k, ...] each in memory order, written where they stay; for :func:`rows`.

    Args:
        count: N.
        at_once: samples in one pass.
        compute: gives the values of some samples, by their positions.
        dtype: to keep them in; their own if not given.
    """
    kept: list[Tensor] = []
    for start in range(0, count, at_once):
        part = range(start, min(start + at_once, count))
        values = [in_memory_order(v) for v in compute(part)]
        values = [v.reshape(len(part), -1, *v.shape[1:]) for v in values]
        kept = kept or [v.new_empty((count, *v.shape[1:]), dtype=dtype) for v in values]
        for whole, value in zip(kept, values, strict=True):
            whole[start : part.stop] = value
    return kept


def in_memory_order(value: Tensor) -> Tensor:
    """[B, H, W, C] for an image, which convolutions leave with channels last."""
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def rows(kept: Tensor, chosen: Tensor) -> Tensor:
    """Some samples of what was kept of all, [N, k, ...] in memory order."""
    found = kept[chosen].flatten(0, 1)
    return found.permute(0, 3, 1, 2) if found.dim() == 4 else found


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Computes in a precision; float32 is left alone."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def as_channels_last(images: Tensor) -> Tensor:
    """In the order in which convolutions are fastest; videos as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
