"""Quantizers whose rounding, steps and ranges are variables of an optimisation.

Each takes the place of a :class:`~bitwright.quant.quantizer.Quantizer` in the student's graph while it is tuned, and
gives plain integers and scales back at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.quant import affine
from bitwright.quant.quantizer import TINY, Quantizer

ZETA, GAMMA = 1.1, -0.1
DECIDED = 1e-3
"""A rounding is decided when it is this near to up or down."""
FLOOR = 2.0**-16
"""Of a multiplicative step (EPTQ)."""


# ------------------------------------------------------------------------------------------ soft rounding


def rectified_sigmoid(a: Tensor) -> Tensor:
    """How far up each weight is rounded, in 0..1: ``clamp(sigmoid(a) (zeta - gamma) + gamma, 0, 1)``.

    AdaRound, arXiv:2004.10568, equation 23 (methods, section 0.3).

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.sigmoid(a).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``a`` whose rectified sigmoid is ``h``.

    Example:
        >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.0, 0.25, 0.5])))
        tensor([0.0000, 0.2500, 0.5000])
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rounding_regularizer(h: Tensor, beta: float | Tensor) -> Tensor:
    """``sum(1 - |2h - 1|^beta)``: zero exactly where every rounding is decided (AdaRound, equation 24).

    Example:
        >>> rounding_regularizer(torch.tensor([0.0, 0.5, 1.0]), 20.0)
        tensor(1.)
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


# ------------------------------------------------------------------------------------------------ weights


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class _Within(torch.autograd.Function):
    """Clamps, and rounds if asked to; the gradient passes where nothing was clamped.

    PyTorch's own backward pass of a clamp takes five operators, and this one: an interval without its ends, for which
    the ends are moved to the next number outside.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, rounds: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (low, high)
        clamped = x.clamp(low, high)
        return clamped.round_() if rounds else clamped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outside = _next(low, -math.inf), _next(high, math.inf)
        return torch.ops.aten.hardtanh_backward(gradients[0], x, *outside), None, None, None


@functools.cache
def _next(x: float, towards: float) -> float:
    """The next number of float32."""
    return float(np.nextafter(np.float32(x), np.float32(towards)))


def _positive(step: Tensor) -> Tensor:
    """A learned step as it is used: its magnitude, above zero."""
    return _apply(_Within, step.abs(), TINY, math.inf, False)


class _Round(torch.autograd.Function):
    """Rounds; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Instead(torch.autograd.Function):
    """The second tensor; the gradient passes to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


Rounding = Literal["soft", "straight-through"]


class _Holding(nn.Module):
    """What variables alone decide: computed anew in each pass, or held for several."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor | None = None

    def forward(self, stored: Tensor | None = None) -> Tensor:
        """The tensor for one pass."""
        return self.value() if self.held is None else self.held

    def value(self) -> Tensor:
        """The same, from the variables."""
        raise NotImplementedError


@contextlib.contextmanager
def held_values(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, each weight and bias is computed once for all passes; their gradients reach the variables behind.

    Args:
        modules: of the network; those that variables alone decide are held.
    """
    found = [m for m in dict.fromkeys(modules) if isinstance(m, _Holding)]
    values = [m.value() for m in found]
    for module, value in zip(found, values, strict=True):
        module.held = value.detach().requires_grad_(value.requires_grad)
    try:
        yield
        pairs = [(v, m.held.grad) for m, v in zip(found, values, strict=True) if m.held is not None]
        pairs = [(v, g) for v, g in pairs if g is not None]
        if pairs:
            torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
    finally:
        for module in found:
            module.held = None


