"""The modules that put a tensor on its grid: one for weights and activations, one for biases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.errors import UsageError
from bitwright.quant import affine
from bitwright.quant.grid import Grid
from bitwright.transfer import sent

Role = Literal["weight", "activation", "parameter"]
TINY = 2.0**-60  # so that the product of two steps is still a normal float32


@dataclass(frozen=True)
class Calibration:
    """What calibration gives a quantizer: its grid, with scales and zero points as the quantizer holds them."""

    grid: Grid
    scale: Tensor
    zero_point: Tensor


class Quantizer(nn.Module):
    """Puts one tensor on its grid; the identity until it has a scale.

    Invariants once calibrated (:meth:`validate`): every scale is finite and positive; every zero point is an
    integer of the grid. A weight has one of each per block. An activation has one zero point, and one scale or one
    for each element of its last axis, all of them powers of two apart: [..., C] with scales [C].

    Args:
        name: the layer it belongs to, as the user knows it.
        grid: its integers.
        role: what it quantizes.
        shape: of the weight; unused without ``block``.
        block: extent of one scale along each axis of a weight (:func:`affine.to_blocks`); None for one scale.
        head_axis: the axis along which the heads of attention lie, of a weight whose blocks are theirs.
        power_of_two: every scale is one.
        shift: of a weight, whose codes the kernel reads times ``2**shift``, with a step that much finer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        name: str,
        grid: Grid,
        role: Role,
        shape: tuple[int, ...] = (),
        block: tuple[int, ...] | None = None,
        head_axis: int | None = None,
        power_of_two: bool = False,
        shift: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.grid, self.role = name, grid, role
        self.shape, self.block, self.head_axis = shape, block, head_axis
        self.power_of_two, self.shift = power_of_two, shift
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))

    @property
    def calibrated(self) -> bool:
        """Whether it has a scale."""
        return self.scale.numel() > 0

    @property
    def read_scale(self) -> Tensor:
        """Step of a weight as the kernel reads it; the division by a power of two is exact."""
        return self.scale * 2.0**-self.shift

    @property
    def granularity(self) -> str:
        """``tensor``, ``channel``, ``group`` or ``head``: what shares a scale."""
        if self.head_axis is not None:
            return "head"
        if self.block is None:
            return "channel" if self.scale.numel() > 1 else "tensor"
        if self.block == self.shape:
            return "tensor"
        return "group" if self.block[0] == 1 and self.block[1] < self.shape[1] else "channel"

    @property
    def blocks(self) -> int:
        """How many scales a weight has once it is calibrated; 1 without blocks."""
        extents = zip(self.shape, self.block or self.shape, strict=True)
        return math.prod(-(-extent // size) for extent, size in extents)

    @property
    def group_size(self) -> int | None:
        """How many channels share a scale, of ``group`` and ``head``."""
        if self.block is None or self.granularity not in {"group", "head"}:
            return None
        return self.block[1 if self.head_axis is None else self.head_axis]

    def set_range(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Takes over scales (and zero points) of any shape with one element per block; without blocks, one zero point.

        They come to the device of those before. With ``power_of_two`` a scale becomes the next power of two that is no
        smaller.

        Raises:
            UsageError: a scale is not finite and positive, or a zero point is off the grid.
        """
        device = self.scale.device
        scale = scale.detach().reshape(-1).float().clamp_min(TINY)
        if self.power_of_two:
            scale = affine.next_power_of_two(scale)
        if zero_point is None:
            zero = torch.zeros_like(scale if self.block is not None else scale[:1])
        else:
            zero = zero_point.detach().reshape(-1).to(scale.device, torch.float32)
        self._check(scale, zero)  # where they are: what comes from the CPU waits for no GPU
        self.scale, self.zero_point = sent(scale, device), sent(zero, device)

    def validate(self) -> None:
        """Checks the invariants listed on the class.

        Raises:
            UsageError: one of them does not hold.
        """
        self._check(self.scale, self.zero_point)

    def _check(self, scale: Tensor, zero: Tensor) -> None:
        low, high = self.grid.levels if self.grid.has_zero_point else (0, 0)
        mantissa = torch.frexp(scale).mantissa
        holds = [
            (torch.isfinite(scale) & (scale > 0)).all(),
            ((zero == zero.round()) & (zero >= low) & (zero <= high)).all(),
            (mantissa == 0.5).all(),
            (mantissa == mantissa[:1]).all(),
        ]
        positive, whole, powers, apart = torch.stack(holds).tolist()  # one wait for a GPU
        if not positive:
            raise UsageError(f"Expected finite positive scales for {self.name}, found {scale.tolist()[:4]}.")
        if not whole:
            raise UsageError(f"Expected integer zero points in [{low}, {high}] for {self.name}.")
        if self.block is None and zero.numel() != 1:
            raise UsageError(f"Expected one zero point for {self.name}, found {zero.numel()}.")
        if self.power_of_two and not powers:
            raise UsageError(f"Expected scales of {self.name} that are powers of two, found {scale.tolist()[:4]}.")
        if self.block is None and not apart:
            raise UsageError(f"Expected scales of {self.name} that are powers of two apart.")

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point: scalars, or broadcastable to the tensor."""
        if self.block is None:
            scale = self.scale if self.scale.numel() > 1 else self.scale.reshape(())
            return scale, self.zero_point.reshape(())
        return self.spread(self.scale), self.spread(self.zero_point)

    def spread(self, per_block: Tensor) -> Tensor:
        """Numbers of the blocks of a weight, [blocks], broadcastable to the weight."""
        assert self.block is not None
        return affine.expand_blocks(per_block, self.shape, self.block)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, as int32 in its shape."""
        return self.grid.codes(x, *self.expanded()).to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """What integer codes stand for, float32, in their shape."""
        return self.grid.values(codes, *self.expanded())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, same shape; ``x`` itself before calibration."""
        if not self.calibrated:
            return x
        return self.grid.nearest(x, *self.expanded())

    @property
    def calibration(self) -> Calibration:
        """What calibration gave it; tensors are replaced and never changed, so that it may be put back later."""
        return Calibration(self.grid, self.scale, self.zero_point)

    @calibration.setter
    def calibration(self, new: Calibration) -> None:
        self.grid, self.scale, self.zero_point = new.grid, new.scale, new.zero_point

    @property
    def uncalibrated(self) -> Calibration:
        """What lets everything pass."""
        return Calibration(self.grid, self.scale[:0], self.zero_point[:0])

    @property
    def span(self) -> tuple[float, float, float]:
        """Lowest and highest value of an activation, and the step between values; of the widest of several scales."""
        return self.grid.span(float(self.scale.max()), float(self.zero_point[0]))

    def spanning(self, low: float, high: float, bits: int) -> Calibration:
        """What it would have with other bits and one scale for [low, high], with ``low <= 0 <= high``."""
        grid, device = self.grid.with_bits(bits), self.scale.device
        scale, zero = grid.spanning(torch.tensor([low]), torch.tensor([high]))
        return Calibration(grid, scale.to(device), zero.to(device))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.name}, {self.role}, {self.grid.description}, {self.scale.numel()} scales"


@contextmanager
def as_if(calibrations: Mapping[Quantizer, Calibration | None]) -> Iterator[None]:
    """Quantizers as if calibrated so, while inside; those with None let everything pass."""
    before = {quantizer: quantizer.calibration for quantizer in calibrations}
    try:
        for quantizer, new in calibrations.items():
            quantizer.calibration = new or quantizer.uncalibrated
        yield
    finally:
        for quantizer, old in before.items():
            quantizer.calibration = old


class BiasQuantizer(nn.Module):
    """Puts a bias on the grid of its layer's accumulator: 32-bit integers with step ``s_x * s_w / 2**shift``.

    The layer's integer kernel adds the bias to its accumulator, so that the simulation must use the same values.
    The identity until both quantizers have scales.
    """

    LIMIT = 2.0**31 - 128  # the largest float32 below 2**31

    def __init__(self, name: str, source: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self.name = name
        self._parts = (source, weight)  # in a tuple, so that they are not registered a second time

    @property
    def source(self) -> Quantizer:
        """Quantizer of the layer's input."""
        return self._parts[0]

    @property
    def weight(self) -> Quantizer:
        """Quantizer of the layer's weight, with one scale or one per output channel."""
        return self._parts[1]

    @property
    def scale(self) -> Tensor:
        """Step of each bias: [C_out] or [1]."""
        return self.source.scale * self.weight.read_scale

    @property
    def bits(self) -> int:
        """Those of its two quantizers together, as the kernel reads them: the finer they are, the finer the step."""
        return self.source.grid.bits + self.weight.grid.bits + self.weight.shift

    @property
    def calibrated(self) -> bool:
        """Whether both of its quantizers have scales."""
        return self.source.calibrated and self.weight.calibrated

    def codes(self, bias: Tensor) -> Tensor:
        """int32 codes, [C_out]."""
        codes = torch.round(bias.double() / self.scale.double()).clamp_(-self.LIMIT, self.LIMIT)
        return codes.to(torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """What int32 codes stand for, float32, [C_out]."""
        return codes.to(torch.float32) * self.scale

    def forward(self, bias: Tensor) -> Tensor:
        """The bias on its grid, [C_out]."""
        return self.values(self.codes(bias)) if self.calibrated else bias


class Frozen(nn.Module):
    """Integers in place of a float parameter: ``(codes - zero_point) * scale``, exactly as fake quantization.

    Args:
        codes: int32, in the shape of the parameter.
        quantizer: the one whose grid the codes are on.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, quantizer: Quantizer | BiasQuantizer) -> None:
        super().__init__()
        self.name = quantizer.name
        self._quantizer = (quantizer,)
        narrow = isinstance(quantizer, Quantizer) and quantizer.grid.qmax < 1 << 15
        self.register_buffer("codes", codes.to(torch.int16) if narrow else codes)

    @property
    def quantizer(self) -> Quantizer | BiasQuantizer:
        """The grid of the codes."""
        return self._quantizer[0]

    def forward(self, _: Tensor | None = None) -> Tensor:
        """The parameter's values, float32 in its shape."""
        return self.quantizer.values(self.codes)
