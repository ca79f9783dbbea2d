"""The frozen network on its integer codes: what simulation and runtime are both measured against.

Sums are exact, biases are integers of the accumulator, and codes come from it by the rule of the runtime's kernel
(:mod:`bitwright.runtimes.rules`). So "simulation against reference" is the error of simulating in float32, and
"reference against runtime" is what a kernel does besides its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.errors import UsageError
from bitwright.export.clips import Clamp
from bitwright.graph import ops
from bitwright.graph.student import Student
from bitwright.quant.quantizer import BiasQuantizer, Frozen, Quantizer
from bitwright.runtimes import RUNTIMES, rules
from bitwright.runtimes.rules import Codes, KernelGrid, Rules

FLOAT_KERNEL = "float"
"""Kernel of a tensor whose codes come from a float value."""


@dataclass
class LayerCodes:
    """Codes of one activation quantizer.

    Attributes:
        codes: int32, as :meth:`Quantizer.codes` gives them.
        kernel: that makes them in the runtime, or ``float``.
    """

    codes: Tensor
    kernel: str


@dataclass
class ReferenceResult:
    """Outputs in the order of ``model.outputs``, and the codes of every activation quantizer by node name."""

    outputs: list[Tensor]
    layers: dict[str, LayerCodes]


def run_reference(
    model: Student,
    images: Tensor,
    runtime: str = "onnxruntime",
    *,
    feed: Mapping[str, Tensor] | None = None,
    keep: bool = True,
) -> ReferenceResult:
    """Runs the frozen network on integers.

    Args:
        model: frozen.
        images: [B, C, H, W].
        runtime: whose rules: ``onnxruntime`` or ``generic``.
        feed: codes by quantizer node that later layers get instead of those computed here, so that every layer is
            judged alone.
        keep: every layer's codes; without it only the outputs.

    Raises:
        UsageError: the model is not frozen, or there are no such rules.
    """
    known = {r.name: r.rules for r in RUNTIMES.values() if r.rules is not None}
    if runtime not in known:
        raise UsageError(f"Expected the rules of a runtime out of {', '.join(known)}, found '{runtime}'.")
    if not model.frozen:
        raise UsageError("Expected a frozen model, found one whose parameters are float. Call freeze() first.")
    reference = _Reference(model.graph, known[runtime], feed or {}, keep)
    with torch.no_grad():
        outputs = reference.run(images)
    return ReferenceResult(list(outputs), reference.layers)


@dataclass
class _Coded:
    """A tensor on the grid of a quantizer; ``centred`` is ``codes - zero_point`` in float64."""

    centred: Tensor
    quantizer: Quantizer

    def value(self, precision: torch.dtype) -> Tensor:
        """Dequantized."""
        scale, _ = self.quantizer.expanded()
        return self.centred.to(precision) * scale.to(precision)

    def stored(self) -> Codes:
        """As a file stores it: unsigned, signed grids around the middle."""
        grid = _grid(self.quantizer)
        return Codes(self.centred + grid.zero_point.double(), grid.scale, grid.zero_point)


@dataclass
class _Bias:
    codes: Tensor
    value: Tensor


@dataclass
class _Pending:
    """An operator's result before its quantizer: as float, and the kernel that would give codes at once."""

    value: Tensor
    kernel: str | None = None
    codes: Callable[[KernelGrid], Tensor] | None = None
    clamp: Clamp = field(default_factory=Clamp)

    def clipped(self, codes: Tensor, grid: KernelGrid) -> Tensor:
        """Codes of the accumulator as clamping leaves them: the clamp is one of codes, as in the file."""
        low, high = (rules.quantize_linear(torch.tensor(b, dtype=torch.float32), grid) for _, b in self.clamp.ends())
        return torch.minimum(torch.maximum(codes, low), high)


def _grid(quantizer: Quantizer) -> KernelGrid:
    """The quantizer's grid in the integers of the file: unsigned ones, of 8 bits or 16."""
    wide = 8 if quantizer.grid.bits <= 8 else 16
    middle = 1 << (wide - 1) if quantizer.grid.symmetric else 0
    scale, zero = quantizer.expanded()
    return KernelGrid(scale, zero + middle, quantizer.grid.qmin + middle, quantizer.grid.qmax + middle)


