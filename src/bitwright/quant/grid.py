"""The values a tensor may take: what every grid is asked for, so that only the grid knows how it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitwright.quant import affine

NORMAL = torch.finfo(torch.float32).tiny
"""A step below it would lose the digits of what is divided by it."""


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values ``(code - zero_point) * scale``, one for each integer of ``bits`` bits.

    A grid of another kind, for activations, is a subclass with a name of its own in :attr:`kind`, which answers the
    same questions. It is stored, tuned (gradients pass its rounding), exported and checked as this one is, but computes
    in float, since integer kernels know even steps alone.

    Example:
        >>> Grid(4, symmetric=True).levels, Grid(8).levels
        ((-8, 7), (0, 255))
        >>> Grid(2).nearest(torch.tensor([0.3, 2.2]), torch.tensor(0.5))
        tensor([0.5000, 1.5000])
    """

    bits: int
    symmetric: bool = False
    """Signed codes around zero point 0. Otherwise unsigned codes with a zero point of their own."""
    kind: ClassVar[str] = ""
    """How a file names grids of another kind than this one."""
    even: ClassVar[bool] = True
    """Whether values are one step apart, as the integers of kernels are."""
    _kinds: ClassVar[dict[str, type[Grid]]] = {}

    def __init_subclass__(cls) -> None:
        Grid._kinds[cls.kind] = cls

    @classmethod
    def named(cls, name: str, bits: int, *, negative: bool = True) -> Grid:
        """The grid that a scheme names, of a tensor that has negative values or none.

        Example:
            >>> Grid.named("symmetric", 8), Grid.named("symmetric", 8, negative=False)
            (Grid(bits=8, symmetric=True), Grid(bits=8, symmetric=False))
        """
        return Grid._kinds.get(name, Grid)(bits, name == "symmetric" and negative)

    @classmethod
    def of_weight(cls, bits: int) -> Grid:
        """The grid of weights."""
        return cls(bits, symmetric=True)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Grid:
        """The grid that :meth:`plain` gave, among whatever else the mapping holds."""
        return Grid._kinds.get(plain.get("grid", ""), Grid)(plain["bits"], plain["symmetric"])

    def plain(self) -> dict[str, Any]:
        """As a file holds it.

        Example:
            >>> Grid(4).plain(), Grid.read(Grid(4).plain()) == Grid(4)
            ({'bits': 4, 'symmetric': False}, True)
        """
        return asdict(self) | ({"grid": self.kind} if self.kind else {})

    def with_bits(self, bits: int) -> Grid:
        """The same kind of grid with other bits."""
        return replace(self, bits=bits)

    def fitted(self, name: str, *, negative: bool) -> Grid:
        """The grid for a tensor that was seen, of those that a scheme names so; a grid of another kind stays."""
        return self if self.kind else Grid.named(name, self.bits, negative=negative)

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return self.qmin, self.qmax

    @property
    def has_zero_point(self) -> bool:
        """Whether the zero point may be any code; otherwise it is 0."""
        return not self.symmetric

    @property
    def middle(self) -> Tensor | None:
        """Zero point in the middle of the codes, [1]; None where it is always 0."""
        return torch.tensor([float(1 << (self.bits - 1))]) if self.has_zero_point else None

    @property
    def description(self) -> str:
        """For people."""
        return f"{self.bits} bits, {self.kind or ('symmetric' if self.symmetric else 'affine')}"

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
        """Codes of ``x``, in its shape and dtype, rounded as in :func:`affine.quantize`."""
        return affine.quantize(x, scale, zero_point, self.qmin, self.qmax)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
        """What codes of any shape stand for, in the dtype of ``scale``, which is broadcastable to them."""
        return affine.dequantize(codes, scale, zero_point)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
        """The values of the codes of ``x``, in its shape and dtype."""
        return affine.fake_quantize(x, scale, zero_point, self.qmin, self.qmax)

    def span(self, scale: float, zero_point: float = 0.0) -> tuple[float, float, float]:
        """Lowest and highest value, and the smallest step between values.

        Example:
            >>> Grid(2).span(0.5, 1.0)
            (-0.5, 1.0, 0.5)
        """
        return (self.qmin - zero_point) * scale, (self.qmax - zero_point) * scale, scale

    def spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of grids that span [low, high], with ``low <= 0 <= high``, in the shape of both.

        Affine: ``scale = (high - low) / (2^b - 1)``, ``zero_point = round(-low / scale)``. Symmetric: the larger
        magnitude, ``scale = max(-low, high) / ((qmax - qmin) / 2)``, zero point 0 (methods, section 0.1). An interval
        without extent gets scale 1.

        Example:
            >>> Grid(2).spanning(torch.tensor([-1.0]), torch.tensor([2.0]))
            (tensor([1.]), tensor([1.]))
            >>> Grid(4, symmetric=True).spanning(torch.tensor([-7.5]), torch.tensor([3.0]))
            (tensor([1.]), tensor([0.]))
        """
        if self.symmetric:
            reach = torch.maximum(-low, high)
            scale = torch.where(reach > 0, reach / ((self.qmax - self.qmin) / 2), torch.ones_like(reach))
            return scale, torch.zeros_like(scale)
        span = high - low
        scale = torch.where(span > 0, (span / (self.qmax - self.qmin)).clamp_min(NORMAL), torch.ones_like(span))
        return scale, (torch.round(-low / scale) + self.qmin).clamp(self.qmin, self.qmax)
