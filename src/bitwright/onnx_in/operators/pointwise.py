"""Functions of single elements: activations, arithmetic, comparisons, conversions."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.onnx_in.operators import OPERATORS, operator
from bitwright.onnx_in.values import Known, Node, NodeCall, Operand, Unsupported, as_view, call, scalar, shape_of

SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "HardSwish": F.hardswish, "Mish": F.mish,
    "Softplus": F.softplus, "Softsign": F.softsign, "Erf": torch.erf, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Abs": torch.abs, "Neg": torch.neg, "Floor": torch.floor, "Ceil": torch.ceil,
    "Round": torch.round, "Sign": torch.sign, "Reciprocal": torch.reciprocal, "Sin": torch.sin, "Cos": torch.cos,
    "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh, "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "bitwright.Silu": F.silu, "bitwright.Mish": F.mish, "bitwright.HardSwish": F.hardswish,
}  # fmt: skip
"""Operators without settings."""


def _simple(node: Node) -> NodeCall:
    return call(SIMPLE[node.kind], node.input(0))


OPERATORS.update(dict.fromkeys(SIMPLE, _simple))


def number_or(node: Node, position: int) -> Operand:
    """The operand, as a number where it is one and no axis more than the others have."""
    value = node.input(position)
    found = scalar(value)
    if found is None or len(shape_of(value)) > len(shape_of(node.input(1 - position))):
        return value
    return found


@operator("Add")
def sum_of_two(node: Node) -> NodeCall:
    """A sum."""
    return _commuting(node, torch.add)


@operator("Mul")
def product_of_two(node: Node) -> NodeCall:
    """A product."""
    return _commuting(node, torch.mul)


def _commuting(node: Node, function: Callable[..., Tensor]) -> NodeCall:
    """Tensors before numbers, and what depends on images before what is stored."""
    a, b = number_or(node, 0), number_or(node, 1)
    stored = isinstance(a, Known | int | float)
    return call(function, *((b, a) if stored else (a, b)))


@operator("bitwright.Affine")
def affine(node: Node) -> NodeCall:
    """A product with stored numbers, plus stored numbers, as one operator."""
    return call(_affine, node.input(0), node.input(1), node.input(2))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, scale, x)


@operator("bitwright.ZeroForNaN")
def zero_for_nan(node: Node) -> NodeCall:
    """0 where the operand is no number."""
    return call(torch.nan_to_num, node.input(0), nan=0.0)


@operator("Sub")
def subtract(node: Node) -> NodeCall:
    """A difference."""
    return call(python.sub, number_or(node, 0), number_or(node, 1))


@operator("Div")
def divide(node: Node) -> NodeCall:
    """A quotient; of whole numbers without its rest."""
    if node.input(0).small.dtype in {torch.int32, torch.int64, np.dtype("int32"), np.dtype("int64")}:
        return call(torch.div, node.input(0), node.input(1), rounding_mode="trunc")
    return call(python.truediv, number_or(node, 0), number_or(node, 1))


@operator("Pow")
def power(node: Node) -> NodeCall:
    """A power."""
    return call(torch.pow, number_or(node, 0), number_or(node, 1))


@operator("Mod")
def remainder(node: Node) -> NodeCall:
    """A remainder, with the sign of the dividend if ``fmod``."""
    return call(torch.fmod if node.whole("fmod", 0) else torch.remainder, node.input(0), node.input(1))


COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip
MIRRORED = {
    "Equal": "Equal", "Greater": "Less", "GreaterOrEqual": "LessOrEqual", "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
}  # fmt: skip


def _compare(node: Node) -> NodeCall:
    a, b = number_or(node, 0), number_or(node, 1)
    if isinstance(a, int | float):
        return call(COMPARISONS[MIRRORED[node.kind]], b, a)
    return call(COMPARISONS[node.kind], a, b)


OPERATORS.update(dict.fromkeys(COMPARISONS, _compare))
VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add, "Mean": torch.add,
}  # fmt: skip


def _variadic(node: Node) -> NodeCall:
    """Bounds by numbers are clamps; else the function is applied to one operand after the other."""
    count = len(node.inputs)
    numbers = [scalar(v) for v in node.inputs]
    if node.kind in {"Max", "Min"} and count == 2 and sum(n is not None for n in numbers) == 1:
        bound = next(n for n in numbers if n is not None)
        x = node.input(numbers.index(None))
        return call(torch.clamp, x, **{"min" if node.kind == "Max" else "max": bound})
    divisor = count if node.kind == "Mean" else 1
    return call(_reduced, *(node.input(k) for k in range(count)), name=node.kind, divisor=divisor)


def _reduced(*tensors: Tensor, name: str, divisor: int) -> Tensor:
    found = reduce(VARIADIC[name], tensors)
    return found if divisor == 1 else found / divisor


OPERATORS.update(dict.fromkeys(VARIADIC, _variadic))


@operator("Clip")
def clip(node: Node) -> NodeCall:
    """Bounds, which are attributes before opset 11; from 0 to 6 it is ReLU6."""
    low, high = (node.number(name, side, k) for name, side, k in (("min", -math.inf, 1), ("max", math.inf, 2)))
    if (low, high) == (0, 6):
        return call(F.hardtanh, node.input(0), min_val=0.0, max_val=6.0)  # as torch.nn.ReLU6 is
    if (low, high) == (0, math.inf):
        return call(F.relu, node.input(0))
    bounds = {k: v for k, v in (("min", low), ("max", high)) if math.isfinite(v) and abs(v) < LARGEST}
    return call(torch.clamp, node.input(0), **bounds) if bounds else call(torch.clone, node.input(0))


LARGEST = float(np.finfo(np.float32).max)
"""A bound as large as this, as old exporters write it, is none."""


@operator("LeakyRelu")
def leaky_relu(node: Node) -> NodeCall:
    """A slope below zero."""
    return call(F.leaky_relu, node.input(0), negative_slope=node.number("alpha", 0.01))


@operator("PRelu")
def prelu(node: Node) -> NodeCall:
    """A slope below zero for each channel, or of any shape."""
    x, slope = node.input(0), node.input(1)
    shape, rank = shape_of(slope), len(shape_of(x))
    channels = shape_of(x)[1] if rank > 1 else 1
    per_channel = len(shape) == rank - 1 and shape[0] == channels and all(d == 1 for d in shape[1:])
    if isinstance(slope, Known) and (slope.small.size == 1 or per_channel):
        return call(F.prelu, x, Known.of(slope.small.reshape(-1)))
    return call(_sloped, x, slope)


def _sloped(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(node: Node) -> NodeCall:
    """An exponential below zero."""
    return call(F.elu, node.input(0), alpha=node.number("alpha", 1.0))


@operator("Celu")
def celu(node: Node) -> NodeCall:
    """An exponential below zero, smooth for any ``alpha``."""
    return call(F.celu, node.input(0), alpha=node.number("alpha", 1.0))


@operator("Selu")
def selu(node: Node) -> NodeCall:
    """A scaled exponential below zero, of the usual constants."""
    alpha, gamma = node.number("alpha", 1.67326319), node.number("gamma", 1.05070102)
    if abs(alpha - 1.67326319) > 1e-5 or abs(gamma - 1.05070102) > 1e-5:
        return call(_scaled_elu, node.input(0), alpha=alpha, gamma=gamma)
    return call(F.selu, node.input(0))


def _scaled_elu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    return F.elu(x, alpha) * gamma


@operator("ThresholdedRelu")
def thresholded_relu(node: Node) -> NodeCall:
    """Zero up to a threshold."""
    return call(F.threshold, node.input(0), threshold=node.number("alpha", 1.0), value=0.0)


@operator("Shrink")
def shrink(node: Node) -> NodeCall:
    """Nothing up to a bound on both sides, beyond it nearer to zero."""
    return call(_shrunk, node.input(0), bias=node.number("bias", 0.0), bound=node.number("lambd", 0.5))


def _shrunk(x: Tensor, *, bias: float, bound: float) -> Tensor:
    return torch.where(x < -bound, x + bias, torch.where(x > bound, x - bias, 0.0))


@operator("IsInf")
def is_infinite(node: Node) -> NodeCall:
    """Whether a value is infinite, of one sign or both."""
    signs = tuple(bool(node.whole(f"detect_{sign}", 1)) for sign in ("negative", "positive"))
    return call(_is_infinite, node.input(0), signs=signs)


def _is_infinite(x: Tensor, *, signs: tuple[bool, ...]) -> Tensor:
    found = torch.isinf(x)
    if all(signs):
        return found
    return found & (x < 0 if signs[0] else x > 0) if any(signs) else torch.zeros_like(found)


@operator("HardSigmoid")
def hard_sigmoid(node: Node) -> NodeCall:
    """A ramp from 0 to 1, by default of another slope than PyTorch's."""
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call(F.hardsigmoid, node.input(0))
    return call(_ramp, node.input(0), alpha=alpha, beta=beta)