class _Reference(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, how: Rules, feed: Mapping[str, Tensor], keep: bool) -> None:
        super().__init__(graph)
        self.how, self.feed, self.keep = how, feed, keep
        self.layers: dict[str, LayerCodes] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in {"placeholder", "get_attr"}:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            return [self._real(x).to(self.how.precision) for x in args[0]]
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            return self._quantize(n, module, args[0]) if args else self._stored(module)
        return self._operator(n, args, kwargs)

    # ------------------------------------------------------------------------------------------ quantizers

    def _stored(self, frozen: Frozen) -> _Coded | _Bias:
        quantizer = frozen.quantizer
        if isinstance(quantizer, BiasQuantizer):
            return _Bias(frozen.codes.double(), frozen())
        return _Coded(frozen.codes.double() - quantizer.expanded()[1].double(), quantizer)

    def _quantize(self, node: fx.Node, quantizer: Quantizer, x: Any) -> Any:
        if not quantizer.calibrated:
            return x
        if not quantizer.grid.even:
            return quantizer(self._real(x).to(self.how.precision))
        grid, kernel = _grid(quantizer), FLOAT_KERNEL
        if self._takes(x, quantizer):
            kernel, codes = x.kernel, x.clipped(x.codes(grid), grid)
        else:
            codes = rules.quantize_linear(self._real(x).to(self.how.precision), grid)
        codes = codes - (grid.low - quantizer.grid.qmin)
        if self.keep:
            self.layers[node.name] = LayerCodes(codes.to(torch.int32), kernel)
        fed = self.feed.get(node.name)
        codes = codes if fed is None else fed.double()
        coded = _Coded(codes - quantizer.expanded()[1].double(), quantizer)
        return coded if quantizer.scale.numel() == 1 else coded.value(self.how.precision)

    def _takes(self, x: Any, quantizer: Quantizer) -> bool:
        """Whether the kernel before gives these codes itself."""
        if not isinstance(x, _Pending) or x.codes is None or quantizer.scale.numel() != 1:
            return False
        return quantizer.grid.bits in self.how.output_bits

    def _real(self, x: Any) -> Any:
        """The float value of anything that an operator may read."""
        if isinstance(x, _Coded):
            return x.value(self.how.precision)
        return x.value if isinstance(x, _Pending | _Bias) else x

    # ------------------------------------------------------------------------------------------- operators

    def _operator(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = ops.base_name(node)
        coded = [isinstance(a, _Coded) for a in args[:2]]
        if name in ops.LINEAR and all(coded):
            return self._linear(node, name, args, kwargs)
        if name in ops.MATMUL and all(coded):
            return self._matmul(node, args)
        if name in ops.MOVE | ops.PICK or node.target is getattr:
            moved = self._move(node, args, kwargs)
            if moved is not None:
                return moved
        if name in ops.ACTIVATION and isinstance(args[0], _Pending) and args[0].codes is not None:
            return self._activation(node, name, args, kwargs)
        value = self._float(node, args, kwargs)
        if name in self.how.pairs and all(coded) and len(coded) == 2 and not kwargs:
            return self._pair(node, name, value, args[0], args[1])
        if name in self.how.pools and coded[:1] == [True] and len(node.users) == 1:
            return _Pending(value, self.how.pools[name], lambda grid: rules.average(value, grid))
        return value

    def _float(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator on dequantized values, computed in float64 and rounded once."""

        def widen(x: Any) -> Any:
            x = self._real(x)
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        def narrow(x: Any) -> Any:
            return x.to(self.how.precision) if isinstance(x, Tensor) and x.is_floating_point() else x

        assert callable(node.target)
        result = node.target(*_each(args, widen), **_each(kwargs, widen))
        return _each(result, narrow)

    def _move(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Operators that only move or pick codes; None where there are none to move.

        Codes move centred, so that padding with zeros pads with the zero point.
        """
        source = args[0] if args else None
        if isinstance(source, tuple | list) and any(isinstance(x, _Coded) for x in source):
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if not isinstance(source, _Coded) or ops.pads_with_nonzero(node):
            return None
        assert callable(node.target)
        result = node.target(source.centred, *_each(args[1:], self._real), **kwargs)
        return _each(result, lambda x: _Coded(x, source.quantizer) if _is_float(x) else x)

    def _activation(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Pending:
        """What only clamps is left to the quantizer; anything else ends the integer kernel."""
        value, clamp = self._float(node, args, kwargs), clamp_of(name, args)
        if clamp is None or len(node.users) > 1:
            return _Pending(value)
        x: _Pending = args[0]
        return _Pending(value, x.kernel, x.codes, clamp.after(x.clamp))

    def _pair(self, node: fx.Node, name: str, value: Tensor, a: _Coded, b: _Coded) -> _Pending:
        kernel, arithmetic = self.how.pairs[name]
        narrow = all(x.quantizer.grid.bits <= 8 for x in (a, b))
        signed = any(x.quantizer.role == "parameter" and x.quantizer.grid.symmetric for x in (a, b))
        if len(node.users) > 1 or not narrow or signed:
            return _Pending(value)
        return _Pending(value, kernel, lambda grid: arithmetic(a.stored(), b.stored(), grid))

    def _matmul(self, node: fx.Node, args: tuple[Any, ...]) -> _Pending:
        a, b = args
        assert callable(node.target)
        sums = node.target(a.centred, b.centred)
        step = a.quantizer.scale * b.quantizer.scale
        narrow = all(x.quantizer.grid.bits <= 8 for x in args)
        return self._accumulated(node, "matmul", sums, step, None, integer=narrow)

    def _linear(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        assert callable(node.target)
        sums = node.target(x.centred, weight.centred * 2.0**weight.quantizer.shift, None, *args[3:], **kwargs)
        axis = -1 if name == "linear" else 1
        if weight.quantizer.scale.numel() not in {1, sums.shape[axis]}:
            return self._float(node, args, kwargs)  # several scales within one sum
        shape = (-1,) if axis == -1 else (-1, *[1] * (sums.dim() - 2))
        step = (x.quantizer.scale * weight.quantizer.read_scale).reshape(shape)
        if isinstance(bias, _Bias):
            bias = _Bias(bias.codes.reshape(shape), bias.value.reshape(shape))
        elif bias is not None:
            bias = bias.reshape(shape)
        fits = x.quantizer.grid.bits <= 8 and weight.quantizer.grid.bits in self.how.weight_bits
        return self._accumulated(
            node, _kind(name, sums), sums, step, bias, integer=fits and not isinstance(bias, Tensor)
        )

    def _accumulated(
        self, node: fx.Node, kind: str, sums: Tensor, step: Tensor, bias: _Bias | Tensor | None, *, integer: bool
    ) -> _Pending:
        """The accumulator as the kernel of this kind hands it on."""
        whole = sums + bias.codes if isinstance(bias, _Bias) else sums
        if integer and kind in self.how.to_float:
            value = (whole if kind == "gemm" else sums).float() * step
            if isinstance(bias, _Bias) and kind != "gemm":
                value = value + bias.value
        else:
            exact = whole * step.double() + (bias.double() if isinstance(bias, Tensor) else 0.0)
            value = exact.to(self.how.precision)
        if not integer or kind not in self.how.sums or len(node.users) > 1:
            return _Pending(value)
        return _Pending(value, self.how.sums[kind], lambda grid: rules.requantize(whole, step, grid))


def _kind(name: str, sums: Tensor) -> str:
    """Key of a linear operator in the rules: products of two matrices and of more axes have kernels of their own."""
    if name == "linear":
        return "gemm" if sums.dim() == 2 else "linear"
    return "conv" if name in ops.CONV else "conv_transpose"


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _each(values: Any, function: Callable[[Any], Any]) -> Any:
    """The function of every leaf of nested tuples, lists and dicts."""
    if isinstance(values, dict):
        return {k: _each(v, function) for k, v in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_each(v, function) for v in values)
    return function(values)


def clamp_of(name: str, args: tuple[Any, ...]) -> Clamp | None:
    """Between what an activation clamps; None if it does more."""
    low, high = (args[1] if len(args) > 1 else None), (args[2] if len(args) > 2 else None)
    if any(x is not None and not isinstance(x, int | float) for x in (low, high)):
        return None
    if name == "relu":
        return Clamp(low=0.0)
    if name == "relu6":
        return Clamp(0.0, 6.0)
    if name == "hardtanh":
        return Clamp(-1.0 if low is None else float(low), 1.0 if high is None else float(high))
    if name in {"clamp", "clamp_min", "clamp_max"}:
        low, high = (None, low) if name == "clamp_max" else (low, high)
        return Clamp(float("-inf" if low is None else low), float("inf" if high is None else high))
    return None
