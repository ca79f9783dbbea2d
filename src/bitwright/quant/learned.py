"""Quantizers whose rounding, steps and ranges are variables of an optimisation.

Each takes the place of a :class:`~bitwright.quant.quantizer.Quantizer` in the student's graph while it is tuned, and
gives plain integers and scales back at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def rectified_sigmoids(logits: Sequence[Tensor]) -> list[Tensor]:
    """How far up each weight is rounded, in 0..1: ``clamp(sigmoid(a) (zeta - gamma) + gamma, 0, 1)`` of each tensor.

    AdaRound, arXiv:2004.10568, equation 23 (methods, section 0.3).

    Args:
        logits: one tensor or more.

    Example:
        >>> rectified_sigmoids([torch.tensor([-9.0, 0.0, 9.0])])
        [tensor([0.0000, 0.5000, 1.0000])]
    """
    return list(_RectifiedSigmoids.apply(*logits))  # type: ignore[no-untyped-call]


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``a`` whose rectified sigmoid is ``h``.

    Example:
        >>> rectified_sigmoids([inverse_rectified_sigmoid(torch.tensor([0.0, 0.25, 0.5]))])
        [tensor([0.0000, 0.2500, 0.5000])]
    """
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rounding_regularizers(ups: Sequence[Tensor], beta: float | Tensor) -> Tensor:
    """``sum(1 - |2h - 1|^beta)``: zero exactly where every rounding is decided (AdaRound, equation 24), [L].

    Args:
        ups: how far up each weight is rounded, L tensors.
        beta: the exponent.

    Example:
        >>> rounding_regularizers([torch.tensor([0.0, 0.5, 1.0])], 20.0)
        tensor([1.])
    """
    return _apply(_Regularizers, beta, *ups)