def _ramp(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("Gelu", "bitwright.Gelu")
def gelu(node: Node) -> NodeCall:
    """By the error function, or its approximation by tanh."""
    return call(F.gelu, node.input(0), approximate=node.text("approximate", "none"))


@operator("Swish")
def swish(node: Node) -> NodeCall:
    """``x * sigmoid(alpha * x)``."""
    alpha = node.number("alpha", 1.0)
    return call(F.silu, node.input(0)) if alpha == 1 else call(_swish, node.input(0), alpha=alpha)


def _swish(x: Tensor, *, alpha: float) -> Tensor:
    return x * torch.sigmoid(x * alpha)


@operator("Where")
def one_of_two(node: Node) -> NodeCall:
    """One of two values by a condition."""
    return call(torch.where, node.input(0), *(_single(node, k) for k in (1, 2)))


def _single(node: Node, position: int) -> Operand:
    """A number where the result's shape does not hang on it."""
    found = scalar(node.inputs[position])
    return node.input(position) if found is None else found


@operator("Cast", "CastLike")
def cast(node: Node) -> NodeCall:
    """Another type of numbers; all floating ones are float32 here."""
    if node.kind == "CastLike":
        like = node.input(1)
        return call(_cast, node.input(0), dtype=(as_view(like.small) if isinstance(like, Known) else like.small).dtype)
    wanted = TYPES.get(node.whole("to", 1))
    if wanted is None:
        raise Unsupported(f"there is no type number {node.whole('to', 1)} here")
    return call(_cast, node.input(0), dtype=wanted)


def _cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.clone() if x.dtype == dtype else x.to(dtype)


TYPES = {
    1: torch.float32, 10: torch.float32, 11: torch.float32, 16: torch.float32, 2: torch.uint8, 3: torch.int8,
    5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
}  # fmt: skip
"""By the numbers that ONNX gives to types."""


@operator("Dropout")
def dropout(node: Node) -> NodeCall:
    """The same tensor: outside of training nothing is dropped. A mask, if there is one, is not computed."""
    if node.whole("training_mode", 0, position=2) and node.number("ratio", 0.5, position=1):
        raise ModelError(
            f"Expected a network for inference, found a Dropout at '{node.name}' that drops values at random, as in "
            "training. Call eval() before the export."
        )
    return call(_whole, node.input(0), count=node.outputs)


@operator("Identity")
def identity(node: Node) -> NodeCall:
    """The same tensor."""
    return call(_whole, node.input(0), count=node.outputs)


def _whole(x: Tensor, *, count: int) -> Any:
    same = x.clone()
    return same if count == 1 else (same, torch.ones_like(x, dtype=torch.bool))
