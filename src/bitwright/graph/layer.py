"""What a network's description says of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Layer:
    """One row of a network's description: a quantized tensor and what computes it.

    Keys are paths of modules inside the graph. ``node`` is the operator's name in the teacher and the student.
    """

    name: str
    op: str
    node: str
    parameters: int = 0
    macs: int = 0
    weight: str | None = None
    bias: str | None = None
    source: str | None = None
    """Key of the quantizer of a linear operator's input."""
    activation: str | None = None
    """Key of the quantizer that ends the layer's group."""
    end: str | None = None
    """Name of the node that this quantizer follows."""


INSIDE = "inside the group that is quantized after"
"""How the reason of a value begins that a fused layer computes on its way, and that nobody stores or rounds."""


@dataclass(frozen=True)
class Unquantized:
    """A tensor that has no grid: it stays in float, or lies inside a fused layer."""

    name: str
    op: str
    reason: str

    @property
    def inside(self) -> bool:
        """Whether it lies inside a fused layer.

        Example:
            >>> Unquantized("conv", "conv2d", f"{INSIDE} relu").inside, Unquantized("t", "mul", "a number").inside
            (True, False)
        """
        return INSIDE in self.reason


@dataclass(frozen=True)
class Unfolded:
    """A normalisation that stays an operator of its own."""

    name: str
    op: str
    reason: str
