"""Where an image lies in the network's input: what preprocessing did to coordinates, and how boxes and masks follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from bitwright.errors import DataError
from bitwright.given.preprocessing import PreprocessFunction, Preprocessing, has_channels_last, resized_size

ImageSize: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
PointArray: TypeAlias = npt.NDArray[Any]

EDGE = 0.25
"""Pixels by which an image's edge may be off a whole one and is still taken to lie there, as nearly all edges do."""
PROBE_ERROR = 0.02
"""Share of a side by which a user's function may bend coordinates before it is no resizing, cropping and padding."""


@dataclass(frozen=True)
class ImagePlacement:
    """How coordinates of an image become coordinates of the network's input: ``x' = x * scale + shift`` on each axis.

    Pixels are squares, so that the first reaches from 0 to 1.

    Attributes:
        scale: along x and y; above 0.
        shift: along x and y, in pixels of the input.
        image: width and height of the image.
        input: width and height of the network's input.

    Example:
        >>> half = ImagePlacement((0.5, 0.5), (0.0, 2.0), (16, 8), (8, 8))
        >>> half.to_image(half.to_input(np.array([[2.0, 2.0, 6.0, 4.0]]))).tolist()
        [[2.0, 2.0, 6.0, 4.0]]
    """

    scale: tuple[float, float]
    shift: tuple[float, float]
    image: ImageSize
    input: ImageSize

    @classmethod
    def same(cls, size: ImageSize) -> ImagePlacement:
        """Of images that the network takes as they are."""
        return cls((1.0, 1.0), (0.0, 0.0), size, size)

    def to_input(self, boxes: PointArray) -> PointArray:
        """Boxes (M, 4) of corners x1, y1, x2, y2 in the image, in the input."""
        found: PointArray = boxes * np.tile(self.scale, 2) + np.tile(self.shift, 2)
        return found

    def to_image(self, boxes: PointArray) -> PointArray:
        """Boxes (M, 4) of corners x1, y1, x2, y2 in the input, in the image, cut at its borders."""
        found: PointArray = (boxes - np.tile(self.shift, 2)) / np.tile(self.scale, 2)
        return found.clip(0, np.tile(self.image, 2))

    def mask(self, mask: PointArray, outside: int) -> PointArray:
        """A mask of the image, as the network's input shows it: each pixel by its nearest.

        Args:
            mask: whole numbers (h, w) that cover the image, of its size or a multiple of it.
            outside: the value of pixels where there is no image.

        Returns:
            (H, W) of the input.
        """
        columns, rows = (self._source(axis, mask.shape[1 - axis]) for axis in (0, 1))
        found: PointArray = mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))]
        beyond = ((rows < 0) | (rows >= mask.shape[0]))[:, None] | ((columns < 0) | (columns >= mask.shape[1]))
        return np.where(beyond, outside, found)

    def _source(self, axis: int, extent: int) -> PointArray:
        """For each pixel of the input along an axis, the one of a mask that its centre falls into."""
        centres = (np.arange(self.input[axis]) + 0.5 - self.shift[axis]) / self.scale[axis]
        found: PointArray = np.floor(centres * (extent / self.image[axis])).astype(np.int64)
        return found


def placement(how: Preprocessing | PreprocessFunction, size: ImageSize) -> ImagePlacement:
    """Where preprocessing puts an image of a size.

    Raises:
        DataError: a function of the user's own does something else than to resize, crop and pad.
    """
    return _of_settings(how, size) if isinstance(how, Preprocessing) else _of_function(how, size)


def _of_settings(how: Preprocessing, size: ImageSize) -> ImagePlacement:
    scaled, wanted = resized_size(how, size), (how.size[2], how.size[1])
    padded = [max(a, b) for a, b in zip(scaled, wanted, strict=True)]
    shift = [
        max(0, side - inner) // 2 - round((outer - side) / 2)
        for side, inner, outer in zip(wanted, scaled, padded, strict=True)
    ]
    scale = (scaled[0] / size[0], scaled[1] / size[1])
    return ImagePlacement(scale, (float(shift[0]), float(shift[1])), size, wanted)


def _of_function(function: PreprocessFunction, size: ImageSize) -> ImagePlacement:
    """Shows the function ramps along both axes, and reads off where each coordinate went.

    A pixel of the input that is the same for a black and for a white image shows none. On the others a ramp lies
    between black and white as its coordinate lies between the image's borders, whatever the mean, the scale and the
    order of channels.
    """
    width, height = size
    ramps = _ramp(width, height), _ramp(height, width).T
    black, white, along_x, along_y = (_shown(function, values, size) for values in (0, 255, *ramps))
    seen = np.abs(white - black) > 1e-6 * max(float(np.abs(white).max()), 1e-6)
    if not seen.any():
        raise _not_a_placement("it gives the same for a black and for a white image")
    span = np.where(seen, white - black, 1.0)
    (left, right), (top, bottom) = (
        _edges((ramp - black) / span, seen, axis, side)
        for ramp, axis, side in ((along_x, 2, width), (along_y, 1, height))
    )
    scale = (right - left) / width, (bottom - top) / height
    return ImagePlacement(scale, (left, top), size, (black.shape[2], black.shape[1]))


def _ramp(extent: int, lines: int) -> PointArray:
    """Values 0 to 255 that grow along each line, (lines, extent); lines are rounded in turn up and down."""
    rounding = np.arange(lines) * 0.6180339887 % 1
    return np.floor((np.arange(extent) + 0.5) / extent * 255 + rounding[:, None])


def _shown(function: PreprocessFunction, values: Any, size: ImageSize) -> PointArray:
    pixels = np.broadcast_to(np.asarray(values, np.uint8), (size[1], size[0]))
    found = function(Image.fromarray(np.stack([pixels] * 3, -1)))
    array = np.asarray(found.detach() if isinstance(found, Tensor) else found, dtype=np.float64)
    return np.moveaxis(array, -1, 0) if has_channels_last(array.shape) else array


def _edges(shares: PointArray, seen: PointArray, axis: int, extent: int) -> tuple[float, float]:
    """Where an image begins and ends along an axis of the input (C, H, W), from the share of it at each pixel."""
    places = np.broadcast_to(np.expand_dims(np.arange(shares.shape[axis]) + 0.5, tuple({0, 1, 2} - {axis})), seen.shape)
    inner = seen & (shares > 0.03) & (shares < 0.97)
    if np.unique(places[inner]).size < 2:
        raise _not_a_placement("it shows less than two of its pixels")
    slope, start = np.polyfit(places[inner], shares[inner], 1)
    bent = np.abs(slope * places + start - shares)[inner].max()
    if slope <= 0 or bent > PROBE_ERROR + 1.5 / extent:
        raise _not_a_placement("it mirrors, turns or bends them")
    ends = -start / slope, (1 - start) / slope
    near = [float(round(end)) if abs(end - round(end)) < EDGE else float(end) for end in ends]
    return near[0], near[1]


def _not_a_placement(why: str) -> DataError:
    return DataError(
        "Expected preprocess to resize, crop and pad images, so that boxes and masks can follow; "
        f"{why}. Give images as tensors, with boxes or masks in their pixels."
    )
