"""Masks and boxes of both networks on the images on which they differ most."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bitwright.given.images import Images
from bitwright.given.truth import Boxes, TruthArray
from bitwright.measure.task import Pictured
from bitwright.report.answers import encoded, seen
from bitwright.report.kept import Overlay

TILE = 112
"""Pixels of the longer side that smaller images are enlarged to before they are drawn on."""


def overlays(found: Sequence[Pictured], images: Images) -> list[Overlay]:
    """What the report keeps of these images: a small picture for each network and for the labels."""
    return [
        Overlay(
            name=images.names[each.position],
            said=each.said,
            pictures={who: _drawn(images, each.position, marks) for who, marks in each.marks.items()},
        )
        for each in found
    ]


def _drawn(images: Images, position: int, marks: Any) -> str:
    image = seen(images.seen(position), images.preprocessing).convert("RGB")
    if isinstance(marks, Boxes):
        return encoded(_with_boxes(image, marks), lossless=True)
    return encoded(_with_classes(image, marks))


def _with_classes(image: Image.Image, classes: TruthArray) -> Image.Image:
    """The image in grey, in the colour of each pixel's class; as it is where a pixel has none, or class 0."""
    height, width = classes.shape
    grey = np.asarray(image.convert("L").resize((width, height)).convert("RGB"), np.float64)
    table = np.array([_colour(k) for k in range(int(classes.max(initial=0)) + 1)], np.float64)
    coloured = np.where((classes > 0)[..., None], 0.4 * grey + 0.6 * table[classes.clip(0)], grey)
    return Image.fromarray(coloured.round().astype(np.uint8))


def _with_boxes(image: Image.Image, boxes: Boxes) -> Image.Image:
    scale = max(1, TILE // max(image.size))
    large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen, width = ImageDraw.Draw(large), max(1, max(large.size) // 80)
    for corners, label in zip(boxes.corners * scale, boxes.labels.tolist(), strict=True):
        x1, y1, x2, y2 = corners.tolist()
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_colour(label + 1), width=width)
    return large


def _colour(number: int) -> tuple[int, int, int]:
    """A colour for a class: hues far apart for classes that follow each other.

    Example:
        >>> _colour(1) == _colour(1), _colour(1) == _colour(2)
        (True, False)
    """
    red, green, blue = colorsys.hsv_to_rgb(number * 0.6180339887 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
