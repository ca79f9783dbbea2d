"""Several views of every image, each always the same, so that scores can follow a sample and its augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bitwright.given.images import Images
from bitwright.given.preprocessing import Compact, has_channels_last
from bitwright.stages.base import Samples
from bitwright.transfer import CPU

FEW, MOST = 256, 4
"""Views that make up for few images, and how many of each image at most: more gained nothing with 48 images."""
UNSEEN = 4_200_000_000
"""Seed of views that no stage sees."""
PICTURES = (1, 3)
"""Channels of a picture."""
NO_SIDE = 4
"""Pixels of a side that may as well be an axis of channels, of which pictures have up to four."""

VIEWS_ALLOWED = 64
"""As many as may be asked for: each is looked at as long as an image is, and 8 are the most that a paper takes."""
ViewCount = Annotated[int, Field(ge=1, le=VIEWS_ALLOWED)] | Literal["auto"]
"""How many views of each image. ``auto`` is one, but as many as make few pictures 256, four at most."""


def view_count(images: Images, wanted: int | Literal["auto"]) -> int:
    """How many views of each image.

    Args:
        images: [C, H, W] or [H, W, C] each; others than pictures of one or three channels are taken once by ``auto``,
            and so are signals in the shape of one, of four rows or columns at most.
        wanted: so many, or ``auto``.

    Example:
        >>> from bitwright.given.images import load_images
        >>> images = load_images(torch.rand(100, 3, 8, 8), None)
        >>> view_count(images, "auto"), view_count(images, 8)
        (3, 8)
    """
    if wanted != "auto":
        return wanted
    return _for_few(images) if _are_pictures(images) else 1


def _for_few(images: Images) -> int:
    return min(MOST, -(-FEW // len(images)))


def _are_pictures(images: Images) -> bool:
    shape = images.batch([0]).shape[1:]
    if len(shape) != 3 or any(part.flat for part in images.parts):
        return False
    *sides, channels = shape if has_channels_last(shape) else (*shape[1:], shape[0])
    return channels in PICTURES and min(sides) > NO_SIDE


class Views:
    """A sequence of ``draws`` views of every image: the image itself, then random crops, half of them mirrored.

    Example:
        >>> from bitwright.given.images import load_images
        >>> views = Views(load_images(torch.rand(2, 3, 8, 8), None), draws=3, seed=0)
        >>> len(views), views.batch([5]).shape, bool((views.batch([5]) == views.batch([4, 5])[1:]).all())
        (6, torch.Size([1, 3, 8, 8]), True)
    """

    def __init__(self, images: Images, draws: int = 1, seed: int = 0, smallest: float = 0.5) -> None:
        self.images, self.draws, self.seed, self.smallest = images, draws, seed, smallest

    def __len__(self) -> int:
        return len(self.images) * self.draws

    def unseen(self) -> Samples:
        """Views that are none of these, nor of those that ``auto`` draws; what has no views is taken as it is.

        One of every image, but as many as make few images 256, four at most; the same whatever the seed, so that runs
        can be compared.
        """
        if self.draws == 1 and not _are_pictures(self.images):
            return self.images
        before, more = max(self.draws, MOST), _for_few(self.images)
        views = Views(self.images, before + more, UNSEEN, self.smallest)
        return _Later(views, before * len(self.images))

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device = CPU) -> Tensor:
        """[B, C, H, W] on a device, as :meth:`compact` finds them."""
        return self.compact(indices).on(device).floats()

    def compact(self, indices: Sequence[int] | Tensor) -> Compact:
        """[B, C, H, W], or the pixels of whole pictures.

        Index ``i`` is view ``i // len(images)`` of image ``i % len(images)``.

        Inputs of different shapes, which lie one after another, have no views: each would be cut otherwise. Nor have
        signals and vectors.
        """
        chosen = [int(i) for i in indices]
        batch = self.images.compact([i % len(self.images) for i in chosen])
        uncut = batch.values.dim() < 4 or any(part.flat for part in self.images.parts)
        if uncut or all(i < len(self.images) for i in chosen):
            return batch
        return Compact(torch.stack([self._view(x, i) for x, i in zip(batch.floats(), chosen, strict=True)]))

    def batches(self, size: int, device: torch.device = CPU) -> Iterator[Tensor]:
        """All views in order, [B, C, H, W] on a device; B is ``size``, less in the last one."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))), device)

    def by_image(self) -> list[int]:
        """The indices in another order: all views of an image one after another."""
        return [view * len(self.images) + i for i in range(len(self.images)) for view in range(self.draws)]

    def _view(self, image: Tensor, index: int) -> Tensor:
        if index < len(self.images):
            return image
        draw = torch.rand(4, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + index)).tolist()
        side = (self.smallest + (1 - self.smallest) * draw[0]) ** 0.5
        last = has_channels_last(image.shape)
        image = image.movedim(-1, 0) if last else image
        frames = image[None] if image.dim() == 3 else image.movedim(1, 0)  # of a video all alike
        size = frames.shape[2:]
        height, width = (max(1, round(side * d)) for d in size)
        top = round(draw[1] * (size[0] - height))
        left = round(draw[2] * (size[1] - width))
        part = frames[:, :, top : top + height, left : left + width]
        view = F.interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True)
        view = view[0] if image.dim() == 3 else view.movedim(0, 1)
        view = view.flip(-1) if draw[3] < 0.5 else view
        return view.movedim(0, -1) if last else view


@dataclass(frozen=True)
class _Later:
    """Views from one on."""

    views: Views
    first: int

    def __len__(self) -> int:
        return len(self.views) - self.first

    def batch(self, indices: Sequence[int] | Tensor, device: torch.device = CPU) -> Tensor:
        return self.views.batch([self.first + int(i) for i in indices], device)
