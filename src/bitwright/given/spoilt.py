"""Calibration images with values that no other image has: a fault of a sensor, a fill that was left in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.given.images import Images, Preprocessing
from bitwright.given.preprocessing import DEPTHS

BATCH = 32
USUAL = 0.99
"""Share of an image's values that are no larger than what is usual in it."""
ABOVE_USUAL, ABOVE_OTHERS = 16.0, 8.0
"""A spoilt image's largest value is that many times as large as usual values, and as the largest of other images."""
FEW = 0.1
"""Share of the images: if more look spoilt, they are what the network is given, and stay."""
SAMPLE = 4096


@dataclass(frozen=True)
class Magnitudes:
    """Magnitudes of each image, [N]: the largest value, and one that is larger than 99 % of its values."""

    largest: Tensor
    usual: Tensor
    alike: bool = False
    """Whether there are several images and all are the same."""


def without_spoilt(images: Images) -> Images:
    """The images without those few that hold a value far larger than all others; a warning names them.

    One such value would stretch the ranges of every layer, and all other images would fall into a few codes.
    """
    reach = measure(images)
    _tell_of_depth(images)
    if reach.alike:
        warnings.warn(
            f"All {len(images)} calibration images are the same. The ranges of that one suit no other: give images "
            "like those that the network will see.",
            stacklevel=3,
        )
    spoilt = find_spoilt(reach)
    if not spoilt:
        return images
    many = len(spoilt) > FEW * len(images)
    warnings.warn(_said(images, reach, spoilt, "Ranges follow it" if many else "It is left out"), stacklevel=3)
    return images if many else images.take([i for i in range(len(images)) if i not in set(spoilt)])


def _tell_of_depth(images: Images) -> None:
    """Warns where files of 16 bits all hold values of fewer, which come out dark."""
    how = images.preprocessing
    settings = how if isinstance(how, Preprocessing) else None
    for kind, largest in images.deep.items():
        bits = next((b for b in DEPTHS if largest < 1 << b), 16)
        if bits == 16 or (kind == "grey" and settings is not None and settings.pixel_bits is not None):
            continue
        given = f"Give pixel_bits={bits}, or 16 if they are meant to be dark"
        warnings.warn(
            f"The {kind} images of 16 bits hold values of at most {largest}, as images of {bits} bits do, and come out "
            f"dark. {given if kind == 'grey' and settings is not None else 'Save them as 8 bit'}.",
            stacklevel=4,
        )


def _said(images: Images, reach: Magnitudes, spoilt: list[int], done: str) -> str:
    worst = max(spoilt, key=lambda i: float(reach.largest[i]))
    value, usual = float(reach.largest[worst]), float(reach.usual.median())
    more = f", and so do {len(spoilt) - 1} more" if len(spoilt) > 1 else ""
    return (
        f"The calibration image {images.names[worst]} holds a value of {value:.3g}, where {usual:.3g} is usual{more}. "
        f"{done}; check the file and the preprocessing."
    )


def measure(images: Images) -> Magnitudes:
    """Looks at every image once."""
    largest, usual = [], []
    first, alike = images.batch([0]), len(images) > 1
    for batch in images.batches(BATCH):
        alike = alike and batch.shape[1:] == first.shape[1:] and bool((batch == first).all())
        rows = batch.flatten(1).abs()
        largest.append(rows.amax(1))
        step = -(-rows.shape[1] // SAMPLE) | 1  # odd, so that it does not run along one column of the image
        some = rows[:, ::step]
        usual.append(some.kthvalue(max(1, int(USUAL * some.shape[1])), dim=1).values)
    return Magnitudes(torch.cat(largest), torch.cat(usual), alike)


def find_spoilt(reach: Magnitudes) -> list[int]:
    """Positions of the images that are spoilt.

    Example:
        >>> find_spoilt(Magnitudes(torch.tensor([3.0, 1e4, 2.0]), torch.tensor([2.0, 2.0, 1.5])))
        [1]
    """
    usual, others = reach.usual.median(), reach.largest.median()
    beyond = (reach.largest > ABOVE_USUAL * usual) & (reach.largest > ABOVE_OTHERS * others)
    return [int(i) for i in beyond.nonzero().flatten()] if float(usual) > 0 else []