class LearnedWeight(_Holding):
    """A weight as ``step * code`` with variables for both.

    Args:
        weight: [O, I, ...], float; what is rounded to nearest at the start.
        quantizer: calibrated, symmetric.
        rounding: ``soft`` lets every code move between floor and ceil of where it starts, by a rectified sigmoid;
            ``straight-through`` rounds a free real code and passes the gradient, so that codes may move further.

    The parameters are ``codes`` (logits for ``soft``, real codes otherwise) and ``step``, a factor on the step of each
    block, which leaves the codes.
    """

    initial: Tensor

    def __init__(self, weight: Tensor, quantizer: Quantizer, rounding: Rounding = "soft") -> None:
        super().__init__()
        self.name, self.grid, self.rounding = quantizer.name, quantizer.grid, rounding
        self._shape, self._block = tuple(weight.shape), quantizer.block or tuple(weight.shape)
        scale, _ = quantizer.expanded()
        real = weight.detach().float() / scale
        self.register_buffer("initial", quantizer.scale.detach().float().clone())
        self.base: Tensor | None = None
        if rounding == "soft":
            self.base = torch.floor(real)
            self.codes = nn.Parameter(inverse_rectified_sigmoid(real - self.base))
        else:
            self.codes = nn.Parameter(real.clone())
        self.step = nn.Parameter(torch.ones_like(self.initial))

    def value(self) -> Tensor:
        """The weight, [O, I, ...]."""
        qmin, qmax = self.grid.qmin, self.grid.qmax
        if self.rounding == "soft":
            assert self.base is not None
            real = self.base + rectified_sigmoid(self.codes)
        else:
            real = self.codes
        step = self._expand(self.initial * _apply(_Within, self.step, FLOOR, math.inf, False))
        return _apply(_Within, real, qmin, qmax, self.rounding == "straight-through") * step

    def hard_codes(self) -> Tensor:
        """The integers, float32, in the shape of the weight."""
        with torch.no_grad():
            if self.rounding == "soft":
                assert self.base is not None
                real = self.base + (self.codes >= 0)
            else:
                real = self.codes
            return real.clamp(self.grid.qmin, self.grid.qmax).round_()

    def scale(self) -> Tensor:
        """The steps, [number of blocks]."""
        return self.initial * self.step.detach().clamp_min(FLOOR)

    def dampen(self, share: float | Tensor) -> None:
        """Moves every code by this share of its way to the integer it rounds to (not ``soft``)."""
        with torch.no_grad():
            self.codes.lerp_(self.hard_codes(), share)

    def hard(self) -> Tensor:
        """The weight with its integers, in its shape."""
        return self.hard_codes() * self._expand(self.scale())

    def softness(self) -> Tensor:
        """How far up each weight is rounded, in 0..1, in its shape (``soft`` only)."""
        return rectified_sigmoid(self.codes)

    def decided(self) -> int:
        """How many roundings are within 1e-3 of up or down; all, where they are straight-through."""
        if self.rounding != "soft":
            return self.codes.numel()
        with torch.no_grad():
            h = self.softness()
            return int(((h < DECIDED) | (h > 1 - DECIDED)).sum())

    def _expand(self, per_block: Tensor) -> Tensor:
        return affine.expand_blocks(per_block, self._shape, self._block)


