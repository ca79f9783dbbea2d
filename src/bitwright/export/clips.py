"""Clamping on codes: ``Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))``, since rounding never swaps two values.

A Clip of floats before QuantizeLinear keeps what gives those floats from becoming an integer kernel in ONNX Runtime; a
Clip of codes behind it does not (1.31: convolutions, matrix products, additions, multiplications).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

NOTE = "bitwright.clamp"
"""Property of a QuantizeLinear: the bounds of the clamping operator that its codes are clipped for, as JSON."""
IN_FLOAT = "/in_float"
"""End of the name of a value that went through a Clip without effect, which keeps its reader's float weight float."""
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that ONNX Runtime moves a QuantizeLinear over."""
READS_INTEGER_BIAS = frozenset({"Conv", "Gemm"})


@dataclass(frozen=True)
class Clamp:
    """``min(max(x, low), high)``; infinite where there is no bound."""

    low: float = -math.inf
    high: float = math.inf

    def after(self, first: Clamp) -> Clamp:
        """Both as one.

        Example:
            >>> Clamp(0, 6).after(Clamp(-1, 4)), Clamp(0, 1).after(Clamp(2, 3))
            (Clamp(low=0, high=4), Clamp(low=1, high=1))
        """
        return Clamp(*(min(max(bound, self.low), self.high) for bound in (first.low, first.high)))

    def ends(self) -> tuple[tuple[str, float], tuple[str, float]]:
        """The bounds by name."""
        return ("low", self.low), ("high", self.high)


@dataclass(frozen=True)
class Span:
    """The codes of a grid as a file stores them, unsigned, from ``low`` to ``high``.

    Example:
        >>> Span(np.float32(0.5), 2, 0, 31).value(31), Span(np.float32(0.5), 2, 0, 31).code(-9.0)
        (array(14.5, dtype=float32), 0)
    """

    scale: npt.NDArray[Any] | np.float32
    zero: int
    low: int
    high: int

    def value(self, code: int) -> npt.NDArray[Any]:
        """What a code stands for, a scalar in float32."""
        return np.asarray((code - self.zero) * self.scale, np.float32)

    def code(self, value: float) -> int:
        """Of a bound, possibly infinite, as QuantizeLinear rounds it, within the span."""
        steps = np.rint(np.float32(value) / np.float32(self.scale)) + self.zero
        return int(min(max(steps, self.low), self.high))

    def within(self, clamp: Clamp) -> Span:
        """The codes that are left of it behind a clamp."""
        return Span(self.scale, self.zero, self.code(clamp.low), self.code(clamp.high))


def dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, also through operators that only move it."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def clamp_before(value: ir.Value) -> tuple[ir.Value, Clamp | None]:
    """What clamping operators before the value's only reader read, and the clamp they are together.

    None, and the value itself, where there is none, or its result is read by something else too.
    """
    found: Clamp | None = None
    while (node := value.producer()) is not None and len(value.uses()) == 1 and not value.is_graph_output():
        first, source = bounds(node), node.inputs[0]
        if first is None or source is None:
            break
        value, found = source, first if found is None else found.after(first)
    return value, found


def bounds(node: ir.Node) -> Clamp | None:
    """Between what an operator clamps; None if it does something else, or computes its bounds."""
    if node.op_type == "Relu":
        return Clamp(low=0.0)
    if node.op_type != "Clip":
        return None
    given = list(node.inputs[1:3])
    if any(v is not None and v.const_value is None for v in given):
        return None
    low, high = (
        None if v is None or v.const_value is None else float(v.const_value.numpy()) for v in (*given, None)[:2]
    )
    return Clamp(-math.inf if low is None else low, math.inf if high is None else high)


def note(codes: ir.Value, clamp: Clamp) -> None:
    """Writes beside a QuantizeLinear what was clamped before it."""
    node = codes.producer()
    assert node is not None
    node.metadata_props[NOTE] = json.dumps([b if math.isfinite(b) else None for b in (clamp.low, clamp.high)])


def noted(quantize: ir.Node) -> Clamp | None:
    """What :func:`note` wrote."""
    if NOTE not in quantize.metadata_props:
        return None
    low, high = json.loads(quantize.metadata_props[NOTE])
    return Clamp(-math.inf if low is None else low, math.inf if high is None else high)


def codes_of(quantize: ir.Node) -> ir.Value:
    """The codes that a QuantizeLinear gives, behind the Clip on them where there is one."""
    codes = quantize.outputs[0]
    readers = [use.node for use in codes.uses()]
    if len(readers) == 1 and readers[0].op_type == "Clip":
        return readers[0].outputs[0]
    return codes
