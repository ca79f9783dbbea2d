"""What is known of images besides their pixels: masks, boxes, or whatever else a user's own metric reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Kind: TypeAlias = Literal["segmentation", "detection", "other"]
TruthArray: TypeAlias = npt.NDArray[Any]

IGNORED = 255
"""The value of a mask's pixels that belong to no class, as in most data sets for segmentation."""


@dataclass(frozen=True)
class Mask:
    """The class of each pixel of an image.

    Attributes:
        read: gives whole numbers (h, w): classes, and ``IGNORED`` or a negative number where a pixel does not count.
        where: the file or position that it comes from, for messages.
    """

    read: Callable[[], TruthArray]
    where: str


@dataclass(frozen=True)
class Boxes:
    """The objects in an image.

    Attributes:
        corners: x1, y1, x2, y2 of each in pixels of the image, (G, 4).
        labels: classes, (G,).
        crowd: whether a box surrounds several objects, or one too difficult to count, (G,): what is found there is
            neither right nor wrong.
        areas: of the objects in square pixels, (G,), which decide whether they are small, medium or large.
        where: the file or position that they come from, for messages.

    Example:
        >>> Boxes.of(np.array([[0.0, 0.0, 4.0, 2.0]]), np.array([3])).areas.tolist()
        [8.0]
    """

    corners: TruthArray
    labels: TruthArray
    crowd: TruthArray
    areas: TruthArray
    where: str = ""

    @classmethod
    def of(cls, corners: TruthArray, labels: TruthArray, crowd: TruthArray | None = None, where: str = "") -> Boxes:
        """Boxes whose areas are those of the objects."""
        corners = np.asarray(corners, np.float64).reshape(-1, 4)
        none = np.zeros(len(corners), bool)
        sides = (corners[:, 2:] - corners[:, :2]).prod(1)
        return cls(corners, np.asarray(labels, np.int64), none if crowd is None else crowd, sides, where)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Truth:
    """What is known of each of N images.

    Attributes:
        kind: what the items are: masks, boxes, or something that only a metric of the user's own can read.
        items: one per image.
        said: what they are, in words that follow "the", for messages.
        names: of classes, where they are known.
        known: how many classes there are, where a file says so.
        asked: whether a user gave them to be compared with, so that leaving them out would be wrong.
    """

    kind: Kind
    items: Sequence[Any]
    said: str
    names: Mapping[int, str] = field(default_factory=dict)
    known: int | None = None
    asked: bool = False

    def take(self, positions: Sequence[int]) -> Truth:
        """The same of some of the images, in the order given."""
        return replace(self, items=[self.items[p] for p in positions])


def masks_of(array: TruthArray, said: str = "masks given") -> Truth:
    """Masks (N, h, w) in one array, of images in their order."""

    def one(position: int) -> Mask:
        return Mask(lambda: np.asarray(array[position]).astype(np.int64), f"mask {position}")

    return Truth("segmentation", [one(i) for i in range(len(array))], said)