# -------------------------------------------------------------------------------------------- activations


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with LSQ's gradients, in as few passes over memory as PyTorch's operators allow.

    Inside the range the gradient passes; outside it is zero. For the step, with ``r = x/s``: ``round(r) - r`` inside,
    the end of the range outside (arXiv:1902.08153, equation 3). Summed up, that is
    ``(<g, y> - <g inside, x>) / s``, two dot products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: float, high: float, factor: float, mix: float | Tensor
    ) -> Tensor:
        y = affine.nearest_multiple(x, step, low, high)
        ctx.save_for_backward(x, y, step)
        ctx.bounds = (low, high, factor, mix)
        return _blend(y, x, mix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step = ctx.saved_tensors
        low, high, factor, mix = ctx.bounds
        gradient = gradients[0]
        if gradient.is_cuda or torch.compiler.is_compiling():  # no number may be waited for
            s = step.detach()
            inside = torch.where((x > low * s) & (x < high * s), gradient, 0)
        else:
            s = float(step.detach())
            inside = torch.ops.aten.hardtanh_backward(gradient, x, low * s, high * s)
        slope = None
        if ctx.needs_input_grad[1]:
            slope = (_dot(gradient, y) - _dot(inside, x)) * (factor * (1 - mix) / s)
            slope = slope.to(step.dtype).reshape(step.shape)
        return _blend(inside, gradient, mix), slope, None, None, None, None


def _blend(y: Tensor, x: Tensor, mix: float | Tensor) -> Tensor:
    """``(1 - mix) y + mix x``; a share in a tensor is never looked at, so that nothing waits for it."""
    if isinstance(mix, Tensor):
        return torch.lerp(y, x.to(y.dtype), mix.to(y.dtype))
    return torch.lerp(y, x, mix) if mix else y


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without a copy where both are dense in the same order."""
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())


class LearnedActivation(nn.Module):
    """An activation quantizer whose step is a variable; the zero point stays, and so does the step of uneven grids.

    Of several scales the ratios stay as well, and the variable is the least of them. Ratios are powers of two, so that
    dividing by them and multiplying again is exact.

    Args:
        quantizer: calibrated.
        learn: whether the step is a variable.

    ``mix`` is the share of the float activation in the output: 1 gives it bit for bit, 0 the quantized one. ``drop`` is
    the share of elements, drawn anew in every pass, that stay float. Both are numbers, or scalar tensors between 0 and
    1 that may change between two passes of one recording. ``share`` is that of a batch's samples in one pass: the scale
    of the step's gradient is the batch's, however it is split.
    """

    zero_point: Tensor
    ratios: Tensor | None
    mix: float | Tensor
    drop: float | Tensor

    def __init__(self, quantizer: Quantizer, *, learn: bool = True) -> None:
        super().__init__()
        self.name, self.grid = quantizer.name, quantizer.grid
        self.register_buffer("zero_point", quantizer.zero_point.detach().clone().reshape(()))
        scale = quantizer.scale.detach().float()
        self.register_buffer("ratios", scale / scale.min() if scale.numel() > 1 else None)
        self.step = nn.Parameter(scale.min().clone(), requires_grad=learn)
        self.mix, self.drop, self.share = 0.0, 0.0, 1.0
        zero = float(self.zero_point)
        self._low, self._high = self.grid.qmin - zero, self.grid.qmax - zero

    def forward(self, x: Tensor) -> Tensor:
        """The activation, same shape and dtype."""
        if any(not isinstance(share, Tensor) and share >= 1.0 for share in (self.mix, self.drop)):
            return x
        factor = (x.numel() / self.share * max(self._high, 1.0)) ** -0.5
        ratios = None if self.ratios is None else self.ratios.to(x.dtype)
        reduced = x if ratios is None else x / ratios
        if self.grid.even:
            y = _apply(_FakeQuantize, reduced, _positive(self.step), self._low, self._high, factor, self.mix)
        else:
            nearest = self.grid.nearest(reduced.detach(), _positive(self.step.detach()), self.zero_point)
            y = _apply(_Instead, reduced, _blend(nearest, reduced.detach(), self.mix))
        if ratios is not None:
            y = y * ratios
        if isinstance(self.drop, Tensor) or self.drop:
            return torch.where(torch.rand_like(x) < self.drop, x, y)
        return y

    def scale(self) -> Tensor:
        """The step, a scalar; one for each channel where the quantizer had several, [C]."""
        step = _positive(self.step.detach())
        return step if self.ratios is None else step * self.ratios


class LearnedBias(nn.Module):
    """A bias as a variable, in the place of its quantizer or of nothing.

    ``size`` is what a relative learning rate is a share of: the spread of the output it is added to, once known.
    """

    def __init__(self, bias: Tensor, *, learn: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=learn)
        self.size = float(bias.detach().abs().mean())

    def forward(self, stored: Tensor | None = None) -> Tensor:
        """The bias, [C_out]."""
        return self.bias


class RoundedBias(_Holding):
    """A learned bias in one of its places, rounded to that layer's step; the gradient passes.

    Args:
        learned: the variable.
        step: gives the step as it is, [C_out] or a scalar.
    """

    def __init__(self, learned: LearnedBias, step: Callable[[], Tensor]) -> None:
        super().__init__()
        self.learned, self.step = learned, step

    def value(self) -> Tensor:
        """The bias, [C_out]."""
        step = self.step().detach()
        return _apply(_Round, self.learned() / step) * step