class _Regularizers(torch.autograd.Function):
    """In few operators on a GPU; the powers of the gradient give those of the value."""

    @staticmethod
    def forward(ctx: Any, beta: float | Tensor, *ups: Tensor) -> Tensor:
        ctx.offsets = torch._foreach_mul(ups, 2)
        torch._foreach_sub_(ctx.offsets, 1)
        sizes = torch._foreach_abs(ctx.offsets)
        exponent = beta - 1
        ctx.powers, ctx.beta = [size.pow(exponent) for size in sizes], beta
        left = torch._foreach_neg(torch._foreach_mul(ctx.powers, sizes))
        torch._foreach_add_(left, 1)
        return torch.stack(torch._foreach_norm(left, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = torch._foreach_mul(ctx.powers, ctx.beta)
        torch._foreach_mul_(slopes, list(gradients[0].neg().unbind()))
        torch._foreach_mul_(slopes, torch._foreach_sign(ctx.offsets))
        torch._foreach_mul_(slopes, 2)
        return None, *slopes


# ------------------------------------------------------------------------------------------------ weights


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class _Within(torch.autograd.Function):
    """Clamps; the gradient passes where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (low, high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _passed(gradients[0], x, *ctx.bounds), None, None


def _passed(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """The gradient where ``x`` lies within these ends or on them, zero elsewhere.

    PyTorch's own backward pass of a clamp takes five operators, and this one: an interval without its ends, for which
    the ends are moved to the next number outside.
    """
    outside = _next(low, -math.inf), _next(high, math.inf)
    found: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, *outside)
    return found


@functools.cache
def _next(x: float, towards: float) -> float:
    """The next number of float32."""
    return float(np.nextafter(np.float32(x), np.float32(towards)))


def _positive(step: Tensor) -> Tensor:
    """Learned steps as they are used: their magnitude, above zero."""
    return _apply(_Within, step.abs(), TINY, math.inf)


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


class _RectifiedSigmoids(torch.autograd.Function):
    """Of many tensors in as few operators on a GPU as of one."""

    @staticmethod
    def forward(ctx: Any, *logits: Tensor) -> tuple[Tensor, ...]:
        curves = torch._foreach_sigmoid(logits)
        ctx.save_for_backward(*curves)
        found = _stretched(curves)
        torch._foreach_clamp_min_(found, 0)
        torch._foreach_clamp_max_(found, 1)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        curves = ctx.saved_tensors
        pairs = zip(gradients, _stretched(curves), strict=True)
        found = [_passed(g, h, 0, 1) for g, h in pairs]
        torch._foreach_mul_(found, ZETA - GAMMA)
        down = torch._foreach_neg(curves)
        torch._foreach_add_(down, 1)
        torch._foreach_mul_(found, down)
        torch._foreach_mul_(found, curves)
        return tuple(found)


def _stretched(curves: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch._foreach_mul(curves, ZETA - GAMMA)
    torch._foreach_add_(found, GAMMA)
    return list(found)


class _OnGrids(torch.autograd.Function):
    """Many weights from their real codes and steps, in few operators on a GPU; rounded if asked to.

    Args:
        ends: lowest and highest code of each, L pairs.
        rounds: whether codes are rounded; their gradient passes, where nothing was clamped.
        tensors: L of real codes, and L of steps in shapes that broadcast to them.
    """

    @staticmethod
    def forward(ctx: Any, ends: Sequence[tuple[int, int]], rounds: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        reals, steps = tensors[: len(ends)], tensors[len(ends) :]
        codes = _within(reals, ends, rounds)
        ctx.ends = ends
        ctx.save_for_backward(*reals, *steps, *codes)
        return tuple(c * s for c, s in zip(codes, steps, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(ctx.ends), ctx.saved_tensors
        reals, steps, codes = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needed = ctx.needs_input_grad[2:]
        moved: Sequence[Tensor | None] = [None] * count
        slopes: Sequence[Tensor | None] = [None] * count
        if any(needed[:count]):
            quads = zip(gradients, steps, reals, ctx.ends, strict=True)
            moved = [_passed(g * s, real, *ends) for g, s, real, ends in quads]
        if any(needed[count:]):
            products = torch._foreach_mul(gradients, codes)
            slopes = [p.sum_to_size(s.shape) for p, s in zip(products, steps, strict=True)]
        return None, None, *moved, *slopes


def _within(reals: Sequence[Tensor], ends: Sequence[tuple[int, int]], rounds: bool) -> list[Tensor]:
    """Clamped, and rounded if asked to."""
    if not reals[0].is_cuda:
        clamped = [r.clamp(low, high) for r, (low, high) in zip(reals, ends, strict=True)]
        return [c.round_() for c in clamped] if rounds else clamped
    found = list(torch._foreach_clamp_min(list(reals), [low for low, _ in ends]))
    torch._foreach_clamp_max_(found, [high for _, high in ends])
    if rounds:
        torch._foreach_round_(found)
    return found


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


def learned_values(modules: Sequence[_Holding]) -> list[Tensor]:
    """What each is, in its shape; all weights together, which takes a GPU few operators.

    Args:
        modules: weights and biases.
    """
    found: dict[_Holding, Tensor] = {}
    for rounding in ("soft", "straight-through"):
        alike = [m for m in modules if isinstance(m, LearnedWeight) and m.rounding == rounding]
        if alike:
            found.update(zip(alike, _weights(alike), strict=True))
    return [found[m] if m in found else m.value() for m in modules]


def _weights(learned: Sequence[LearnedWeight]) -> tuple[Tensor, ...]:
    """Of one kind of rounding."""
    soft, ends = learned[0].rounding == "soft", [(w.grid.qmin, w.grid.qmax) for w in learned]
    reals = _soft_reals(learned) if soft else [w.codes for w in learned]
    factors = _apply(_Within, torch.cat([w.step for w in learned]), FLOOR, math.inf)
    per_block = torch.cat([w.initial for w in learned]) * factors
    parts = torch.split(per_block, [w.step.numel() for w in learned])
    steps = [w.expand(s) for w, s in zip(learned, parts, strict=True)]
    found: tuple[Tensor, ...] = _OnGrids.apply(ends, not soft, *reals, *steps)  # type: ignore[no-untyped-call]
    return found


def _soft_reals(learned: Sequence[LearnedWeight]) -> list[Tensor]:
    ups = rectified_sigmoids([w.codes for w in learned])
    return list(torch._foreach_add([w.base for w in learned if w.base is not None], ups))


@torch.no_grad()
def dampen(learned: Sequence[LearnedWeight], share: float | Tensor) -> None:
    """Moves every code by this share of its way to the integer it rounds to (not ``soft``).

    Args:
        learned: weights, one or more.
        share: 0 to 1.
    """
    codes: list[Tensor] = [w.codes for w in learned]
    hard = _within(codes, [(w.grid.qmin, w.grid.qmax) for w in learned], rounds=True)
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(codes, hard, share)
        return
    torch._foreach_sub_(hard, codes)
    torch._foreach_mul_(hard, share)
    torch._foreach_add_(codes, hard)


@contextlib.contextmanager
def held_values(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, each weight and bias is computed once for all passes; their gradients reach the variables behind.

    Args:
        modules: of the network; those that variables alone decide are held.
    """
    found = [m for m in dict.fromkeys(modules) if isinstance(m, _Holding)]
    values = learned_values(found)
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
        return learned_values([self])[0]

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

    def hard(self) -> Tensor:
        """The weight with its integers, in its shape."""
        return self.hard_codes() * self.expand(self.scale())

    def softness(self) -> Tensor:
        """How far up each weight is rounded, in 0..1, in its shape (``soft`` only)."""
        return rectified_sigmoids([self.codes])[0]

    def decided(self) -> int:
        """How many roundings are within 1e-3 of up or down; all, where they are straight-through."""
        if self.rounding != "soft":
            return self.codes.numel()
        with torch.no_grad():
            h = self.softness()
            return int(((h < DECIDED) | (h > 1 - DECIDED)).sum())

    def expand(self, per_block: Tensor) -> Tensor:
        """Of each block, in a shape that broadcasts to the weight."""
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
        y = _nearest_on_gpu(x, step, low, high) if _on_gpu(x) else affine.nearest_multiple(x, step, low, high)
        ctx.save_for_backward(x, y, step)
        ctx.bounds = (low, high, factor, mix)
        return _blend(y, x, mix)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step = ctx.saved_tensors
        low, high, factor, mix = ctx.bounds
        gradient = gradients[0]
        if gradient.is_cuda or torch.compiler.is_compiling():
            inside, slope = _gradients_without_waiting(gradient, x, y, step, ctx.bounds, ctx.needs_input_grad[1])
        else:
            s, slope = float(step.detach()), None
            inside = torch.ops.aten.hardtanh_backward(gradient, x, low * s, high * s)
            if ctx.needs_input_grad[1]:
                slope = (_dot(gradient, y) - _dot(inside, x)) * (factor * (1 - mix) / s)
        slope = None if slope is None else slope.to(step.dtype).reshape(step.shape)
        return _blend(inside, gradient, mix), slope, None, None, None, None


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def _nearest_on_gpu(x: Tensor, step: Tensor, low: float, high: float) -> Tensor:
    """``clamp(round(x / step), low, high) * step``, in one operator; a quotient between two integers may go either way.

    PyTorch multiplies by the inverse of the step, and takes the step from the device, so that nothing waits for it.
    """
    zero, one, _ = _constants(x.device)
    found: Tensor = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
        x, step, zero, one, int(low), int(high)
    )[0]
    return found


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A zero point of nothing, a switch that is on, and nothing."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return zero, torch.ones(1, dtype=torch.int64, device=device), torch.zeros((), device=device)


def _gradients_without_waiting(
    gradient: Tensor, x: Tensor, y: Tensor, step: Tensor, bounds: tuple[Any, ...], learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Of ``x``, and of its step where that is learned; no number is looked at on the way.

    The sum is over products with the differences, which in bfloat16 are exact to its eight bits where the two dot
    products would cancel.
    """
    (low, high, factor, mix), s = bounds, step.detach()
    real = x / s
    inside: Tensor = torch.ops.aten.hardtanh_backward(gradient, real, low, high)
    if not learned:
        return inside, None
    within = torch.ops.aten.hardtanh_backward(x, real, low, high)
    total = (gradient * (y - within)).sum(dtype=torch.float32)
    zero = torch.zeros_like(total) if torch.compiler.is_compiling() else _constants(x.device)[2]
    kept = 1.0 if isinstance(mix, Tensor) else 1 - mix
    return inside, _blend(torch.addcdiv(zero, total, s, value=factor * kept), zero, mix if kept == 1.0 else 0.0)


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
        self.used: Tensor | None = None
        zero = float(self.zero_point)
        self._low, self._high = self.grid.qmin - zero, self.grid.qmax - zero

    def forward(self, x: Tensor) -> Tensor:
        """The activation, same shape and dtype."""
        if any(not isinstance(share, Tensor) and share >= 1.0 for share in (self.mix, self.drop)):
            return x
        factor = (x.numel() / self.share * max(self._high, 1.0)) ** -0.5
        ratios = None if self.ratios is None else self.ratios.to(x.dtype)
        reduced = x if ratios is None else x / ratios
        step = _positive(self.step) if self.used is None else self.used
        if self.grid.even:
            y = _apply(_FakeQuantize, reduced, step, self._low, self._high, factor, self.mix)
        else:
            nearest = self.grid.nearest(reduced.detach(), step.detach(), self.zero_point)
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


@contextlib.contextmanager
def one_pass(weights: Iterable[_Holding], activations: Iterable[LearnedActivation]) -> Iterator[None]:
    """While inside, for a single pass, what variables alone decide is there already: computed together.

    On a GPU each operator is a launch, and small ones take as long as large ones.

    Args:
        weights: and biases; those that are held stay what they are.
        activations: whose steps are used.
    """
    free, learned = [w for w in weights if w.held is None], [a for a in activations if a.step.requires_grad]
    steps = _positive(torch.stack([a.step for a in learned])).unbind() if learned else ()
    try:
        for module, value in zip(free, learned_values(free), strict=True):
            module.held = value
        for activation, step in zip(learned, steps, strict=True):
            activation.used = step
        yield
    finally:
        for module in free:
            module.held = None
        for activation in learned:
            activation.used = None


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
