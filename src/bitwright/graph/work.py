"""How much work a network is, and on how many images it is looked at: a count, so that no other load decides it."""

from __future__ import annotations

from bitwright.graph.student import Student

MODEST = 5e9
"""Multiply-accumulates for one image up to which a network is looked at on as many images as are wanted: those of
ResNet-50 and DeiT-S are fewer."""


def how_many(model: Student, wanted: int, least: int) -> int:
    """On how many images to look at a network: on fewer than are wanted as it takes more than :data:`MODEST`.

    Args:
        model: whose layers know their multiply-accumulates.
        wanted: of a network that takes no more.
        least: of any.
    """
    work = sum(layer.macs for layer in model.layers)
    return max(min(least, wanted), int(wanted * min(1.0, MODEST / max(1, work))))


def said(what: str, count: int, wanted: int) -> str:
    """What goes on, with the number of images where they are fewer than usual.

    Example:
        >>> said("Checking", 8, 8), said("Checking", 8, 32)
        ('Checking', 'Checking on 8 images instead of 32, since the network is large')
    """
    return what if count >= wanted else f"{what} on {count} images instead of {wanted}, since the network is large"
